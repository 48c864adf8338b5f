"""Sweeps as read from their folders: the state of one, and all sweeps of a storage folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from typing import Any

from imbvlm.base import storage
from imbvlm.base.csv_cells import csv_text, read_rows
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import percent, pluralize
from imbvlm.base.json_file import damage_named, read_json
from imbvlm.base.plugins import active_plugins
from imbvlm.base.yaml_file import YamlTree, parse_yaml
from imbvlm.sweep.records.budget import read_spent
from imbvlm.sweep.records.difference import splits_of
from imbvlm.sweep.records.provenance import data_size, plugin_digests, require_sweep_plugins
from imbvlm.sweep.records.summary_tables import METRICS, encoder_notes, pareto_records, rank_metrics
from imbvlm.sweep.records.trial_log import (
    DELIVERED,
    SPEC_FILE,
    WINNER,
    TrialLog,
    TrialRecord,
    last_values,
    name_rank,
    resume_fix,
)
from imbvlm.sweep.spec.sampler_registry import SAMPLERS
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.test_predictions import POST_HOC, TEST

SPLITS = (TEST, POST_HOC)
BEST_FILE, TEST_FILE, GAP_FILE = "best.yaml", "test.json", "gap.json"
SUSPECTS_FILE = "suspect_labels.csv"
# Exists from the start of a run until its end, also while a run adds trials to a finished sweep.
UNFINISHED_FILE = "unfinished"
# The rules of sweeps that began without these keys: in version 0.1 held-out images score, and the objective selects.
RULES_BEFORE = {"num_folds": 1, "select_by": "objective", "confirm_folds": None}


def read_spec(folder: str, *, check_plugins: bool = True) -> SweepSpec:
    """The spec in a sweep's folder, with the active plug-ins; raises ImbvlmError if there is none.

    Raises PluginNeededError where a plug-in of the sweep isn't active, or, with `check_plugins`, has other code.
    """
    tree = _spec_tree(folder)
    require_sweep_plugins(folder, check=check_plugins)
    return _spec_of(tree)


def read_listed_spec(folder: str) -> SweepSpec:
    """The spec in a sweep's folder without its plug-ins, for what its records alone say; raises ImbvlmError.

    The default stands in for a sampler of a plug-in.
    """
    tree = _spec_tree(folder)
    searcher = tree.data.get("searcher") if isinstance(tree.data, dict) else None
    if isinstance(searcher, dict) and searcher.get("name") not in SAMPLERS and plugin_digests(folder):
        tree = YamlTree({key: value for key, value in tree.data.items() if key != "searcher"}, tree.file, tree.places)
    return _spec_of(tree)


def _spec_tree(folder: str) -> YamlTree:
    uri = storage.join(folder, SPEC_FILE)
    if not storage.exists(uri):
        raise ImbvlmError(f"{folder} is not a sweep's folder: it has no {SPEC_FILE}. `imbvlm sweep list` shows them.")
    try:
        text = storage.read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise ImbvlmError(f"{uri} is damaged: byte {error.start} is no UTF-8. Restore the file.") from None
    return parse_yaml(text, uri)


def _spec_of(tree: YamlTree) -> SweepSpec:
    # Its own list names files that the caller may not mean.
    spec = SweepSpec.from_tree(tree).model_copy(update={"plugins": active_plugins().locations})
    return spec.model_copy(update={key: value for key, value in RULES_BEFORE.items() if key not in tree.data})


@dataclass(frozen=True)
class SweepState:
    """The state of a sweep's folder: spec, records, and the seconds of its runs if they were counted."""

    folder: str
    spec: SweepSpec
    log: TrialLog
    is_finished: bool
    spent_seconds: float
    # Numbers of classes and images; None if an earlier version has begun the sweep.
    size: tuple[int, int] | None = None

    @staticmethod
    def read(folder: str, spec: SweepSpec | None = None) -> SweepState:
        """Read a folder, its spec too unless it is given; raises ImbvlmError if it isn't a sweep's."""
        spec = spec or read_spec(folder)
        # Older sweeps don't mark a run that hasn't ended.
        has_best, is_open = (storage.exists(storage.join(folder, name)) for name in (BEST_FILE, UNFINISHED_FILE))
        is_finished, seconds = has_best and not is_open, read_spent(folder).seconds
        return SweepState(folder, spec, TrialLog.read(folder), is_finished, seconds, data_size(folder))

    @property
    def num_ended(self) -> int:
        return sum(record.is_over for record in self.log.of("search"))

    @cached_property
    def best(self) -> TrialRecord | None:
        """The winner, or the best trial on validation so far."""
        return self.log.winner(self.spec.objective)

    @property
    def best_value(self) -> float | None:
        """The best trial's objective: the mean of its seeds if it ran with several."""
        best = self.best
        return None if best is None else self.log.mean_value(best, self.spec.objective)

    @property
    def scored(self) -> list[TrialRecord]:
        """The delivered model and the refits that have read the test split, the winner's first."""
        records = [*self.log.of("delivered"), *self.log.of("refit")]
        read = [record for record in records if record.epochs and "test/top1_accuracy" in record.epochs[-1]]
        return sorted(read, key=lambda record: name_rank(record.name))

    @property
    def started_at(self) -> float | None:
        return min((record.started_at for record in self.log.records.values() if record.started_at), default=None)

    @property
    def seconds(self) -> float | None:
        """Seconds of all runs without the time between them; from first start to last end if no run has counted."""
        if self.spent_seconds:
            return self.spent_seconds
        ends = [record.ended_at for record in self.log.records.values() if record.ended_at is not None]
        return max(ends) - self.started_at if ends and self.started_at is not None else None

    @property
    def manifest(self) -> str:
        """The manifest's location as the user gave it."""
        return str(self.spec.base["data"]["manifest"])

    @property
    def data(self) -> str:
        """The manifest's name, and its size if known."""
        name = self.manifest.rstrip("/").rpartition("/")[2].removesuffix(".parquet")
        if self.size is None:
            return name
        return f"{name}: {pluralize(self.size[0], 'class')}, {pluralize(self.size[1], 'image')}"

    @property
    def compared(self) -> list[tuple[str, str]]:
        """(name, split) of delivered model, winner, baselines: as trained, and as adjusted if that changes accuracy."""
        names = [DELIVERED, WINNER, *sorted({record.name for record in self.log.of("baseline")})]
        refits = {name: [record for record in self.scored if record.name == name] for name in names}
        return [
            (name, split)
            for name in names
            if name == WINNER or refits[name]
            for split in splits_of(refits[name], METRICS)
        ]

    def test_values(self, name: str, metric: str, split: str = TEST) -> list[float]:
        """A metric of each seed's refit on the test split."""
        return last_values((record for record in self.scored if record.name == name), f"{split}/{metric}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; accuracies are fractions."""
        best = self.best
        names = list(dict.fromkeys(record.name for record in self.scored))
        num_classes, num_images = self.size or (None, None)
        data: dict[str, Any] = {
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
            "notes": encoder_notes(self.log, self.spec),
        }
        if self.spec.other_objectives:
            data["pareto"] = [record.trial_id for record in pareto_records(self.log, self.spec)]
        if best is not None:
            data["best"] = {"trial_id": best.trial_id, "value": self.best_value, "config": best.config}
        return data

    def _scores(self, names: Sequence[str], split: str) -> dict[str, dict[str, list[float]]]:
        """The metrics of all seeds by refit and metric; refits without scores are absent."""
        metrics = (*METRICS, *rank_metrics(self.scored))
        scores = {
            name: {metric: values for metric in metrics if (values := self.test_values(name, metric, split))}
            for name in names
        }
        return {name: values for name, values in scores.items() if values}


@dataclass(frozen=True)
class Unreadable:
    """A sweep's folder that can't be read, and the reason."""

    folder: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"folder": self.folder, "state": "unreadable", "reason": self.reason}


def sweeps_under(storage_folder: str) -> tuple[list[SweepState], list[Unreadable]]:
    """The sweeps in a storage folder, the newest last, and those that can't be read."""
    states, unreadable = [], []
    for path in (storage.join(storage_folder, name) for name in storage.list_files(storage_folder)):
        if not storage.exists(storage.join(path, SPEC_FILE)):
            continue
        try:
            states.append(SweepState.read(path, read_listed_spec(path)))
        except ImbvlmError as error:
            unreadable.append(Unreadable(path, " ".join(str(error).split())))
    return sorted(states, key=lambda state: state.started_at or 0.0), unreadable


def read_readings(folder: str) -> dict[str, Any] | None:
    """Time and scores of the readings of the test split, None before the first; raises ImbvlmError."""

    def parse(data: Any) -> dict[str, Any]:
        return {"read_at": str(data["read_at"]), "scores": dict(data["scores"]), "readings": list(data["readings"])}

    fix = f"Remove it; this writes it again with the present time: imbvlm sweep resume {folder}"
    return read_json(storage.join(folder, TEST_FILE), parse, fix)


@dataclass(frozen=True)
class GapReport:
    """The delivered heads' balanced accuracies over folds at random and of unseen groups, from 0 to 1.

    `interval` is the 95 % interval of the difference; None where groups are too few. `worst` has the groups with the
    smallest share of right answers: name, images, share.
    """

    at_random: float
    of_groups: float
    interval: tuple[float, float] | None
    num_groups: int
    num_classes: int
    worst: Sequence[tuple[str, int, float]]

    @property
    def points(self) -> str:
        """The gap in points, with its interval if it has one."""
        interval = "" if self.interval is None else f" [{', '.join(f'{100 * end:+.1f}' for end in self.interval)}]"
        return f"{100 * (self.at_random - self.of_groups):+.1f}{interval}"

    def describe(self) -> str:
        """A sentence on the gap."""
        few = "" if self.interval is not None else ", too few for an interval"
        return (
            f"heads of the delivered model have balanced {percent(self.of_groups)} on unseen groups and "
            f"{percent(self.at_random)} over folds at random: {self.points} points, over "
            f"{pluralize(self.num_groups, 'group')}{few}"
        )


def write_gap(folder: str, report: GapReport) -> None:
    """Write gap.json into a sweep's folder."""
    storage.write_json(storage.join(folder, GAP_FILE), asdict(report))


def read_gap(folder: str) -> GapReport | None:
    """The gap of a sweep's folder; None where it wasn't measured. Raises ImbvlmError for a damaged file."""

    def parse(data: Any) -> GapReport:
        interval = None if data["interval"] is None else (float(data["interval"][0]), float(data["interval"][1]))
        worst = tuple((str(name), int(number), float(share)) for name, number, share in data["worst"])
        return GapReport(**{**data, "interval": interval, "worst": worst})

    return read_json(storage.join(folder, GAP_FILE), parse, resume_fix(folder))


@dataclass(frozen=True)
class SuspectLabel:
    """An image of the manifest whose label looks wrong: its class, another one, and their probabilities."""

    image: str
    row: int
    split: str
    given: str
    looks_like: str
    given_probability: float
    other_probability: float


_SUSPECT_COLUMNS = ("image", "row", "split", "class", "looks_like", "probability_of_class", "probability_of_looks_like")


def write_suspects(folder: str, suspects: Sequence[SuspectLabel]) -> None:
    """Write suspect_labels.csv into a sweep's folder."""
    content = csv_text([_SUSPECT_COLUMNS, *map(astuple, suspects)])
    storage.write_bytes(storage.join(folder, SUSPECTS_FILE), content.encode())


def read_suspects(folder: str) -> list[SuspectLabel] | None:
    """What `write_suspects` wrote; None where labels weren't checked. Raises ImbvlmError for a damaged file."""
    uri = storage.join(folder, SUSPECTS_FILE)
    if not storage.exists(uri):
        return None
    with damage_named(f"{uri} is damaged", resume_fix(folder)):
        _, *rows = read_rows(storage.read_bytes(uri).decode())
        return [
            SuspectLabel(image, int(row), split, given, looks_like, float(own), float(other))
            for image, row, split, given, looks_like, own, other in rows
        ]
