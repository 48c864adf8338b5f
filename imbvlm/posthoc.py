"""After training, from stored validation logits: logit adjustment, temperature scaling, mixing with zero-shot logits.

Nothing trains and no model is needed. What is chosen, is chosen on validation by balanced accuracy from a finite list
that is kept whole, so that a report can show what else was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from imbvlm.class_stats import PRIOR_FLOOR
from imbvlm.errors import ImbvlmError
from imbvlm.metrics import CalibrationBins, per_class_accuracy, predictions

TAUS = tuple(round(-1 + 0.1 * step, 10) for step in range(31))
ALPHAS = tuple(round(0.05 * step, 10) for step in range(21))
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
# Rows whose logits are changed in memory at once.
CHUNK_SIZE = 1024
_MAX_STEPS = 60
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Choice:
    """The value with the best validation balanced accuracy, and everything tried: (value, balanced accuracy)."""

    value: float
    score: float
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Calibration:
    """A temperature, and mean cross entropy and expected calibration error of validation without and with it."""

    temperature: float
    loss_before: float
    loss_after: float
    calibration_error_before: float
    calibration_error_after: float


def choose(values: Iterable[float], score: Callable[[float], float], neutral: float) -> Choice:
    """The value of the highest score; of equals the one nearest to `neutral`, which changes nothing."""
    tried = tuple((value, score(value)) for value in values)
    best, best_score = max(tried, key=lambda pair: (pair[1], -abs(pair[0] - neutral), -pair[0]))
    return Choice(best, best_score, tried)


def adjust_logits(logits: Tensor, class_counts: npt.ArrayLike | Tensor, tau: float) -> Tensor:
    """z - tau log prior: (B, C) logits, (C,) counts that the model was trained on [Menon et al. 2021, eq. 9].

    A class without images has the prior of half an image.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64, device=logits.device).clamp(min=PRIOR_FLOOR)
    logits = _computing(logits)
    return logits - (tau * torch.log(counts / counts.sum())).to(logits.dtype)


def choose_tau(
    logits: Tensor, targets: Tensor, class_counts: npt.ArrayLike | Tensor, taus: Sequence[float] = TAUS
) -> Choice:
    """tau of `adjust_logits` by balanced accuracy on validation logits (N, C), targets (N,). Raises ImbvlmError."""
    _check(logits, targets)
    return choose(
        taus,
        lambda tau: balanced_accuracy(
            targets, logits.shape[1], lambda rows: adjust_logits(logits[rows], class_counts, tau)
        ),
        neutral=0.0,
    )


def mix_logits(logits: Tensor, zero_shot_logits: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) z + alpha z_zero_shot, both (B, C) and each on its own scale."""
    return (1 - alpha) * _computing(logits) + alpha * _computing(zero_shot_logits)


def choose_alpha(logits: Tensor, zero_shot_logits: Tensor, targets: Tensor, alphas: Sequence[float] = ALPHAS) -> Choice:
    """alpha of `mix_logits` by balanced accuracy on validation logits (N, C), targets (N,). Raises ImbvlmError."""
    _check(logits, targets)
    if zero_shot_logits.shape != logits.shape:
        raise ImbvlmError(
            f"zero-shot logits must be of the same rows and classes as the model's, {tuple(logits.shape)}, and are "
            f"{tuple(zero_shot_logits.shape)}"
        )
    return choose(
        alphas,
        lambda alpha: balanced_accuracy(
            targets, logits.shape[1], lambda rows: mix_logits(logits[rows], zero_shot_logits[rows], alpha)
        ),
        neutral=0.0,
    )


def fit_temperature(logits: Tensor, targets: Tensor) -> Calibration:
    """T, 0.01 to 100, of least cross entropy of z / T on logits (N, C), targets (N,) [Guo et al. 2017].

    The loss is convex in 1 / T, so that the minimum is where its slope is 0: Newton's steps, kept in a bracket.
    Raises ImbvlmError without rows, or for logits that aren't finite.
    """
    _check(logits, targets)
    if not bool(torch.isfinite(logits).all()):
        raise ImbvlmError("logits that aren't finite can't be calibrated; leave those rows out")
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    inverse = min(max(1.0, low), high)
    for _ in range(_MAX_STEPS):
        slope, curvature = _slope(logits, targets, inverse)
        if slope == 0:
            break
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else 0.0
        # A step that leaves the bracket, or has no curvature to go by, halves it instead.
        following = step if low < step < high else float(np.sqrt(low * high))
        if abs(following - inverse) <= _TOLERANCE * inverse:
            break
        inverse = following
    before, after = _calibration(logits, targets, 1.0), _calibration(logits, targets, 1 / inverse)
    return Calibration(1 / inverse, before[0], after[0], before[1], after[1])


def balanced_accuracy(targets: Tensor, num_classes: int, logits_of: Callable[[slice], Tensor]) -> float:
    """Mean accuracy over the classes with rows; `logits_of(rows)` gives logits (B, C). A row with a NaN is wrong."""
    right = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    for start in range(0, len(targets), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        classes, valid = predictions(logits_of(rows))
        right[rows] = (classes == targets[rows]) & valid
    total = torch.bincount(targets, minlength=num_classes)
    correct = torch.bincount(targets[right], minlength=num_classes)
    return float(np.nanmean(per_class_accuracy(correct.cpu().numpy(), total.cpu().numpy())))


def _slope(logits: Tensor, targets: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean cross entropy of inverse * z, added in float64."""
    slope = curvature = 0.0
    for start in range(0, len(targets), CHUNK_SIZE):
        part = _computing(logits[start : start + CHUNK_SIZE])
        part = part - part.gather(1, targets[start : start + CHUNK_SIZE, None])
        probs = torch.softmax(inverse * part, dim=1)
        mean = (probs * part).sum(dim=1, keepdim=True)
        slope += float(mean.sum(dtype=torch.float64))
        part -= mean
        curvature += float((probs * part.square_()).sum(dtype=torch.float64))
    return slope / len(targets), curvature / len(targets)


def _calibration(logits: Tensor, targets: Tensor, temperature: float) -> tuple[float, float]:
    """Mean cross entropy and expected calibration error of z / temperature."""
    bins, loss = CalibrationBins(), 0.0
    for start in range(0, len(targets), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        scaled = logits[rows].double() / temperature
        bins.update(scaled, targets[rows])
        loss += float(F.cross_entropy(scaled, targets[rows], reduction="sum"))
    return loss / len(targets), bins.compute()["expected_calibration_error"]


def _computing(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(logits: Tensor, targets: Tensor) -> None:
    if len(targets) == 0:
        raise ImbvlmError("there are no validation rows to choose on")
    if logits.ndim != 2 or len(logits) != len(targets):
        raise ImbvlmError(f"logits must be (rows, classes) of {len(targets)} rows, and are {tuple(logits.shape)}")
