"""One worker of a trial under Ray Train: the only file of this folder that knows Ray."""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch

from imbvlm.training.session import TrialSession, TrialSettings
from imbvlm.training.world import SINGLE, DistributedWorld, World


def train_worker(settings: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a TorchTrainer: runs the trial that TrialSettings.to_dict() describes.

    Every worker reports each epoch, as Ray Train wants; their metrics are the same, since counts and losses were
    added over workers.
    """
    device = ray.train.torch.get_device()
    alone = ray.train.get_context().get_world_size() == 1
    world: World = SINGLE if alone else DistributedWorld(device)
    for report in TrialSession(device, world).reports(TrialSettings.from_dict(settings)):
        ray.train.report(report)
