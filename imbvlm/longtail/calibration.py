"""Temperatures by class-balanced log-likelihood, the number by which heads and blends are selected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imbvlm.base.formatting import pluralize
from imbvlm.longtail.post_hoc_adjustment import balanced_log_likelihood, balanced_row_weights, best_temperature

# A class of 1 to MAX_UNCALIBRATED images weighs as much as any other: a single wrong image then sets the temperature.
MAX_UNCALIBRATED = 3


@dataclass(frozen=True)
class BalancedTemperature:
    """The temperature of highest class-balanced log-likelihood, that likelihood, and why it isn't calibrated.

    `thin` are the classes of 1 to MAX_UNCALIBRATED validation images. With any, the temperature still puts candidates
    on one scale, and nothing may be said about the probabilities.
    """

    temperature: float
    log_likelihood: float
    thin: tuple[int, ...]

    @property
    def is_calibrated(self) -> bool:
        """Whether probabilities of this temperature may be called calibrated."""
        return not self.thin

    @property
    def verdict(self) -> str:
        """`calibrated`, or `not calibrated` with the reason."""
        if self.is_calibrated:
            return "calibrated"
        return f"not calibrated: {pluralize(len(self.thin), 'class')} with 1 to {MAX_UNCALIBRATED} validation images"


def fit_balanced_temperature(
    logits: Tensor, targets: Tensor, units: Tensor | None = None, start: float = 1.0
) -> BalancedTemperature:
    """The temperature of logits (N, C), targets (N,), by class-balanced log-likelihood.

    The logits of folds are adjusted with each fold's counts beforehand, and pooled. `units` (N,) numbers the groups of
    copies, which count once in `thin`; by default each row is one. Raises ImbvlmError without rows, or for logits that
    aren't finite.
    """
    row_weights = balanced_row_weights(targets).to(logits.device)
    temperature = best_temperature(logits, targets, start, row_weights)
    pairs = targets if units is None else torch.unique(torch.stack([units, targets]), dim=1)[1]
    counts = torch.bincount(pairs, minlength=logits.shape[1])
    thin = torch.nonzero((counts > 0) & (counts <= MAX_UNCALIBRATED)).flatten().tolist()
    return BalancedTemperature(temperature, balanced_log_likelihood(logits / temperature, targets), tuple(thin))
