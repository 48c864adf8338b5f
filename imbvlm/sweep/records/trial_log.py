"""What a sweep has found: one record per trial, written as it happens, and the typed table made of them."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.base.schema import Tree, flatten
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.config.training_sections import MAX_THREADS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.spec.objectives import violations

TrialKind = Literal["baseline", "search", "confirm", "refit"]
TrialState = Literal["running", "paused", "finished", "stopped", "failed", "error"]
SPEC_FILE = "sweep.yaml"
CHECKPOINTS_FOLDER = "checkpoints"
ENDED: frozenset[TrialState] = frozenset({"finished", "stopped", "failed"})


class TrialRecord(BaseModel):
    """One trial. `stopped` by the scheduler, `paused` by a limit; `failed` is its own fault, `error` the machine's."""

    # A diverged epoch has NaN in it; as JSON's null it couldn't be read back.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    trial_id: str
    kind: TrialKind
    name: str = ""
    state: TrialState = "running"
    stop_reason: str = ""
    config: Tree
    draw: dict[str, Any] = {}
    epochs: list[dict[str, float]] = []
    started_at: float = 0.0
    ended_at: float | None = None
    driver: str = ""
    num_threads: int | None = Field(None, ge=1, le=MAX_THREADS)
    # How many trials trained together when it began.
    pack_size: int = 1
    # The first of the trials with which it shares a process; empty where it has one to itself.
    pack: str = ""
    # Why it started again from its first epoch: its checkpoint was damaged.
    restart_reason: str = ""

    def trial_config(self) -> TrialConfig:
        """The configuration, checked."""
        return TrialConfig.from_tree(self.config)

    @property
    def is_over(self) -> bool:
        """Whether it neither runs nor waits to go on."""
        return self.state not in ("running", "paused")

    @property
    def views(self) -> str:
        """How many stored crops an image had in training, and one of a few-shot class; `fresh`: anew in each epoch."""
        config = self.trial_config()
        if config.reads_images:
            return "fresh"
        tail_views = config.features.tail_views
        return f"{config.features.num_views}{'' if tail_views is None else f', few {tail_views}'}"

    @property
    def chosen_tau(self) -> float | None:
        """What tau-normalisation chose on validation; None where nothing was chosen, or not yet."""
        return next((epoch["second_stage/tau"] for epoch in self.epochs if "second_stage/tau" in epoch), None)

    def best_value(self, best_objective: str) -> float | None:
        """The objective's running maximum over epochs; None where no epoch has a finite one.

        None also for a trial that was stopped before it chose a tau, since it couldn't be refitted.
        """
        if self.state not in ENDED or self.state == "failed" or (self._chooses_tau() and self.chosen_tau is None):
            return None
        values = [epoch[best_objective] for epoch in self.epochs if math.isfinite(epoch.get(best_objective, math.nan))]
        return max(values) if values else None

    def _chooses_tau(self) -> bool:
        stage = self.config.get("second_stage") or {}
        return stage.get("name") == "tau_normalization" and stage["tau"] is None

    def best_epoch(self, objective: str) -> dict[str, float] | None:
        """The metrics of the first epoch with the objective's maximum."""
        scored = [epoch for epoch in self.epochs if math.isfinite(epoch.get(objective, math.nan))]
        return max(scored, key=lambda epoch: epoch[objective]) if scored and self.state != "failed" else None

    def seconds(self) -> float:
        """Wall time from start to end, or to now while it runs; of a pack's time a trial has its share."""
        return ((self.ended_at or time.time()) - self.started_at) / self.pack_size


class TrialLog:
    """The records of a sweep's folder: `trials/<id>.json`, each rewritten whole when its trial starts and ends."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        # Of the sweep: who breaks one comes behind all that don't.
        self.constraints: Mapping[str, float] = {}
        self.records: dict[str, TrialRecord] = {}

    @staticmethod
    def read(folder: str) -> TrialLog:
        """All records of a sweep; raises ImbvlmError for one that can't be read."""
        log = TrialLog(folder)
        log.constraints = _constraints(folder)
        for name in storage.list_files(storage.join(folder, "trials")):
            if not name.endswith(".json"):
                continue
            uri = storage.join(folder, "trials", name)
            try:
                record = TrialRecord.model_validate_json(storage.read_bytes(uri))
            except ValidationError as error:
                mistakes = pluralize(error.error_count(), "mistake")
                raise ImbvlmError(
                    f"{uri} is not a trial's record ({mistakes}); remove it to run that trial again"
                ) from None
            # The id is a file's name: another one would be written somewhere else.
            if name != f"{record.trial_id}.json":
                raise ImbvlmError(f"{uri} calls itself {record.trial_id!r}; remove it to run that trial again")
            log.records[record.trial_id] = record
        return log

    def save(self, record: TrialRecord) -> None:
        """Keep a record and write it."""
        self.records[record.trial_id] = record
        storage.write_bytes(
            storage.join(self.folder, "trials", f"{record.trial_id}.json"), record.model_dump_json(indent=1).encode()
        )

    def add_epoch(self, trial_id: str, metrics: dict[str, float]) -> None:
        """Add an epoch's metrics; an epoch that was run again after a restart replaces its first run."""
        record = self.records[trial_id]
        record.epochs = [epoch for epoch in record.epochs if epoch["epoch"] < metrics["epoch"]] + [metrics]

    def of(self, kind: TrialKind) -> list[TrialRecord]:
        """The records of one kind in the order of their ids."""
        return [self.records[key] for key in sorted(self.records) if self.records[key].kind == kind]

    def best(self, objective: str, kind: TrialKind = "search") -> list[TrialRecord]:
        """Records that have a value, the best first; ties go to the earlier trial.

        Those of the search that break a constraint come last, the nearest to meeting them first. Those that were run
        again with more seeds come before the others, by the mean of their seeds: the highest of many single values is
        high by luck, too.
        """
        key, more = _running_maximum(objective), self._further_seeds(objective)
        ranked = []
        for record in self.of(kind):
            value, further = record.best_value(key), more.get(record.trial_id, [])
            if value is not None:
                broken = self.constraint_violation(record, objective) if kind == "search" else 0.0
                ranked.append((broken, not further, -statistics.fmean([value, *further]), record))
        return [record for *_, record in sorted(ranked, key=lambda one: one[:3])]

    def constraint_violation(self, record: TrialRecord, objective: str) -> float:
        """By how much a trial breaks the sweep's constraints, in all; 0 where it meets them."""
        return sum(max(0.0, one) for one in violations(record.epochs, objective, self.constraints))

    def ranked(self, objective: str) -> list[TrialRecord]:
        """As `best` of the search, by each trial's own seed alone."""
        key = _running_maximum(objective)
        known = [(value, one) for one in self.of("search") if (value := one.best_value(key)) is not None]
        return [
            one for _, one in sorted(known, key=lambda pair: (self.constraint_violation(pair[1], objective), -pair[0]))
        ]

    def seed_values(self, record: TrialRecord, objective: str) -> list[float]:
        """The objective's running maximum of a trial and of its runs with more seeds; [] where it has none.

        A further seed that failed counts as 0, for so would the model that is refitted with it.
        """
        value = record.best_value(_running_maximum(objective))
        return [] if value is None else [value, *self._further_seeds(objective).get(record.trial_id, [])]

    def mean_value(self, record: TrialRecord, objective: str) -> float:
        """The mean of its `seed_values`, of which there must be one."""
        return statistics.fmean(self.seed_values(record, objective))

    def _further_seeds(self, objective: str) -> Mapping[str, list[float]]:
        """The running maxima of the runs with more seeds, by the trial that they repeat.

        A run with the trial's own seed is left out, of which older sweeps may have one.
        """
        found: dict[str, list[float]] = {}
        for one in self.of("confirm"):
            trial = self.records.get(one.name)
            own = None if trial is None else f"{trial.trial_id}-seed{(trial.config.get('train') or {}).get('seed')}"
            if one.state in ENDED and one.trial_id != own:
                found.setdefault(one.name, []).append(one.best_value(_running_maximum(objective)) or 0.0)
        return found

    def write_table(self) -> str:
        """Write results.parquet, one row a trial, and return its location."""
        sink = pa.BufferOutputStream()
        pq.write_table(results_table(list(self.records.values())), sink)
        uri = storage.join(self.folder, "results.parquet")
        storage.write_bytes(uri, sink.getvalue().to_pybytes())
        return uri


def _running_maximum(objective: str) -> str:
    return objective.replace("val/", "val/best_")


def _constraints(folder: str) -> Mapping[str, float]:
    """Those of the sweep in a folder; none before it has a specification."""
    uri = storage.join(folder, SPEC_FILE)
    if not storage.exists(uri):
        return {}
    found: Mapping[str, float] = parse_yaml(storage.read_bytes(uri).decode(), uri).data.get("constraints") or {}
    return found


def results_table(records: list[TrialRecord]) -> pa.Table:
    """One row a trial: identity, state, times, every configured key (`config.*`), the last and all epochs' metrics."""
    rows = sorted(records, key=lambda record: (record.kind != "baseline", record.kind == "refit", record.trial_id))
    columns: dict[str, pa.Array] = {
        "trial_id": pa.array([row.trial_id for row in rows], pa.string()),
        "kind": pa.array([row.kind for row in rows], pa.string()),
        "name": pa.array([row.name for row in rows], pa.string()),
        "state": pa.array([row.state for row in rows], pa.string()),
        "stop_reason": pa.array([row.stop_reason for row in rows], pa.string()),
        "views": pa.array([row.views for row in rows], pa.string()),
        "driver": pa.array([row.driver for row in rows], pa.string()),
        "num_threads": pa.array([row.num_threads for row in rows], pa.int64()),
        "pack_size": pa.array([row.pack_size for row in rows], pa.int64()),
        "num_epochs": pa.array([len(row.epochs) for row in rows], pa.int64()),
        "started_at": pa.array([int(row.started_at * 1e6) for row in rows], pa.timestamp("us", tz="UTC")),
        "seconds": pa.array([row.seconds() for row in rows], pa.float64()),
        "config": pa.array([json.dumps(row.config) for row in rows], pa.string()),
    }
    flats = [flatten(row.config) for row in rows]
    for key in dict.fromkeys(key for config in flats for key in config):
        columns[f"config.{key}"] = _typed([config.get(key) for config in flats])
    last = [row.epochs[-1] if row.epochs else {} for row in rows]
    for key in sorted({key for epoch in last for key in epoch}):
        columns[key] = pa.array([epoch.get(key) for epoch in last], pa.float64())
    columns["epochs"] = pa.array(
        [[list(epoch.items()) for epoch in row.epochs] for row in rows], pa.list_(pa.map_(pa.string(), pa.float64()))
    )
    return pa.table(columns)


def _typed(values: list[Any]) -> pa.Array:
    """A column of one type: numbers, words or truth values as they are, anything mixed as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} or kinds <= {bool} or kinds <= {str}:
        return pa.array(
            values, {int: pa.int64(), bool: pa.bool_(), str: pa.string()}[kinds.pop()] if kinds else pa.null()
        )
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def describe_trial(record: TrialRecord) -> str:
    """A trial in a few words: method, loss, classifier, sampling, rate, mixed or varied examples, second stage."""
    config = record.config
    loss, classifier, optim = config.get("loss") or {}, config.get("classifier") or {}, config.get("optim") or {}
    made_of = {**(config.get("mixing") or {}), **(config.get("feature_augmentation") or {})}
    knobs = [
        f"{key} {value:.3g}"
        for key, value in loss.items()
        if isinstance(value, (int, float)) and key in ("gamma", "tau", "exponent", "beta", "max_margin")
    ]
    parts = [
        config["method"].replace("_", " ") + (f" depth {config['decoder']['depth']}" if config.get("decoder") else ""),
        " ".join([loss.get("name", "").replace("_", " "), *knobs]),
        classifier.get("kind", "") + (f" {classifier['temperature']:.3g}" if "temperature" in classifier else ""),
        config["data"]["class_sampling"].replace("_", " "),
        f"lr {optim['lr']:.2g}" if optim else "",
        *(f"{key} {value:.2g}" for key, value in made_of.items() if value),
        f"then {config['second_stage']['name'].replace('_', ' ')}" if config.get("second_stage") else "",
    ]
    return ", ".join(part for part in parts if part)


WINNER = "winner"
