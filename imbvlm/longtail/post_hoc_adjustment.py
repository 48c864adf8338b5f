"""Adjustments of trained logits: logit adjustment, mixing with zero-shot logits, temperature scaling.

They need stored validation logits and no model. Each value is selected on validation, by the sweep's objective, from a
finite list of candidates, which reports show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.logits import add_log_prior, at_least_float32
from imbvlm.longtail.metrics import CalibrationBins, predictions

TAUS = tuple(round(-1 + 0.1 * step, 10) for step in range(31))
ALPHAS = tuple(round(0.05 * step, 10) for step in range(21))
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
# A class of so few images weighs as much as any other: a single wrong one sets the temperature (docs/protocol.md).
MAX_UNCALIBRATED = 3
# Rows whose adjusted logits are in memory at once.
CHUNK_SIZE = 1024
_MAX_STEPS = 60
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class PostHocAdjustment:
    """tau of logit adjustment, alpha of zero-shot logits and a temperature for a trained model's logits."""

    tau: float = 0.0
    alpha: float = 0.0
    temperature: float = 1.0

    def apply(
        self, logits: Tensor, class_counts: npt.ArrayLike | Tensor, zero_shot_logits: Tensor | None = None
    ) -> Tensor:
        """Adjusted logits (B, C) of a model trained on class counts (C,); alpha needs `zero_shot_logits` (B, C).

        Raises ImbvlmError.
        """
        adjusted = adjust_logits(logits, class_counts, self.tau)
        if self.alpha:
            if zero_shot_logits is None:
                raise ImbvlmError(
                    f"alpha {self.alpha:g} needs zero-shot logits to mix in, got none. Give them, or set alpha to 0."
                )
            adjusted = mix_logits(adjusted, zero_shot_logits, self.alpha)
        return adjusted / self.temperature


@dataclass(frozen=True)
class ValueSelection:
    """The value with the best validation score, and all candidates: (value, score).

    `standard_error` is that of its gain over the neutral value on the same rows, or 0 if it was not computed.
    """

    value: float
    score: float
    candidates: tuple[tuple[float, float], ...]
    neutral: float = 0.0
    standard_error: float = 0.0

    @property
    def gain(self) -> float:
        """Score above that of the neutral value."""
        return self.score - dict(self.candidates)[self.neutral]

    @property
    def accepted(self) -> float:
        """The value if its gain exceeds its standard error, else the neutral value."""
        # If a single row has changed, the two are equal by their formulas, and their sums differ by rounding.
        is_equal = math.isclose(self.gain, self.standard_error, rel_tol=1e-9, abs_tol=1e-12)
        return self.value if self.gain > self.standard_error and not is_equal else self.neutral

    def to_dict(self) -> dict[str, Any]:
        """Plain data for post_hoc.json, where the candidates are `tried`."""
        return {
            "value": self.value,
            "score": self.score,
            "tried": self.candidates,
            "neutral": self.neutral,
            "standard_error": self.standard_error,
        }


def uncalibrated_note(num_uncalibrated: int) -> str:
    """Why probabilities may not be called calibrated; empty where no class has so few validation images."""
    if not num_uncalibrated:
        return ""
    return f"not calibrated: {pluralize(num_uncalibrated, 'class')} with 1 to {MAX_UNCALIBRATED} validation images"


@dataclass(frozen=True)
class TemperatureFit:
    """A temperature, with the mean cross entropy and expected calibration error of validation before and after it.

    `standard_error` is that of the gain in cross entropy on the same rows. `is_bounded` is False if every row is
    correct, so that the cross entropy has no minimum. `num_uncalibrated` classes have 1 to MAX_UNCALIBRATED rows.
    """

    temperature: float
    loss_before: float
    loss_after: float
    calibration_error_before: float
    calibration_error_after: float
    standard_error: float
    is_bounded: bool
    num_uncalibrated: int

    @property
    def objection(self) -> str | None:
        """Predicate of a sentence on why the rows don't support the temperature; None if they do.

        Among few rows, a wrong one with large logits dominates the cross entropy.
        """
        if not self.is_bounded:
            return "has no lower bound, because every row is correct"
        if not 1.01 * MIN_TEMPERATURE < self.temperature < 0.99 * MAX_TEMPERATURE:
            return "is at a bound of its range"
        gain = self.loss_before - self.loss_after
        if gain <= self.standard_error:
            return f"lowers the cross entropy by {gain:.2g}, within its standard error {self.standard_error:.2g}"
        if self.calibration_error_after >= self.calibration_error_before:
            return "lowers the cross entropy and not the calibration error"
        return None

    @property
    def accepted(self) -> float:
        """The temperature if the rows support it, else 1, which changes nothing."""
        return self.temperature if self.objection is None else 1.0

    @property
    def accepted_calibration_error(self) -> float:
        """Expected calibration error with the accepted temperature."""
        return self.calibration_error_after if self.objection is None else self.calibration_error_before


def select_best(values: Iterable[float], score: Callable[[float], float], neutral: float) -> ValueSelection:
    """The value with the highest score; among equals the one nearest to `neutral`, which changes nothing."""
    candidates = tuple((value, score(value)) for value in values)
    best, best_score = max(candidates, key=lambda pair: (pair[1], -abs(pair[0] - neutral), -pair[0]))
    return ValueSelection(best, best_score, candidates, neutral)


def accuracy_weights(metric: str, targets: Tensor, stats: ClassStats) -> Tensor:
    """Weights (C,) whose weighted sum of per-class accuracies on these targets is the metric, an accuracy.

    Raises ImbvlmError if no class of the metric's group has a row.
    """
    total = torch.bincount(targets, minlength=stats.num_classes).double()
    if metric == "top1_accuracy":
        return total / total.sum()
    counted = total > 0
    if metric != "balanced_accuracy":
        members = torch.zeros_like(counted)
        members[torch.from_numpy(stats.shot_groups[metric.removesuffix("_accuracy")])] = True
        counted &= members
    if not counted.any():
        raise ImbvlmError(
            f"{metric} needs a class with validation rows, got none. Give such classes validation images, or choose "
            "another objective."
        )
    return counted.double() / counted.sum()


def adjust_logits(logits: Tensor, class_counts: npt.ArrayLike | Tensor, tau: float) -> Tensor:
    """z - tau log prior for logits (B, C) and class counts of training, (C,) or (B, C) [Menon et al. 2021, eq. 9].

    A class without images has the prior of half an image.
    """
    return add_log_prior(logits, class_counts, -tau)


def select_tau(
    logits: Tensor,
    targets: Tensor,
    class_counts: npt.ArrayLike | Tensor,
    weights: Tensor | None = None,
) -> ValueSelection:
    """tau of `adjust_logits` on validation logits (N, C), targets (N,), by per-class accuracy under `weights` (C,).

    The class counts are (C,), or those of each row's fold (N, C). The default weights are those of balanced accuracy.
    Raises ImbvlmError.
    """
    _check(logits, targets)
    counts = torch.as_tensor(class_counts)

    def adjusted(tau: float, rows: slice) -> Tensor:
        return adjust_logits(logits[rows], counts if counts.ndim == 1 else counts[rows], tau)

    return _select_by_rows(TAUS, targets, weights, logits.shape[1], adjusted)


def mix_logits(logits: Tensor, zero_shot_logits: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) z + alpha z_zero_shot (B, C), each on its own scale."""
    return (1 - alpha) * at_least_float32(logits) + alpha * at_least_float32(zero_shot_logits)


def select_alpha(
    logits: Tensor,
    zero_shot_logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
) -> ValueSelection:
    """alpha of `mix_logits` on validation logits (N, C), targets (N,), by per-class accuracy under `weights` (C,).

    The default weights are those of balanced accuracy. Raises ImbvlmError.
    """
    _check(logits, targets)
    if zero_shot_logits.shape != logits.shape:
        raise ImbvlmError(
            f"zero-shot logits must have the rows and classes of the model's, {tuple(logits.shape)}, got "
            f"{tuple(zero_shot_logits.shape)}. Give those of the same images and classes."
        )
    return _select_by_rows(
        ALPHAS,
        targets,
        weights,
        logits.shape[1],
        lambda alpha, rows: mix_logits(logits[rows], zero_shot_logits[rows], alpha),
    )


def best_temperature(logits: Tensor, targets: Tensor, start: float = 1.0, row_weights: Tensor | None = None) -> float:
    """The T from 0.01 to 100 of least cross entropy of z / T on logits (N, C), targets (N,) [Guo et al. 2017].

    Rows count alike, or by `row_weights` (N,). The loss is convex in 1 / T: Newton's method finds the zero of its slope
    within a bracket, sooner from a `start` nearby. Raises ImbvlmError without rows, or for logits that aren't finite.
    """
    _check(logits, targets)
    if not bool(torch.isfinite(logits).all()):
        raise ImbvlmError("logits must be finite for a temperature, got NaN or infinity. Leave those rows out.")
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    inverse = min(max(1 / start, low), high)
    for _ in range(_MAX_STEPS):
        slope, curvature = _slope(logits, targets, inverse, row_weights)
        if slope == 0:
            break
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else 0.0
        # A step that leaves the bracket or has no curvature bisects it instead.
        following = step if low < step < high else float(np.sqrt(low * high))
        if abs(following - inverse) <= _TOLERANCE * inverse:
            break
        inverse = following
    return 1 / inverse


def fit_temperature(logits: Tensor, targets: Tensor) -> TemperatureFit:
    """`best_temperature` of logits (N, C), targets (N,), with loss and calibration before and after."""
    temperature = best_temperature(logits, targets)
    before, bins_before = _calibration(logits, targets, 1.0)
    after, bins_after = _calibration(logits, targets, temperature)
    # The spread of the differences; one row has none.
    spread = float((before - after).std()) if len(targets) > 1 else math.inf
    num_rows, num_right, _ = bins_before.counts.sum(dim=1).tolist()
    counts = torch.bincount(targets)
    return TemperatureFit(
        temperature=temperature,
        loss_before=float(before.mean()),
        loss_after=float(after.mean()),
        calibration_error_before=bins_before.compute()["expected_calibration_error"],
        calibration_error_after=bins_after.compute()["expected_calibration_error"],
        standard_error=spread / math.sqrt(num_rows),
        is_bounded=num_right < num_rows,
        num_uncalibrated=int(((counts > 0) & (counts <= MAX_UNCALIBRATED)).sum()),
    )


def calibration_error(logits: Tensor, targets: Tensor) -> float:
    """Expected calibration error of logits (N, C), targets (N,). Raises ImbvlmError without rows."""
    _check(logits, targets)
    return _calibration(logits, targets, 1.0)[1].compute()["expected_calibration_error"]


def balanced_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Mean over the classes with rows of their rows' mean log-likelihood, of logits (N, C), targets (N,).

    Raises ImbvlmError without rows.
    """
    row_weights = balanced_row_weights(targets).to(logits.device)
    return float((row_weights * log_likelihoods(logits, targets)).sum())


def log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood (N,) in float64 of each row's class, of logits (N, C), targets (N,). Raises ImbvlmError."""
    _check(logits, targets)
    chunks = [slice(start, start + CHUNK_SIZE) for start in range(0, len(targets), CHUNK_SIZE)]
    losses = [F.cross_entropy(at_least_float32(logits[rows]), targets[rows], reduction="none") for rows in chunks]
    return -torch.cat(losses).double()


def balanced_row_weights(targets: Tensor) -> Tensor:
    """Weights (N,) in float64 that give each class with rows the same sum, 1 in total: 1 / (C n_c)."""
    counts = torch.bincount(targets)
    return 1 / (counts[targets].double() * max(int((counts > 0).sum()), 1))


def balanced_accuracy(targets: Tensor, num_classes: int, logits_of: Callable[[slice], Tensor]) -> float:
    """Mean accuracy over the classes with rows; `logits_of(rows)` gives logits (B, C). A row with a NaN is wrong."""
    return _score(_right(targets, logits_of), targets, _balanced(targets, num_classes))


def gain_standard_error(right: Tensor, before: Tensor, targets: Tensor, weights: Tensor) -> float:
    """Standard error of a weighted accuracy's difference between two predictions of the same rows (N,) [McNemar 1947].

    sqrt(sum_c (w_c / n_c)^2 k_c), k_c the rows of class c that one of the two has correct and the other wrong.
    """
    changed = torch.bincount(targets[right != before], minlength=len(weights)).double()
    total = torch.bincount(targets, minlength=len(weights)).clamp(min=1).double()
    return float(((weights.to(total) / total).square() * changed).sum().sqrt())


def _select_by_rows(
    values: Sequence[float],
    targets: Tensor,
    weights: Tensor | None,
    num_classes: int,
    logits_at: Callable[[float, slice], Tensor],
) -> ValueSelection:
    """The value with the best weighted accuracy, and the standard error of its gain over 0."""
    weights = _balanced(targets, num_classes) if weights is None else weights

    def right_at(value: float) -> Tensor:
        return _right(targets, lambda rows: logits_at(value, rows))

    selection = select_best(values, lambda value: _score(right_at(value), targets, weights), neutral=0.0)
    if selection.value == selection.neutral:
        return selection
    error = gain_standard_error(right_at(selection.value), right_at(selection.neutral), targets, weights)
    return replace(selection, standard_error=error)


def _balanced(targets: Tensor, num_classes: int) -> Tensor:
    present = torch.bincount(targets, minlength=num_classes) > 0
    return present.double() / present.sum()


def _right(targets: Tensor, logits_of: Callable[[slice], Tensor]) -> Tensor:
    """Which rows (N,) are predicted correctly; those with a NaN aren't."""
    right = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    for start in range(0, len(targets), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        classes, valid = predictions(logits_of(rows))
        right[rows] = (classes == targets[rows]) & valid
    return right


def _score(right: Tensor, targets: Tensor, weights: Tensor) -> float:
    """Weighted mean of per-class accuracies, weights (C,)."""
    total = torch.bincount(targets, minlength=len(weights)).clamp(min=1)
    correct = torch.bincount(targets[right], minlength=len(weights))
    weights = weights.to(correct.device)
    return float((weights * correct / total).sum() / weights.sum())


def _slope(logits: Tensor, targets: Tensor, inverse: float, row_weights: Tensor | None = None) -> tuple[float, float]:
    """First and second derivative of the mean cross entropy of inverse * z by `inverse`, summed in float64."""
    if row_weights is None:
        row_weights = torch.full((len(targets),), 1 / len(targets), dtype=torch.float64, device=logits.device)
    slope = curvature = 0.0
    for start in range(0, len(targets), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        part = at_least_float32(logits[rows])
        part = part - part.gather(1, targets[rows, None])
        probs = torch.softmax(inverse * part, dim=1)
        mean = (probs * part).sum(dim=1, keepdim=True)
        slope += float(row_weights[rows] @ mean[:, 0].double())
        part -= mean
        curvature += float(row_weights[rows] @ (probs * part.square_()).sum(dim=1, dtype=torch.float64))
    return slope, curvature


def _calibration(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, CalibrationBins]:
    """Cross entropy of each row (N,), and confidence bins, of z / temperature in float64."""
    bins, losses = CalibrationBins(), []
    for start in range(0, len(targets), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        scaled = logits[rows].double() / temperature
        bins.update(scaled, targets[rows])
        losses.append(F.cross_entropy(scaled, targets[rows], reduction="none"))
    return torch.cat(losses), bins


def _check(logits: Tensor, targets: Tensor) -> None:
    if len(targets) == 0:
        raise ImbvlmError("selection needs validation rows, got none. Give some.")
    if logits.ndim != 2 or len(logits) != len(targets):
        raise ImbvlmError(f"logits must be (rows, classes) with {len(targets)} rows, got {tuple(logits.shape)}.")
