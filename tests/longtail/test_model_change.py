"""What changes between two models on the same images, against counts by hand and the paired bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imbvlm.longtail.claims import paired_difference
from imbvlm.longtail.model_change import accuracy_changes, class_changes, join_classes

BEFORE = np.array([1, 1, 0, 0, 0, 1, 1, 0], dtype=bool)
AFTER = np.array([1, 0, 1, 1, 1, 1, 1, 0], dtype=bool)
LABELS = np.array([0, 0, 2, 2, 2, 3, 3, 3])


def test_classes_join_by_their_names_and_not_by_their_numbers() -> None:
    assert join_classes(["cat", "dog", "owl"], ["ant", "dog", "cat"]).tolist() == [2, 1, -1]


def test_classes_of_one_name_join_in_their_order() -> None:
    assert join_classes(["bat", "owl", "bat"], ["bat", "bat", "owl"]).tolist() == [0, 2, 1]
    assert join_classes(["bat", "bat"], ["bat"]).tolist() == [0, -1]


def test_accuracies_are_means_over_classes_with_the_interval_of_the_paired_bootstrap() -> None:
    changes = accuracy_changes(BEFORE, AFTER, LABELS, {"all": np.arange(4), "few": np.array([2, 3]), "none": [1]})
    assert changes.keys() == {"all", "few"}, "a set without images has no accuracy"
    whole = changes["all"]
    assert math.isclose(whole.before, (2 / 2 + 0 / 3 + 2 / 3) / 3)
    assert math.isclose(whole.after, (1 / 2 + 3 / 3 + 2 / 3) / 3)
    paired = paired_difference(AFTER, BEFORE, LABELS)
    assert whole.interval == (paired.low, paired.high)
    assert math.isclose(whole.difference, paired.difference)
    assert (whole.num_classes, whole.num_images) == (3, 8)
    assert math.isclose(changes["few"].before, (0 / 3 + 2 / 3) / 2)


def test_few_groups_give_no_interval() -> None:
    (change,) = accuracy_changes(BEFORE, AFTER, LABELS, {"all": np.arange(4)}, LABELS).values()
    assert (change.interval, change.num_groups) == (None, 3)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=30))
def test_images_of_a_class_are_right_before_and_now_as_counted_by_hand(images: list[tuple[int, bool, bool]]) -> None:
    labels, before, after = (np.array([image[part] for image in images]) for part in range(3))
    changes = class_changes(before.astype(bool), after.astype(bool), labels.astype(np.int64))
    assert {change.label for change in changes} == {label for label, *_ in images}
    for change in changes:
        own = [(old, new) for label, old, new in images if label == change.label]
        assert change.num_images == len(own)
        assert change.num_before == sum(old for old, _ in own)
        assert change.num_after == sum(new for _, new in own)
        assert change.num_gained == own.count((False, True))
        assert change.num_lost == own.count((True, False))
    evidence = [abs(change.evidence) for change in changes]
    assert evidence == sorted(evidence, reverse=True)


@pytest.mark.parametrize(("gained", "lost", "evidence"), [(4, 0, 2.0), (1, 0, 1.0), (0, 9, -3.0), (3, 3, 0.0)])
def test_many_images_that_change_one_way_are_clearer_than_one(gained: int, lost: int, evidence: float) -> None:
    before = np.repeat([False, True], [gained, lost])
    (change,) = class_changes(before, ~before, np.zeros(gained + lost, dtype=np.int64))
    assert change.evidence == evidence
