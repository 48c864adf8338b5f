"""One worker of a trial under Ray Train: the only file of this folder that knows Ray."""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch

from imbvlm.longtail.worker_group import SINGLE_WORKER, WorkerGroup
from imbvlm.ray_runtime.image_pipeline import stream_in_ray
from imbvlm.training.step.distributed import DistributedWorkerGroup
from imbvlm.training.trial_session import TrialSession, TrialSettings


def train_worker(settings: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a TorchTrainer: runs the trial that TrialSettings.to_dict() describes.

    Every worker reports each epoch, as Ray Train wants; their metrics are the same, since counts and losses were
    added over workers.
    """
    device = ray.train.torch.get_device()
    alone = ray.train.get_context().get_world_size() == 1
    world: WorkerGroup = SINGLE_WORKER if alone else DistributedWorkerGroup(device)
    stream = partial(stream_in_ray, num_tasks=_loading_tasks())
    for report in TrialSession(device, world, stream).reports(TrialSettings.from_dict(settings)):
        ray.train.report(report)


def _loading_tasks() -> int:
    """How many tasks load this worker's images: one for each CPU that it has booked, or that falls to its GPUs.

    They book none themselves. A worker's own CPUs wait most of the time; and the trials that run at once on machines
    with GPUs share their CPUs as they share those.
    """
    mine, everything = ray.get_runtime_context().get_assigned_resources(), ray.cluster_resources()
    falls_to_gpus = 0.0
    if mine.get("GPU", 0.0) and everything.get("GPU", 0.0):
        falls_to_gpus = everything.get("CPU", 0.0) * mine["GPU"] / everything["GPU"]
    return max(1, int(mine.get("CPU", 1.0)), int(falls_to_gpus))
