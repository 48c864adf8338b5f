"""A trial under Ray Train: a small process that starts the trial's workers and hands their reports to Tune."""

from __future__ import annotations

from typing import Any

from ray import train, tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from imbvlm.config import Tree
from imbvlm.training.ray_worker import train_worker

# Waiting for workers that never come ends in an error instead of for ever.
CONTROLLER_FAILURES = 2


def ray_train_trial(config: Tree) -> None:
    """The function trainable: one TorchTrainer for one trial."""
    resources: dict[str, Any] = config["resources"]
    trial_id = tune.get_context().get_trial_id()
    uses_gpu = resources["gpus_per_worker"] > 0
    per_worker = {"CPU": resources["cpus_per_worker"]}
    if uses_gpu:
        per_worker["GPU"] = resources["gpus_per_worker"]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config["settings"],
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=resources["num_workers"], use_gpu=uses_gpu, resources_per_worker=per_worker
        ),
        run_config=train.RunConfig(
            name=f"train-{trial_id}",
            storage_path=config["train_storage"],
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=CONTROLLER_FAILURES),
        ),
    )
    trainer.fit()
