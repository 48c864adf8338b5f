"""Sets of classes that have an image's own among them as often as promised: conformal prediction for long tails.

From MIN_ROWS rows on a class has a threshold and a promise of its own [Vovk 2012]. Classes with fewer share scores that
are divided by each class's prevalence, and their thresholds lie between that of all of them and the class's own [Ding,
Fermanian and Salmon 2025, prevalence-adjusted softmax and INTERP-Q].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.decisions.scored_rows import Floats, ScoredRows

MIN_ROWS = 19
# How far a threshold of shared scores moves towards the class's own.
INTERPOLATION = 0.5


@dataclass(frozen=True)
class PredictionSets:
    """The lowest probability (C,) with which each class is in a set, for a coverage.

    `has_own` (C,) tells for which classes the coverage is promised one by one; for the others it is together.
    """

    coverage: float
    lowest: Floats
    has_own: npt.NDArray[np.bool_]

    def members(self, probabilities: Floats) -> npt.NDArray[np.bool_]:
        """Which classes (N, C) are in the set of each row of probabilities (N, C); the most probable one always is."""
        is_in = probabilities >= self.lowest
        is_in[np.arange(len(is_in)), probabilities.argmax(axis=1)] = True
        return is_in

    def covers(self, rows: ScoredRows) -> npt.NDArray[np.bool_]:
        """Which rows (N,) have their label in their set."""
        return rows.is_right | (rows.label_probability >= self.lowest[rows.labels])


def learn_sets(rows: ScoredRows, coverage: float, shares: Floats | None = None) -> PredictionSets:
    """The thresholds of sets that have a share `coverage` of images' classes among them, for images as the rows.

    `shares` (C,) is another prevalence of the classes, under which those with few rows are pooled. Raises ImbvlmError
    for a coverage that isn't between 0 and 1.
    """
    if not 0 < coverage < 1:
        raise ImbvlmError(f"the coverage of sets must be between 0 and 1, got {coverage:g}. Give one such as 0.9.")
    counts = rows.counts
    has_own = (counts >= MIN_ROWS) & (_rank(counts, coverage) <= counts)
    of_class = np.split(rows.label_probability[np.argsort(rows.labels, kind="stable")], np.cumsum(counts)[:-1])
    lowest = np.array([_quantile(values, coverage) for values in of_class])
    if not has_own.all():
        # A class that is never probable needs some prevalence.
        prevalence = np.maximum(rows.mean_probabilities, np.finfo(np.float32).tiny)
        thin = rows.subset(~has_own[rows.labels])
        if shares is not None and len(thin) and shares[thin.labels].any():
            thin = thin.at_prevalence(np.where(has_own, 0, shares))
        shared = _quantile(thin.label_probability / prevalence[thin.labels], coverage)
        between = (1 - INTERPOLATION) * shared + INTERPOLATION * lowest / prevalence
        # A higher threshold than that of all would take from the coverage that all are promised.
        # Divided and multiplied again, the score of the row at the threshold may be below it by a rounding.
        lowest = np.where(has_own, lowest, np.minimum(shared, between) * prevalence * (1 - 1e-12))
    return PredictionSets(coverage, lowest, has_own)


def _rank(count: npt.ArrayLike, coverage: float) -> npt.NDArray[np.float64]:
    """The rank, the highest score first, that a share of new rows reaches; above the count where none does."""
    # The product is a hair above a whole number for some coverages, such as 0.95 of 20.
    return np.ceil((np.asarray(count) + 1) * coverage - 1e-9)


def _quantile(values: Floats, coverage: float) -> float:
    """The score (of N) that the label of a new row reaches as often as promised; 0 where too few can tell."""
    rank = int(_rank(len(values), coverage))
    return 0.0 if rank > len(values) else float(np.sort(values)[len(values) - rank])
