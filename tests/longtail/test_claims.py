"""Claims against simulated truth: of the best of many heads, of classes of one image, and of pairs of predictors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import Z95
from imbvlm.longtail.claims import (
    Claim,
    RowOutcomes,
    claims_of_rows,
    corrected_claims,
    macro_claim,
    out_of_bag_accuracy,
    paired_difference,
)
from imbvlm.longtail.class_stats import ClassStats

COUNTS = np.array([60, 30, 12, 8, 5, 2])
# Rows by folds, by pairs of folds, and the former's numbers of the latter.
Scored = tuple[RowOutcomes, RowOutcomes, np.ndarray]


def labels_of(counts: np.ndarray = COUNTS) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def best_of(correct: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    """Correctness (N,) of the head with the best weighted accuracy, of heads (K, N)."""
    return correct[int((correct.double() @ row_weights).argmax())]


def simulated(rng: np.random.Generator, num_heads: int = 30, spread: float = 0.03) -> tuple[torch.Tensor, np.ndarray]:
    """Correctness (K, N) of heads whose true accuracies (K, C) differ little, so that luck chooses among them."""
    accuracy = np.clip(np.linspace(0.8, 0.45, len(COUNTS)) + rng.normal(0, spread, (num_heads, len(COUNTS))), 0, 1)
    return torch.from_numpy(rng.random((num_heads, COUNTS.sum())) < accuracy[:, labels_of()]), accuracy


def test_the_interval_of_the_best_of_thirty_covers_its_truth_and_the_naive_value_flatters() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(labels_of())
    weights = torch.from_numpy(1 / COUNTS[labels_of()] / len(COUNTS))
    stats = ClassStats.from_counts([300, 150, 60, 30, 15, 10])
    claims, naive, truths, few_truths, few_claims = [], [], [], [], []
    for _ in range(120):
        correct, accuracy = simulated(rng)
        outcomes = out_of_bag_accuracy(lambda rows: best_of(correct, rows), labels, num_resamples=60)  # noqa: B023
        result = claims_of_rows(outcomes, labels, stats)
        best = int((correct.double() @ weights).argmax())
        claims.append(result["balanced_accuracy"])
        few_claims.append(result["few_shot_accuracy"])
        naive.append(macro_claim(correct[best].double().numpy(), labels_of()).value)
        truths.append(accuracy[best].mean())
        few_truths.append(accuracy[best][[4, 5]].mean())
    errors = np.array([claim.value for claim in claims]) - truths
    assert np.mean(np.array(naive) - truths) > 0.05
    assert abs(errors.mean()) < 0.02
    assert np.mean([abs(error) <= claim.half_width for error, claim in zip(errors, claims, strict=True)]) >= 0.93
    inside = [
        claim.interval[0] <= truth <= claim.interval[1] for claim, truth in zip(few_claims, few_truths, strict=True)
    ]
    assert np.mean(inside) >= 0.9
    assert (claims[0].num_classes, claims[0].num_rows) == (6, 117)
    assert (few_claims[0].num_classes, few_claims[0].num_rows) == (2, 7)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 1), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_without_a_choice_the_claim_is_the_accuracy_itself(counts: list[int], seed: int) -> None:
    """Whatever the classes: none left out, none counted twice, classes of one image among them."""
    rng = np.random.default_rng(seed)
    labels = labels_of(np.array(counts))
    correct = rng.random(len(labels)) < 0.6
    stats = ClassStats.from_counts(np.array(counts) * 10)
    targets = torch.from_numpy(labels)
    outcomes = out_of_bag_accuracy(lambda _: torch.from_numpy(correct), targets, num_resamples=5)
    result = claims_of_rows(outcomes, targets, stats)
    by_class = {label: correct[labels == label].mean() for label in set(labels.tolist())}
    claim = result["balanced_accuracy"]
    assert claim.value == pytest.approx(np.mean(list(by_class.values())))
    assert claim.num_rows == len(labels)
    assert claim.num_classes == len(by_class)
    variances = []
    for label, accuracy in by_class.items():
        likely = (counts[label] * accuracy + 1) / (counts[label] + 2)
        variances.append(likely * (1 - likely) / max(counts[label] - 1, 1))
    assert claim.standard_error == pytest.approx(np.sqrt(sum(variances)) / len(by_class))
    few = [accuracy for label, accuracy in by_class.items() if counts[label] * 10 < 20]
    assert ("few_shot_accuracy" in result) == bool(few)
    if few:
        assert result["few_shot_accuracy"].value == pytest.approx(np.mean(few))


def test_each_choice_sees_its_own_rows_alone_and_weighs_classes_alike() -> None:
    labels = labels_of()
    seen = []

    def choose(row_weights: torch.Tensor) -> torch.Tensor:
        weights = row_weights.numpy()
        in_class = np.bincount(labels, weights=weights)
        present = in_class[in_class > 0]
        np.testing.assert_allclose(present, 1 / len(present))
        seen.append(weights > 0)
        return torch.from_numpy(weights > 0)

    # A choice that has exactly its own rows correct has none of the others.
    assert out_of_bag_accuracy(choose, torch.from_numpy(labels), num_resamples=30).tolist() == [0.0] * len(labels)
    assert np.mean(seen) == pytest.approx(1 - np.exp(-1), abs=0.03)


def test_a_half_width_has_1_96_standard_errors_and_intervals_end_at_0_and_1() -> None:
    claim = Claim(0.95, 0.05, 3, 20)
    assert claim.half_width == pytest.approx(Z95 * 0.05)
    assert claim.interval == (pytest.approx(0.95 - Z95 * 0.05), 1.0)


def test_a_claim_needs_two_rows() -> None:
    for labels in ([], [0]):
        with pytest.raises(ImbvlmError, match="2 validation rows or more"):
            out_of_bag_accuracy(lambda rows: rows > 0, torch.tensor(labels, dtype=torch.int64))


# ------------------------------------------------------------------------------------------- size of training


def folds_and_pairs(counts: np.ndarray, accuracy: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, Scored]:
    """Labels (N,) and rows scored over five folds: their expected correctness by class, of so many images seen."""
    labels = labels_of(counts)
    folds = np.concatenate([np.arange(count) % 5 for count in counts])
    of_class = np.stack([np.bincount(labels[folds == fold], minlength=len(counts)) for fold in range(5)])
    own = counts - of_class
    row_of = np.repeat(np.arange(len(labels)), 4)
    others = np.concatenate([np.delete(np.arange(5), fold) for fold in folds])
    seen, seen_of_pairs = (
        own[folds, labels],
        (own[folds[row_of]] - of_class[others])[np.arange(len(row_of)), labels[row_of]],
    )

    def scored(seen: np.ndarray, of: np.ndarray) -> RowOutcomes:
        return RowOutcomes(np.where(seen > 0, accuracy(np.maximum(seen, 1))[np.arange(len(seen)), of], 0.0), seen)

    return labels, (scored(seen, labels), scored(seen_of_pairs, labels[row_of]), row_of)


def corrected(counts: np.ndarray, labels: np.ndarray, scored: Scored) -> tuple[dict[str, Claim], dict[str, Claim]]:
    """Claims before and after the correction."""
    stats, targets, correct = ClassStats.from_counts(counts), torch.from_numpy(labels), scored[0].correct
    plain = {"balanced_accuracy": macro_claim(correct, labels)}
    for group, members in stats.shot_groups.items():
        rows = np.isin(labels, members)
        if rows.any():
            plain[f"{group}_accuracy"] = macro_claim(correct[rows], labels[rows])
    return plain, corrected_claims(plain, *scored, targets, stats)


@pytest.mark.parametrize("counts", [[200, 100, 30, 10], [60, 30, 12, 5, 4, 3], [7, 3, 3, 2, 2]])
def test_an_accuracy_that_rises_as_the_law_says_is_corrected_to_that_of_all_images(counts: list[int]) -> None:
    """Classes of two images, whose own rows don't tell the law, take it from the few-shot classes."""
    totals = np.array(counts)
    slopes = np.where(totals < 20, 0.3, 0.8)

    def accuracy(seen: np.ndarray) -> np.ndarray:
        return 0.9 - slopes / np.sqrt(seen)[:, None]

    labels, scored = folds_and_pairs(totals, accuracy)
    plain, claims = corrected(totals, labels, scored)
    truth = 0.9 - slopes / np.sqrt(totals)
    assert claims["balanced_accuracy"].value == pytest.approx(truth.mean())
    assert claims["few_shot_accuracy"].value == pytest.approx(truth[totals < 20].mean())
    assert all(claims[name].standard_error > claim.standard_error for name, claim in plain.items())


def test_a_correction_that_measures_nothing_leaves_claims_as_they_are() -> None:
    totals = np.array([8, 5, 2])
    labels, scored = folds_and_pairs(totals, lambda seen: np.full((len(seen), 3), 0.5))
    plain, claims = corrected(totals, labels, scored)
    assert claims == plain
    # Classes of two alone: no pair of folds leaves fewer images than a fold.
    labels, scored = folds_and_pairs(np.array([2, 2]), lambda seen: np.full((len(seen), 2), 0.5))
    plain, claims = corrected(np.array([2, 2]), labels, scored)
    assert claims == plain


def test_a_gain_is_a_weighted_sum_whose_error_widens_the_interval_and_no_claim_is_above_1() -> None:
    rng = np.random.default_rng(0)
    totals = np.array([30, 6])
    labels, (by_folds, by_pairs, row_of) = folds_and_pairs(totals, lambda seen: np.ones((len(seen), 2)))
    by_folds = replace(by_folds, correct=(rng.random(len(labels)) < 0.7).astype(float))
    by_pairs = replace(by_pairs, correct=(rng.random(len(row_of)) < 0.5).astype(float))
    plain, claims = corrected(totals, labels, (by_folds, by_pairs, row_of))
    total, variance = 0.0, 0.0
    for label, count in enumerate(totals):
        rows = np.flatnonzero(labels == label)
        gains = [by_folds.correct[row] - by_pairs.correct[row_of == row].mean() for row in rows]
        steps = [
            np.mean([seen**-0.5 for seen in by_pairs.num_seen[row_of == row]]) - by_folds.num_seen[row] ** -0.5
            for row in rows
        ]
        missing = np.mean([by_folds.num_seen[row] ** -0.5 - count**-0.5 for row in rows])
        weight = missing / sum(steps) / 2
        total += weight * sum(gains)
        variance += weight**2 * sum(np.square(gains))
    balanced = claims["balanced_accuracy"]
    assert balanced.value == pytest.approx(plain["balanced_accuracy"].value + total)
    assert balanced.standard_error == pytest.approx(np.hypot(plain["balanced_accuracy"].standard_error, variance**0.5))
    perfect = replace(by_folds, correct=np.ones(len(labels)))
    assert corrected(totals, labels, (perfect, by_pairs, row_of))[1]["balanced_accuracy"].value == 1.0


def test_gains_that_groups_share_are_less_sure() -> None:
    totals = np.array([40, 40])
    labels, (by_folds, by_pairs, row_of) = folds_and_pairs(totals, lambda seen: np.ones((len(seen), 2)))
    groups = np.arange(len(labels)) // 4
    by_pairs = replace(by_pairs, correct=(groups[row_of] % 2).astype(float))
    targets, stats = torch.from_numpy(labels), ClassStats.from_counts(totals)
    plain = {name: Claim(0.5, 0.01, 2, 80) for name in ("balanced_accuracy", "medium_shot_accuracy")}
    errors = [
        corrected_claims(plain, by_folds, by_pairs, row_of, targets, stats, of)["balanced_accuracy"].standard_error
        for of in (None, groups)
    ]
    gains = [np.sqrt(np.square(error) - 0.01**2) for error in errors if error is not None]
    # Four images that gain together are one image that gains four times as much.
    assert gains[1] == pytest.approx(2 * gains[0], rel=0.1)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_corrections_are_finite_whatever_the_classes(counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    totals = np.array(counts)
    labels, scored = folds_and_pairs(totals, lambda seen: (rng.random((len(seen), len(totals))) < 0.5).astype(float))
    for claim in corrected(totals, labels, scored)[1].values():
        assert 0 <= claim.value <= 1
        assert np.isfinite(claim.standard_error)


# ------------------------------------------------------------------------------------------------- two predictors


def pairs(rng: np.random.Generator, counts: np.ndarray, gain: float, seeds: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Correctness (seeds, N) of two predictors that share how hard an image is."""
    hardness = rng.random(counts.sum())
    noise = rng.normal(0, 0.2, (2, seeds, counts.sum()))
    return hardness + noise[0] < 0.6 + gain, hardness + noise[1] < 0.6


@pytest.mark.parametrize(
    ("counts", "max_wins"),
    [
        pytest.param(np.array([60, 30, 12, 8, 5, 2]), 0.05, id="long tail"),
        pytest.param(np.array([40, 20] + [1] * 40), 0.05, id="many of one image"),
        pytest.param(np.full(60, 2), 0.05, id="all of two"),
        # A third of the difference is one image's, which six others speak for.
        pytest.param(np.array([30, 6, 1]), 0.1, id="one of one"),
    ],
)
def test_equal_predictors_seldom_win(counts: np.ndarray, max_wins: float) -> None:
    """The hard case is classes of one image, which a bootstrap within classes takes for certain."""
    rng = np.random.default_rng(0)
    labels = labels_of(counts)
    results = [paired_difference(*pairs(rng, counts, 0), labels, num_resamples=400) for _ in range(300)]
    assert np.mean([result.low > 0 for result in results]) <= max_wins
    assert np.mean([result.low <= 0 <= result.high for result in results]) >= 1 - 2 * max_wins


def test_the_interval_is_that_of_a_formula_in_float64() -> None:
    rng = np.random.default_rng(1)
    counts = np.array([400, 200, 100])
    labels = labels_of(counts)
    ours, theirs = pairs(rng, counts, 0.1)
    result = paired_difference(ours, theirs, labels)
    gains = ours.mean(axis=0) - theirs.mean(axis=0)
    expected = np.mean([gains[labels == label].mean() for label in range(3)])
    error = np.sqrt(sum(gains[labels == label].var(ddof=1) / counts[label] for label in range(3))) / 3
    assert result.difference == pytest.approx(expected)
    assert result.high - result.low == pytest.approx(2 * Z95 * error, rel=0.08)
    assert result.low > 0
    swapped = paired_difference(theirs, ours, labels)
    assert swapped.difference == pytest.approx(-expected)
    assert swapped.high < 0


def test_the_same_predictor_shows_no_win() -> None:
    correct = np.array([True, False, True, True])
    result = paired_difference(correct, correct, np.array([0, 0, 1, 4]))
    assert (result.difference, result.low, result.high) == (0, 0, 0)
    assert result.low <= 0 <= result.high


def test_one_image_shows_nothing() -> None:
    """One row has no spread; an interval without width must not call it a win."""
    result = paired_difference([True], [False], np.array([2]))
    assert result.low <= 0 <= result.high
    with pytest.raises(ImbvlmError, match="needs rows"):
        paired_difference([], [], np.empty(0, dtype=np.int64))


# ------------------------------------------------------------------------------------------------ images in groups


def cameras(rng: np.random.Generator, num_groups: int, kinship: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, groups and correctness (N,) of 20 images a group, right at 0.6; at `kinship` 1 they are so together."""
    groups = np.repeat(np.arange(num_groups), 20)
    labels = np.minimum(rng.geometric(0.4, len(groups)) - 1, 4)
    together = (rng.random(num_groups) < 0.6)[groups]
    alone = rng.random(len(groups)) < 0.6
    return labels, groups, np.where(rng.random(len(groups)) < np.sqrt(kinship), together, alone)


@pytest.mark.parametrize(("num_groups", "kinship"), [(10, 1.0), (25, 0.3), (10, 0.0)])
def test_intervals_of_alike_images_in_groups_hold_the_truth(num_groups: int, kinship: float) -> None:
    rng, inside, inside_rows, no_win = np.random.default_rng(2), [], [], []
    for _ in range(30):
        labels, groups, ours = cameras(rng, num_groups, kinship)
        claim, of_rows = macro_claim(ours, labels, groups), macro_claim(ours, labels)
        inside.append(abs(claim.value - 0.6) <= claim.half_width)
        inside_rows.append(abs(of_rows.value - 0.6) <= of_rows.half_width)
        assert claim.value == of_rows.value
        assert claim.half_width >= of_rows.half_width
        theirs = cameras(rng, num_groups, kinship)[2]
        difference = paired_difference(ours, theirs, labels, groups=groups, num_resamples=300)
        no_win.append(difference.low <= 0 <= difference.high)
        assert (claim.num_groups, difference.num_groups) == (num_groups, num_groups)
    assert np.mean(inside) >= 0.85
    assert np.mean(no_win) >= 0.85
    if kinship == 1:
        assert np.mean(inside_rows) < 0.5


def test_the_error_of_groups_is_that_of_a_formula_in_float64() -> None:
    """One class and groups of one size: the standard error of a mean of group means, with Student's variance."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(40), 10)
    means = rng.random(40)
    claim = macro_claim(means[groups], np.zeros(400, np.int64), groups)
    expected = means.std(ddof=1) / np.sqrt(40) * np.sqrt(39 / 37)
    assert claim.standard_error == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("num_groups", [2, 9])
def test_fewer_than_ten_groups_have_no_interval(num_groups: int) -> None:
    labels = np.tile([0, 1, 2], 30)
    groups = np.arange(90) // 3 % num_groups
    right = torch.from_numpy(np.arange(90) % 4 > 0)
    stats = ClassStats.from_counts([300, 50, 10])
    targets = torch.from_numpy(labels)
    outcomes = out_of_bag_accuracy(lambda _: right, targets, groups=groups, num_resamples=5)
    claims = claims_of_rows(outcomes, targets, stats, groups)
    scored = RowOutcomes(np.ones(90), np.full(90, 8))
    corrected_ = corrected_claims(claims, scored, scored, np.arange(90), targets, stats, groups)
    for claim in (*claims.values(), *corrected_.values()):
        assert (claim.standard_error, claim.half_width, claim.num_groups) == (None, np.inf, num_groups)
    difference = paired_difference(right.numpy(), ~right.numpy(), labels, groups=groups)
    assert difference.low <= 0 <= difference.high
    assert (difference.low, difference.high, difference.num_groups) == (-np.inf, np.inf, num_groups)


def test_a_choice_sees_whole_groups_and_is_scored_on_the_others() -> None:
    labels, groups = labels_of(), np.arange(COUNTS.sum()) % 11
    seen = []

    def choose(row_weights: torch.Tensor) -> torch.Tensor:
        is_in = (row_weights > 0).numpy()
        assert all(len(set(is_in[groups == group])) == 1 for group in range(11))
        seen.append(is_in.any())
        return torch.from_numpy(is_in)

    assert out_of_bag_accuracy(choose, torch.from_numpy(labels), groups=groups).tolist() == [0.0] * len(labels)
    assert all(seen)
    with pytest.raises(ImbvlmError, match="2 validation groups or more, got 1"):
        out_of_bag_accuracy(choose, torch.from_numpy(labels), groups=np.zeros(len(labels), np.int64))


@given(st.integers(0, 50))
@settings(deadline=None, max_examples=10)
def test_rows_that_are_groups_of_their_own_are_resampled_as_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, targets = labels_of(), torch.from_numpy(labels_of())
    heads = torch.from_numpy(rng.random((5, len(labels))) < 0.6)
    groups = rng.permutation(len(labels))
    alone = out_of_bag_accuracy(lambda rows: best_of(heads, rows), targets, num_resamples=5)
    assert np.shape(alone) == np.shape(
        out_of_bag_accuracy(lambda rows: best_of(heads, rows), targets, groups=groups, num_resamples=5)
    )
    in_order = out_of_bag_accuracy(
        lambda rows: best_of(heads, rows), targets, groups=np.arange(len(labels)), num_resamples=5
    )
    np.testing.assert_array_equal(alone, in_order)
