"""Metrics of a running sweep: Ray metrics, which Prometheus reads, and TensorBoard files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from ray import tune
from ray.tune.experiment import Trial
from ray.util.metrics import Gauge
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from imbvlm.longtail.class_stats import SHOT_GROUPS
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog, TrialState
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.pack_members import MemberEvent
from imbvlm.sweep.tune.unpickled import Unpickled

TENSORBOARD_FOLDER = "tensorboard"
GROUPS = ("top1", "balanced", *SHOT_GROUPS)
# Ray exports metrics every ten seconds, and counting a thousand trials takes milliseconds.
EXPORT_SECONDS = 2.0
# Each flush waits for the disk.
FLUSH_SECONDS = 5.0


class MetricsExporter(Unpickled, tune.Callback):
    """Exports a trial log's metrics; what updates the log must be called before this one."""

    def __init__(self, spec: SweepSpec, log: TrialLog, folder: Path, sweep: str) -> None:
        self._spec, self._log, self._folder = spec, log, folder
        self._curves: dict[str, TensorBoardWriter] = {}
        self._has_changed, self._exported_at = True, -math.inf
        tags = {"sweep": sweep}
        self._trials = _gauge("imbvlm_trials", "trials of a sweep by kind and state", tags, ("kind", "state"))
        self._best = _gauge("imbvlm_best_value", "largest objective on validation so far", tags, ("objective",))
        self._accuracy = _gauge("imbvlm_best_accuracy", "the best trial's accuracies on validation", tags, ("group",))
        self._gpu_hours = _gauge("imbvlm_gpu_hours", "hours of the GPUs that trials have booked", tags, ())

    def setup(self, **info: Any) -> None:
        self._export()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        # Tune takes a step several times a second.
        if self._has_changed and time.monotonic() - self._exported_at > EXPORT_SECONDS:
            self._export()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._has_changed = True

    def update(self, event: MemberEvent) -> None:
        """Write a trial's new epoch, and close its files at its end."""
        trial_id, self._has_changed = event.member.trial_id, True
        if event.report is not None:
            if trial_id not in self._curves:
                self._curves[trial_id] = TensorBoardWriter(self._folder / TENSORBOARD_FOLDER / trial_id)
            self._curves[trial_id].add(event.report.values)
        if event.end is not None and trial_id in self._curves:
            self._curves.pop(trial_id).close()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for curves in self._curves.values():
            curves.close()
        self._curves.clear()
        self._export()

    def _export(self) -> None:
        self._has_changed, self._exported_at = False, time.monotonic()
        records = list(self._log.records.values())
        for kind in get_args(TrialKind):
            states = [record.state for record in records if record.kind == kind]
            for state in get_args(TrialState):
                self._trials.set(states.count(state), tags={"kind": kind, "state": state})
        self._gpu_hours.set(self._spec.gpus_per_trial * sum(record.seconds() for record in records) / 3600)
        best = next(iter(self._log.best(self._spec.objective)), None)
        if best is None:
            return
        self._best.set(best.best_value(self._spec.best_objective) or 0.0, tags={"objective": self._spec.objective})
        epoch = best.best_epoch(self._spec.objective) or {}
        for group in GROUPS:
            if f"val/{group}_accuracy" in epoch:
                self._accuracy.set(epoch[f"val/{group}_accuracy"], tags={"group": group})


class TensorBoardWriter:
    """The TensorBoard file of one trial; the library's SummaryWriter would keep a thread and a pipe for each.

    Curves are lost on a full disk. Tune would take an error here for the trial's failure, and writing the next record
    raises it anyway.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._flushed_at = folder, -math.inf
        self._file: EventsWriter | None = None

    def add(self, epoch: Mapping[str, float]) -> None:
        """Write an epoch's metrics whose names have a slash."""
        now, step = time.time(), int(epoch["epoch"])
        with suppress(OSError):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = EventsWriter(str(self._folder / "events"))
            for key, value in epoch.items():
                if "/" in key:
                    self._file.write_event(Event(wall_time=now, step=step, summary=scalar(key, value)))
            if now - self._flushed_at > FLUSH_SECONDS:
                self._file.flush()
                self._flushed_at = now

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


def _gauge(name: str, description: str, fixed: dict[str, str], keys: tuple[str, ...]) -> Gauge:
    gauge = Gauge(name, description=description, tag_keys=(*fixed, *keys))
    gauge.set_default_tags(fixed)
    return gauge
