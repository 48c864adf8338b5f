"""What others can watch while a sweep runs: Ray metrics, which Prometheus reads, and TensorBoard's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from ray import tune
from ray.tune.experiment import Trial
from ray.util.metrics import Gauge
from tensorboardX import SummaryWriter

from imbvlm.class_stats import SHOT_GROUPS
from imbvlm.schema import Tree
from imbvlm.sweep.results import TrialKind, TrialLog, TrialRecord, TrialState
from imbvlm.sweep.spec import SweepSpec

TENSORBOARD_FOLDER = "tensorboard"
GROUPS = ("top1", "balanced", *SHOT_GROUPS)


class Monitor(tune.Callback):
    """Follows a trial log, which another callback keeps in step with Tune before this one is called."""

    def __init__(self, spec: SweepSpec, log: TrialLog, folder: Path, sweep: str) -> None:
        self._spec, self._log, self._folder = spec, log, folder
        self._writers: dict[str, SummaryWriter] = {}
        tags = {"sweep": sweep}
        self._trials = _gauge("imbvlm_trials", "trials of a sweep by kind and state", tags, ("kind", "state"))
        self._best = _gauge("imbvlm_best_value", "largest objective on validation so far", tags, ("objective",))
        self._accuracy = _gauge("imbvlm_best_accuracy", "the best trial's accuracies on validation", tags, ("group",))
        self._gpu_hours = _gauge("imbvlm_gpu_hours", "hours of the GPUs that trials have booked", tags, ())

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore that we don't use.
        return {}

    def setup(self, **info: Any) -> None:
        self._tell()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: Tree, **info: Any) -> None:
        record = self._record(trial)
        if not record.epochs:
            return
        if record.trial_id not in self._writers:
            self._writers[record.trial_id] = SummaryWriter(str(self._folder / TENSORBOARD_FOLDER / record.trial_id))
        writer, epoch = self._writers[record.trial_id], record.epochs[-1]
        for key, value in epoch.items():
            if "/" in key:
                writer.add_scalar(key, value, int(epoch["epoch"]))
        writer.flush()
        self._tell()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        self._tell()

    def _end(self, trial: Trial) -> None:
        writer = self._writers.pop(self._record(trial).trial_id, None)
        if writer is not None:
            writer.close()
        self._tell()

    def _record(self, trial: Trial) -> TrialRecord:
        return self._log.records[str(trial.config["record"]["trial_id"])]

    def _tell(self) -> None:
        records = list(self._log.records.values())
        for kind in get_args(TrialKind):
            states = [record.state for record in records if record.kind == kind]
            for state in get_args(TrialState):
                self._trials.set(states.count(state), tags={"kind": kind, "state": state})
        gpus = self._spec.num_workers * self._spec.gpus_per_worker
        self._gpu_hours.set(gpus * sum(record.seconds() for record in records) / 3600)
        best = next(iter(self._log.best(self._spec.objective)), None)
        if best is None:
            return
        self._best.set(best.best_value(self._spec.best_objective) or 0.0, tags={"objective": self._spec.objective})
        epoch = best.best_epoch(self._spec.objective) or {}
        for group in GROUPS:
            if f"val/{group}_accuracy" in epoch:
                self._accuracy.set(epoch[f"val/{group}_accuracy"], tags={"group": group})


def _gauge(name: str, description: str, fixed: dict[str, str], keys: tuple[str, ...]) -> Gauge:
    gauge = Gauge(name, description=description, tag_keys=(*fixed, *keys))
    gauge.set_default_tags(fixed)
    return gauge
