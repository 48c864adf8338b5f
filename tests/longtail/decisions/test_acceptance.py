"""Accepted predictions are right as often as promised, and a class without a promise says what is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.decisions.acceptance import learn_acceptance, rows_missing
from imbvlm.longtail.decisions.scored_rows import ScoredRows

# Two many-shot classes, a medium-shot one, two few-shot ones.
COUNTS = np.array([500, 300, 50, 10, 4])
STATS = ClassStats.from_counts(COUNTS)
EVEN = np.ones(5)


def drawn(num_rows: int, seed: int, shares: np.ndarray = EVEN, stats: ClassStats = STATS) -> ScoredRows:
    """Rows of a model of one class per image with noise, whose classes come by `shares`."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(shares), num_rows, p=shares / shares.sum())
    logits = 2.2 * np.eye(len(shares))[labels] + rng.normal(size=(num_rows, len(shares)))
    return ScoredRows.from_logits(torch.from_numpy(1.5 * logits), torch.from_numpy(labels), stats)


def test_scores_are_those_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, 2, 0], [0, 0, 3], [math.nan, 0, 0], [-math.inf] * 3, [math.inf, 0, 0]])
    rows = ScoredRows.from_logits(logits, torch.tensor([0, 2, 1, 1, 1]), ClassStats.from_counts([3, 2, 1]))
    first, second = np.exp([1, 2, 0]) / np.exp([1, 2, 0]).sum(), np.exp([0, 0, 3]) / np.exp([0, 0, 3]).sum()
    assert (rows.labels.tolist(), rows.predicted.tolist()) == ([0, 2], [1, 2])
    assert rows.is_right.tolist() == [False, True]
    np.testing.assert_allclose(rows.confidence, [first[1], second[2]], rtol=1e-6)
    np.testing.assert_allclose(rows.label_probability, [first[0], second[2]], rtol=1e-6)
    np.testing.assert_allclose(rows.mean_probabilities, (first + second) / 2, rtol=1e-6)


def test_of_many_promises_few_are_broken_and_much_is_accepted() -> None:
    """Each promise may be broken in 5 % of draws."""
    fresh, num_given, num_broken, shares = drawn(60_000, 0), 0, 0, list[float]()
    for seed in range(1, 41):
        learned = learn_acceptance(drawn(1_500, seed), 0.9)
        shares.append(float(learned.accepts(fresh.predicted, fresh.confidence).mean()))
        for promise in filter(lambda own: own.is_given, learned.promises):
            taken = np.isin(fresh.predicted, promise.labels) & (fresh.confidence > promise.threshold)
            num_given, num_broken = num_given + 1, num_broken + bool(fresh.is_right[taken].mean() < 0.9)
    assert num_given > 150
    assert num_broken <= 0.06 * num_given
    assert np.mean(shares) > 0.5


def test_promises_hold_at_another_prevalence_than_that_of_the_rows() -> None:
    """Predictions of a rare class are wrong more often than on even rows: there many images of others come."""
    shares, num_given, num_broken, naive = COUNTS / COUNTS.sum(), 0, 0, 0
    fresh = drawn(100_000, 0, shares)
    for seed in range(1, 21):
        even = drawn(3_000, seed)
        for rows in (even.at_prevalence(shares, seed=seed), even):
            for promise in filter(lambda own: own.is_given, learn_acceptance(rows, 0.9).promises):
                taken = np.isin(fresh.predicted, promise.labels) & (fresh.confidence > promise.threshold)
                is_broken = bool(fresh.is_right[taken].mean() < 0.9)
                if rows is even:
                    naive += is_broken
                else:
                    num_given, num_broken = num_given + 1, num_broken + is_broken
    assert num_given >= 30
    assert num_broken <= 4
    assert naive > 20, "even rows alone promise too much"


def test_a_sample_at_a_prevalence_has_its_shares() -> None:
    rows, shares = drawn(20_000, 3), np.array([5, 3, 1, 0.5, 0])
    sample = rows.at_prevalence(shares)
    np.testing.assert_allclose(sample.counts / len(sample), shares / shares.sum(), atol=0.02)
    assert rows.comes_as(rows.counts / 7.0)
    assert not rows.comes_as(shares)
    with pytest.raises(ImbvlmError, match="none of the classes of this prevalence has a validation image"):
        rows.subset(rows.labels < 2).at_prevalence(np.array([0, 0, 1.0, 1, 1]))


def made(predicted: list[int], is_right: list[bool], confidence: list[float]) -> ScoredRows:
    labels = [own if right else (own + 1) % 5 for own, right in zip(predicted, is_right, strict=True)]
    arrays = np.array(labels), np.array(predicted), np.array(confidence), np.array(confidence), np.full(5, 0.2)
    return ScoredRows(*arrays, STATS)


def test_small_classes_are_pooled_by_shot_group_and_say_what_they_miss() -> None:
    predicted = [0] * 60 + [2] * 28 + [3] * 20 + [4] * 20
    rows = made(predicted, [True] * len(predicted), np.linspace(0.9, 0.5, len(predicted)).tolist())
    learned = learn_acceptance(rows, 0.95)
    by_label = learned.promise_of
    assert (by_label[0].group, by_label[0].num_rows, by_label[0].num_missing) == (None, 60, 0)
    assert (by_label[1].group, by_label[1].labels, by_label[1].num_missing) == ("many_shot", (1,), 59)
    assert (by_label[2].group, by_label[2].num_missing) == ("medium_shot", 31)
    assert by_label[3] is by_label[4]
    assert (by_label[3].labels, by_label[3].num_rows, by_label[3].num_missing) == ((3, 4), 40, 19)
    lower = learn_acceptance(rows, 0.9)
    assert lower.promise_of[3].is_given, "29 right ones in a row are enough"
    assert lower.accepts(np.array([3, 4, 1]), np.array([0.6, 0.6, 0.99])).tolist() == [True, True, False]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(0, 40), st.sampled_from([0.8, 0.9, 0.95]))
def test_rows_missing_is_the_fewest_by_clopper_and_pearson(num_right: int, num_wrong: int, precision: float) -> None:
    def bound(right: int) -> float:
        return float(beta.ppf(0.05, right, num_wrong + 1))

    missing = rows_missing(num_right, num_right + num_wrong, precision)
    assert bound(num_right + missing) >= precision - 1e-12
    assert missing == 1 or bound(num_right + missing - 1) < precision


wild = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(0, 90), st.data())
def test_wild_logits_give_promises_that_hold_on_their_own_rows(
    num_classes: int, num_rows: int, data: st.DataObject
) -> None:
    values = st.one_of(wild, st.sampled_from([0.0, 1.0, 60.0]))
    logits = np.array(data.draw(st.lists(values, min_size=num_classes, max_size=num_classes)), dtype=np.float32)
    noise = data.draw(st.sampled_from([0.0, 1.0])) * np.random.default_rng(num_rows).normal(
        size=(num_rows, num_classes)
    )
    labels = torch.randint(num_classes, (num_rows,), generator=torch.Generator().manual_seed(num_rows))
    stats = ClassStats.from_counts(np.arange(num_classes) * 40)
    rows = ScoredRows.from_logits(torch.from_numpy(logits + noise), labels, stats)
    learned = learn_acceptance(rows, 0.9)
    accepted = learned.accepts(rows.predicted, rows.confidence)
    assert sorted(label for own in learned.promises for label in own.labels) == list(range(num_classes))
    for promise in learned.promises:
        own = accepted & np.isin(rows.predicted, promise.labels)
        assert promise.is_given == (promise.num_missing == 0)
        assert rows.is_right[own].sum() >= 0.9 * own.sum()


@pytest.mark.parametrize("precision", [0, 1, -1, math.nan])
def test_a_share_that_none_can_promise_is_refused(precision: float) -> None:
    with pytest.raises(ImbvlmError, match="must be between 0 and 1"):
        learn_acceptance(drawn(10, 0), precision)
