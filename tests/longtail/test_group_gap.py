"""The gap to unseen groups: what it is by hand, and an interval that knows how few groups there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.longtail.group_gap import GroupedRows, GroupGap, group_gap, worst_groups


def results(labels: list[int], groups: list[int], correct: list[bool]) -> GroupedRows:
    return GroupedRows(np.array(labels, np.int64), np.array(groups, np.int64), np.array(correct))


def test_the_gap_is_that_of_balanced_accuracies_over_the_classes_of_both() -> None:
    at_random = results([0, 0, 1, 2], [0, 1, 0, 1], [True, True, False, True])
    of_groups = results([0, 0, 0, 1], [0, 1, 1, 0], [True, False, False, False])
    # Class 2 is validated on one side alone.
    assert group_gap(at_random, of_groups) == GroupGap(0.5, 1 / 6, None, 2, 2)
    assert group_gap(at_random, of_groups).gap == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.booleans(), st.booleans()), min_size=1, max_size=60)
)
def test_the_interval_holds_the_gap_where_groups_are_many(rows: list[tuple[int, int, bool, bool]]) -> None:
    labels, groups, first, second = (list(column) for column in zip(*rows, strict=True))
    gap = group_gap(results(labels, groups, first), results(labels, groups, second))
    accuracies = [
        np.mean(
            [np.mean([hit for hit, own in zip(side, labels, strict=True) if own == label]) for label in set(labels)]
        )
        for side in (first, second)
    ]
    assert gap.gap == pytest.approx(accuracies[0] - accuracies[1])
    assert (gap.interval is None) == (len(set(groups)) < 10)
    if gap.interval is not None:
        assert -1 <= gap.interval[0] <= gap.interval[1] <= 1
    same = group_gap(results(labels, groups, first), results(labels, groups, first))
    assert same.interval in (None, (0.0, 0.0))


def test_resampling_groups_covers_the_truth_where_rows_alone_would_not() -> None:
    """Groups that are right or wrong as a whole: their number sets the width, and not that of their rows."""
    rng, covered, widths = np.random.default_rng(0), 0, []
    for number in range(40):
        groups = np.repeat(np.arange(40), 25)
        labels, is_right = groups % 2, (rng.random(40) < 0.5)[groups]
        always = GroupedRows(labels, groups, np.ones(1000, bool))
        gap = group_gap(always, GroupedRows(labels, groups, is_right), seed=number)
        assert gap.interval is not None
        covered += gap.interval[0] <= 0.5 <= gap.interval[1]
        widths.append(gap.interval[1] - gap.interval[0])
    assert covered >= 34
    # 1.96 standard errors of 40 groups each way; 1,000 independent rows would have a fifth of it.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.15)


def test_the_worst_groups_have_enough_images() -> None:
    groups = [1] * 6 + [2] * 4 + [3] * 5 + [4] * 10
    correct = [True] * 3 + [False] * 3 + [False] * 4 + [True] * 5 + [False] * 5 + [True] * 5
    rows = results([0] * 25, groups, correct)
    assert worst_groups(rows) == [(4, 10, 0.5), (1, 6, 0.5), (3, 5, 1.0)]
    assert worst_groups(rows, num_worst=1) == [(4, 10, 0.5)]
