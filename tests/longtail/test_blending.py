"""Greedy blends against a plain implementation in float64, and what a blend does to the tail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail import blending
from imbvlm.longtail.blending import Blend, BlendPool, Candidate, held_out_scores, select_blend
from imbvlm.longtail.post_hoc_adjustment import balanced_log_likelihood, balanced_row_weights

COUNTS = (80, 40, 16, 8, 4)


def targets_of(counts: Sequence[int] = COUNTS) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def heads(
    targets: torch.Tensor, num: int = 6, passes: str = "a", seed: int = 0, noise: float = 1.5, num_classes: int = 5
) -> list[Candidate]:
    """Heads that share a signal and err apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(targets), num_classes)
    signal = 2 * torch.nn.functional.one_hot(targets, num_classes) + torch.randn(shape, generator=generator)
    return [
        Candidate(
            f"head {number}",
            passes[number % len(passes)],
            (number + 1) * (signal + noise * torch.randn(shape, generator=generator)),
        )
        for number in range(num)
    ]


def parts_of(targets: torch.Tensor, num: int = 5) -> torch.Tensor:
    return torch.arange(len(targets)) % num


def greedy_by_hand(pool: BlendPool, row_weights: torch.Tensor, max_members: int) -> list[int]:
    """Caruana's selection, one pass, as its paper has it."""
    calibrated = np.stack(
        [
            candidate.logits.double().numpy() / temperature
            for candidate, temperature in zip(pool.candidates, pool.temperatures, strict=True)
        ]
    )
    targets, weights = pool.targets.numpy(), row_weights.numpy()
    picks: list[int] = []
    best = -np.inf
    while len(picks) < blending.MAX_PICKS:
        scores = []
        for number in range(len(calibrated)):
            if len({*picks, number}) > max_members:
                scores.append(-np.inf)
                continue
            z = calibrated[[*picks, number]].mean(axis=0)
            scores.append(weights @ (z[np.arange(len(z)), targets] - np.log(np.exp(z).sum(axis=1))))
        if max(scores) <= best + blending.MIN_GAIN:
            break
        best = max(scores)
        picks.append(int(np.argmax(scores)))
    return sorted(picks)


@pytest.mark.parametrize("max_members", [1, 2, 8])
@pytest.mark.parametrize("seed", range(3))
def test_it_picks_what_a_plain_implementation_picks(seed: int, max_members: int) -> None:
    targets = targets_of()
    pool = BlendPool.fit(heads(targets, seed=seed), targets)
    weights = balanced_row_weights(targets)
    picks = pool.select(weights, 1, max_members)
    assert list(picks) == greedy_by_hand(pool, weights, max_members)
    assert len(set(picks)) <= max_members


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=5).filter(any),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_a_blend_of_anything_has_members_whose_weights_sum_to_one(
    counts: list[int], num: int, max_members: int, max_passes: int, seed: int
) -> None:
    """Classes without rows, one row in total, all rows of one class, parts without rows."""
    targets = targets_of(counts)
    candidates = heads(targets, num, passes="ab", seed=seed, num_classes=len(counts))
    blend = select_blend(
        BlendPool.fit(candidates, targets), parts_of(targets), max_members=max_members, max_passes=max_passes
    )
    assert sum(member.weight for member in blend.members) == pytest.approx(1)
    assert all(member.weight > 0 for member in blend.members)
    assert len(blend.members) <= max_members
    assert len({member.pass_name for member in blend.members}) <= max(blend.num_passes, 1)
    logits = {candidate.name: candidate.logits for candidate in candidates}
    score = balanced_log_likelihood(blend.combine(logits), targets)
    for member in blend.members:
        rest = [other for other in blend.members if other != member]
        total = sum(other.weight for other in rest)
        combined = sum(
            (other.weight / total / other.temperature * logits[other.name] for other in rest),
            torch.zeros(len(targets), len(counts)),
        )
        assert member.gain == pytest.approx(score - balanced_log_likelihood(combined, targets), abs=1e-4)


def test_a_blend_of_one_candidate_is_that_candidate() -> None:
    targets = targets_of()
    candidates = heads(targets, 1)
    blend = select_blend(BlendPool.fit(candidates, targets), parts_of(targets))
    assert [(member.name, member.weight) for member in blend.members] == [("head 0", 1.0)]
    assert blend.num_passes == 0
    scaled = candidates[0].logits / blend.members[0].temperature
    torch.testing.assert_close(blend.combine({"head 0": candidates[0].logits}), scaled)


def test_heads_that_err_apart_are_blended_and_the_same_head_twice_is_not() -> None:
    targets = targets_of()
    assert len(select_blend(BlendPool.fit(heads(targets), targets), parts_of(targets)).members) > 1
    head = heads(targets, 1)[0]
    twins = [head, Candidate("twin", head.pass_name, 3 * head.logits)]
    assert select_blend(BlendPool.fit(twins, targets), parts_of(targets)).num_passes == 0


def test_the_gain_is_that_of_what_other_parts_chose() -> None:
    """Two folds: each scores what the other chose, so that a choice of its own rows can't flatter it."""
    targets = targets_of((20, 10, 6))
    pool = BlendPool.fit(heads(targets, num_classes=3), targets)
    parts = parts_of(targets, 2)
    scores = held_out_scores(pool, parts, 0)
    for part in (0, 1):
        chosen, held = targets[parts != part], parts == part
        likelihoods = [
            balanced_log_likelihood(candidate.logits[~held] / temperature, chosen)
            for candidate, temperature in zip(pool.candidates, pool.temperatures, strict=True)
        ]
        best = int(np.argmax(likelihoods))
        logits = pool.candidates[best].logits[held].double() / pool.temperatures[best]
        expected = torch.log_softmax(logits, dim=1)[torch.arange(int(held.sum())), targets[held]]
        torch.testing.assert_close(scores[held], expected, rtol=1e-4, atol=1e-5)
    blend = select_blend(pool, parts)
    gains = held_out_scores(pool, parts, 1) - scores
    assert blend.decisions[0].gain == pytest.approx(float(balanced_row_weights(targets) @ gains))


def test_a_further_pass_must_gain_more_than_its_standard_error() -> None:
    targets = targets_of((300, 150, 60, 40, 30))
    apart = heads(targets, 2, passes="ab", noise=1.5)
    blend = select_blend(BlendPool.fit(apart, targets), parts_of(targets), max_passes=2)
    assert blend.num_passes == 2
    assert {member.pass_name for member in blend.members} == {"a", "b"}
    assert select_blend(BlendPool.fit(apart, targets), parts_of(targets), max_passes=1).num_passes < 2
    # The other pass knows the classes no better than chance.
    generator = torch.Generator().manual_seed(1)
    noise = Candidate("noise", "b", torch.randn(apart[0].logits.shape, generator=generator))
    assert select_blend(BlendPool.fit([apart[0], noise], targets), parts_of(targets), max_passes=2).num_passes == 0


def test_the_tail_survives_because_classes_count_alike() -> None:
    """Heads that lean to large classes win the plain log-likelihood and lose every small class."""
    targets = targets_of((400, 100, 8, 6, 4))
    prior = torch.bincount(targets).double().log()
    generator = torch.Generator().manual_seed(0)
    signal = 1.5 * (1.5 * torch.nn.functional.one_hot(targets, 5) + torch.randn(len(targets), 5, generator=generator))

    def head(name: str, tau: float) -> Candidate:
        return Candidate(name, "a", signal + tau * prior + 0.5 * torch.randn(len(targets), 5, generator=generator))

    pool = BlendPool.fit([head("fair", 0), head("fair too", 0), head("leans", 1), head("leans too", 1)], targets)

    def few_shot(row_weights: torch.Tensor) -> float:
        correct = pool.correct(pool.select(row_weights, 1)).double()
        return float(np.mean([correct[targets == label].mean() for label in (2, 3, 4)]))

    plain = few_shot(torch.full((len(targets),), 1 / len(targets), dtype=torch.float64))
    assert few_shot(balanced_row_weights(targets)) > plain + 0.2


def test_candidates_with_numbers_that_are_none_are_left_out() -> None:
    targets = targets_of()
    candidates = heads(targets, 3)
    candidates[1].logits[7, 2] = torch.nan
    candidates[2].logits[3, 0] = torch.inf
    blend = select_blend(BlendPool.fit(candidates, targets), parts_of(targets))
    assert [member.name for member in blend.members] == ["head 0"]
    with pytest.raises(ImbvlmError, match="finite logits, got none"):
        select_blend(BlendPool.fit(candidates[1:], targets), parts_of(targets))


def test_rows_in_blocks_and_forgotten_selections_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = targets_of()
    half = [Candidate(head.name, head.pass_name, head.logits.half()) for head in heads(targets, passes="ab", noise=2.5)]

    def blend() -> Blend:
        return select_blend(BlendPool.fit(half, targets), parts_of(targets), max_passes=2)

    whole = blend()
    monkeypatch.setattr(blending, "MAX_ELEMENTS", 7 * len(half) * 5)
    monkeypatch.setattr(blending, "MAX_REMEMBERED", 1)
    blocks = blend()
    for block, member in zip(blocks.members, whole.members, strict=True):
        assert (block.name, block.weight) == (member.name, member.weight)
        assert block.gain == pytest.approx(member.gain, abs=1e-6)


def test_the_strongest_candidates_are_those_of_highest_likelihood() -> None:
    targets = targets_of()
    pool = BlendPool.fit(heads(targets, 6), targets)
    row_weights = balanced_row_weights(targets)
    scores = {
        candidate.name: float(row_weights @ pool.log_likelihoods((number,)).double())
        for number, candidate in enumerate(pool.candidates)
    }
    strongest = pool.strongest(2)
    assert {candidate.name for candidate in strongest.candidates} == set(sorted(scores, key=scores.__getitem__)[-2:])
    assert strongest.select(row_weights, 0) == (
        [candidate.name for candidate in strongest.candidates].index(max(scores, key=scores.__getitem__)),
    )
    assert pool.strongest(6) is pool


def test_rows_that_are_predicted_correctly_are_those_of_the_combined_logits() -> None:
    targets = targets_of()
    candidates = heads(targets, noise=3)
    pool = BlendPool.fit(candidates, targets)
    blend = select_blend(pool, parts_of(targets))
    picks = pool.select(balanced_row_weights(targets), blend.num_passes)
    combined = blend.combine({candidate.name: candidate.logits for candidate in candidates})
    assert torch.equal(pool.correct(picks), combined.argmax(dim=1) == targets)


def test_candidates_of_other_images_and_equal_names_are_refused() -> None:
    targets = targets_of()
    first, second, *_ = heads(targets)
    with pytest.raises(ImbvlmError, match="same rows and classes"):
        BlendPool.fit([first, Candidate("short", "a", second.logits[1:])], targets)
    with pytest.raises(ImbvlmError, match="names of candidates must differ"):
        BlendPool.fit([first, first], targets)
    with pytest.raises(ImbvlmError, match="1 member and 1 pass or more, got 0 and 1"):
        select_blend(BlendPool.fit([first], targets), parts_of(targets), max_members=0)
