"""Sweeps as their folders tell of them: those of a storage folder, one in full, several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.sweep.records.budget import read_spent
from imbvlm.sweep.records.difference import POST_HOC, TEST
from imbvlm.sweep.records.provenance import data_size
from imbvlm.sweep.records.summary_tables import METRICS, pareto_records
from imbvlm.sweep.records.trial_log import SPEC_FILE, WINNER, TrialLog, TrialRecord
from imbvlm.sweep.spec.sweep_spec import SweepSpec

SPLITS = (TEST, POST_HOC)
BEST_FILE = "best.yaml"
# Lies there from the start of a run until it has come to its end, also of one that adds trials to a finished sweep.
UNFINISHED_FILE = "unfinished"


def read_spec(folder: str) -> SweepSpec:
    """The spec in a sweep's folder; raises ImbvlmError where it isn't one."""
    uri = storage.join(folder, SPEC_FILE)
    if not storage.exists(uri):
        raise ImbvlmError(f"{folder} is not a sweep's folder: it has no {SPEC_FILE}")
    try:
        text = storage.read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise ImbvlmError(f"{uri} is damaged: byte {error.start} is no UTF-8") from None
    return SweepSpec.from_tree(parse_yaml(text, uri))


@dataclass(frozen=True)
class SweepState:
    """One sweep's folder: its spec and records, and how long its runs took where that was counted."""

    folder: str
    spec: SweepSpec
    log: TrialLog
    is_finished: bool
    spent_seconds: float
    # Classes and images; None where an earlier version has begun the sweep.
    size: tuple[int, int] | None = None

    @staticmethod
    def read(folder: str) -> SweepState:
        """Read a folder; raises ImbvlmError where it isn't a sweep's."""
        spec = read_spec(folder)
        # Older sweeps have no word of a run that hasn't come to its end.
        has_best, is_open = (storage.exists(storage.join(folder, name)) for name in (BEST_FILE, UNFINISHED_FILE))
        is_finished, seconds = has_best and not is_open, read_spent(folder).seconds
        return SweepState(folder, spec, TrialLog.read(folder), is_finished, seconds, data_size(folder))

    @property
    def num_ended(self) -> int:
        return sum(record.is_over for record in self.log.of("search"))

    @cached_property
    def best(self) -> TrialRecord | None:
        """The best trial by validation so far."""
        return next(iter(self.log.best(self.spec.objective)), None)

    @property
    def best_value(self) -> float | None:
        """Its objective: the mean of its seeds, where it was run again with more of them."""
        best = self.best
        return None if best is None else self.log.mean_value(best, self.spec.objective)

    @property
    def scored(self) -> list[TrialRecord]:
        """The refits that have read the test split, the winner's first."""
        read = [one for one in self.log.of("refit") if one.epochs and "test/top1_accuracy" in one.epochs[-1]]
        return sorted(read, key=lambda one: one.name != WINNER)

    @property
    def started_at(self) -> float | None:
        return min((one.started_at for one in self.log.records.values() if one.started_at), default=None)

    @property
    def seconds(self) -> float | None:
        """Of all its runs, what lay between them left out; from first start to last end where none has counted."""
        if self.spent_seconds:
            return self.spent_seconds
        ends = [one.ended_at for one in self.log.records.values() if one.ended_at is not None]
        return max(ends) - self.started_at if ends and self.started_at is not None else None

    @property
    def manifest(self) -> str:
        """Where the images' list is, as it was given."""
        return str(self.spec.base["data"]["manifest"])

    @property
    def data(self) -> str:
        """The manifest's name, and its size where the sweep's folder says it."""
        name = self.manifest.rstrip("/").rpartition("/")[2].removesuffix(".parquet")
        if self.size is None:
            return name
        return f"{name}: {pluralize(self.size[0], 'class')}, {pluralize(self.size[1], 'image')}"

    @property
    def compared(self) -> list[tuple[str, str]]:
        """The refits of the winner and of the baselines: as trained, and where that changes predictions as adjusted."""
        names = [WINNER, *sorted({record.name for record in self.log.of("baseline")})]
        rows: list[tuple[str, str]] = []
        for name in names:
            values, adjusted = ([self.test_values(name, metric, split) for metric in METRICS] for split in SPLITS)
            rows += [(name, TEST)] if name == WINNER or any(values) else []
            # A temperature alone changes no prediction.
            rows += [(name, POST_HOC)] if any(adjusted) and adjusted != values else []
        return rows

    def test_values(self, name: str, metric: str, split: str = TEST) -> list[float]:
        """A metric of each seed's refit on the test split."""
        key = f"{split}/{metric}"
        return [one.epochs[-1][key] for one in self.scored if one.name == name and key in one.epochs[-1]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; accuracies are fractions."""
        best = self.best
        names = list(dict.fromkeys(one.name for one in self.scored))
        num_classes, num_images = self.size or (None, None)
        found: dict[str, Any] = {
            "folder": self.folder,
            "name": self.spec.name,
            "state": "finished" if self.is_finished else "unfinished",
            "manifest": self.manifest,
            "num_classes": num_classes,
            "num_images": num_images,
            "objective": self.spec.best_objective,
            "num_trials": self.spec.num_trials,
            "num_ended": self.num_ended,
            "seconds": self.seconds,
            "best": None,
            **{split: self._scores(names, split) for split in SPLITS},
        }
        if self.spec.other_objectives:
            found["pareto"] = [one.trial_id for one in pareto_records(self.log, self.spec)]
        if best is not None:
            found["best"] = {"trial_id": best.trial_id, "value": self.best_value, "config": best.config}
        return found

    def _scores(self, names: Sequence[str], split: str) -> dict[str, dict[str, list[float]]]:
        """Each metric of each seed, by the refits' names; refits without any are absent."""
        scores = {
            name: {metric: values for metric in METRICS if (values := self.test_values(name, metric, split))}
            for name in names
        }
        return {name: values for name, values in scores.items() if values}


@dataclass(frozen=True)
class Unreadable:
    """A sweep's folder that can't be read, and why."""

    folder: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"folder": self.folder, "state": "unreadable", "reason": self.reason}


def sweeps_under(folder: str) -> tuple[list[SweepState], list[Unreadable]]:
    """The sweeps directly in a storage folder, the newest last, and those that can't be read."""
    states, unreadable = [], []
    for one in (storage.join(folder, name) for name in storage.list_files(folder)):
        if not storage.exists(storage.join(one, SPEC_FILE)):
            continue
        try:
            states.append(SweepState.read(one))
        except ImbvlmError as error:
            unreadable.append(Unreadable(one, " ".join(str(error).split())))
    return sorted(states, key=lambda state: state.started_at or 0.0), unreadable


TEST_FILE = "test.json"


def read_readings(folder: str) -> dict[str, Any] | None:
    """When the test split was read and what it has answered; None before. Raises ImbvlmError for a damaged file."""
    uri = storage.join(folder, TEST_FILE)
    if not storage.exists(uri):
        return None
    try:
        found = json.loads(storage.read_bytes(uri))
        return {"read_at": str(found["read_at"]), "scores": dict(found["scores"]), "readings": list(found["readings"])}
    except (ValueError, KeyError, TypeError) as error:
        mend = "remove it, and it is written again, with the time of now, by: imbvlm sweep resume"
        raise ImbvlmError(f"{uri} is damaged ({error!r}); {mend} {folder}") from None
