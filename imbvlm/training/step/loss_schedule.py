"""The loss of each step of a trial: its options, the class counts it gets, and deferred re-weighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.longtail.class_sampling import sampled_counts
from imbvlm.longtail.losses import ConfiguredLoss, build_loss, effective_number_weights
from imbvlm.longtail.worker_group import WorkerGroup


class LossSchedule:
    """The losses of one trial over training class counts (C,), computed on `device`.

    `logit_scale` is the factor on cosine similarities of a method without a classifier section.
    """

    def __init__(
        self,
        config: TrialConfig,
        class_counts: npt.NDArray[np.int64],
        num_epochs: int,
        num_steps: int,
        device: torch.device,
        workers: WorkerGroup,
        logit_scale: float = 1.0,
    ) -> None:
        scale = logit_scale if config.classifier is None else config.classifier.logit_scale
        self._loss = require_section(config.loss).resolve(scale)
        self._class_sampling = config.data.class_sampling
        self._class_counts = class_counts
        self._num_epochs = num_epochs
        self._num_steps = num_steps
        self._device = device
        self._workers = workers

    @property
    def name(self) -> str:
        return self._loss.name

    def at_epoch(self, epoch: int) -> Callable[[int], ConfiguredLoss]:
        """For an epoch (0-based): the loss (logits, labels) -> scalar of each of the trial's steps (0-based)."""
        counts = torch.as_tensor(self.counts_at(epoch), device=self._device)
        loss = self._build(counts)
        reweight_from: float | None = getattr(self._loss, "reweight_from", None)
        if reweight_from is None:
            return lambda step: loss
        reweighted = self._build(counts, reweight=effective_number_weights(counts))
        first_step = reweight_from * self._num_steps
        return lambda step: reweighted if step >= first_step else loss

    def counts_at(self, epoch: int) -> npt.NDArray[np.float64]:
        """Class counts (C,) for the loss: those that class sampling gives if the loss corrects for that prior.

        Weights and margins keep the counts of the training rows, so that class-balanced sampling isn't corrected twice.
        """
        if getattr(self._loss, "prior", None) == "sampled":
            return sampled_counts(self._class_counts, self._class_sampling, epoch, self._num_epochs)
        return self._class_counts.astype(np.float64)

    def _build(self, counts: torch.Tensor, **extra: Any) -> ConfiguredLoss:
        return build_loss(self._loss.name, counts, workers=self._workers, **self._loss.options(), **extra)
