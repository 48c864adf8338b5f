"""Accuracies that may be claimed of what was chosen, and of two predictors on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import Z95
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.group_gap import GroupedRows, few_groups_factor, group_standard_error, resampled_accuracies
from imbvlm.longtail.metrics import balanced_standard_error

NUM_RESAMPLES = 200
# 50 of these resamples lie beyond a percentile of 2.5 %.
NUM_PAIRED_RESAMPLES = 2000
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Claim:
    """A macro accuracy with its standard error, and the classes and images that it rests on.

    The error is class-stratified. Where images have groups it is that of resampled groups, `num_groups` of them; None
    where these are too few.
    """

    value: float
    standard_error: float | None
    num_classes: int
    num_rows: int
    num_groups: int | None = None

    @property
    def half_width(self) -> float:
        """Half-width of the 95 % interval, infinite where it isn't known."""
        return math.inf if self.standard_error is None else Z95 * self.standard_error

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, within 0 and 1."""
        return max(self.value - self.half_width, 0.0), min(self.value + self.half_width, 1.0)


@dataclass(frozen=True)
class PairedDifference:
    """One predictor's macro accuracy minus another's on the same images, with a 95 % interval.

    `num_groups` are those of the images; where they are too few the interval is infinite.
    """

    difference: float
    low: float
    high: float
    num_groups: int | None = None


def claims_of_rows(
    correct: Floats, targets: Tensor, stats: ClassStats, groups: Labels | None = None
) -> dict[str, Claim]:
    """Claims of balanced accuracy and of each shot group's accuracy, for those that have rows.

    `correct` (N,) is that of `out_of_bag_accuracy`, of rows of targets (N,) that may have groups (N,).
    """
    labels = targets.numpy()
    return {
        name: macro_claim(correct[rows], labels[rows], None if groups is None else groups[rows])
        for name, rows in _rows_of_metrics(labels, stats).items()
    }


@dataclass(frozen=True)
class RowOutcomes:
    """Correctness (N,) of rows by models that each were trained on `num_seen` (N,) images of the row's class."""

    correct: Floats
    num_seen: Labels


def corrected_claims(
    claims: Mapping[str, Claim],
    by_folds: RowOutcomes,
    by_pairs: RowOutcomes,
    row_of: Labels,
    targets: Tensor,
    stats: ClassStats,
    groups: Labels | None = None,
) -> dict[str, Claim]:
    """Claims of models that train on all images, from rows of targets (N,) that were scored without their fold.

    `by_pairs` (P,) are the same rows, `row_of` (P,), without their fold and one more. With n images of its own a class
    is taken to have the accuracy A - B / sqrt(n). Where pairs of folds don't tell its B, as for two images, it has that
    of all few-shot classes. The error of the gain widens the intervals; rows with `groups` (N,) have it by groups.
    """
    labels, corrected = targets.numpy(), {}
    gains, steps = _gains_and_steps(by_folds, by_pairs, row_of)
    missing = _root(by_folds.num_seen) - _root(stats.split_counts[labels])
    lends = (steps > 0) & np.isin(labels, stats.few_shot)
    lends = lends if lends.any() else steps > 0
    for name, rows in _rows_of_metrics(labels, stats).items():
        # The mean gain of these classes is a weighted sum of all rows' gains.
        weighted = gains * _gain_weights(labels, steps, np.where(rows, missing, 0.0), lends) / claims[name].num_classes
        value, error = claims[name].value + float(weighted.sum()), claims[name].standard_error
        if error is not None:
            # A class of few rows can't tell how far its gains spread around their mean, so they count in full.
            spread = float(np.linalg.norm(weighted))
            if groups is not None:
                spread = max(spread, float(np.linalg.norm(np.bincount(groups, weights=weighted))))
            error = float(np.hypot(error, spread))
        corrected[name] = replace(claims[name], value=min(max(value, 0.0), 1.0), standard_error=error)
    return corrected


def _gains_and_steps(by_folds: RowOutcomes, by_pairs: RowOutcomes, row_of: Labels) -> tuple[Floats, Floats]:
    """What rows (N,) lose on average with a second fold, and by how much 1 / sqrt(images of their class) rises (N,).

    Models that saw no image of the row's class count for neither.
    """
    has_seen = by_pairs.num_seen > 0
    rows = row_of[has_seen]
    times = np.bincount(rows, minlength=len(by_folds.correct))

    def mean(values: Floats) -> Floats:
        return np.bincount(rows, weights=values[has_seen], minlength=len(times)) / np.maximum(times, 1)

    gains = np.where(times > 0, by_folds.correct - mean(by_pairs.correct), 0.0)
    steps = np.where(times > 0, mean(_root(by_pairs.num_seen)) - _root(by_folds.num_seen), 0.0)
    return gains, steps


def _gain_weights(labels: Labels, steps: Floats, missing: Floats, lends: npt.NDArray[np.bool_]) -> Floats:
    """Weights (N,) under which gains sum to the sum over classes of B times the mean of `missing` (N,)."""
    measured = np.bincount(labels, weights=steps)
    wanted = np.bincount(labels, weights=missing) / np.maximum(np.bincount(labels), 1)
    has_steps = measured > 0
    of_class = np.divide(wanted, measured, out=np.zeros(len(wanted)), where=has_steps)
    borrowed = wanted[~has_steps].sum() / steps[lends].sum() if lends.any() else 0.0
    return of_class[labels] + borrowed * lends


def _root(num_images: Labels) -> Floats:
    return np.maximum(num_images, 1) ** -0.5


def out_of_bag_accuracy(
    choose: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    groups: Labels | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Floats:
    """Share (N,) of the bootstraps without a row whose choice has the row correct (BBC-CV) [Tsamardinos et al. 2018].

    `choose(row_weights)` makes the whole choice on rows with class-balanced weights (N,), and gives which rows (N,) its
    predictor has correct. Each bootstrap chooses on its own rows and is scored on the others. Averages by row give each
    class its weight. Averages by bootstrap would count small classes less, which often have no row outside. A row of a
    class of one is outside as often as any other. Rows of one of the `groups` (N,) are outside together. Raises
    ImbvlmError for fewer than two rows or groups.
    """
    labels = targets.numpy()
    unit = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    num_units = int(unit.max(initial=-1)) + 1
    if num_units < 2:
        noun = "rows" if groups is None else "groups"
        raise ImbvlmError(f"a claim needs 2 validation {noun} or more, got {num_units}. Give more.")
    rng = np.random.default_rng(seed)
    sums, times = np.zeros(len(labels)), np.zeros(len(labels))
    while num_resamples > 0 or not times.all():
        num_resamples -= 1
        counts = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)[unit]
        in_class = np.bincount(labels, weights=counts)
        row_weights = counts / np.maximum(in_class[labels], 1) / (in_class > 0).sum()
        is_out = counts == 0
        sums[is_out] += choose(torch.from_numpy(row_weights)).numpy()[is_out]
        times[is_out] += 1
    return sums / times


def macro_claim(correct: Floats, labels: Labels, groups: Labels | None = None) -> Claim:
    """The mean over classes with rows of their mean correctness (N,) from 0 to 1; rows may have groups (N,).

    Its standard error is that of `balanced_standard_error`, with n - 1 for n, or that of groups.
    """
    totals = np.bincount(labels)
    sums = np.bincount(labels, weights=correct)
    present = totals > 0
    value = float((sums[present] / totals[present]).mean())
    # Models differ between samples as images do. With n - 1 in place of n small classes make room for it.
    error = balanced_standard_error(sums, totals, ddof=1)
    claim = Claim(value=value, standard_error=error, num_classes=int(present.sum()), num_rows=len(labels))
    if groups is None:
        return claim
    rows = GroupedRows(labels, groups, correct)
    return replace(claim, standard_error=group_standard_error(rows, error), num_groups=rows.num_groups)


def _rows_of_metrics(labels: Labels, stats: ClassStats) -> dict[str, npt.NDArray[np.bool_]]:
    """Which rows (N,) balanced accuracy and each shot group's accuracy are of, for those that have rows."""
    groups = {"balanced_accuracy": np.arange(stats.num_classes)}
    groups |= {f"{group}_accuracy": members for group, members in stats.shot_groups.items()}
    rows = {name: np.isin(labels, members) for name, members in groups.items()}
    return {name: is_in for name, is_in in rows.items() if is_in.any()}


def paired_difference(
    ours: npt.ArrayLike,
    theirs: npt.ArrayLike,
    labels: Labels,
    *,
    groups: Labels | None = None,
    num_resamples: int = NUM_PAIRED_RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """The difference in macro accuracy with the interval of a paired bootstrap within classes.

    Correctness (N,) or (seeds, N) of each predictor on the same rows; seeds are averaged inside. The interval of rows
    with `groups` (N,) also holds that of a bootstrap of whole groups. Raises ImbvlmError without rows.
    """
    if not len(labels):
        raise ImbvlmError("a comparison needs rows, got none. Give those that both have scored.")
    gains = _mean_over_seeds(ours) - _mean_over_seeds(theirs)
    totals = np.bincount(labels)
    row_weights = 1 / totals[labels] / (totals > 0).sum()
    difference = float(row_weights @ gains)
    if len(labels) == 1:
        return PairedDifference(difference, -1.0, 1.0, None if groups is None else 1)
    rng = np.random.default_rng(seed)
    resampled = np.full(num_resamples, difference)
    strata = _strata(labels, totals)
    for rows in np.split(np.argsort(strata, kind="stable"), np.cumsum(np.bincount(strata))[:-1]):
        number = len(rows)
        if number == 0:
            continue
        # Few values occur, so that drawing these by their shares is drawing rows.
        values, num_rows = np.unique(gains[rows], return_counts=True)
        # Of n rows a bootstrap's variance has the divisor n; the factor gives it n - 1.
        deviations = (values - gains[rows].mean()) * np.sqrt(number / (number - 1))
        for weight, times in zip(*np.unique(row_weights[rows], return_counts=True), strict=True):
            counts = rng.multinomial(times, num_rows / number, size=num_resamples)
            resampled += weight * (counts @ deviations)
    low, high = np.quantile(resampled, [0.025, 0.975])
    paired = PairedDifference(difference, float(low), float(high))
    return paired if groups is None else _over_groups(paired, GroupedRows(labels, groups, gains), num_resamples, seed)


def _over_groups(paired: PairedDifference, gains: GroupedRows, num_resamples: int, seed: int) -> PairedDifference:
    """The difference with the wider of its interval and that of resampled groups; infinite where these are too few."""
    resampled, number = resampled_accuracies([gains], num_resamples=num_resamples, seed=seed), gains.num_groups
    if resampled is None:
        return replace(paired, low=-math.inf, high=math.inf, num_groups=number)
    deviations = (resampled[:, 0] - resampled.mean()) * few_groups_factor(number)
    low, high = paired.difference + np.quantile(deviations, [0.025, 0.975])
    return replace(paired, low=min(paired.low, float(low)), high=max(paired.high, float(high)), num_groups=number)


def _strata(labels: Labels, totals: npt.NDArray[np.int64]) -> Labels:
    """Each row's class; classes of one row share a stratum, since resampled alone each would seem to be certain.

    The only such class joins the smallest of the others.
    """
    strata = labels.copy()
    is_single = totals[labels] == 1
    if is_single.any():
        others = np.where(totals > 1, totals, totals.max() + 1)
        joins_other = is_single.sum() == 1 and (totals > 1).any()
        strata[is_single] = others.argmin() if joins_other else labels[is_single][0]
    return strata


def _mean_over_seeds(correct: npt.ArrayLike) -> Floats:
    return np.atleast_2d(np.asarray(correct, dtype=np.float64)).mean(axis=0)
