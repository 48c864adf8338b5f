"""A trial under Ray Train: a small process that starts the trial's workers and passes their reports to Tune."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray
from ray import train, tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from imbvlm.base.schema import Tree
from imbvlm.ray_runtime.job_records import record_process
from imbvlm.ray_runtime.ray_private import address_sent
from imbvlm.sweep.tune.in_process_trial import PackPayload
from imbvlm.training.train_worker import train_worker

# With a limit, a trial whose workers never start ends in an error.
CONTROLLER_FAILURES = 2


def ray_train_trial(config: Tree) -> None:
    """Run one TorchTrainer for one trial; the function trainable."""
    resources: dict[str, Any] = config["resources"]
    trial_id = tune.get_context().get_trial_id()
    record_process(trial_id)
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
            # The workers record their placement group by this name.
            name=trial_id,
            storage_path=folder,
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=CONTROLLER_FAILURES),
        ),
    )
    with address_sent(here.gcs_address):
        trainer.fit()
