"""Metrics: per-class counters, shot groups, calibration; sums over parts equal the whole."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.metrics import (
    CalibrationBins,
    ClassCounters,
    balanced_standard_error,
    macro_scores,
    per_class_accuracy,
)
from imbvlm.longtail.worker_group import SINGLE_WORKER


def counted(logits: torch.Tensor, targets: torch.Tensor, num_classes: int | None = None) -> ClassCounters:
    counters = ClassCounters(num_classes or logits.shape[1])
    counters.update(logits, targets)
    return counters


def predicting(classes: list[int], num_classes: int) -> torch.Tensor:
    """Logits whose largest is the given class of each row."""
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float() * 5


def random_batch(rows: int = 200, num_classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, num_classes, generator=generator)
    return logits, torch.randint(0, num_classes, (rows,), generator=generator)


def test_accuracies_by_hand() -> None:
    stats = ClassStats.from_counts([500, 101, 100, 20, 19, 1, 0, 0])
    targets = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 6])
    guesses = [0, 0, 0, 1, 1, 2, 0, 0, 4, 0, 5, 0]
    metrics = counted(predicting(guesses, 8), targets).compute(stats)
    assert metrics["top1_accuracy"] == pytest.approx(7 / 12)
    per_class = [3 / 4, 1, 1 / 2, 0, 1, 1 / 2, 0]  # class 7 has no rows and doesn't count
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(per_class))
    assert metrics["many_shot_accuracy"] == pytest.approx(np.mean([3 / 4, 1]))
    assert metrics["medium_shot_accuracy"] == pytest.approx(np.mean([1 / 2, 0]))
    assert metrics["few_shot_accuracy"] == pytest.approx(np.mean([1, 1 / 2]))
    assert metrics["zero_train_accuracy"] == 0
    assert set(metrics) == {"loss", "top1_accuracy", "balanced_accuracy", "balanced_standard_error"} | {
        f"{group}_shot_accuracy" for group in ("many", "medium", "few")
    } | {"zero_train_accuracy"}


def test_a_group_without_classes_or_rows_is_absent_and_never_zero() -> None:
    stats = ClassStats.from_counts([500, 50, 5])
    metrics = counted(predicting([0, 1], 3), torch.tensor([0, 0])).compute(stats)
    assert "few_shot_accuracy" not in metrics  # has a class, which has no rows
    assert "medium_shot_accuracy" not in metrics
    assert "zero_train_accuracy" not in metrics  # has no class
    assert metrics["balanced_accuracy"] == 0.5


def test_shot_groups_are_of_the_official_counts() -> None:
    stats = ClassStats.from_counts([90, 10], split_counts=[101, 20])
    metrics = counted(predicting([0, 1], 2), torch.tensor([0, 1])).compute(stats)
    assert metrics["many_shot_accuracy"] == metrics["medium_shot_accuracy"] == 1


def test_without_rows_there_are_no_metrics() -> None:
    stats = ClassStats.from_counts([5, 5])
    counters = counted(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    assert counters.compute(stats) == {}
    assert counters.macro_scores() == {}
    assert CalibrationBins().compute() == {}


def test_the_loss_is_the_mean_cross_entropy_over_rows() -> None:
    logits, targets = random_batch()
    metrics = counted(logits, targets).compute(ClassStats.from_counts([9] * 7))
    expected = torch.nn.functional.cross_entropy(logits.double(), targets).item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_of_equal_logits_the_lowest_class_is_predicted() -> None:
    counters = counted(torch.tensor([[1.0, 3, 3], [2, 2, 2], [0, 0, 0]]), torch.tensor([1, 2, 0]))
    assert counters.predicted.tolist() == [2, 1, 0]
    assert counters.correct.tolist() == [1, 1, 0]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_row_with_nan_is_wrong_wherever_the_nan_stands(place: int) -> None:
    logits = torch.tensor([[0.0, 0, 9], [9, 0, 0]])
    logits[0, place] = torch.nan
    for label in range(3):
        counters = counted(logits, torch.tensor([label, 0]))
        assert counters.correct.tolist() == [1, 0, 0]
        assert counters.predicted.tolist() == [1, 0, 0]
        metrics = counters.compute(ClassStats.from_counts([1, 1, 1]))
        assert metrics["top1_accuracy"] == 0.5
        assert np.isnan(metrics["loss"])  # and is not hidden
    bins = CalibrationBins()
    bins.update(logits[:1], torch.tensor([place]))
    assert bins.compute() == {"expected_calibration_error": 1.0}


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_parts_add_to_the_whole(cuts: list[int], dtype: torch.dtype) -> None:
    logits, targets = random_batch(rows=60)
    logits = logits.to(dtype)
    whole, merged = counted(logits, targets), ClassCounters(7)
    whole_bins, merged_bins = CalibrationBins(), CalibrationBins()
    whole_bins.update(logits, targets)
    bounds = [0, *sorted(cuts), 60]
    for start, end in itertools.pairwise(bounds):
        merged.update(logits[start:end], targets[start:end])
        merged_bins.update(logits[start:end], targets[start:end])
    for name in ("correct", "total", "predicted"):
        assert torch.equal(getattr(whole, name), getattr(merged, name))
    assert merged.nll.item() == pytest.approx(whole.nll.item(), rel=1e-12)
    assert merged_bins.compute() == pytest.approx(whole_bins.compute())


class TwoAlike:
    """A second worker that counted the same."""

    world_size = 2

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value

    def max(self, value: torch.Tensor) -> torch.Tensor:
        return value


def test_counters_add_over_workers() -> None:
    counters = counted(*random_batch())
    reduced = counters.reduced(TwoAlike())
    for name in ("correct", "total", "predicted", "nll"):
        assert torch.equal(getattr(reduced, name), 2 * getattr(counters, name))
    bins = CalibrationBins()
    bins.update(*random_batch())
    assert torch.equal(bins.reduced(TwoAlike()).counts, 2 * bins.counts)


def test_reduced_counters_are_a_copy() -> None:
    counters = counted(*random_batch())
    before = counters.nll.item()
    alone = counters.reduced(SINGLE_WORKER)
    alone.update(*random_batch())
    assert counters.nll.item() == before
    assert counters.total.sum() == 200


def test_macro_scores_are_the_textbooks() -> None:
    logits, targets = random_batch(rows=400)
    guesses = logits.argmax(dim=1)
    precision, recall, f1 = [], [], []
    for c in range(7):
        hit = ((guesses == c) & (targets == c)).sum().item()
        p, r = hit / (guesses == c).sum().item(), hit / (targets == c).sum().item()
        precision.append(p)
        recall.append(r)
        f1.append(2 * p * r / (p + r))
    scores = counted(logits, targets).macro_scores()
    assert scores == pytest.approx(
        {"macro_precision": np.mean(precision), "macro_recall": np.mean(recall), "macro_f1": np.mean(f1)}
    )


def test_a_class_never_predicted_has_precision_0_and_one_without_rows_does_not_count() -> None:
    scores = macro_scores(correct=[2, 0, 0], predicted=[3, 0, 1], total=[2, 2, 0])
    assert scores == pytest.approx({"macro_precision": (2 / 3 + 0) / 2, "macro_recall": 0.5, "macro_f1": (4 / 5) / 2})


def test_macro_recall_is_balanced_accuracy() -> None:
    counters = counted(*random_batch())
    stats = ClassStats.from_counts([3] * 7)
    assert counters.macro_scores()["macro_recall"] == pytest.approx(counters.compute(stats)["balanced_accuracy"])


def test_per_class_accuracy_without_rows_is_nan() -> None:
    np.testing.assert_array_equal(per_class_accuracy([1, 0, 0], [2, 3, 0]), [0.5, 0, np.nan])


def logits_of(confidence: float, rows: int) -> torch.Tensor:
    return torch.tensor([[confidence, 1 - confidence]]).log().double().repeat(rows, 1)


def test_calibration_error_by_hand() -> None:
    bins = CalibrationBins(num_bins=10)
    bins.update(logits_of(0.75, 4), torch.tensor([0, 0, 0, 1]))  # 0.75 right of 0.75 sure
    assert bins.compute()["expected_calibration_error"] == pytest.approx(0, abs=1e-7)
    bins.update(logits_of(0.95, 4), torch.tensor([0, 0, 1, 1]))  # 0.5 right of 0.95 sure
    assert bins.compute()["expected_calibration_error"] == pytest.approx(0.5 * 0.45, abs=1e-6)


def test_calibration_bins_hold_their_upper_edge_and_certainty() -> None:
    bins = CalibrationBins(num_bins=10)
    bins.update(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # 0.5 exactly: the bin (0.4, 0.5]
    bins.update(torch.tensor([[1e4, -1e4]]), torch.tensor([0]))
    assert bins.counts[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_calibration_error_is_the_formula_on_random_logits() -> None:
    logits, targets = random_batch(rows=1000)
    bins = CalibrationBins()
    bins.update(logits, targets)
    probs = torch.softmax(logits, dim=1).numpy().astype(float)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == targets.numpy()
    error = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert bins.compute()["expected_calibration_error"] == pytest.approx(error, rel=1e-6)


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    generator = np.random.default_rng(0)
    chance, total = np.array([0.9, 0.5, 0.7]), np.array([40, 60, 80])
    draws = generator.binomial(total, chance, size=(4000, 3))
    measured = (draws / total).mean(axis=1).std()
    expected = np.mean([balanced_standard_error(draw, total) for draw in draws])
    assert expected == pytest.approx(measured, rel=0.08)


def test_the_standard_error_leaves_out_classes_without_rows_and_is_never_zero() -> None:
    some = balanced_standard_error(np.array([3, 0]), np.array([3, 0]))
    assert some == pytest.approx(np.sqrt(0.8 * 0.2 / 3))
