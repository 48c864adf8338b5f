"""Sets have the classes of new images among them as often as promised, class by class or together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.decisions.prediction_sets import learn_sets
from imbvlm.longtail.decisions.scored_rows import ScoredRows

SHARES = np.array([0.5, 0.3, 0.1, 0.06, 0.03, 0.01])
STATS = ClassStats.from_counts((1000 * SHARES).astype(np.int64))


def drawn(num_rows: int, seed: int, shares: np.ndarray = SHARES) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model that leans to frequent classes, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(shares), num_rows, p=shares)
    logits = 1.5 * np.eye(len(shares))[labels] + rng.normal(size=(num_rows, len(shares))) + np.log(SHARES)
    return torch.from_numpy(logits), torch.from_numpy(labels)


def coverage(rows: ScoredRows, lowest: np.ndarray) -> np.ndarray:
    return rows.label_probability >= lowest[rows.labels]


def test_new_images_are_covered_as_often_as_promised() -> None:
    """The promise is of the mean over draws: by class from 19 rows on, and for the others together."""
    fresh = ScoredRows.from_logits(*drawn(40_000, 0), STATS)
    by_class, together = {label: list[float]() for label in range(6)}, list[float]()
    for seed in range(1, 101):
        learned = learn_sets(ScoredRows.from_logits(*drawn(200, seed), STATS), 0.9)
        covered, thin = coverage(fresh, learned.lowest), ~learned.has_own[fresh.labels]
        together += [float(covered[thin].mean())] if thin.any() else []
        for label in np.flatnonzero(learned.has_own).tolist():
            by_class[label].append(float(covered[fresh.labels == label].mean()))
    assert [len(values) > 50 for values in by_class.values()] == [True, True, True, False, False, False]
    assert all(np.mean(by_class[label]) == pytest.approx(0.91, abs=0.012) for label in (0, 1))
    assert np.mean(by_class[2]) > 0.895
    assert 0.895 < np.mean(together) < 0.985


def test_the_pool_of_small_classes_follows_another_prevalence() -> None:
    even = np.full(6, 1 / 6)
    fresh, covered = ScoredRows.from_logits(*drawn(40_000, 0, even), STATS), list[float]()
    for seed in range(1, 61):
        learned = learn_sets(ScoredRows.from_logits(*drawn(250, seed), STATS), 0.8, even)
        thin = ~learned.has_own[fresh.labels]
        covered.append(float(coverage(fresh, learned.lowest)[thin].mean()))
    assert np.mean(covered) > 0.795


@settings(max_examples=60, deadline=None)
@given(st.integers(19, 120), st.sampled_from([0.8, 0.9, 0.95]), st.integers(0, 10**6))
def test_thresholds_of_large_classes_are_conformal_quantiles(num_rows: int, level: float, seed: int) -> None:
    logits, _ = drawn(num_rows, seed)
    labels = torch.zeros(num_rows, dtype=torch.int64)
    learned = learn_sets(ScoredRows.from_logits(logits, labels, STATS), level)
    # Scores 1 - p: the smallest with a share of (n + 1) at or below it.
    scores = np.sort(1 - np.float32(torch.softmax(logits, dim=1)[:, 0].numpy()).astype(np.float64))
    rank = math.ceil(round((num_rows + 1) * level, 9))
    assert 1 - learned.lowest[0] == pytest.approx(scores[rank - 1])
    assert learned.has_own.tolist() == [True] + [False] * 5
    assert (learned.lowest[1:] == 0).all(), "no row tells of these classes"


def test_small_classes_share_scores_divided_by_prevalence() -> None:
    """By hand: twelve rows of class 1, whose probabilities count against a mean of 0.1, and none of class 2."""
    probabilities = np.linspace(0.05, 0.6, 12)
    mean = np.array([0.7, 0.1, 0.2])
    arrays = np.ones(12, dtype=np.int64), np.zeros(12, dtype=np.int64), 1 - probabilities, probabilities, mean
    learned = learn_sets(ScoredRows(*arrays, ClassStats.from_counts([100, 9, 5])), 0.8)
    shared = np.sort(probabilities / 0.1)[12 - math.ceil(13 * 0.8)]
    # The quantile of class 1 is that of all, and class 2 has none, so that its threshold is half the shared one.
    np.testing.assert_allclose(learned.lowest, [0.7 * shared / 2, 0.1 * shared, 0.2 * shared / 2])
    sets = learned.members(np.array([[0.9, 0.05, 0.05], [0.0, 0.1, 0.9], [0.3, 0.35, 0.35]]))
    assert sets[:, 0].tolist() == [True, False, False]
    assert sets.any(axis=1).all(), "the most probable class is always in"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(0, 60), st.floats(0.01, 0.99), st.sampled_from([0.0, 1.0, 200.0]))
def test_wild_rows_give_sets_that_cover_them(num_classes: int, num_rows: int, level: float, scale: float) -> None:
    rng = np.random.default_rng(num_rows)
    logits = scale * rng.normal(size=(num_rows, num_classes))
    logits[rng.random(num_rows) < 0.1] = np.nan
    labels = rng.integers(num_classes, size=num_rows)
    stats = ClassStats.from_counts(np.arange(num_classes) * 40)
    rows = ScoredRows.from_logits(torch.from_numpy(logits), torch.from_numpy(labels), stats)
    learned = learn_sets(rows, level)
    assert np.isfinite(learned.lowest).all()
    probabilities = torch.softmax(torch.from_numpy(logits).nan_to_num(), dim=1).numpy()
    assert learned.members(probabilities).any(axis=1).all()
    assert coverage(rows, learned.lowest).sum() >= level * len(rows) - num_classes * 1e-6 - 1e-9


@pytest.mark.parametrize("level", [0, 1, -1, math.nan])
def test_a_coverage_that_none_can_promise_is_refused(level: float) -> None:
    with pytest.raises(ImbvlmError, match="must be between 0 and 1"):
        learn_sets(ScoredRows.from_logits(*drawn(10, 0), STATS), level)
