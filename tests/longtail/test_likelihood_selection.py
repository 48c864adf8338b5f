"""tau and temperature together, against a search on a grid, and where a tau is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.longtail.likelihood_selection import fit_prior, select_by_likelihood, select_tau_by_likelihood
from imbvlm.longtail.post_hoc_adjustment import (
    TAUS,
    adjust_logits,
    balanced_log_likelihood,
    balanced_row_weights,
    best_temperature,
)

COUNTS = torch.tensor([400, 100, 20, 5, 1])


def rows(num_each: int = 60, tau: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that favor frequent classes by `tau` log prior, with errors."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(len(COUNTS)).repeat_interleave(num_each)
    signal = 2 * torch.nn.functional.one_hot(targets, len(COUNTS)) + 1.5 * torch.randn(
        len(targets), len(COUNTS), generator=generator
    )
    return adjust_logits(signal, COUNTS, -tau), targets


def score(logits: torch.Tensor, targets: torch.Tensor, tau: float) -> float:
    adjusted = adjust_logits(logits, COUNTS, tau)
    temperature = best_temperature(adjusted, targets, row_weights=balanced_row_weights(targets))
    return balanced_log_likelihood(adjusted.double() / temperature, targets)


@pytest.mark.parametrize("tau", [-0.5, 0.0, 0.7, 1.0, 1.6])
def test_it_is_the_best_of_a_grid(tau: float) -> None:
    logits, targets = rows(tau=tau)
    selection = select_tau_by_likelihood(logits, targets, COUNTS)
    scores = {value: score(logits, targets, value) for value in TAUS}
    best = max(scores, key=lambda value: scores[value])
    assert fit_prior(logits, targets, COUNTS) == pytest.approx(best, abs=0.06)
    assert score(logits, targets, selection.value) >= max(scores.values()) - 1e-6
    assert selection.gain == pytest.approx(score(logits, targets, selection.value) - scores[0.0], abs=1e-5)


def test_rows_of_folds_use_the_counts_of_their_own_training() -> None:
    logits, targets = rows()
    folds = torch.arange(len(targets)) % 3
    equal = COUNTS.expand(len(targets), -1)
    assert fit_prior(logits, targets, equal) == pytest.approx(fit_prior(logits, targets, COUNTS), abs=1e-5)
    # Each fold's own prior was added: by it alone the logits become those without a prior.
    by_fold = torch.stack([COUNTS, COUNTS.flip(0), COUNTS.roll(2)])
    signal = adjust_logits(logits, COUNTS, 1.0)
    selection = select_tau_by_likelihood(adjust_logits(signal, by_fold[folds], -1.0), targets, by_fold[folds])
    plain = select_tau_by_likelihood(signal, targets, COUNTS)
    assert plain.accepted == 0.0
    assert selection.accepted == pytest.approx(1.0, abs=0.15)


def test_a_tau_within_its_error_stays_at_0() -> None:
    logits, targets = rows(num_each=3, tau=0.0, seed=5)
    selection = select_tau_by_likelihood(logits, targets, COUNTS)
    assert selection.gain <= selection.standard_error
    assert selection.accepted == 0.0


def test_a_tau_outside_the_range_is_put_at_its_bound() -> None:
    logits, targets = rows(tau=4.0)
    assert fit_prior(logits, targets, COUNTS) == TAUS[-1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(1, 12),
    scale=st.sampled_from([1e-3, 1.0, 50.0, 3e3]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_odd_rows_give_a_finite_answer_that_is_no_worse(
    seed: int, num_rows: int, scale: float, dtype: torch.dtype
) -> None:
    """A single row, rows of one class, rows that are all correct, logits near the end of half precision."""
    rng = np.random.default_rng(seed)
    targets = torch.from_numpy(rng.integers(0, rng.integers(1, len(COUNTS) + 1), num_rows))
    logits = torch.from_numpy(scale * rng.standard_normal((num_rows, len(COUNTS)))).to(dtype)
    selection = select_tau_by_likelihood(logits, targets, COUNTS)
    assert TAUS[0] <= selection.value <= TAUS[-1]
    assert np.isfinite([selection.gain, selection.standard_error]).all()
    assert selection.gain >= 0


def test_the_share_of_other_logits_is_that_of_the_highest_likelihood() -> None:
    """Half of the noise is in each: the mean of both is better than either."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(5).repeat_interleave(80)
    signal = 2.0 * torch.nn.functional.one_hot(targets, 5)
    first, second = (signal + 2 * torch.randn(400, 5, generator=generator) for _ in range(2))
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    selection = select_by_likelihood(shares, targets, lambda share: (1 - share) * first + share * second)
    assert selection.value == 0.5
    assert selection.accepted == 0.5
    weights = balanced_row_weights(targets)
    for share, value in selection.candidates:
        mixed = (1 - share) * first + share * second
        temperature = best_temperature(mixed, targets, row_weights=weights)
        assert value == pytest.approx(balanced_log_likelihood(mixed.double() / temperature, targets), abs=1e-6)
