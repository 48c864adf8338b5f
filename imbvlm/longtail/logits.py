"""Precision and class prior of logits, for losses and adjustments alike."""

from __future__ import annotations

import numpy.typing as npt
import torch
from torch import Tensor

from imbvlm.longtail.class_stats import PRIOR_FLOOR


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float32 or float64: half precision is too coarse for log-softmax."""
    return logits if logits.dtype == torch.float64 else logits.float()


def floored_counts(class_counts: npt.ArrayLike | Tensor, device: torch.device) -> Tensor:
    """Class counts (..., C) in float64; an empty class counts as half an image."""
    return torch.as_tensor(class_counts, dtype=torch.float64, device=device).clamp(min=PRIOR_FLOOR)


def log_prior(class_counts: npt.ArrayLike | Tensor, device: torch.device) -> Tensor:
    """Logarithm of each class's share of the images (..., C) in float64; an empty class counts as half an image."""
    counts = floored_counts(class_counts, device)
    return torch.log(counts / counts.sum(dim=-1, keepdim=True))


def add_log_prior(logits: Tensor, class_counts: npt.ArrayLike | Tensor, tau: float | Tensor) -> Tensor:
    """z + tau log prior for logits (B, C) and class counts, (C,) or each row's (B, C) [Menon et al. 2021]."""
    logits = at_least_float32(logits)
    return logits + (tau * log_prior(class_counts, logits.device)).to(logits.dtype)
