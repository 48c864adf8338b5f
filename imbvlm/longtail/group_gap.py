"""The gap between accuracies on images at random and on images of groups that the model hasn't seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# Groups from which on their resampling says how certain a gap is.
MIN_GROUPS = 10
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class FoldResults:
    """Rows that folds have scored: their classes (N,), groups (N,), and whether the prediction is right (N,)."""

    labels: Ids
    groups: Ids
    correct: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class GroupGap:
    """Balanced accuracies from 0 to 1 over the classes that both kinds of folds validate.

    `interval` is the 95 % interval of their difference; None below MIN_GROUPS groups.
    """

    at_random: float
    of_groups: float
    interval: tuple[float, float] | None
    num_groups: int
    num_classes: int

    @property
    def gap(self) -> float:
        """By how much images at random look better."""
        return self.at_random - self.of_groups


def group_gap(at_random: FoldResults, of_groups: FoldResults, *, seed: int = 0) -> GroupGap:
    """The gap between two kinds of folds, with an interval by resampling whole groups, the same on both sides.

    In a resample a class counts where both sides have rows of it.
    """
    sides = [_Cells.of(at_random), _Cells.of(of_groups)]
    groups, num_classes = np.unique(of_groups.groups), max(int(side.labels.max(initial=0)) + 1 for side in sides)
    values, is_in = _balanced(sides, None, num_classes)
    interval = None
    if len(groups) >= MIN_GROUPS:
        rng, size = np.random.default_rng(seed), 1 + max(int(side.groups.max()) for side in sides)
        drawn = (np.bincount(rng.choice(groups, len(groups)), minlength=size) for _ in range(_NUM_RESAMPLES))
        gaps = [value[0] - value[1] for value, _ in (_balanced(sides, times, num_classes) for times in drawn)]
        low, high = np.percentile(gaps, [2.5, 97.5])
        interval = (float(low), float(high))
    return GroupGap(values[0], values[1], interval, len(groups), int(is_in.sum()))


@dataclass(frozen=True)
class _Cells:
    """Rows summed by class and group: how many there are, and how many are right."""

    labels: Ids
    groups: Ids
    total: npt.NDArray[np.float64]
    correct: npt.NDArray[np.float64]

    @staticmethod
    def of(results: FoldResults) -> _Cells:
        pairs, cell = np.unique(np.stack([results.labels, results.groups]), axis=1, return_inverse=True)
        cell = cell.ravel()
        total = np.bincount(cell).astype(np.float64)
        right = np.bincount(cell, weights=results.correct).astype(np.float64)
        return _Cells(pairs[0], pairs[1], total, right)


def _balanced(sides: list[_Cells], times: Ids | None, num_classes: int) -> tuple[list[float], npt.NDArray[np.bool_]]:
    """The mean accuracy of the classes that both sides have, groups counted so many `times`, and those classes."""
    sums = []
    for side in sides:
        weights = np.ones(len(side.groups)) if times is None else times[side.groups].astype(np.float64)
        totals, right = (
            np.bincount(side.labels, weights=weights * values, minlength=num_classes)
            for values in (side.total, side.correct)
        )
        sums.append((totals, right))
    is_in = np.logical_and.reduce([totals > 0 for totals, _ in sums])
    return [float((right[is_in] / totals[is_in]).mean()) if is_in.any() else 0.0 for totals, right in sums], is_in


def worst_groups(of_groups: FoldResults, *, min_images: int = 5, num_worst: int = 10) -> list[tuple[int, int, float]]:
    """The groups with the smallest share of right answers: id, images and share, among those with enough images."""
    ids, index, total = np.unique(of_groups.groups, return_inverse=True, return_counts=True)
    share = np.bincount(index, weights=of_groups.correct) / total
    order = [number for number in np.lexsort((-total, share)) if total[number] >= min_images][:num_worst]
    return [(int(ids[number]), int(total[number]), float(share[number])) for number in order]
