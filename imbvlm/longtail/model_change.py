"""What changes from one model to a later one on the same images: accuracies with paired intervals, and each class."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imbvlm.longtail.claims import Labels, paired_difference

Correct = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class AccuracyChange:
    """A macro accuracy before and after, from 0 to 1, and the 95 % interval of the difference; None if unknown.

    `num_groups` are the groups of images that the interval resamples; None where images have none.
    """

    before: float
    after: float
    interval: tuple[float, float] | None
    num_classes: int
    num_images: int
    num_groups: int | None = None

    @property
    def difference(self) -> float:
        """The accuracy after minus that before."""
        return self.after - self.before


@dataclass(frozen=True)
class ClassChange:
    """A class's images, those that are right before and after, and those that became right or wrong."""

    label: int
    num_images: int
    num_before: int
    num_after: int
    num_gained: int
    num_lost: int

    @property
    def evidence(self) -> float:
        """The net number of images that changed over its standard deviation by chance [McNemar 1947]."""
        num_changed = self.num_gained + self.num_lost
        return (self.num_gained - self.num_lost) / math.sqrt(num_changed) if num_changed else 0.0


def join_classes(earlier: Sequence[str], later: Sequence[str]) -> Labels:
    """The later label of each earlier class (C,) by its name, -1 for a class that is gone.

    The first of several classes of one name joins the first, the second the second.
    """
    label_of = {key: label for label, key in enumerate(_numbered(later))}
    return np.array([label_of.get(key, -1) for key in _numbered(earlier)], dtype=np.int64)


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    seen, numbered = Counter[str](), []
    for name in names:
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered


def accuracy_changes(
    before: Correct, after: Correct, labels: Labels, classes: Mapping[str, Labels], groups: Labels | None = None
) -> dict[str, AccuracyChange]:
    """The change in macro accuracy over each set of `classes` that has images.

    Correctness (N,) of both models on the same images of labels (N,), whose `groups` (N,) are resampled as wholes.
    """
    changes = {}
    for name, members in classes.items():
        rows = np.isin(labels, members)
        if not rows.any():
            continue
        own = labels[rows]
        paired = paired_difference(after[rows], before[rows], own, groups=None if groups is None else groups[rows])
        changes[name] = AccuracyChange(
            _macro_accuracy(before[rows], own),
            _macro_accuracy(after[rows], own),
            (paired.low, paired.high) if math.isfinite(paired.low) else None,
            len(np.unique(own)),
            len(own),
            paired.num_groups,
        )
    return changes


def _macro_accuracy(correct: Correct, labels: Labels) -> float:
    return float((correct / np.bincount(labels)[labels]).sum() / len(np.unique(labels)))


def class_changes(before: Correct, after: Correct, labels: Labels) -> list[ClassChange]:
    """The change of each class with images, the clearest first: what chance explains least."""
    masks = (np.ones_like(before), before, after, after & ~before, before & ~after)
    counts = np.stack([np.bincount(labels[mask], minlength=labels.max(initial=-1) + 1) for mask in masks], axis=1)
    changes = [ClassChange(label, *numbers) for label, numbers in enumerate(counts.tolist()) if numbers[0]]
    return sorted(changes, key=lambda change: (-abs(change.evidence), change.label))
