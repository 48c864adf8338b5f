"""Sweeps as their folders tell of them: those of a storage folder, one in full, several side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from imbvlm import storage
from imbvlm.data.table import count_of
from imbvlm.errors import ImbvlmError
from imbvlm.sweep.budget import read_spent
from imbvlm.sweep.compute import Compute, compute_text
from imbvlm.sweep.console import duration, percent, table
from imbvlm.sweep.difference import refits_of, verdict_on_test
from imbvlm.sweep.provenance import data_size
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

Split = Literal["test", "test_post_hoc"]
SPLITS: tuple[Split, Split] = ("test", "test_post_hoc")
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
        return f"{name}: {count_of(self.size[0], 'class')}, {count_of(self.size[1], 'image')}"

    @property
    def compared(self) -> list[tuple[str, Split]]:
        """The refits of the winner and of the baselines: as trained, and where that changes predictions as adjusted."""
        names = [WINNER, *sorted({one.name for one in self.log.of("baseline")})]
        found: list[tuple[str, Split]] = []
        for name in names:
            values, adjusted = ([self.test_values(name, one, split) for one in METRICS] for split in SPLITS)
            found += [(name, "test")] if name == WINNER or any(values) else []
            # A temperature alone changes no prediction.
            found += [(name, "test_post_hoc")] if any(adjusted) and adjusted != values else []
        return found

    def test_values(self, name: str, metric: str, split: Split = "test") -> list[float]:
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

    def _scores(self, names: Sequence[str], split: Split) -> dict[str, dict[str, list[float]]]:
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


def list_text(states: Sequence[SweepState], unreadable: Sequence[Unreadable]) -> str:
    """The sweeps as a table, and below it those that can't be read, with the reasons."""
    lines = [f"{one.folder}  unreadable: {one.reason}" for one in unreadable]
    return "\n".join([*([_table(states)] if states else []), *lines])


def _table(states: Sequence[SweepState]) -> str:
    """A row a sweep: state, trials, best so far, on which data, when and where."""
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
                state.data,
                "-" if state.started_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(state.started_at)),
            ]
        )
    return table(["sweep", "state", "trials", "best", "objective (%)", "trial", "data", "started"], rows)


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
    """Sweeps side by side: winners and baselines on the test split, as trained and as adjusted after training."""
    wanted = {row: row[0] for state in states for row in state.compared}
    rows = [
        _compared_row(state, name, split)
        for name, split in sorted(wanted, key=lambda row: (row[0] != WINNER, row[0] == "zero-shot", row))
        for state in states
        if (name, split) in state.compared
    ]
    header = ["sweep", "what", "trials", "time", "validation", *HEADINGS, "views", "configuration"]
    parts = [
        "best on validation by the sweep's objective; refits on the test split, mean ± deviation of seeds (%); an "
        "exported model is the winner, post hoc where there is such a row:"
    ]
    parts += [table(header, rows), *_unlike(states)]
    return "\n".join(parts)


def _compared_row(state: SweepState, name: str, split: Split) -> list[str]:
    is_winner = name == WINNER
    log, objective = state.log, state.spec.objective
    ranked = [
        one for one in log.best(objective, "search" if is_winner else "baseline") if is_winner or one.name == name
    ]
    record = next(iter(ranked), None)
    return [
        state.folder.rstrip("/").rpartition("/")[2],
        name if split == "test" else f"{name}, post hoc",
        f"{state.num_ended}/{state.spec.num_trials}" if is_winner else "-",
        "-" if state.seconds is None or not is_winner else duration(state.seconds),
        # It is of the model as trained.
        percent(None if record is None or split != "test" else log.mean_value(record, objective)),
        *(mean_and_spread(state.test_values(name, metric, split)) for metric in METRICS),
        "-" if record is None else record.views,
        "-" if record is None or not is_winner else describe(record),
    ]


def _unlike(states: Sequence[SweepState]) -> list[str]:
    """What keeps the numbers from being comparable."""
    found = []
    for what, values in (
        ("data", [state.manifest for state in states]),
        ("objectives", [state.spec.objective for state in states]),
    ):
        if len(set(values)) > 1:
            found.append(f"these sweeps have unlike {what} ({', '.join(dict.fromkeys(values))}): compare with care")
    return found
