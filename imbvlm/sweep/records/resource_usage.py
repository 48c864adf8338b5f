"""What a sweep's time went into, what it was spared, and what a plan had said: from the sweep's own records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import between, duration, percent
from imbvlm.config.second_stage_registry import num_stage_epochs
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.records.budget import UsedBudget, read_spent
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.spec.sweep_spec import SweepSpec

PACES_FILE = "paces.json"
PLAN_FILE = "plan.json"
PHASE_WORDS = {
    "start": "start of Ray, checks", "features": "features", "trials": "baselines and trials",
    "refits": "refits and test split",
}  # fmt: skip


def throughput_key(config: TrialConfig) -> str:
    """The tower, its input size and its precision: what decides how long an image takes, the same in every version."""
    chosen = config.features.computed_in
    return f"{config.encoder.name} at {config.encoder.image_size}" + ("" if chosen == "auto" else f" in {chosen}")


@dataclass(frozen=True)
class ImageThroughput:
    """What an image took of the whole cluster's seconds as features were computed, by `throughput_key`."""

    num_train: int
    seconds: Mapping[str, float]

    def write(self, folder: str) -> None:
        storage.write_bytes(storage.join(folder, PACES_FILE), json.dumps(asdict(self), indent=1).encode())


@dataclass(frozen=True)
class ResourceUsage:
    """A sweep's use of time: by phase, as planned (None without a plan), and what its towers' passes took an image."""

    spec: SweepSpec
    log: TrialLog
    spent: UsedBudget
    paces: ImageThroughput | None
    plan: Mapping[str, Any] | None

    @staticmethod
    def read(folder: str, spec: SweepSpec, log: TrialLog) -> ResourceUsage:
        """Read the files of a sweep's folder; raises ImbvlmError for a damaged one."""
        found, plan = _read_json(storage.join(folder, PACES_FILE)), _read_json(storage.join(folder, PLAN_FILE))
        paces = None if found is None else ImageThroughput(int(found["num_train"]), found["seconds"])
        return ResourceUsage(spec, log, read_spent(folder), paces, plan)

    @property
    def num_gpus(self) -> float:
        """GPUs that stood by."""
        return self.spent.gpu_seconds / self.spent.seconds if self.spent.seconds else 0.0


def _read_json(uri: str) -> Any:
    try:
        return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None
    except ValueError:
        raise ImbvlmError(f"{uri} is damaged; remove it to go on without it") from None


# ------------------------------------------------------------------------------------------------------- saved


@dataclass(frozen=True)
class EarlyStoppingSavings:
    """Epochs and seconds that stopped trials would still have taken, beside the epochs of the search."""

    num_stopped: int
    epochs: int
    planned_epochs: int
    seconds: float


def saved_by_stopping(records: Sequence[TrialRecord]) -> EarlyStoppingSavings:
    """Each stopped trial's missing epochs at its own mean pace."""
    stopped, epochs, planned, seconds = 0, 0, 0, 0.0
    for record in records:
        wanted = planned_epochs(record) or len(record.epochs)
        planned += wanted
        if record.state == "stopped" and record.epochs:
            missing = max(0, wanted - len(record.epochs))
            stopped += 1
            epochs += missing
            seconds += missing * record.seconds() / len(record.epochs)
    return EarlyStoppingSavings(stopped, epochs, planned, seconds)


def planned_epochs(record: TrialRecord) -> int | None:
    """Epochs of both stages of a trial that runs to its end; None where that can't be told yet."""
    config: TrialConfig = record.trial_config()
    if config.train is None:
        return 1
    first = config.train.num_epochs
    if first is None and record.epochs and record.epochs[0].get("step") and config.train.num_steps:
        first = math.ceil(config.train.num_steps / record.epochs[0]["step"])
    return None if first is None else first + num_stage_epochs(config.second_stage)


@dataclass(frozen=True)
class StoreSavings:
    """Training images that trials read from the store, those that towers saw for it, and what that took and spared.

    `tower_seconds` is what the towers would have taken in every epoch at the pace at which they filled the store, None
    where that wasn't measured; `pass_seconds` what filling it, or finding it filled, took in this sweep.
    """

    num_epochs: int
    num_read: int
    num_seen: int
    tower_seconds: float | None
    pass_seconds: float


def saved_by_store(compute: ResourceUsage) -> StoreSavings | None:
    """Training images alone are counted, those of validation would come on top; None where nothing was stored."""
    paces = compute.paces
    stored = [
        one
        for one in compute.log.records.values()
        if one.config["method"] != "zero_shot" and not one.trial_config().reads_images
    ]
    epochs = sum(len(one.epochs) for one in stored)
    if paces is None or not epochs:
        return None
    views = {feature_key(one.trial_config()): one.trial_config().features.num_views for one in stored}
    seconds = [
        len(one.epochs) * paces.num_train * paces.seconds.get(throughput_key(one.trial_config()), math.nan)
        for one in stored
    ]
    total = sum(seconds)
    return StoreSavings(
        epochs, epochs * paces.num_train, sum(views.values()) * paces.num_train,
        None if math.isnan(total) else total, compute.spent.phases.get("features", 0.0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- words


def stopping_words(compute: ResourceUsage) -> str | None:
    """What early stopping spared; None where it stopped nothing."""
    saved = saved_by_stopping(compute.log.of("search"))
    if not saved.num_stopped:
        return None
    share = percent(saved.epochs / max(1, saved.planned_epochs))
    gpus = compute.spec.num_workers * compute.spec.gpus_per_worker
    return (
        f"spared about {_time(saved.seconds, gpus)} of trials' own time: {saved.num_stopped} were stopped early, and "
        f"{saved.epochs:,} of {saved.planned_epochs:,} epochs ({share} %) were not run"
    )


def store_words(compute: ResourceUsage) -> str | None:
    """What the feature store spared; None where nothing was stored."""
    saved = saved_by_store(compute)
    if saved is None:
        return None
    times = f"{saved.num_read / saved.num_seen:,.0f} times fewer"
    words = f"trials read {saved.num_read:,} training images, and the tower saw {saved.num_seen:,}, {times}"
    if saved.tower_seconds is None:
        return words
    each = saved.tower_seconds / saved.num_read
    measured = (
        f"in every epoch it would have taken {duration(saved.tower_seconds)} at the measured {_each(each)} an image"
    )
    took = f"the store took {duration(saved.pass_seconds)} in this sweep"
    spared = saved.tower_seconds - saved.pass_seconds
    if spared <= 0:
        return f"spared nothing here: {words}; {measured}, and {took}"
    return f"spared about {_time(spared, compute.num_gpus)}: {words}; {measured}, and {took}"


def _time(seconds: float, num_gpus: float) -> str:
    gpus = f" ({seconds * num_gpus / 3600:,.3g} GPU-hours)" if num_gpus else ""
    return f"{duration(seconds)}{gpus}"


def _each(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.0995 else f"{seconds:.2g} s"


def phase_rows(compute: ResourceUsage) -> list[list[str]]:
    """What took how long, and how long a plan had said: phase, planned, took."""
    planned = _planned(compute.plan)
    rows = [
        [words, planned.get(phase, "-"), duration(compute.spent.phases[phase])]
        for phase, words in PHASE_WORDS.items()
        if phase in compute.spent.phases
    ]
    return [*rows, ["in all", planned.get("total", "-"), duration(compute.spent.seconds)]] if rows else []


def time_words(compute: ResourceUsage) -> str | None:
    """In one sentence where the time went, and what was planned; None for a sweep without a word of it."""
    rows = phase_rows(compute)
    if not rows:
        return None
    parts = ", ".join(f"{words} {took}" for words, _, took in rows[:-1])
    planned = rows[-1][1]
    return f"{'' if planned == '-' else f'planned {planned}, took '}{rows[-1][2]}: {parts}"


def compute_text(compute: ResourceUsage) -> str:
    """Lines for a terminal: where the time went, and what the store and early stopping spared."""
    found = (("time", time_words(compute)), ("feature store", store_words(compute)),
             ("early stopping", stopping_words(compute)))  # fmt: skip
    return "\n".join(f"{label}: {words}" for label, words in found if words)


def _planned(plan: Mapping[str, Any] | None) -> dict[str, str]:
    """What a plan says of each phase; a phase of which it knows nothing is absent."""
    found = (plan or {}).get("seconds") or {}
    pairs = {"features": [found.get("features")] * 2, "refits": found.get("refits"), "total": found.get("total")}
    if found.get("baselines") and found.get("trials"):
        pairs["trials"] = [one + other for one, other in zip(found["baselines"], found["trials"], strict=True)]
    return {phase: between(*pair) for phase, pair in pairs.items() if pair and pair[0] is not None}
