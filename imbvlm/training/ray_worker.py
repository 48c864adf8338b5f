"""One worker of a trial under Ray Train: the only file of this folder that knows Ray."""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch

from imbvlm.data.pipeline import stream_in_ray
from imbvlm.training.session import TrialSession, TrialSettings
from imbvlm.training.world import SINGLE, DistributedWorld, World


def train_worker(settings: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a TorchTrainer: runs the trial that TrialSettings.to_dict() describes.

    Every worker reports each epoch, as Ray Train wants; their metrics are the same, since counts and losses were
    added over workers.
    """
    device = ray.train.torch.get_device()
    world_size = ray.train.get_context().get_world_size()
    world: World = SINGLE if world_size == 1 else DistributedWorld(device)
    # Each worker's images are loaded by its share of the cluster's CPUs.
    num_tasks = max(1, int(ray.cluster_resources().get("CPU", 1)) // world_size)
    stream = partial(stream_in_ray, num_tasks=num_tasks)
    for report in TrialSession(device, world, stream).reports(TrialSettings.from_dict(settings)):
        ray.train.report(report)
