"""Images per class of the training split: priors, imbalance factor, shot groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

MANY_SHOT_ABOVE = 100
MEDIUM_SHOT_FROM = 20
# A class without training images counts as half an image in the prior, so that its logarithm stays finite.
PRIOR_FLOOR = 0.5
SHOT_GROUPS = ("many_shot", "medium_shot", "few_shot", "zero_train")


def _as_counts(values: Sequence[int] | npt.ArrayLike, noun: str) -> Counts:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{noun} must be one number per class, got shape {array.shape}.")
    is_wrong = (array < 0) | (np.mod(array, 1) != 0)
    if is_wrong.any():
        raise ValueError(f"{noun} must be whole numbers from 0 up, got {array[is_wrong][0]}.")
    return array.astype(np.int64)


@dataclass(frozen=True)
class ClassStats:
    """Training images per class (C,): `counts` of the rows trained on, `split_counts` of the official list.

    Shot groups come from `split_counts`; priors, weights and margins from `counts` (docs/protocol.md, Splits, counts,
    selection).
    """

    counts: Counts
    split_counts: Counts

    @staticmethod
    def from_counts(
        class_counts: Sequence[int] | npt.ArrayLike, split_counts: Sequence[int] | npt.ArrayLike | None = None
    ) -> ClassStats:
        """Check the counts; `split_counts` defaults to `class_counts`. Raises ValueError."""
        counts = _as_counts(class_counts, "class_counts")
        official = counts if split_counts is None else _as_counts(split_counts, "split_counts")
        if len(official) != len(counts):
            raise ValueError(f"class_counts has {len(counts)} classes and split_counts has {len(official)}.")
        return ClassStats(counts, official)

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @cached_property
    def imbalance_factor(self) -> float:
        """Largest over smallest count above 0; raises ValueError where every class is empty."""
        present = self.counts[self.counts > 0]
        if present.size == 0:
            raise ValueError("an imbalance factor needs a class with a training image, got none.")
        return float(present.max() / present.min())

    @cached_property
    def many_shot(self) -> npt.NDArray[np.int64]:
        """Ids of the classes with more than 100 images."""
        return np.flatnonzero(self.split_counts > MANY_SHOT_ABOVE)

    @cached_property
    def medium_shot(self) -> npt.NDArray[np.int64]:
        """Ids of the classes with 20 to 100 images."""
        return np.flatnonzero((self.split_counts >= MEDIUM_SHOT_FROM) & (self.split_counts <= MANY_SHOT_ABOVE))

    @cached_property
    def few_shot(self) -> npt.NDArray[np.int64]:
        """Ids of the classes with 1 to 19 images."""
        return np.flatnonzero((self.split_counts >= 1) & (self.split_counts < MEDIUM_SHOT_FROM))

    @cached_property
    def zero_train(self) -> npt.NDArray[np.int64]:
        """Ids of the classes without training images."""
        return np.flatnonzero(self.split_counts == 0)

    @property
    def shot_groups(self) -> dict[str, npt.NDArray[np.int64]]:
        """Class ids of each of SHOT_GROUPS, in their order; a group may be empty."""
        return {group: getattr(self, group) for group in SHOT_GROUPS}

    def group_of(self, label: int) -> str:
        """The shot group of one class."""
        return next(group for group, labels in self.shot_groups.items() if label in labels)

    def describe_groups(self) -> str:
        """Numbers of classes by shot group, such as `1,200 many-shot, 30 few-shot`, without empty groups."""
        return ", ".join(
            f"{len(labels):,} {group.replace('_', '-')}" for group, labels in self.shot_groups.items() if len(labels)
        )
