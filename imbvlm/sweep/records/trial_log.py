"""The trials of a sweep: one record for each, written while it runs."""

from __future__ import annotations

import json
import math
import statistics
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.base.json_file import read_json
from imbvlm.base.schema import Tree
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.config.method_registry import METHODS
from imbvlm.config.training_sections import MAX_THREADS
from imbvlm.config.trial_config import TrialConfig, option_metric, selected_options
from imbvlm.sweep.spec.baselines import encoder_suffix
from imbvlm.sweep.spec.objectives import best_epoch, running_maximum, violations

TrialKind = Literal["baseline", "search", "confirm", "folds", "refit", "pairs", "gap", "delivered"]
TrialState = Literal["running", "paused", "finished", "stopped", "failed", "error"]
WINNER = "winner"
# The names of the model that a sweep delivers, and of a blend by seed.
DELIVERED, BLEND = "delivered", "blend"
SPEC_FILE = "sweep.yaml"
SELECTION_FILE = "selection.json"
CHECKPOINTS_FOLDER = "checkpoints"
# Records share equal sections. Most sections differ little within a search, so that the latest few suffice.
MAX_SHARED_SECTIONS = 8
ENDED: frozenset[TrialState] = frozenset({"finished", "stopped", "failed"})


class EpochMetrics(Mapping[str, float]):
    """An epoch's metrics as numbers in a row, which take a third of a dict's memory.

    Epochs with equal names share `places`, a name's place in the row.
    """

    __slots__ = ("_places", "_values")

    def __init__(self, places: Mapping[str, int], values: Iterable[float]) -> None:
        self._places, self._values = places, array("d", values)

    def __getitem__(self, name: str) -> float:
        return self._values[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _dicts(epochs: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    return [dict(epoch) for epoch in epochs]


class TrialRecord(BaseModel):
    """One trial.

    The scheduler has stopped a `stopped` one; a limit has interrupted a `paused` one. A trial that failed by its own
    fault is `failed`; `error` is the machine's fault.
    """

    # A diverged epoch contains NaN, which couldn't be read back from JSON's null.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    trial_id: str
    kind: TrialKind
    name: str = ""
    state: TrialState = "running"
    stop_reason: str = ""
    config: Tree
    draw: dict[str, Any] = {}
    epochs: Annotated[list[Mapping[str, float]], PlainSerializer(_dicts, return_type=list[dict[str, float]])] = []
    started_at: float = 0.0
    ended_at: float | None = None
    driver: str = ""
    num_threads: int | None = Field(None, ge=1, le=MAX_THREADS)
    # Number of trials that trained together when this one began, or of baselines that train nothing in its process.
    pack_size: int = 1
    # Id of the first trial in its process; empty for a trial that has a process of its own.
    pack: str = ""
    # Why it started again from its first epoch: its checkpoint was damaged.
    restart_reason: str = ""

    def trial_config(self) -> TrialConfig:
        """The configuration, checked; keys of version 0.1 are dropped."""
        return TrialConfig.from_record(self.config)

    @property
    def is_over(self) -> bool:
        """Whether the trial neither runs nor waits to be resumed."""
        return self.state not in ("running", "paused")

    @property
    def views(self) -> str:
        """Number of stored crops per training image, also of few-shot classes; `fresh` for new crops in each epoch."""
        config = self.trial_config()
        if config.reads_images:
            return "fresh"
        # A key of version 0.1, which configurations no longer have.
        tail_views = (self.config.get("features") or {}).get("tail_views")
        return f"{config.features.num_views}{'' if tail_views is None else f', few {tail_views}'}"

    @property
    def selected_options(self) -> dict[str, float | None]:
        """The options that validation selects, such as second_stage.tau; None where it hasn't selected yet."""
        return {
            key: next((epoch[option_metric(key)] for epoch in self.epochs if option_metric(key) in epoch), value)
            for key, value in selected_options(self.config).items()
        }

    def best_value(self, best_objective: str) -> float | None:
        """The highest running maximum of the objective; None if no epoch has a finite one.

        A trial that was stopped before it selected a tau has no value, because it couldn't be refitted.
        """
        if self.state not in ENDED or self.state == "failed" or None in self.selected_options.values():
            return None
        best = best_epoch(self.epochs, best_objective)
        return None if best is None else best[best_objective]

    def best_epoch(self, objective: str) -> Mapping[str, float] | None:
        """The metrics of the first epoch with the objective's maximum; None for a failed trial or without a value."""
        return None if self.state == "failed" else best_epoch(self.epochs, objective)

    def seconds(self) -> float:
        """Wall time from start to end, or until now while it runs, divided by the number of trials in its pack."""
        return ((self.ended_at or time.time()) - self.started_at) / self.pack_size


def refit_folder(folder: str, trial_id: str) -> str:
    """The folder of a refit's weights and results in a sweep's folder."""
    return storage.join(folder, "refits", trial_id)


def resume_fix(folder: str) -> str:
    """What to do about a damaged file of a sweep's folder."""
    return f"Remove it and go on with: imbvlm sweep resume {folder}"


def name_rank(name: str) -> int:
    """The place of scores in tables by their name: delivered model, seeds of a blend, winner, then the others."""
    first = (DELIVERED, BLEND, WINNER)
    return first.index(name) if name in first else len(first)


def last_values(records: Iterable[TrialRecord], metric: str) -> list[float]:
    """A metric of each record's last epoch; records without it are left out."""
    return [record.epochs[-1][metric] for record in records if record.epochs and metric in record.epochs[-1]]


@dataclass(frozen=True)
class Selected:
    """The ids that validation has selected: the winner, and the members of a blend.

    `log_likelihoods` are those of all candidates, trials and baselines.
    """

    winner: str
    members: tuple[str, ...]
    log_likelihoods: Mapping[str, float]

    @staticmethod
    def from_dict(content: Any) -> Selected:
        """Read the content of selection.json; raises the error of a missing or malformed value."""
        members = tuple(str(member["name"]) for member in content["members"])
        return Selected(str(content["winner"]), members, dict(content["log_likelihoods"]))


class TrialLog:
    """The records of a sweep's folder: `trials/<id>.json`, each rewritten whole when its trial starts and ends.

    A search of 10,000 trials has all records in memory: they share equal sections of configurations.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        # The sweep's constraints: trials that violate one are ranked after all others.
        self.constraints: Mapping[str, float] = {}
        # None before validation has selected, and where the objective selects.
        self.selected: Selected | None = None
        self.records: dict[str, TrialRecord] = {}
        # By a section's name and its JSON text, the latest MAX_SHARED_SECTIONS of each.
        self._sections: dict[str, dict[str, Any]] = {}
        self._places: dict[tuple[str, ...], Mapping[str, int]] = {}

    @staticmethod
    def read(folder: str) -> TrialLog:
        """Read all records of a sweep; raises ImbvlmError for an unreadable one."""
        log = TrialLog(folder)
        log.constraints, log.selected = _constraints(folder), _read_selected(folder)
        for name in storage.list_files(storage.join(folder, "trials")):
            if not name.endswith(".json"):
                continue
            uri = storage.join(folder, "trials", name)
            try:
                record = TrialRecord.model_validate_json(storage.read_bytes(uri))
            except ValidationError as error:
                mistakes = pluralize(error.error_count(), "mistake")
                raise ImbvlmError(
                    f"{uri} is not a trial's record ({mistakes}). Remove it to run that trial again."
                ) from None
            # The id names the file: a record with another id would be written elsewhere.
            if name != f"{record.trial_id}.json":
                raise ImbvlmError(f"{uri} is the record of {record.trial_id!r}. Remove it to run that trial again.")
            log._add(record)
        return log

    def save(self, record: TrialRecord) -> None:
        """Keep a record and write it."""
        self._add(record)
        storage.write_bytes(
            storage.join(self.folder, "trials", f"{record.trial_id}.json"), record.model_dump_json(indent=1).encode()
        )

    def add_epoch(self, trial_id: str, metrics: dict[str, float]) -> None:
        """Add an epoch's metrics; an epoch that ran again after a restart replaces its first run."""
        record = self.records[trial_id]
        earlier = [epoch for epoch in record.epochs if epoch["epoch"] < metrics["epoch"]]
        record.epochs = [*earlier, self._compact(metrics)]

    def _add(self, record: TrialRecord) -> None:
        record.config = {key: self._shared(key, section) for key, section in record.config.items()}
        record.epochs = [self._compact(epoch) for epoch in record.epochs]
        self.records[record.trial_id] = record

    def _shared(self, key: str, section: Any) -> Any:
        """An equal section of an earlier record; most trials differ in few of them."""
        latest, text = self._sections.setdefault(key, {}), json.dumps(section)
        if text not in latest:
            if len(latest) == MAX_SHARED_SECTIONS:
                del latest[next(iter(latest))]
            latest[text] = section
        return latest[text]

    def _compact(self, metrics: Mapping[str, float]) -> EpochMetrics:
        names = tuple(metrics)
        places = self._places.setdefault(names, {name: place for place, name in enumerate(names)})
        return EpochMetrics(places, metrics.values())

    def of(self, kind: TrialKind) -> list[TrialRecord]:
        """The records of one kind in the order of their ids."""
        return [self.records[key] for key in sorted(self.records) if self.records[key].kind == kind]

    def best(self, objective: str, kind: TrialKind = "search") -> list[TrialRecord]:
        """Records that have a value, the best first; ties go to the earlier trial.

        Trials of the search that violate a constraint come last, the smallest violation first. Trials with more seeds
        come before the others and are ranked by the mean of their seeds, because the highest of many single values is
        partly luck.
        """
        key, more = running_maximum(objective), self._further_seeds(objective)
        ranked = []
        for record in self.of(kind):
            value, further = record.best_value(key), more.get(record.trial_id, [])
            if value is not None:
                violation = self.constraint_violation(record, objective) if kind == "search" else 0.0
                ranked.append((violation, not further, -statistics.fmean([value, *further]), record))
        return [record for *_, record in sorted(ranked, key=lambda entry: entry[:3])]

    def winner(self, objective: str) -> TrialRecord | None:
        """The selected trial or baseline; before the selection the best trial by the objective, None without one."""
        return next(iter(self.winner_first(objective)), None)

    def best_trial(self, objective: str) -> TrialRecord | None:
        """The winner, or the best trial by the objective where a baseline is the winner."""
        return next((record for record in self.winner_first(objective) if record.kind == "search"), None)

    def winner_first(self, objective: str) -> list[TrialRecord]:
        """The winner, then the other trials in the order of `best`."""
        best = self.best(objective)
        winner = None if self.selected is None else self.records.get(self.selected.winner)
        return best if winner is None else [winner, *(record for record in best if record is not winner)]

    def best_baselines(self, objective: str) -> list[TrialRecord]:
        """Baselines that have a value in the order of `best`, or of what has selected the winner."""
        best = self.best(objective, "baseline")
        if self.selected is None:
            return best
        values = self.selected.log_likelihoods
        return sorted(best, key=lambda record: -values.get(record.trial_id, -math.inf))

    def constraint_violation(self, record: TrialRecord, objective: str) -> float:
        """The sum by which a trial violates the sweep's constraints; 0 if it meets them."""
        return sum(max(0.0, excess) for excess in violations(record.epochs, objective, self.constraints))

    def ranked(self, objective: str) -> list[TrialRecord]:
        """Trials of the search in the order of `best`, but by each trial's own seed only."""
        key = running_maximum(objective)
        valued = [(value, record) for record in self.of("search") if (value := record.best_value(key)) is not None]
        return [
            record
            for _, record in sorted(valued, key=lambda pair: (self.constraint_violation(pair[1], objective), -pair[0]))
        ]

    def seed_values(self, record: TrialRecord, objective: str) -> list[float]:
        """The values of a trial and of its runs with more seeds; [] if the trial has none.

        A further seed that failed counts as 0, as a refit with that seed would.
        """
        value = record.best_value(running_maximum(objective))
        return [] if value is None else [value, *self._further_seeds(objective).get(record.trial_id, [])]

    def mean_value(self, record: TrialRecord, objective: str) -> float:
        """The mean of a trial's `seed_values`; the trial must have a value."""
        return statistics.fmean(self.seed_values(record, objective))

    def _further_seeds(self, objective: str) -> Mapping[str, list[float]]:
        """The values of runs with more seeds, by the id of the trial that they repeat.

        Older sweeps may contain a run with the trial's own seed, which is left out.
        """
        values: dict[str, list[float]] = {}
        for record in self.of("confirm"):
            trial = self.records.get(record.name)
            own = None if trial is None else f"{trial.trial_id}-seed{(trial.config.get('train') or {}).get('seed')}"
            if record.state in ENDED and record.trial_id != own:
                values.setdefault(record.name, []).append(record.best_value(running_maximum(objective)) or 0.0)
        return values


def _read_selected(folder: str) -> Selected | None:
    """The content of a sweep's selection.json; None before the selection. Raises ImbvlmError."""
    return read_json(storage.join(folder, SELECTION_FILE), Selected.from_dict, resume_fix(folder))


def _constraints(folder: str) -> Mapping[str, float]:
    """The constraints of the sweep in a folder; none before it has a sweep.yaml."""
    uri = storage.join(folder, SPEC_FILE)
    if not storage.exists(uri):
        return {}
    constraints: Mapping[str, float] = parse_yaml(storage.read_bytes(uri).decode(), uri).data.get("constraints") or {}
    return constraints


def describe_trial(record: TrialRecord) -> str:
    """A trial in a few words: method, loss, classifier, sampling, learning rate, augmentation, second stage.

    Behind the method stand the encoder and the image size if the space searches them. A method that trains nothing is
    followed by its options.
    """
    config = record.config
    method = config["method"]
    encoder = encoder_suffix(record.draw)
    if not METHODS[method].trains:
        own = {f"{method}.{key}": value for key, value in (config.get(method) or {}).items()} | record.selected_options
        options = (
            f"{key.split('.')[1].replace('_', ' ')} {value:.3g}" for key, value in own.items() if value is not None
        )
        return ", ".join([method.replace("_", " ") + encoder, *options])
    loss, classifier, optim = config.get("loss") or {}, config.get("classifier") or {}, config.get("optim") or {}
    augmentation = {**(config.get("mixing") or {}), **(config.get("feature_augmentation") or {})}
    loss_options = [
        f"{key} {value:.3g}"
        for key, value in loss.items()
        if isinstance(value, (int, float)) and key != "label_smoothing"
    ]
    parts = [
        method.replace("_", " ") + (f" depth {config['decoder']['depth']}" if config.get("decoder") else "") + encoder,
        " ".join([loss.get("name", "").replace("_", " "), *loss_options]),
        classifier.get("kind", "") + (f" {classifier['temperature']:.3g}" if "temperature" in classifier else ""),
        config["data"]["class_sampling"].replace("_", " "),
        f"lr {optim['lr']:.2g}" if optim else "",
        *(f"{key} {value:.2g}" for key, value in augmentation.items() if value),
        f"then {config['second_stage']['name'].replace('_', ' ')}" if config.get("second_stage") else "",
    ]
    return ", ".join(part for part in parts if part)
