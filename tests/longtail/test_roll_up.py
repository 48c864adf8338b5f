"""Roll-up: what is named at a rank is right as often as promised, on rows that didn't choose the thresholds."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.roll_up import RankScores, RollUp, best_taxa, is_broken, is_shown, learn_roll_up, rows_needed
from imbvlm.longtail.taxonomy import Taxonomy

TREE = Taxonomy(
    ("kingdom", "family", "species"),
    (("life", "cats"), ("life", "cats"), ("life", "dogs"), ("life", "dogs"), ("life", "dogs")),
)


def drawn(num_rows: int, seed: int, sharpness: float = 3.0) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Calibrated probabilities (N, C), in which members of a family are alike, and labels (N,) that come by them."""
    rng = np.random.default_rng(seed)
    family = sharpness * rng.normal(size=(num_rows, 2))[:, [0, 0, 1, 1, 1]]
    logits = family + rng.normal(size=(num_rows, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < rng.random((num_rows, 1))).sum(axis=1).clip(max=4)
    return probabilities, labels


def scores_of(num_rows: int, seed: int, sharpness: float = 3.0) -> RankScores:
    probabilities, labels = drawn(num_rows, seed, sharpness)
    return RankScores.from_logits(TREE, torch.from_numpy(probabilities).log(), torch.from_numpy(labels))


def test_probabilities_of_a_taxon_are_the_sum_of_its_classes() -> None:
    probabilities = np.array([[0.1, 0.2, 0.3, 0.0, 0.4], [0.5, 0.3, 0.2, 0.0, 0.0]])
    taxa, values = best_taxa(TREE, probabilities)
    assert taxa.tolist() == [[0, 1, 4], [0, 0, 0]]
    np.testing.assert_allclose(values, [[1, 0.7, 0.4], [1, 0.8, 0.5]])
    logits = torch.tensor(probabilities).log()
    logits[1] = math.nan
    scores = RankScores.from_logits(TREE, logits, torch.tensor([3, 0]))
    np.testing.assert_allclose(scores.probabilities, [[1, 0.7, 0.4]])
    assert scores.is_right.tolist() == [[True, True, False]]


def test_a_row_is_named_at_the_lowest_rank_that_passes() -> None:
    roll_up = RollUp(0.9, (math.inf, 0.5, 0.8))
    probabilities = np.array([[1, 0.9, 0.81], [1, 0.9, 0.8], [1, 0.5, 0.3], [1, 0.4, 0.9]])
    assert roll_up.ranks(probabilities).tolist() == [2, 1, -1, 2]
    scores = RankScores(probabilities, np.array([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]], dtype=np.bool_))
    assert roll_up.counts(scores) == ([0, 1, 2], [0, 0, 1])
    nothing = RankScores(np.empty((0, 3)), np.empty((0, 3), dtype=np.bool_))
    assert roll_up.counts(nothing) == ([0, 0, 0], [0, 0, 0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 0.99), st.data())
def test_a_share_is_shown_by_the_exact_binomial_test(num_rows: int, share: float, data: st.DataObject) -> None:
    num_right = data.draw(st.integers(0, num_rows))
    terms = [math.comb(num_rows, k) * share**k * (1 - share) ** (num_rows - k) for k in range(num_right, num_rows + 1)]
    tail = math.fsum(terms)
    if abs(tail - 0.05) > 1e-9:
        assert is_shown(num_right, num_rows, share) == (tail < 0.05)
    needed = rows_needed(share)
    assert is_shown(needed, needed, share)
    assert needed == 1 or not is_shown(needed - 1, needed - 1, share)


@pytest.mark.parametrize("precision", [0.8, 0.95])
def test_what_is_named_is_right_as_often_as_promised(precision: float) -> None:
    """A promise fails in at most 5 % of draws, 3 of 40 in half of such series; the kingdom says nothing."""
    broken, coverage, fresh = {1: 0, 2: 0}, list[float](), scores_of(100_000, 1)
    for seed in range(40):
        roll_up = learn_roll_up(TREE, scores_of(600, 100 + seed), precision)
        assert roll_up.thresholds[0] == math.inf
        named, right = roll_up.counts(fresh)
        coverage.append(sum(named) / len(fresh))
        for rank in broken:
            broken[rank] += named[rank] > 0 and right[rank] < precision * named[rank]
    assert max(broken.values()) <= 5
    assert np.mean(coverage) > 0.5


def test_a_better_model_names_more_at_lower_ranks() -> None:
    probabilities, labels = drawn(2_000, 7)
    sure = RankScores.from_logits(TREE, 6 * torch.eye(5, dtype=torch.float64)[labels], torch.from_numpy(labels))
    named, right = learn_roll_up(TREE, sure, 0.95).counts(sure)
    assert (named, right) == ([0, 0, 2_000], [0, 0, 2_000])
    weak = RankScores.from_logits(TREE, torch.from_numpy(probabilities).log(), torch.from_numpy(labels))
    named, _ = learn_roll_up(TREE, weak, 0.95).counts(weak)
    assert named[1] > 0
    assert sum(named) < 2_000


def test_what_no_rank_can_promise_is_refused_with_the_reason() -> None:
    probabilities, labels = drawn(58, 0)
    few = RankScores.from_logits(TREE, torch.from_numpy(probabilities).log(), torch.from_numpy(labels))
    with pytest.raises(ImbvlmError, match="that takes 59 validation images that are all right, and there are 58"):
        learn_roll_up(TREE, few, 0.95)
    guesses = RankScores(np.full((500, 3), 0.5), np.zeros((500, 3), dtype=np.bool_))
    with pytest.raises(ImbvlmError, match="too many of the surest are wrong"):
        learn_roll_up(TREE, guesses, 0.95)
    for precision in (0, 1, -0.5, math.nan):
        with pytest.raises(ImbvlmError, match="must be between 0 and 1"):
            learn_roll_up(TREE, few, precision)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=200), st.floats(0.05, 0.95), st.data())
def test_equal_probabilities_never_break_a_promise_on_their_own_rows(
    values: list[float], precision: float, data: st.DataObject
) -> None:
    num_rows = len(values)
    is_right = np.array(data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)))
    scores = RankScores(np.array(values)[:, None].repeat(3, axis=1), is_right[:, None].repeat(3, axis=1))
    try:
        roll_up = learn_roll_up(TREE, scores, precision)
    except ImbvlmError:
        return
    for named, right in zip(*roll_up.counts(scores), strict=True):
        assert named == 0 or is_shown(right, named, precision)


def test_rows_break_a_promise_where_they_show_that_less_is_right() -> None:
    """By the binomial distribution: so few right ones of 100 come in 5 % of samples at most."""
    below = {
        right: sum(math.comb(100, k) * 0.9**k * 0.1 ** (100 - k) for k in range(right + 1)) for right in range(101)
    }
    assert [right for right in below if is_broken(right, 100, 0.9)] == [
        k for k, share in below.items() if share <= 0.05
    ]
    assert not is_broken(0, 0, 0.9)
