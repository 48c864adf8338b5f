"""Objectives and constraints: the values of a trial's epochs, and the Pareto set of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Epochs = Sequence[Mapping[str, float]]

# Validation metrics that a sweep can maximize. Each has its running maximum as val/best_...
ACCURACIES = (
    "val/top1_accuracy",
    "val/balanced_accuracy",
    "val/many_shot_accuracy",
    "val/medium_shot_accuracy",
    "val/few_shot_accuracy",
)
# Training time, summed over a trial's epochs and minimized.
SECONDS = "time/train_seconds"


@dataclass(frozen=True)
class ObjectiveValues:
    """The values of a trial that are reported to Optuna: objectives, and violations, which are met up to 0."""

    values: tuple[float, ...]
    violations: tuple[float, ...]


def running_maximum(metric: str) -> str:
    """Return the name under which a trial reports a validation metric's maximum so far."""
    return metric.replace("val/", "val/best_")


def direction(metric: str) -> str:
    """Return Optuna's direction of a metric."""
    return "minimize" if metric == SECONDS else "maximize"


def best_epoch(epochs: Epochs, metric: str) -> Mapping[str, float] | None:
    """Return the first epoch with a metric's maximum; None if no epoch has a finite value."""
    finite = [epoch for epoch in epochs if math.isfinite(epoch.get(metric, math.nan))]
    return max(finite, key=lambda epoch: epoch[metric], default=None)


def metric_value(epochs: Epochs, objective: str, metric: str) -> float | None:
    """Return a metric at the first epoch with the objective's maximum, or seconds over all epochs; None without one."""
    best = best_epoch(epochs, objective)
    if best is None:
        return None
    if metric == SECONDS:
        return sum(epoch.get(SECONDS, 0.0) for epoch in epochs)
    value = best.get(metric, math.nan)
    return value if math.isfinite(value) else None


def violations(epochs: Epochs, objective: str, constraints: Mapping[str, float]) -> tuple[float, ...]:
    """Return how far each metric is beyond its limit, a minimum for accuracies; inf without a value."""
    excesses = []
    for metric, limit in constraints.items():
        value = metric_value(epochs, objective, metric)
        if value is None:
            excesses.append(math.inf)
        else:
            excesses.append(value - limit if metric == SECONDS else limit - value)
    return tuple(excesses)


def outcome(
    epochs: Epochs, objective: str, others: Sequence[str], constraints: Mapping[str, float]
) -> ObjectiveValues | None:
    """Return the values of a trial's epochs; None where one is missing or not finite."""
    metrics = (objective, *others)
    values = tuple(value for metric in metrics if (value := metric_value(epochs, objective, metric)) is not None)
    excesses = violations(epochs, objective, constraints)
    if len(values) < len(metrics) or not all(map(math.isfinite, excesses)):
        return None
    return ObjectiveValues(values, excesses)


def pareto_indices(points: Sequence[Sequence[float]], metrics: Sequence[str]) -> list[int]:
    """Indices of the points that no other point beats: at least as good in every metric and better in one."""
    signs = [-1 if metric == SECONDS else 1 for metric in metrics]
    signed = [[sign * value for sign, value in zip(signs, point, strict=True)] for point in points]

    def beats(left: Sequence[float], right: Sequence[float]) -> bool:
        return all(a >= b for a, b in zip(left, right, strict=True)) and left != right

    # In descending order a point comes after all points that beat it.
    front = list[int]()
    for index in sorted(range(len(signed)), key=lambda index: signed[index], reverse=True):
        if not any(beats(signed[other], signed[index]) for other in front):
            front.append(index)
    return sorted(front)
