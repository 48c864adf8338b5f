"""Which loss a step of a trial uses: its knobs, the class counts it is given, and deferred re-weighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imbvlm.config.loss_registry import LdamConfig
from imbvlm.config.model_sections import CosineClassifierConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.longtail.class_sampling import sampled_counts
from imbvlm.longtail.losses import ConfiguredLoss, build_loss, effective_number_weights
from imbvlm.longtail.worker_group import WorkerGroup


class LossSchedule:
    """The losses of one trial over training class counts (C,), computed on `device`.

    `logit_scale` is the factor on cosine similarities of a method that has no classifier of its own.
    """

    def __init__(
        self,
        config: TrialConfig,
        class_counts: npt.NDArray[np.int64],
        num_epochs: int,
        num_steps: int,
        device: torch.device,
        world: WorkerGroup,
        logit_scale: float = 1.0,
    ) -> None:
        assert config.loss is not None, "TrialConfig gives every method that trains its loss section"
        self._loss = config.loss
        self._class_sampling = config.data.class_sampling
        self._class_counts = class_counts
        self._num_epochs = num_epochs
        self._num_steps = num_steps
        self._device = device
        self._world = world
        self._knobs = loss_knobs(config, logit_scale)

    @property
    def name(self) -> str:
        return self._loss.name

    def at_epoch(self, epoch: int) -> Callable[[int], ConfiguredLoss]:
        """For an epoch (0-based): the loss (logits, labels) -> scalar of each of its steps, counted over the trial."""
        counts = torch.as_tensor(self.counts_at(epoch), device=self._device)
        loss = self._build(counts, self._knobs)
        if not isinstance(self._loss, LdamConfig) or self._loss.reweight_from is None:
            return lambda step: loss
        reweighted = self._build(counts, {**self._knobs, "reweight": effective_number_weights(counts)})
        first = self._loss.reweight_from * self._num_steps
        return lambda step: reweighted if step >= first else loss

    def counts_at(self, epoch: int) -> npt.NDArray[np.float64]:
        """What the loss takes for the class counts (C,): those that sampling gives where it corrects for the prior.

        Weights and margins keep the unsampled counts, so that class-balanced sampling isn't corrected twice.
        """
        if getattr(self._loss, "prior", None) == "sampled":
            return sampled_counts(self._class_counts, self._class_sampling, epoch, self._num_epochs)
        return self._class_counts.astype(np.float64)

    def _build(self, counts: torch.Tensor, knobs: dict[str, Any]) -> ConfiguredLoss:
        return build_loss(self._loss.name, counts, workers=self._world, **knobs)


def loss_knobs(config: TrialConfig, logit_scale: float = 1.0) -> dict[str, Any]:
    """The chosen loss's own knobs, resolved; what the loop itself reads (`prior`, `reweight_from`) is left out.

    A margin is scaled as the logits are: by 1 / temperature of a cosine classifier, by `logit_scale` without any.
    """
    loss, classifier = config.loss, config.classifier
    assert loss is not None, "TrialConfig gives every method that trains its loss section"
    knobs = loss.model_dump(exclude={"name", "prior", "reweight_from"})
    if isinstance(loss, LdamConfig) and loss.margin_scale is None:
        scale = logit_scale if classifier is None else 1.0
        knobs["margin_scale"] = 1 / classifier.temperature if isinstance(classifier, CosineClassifierConfig) else scale
    return knobs
