"""A sweep's time by phase, compared with its plan, and the time that early stopping and the feature store saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from imbvlm.base import storage
from imbvlm.base.formatting import between, duration, percent
from imbvlm.base.json_file import read_json
from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import num_stage_epochs
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.records.budget import UsedBudget, read_spent
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.spec.sweep_spec import SweepSpec

PACES_FILE = "paces.json"
PLAN_FILE = "plan.json"
PHASE_NAMES = {
    "start": "start of Ray, checks", "features": "features", "trials": "baselines and trials",
    "refits": "refits and test split",
}  # fmt: skip


def throughput_key(config: TrialConfig) -> str:
    """The properties that determine an image's seconds: encoder, input size and dtype. A key of paces.json."""
    dtype = config.features.computed_in
    return f"{config.encoder.name} at {config.encoder.image_size}" + ("" if dtype == "auto" else f" in {dtype}")


@dataclass(frozen=True)
class ImageThroughput:
    """Seconds of the whole cluster per image of feature extraction, by `throughput_key`, and the number of images."""

    num_train: int
    seconds: Mapping[str, float]

    def write(self, folder: str) -> None:
        """Write paces.json into a sweep's folder."""
        storage.write_json(storage.join(folder, PACES_FILE), asdict(self))


@dataclass(frozen=True)
class ResourceUsage:
    """A sweep's used time, its plan if it was planned, and the throughput of its extraction if that was measured."""

    spec: SweepSpec
    log: TrialLog
    spent: UsedBudget
    paces: ImageThroughput | None
    plan: Mapping[str, Any] | None

    @staticmethod
    def read(folder: str, spec: SweepSpec, log: TrialLog) -> ResourceUsage:
        """Read the files of a sweep's folder; raises ImbvlmError for a damaged one."""

        def parse_paces(content: Any) -> ImageThroughput:
            return ImageThroughput(int(content["num_train"]), content["seconds"])

        fix = "Remove it to go on without it."
        paces = read_json(storage.join(folder, PACES_FILE), parse_paces, fix)
        plan = read_json(storage.join(folder, PLAN_FILE), dict[str, Any], fix)
        return ResourceUsage(spec, log, read_spent(folder), paces, plan)

    @property
    def num_gpus(self) -> float:
        """The mean number of GPUs in the cluster."""
        return self.spent.gpu_seconds / self.spent.seconds if self.spent.seconds else 0.0


# ----------------------------------------------------------------------------------------------------- savings


@dataclass(frozen=True)
class EarlyStoppingSavings:
    """Epochs and seconds that stopped trials would still have taken, and the planned epochs of the search."""

    num_stopped: int
    epochs: int
    planned_epochs: int
    seconds: float


def saved_by_stopping(records: Sequence[TrialRecord]) -> EarlyStoppingSavings:
    """Count each stopped trial's missing epochs at its own mean pace."""
    num_stopped, epochs, planned, seconds = 0, 0, 0, 0.0
    for record in records:
        own = planned_epochs(record) or len(record.epochs)
        planned += own
        if record.state == "stopped" and record.epochs:
            missing = max(0, own - len(record.epochs))
            num_stopped += 1
            epochs += missing
            seconds += missing * record.seconds() / len(record.epochs)
    return EarlyStoppingSavings(num_stopped, epochs, planned, seconds)


def planned_epochs(record: TrialRecord) -> int | None:
    """Epochs of both stages of a trial that runs to its end; None if that is not known yet."""
    config: TrialConfig = record.trial_config()
    if config.train is None:
        return 1
    first = config.train.num_epochs
    if first is None and record.epochs and record.epochs[0].get("step") and config.train.num_steps:
        first = math.ceil(config.train.num_steps / record.epochs[0]["step"])
    return None if first is None else first + num_stage_epochs(config.second_stage)


@dataclass(frozen=True)
class StoreSavings:
    """Training images that trials read from the store and that encoders saw to fill it, and the seconds of both.

    `encoder_seconds` estimates encoder passes in every epoch at the speed of extraction, None if that wasn't measured.
    `pass_seconds` is the time in which this sweep filled the store or found it filled.
    """

    num_read: int
    num_seen: int
    encoder_seconds: float | None
    pass_seconds: float


def saved_by_store(compute: ResourceUsage) -> StoreSavings | None:
    """Count the training images, without those of validation; None if nothing was stored."""
    paces = compute.paces
    stored = [
        record
        for record in compute.log.records.values()
        if METHODS[record.config["method"]].trains and not record.trial_config().reads_images
    ]
    epochs = sum(len(record.epochs) for record in stored)
    if paces is None or not epochs:
        return None
    views = {feature_key(record.trial_config()): record.trial_config().features.num_views for record in stored}
    seconds = [
        len(record.epochs) * paces.num_train * paces.seconds.get(throughput_key(record.trial_config()), math.nan)
        for record in stored
    ]
    total = sum(seconds)
    return StoreSavings(
        epochs * paces.num_train, sum(views.values()) * paces.num_train,
        None if math.isnan(total) else total, compute.spent.phases.get("features", 0.0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- texts


def stopping_text(compute: ResourceUsage) -> str | None:
    """The savings of early stopping as a sentence; None if it stopped nothing."""
    saved = saved_by_stopping(compute.log.of("search"))
    if not saved.num_stopped:
        return None
    share = percent(saved.epochs / max(1, saved.planned_epochs))
    gpus = compute.spec.gpus_per_trial
    return (
        f"saved about {_time(saved.seconds, gpus)} of trials' own time: {saved.num_stopped} were stopped early, and "
        f"{saved.epochs:,} of {saved.planned_epochs:,} epochs ({share} %) were not run"
    )


def store_text(compute: ResourceUsage) -> str | None:
    """The savings of the feature store as a sentence; None if nothing was stored."""
    saved = saved_by_store(compute)
    if saved is None:
        return None
    times = f"{saved.num_read / saved.num_seen:,.0f} times fewer"
    text = f"trials read {saved.num_read:,} training images, and the encoder saw {saved.num_seen:,}, {times}"
    if saved.encoder_seconds is None:
        return text
    each = saved.encoder_seconds / saved.num_read
    measured = (
        f"in every epoch it would have taken {duration(saved.encoder_seconds)} at the measured {_each(each)} an image"
    )
    took = f"the store took {duration(saved.pass_seconds)} in this sweep"
    seconds = saved.encoder_seconds - saved.pass_seconds
    gain = f"saved about {_time(seconds, compute.num_gpus)}" if seconds > 0 else "saved nothing here"
    return f"{gain}: {text}; {measured}, and {took}"


def _time(seconds: float, num_gpus: float) -> str:
    gpus = f" ({seconds * num_gpus / 3600:,.3g} GPU-hours)" if num_gpus else ""
    return f"{duration(seconds)}{gpus}"


def _each(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.0995 else f"{seconds:.2g} s"


def phase_rows(compute: ResourceUsage) -> list[list[str]]:
    """Planned and used time of each phase and in total: phase, planned, took."""
    planned = _planned(compute.plan)
    rows = [
        [name, planned.get(phase, "-"), duration(compute.spent.phases[phase])]
        for phase, name in PHASE_NAMES.items()
        if phase in compute.spent.phases
    ]
    return [*rows, ["in total", planned.get("total", "-"), duration(compute.spent.seconds)]] if rows else []


def time_text(compute: ResourceUsage) -> str | None:
    """Planned and used time in one sentence; None for a sweep whose time was not counted."""
    rows = phase_rows(compute)
    if not rows:
        return None
    parts = ", ".join(f"{name} {took}" for name, _, took in rows[:-1])
    planned = rows[-1][1]
    return f"{'' if planned == '-' else f'planned {planned}, took '}{rows[-1][2]}: {parts}"


def compute_text(compute: ResourceUsage) -> str:
    """Lines for a terminal: used time, savings of the store and of early stopping."""
    texts = {"time": time_text, "feature store": store_text, "early stopping": stopping_text}
    return "\n".join(f"{label}: {text}" for label, describe in texts.items() if (text := describe(compute)))


def _planned(plan: Mapping[str, Any] | None) -> dict[str, str]:
    """A plan's estimate of each phase; phases without an estimate are absent."""
    estimates = (plan or {}).get("seconds") or {}
    pairs = {
        "features": [estimates.get("features")] * 2,
        "refits": estimates.get("refits"),
        "total": estimates.get("total"),
    }
    if estimates.get("baselines") and estimates.get("trials"):
        pairs["trials"] = [low + high for low, high in zip(estimates["baselines"], estimates["trials"], strict=True)]
    return {phase: between(*pair) for phase, pair in pairs.items() if pair and pair[0] is not None}
