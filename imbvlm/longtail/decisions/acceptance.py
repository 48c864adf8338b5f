"""Which predictions may be accepted unseen: for each predicted class a probability from which on a share is right.

Thresholds are fixed by numbers of accepted rows before labels are seen, and tested from the strictest on until the
first test fails [Angelopoulos et al. 2021, Learn then Test, fixed-sequence testing].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.decisions.scored_rows import Floats, Ids, ScoredRows
from imbvlm.longtail.roll_up import is_shown, lowest_threshold, rows_needed, strictest_count


@dataclass(frozen=True)
class Promise:
    """The threshold above which predictions of some classes are accepted; infinite where nothing is promised.

    The classes are one, or those of a shot `group` that have too few rows each: then the promise is for them together.
    It is learned on `num_rows` rows. `num_missing` more, all right, would give a promise.
    """

    labels: tuple[int, ...]
    group: str | None
    threshold: float
    num_rows: int
    num_missing: int

    @property
    def is_given(self) -> bool:
        """Whether there is a threshold."""
        return self.threshold < math.inf


@dataclass(frozen=True)
class Acceptance:
    """The promises of all classes for a precision; each class belongs to one."""

    precision: float
    promises: tuple[Promise, ...]
    num_classes: int

    @property
    def promise_of(self) -> list[Promise]:
        """The promise of each class."""
        return [promise for _, promise in sorted((label, own) for own in self.promises for label in own.labels)]

    @property
    def thresholds(self) -> Floats:
        """The threshold of each predicted class (C,)."""
        return np.array([promise.threshold for promise in self.promise_of])

    def accepts(self, predicted: Ids, confidence: Floats) -> npt.NDArray[np.bool_]:
        """Which predictions (N,) are accepted, by classes (N,) and probabilities (N,)."""
        return confidence > self.thresholds[predicted]


def learn_acceptance(rows: ScoredRows, precision: float) -> Acceptance:
    """The lowest thresholds above which at least a share `precision` of a class's predictions is right.

    Each promise holds at 95 % for images that come as the rows. A class that is predicted for too few rows is pooled
    with those of its shot group. Raises ImbvlmError for a precision that isn't between 0 and 1.
    """
    if not 0 < precision < 1:
        raise ImbvlmError(f"the share to accept must be between 0 and 1, got {precision:g}. Give one such as 0.95.")
    order = np.argsort(rows.predicted, kind="stable")
    num_predicted = np.bincount(rows.predicted, minlength=rows.stats.num_classes)
    of_class = np.split(order, np.cumsum(num_predicted)[:-1])
    has_own = num_predicted >= rows_needed(precision)
    promises = [_promise(rows, [label], None, of_class, precision) for label in np.flatnonzero(has_own).tolist()]
    for group, labels in rows.stats.shot_groups.items():
        thin = [label for label in labels.tolist() if not has_own[label]]
        promises += [_promise(rows, thin, group, of_class, precision)] if thin else []
    return Acceptance(precision, tuple(promises), rows.stats.num_classes)


def _promise(
    rows: ScoredRows, labels: Sequence[int], group: str | None, of_class: Sequence[Ids], precision: float
) -> Promise:
    own = np.concatenate([of_class[label] for label in labels])
    values, is_right = rows.confidence[own], rows.is_right[own]
    threshold, num_missing = lowest_threshold(values, is_right, precision), 0
    if threshold == math.inf:
        strictest = np.argsort(-values, kind="stable")[: strictest_count(len(values), precision)]
        num_missing = rows_missing(int(is_right[strictest].sum()), len(strictest), precision)
    return Promise(tuple(labels), group, threshold, len(own), num_missing)


def rows_missing(num_right: int, num_rows: int, precision: float) -> int:
    """The fewest further rows, all right, with which the rows show a precision; at least 1."""
    high = 1
    while not is_shown(num_right + high, num_rows + high, precision):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_shown(num_right + middle, num_rows + middle, precision) else (middle, high)
    return high
