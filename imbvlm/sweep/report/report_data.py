"""What a report is made of: all that a sweep's folder says, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.sweep.records.difference import POST_HOC, TEST, splits_of, title_in, values_in
from imbvlm.sweep.records.quarantine_list import read_quarantine
from imbvlm.sweep.records.resource_usage import ResourceUsage
from imbvlm.sweep.records.sweep_folder import read_readings, read_spec
from imbvlm.sweep.records.trial_log import WINNER, TrialLog, TrialRecord
from imbvlm.sweep.spec.manifest_path import with_located_manifest
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.per_class_results import CLASS_RECORD_FILE


@dataclass(frozen=True)
class PerClassResults:
    """What some refits made of the classes, added over their seeds; arrays are per class (C,).

    `split` says whether as trained (TEST) or as adjusted (POST_HOC).
    """

    split: str
    class_names: tuple[str, ...]
    stats: ClassStats
    correct: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence_bins: npt.NDArray[np.float64]
    # By (label, predicted): how often, and rows of the split.
    confusions: Mapping[tuple[int, int], tuple[int, tuple[int, ...]]]
    num_seeds: int
    num_parameters: int
    num_trained_parameters: int

    @property
    def averaged_over(self) -> str:
        """Which classes the test split's averages are of, as a sentence; empty where it has images of all."""
        num_scored, num_classes = int(np.count_nonzero(self.total)), len(self.total)
        if num_scored == num_classes:
            return ""
        return f"Averages are over the {num_scored:,} of {num_classes:,} classes that have test images."


@dataclass(frozen=True)
class ScoredRefit:
    """The refits of one name (winner, linear probe, ...), one record a seed."""

    name: str
    records: tuple[TrialRecord, ...]
    as_trained: PerClassResults | None
    # The same of the logits after what is done post hoc. Sweeps of version 0.1 have the confidence bins alone.
    adjusted: PerClassResults | None
    adjusted_bins: npt.NDArray[np.float64] | None

    @property
    def splits(self) -> list[str]:
        """As trained, and as adjusted where that changes accuracy; the last is what `imbvlm export` gives."""
        return splits_of(self.records)

    @property
    def title(self) -> str:
        """Its name, with what is done to it as it is exported."""
        return title_in(self.name, self.splits[-1])

    @property
    def classes(self) -> PerClassResults | None:
        """The classes of the model as it is exported, or as trained where nothing else was kept."""
        return self.adjusted if self.splits[-1] == POST_HOC and self.adjusted is not None else self.as_trained

    def values(self, metric: str) -> list[float]:
        """The metric of each seed that has it, such as `test/few_shot_accuracy`."""
        return [record.epochs[-1][metric] for record in self.records if metric in record.epochs[-1]]

    def values_in(self, split: str, metric: str) -> list[float]:
        """Each seed's metric as adjusted where `split` says so and there is an adjustment, else as trained."""
        return values_in(self.records, split, metric)


@dataclass(frozen=True)
class ReportData:
    """A sweep's folder, read."""

    folder: str
    spec: SweepSpec
    log: TrialLog
    scored: tuple[ScoredRefit, ...]
    quarantine: tuple[Mapping[str, str], ...]
    read_at: str | None

    @staticmethod
    def read(folder: str, manifest: str | None = None) -> ReportData:
        """Read records, refits and lists; raises ImbvlmError where there is no sweep or no trial in it yet.

        `manifest` is where the sweep's manifest is by now.
        """
        spec, log = with_located_manifest(read_spec(folder), folder, manifest), TrialLog.read(folder)
        if not log.records:
            raise ImbvlmError(f"{folder} has no trial yet, so there is nothing to report")
        by_name: dict[str, list[TrialRecord]] = {}
        for record in log.of("refit"):
            if record.epochs and record.state == "finished":
                by_name.setdefault(record.name, []).append(record)
        order = sorted(by_name, key=lambda name: (name != WINNER, name == "zero-shot", name))
        scored = tuple(_scored(folder, name, by_name[name]) for name in order)
        readings = read_readings(folder)
        read_at = None if readings is None else readings["read_at"]
        return ReportData(folder, spec, log, scored, read_quarantine(folder), read_at)

    @property
    def winner(self) -> ScoredRefit | None:
        """The winner's refits, where there are any."""
        return next((one for one in self.scored if one.name == WINNER), None)

    @property
    def references(self) -> list[ScoredRefit]:
        """The baselines' refits."""
        names = {record.name for record in self.log.of("baseline")}
        return [one for one in self.scored if one.name in names]

    @property
    def headline(self) -> list[ScoredRefit]:
        """What figures show: the winner beside the baselines."""
        return [*([] if self.winner is None else [self.winner]), *self.references]

    @property
    def classes(self) -> PerClassResults | None:
        """The winner's class record as it is exported, or any that knows the classes."""
        known = [one.classes for one in self.scored if one.classes is not None]
        return known[0] if known else None

    @property
    def best(self) -> TrialRecord | None:
        """The trial that won the search."""
        return next(iter(self.log.best(self.spec.objective)), None)

    def value(self, record: TrialRecord) -> float | None:
        """The objective's running maximum."""
        return record.best_value(self.spec.best_objective)

    def valued(self) -> list[tuple[TrialRecord, float]]:
        """Search trials with a value, in the order in which they were started."""
        pairs = [(record, self.value(record)) for record in self.log.of("search")]
        return [(record, value) for record, value in pairs if value is not None]

    @cached_property
    def compute(self) -> ResourceUsage:
        """What the time went into and what was spared."""
        return ResourceUsage.read(self.folder, self.spec, self.log)

    @property
    def has_test(self) -> bool:
        return any(one.values("test/top1_accuracy") for one in self.scored)


def _scored(folder: str, name: str, records: list[TrialRecord]) -> ScoredRefit:
    files = [one for record in records if (one := _class_file(folder, record)) and TEST in one["splits"]]
    plain = [one["splits"][TEST] for one in files]
    after = [one["adjusted"] for one in plain if "adjusted" in one]
    return ScoredRefit(
        name,
        tuple(records),
        _classes(TEST, files, plain) if files else None,
        _classes(POST_HOC, files, after) if files and len(after) == len(files) else None,
        _adjusted_bins(plain),
    )


def _classes(split: str, files: list[dict[str, Any]], splits: list[dict[str, Any]]) -> PerClassResults:
    first = files[0]
    confusions: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
    for one in splits:
        for pair in one["confusions"]:
            key = (pair["label"], pair["predicted"])
            count, rows = confusions.get(key, (0, ()))
            confusions[key] = (count + pair["count"], tuple(dict.fromkeys([*rows, *pair["rows"]])))
    sums = {name: np.sum([one[name] for one in splits], axis=0) for name in ("correct", "total", "predicted")}
    return PerClassResults(
        split=split,
        class_names=tuple(first["class_names"]),
        stats=ClassStats.from_counts(first["class_counts"], first["split_counts"]),
        **sums,
        confidence_bins=np.sum([one["confidence_bins"] for one in splits], axis=0),
        confusions=confusions,
        num_seeds=len(files),
        num_parameters=first["num_parameters"],
        num_trained_parameters=first["num_trained_parameters"],
    )


def _adjusted_bins(splits: list[dict[str, Any]]) -> npt.NDArray[np.float64] | None:
    found = [one["adjusted_confidence_bins"] for one in splits if "adjusted_confidence_bins" in one]
    plain = [one["confidence_bins"] for one in splits]
    return np.sum(found, axis=0) if len(found) == len(splits) and found != plain else None


def _class_file(folder: str, record: TrialRecord) -> dict[str, Any] | None:
    uri = storage.join(folder, "refits", record.trial_id, CLASS_RECORD_FILE)
    if not storage.exists(uri):
        return None
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except ValueError:
        raise ImbvlmError(f"{uri} is damaged; remove it to make a report without its classes") from None
    return content
