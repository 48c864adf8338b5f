"""A trial under Ray Train: a small process that starts the trial's workers and passes their reports to Tune."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import train, tune
from ray._raylet import PlacementGroupID
from ray.experimental import internal_kv
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from imbvlm.base.schema import Tree
from imbvlm.sweep.tune.in_process_trial import PackPayload
from imbvlm.sweep.tune.unpickled import Unpickled
from imbvlm.training.train_worker import train_worker

# With a limit, a trial whose workers never start ends in an error.
CONTROLLER_FAILURES = 2
# Workers of an ended trial may still write their files. Ray's own cleaner frees them within seconds.
FREE_AFTER_SECONDS = 10.0


def ray_train_trial(config: Tree) -> None:
    """Run one TorchTrainer for one trial; the function trainable."""
    resources: dict[str, Any] = config["resources"]
    trial_id = tune.get_context().get_trial_id()
    uses_gpu = resources["gpus_per_worker"] > 0
    per_worker = {"CPU": resources["cpus_per_worker"]}
    if uses_gpu:
        per_worker["GPU"] = resources["gpus_per_worker"]
    # Ray Train needs a folder for checkpoints, of which there are none. It must not be the sweep's, whose disk may be
    # full. Tune kills this process at the trial's end, before it could remove the folder, so it is in Ray's own.
    here = ray.get_runtime_context()
    folder = tempfile.mkdtemp(prefix="imbvlm-train-", dir=Path(here.get_temp_dir(), here.get_session_name()))
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"settings": PackPayload.decode(config["payload"]).settings[0]},
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=resources["num_workers"], use_gpu=uses_gpu, resources_per_worker=per_worker
        ),
        run_config=train.RunConfig(
            name=f"train-{trial_id}",
            storage_path=folder,
            callbacks=[TuneReportCallback(), PlacementGroupRecorder(_key(trial_id))],
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=CONTROLLER_FAILURES),
        ),
    )
    trainer.fit()


class PlacementGroupRecorder(WorkerGroupCallback):
    """Records the placement group of a trial's workers, so that the sweep can free it."""

    def __init__(self, key: str) -> None:
        self._key = key

    def after_worker_group_start(self, worker_group: Any) -> None:
        handle = worker_group.get_worker_group_state().placement_group_handle
        internal_kv._internal_kv_put(self._key, handle.placement_group.id.hex())


class PlacementGroupCleaner(Unpickled, tune.Callback):
    """Frees the placement groups of ended trials.

    Ray Train has a process for that after Tune has ended a trial. A machine without memory kills that process too, and
    the trial's CPUs and GPUs would stay reserved.
    """

    def __init__(self) -> None:
        self._ended_at: dict[str, float] = {}

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        _free(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        _free(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended_at[trial.trial_id] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        now = time.monotonic()
        for trial_id in [key for key, at in self._ended_at.items() if now - at > FREE_AFTER_SECONDS]:
            _free(trial_id)
            del self._ended_at[trial_id]


def _key(trial_id: str) -> str:
    return f"imbvlm-workers-of-{trial_id}"


def _free(trial_id: str) -> None:
    group_id = internal_kv._internal_kv_get(_key(trial_id))
    if group_id is not None:
        internal_kv._internal_kv_del(_key(trial_id))
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id.decode()))))
