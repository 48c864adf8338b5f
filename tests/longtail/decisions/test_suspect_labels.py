"""Labels that were flipped on purpose are found, and those of rare classes aren't suspected more than others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.longtail.decisions.suspect_labels import MIN_RATIO, find_suspects

SIZES = np.array([400, 200, 60, 20, 12])
MEANS = 2.2 * np.random.default_rng(1).normal(size=(5, 4)) / np.sqrt(2)


def scored_over_folds(seed: int, share: float = 0.08) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Logits of nearest means of the other four folds, labels of which each class lost a share, and the true ones."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(5), SIZES)
    images, labels = MEANS[truth] + rng.normal(size=(len(truth), 4)), truth.copy()
    flipped = rng.random(len(truth)) < share
    # Wrong labels come by the classes' sizes, so that a rare class isn't made of them.
    labels[flipped] = rng.choice(5, flipped.sum(), p=SIZES / SIZES.sum())
    logits, fold = np.zeros((len(truth), 5)), rng.permutation(len(truth)) % 5
    for number in range(5):
        is_out = fold == number
        means = np.stack([images[~is_out & (labels == label)].mean(axis=0) for label in range(5)])
        logits[is_out] = -0.5 * ((images[is_out][:, None] - means) ** 2).sum(axis=2)
    return torch.from_numpy(logits), torch.from_numpy(labels), truth


def test_flipped_labels_are_found_and_tails_are_not_suspected_more() -> None:
    found, flipped, false, right, by_argmax = (np.zeros(5) for _ in range(5))
    for seed in range(40):
        logits, labels, truth = scored_over_folds(seed)
        suspects = find_suspects(logits, labels)
        is_suspect = np.isin(np.arange(len(truth)), suspects.rows)
        is_wrong = labels.numpy() != truth
        is_other = logits.argmax(dim=1).numpy() != labels.numpy()
        for sums, rows in (
            (found, is_suspect & is_wrong), (flipped, is_wrong), (false, is_suspect & ~is_wrong), (right, ~is_wrong),
            (by_argmax, is_other & ~is_wrong),
        ):  # fmt: skip
            sums += np.bincount(labels.numpy()[rows], minlength=5)
    assert found.sum() / flipped.sum() > 0.6
    assert found.sum() / (found.sum() + false.sum()) > 0.6
    rates = false / right
    assert rates[:2].mean() < 0.04
    assert rates[2:].max() < 0.05, "of rare classes' right labels"
    assert (by_argmax / right)[2:].max() > 0.2, "each prediction that differs would suspect them"


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1])
def test_few_images_are_no_reason_to_suspect_a_right_label(share: float) -> None:
    """Few-shot classes have no larger share of their right labels listed than the others, within two errors."""
    differences = []
    for seed in range(40):
        logits, labels, truth = scored_over_folds(seed, share)
        is_listed = np.isin(np.arange(len(truth)), find_suspects(logits, labels).rows)
        is_right, is_few = labels.numpy() == truth, labels.numpy() >= 3
        differences.append(is_listed[is_right & is_few].mean() - is_listed[is_right & ~is_few].mean())
    assert np.mean(differences) < 2 * np.std(differences) / np.sqrt(40)


def test_a_ratio_counts_by_what_is_usual_for_its_class() -> None:
    """Models take most rows of the second class for the first, 30 times as probable; 300 times isn't unusual then."""
    ratios = np.array([1 / 200] * 40 + [30] * 20 + [300, 30 * 10 * 2 * 1.1], dtype=float)
    labels = torch.from_numpy((np.arange(len(ratios)) >= 40).astype(np.int64))
    first = np.where(labels == 0, 1 / (1 + ratios), ratios / (1 + ratios))
    logits = torch.from_numpy(np.stack([first, 1 - first], axis=1)).log()
    assert find_suspects(logits, labels).rows.tolist() == [61]
    assert find_suspects(logits[60:], labels[60:]).rows.tolist() == [], "two rows say nothing of what is usual"


def test_suspects_by_the_formula_of_confident_learning() -> None:
    """Thresholds are the means of the classes' own probabilities, here 0.7125, 0.6 and 0.402."""
    of_class = [
        [[0.9, 0.05, 0.05], [0.95, 0.04, 0.01], [0.99, 0.005, 0.005], [0.01, 0.91, 0.08]],
        [[0.2, 0.6, 0.2], [0.3, 0.6, 0.1], [0.1, 0.6, 0.3]],
        [[0.1, 0.1, 0.8], [0.995, 0.001, 0.004]],
    ]
    probabilities = np.concatenate(of_class)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    thresholds = [probabilities[labels == label, label].mean() for label in range(3)]
    np.testing.assert_allclose(thresholds, [0.7125, 0.6, 0.402])
    suspects = find_suspects(torch.from_numpy(probabilities).log(), torch.from_numpy(labels))
    assert (suspects.rows.tolist(), suspects.looks_like.tolist()) == ([3], [1])
    np.testing.assert_allclose([suspects.given_probability[0], suspects.other_probability[0]], [0.01, 0.91])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(0, 60), st.sampled_from([0.0, 1.0, 300.0]))
def test_wild_rows_give_suspects_that_can_be_justified(num_classes: int, num_rows: int, scale: float) -> None:
    rng = np.random.default_rng(num_rows)
    logits = torch.from_numpy(scale * rng.normal(size=(num_rows, num_classes)))
    logits[torch.from_numpy(rng.random(num_rows) < 0.2)] = torch.nan
    labels = torch.from_numpy(rng.integers(num_classes, size=num_rows))
    suspects = find_suspects(logits, labels)
    assert not logits[suspects.rows].isnan().any()
    assert (labels.numpy()[suspects.rows] != suspects.looks_like).all()
    assert (suspects.other_probability > MIN_RATIO * suspects.given_probability).all()
    margins = suspects.other_probability - suspects.given_probability
    assert (np.diff(margins) <= 1e-12).all(), "the most suspicious first"
    given_labels = labels.numpy()
    counts, listed = (np.bincount(own, minlength=num_classes) for own in (given_labels, given_labels[suspects.rows]))
    assert (2 * listed <= counts).all()
