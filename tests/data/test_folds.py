"""Folds: who validates what, copies that stay together, and classes too small to be validated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.folds import Folds, deal_folds, deal_units, fold_pairs
from imbvlm.data.manifest import LabelRows, Manifest
from imbvlm.data.manifest_schema import SPLITS

COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=20)


def label_rows(
    labels: Sequence[int],
    copies: Sequence[int] | None = None,
    split: str = "train",
    groups: Sequence[int] | None = None,
) -> LabelRows:
    array = np.array(labels, dtype=np.int64)
    num_classes = int(array.max(initial=0)) + 1
    return LabelRows(
        labels=array,
        split_codes=np.full(len(array), SPLITS.index(split), dtype=np.int8),
        copies=np.arange(len(array)) if copies is None else np.array(copies, dtype=np.int64),
        groups=None if groups is None else np.array(groups, dtype=np.int64),
        class_names=tuple(f"class {label}" for label in range(num_classes)),
        split_counts=np.bincount(array, minlength=num_classes),
    )


def of_counts(counts: Sequence[int]) -> LabelRows:
    return label_rows(np.repeat(np.arange(len(counts)), counts).tolist())


def as_lists(folds: Folds) -> list[tuple[list[int], list[int]]]:
    return [(fold.train.tolist(), fold.val.tolist()) for fold in folds.folds]


@given(COUNTS, st.integers(2, 8), st.integers(0, 5))
def test_every_image_of_a_class_of_two_is_validated_once_and_no_other(
    counts: list[int], num_folds: int, seed: int
) -> None:
    rows = of_counts(counts)
    folds = deal_folds(rows, num_folds, seed)
    large = [label for label, number in enumerate(counts) if number > 1]
    assert np.unique(rows.labels[folds.val_rows]).tolist() == large
    assert sorted(folds.val_rows.tolist()) == np.flatnonzero(np.isin(rows.labels, large)).tolist()
    for fold in folds.folds:
        assert len(fold.val) > 0
        assert sorted([*fold.train, *fold.val]) == list(range(len(rows.labels)))
        assert (np.diff(fold.train) > 0).all()
        assert (np.diff(fold.val) > 0).all()
        # Every class that has images is trained on in every fold.
        assert set(rows.labels[fold.train]) == set(rows.labels)


@given(COUNTS, st.integers(2, 8), st.integers(0, 5))
def test_folds_have_equal_shares_of_each_class_and_of_all(counts: list[int], num_folds: int, seed: int) -> None:
    rows = of_counts(counts)
    folds = deal_folds(rows, num_folds, seed)
    sizes = [np.bincount(rows.labels[fold.val], minlength=len(counts)) for fold in folds.folds]
    sizes += [np.zeros(len(counts), dtype=int)] * (num_folds - len(sizes))
    assert np.ptp(sizes, axis=0).max() <= 1
    assert np.ptp(np.sum(sizes, axis=1)) <= 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=40), st.integers(2, 6))
def test_copies_stay_together_whatever_their_classes(pairs: list[tuple[int, int]], num_folds: int) -> None:
    labels, copies = [label for label, _ in pairs], [image for _, image in pairs]
    rows = label_rows(labels, copies)
    folds = deal_folds(rows, num_folds, 0)
    of_group = {image: {label for label, other in pairs if other == image} for image in copies}
    own = [next(iter(classes)) for classes in of_group.values() if len(classes) == 1]
    large = {label for label in own if own.count(label) > 1}
    for fold in folds.folds:
        assert {copies[row] for row in fold.train}.isdisjoint({copies[row] for row in fold.val})
    # Copies with two labels say nothing about a model, and a class of copies of one image can't be validated.
    expected = [row for row, (_, group) in enumerate(pairs) if len(of_group[group]) == 1 and of_group[group] <= large]
    assert sorted(folds.val_rows.tolist()) == expected


def test_each_pair_of_folds_is_held_out_together() -> None:
    folds = deal_folds(of_counts([9, 4, 2, 1]), 4, 0)
    pairs = fold_pairs(folds)
    assert len(pairs) == 6
    for pair in pairs:
        assert sorted([*pair.train, *pair.val]) == list(range(16))
        assert sum(set(fold.val) <= set(pair.val) for fold in folds.folds) == 2
    times = np.bincount(np.concatenate([pair.val for pair in pairs]), minlength=16)
    assert times.tolist() == [3] * 15 + [0]


def test_folds_depend_on_the_seed_and_on_nothing_else() -> None:
    rows = of_counts([30, 9, 4])
    assert as_lists(deal_folds(rows, 5, 3)) == as_lists(deal_folds(rows, 5, 3))
    assert as_lists(deal_folds(rows, 5, 3)) != as_lists(deal_folds(rows, 5, 4))


def test_only_training_rows_are_divided() -> None:
    contents = pa.array([bytes([row]) for row in range(12)])
    splits = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    made = Manifest.build(
        pa.table({"bytes": contents, "label": pa.array([0, 0, 0, 1, 1, 1] * 2), "split": splits}), ["a", "b"], "made"
    )
    folds = deal_folds(made.label_rows(), 3, 0)
    assert sorted(folds.val_rows.tolist()) == list(range(6))
    assert all(fold.train.max() < 6 for fold in folds.folds)


def test_nothing_to_divide_gives_no_fold() -> None:
    folds = deal_folds(label_rows([0, 1, 2]), 5, 0)
    assert folds.folds == ()
    assert len(folds.val_rows) == 0
    assert deal_folds(label_rows([0, 0], split="val"), 5, 0).folds == ()


def test_one_fold_is_refused() -> None:
    with pytest.raises(ImbvlmError, match="folds must be 2 or more, got 1"):
        deal_folds(of_counts([4]), 1, 0)


def test_parts_of_many_classes_of_one_image_have_equal_sizes() -> None:
    labels = np.arange(50)
    assert np.bincount(deal_units(labels, labels, 10, 0)).tolist() == [5] * 10
