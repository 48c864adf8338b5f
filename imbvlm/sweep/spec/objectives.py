"""Several objectives and constraints on them: what a trial's epochs are worth, and which trials none beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Epochs = Sequence[Mapping[str, float]]

# What a trial reports on validation and a sweep can maximise; each has its running maximum as val/best_...
ACCURACIES = (
    "val/top1_accuracy",
    "val/balanced_accuracy",
    "val/many_shot_accuracy",
    "val/medium_shot_accuracy",
    "val/few_shot_accuracy",
)
# The sum over a trial's epochs, which is minimised.
SECONDS = "time/train_seconds"


@dataclass(frozen=True)
class ObjectiveValues:
    """What Optuna is told of a trial: the objective and the others; constraints, met where they aren't above 0."""

    values: tuple[float, ...]
    violations: tuple[float, ...]


def running_maximum(metric: str) -> str:
    """The name under which a trial reports a validation metric's maximum so far."""
    return metric.replace("val/", "val/best_")


def direction(metric: str) -> str:
    """Optuna's word."""
    return "minimize" if metric == SECONDS else "maximize"


def metric_value(epochs: Epochs, objective: str, metric: str) -> float | None:
    """A metric at the first epoch with the objective's maximum, seconds over all epochs; None where it isn't there."""
    scored = [epoch for epoch in epochs if math.isfinite(epoch.get(objective, math.nan))]
    if not scored:
        return None
    if metric == SECONDS:
        return sum(epoch.get(SECONDS, 0.0) for epoch in epochs)
    value = max(scored, key=lambda epoch: epoch[objective]).get(metric, math.nan)
    return value if math.isfinite(value) else None


def violations(epochs: Epochs, objective: str, constraints: Mapping[str, float]) -> tuple[float, ...]:
    """How far each metric is beyond its limit: accuracies at least, seconds at most; inf where there is no value."""
    found = []
    for metric, limit in constraints.items():
        value = metric_value(epochs, objective, metric)
        if value is None:
            found.append(math.inf)
        else:
            found.append(value - limit if metric == SECONDS else limit - value)
    return tuple(found)


def outcome(
    epochs: Epochs, objective: str, others: Sequence[str], constraints: Mapping[str, float]
) -> ObjectiveValues | None:
    """What a trial's epochs come to; None where a value that is asked for isn't there, or not finite."""
    values = [metric_value(epochs, objective, metric) for metric in (objective, *others)]
    broken = violations(epochs, objective, constraints)
    known = tuple(value for value in values if value is not None)
    if len(known) < len(values) or not all(map(math.isfinite, broken)):
        return None
    return ObjectiveValues(known, broken)


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
