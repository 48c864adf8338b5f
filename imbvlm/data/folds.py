"""Folds of the training images, by which models are scored on images that they never saw."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.groups import deal_groups
from imbvlm.data.manifest import LabelRows
from imbvlm.data.manifest_schema import Rows, seeded


@dataclass(frozen=True)
class Fold:
    """Manifest row numbers that a fold's models train on, and those that validate them, in manifest order."""

    train: Rows
    val: Rows


@dataclass(frozen=True)
class Folds:
    """The folds that have validation rows."""

    folds: tuple[Fold, ...]

    @property
    def val_rows(self) -> Rows:
        """Manifest row numbers of all validation rows, fold after fold."""
        return np.concatenate([fold.val for fold in self.folds]) if self.folds else np.empty(0, dtype=np.int64)


def fold_pairs(folds: Folds) -> tuple[Fold, ...]:
    """A fold for each two of the folds, whose models see neither: how accuracy grows with the training images."""
    return tuple(
        Fold(np.intersect1d(first.train, second.train), np.union1d(first.val, second.val))
        for first, second in combinations(folds.folds, 2)
    )


def deal_folds(rows: LabelRows, num_folds: int, seed: int, *, at_random: bool = False) -> Folds:
    """Divide the training rows into folds by class (docs/protocol.md, Splits, counts, selection).

    Copies of an image are one unit. A class with two or more units is validated once, each unit by models that never
    saw it. A class with one unit, and copies that several classes share, are trained on in every fold. Where the
    manifest has groups, they are the units, and one that holds all images of a class is trained on in every fold.
    `at_random` then divides groups: each fold has as many images of each class as with whole groups, at random. Raises
    ImbvlmError for fewer than two folds.
    """
    if num_folds < 2:
        raise ImbvlmError(f"folds must be 2 or more, got {num_folds}. A model that saw all images can't be scored.")
    train = rows.rows_of("train")
    labels, copies = rows.labels[train], rows.copies[train]
    _, first, unit = np.unique(copies, return_index=True, return_inverse=True)
    unit_labels = labels[first]
    is_shared = np.zeros(len(first), dtype=np.bool_)
    is_shared[unit[labels != unit_labels[unit]]] = True
    num_units = np.bincount(unit_labels[~is_shared], minlength=len(rows.class_names))
    if rows.groups is not None:
        parts = deal_groups(labels, rows.groups[train], [1 / num_folds] * num_folds, seed)
        if at_random:
            # Copies follow the first of them.
            parts = _shuffle_in_class(parts[first], unit_labels, seed)[unit]
        can_validate = ~is_shared[unit]
    else:
        can_validate = (~is_shared & (num_units[unit_labels] > 1))[unit]
        parts = np.full(len(train), -1)
        parts[can_validate] = deal_units(labels[can_validate], copies[can_validate], num_folds, seed)
    folds = [Fold(train[parts != part], train[(parts == part) & can_validate]) for part in range(num_folds)]
    return Folds(tuple(fold for fold in folds if len(fold.val)))


def _shuffle_in_class(parts: Rows, labels: Rows, seed: int) -> Rows:
    """The parts (N,) of rows, exchanged at random between the rows of each class."""
    shuffled = np.empty_like(parts)
    shuffled[np.argsort(labels, kind="stable")] = parts[np.lexsort((seeded(seed).random(len(labels)), labels))]
    return shuffled


def deal_units(labels: Rows, groups: Rows, num_parts: int, seed: int) -> Rows:
    """The part (N,) of each row: a class's groups in random order, one to each part in turn.

    Each class goes on where the class before it stopped, so that parts of many small classes have equal sizes.
    """
    _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
    order = np.lexsort((seeded(seed).random(len(first)), labels[first]))
    parts = np.empty(len(first), dtype=np.int64)
    parts[order] = np.arange(len(first)) % num_parts
    return parts[unit]
