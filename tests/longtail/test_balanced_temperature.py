"""Class-balanced log-likelihood and its temperature, against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail import post_hoc_adjustment
from imbvlm.longtail.post_hoc_adjustment import (
    balanced_log_likelihood,
    balanced_row_weights,
    best_temperature,
    log_likelihoods,
)

COUNTS = [60, 20, 8, 4, 0]


def rows(counts: list[int], seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    logits = torch.randn(len(targets), len(counts), generator=generator, dtype=torch.float64)
    logits[torch.arange(len(targets)), targets] += 1
    return scale * logits, targets


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> float:
    z, y = logits.double().numpy(), targets.numpy()
    z = z - z.max(axis=1, keepdims=True)
    right = z[np.arange(len(y)), y] - np.log(np.exp(z).sum(axis=1))
    return float(np.mean([right[y == label].mean() for label in np.unique(y)]))


def balanced_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return best_temperature(logits, targets, row_weights=balanced_row_weights(targets))


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any), st.integers(0, 9))
def test_the_likelihood_is_the_mean_over_the_classes_that_have_rows(counts: list[int], seed: int) -> None:
    logits, targets = rows(counts, seed)
    assert balanced_log_likelihood(logits, targets) == pytest.approx(by_hand(logits, targets), rel=1e-12)
    weights = balanced_row_weights(targets)
    assert float(weights.sum()) == pytest.approx(1)
    for label in range(len(counts)):
        share = float(weights[targets == label].sum())
        assert share == pytest.approx(1 / np.count_nonzero(counts) if counts[label] else 0)


def test_with_equal_counts_it_is_the_mean_log_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_hoc_adjustment, "CHUNK_SIZE", 7)
    logits, targets = rows([9, 9, 9])
    assert balanced_log_likelihood(logits, targets) == pytest.approx(float(log_likelihoods(logits, targets).mean()))
    assert balanced_temperature(logits, targets) == pytest.approx(best_temperature(logits, targets))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(any), st.floats(0.2, 20), st.integers(0, 9))
def test_no_other_temperature_has_a_higher_likelihood(counts: list[int], scale: float, seed: int) -> None:
    logits, targets = rows(counts, seed, scale)
    best = by_hand(logits / balanced_temperature(logits, targets), targets)
    others = np.geomspace(0.01, 100, 200)
    assert best >= max(by_hand(logits / other, targets) for other in others) - 1e-6


def test_rows_of_large_classes_do_not_set_the_temperature() -> None:
    """Sure and right on the head, sure and wrong on the tail: plain cross entropy sees the head alone."""
    logits = torch.tensor([[8.0, 0.0]] * 1000 + [[8.0, 0.0], [0.0, 8.0]] * 2, dtype=torch.float64)
    targets = torch.tensor([0] * 1000 + [1] * 4)
    assert best_temperature(logits, targets) < 2
    assert balanced_temperature(logits, targets) > 5


def test_rows_are_needed_and_numbers_too() -> None:
    with pytest.raises(ImbvlmError, match="needs validation rows"):
        balanced_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ImbvlmError, match="must be finite"):
        balanced_temperature(torch.tensor([[np.nan, 0.0]]), torch.tensor([0]))
