"""The data of a report: everything in a sweep's folder, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.json_file import read_json
from imbvlm.longtail.blending import BlendMember
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.group_gap import GroupedRows
from imbvlm.sweep.records.difference import (
    Difference,
    Verdict,
    baseline_differences,
    delivered_verdict,
    splits_of,
    title_in,
    values_in,
)
from imbvlm.sweep.records.quarantine_list import read_quarantine
from imbvlm.sweep.records.resource_usage import ResourceUsage
from imbvlm.sweep.records.sweep_folder import (
    GapReport,
    SuspectLabel,
    read_gap,
    read_readings,
    read_spec,
    read_suspects,
)
from imbvlm.sweep.records.trial_log import (
    BLEND,
    DELIVERED,
    WINNER,
    TrialLog,
    TrialRecord,
    last_values,
    name_rank,
    refit_folder,
)
from imbvlm.sweep.records.winner_selection import Selection, read_selection
from imbvlm.sweep.report.update_comparison import UpdateComparison
from imbvlm.sweep.spec.baselines import HEADS
from imbvlm.sweep.spec.manifest_path import with_located_manifest
from imbvlm.sweep.spec.search_space import SearchSpace
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.per_class_results import PER_CLASS_FILE
from imbvlm.training.test_predictions import POST_HOC, TEST, TestPredictions


@dataclass(frozen=True)
class PerClassResults:
    """Results of a refit on each class, summed over its seeds; arrays are per class (C,).

    `split` is TEST for the model as trained and POST_HOC for the model as adjusted.
    """

    split: str
    class_names: tuple[str, ...]
    stats: ClassStats
    correct: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence_bins: npt.NDArray[np.float64]
    # By (label, predicted): the count and some rows of the split.
    confusions: Mapping[tuple[int, int], tuple[int, tuple[int, ...]]]
    num_seeds: int
    num_parameters: int
    num_trained_parameters: int

    @property
    def averaged_over(self) -> str:
        """A sentence on the classes that averages include; empty if all classes have test images."""
        num_scored, num_classes = int(np.count_nonzero(self.total)), len(self.total)
        if num_scored == num_classes:
            return ""
        return f"Averages are over the {num_scored:,} of {num_classes:,} classes that have test images."


@dataclass(frozen=True)
class ScoredRefit:
    """The refits of one name (winner, linear probe, ...), one record per seed."""

    name: str
    records: tuple[TrialRecord, ...]
    as_trained: PerClassResults | None
    # The results of the adjusted logits. Sweeps of version 0.1 have only their confidence bins.
    adjusted: PerClassResults | None
    adjusted_bins: npt.NDArray[np.float64] | None

    @property
    def splits(self) -> list[str]:
        """TEST, and POST_HOC if the adjustment changes accuracy; `imbvlm export` writes the model of the last one."""
        return splits_of(self.records)

    @property
    def title(self) -> str:
        """The name, marked if the exported model is adjusted."""
        return title_in(self.name, self.splits[-1])

    @property
    def classes(self) -> PerClassResults | None:
        """Results per class of the model as exported, or as trained if only those were stored."""
        return self.adjusted if self.splits[-1] == POST_HOC and self.adjusted is not None else self.as_trained

    def values(self, metric: str) -> list[float]:
        """The metric, such as `test/few_shot_accuracy`, of each seed that has it."""
        return last_values(self.records, metric)

    def values_in(self, split: str, metric: str) -> list[float]:
        """A metric of each seed, adjusted if `split` says so and the refits were adjusted, else as trained."""
        return values_in(self.records, split, metric)


@dataclass(frozen=True)
class ReportData:
    """The content of a sweep's folder."""

    folder: str
    spec: SweepSpec
    log: TrialLog
    scored: tuple[ScoredRefit, ...]
    quarantine: tuple[Mapping[str, str], ...]
    read_at: str | None

    @staticmethod
    def read(folder: str, manifest: str | None = None) -> ReportData:
        """Read a sweep's folder; raises ImbvlmError without a sweep or without a trial.

        `manifest` is the manifest's present location if it was moved.
        """
        spec, log = with_located_manifest(read_spec(folder), folder, manifest), TrialLog.read(folder)
        if not log.records:
            raise ImbvlmError(
                f"{folder} has no trial yet, so there is nothing to report. Run `imbvlm sweep resume {folder}`."
            )
        by_name: dict[str, list[TrialRecord]] = {}
        for record in [*log.of("delivered"), *log.of("refit")]:
            if record.epochs and record.state == "finished":
                by_name.setdefault(record.name, []).append(record)
        order = sorted(by_name, key=lambda name: (name_rank(name), name == "zero-shot", name))
        scored = tuple(_scored(folder, name, by_name[name]) for name in order)
        readings = read_readings(folder)
        read_at = None if readings is None else readings["read_at"]
        return ReportData(folder, spec, log, scored, read_quarantine(folder), read_at)

    @property
    def delivered(self) -> ScoredRefit | None:
        """The delivered model as exported, or the winner's refits in sweeps of version 0.1; None without them."""
        return self._named(DELIVERED) or self._named(WINNER)

    @cached_property
    def grouped_rows(self) -> GroupedRows | None:
        """The delivered model's test images with their groups, as exported; None where images have none."""
        delivered = self.delivered
        records = () if delivered is None else delivered.records
        folders = [refit_folder(self.folder, record.trial_id) for record in records]
        read = [predictions for predictions in map(TestPredictions.read, folders) if predictions is not None]
        if delivered is None or len(read) < len(records) or not read or read[0].groups is None:
            return None
        is_read = torch.stack([predictions.predicted[TEST] >= 0 for predictions in read]).all(dim=0)
        correct = torch.stack([predictions.correct(delivered.splits[-1])[is_read] for predictions in read]).double()
        labels, groups = (ids[is_read].numpy() for ids in (read[0].labels, read[0].groups))
        return GroupedRows(labels, groups, correct.mean(dim=0).numpy())

    @property
    def delivered_runs(self) -> ScoredRefit | None:
        """The delivered model's runs, one per seed: a blend's, or the winner's refits; None without them."""
        return self._named(BLEND) or self._named(WINNER)

    @cached_property
    def differences(self) -> Mapping[tuple[str, str], Difference]:
        """Differences of the delivered model's runs from the baselines, by name and split."""
        return {} if self.delivered_runs is None else baseline_differences(self.log, self.delivered_runs.records)

    @cached_property
    def verdict_on_test(self) -> Verdict | None:
        """The delivered model against the baselines; None without a test split."""
        return delivered_verdict(self.log, self.spec.objective, self.differences)

    def _named(self, name: str) -> ScoredRefit | None:
        return next((refit for refit in self.scored if refit.name == name), None)

    @property
    def references(self) -> list[ScoredRefit]:
        """The baselines' refits, the best on validation first."""
        names = [record.name for record in self.log.best_baselines(self.spec.objective)]
        return sorted(
            (refit for refit in self.scored if refit.name in names), key=lambda refit: names.index(refit.name)
        )

    @property
    def headline(self) -> list[ScoredRefit]:
        """What figures show: the delivered model and the baselines, of heads the best one."""
        references = self.references
        heads = [refit for refit in references if refit.records[0].config["method"] in HEADS]
        shown = [refit for refit in references if refit not in heads[1:]]
        return [*([] if self.delivered is None else [self.delivered]), *shown]

    @property
    def classes(self) -> PerClassResults | None:
        """Results per class of the delivered model, or of the first refit that has them."""
        return next((refit.classes for refit in self.scored if refit.classes is not None), None)

    @cached_property
    def selection(self) -> Selection | None:
        """What validation has selected; None before, and where the objective selects."""
        return read_selection(self.folder)

    @cached_property
    def update(self) -> UpdateComparison | None:
        """The comparison with the model of the sweep that this one updates; None where it updates none."""
        return UpdateComparison.read(self.folder)

    @cached_property
    def gap(self) -> GapReport | None:
        """The gap to unseen groups; None where it wasn't measured."""
        return read_gap(self.folder)

    @cached_property
    def suspects(self) -> list[SuspectLabel] | None:
        """The images whose labels look wrong, the most suspicious first; None where labels weren't checked."""
        return read_suspects(self.folder)

    @property
    def members(self) -> tuple[BlendMember, ...]:
        """The members of the delivered blend; none where a single trial is delivered."""
        return () if self.selection is None else self.selection.members

    @cached_property
    def best(self) -> TrialRecord | None:
        """The winner, or the best trial of the search where a baseline is the winner."""
        return self.log.best_trial(self.spec.objective)

    def value(self, record: TrialRecord) -> float | None:
        """A trial's highest running maximum of the objective."""
        return record.best_value(self.spec.best_objective)

    def valued(self) -> list[tuple[TrialRecord, float]]:
        """Trials of the search with their values, in the order of starting; trials without a value are left out."""
        pairs = [(record, self.value(record)) for record in self.log.of("search")]
        return [(record, value) for record, value in pairs if value is not None]

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, read once."""
        return self.spec.read_space()

    @cached_property
    def compute(self) -> ResourceUsage:
        """Used and saved time."""
        return ResourceUsage.read(self.folder, self.spec, self.log)

    @property
    def has_test(self) -> bool:
        """Whether a refit was scored on the test split."""
        return any(refit.values("test/top1_accuracy") for refit in self.scored)


def _scored(folder: str, name: str, records: list[TrialRecord]) -> ScoredRefit:
    files = [content for record in records if (content := _class_file(folder, record)) and TEST in content["splits"]]
    trained = [content["splits"][TEST] for content in files]
    adjusted = [content["adjusted"] for content in trained if "adjusted" in content]
    return ScoredRefit(
        name,
        tuple(records),
        _classes(TEST, files, trained) if files else None,
        _classes(POST_HOC, files, adjusted) if files and len(adjusted) == len(files) else None,
        _adjusted_bins(trained),
    )


def _classes(split: str, files: list[dict[str, Any]], splits: list[dict[str, Any]]) -> PerClassResults:
    first = files[0]
    confusions: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
    for counts in splits:
        for pair in counts["confusions"]:
            key = (pair["label"], pair["predicted"])
            count, rows = confusions.get(key, (0, ()))
            confusions[key] = (count + pair["count"], tuple(dict.fromkeys([*rows, *pair["rows"]])))
    sums = {name: np.sum([counts[name] for counts in splits], axis=0) for name in ("correct", "total", "predicted")}
    return PerClassResults(
        split=split,
        class_names=tuple(first["class_names"]),
        stats=ClassStats.from_counts(first["class_counts"], first["split_counts"]),
        **sums,
        confidence_bins=np.sum([counts["confidence_bins"] for counts in splits], axis=0),
        confusions=confusions,
        num_seeds=len(files),
        num_parameters=first["num_parameters"],
        num_trained_parameters=first["num_trained_parameters"],
    )


def _adjusted_bins(splits: list[dict[str, Any]]) -> npt.NDArray[np.float64] | None:
    adjusted = [counts["adjusted_confidence_bins"] for counts in splits if "adjusted_confidence_bins" in counts]
    plain = [counts["confidence_bins"] for counts in splits]
    return np.sum(adjusted, axis=0) if len(adjusted) == len(splits) and adjusted != plain else None


def _class_file(folder: str, record: TrialRecord) -> dict[str, Any] | None:
    uri = storage.join(refit_folder(folder, record.trial_id), PER_CLASS_FILE)
    return read_json(uri, dict[str, Any], "Remove it to make a report without its classes.")
