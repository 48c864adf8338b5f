"""Accuracies of images in groups: how sure they are, and the gap between images at random and unseen groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imbvlm.base.formatting import pluralize

Ids = npt.NDArray[np.int64]

# Groups from which on their resampling says how certain a gap is.
MIN_GROUPS = 10
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class GroupedRows:
    """Rows that were scored: their classes (N,), groups (N,), and whether or how often the prediction is right (N,)."""

    labels: Ids
    groups: Ids
    correct: npt.NDArray[np.bool_ | np.float64]

    @property
    def num_groups(self) -> int:
        """How many groups have rows."""
        return len(np.unique(self.groups))

    def of_classes(self, classes: Ids, *, joined: bool = False) -> GroupedRows:
        """The rows of some classes, which count as a single class where they are `joined`."""
        keep = np.isin(self.labels, classes)
        labels = self.labels[keep] * (not joined)
        return GroupedRows(labels, self.groups[keep], self.correct[keep])


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


def group_gap(at_random: GroupedRows, of_groups: GroupedRows, *, seed: int = 0) -> GroupGap:
    """The gap between two kinds of folds, with an interval by resampling whole groups, the same on both sides.

    In a resample a class counts where both sides have rows of it.
    """
    sides = [at_random, of_groups]
    values, is_in = _balanced([_Cells.of(side) for side in sides], None)
    resampled, interval = resampled_accuracies(sides, seed=seed), None
    if resampled is not None:
        low, high = np.percentile(resampled[:, 0] - resampled[:, 1], [2.5, 97.5])
        interval = (float(low), float(high))
    return GroupGap(values[0], values[1], interval, of_groups.num_groups, int(is_in.sum()))


def resampled_accuracies(
    sides: Sequence[GroupedRows], *, num_resamples: int = _NUM_RESAMPLES, seed: int = 0
) -> npt.NDArray[np.float64] | None:
    """The sides' macro accuracies (R, S) in resamples of whole groups, those of the last side; None below MIN_GROUPS.

    In a resample a class counts where all sides have rows of it.
    """
    cells, groups = [_Cells.of(side) for side in sides], np.unique(sides[-1].groups)
    if len(groups) < MIN_GROUPS:
        return None
    rng, size = np.random.default_rng(seed), 1 + max(int(side.groups.max()) for side in cells)
    drawn = (np.bincount(rng.choice(groups, len(groups)), minlength=size) for _ in range(num_resamples))
    return np.array([_balanced(cells, times)[0] for times in drawn])


def group_standard_error(rows: GroupedRows, independent: float) -> float | None:
    """The standard error of a macro accuracy over resamples of whole groups; None below MIN_GROUPS groups.

    It is at least that of `independent` rows: rows of one group, or a class that is right throughout, have no spread.
    """
    resampled = resampled_accuracies([rows])
    if resampled is None:
        return None
    return max(independent, float(resampled.std() * few_groups_factor(rows.num_groups)))


def few_groups_factor(num_groups: int) -> float:
    """By how much deviations of a bootstrap over groups are widened.

    Its variance has the divisor n in place of n - 1, and Student's t has a variance of (n - 1) / (n - 3).
    """
    return math.sqrt(num_groups / (num_groups - 3))


@dataclass(frozen=True)
class _Cells:
    """Rows summed by class and group: how many there are, and how many are right."""

    labels: Ids
    groups: Ids
    total: npt.NDArray[np.float64]
    correct: npt.NDArray[np.float64]

    @staticmethod
    def of(results: GroupedRows) -> _Cells:
        pairs, cell = np.unique(np.stack([results.labels, results.groups]), axis=1, return_inverse=True)
        cell = cell.ravel()
        total = np.bincount(cell).astype(np.float64)
        right = np.bincount(cell, weights=results.correct).astype(np.float64)
        return _Cells(pairs[0], pairs[1], total, right)


def _balanced(sides: Sequence[_Cells], times: Ids | None) -> tuple[list[float], npt.NDArray[np.bool_]]:
    """The mean accuracy of the classes that all sides have, groups counted so many `times`, and those classes."""
    sums, num_classes = [], max(int(side.labels.max(initial=0)) + 1 for side in sides)
    for side in sides:
        weights = np.ones(len(side.groups)) if times is None else times[side.groups].astype(np.float64)
        totals, right = (
            np.bincount(side.labels, weights=weights * values, minlength=num_classes)
            for values in (side.total, side.correct)
        )
        sums.append((totals, right))
    is_in = np.logical_and.reduce([totals > 0 for totals, _ in sums])
    return [float((right[is_in] / totals[is_in]).mean()) if is_in.any() else 0.0 for totals, right in sums], is_in


def worst_groups(of_groups: GroupedRows, *, min_images: int = 5, num_worst: int = 10) -> list[tuple[int, int, float]]:
    """The groups with the smallest share of right answers: id, images and share, among those with enough images."""
    ids, index, total = np.unique(of_groups.groups, return_inverse=True, return_counts=True)
    share = np.bincount(index, weights=of_groups.correct) / total
    order = [number for number in np.lexsort((-total, share)) if total[number] >= min_images][:num_worst]
    return [(int(ids[number]), int(total[number]), float(share[number])) for number in order]


def group_note(num_groups: int | None) -> str:
    """The groups that an interval resamples, or why there is none, beside a number; empty without groups."""
    if num_groups is None:
        return ""
    groups = pluralize(num_groups, "group")
    return f"{groups} resampled" if num_groups >= MIN_GROUPS else f"{groups} are too few for one, it takes {MIN_GROUPS}"
