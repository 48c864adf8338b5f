"""Counts per class: groups from the official list, priors from what is trained on, and no infinities."""

from __future__ import annotations

import numpy as np
import pytest

from imbvlm.longtail.class_stats import SHOT_GROUPS, ClassStats


def test_shot_groups_end_where_the_protocol_says() -> None:
    stats = ClassStats.from_counts([101, 100, 20, 19, 1, 0, 5000])
    assert stats.many_shot.tolist() == [0, 6]
    assert stats.medium_shot.tolist() == [1, 2]
    assert stats.few_shot.tolist() == [3, 4]
    assert stats.zero_train.tolist() == [5]
    assert [stats.group_of(label) for label in range(6)] == [
        "many_shot",
        "medium_shot",
        "medium_shot",
        "few_shot",
        "few_shot",
        "zero_train",
    ]


@pytest.mark.parametrize("seed", range(3))
def test_every_class_is_in_one_group(seed: int) -> None:
    stats = ClassStats.from_counts(np.random.default_rng(seed).integers(0, 200, 500))
    members = np.concatenate([getattr(stats, group) for group in SHOT_GROUPS])
    assert sorted(members.tolist()) == list(range(500))


def test_groups_are_of_the_official_list_and_the_factor_of_what_is_trained_on() -> None:
    stats = ClassStats.from_counts([98, 20], split_counts=[101, 23])
    assert stats.many_shot.tolist() == [0]
    assert stats.medium_shot.tolist() == [1]
    assert stats.imbalance_factor == 98 / 20


def test_an_empty_class_has_no_part_in_the_factor() -> None:
    stats = ClassStats.from_counts([4, 0, 2])
    assert stats.imbalance_factor == 2.0
    assert stats.counts.tolist() == [4, 0, 2]


def test_no_image_at_all_has_no_imbalance_factor() -> None:
    with pytest.raises(ValueError, match="needs a class with a training image"):
        _ = ClassStats.from_counts([0, 0]).imbalance_factor


@pytest.mark.parametrize(
    ("counts", "split_counts", "says"),
    [
        ([], None, r"class_counts must be one number per class, got shape \(0,\)"),
        ([[1, 2]], None, r"got shape \(1, 2\)"),
        ([1, -2], None, "whole numbers from 0 up, got -2"),
        ([1, 2.5], None, "whole numbers from 0 up, got 2.5"),
        ([1, float("nan")], None, "whole numbers from 0 up, got nan"),
        ([1, 2], [1], "class_counts has 2 classes and split_counts has 1"),
        ([1, 2], [1, -1], "split_counts must be whole numbers"),
    ],
)
def test_wrong_counts_are_named(counts: list[float], split_counts: list[int] | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ClassStats.from_counts(counts, split_counts)
