"""Sweeps as their folders tell of them: those of a storage folder, one in full, several side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from imbvlm import storage
from imbvlm.errors import ImbvlmError
from imbvlm.sweep.budget import read_spent
from imbvlm.sweep.compute import Compute, compute_text
from imbvlm.sweep.console import duration, percent, table
from imbvlm.sweep.difference import refits_of, verdict_on_test
from imbvlm.sweep.refits import WINNER
from imbvlm.sweep.results import SPEC_FILE, TrialLog, TrialRecord
from imbvlm.sweep.spec import SweepSpec
from imbvlm.sweep.summary import (
    HEADINGS,
    METRICS,
    causes,
    describe,
    mean_and_spread,
    pareto_records,
    pareto_table,
    scores_table,
    search_table,
    seeds_rows,
    seeds_table,
    verdict,
)
from imbvlm.yaml_file import parse_yaml

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

    @staticmethod
    def read(folder: str) -> SweepState:
        """Read a folder; raises ImbvlmError where it isn't a sweep's."""
        spec = read_spec(folder)
        # Older sweeps have no word of a run that hasn't come to its end.
        has_best, is_open = (storage.exists(storage.join(folder, name)) for name in (BEST_FILE, UNFINISHED_FILE))
        return SweepState(folder, spec, TrialLog.read(folder), has_best and not is_open, read_spent(folder).seconds)

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

    def test_values(self, name: str, metric: str) -> list[float]:
        """A metric of each seed's refit on the test split."""
        key = f"test/{metric}"
        return [one.epochs[-1][key] for one in self.scored if one.name == name and key in one.epochs[-1]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; accuracies are fractions."""
        best = self.best
        names = list(dict.fromkeys(one.name for one in self.scored))
        found = {
            "folder": self.folder,
            "name": self.spec.name,
            "state": "finished" if self.is_finished else "unfinished",
            "manifest": self.spec.base["data"]["manifest"],
            "objective": self.spec.best_objective,
            "num_trials": self.spec.num_trials,
            "num_ended": self.num_ended,
            "seconds": self.seconds,
            "best": None,
            "test": {
                name: {metric: values for metric in METRICS if (values := self.test_values(name, metric))}
                for name in names
            },
        }
        if self.spec.other_objectives:
            found["pareto"] = [one.trial_id for one in pareto_records(self.log, self.spec)]
        if best is not None:
            found["best"] = {"trial_id": best.trial_id, "value": self.best_value, "config": best.config}
        return found


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


def list_text(states: Sequence[SweepState], unreadable: Sequence[Unreadable]) -> str:
    """The sweeps as a table, and below it those that can't be read, with the reasons."""
    lines = [f"{one.folder}  unreadable: {one.reason}" for one in unreadable]
    return "\n".join([*([_table(states)] if states else []), *lines])


def _table(states: Sequence[SweepState]) -> str:
    """A row a sweep: state, trials, best so far, when and where."""
    rows = []
    for state in states:
        best = state.best
        rows.append(
            [
                state.folder,
                "finished" if state.is_finished else "unfinished",
                f"{state.num_ended}/{state.spec.num_trials}",
                percent(state.best_value),
                state.spec.objective,
                "-" if best is None else best.trial_id,
                "-" if state.started_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(state.started_at)),
            ]
        )
    return table(["sweep", "state", "trials", "best", "objective (%)", "trial", "started"], rows)


def show_text(state: SweepState) -> str:
    """What a finished sweep has printed, and of an unfinished one what there is."""
    spec, log = state.spec, state.log
    where = "finished" if state.is_finished else f"unfinished; go on with: imbvlm sweep resume {state.folder}"
    parts = [f"sweep {spec.name}: {state.num_ended} of {spec.num_trials} trials, {where}"]
    failed = [one for one in log.of("search") if one.state in ("failed", "error")]
    parts += [causes(failed)] if failed else []
    if state.best is not None:
        parts += ["", search_table(log, spec)]
        parts += [seeds_table(log, spec)] if seeds_rows(log, spec) else []
        parts += [verdict(log, spec)]
    if state.best is not None and spec.other_objectives:
        parts += ["", pareto_table(pareto_records(log, spec), spec)]
    if state.scored:
        parts += ["", scores_table(state.scored, spec)]
        on_test = verdict_on_test(log, refits_of(log, WINNER), "the winner")
        parts += [] if on_test is None else [str(on_test)]
    time_and_savings = compute_text(Compute.read(state.folder, spec, log))
    parts += ["", time_and_savings] if time_and_savings else []
    return "\n".join(parts)


def compare_text(states: Sequence[SweepState]) -> str:
    """Sweeps side by side: their winners on validation and on the test split, and the linear probe's."""
    rows = []
    for state in states:
        best = state.best
        rows.append(
            [
                state.folder.rstrip("/").rpartition("/")[2],
                f"{state.num_ended}/{state.spec.num_trials}",
                "-" if state.seconds is None else duration(state.seconds),
                percent(state.best_value),
                *(mean_and_spread(state.test_values(WINNER, metric)) for metric in METRICS),
                "-" if best is None else best.views,
                "-" if best is None else describe(best),
            ]
        )
    header = ["sweep", "trials", "time", "validation", *HEADINGS, "views", "winner"]
    parts = ["best on validation by the sweep's objective; winners on the test split, mean ± deviation of seeds (%):"]
    parts += [table(header, rows), *_unlike(states)]
    return "\n".join(parts)


def _unlike(states: Sequence[SweepState]) -> list[str]:
    """What keeps the numbers from being comparable."""
    found = []
    for what, values in (
        ("data", [str(state.spec.base["data"]["manifest"]) for state in states]),
        ("objectives", [state.spec.objective for state in states]),
    ):
        if len(set(values)) > 1:
            found.append(f"these sweeps have unlike {what} ({', '.join(dict.fromkeys(values))}): compare with care")
    return found
