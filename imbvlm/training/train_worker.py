"""One worker of a trial under Ray Train; the only file of this folder that imports Ray."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import ray
import ray.train
import ray.train.torch

from imbvlm.longtail.worker_group import SINGLE_WORKER, WorkerGroup
from imbvlm.ray_runtime.image_pipeline import stream_in_ray
from imbvlm.ray_runtime.job_records import record_workers
from imbvlm.training.step.distributed import DistributedWorkerGroup
from imbvlm.training.trial_session import TrialSession, TrialSettings, to_result


def train_worker(config: Mapping[str, TrialSettings]) -> None:
    """Run the trial of `config["settings"]`, as `train_loop_per_worker` of a TorchTrainer.

    Every worker reports each epoch, as Ray Train requires. All report the same metrics, since counts and losses are
    summed over workers.
    """
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    if context.get_world_rank() == 0:
        record_workers(context.get_experiment_name())
    is_single = context.get_world_size() == 1
    workers: WorkerGroup = SINGLE_WORKER if is_single else DistributedWorkerGroup(device)
    stream = partial(stream_in_ray, num_tasks=_loading_tasks())
    with config["settings"].config.plugins.active():
        for report in TrialSession(device, workers, stream).reports(config["settings"]):
            ray.train.report(to_result([report]))


def _loading_tasks() -> int:
    """Number of tasks that load this worker's images: one for each CPU that it has booked, or its GPUs' share of CPUs.

    The tasks book no CPU: a worker's own CPUs wait most of the time, and trials on machines with GPUs share the CPUs as
    they share the GPUs.
    """
    booked, total = ray.get_runtime_context().get_assigned_resources(), ray.cluster_resources()
    share = 0.0
    if booked.get("GPU", 0.0) and total.get("GPU", 0.0):
        share = total.get("CPU", 0.0) * booked["GPU"] / total["GPU"]
    return max(1, int(booked.get("CPU", 1.0)), int(share))
