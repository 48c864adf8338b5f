"""Predictions at the lowest rank of a taxonomy that is sure enough: thresholds that hold a precision at each rank.

A threshold of a rank is learned on the rows that no lower rank has named. It is the lowest of a few that are fixed
before labels are seen, tested from the strictest on until the first test fails [Angelopoulos et al. 2021, Learn then
Test, fixed-sequence testing].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.post_hoc_adjustment import CHUNK_SIZE
from imbvlm.longtail.taxonomy import Rows, Taxonomy

Floats = npt.NDArray[np.float64]

# Probability with which the promise of each rank holds.
CONFIDENCE = 0.95
# Thresholds that are tested for a rank, and the share of its rows above the strictest. An error among few rows would
# end the sequence at its start.
NUM_THRESHOLDS, STRICTEST_SHARE = 20, 0.25


@dataclass(frozen=True)
class RankScores:
    """Scores of N rows that a model has not trained on, by rank, the highest first.

    `probabilities` (N, R) are those of the most probable taxon of each rank, and `is_right` (N, R) says whether it is
    the row's own.
    """

    probabilities: Floats
    is_right: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.probabilities)

    @staticmethod
    def from_logits(taxonomy: Taxonomy, logits: Tensor, labels: Tensor) -> RankScores:
        """The scores of logits (N, C) and labels (N,), without rows that have a NaN, which are unreadable images."""
        shape = (0, len(taxonomy.ranks))
        probabilities, is_right = [np.empty(shape)], [np.empty(shape, dtype=np.bool_)]
        for rows in torch.split(torch.nonzero(~logits.isnan().any(dim=1)).flatten(), CHUNK_SIZE):
            taxa, values = best_taxa(taxonomy, logits[rows].double().softmax(dim=1).numpy())
            probabilities.append(values)
            is_right.append(taxa == taxonomy.codes[:, labels[rows].numpy()].T)
        return RankScores(np.concatenate(probabilities), np.concatenate(is_right))


def best_taxa(taxonomy: Taxonomy, probabilities: Floats) -> tuple[Rows, Floats]:
    """The most probable taxon of each rank (N, R) and its probability (N, R), of probabilities (N, C) of classes."""
    taxa, values = [], []
    for codes in taxonomy.codes:
        order = np.argsort(codes, kind="stable")
        sums = np.add.reduceat(probabilities[:, order], np.flatnonzero(np.diff(codes[order], prepend=-1)), axis=1)
        taxa.append(sums.argmax(axis=1))
        values.append(sums.max(axis=1))
    return np.stack(taxa, axis=1), np.stack(values, axis=1)


@dataclass(frozen=True)
class RollUp:
    """The thresholds of all ranks, the highest first, for a precision; infinite where nothing is promised.

    A row is named at the lowest rank whose probability is above the rank's threshold.
    """

    precision: float
    thresholds: tuple[float, ...]

    def ranks(self, probabilities: Floats) -> Rows:
        """The rank (N,) at which each row is named, of probabilities (N, R); -1 for none."""
        passes = probabilities > np.array(self.thresholds)
        lowest = passes.shape[1] - 1 - passes[:, ::-1].argmax(axis=1)
        return np.where(passes.any(axis=1), lowest, -1)

    def counts(self, scores: RankScores) -> tuple[list[int], list[int]]:
        """Numbers of rows that are named at each rank, and of those that are named rightly."""
        ranks, num_ranks = self.ranks(scores.probabilities), len(self.thresholds)
        is_named = ranks >= 0
        is_right = is_named & scores.is_right[np.arange(len(ranks)), ranks]
        named, right = (np.bincount(ranks[rows], minlength=num_ranks).tolist() for rows in (is_named, is_right))
        return named, right


def learn_roll_up(taxonomy: Taxonomy, scores: RankScores, precision: float) -> RollUp:
    """The lowest thresholds with which at least a share `precision` of what is named at a rank is right.

    Each rank's promise holds at CONFIDENCE for images that come as these rows. A rank with a single taxon says nothing.
    Raises ImbvlmError for a precision that isn't between 0 and 1, or that no rank can promise.
    """
    if not 0 < precision < 1:
        raise ImbvlmError(
            f"the precision of a roll-up must be between 0 and 1, got {precision:g}. Give a share such as 0.95."
        )
    thresholds, rest = [math.inf] * len(taxonomy.ranks), np.ones(len(scores), dtype=np.bool_)
    for rank in reversed(range(len(thresholds))):
        values = scores.probabilities[:, rank]
        if taxonomy.codes[rank].any():
            thresholds[rank] = lowest_threshold(values[rest], scores.is_right[rest, rank], precision)
        rest &= values <= thresholds[rank]
    if min(thresholds) == math.inf:
        needed = rows_needed(precision)
        cause = "too many of the surest are wrong"
        if len(scores) < needed:
            cause = f"that takes {needed} validation images that are all right, and there are {len(scores)}"
        raise ImbvlmError(f"no rank can promise a precision of {precision:g}: {cause}. Give a lower one.")
    return RollUp(precision, tuple(thresholds))


def lowest_threshold(values: Floats, is_right: npt.NDArray[np.bool_], precision: float) -> float:
    """The lowest tested threshold above which a share of rows (N,) is right; infinite for none.

    The threshold of k rows is the value of the next one, which it leaves out: the k rows are then a sample of all that
    is above it.
    """
    threshold, needed = math.inf, rows_needed(precision)
    if len(values) < needed:
        return threshold
    order = np.argsort(-values, kind="stable")
    ranked, num_right = np.append(values[order], -math.inf), np.cumsum(is_right[order])
    first = strictest_count(len(values), precision)
    for count in np.unique(np.linspace(first, len(values), NUM_THRESHOLDS).round().astype(np.int64)).tolist():
        above = int(np.searchsorted(-ranked, -ranked[count], side="left"))
        # With equal values fewer rows are above, too few for any test.
        if above < needed:
            continue
        if not is_shown(int(num_right[above - 1]), above, precision):
            break
        threshold = float(ranked[count])
    return threshold


def strictest_count(num_rows: int, precision: float) -> int:
    """The number of rows, of so many, above the strictest threshold that is tested."""
    return min(num_rows, max(rows_needed(precision), math.ceil(STRICTEST_SHARE * num_rows)))


def rows_needed(share: float) -> int:
    """The fewest rows that show a share where none is wrong: 59 for 0.95, 29 for 0.9."""
    return math.ceil(math.log1p(-CONFIDENCE) / math.log(share))


def is_broken(num_right: int, num_rows: int, share: float) -> bool:
    """Whether rows show at CONFIDENCE that less than a `share` of all are right."""
    return num_rows > 0 and is_shown(num_rows - num_right, num_rows, 1 - share)


def is_shown(num_right: int, num_rows: int, share: float) -> bool:
    """Whether rows show at CONFIDENCE that at least a `share` of all are right: P(Bin(n, share) >= k) <= 0.05.

    That is so where the lower bound of Clopper and Pearson [1934] is at least `share`.
    """
    wrong = np.arange(num_rows - num_right + 1)
    steps = np.log(num_rows - wrong[:-1]) - np.log(wrong[1:]) + math.log1p(-share) - math.log(share)
    terms = num_rows * math.log(share) + np.concatenate([[0.0], np.cumsum(steps)])
    return float(np.logaddexp.reduce(terms)) <= math.log1p(-CONFIDENCE)
