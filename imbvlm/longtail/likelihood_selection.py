"""Selects adjustments of logits by the class-balanced log-likelihood of validation rows, temperatures apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imbvlm.longtail.logits import at_least_float32, log_prior
from imbvlm.longtail.post_hoc_adjustment import (
    CHUNK_SIZE,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    TAUS,
    ValueSelection,
    adjust_logits,
    balanced_row_weights,
    best_temperature,
    log_likelihoods,
    select_best,
)

_MAX_STEPS, _MIN_SCALE = 40, 1e-4
_TOLERANCE = 1e-5


def select_tau_by_likelihood(logits: Tensor, targets: Tensor, class_counts: Tensor) -> ValueSelection:
    """tau of logit adjustment by `fit_prior`, against tau 0."""
    values = dict.fromkeys((0.0, fit_prior(logits, targets, class_counts)))
    return select_by_likelihood(values, targets, lambda tau: adjust_logits(logits, class_counts, tau))


def select_by_likelihood(
    values: Iterable[float], targets: Tensor, logits_of: Callable[[float], Tensor]
) -> ValueSelection:
    """The value whose logits (N, C) have the highest class-balanced log-likelihood, each with its best temperature.

    0 must be among the values. Raises ImbvlmError without rows, or for logits that aren't finite.
    """
    weights, rows = balanced_row_weights(targets), dict[float, Tensor]()
    temperature = 1.0
    for value in values:
        logits = logits_of(value)
        temperature = best_temperature(logits, targets, temperature, weights)
        rows[value] = log_likelihoods(at_least_float32(logits) / temperature, targets)
    selection = select_best(rows, lambda value: float(weights @ rows[value]), neutral=0.0)
    gains = rows[selection.value] - rows[0.0] - selection.gain
    return replace(selection, standard_error=float((weights * gains).square().sum().sqrt()))


def fit_prior(logits: Tensor, targets: Tensor, class_counts: Tensor) -> float:
    """tau of (z - tau log prior) / T for logits (N, C), targets (N,), with T free [Menon et al. 2021, eq. 9].

    The class counts are (C,), or those of each row's fold (N, C). The likelihood is concave in (1 / T, tau / T), so
    that Newton's method finds its maximum; a tau outside the range of TAUS is put at its bound. Raises ImbvlmError
    without rows, or for logits that aren't finite.
    """
    logits, weights = at_least_float32(logits), balanced_row_weights(targets)
    plain = best_temperature(logits, targets, row_weights=weights)
    problem = _Problem(logits, targets, class_counts, weights)
    point = torch.tensor([1 / plain, 0.0], dtype=torch.float64)
    value, gradient, hessian = problem.at(point)
    for _ in range(_MAX_STEPS):
        direction = -torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
        scale, is_better = 1.0, False
        while scale > _MIN_SCALE and not is_better:
            following = point + scale * direction
            if 1 / MAX_TEMPERATURE <= float(following[0]) <= 1 / MIN_TEMPERATURE:
                new_value, new_gradient, new_hessian = problem.at(following)
                is_better = new_value >= value
            scale /= 2
        if not is_better:
            break
        change = float((following - point).abs().max() / following[0])
        point, value, gradient, hessian = following, new_value, new_gradient, new_hessian
        if change < _TOLERANCE:
            break
    return min(max(float(point[1] / point[0]), TAUS[0]), TAUS[-1])


@dataclass(frozen=True)
class _Problem:
    """The weighted log-likelihood of logits x z - y log prior at a point (x, y), with its derivatives."""

    logits: Tensor
    targets: Tensor
    class_counts: Tensor
    weights: Tensor

    def at(self, point: Tensor) -> tuple[float, Tensor, Tensor]:
        """The value, its gradient (2,) and its second derivatives (2, 2), summed in float64."""
        value, gradient, hessian = 0.0, torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        for start in range(0, len(self.targets), CHUNK_SIZE):
            rows = slice(start, start + CHUNK_SIZE)
            weights = self.weights[rows]
            counts = self.class_counts if self.class_counts.ndim == 1 else self.class_counts[rows]
            logits = at_least_float32(self.logits[rows])
            # Relative to the row's class, both numbers (B, 2, C) are 0 there.
            numbers = torch.stack([logits, -log_prior(counts, logits.device).to(logits.dtype).expand_as(logits)], dim=1)
            numbers = numbers - numbers.gather(2, self.targets[rows, None, None].expand(-1, 2, 1))
            scores = torch.einsum("k,bkc->bc", point.to(numbers.dtype), numbers)
            value -= float(weights @ torch.logsumexp(scores, dim=1).double())
            probs = torch.softmax(scores, dim=1)
            means = torch.einsum("bc,bkc->bk", probs, numbers)
            squares = torch.einsum("bc,bkc,blc->bkl", probs, numbers, numbers)
            covariance = squares - means[:, :, None] * means[:, None, :]
            gradient -= weights @ means.double()
            hessian -= torch.einsum("b,bkl->kl", weights, covariance.double())
        return value, gradient, hessian
