"""Epoch plans: exact class shares, reproducible from seed and epoch, the same for any number of workers."""

import time
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import ClassSampling
from imbvlm.longtail.class_sampling import EpochPlan, batches, epoch_plan, sampled_counts

SAMPLINGS = get_args(ClassSampling)
COUNTS = np.array([100, 36, 0, 9, 1])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))

every_sampling = pytest.mark.parametrize("class_sampling", SAMPLINGS)


def drawn(plan: EpochPlan, labels: np.ndarray = LABELS, num_classes: int = 5) -> np.ndarray:
    return np.bincount(labels[plan.rows], minlength=num_classes)


def test_expected_counts_are_the_formulas() -> None:
    total = COUNTS.sum()
    np.testing.assert_array_equal(sampled_counts(COUNTS, "instance_balanced", 0, 1), COUNTS)
    root = np.sqrt(COUNTS)
    np.testing.assert_allclose(sampled_counts(COUNTS, "square_root", 0, 1), total * root / root.sum())
    equal = np.array([1, 1, 0, 1, 1]) * total / 4
    np.testing.assert_allclose(sampled_counts(COUNTS, "class_balanced", 0, 1), equal)
    for epoch in range(5):
        share = epoch / 4
        expected = (1 - share) * COUNTS + share * equal
        np.testing.assert_allclose(sampled_counts(COUNTS, "progressively_balanced", epoch, 5), expected)
    np.testing.assert_array_equal(sampled_counts(COUNTS, "progressively_balanced", 0, 1), COUNTS)


@pytest.mark.parametrize(
    ("class_sampling", "epoch", "num_epochs"),
    [("instance_balanced", 3, 4), ("progressively_balanced", 0, 4), ("progressively_balanced", 0, 1)],
)
def test_instance_balanced_shows_every_row_exactly_once(class_sampling: str, epoch: int, num_epochs: int) -> None:
    plan = epoch_plan(LABELS, 5, class_sampling, seed=1, epoch=epoch, num_epochs=num_epochs)
    np.testing.assert_array_equal(np.sort(plan.rows), np.arange(len(LABELS)))
    assert not np.array_equal(plan.rows, np.arange(len(LABELS)))


def test_progressively_balanced_ends_class_balanced() -> None:
    last = epoch_plan(LABELS, 5, "progressively_balanced", seed=1, epoch=6, num_epochs=7)
    counts = drawn(last)
    assert counts[2] == 0
    assert np.ptp(counts[[0, 1, 3, 4]]) <= 1


labels_strategy = st.lists(st.integers(0, 6), min_size=1, max_size=80)


@every_sampling
@settings(max_examples=60, deadline=None)
@given(labels=labels_strategy, seed=st.integers(0, 2**70), epoch=st.integers(0, 3))
def test_any_labels_give_exact_quotas_in_cycles(
    class_sampling: ClassSampling, labels: list[int], seed: int, epoch: int
) -> None:
    labels = np.array(labels)
    plan = epoch_plan(labels, 7, class_sampling, seed, epoch, 4, num_views=3)
    counts = np.bincount(labels, minlength=7)
    expected = sampled_counts(counts, class_sampling, epoch, 4)
    assert expected.sum() == pytest.approx(len(labels))
    assert len(plan.rows) == len(labels)
    got = drawn(plan, labels, 7)
    assert np.abs(got - expected).max() < 1
    assert got[counts == 0].sum() == 0
    repeats = np.bincount(plan.rows, minlength=len(labels))
    for label in np.unique(labels):
        assert np.ptp(repeats[labels == label]) <= 1  # no row twice before every other came once
    assert plan.views.min() >= 0
    assert plan.views.max() < 3


@every_sampling
def test_the_same_seed_and_epoch_give_the_same_plan(class_sampling: ClassSampling) -> None:
    first = epoch_plan(LABELS, 5, class_sampling, 7, 2, 5, num_views=4)
    # Other plans drawn in between leave no trace.
    epoch_plan(LABELS, 5, class_sampling, 8, 0, 5)
    again = epoch_plan(LABELS.copy(), 5, class_sampling, 7, 2, 5, num_views=4)
    np.testing.assert_array_equal(first.rows, again.rows)
    np.testing.assert_array_equal(first.views, again.views)


def test_a_plan_stays_the_same_between_versions() -> None:
    """A resumed run continues the epoch order of the version that began it."""
    plan = epoch_plan([0, 0, 0, 1, 1, 2], 3, "class_balanced", seed=5, epoch=1, num_epochs=2, num_views=3)
    assert plan.rows.tolist() == [0, 5, 5, 4, 2, 3]
    assert plan.views.tolist() == [0, 2, 0, 0, 1, 0]


def test_seeds_and_epochs_are_independent_streams() -> None:
    plans = [
        tuple(epoch_plan(LABELS, 5, "instance_balanced", seed, epoch, 10**6).rows)
        for seed in (0, 1, 2, 2**32, 3 * 2**32 + 1, 2**64)
        for epoch in (0, 1, 2, 3)
    ]
    assert len(set(plans)) == len(plans)


def test_leftover_rows_fall_on_every_class_in_turn() -> None:
    """50 rows over 4 classes leave 2 over; always the same classes would be a bias."""
    labels = np.repeat(np.arange(4), [20, 15, 10, 5])
    counts = sum(drawn(epoch_plan(labels, 4, "class_balanced", seed, 0, 1), labels, 4) for seed in range(400))
    assert counts.sum() == 400 * 50
    np.testing.assert_allclose(counts / 400, 12.5, atol=0.1)


def test_over_many_epochs_rows_and_views_come_equally_often() -> None:
    seen = np.zeros((len(LABELS), 2))
    for epoch in range(300):
        plan = epoch_plan(LABELS, 5, "square_root", 0, epoch, 300, num_views=2)
        np.add.at(seen, (plan.rows, plan.views), 1)
    head = seen[LABELS == 0].sum(axis=1)
    assert head.std() / head.mean() < 0.15
    assert seen[:, 0].sum() == pytest.approx(seen[:, 1].sum(), rel=0.03)


def test_orders_are_uniform() -> None:
    first_places = [epoch_plan(LABELS, 5, "instance_balanced", 0, epoch, 2000).rows[0] for epoch in range(2000)]
    assert np.mean(first_places) == pytest.approx((len(LABELS) - 1) / 2, rel=0.06)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 200])
@pytest.mark.parametrize("batch_size", [1, 32, 50, 1000])
def test_global_batches_do_not_depend_on_the_number_of_workers(world_size: int, batch_size: int) -> None:
    plan = epoch_plan(LABELS, 5, "class_balanced", 0, 0, 1)
    whole = batches(plan, batch_size)
    ranks = [batches(plan, batch_size, rank, world_size) for rank in range(world_size)]
    assert len(whole) == -(-len(LABELS) // batch_size)
    np.testing.assert_array_equal(np.concatenate(whole), np.arange(len(LABELS)))
    for number, expected in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), expected)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        np.testing.assert_array_equal(parts[-1], expected[world_size - 1 :: world_size])


def test_no_rows_is_no_batches() -> None:
    plan = epoch_plan([], 5, "class_balanced", 0, 0, 1)
    assert len(plan) == 0
    assert batches(plan, 8) == []


def test_mistakes_are_refused() -> None:
    with pytest.raises(ImbvlmError, match="square_root"):
        epoch_plan(LABELS, 5, "sqare_root", 0, 0, 1)
    with pytest.raises(ImbvlmError, match="epoch must be"):
        epoch_plan(LABELS, 5, "square_root", 0, 3, 3)
    with pytest.raises(ImbvlmError, match="got 4"):
        epoch_plan(LABELS, 4, "square_root", 0, 0, 1)
    with pytest.raises(ImbvlmError, match="got -1"):
        epoch_plan([0, -1], 4, "square_root", 0, 0, 1)
    with pytest.raises(ImbvlmError, match="whole numbers"):
        epoch_plan([0.0, 1.0], 4, "square_root", 0, 0, 1)
    with pytest.raises(ImbvlmError, match="batch_size"):
        batches(EpochPlan(LABELS, LABELS), 0)
    with pytest.raises(ImbvlmError, match="rank"):
        batches(EpochPlan(LABELS, LABELS), 8, rank=2, world_size=2)


@every_sampling
def test_a_data_set_of_inaturalists_size_takes_well_under_a_second(class_sampling: ClassSampling) -> None:
    rng = np.random.default_rng(0)
    shape = 1.0 / np.arange(1, 8143) ** 0.7
    labels = rng.permutation(np.repeat(np.arange(8142), np.maximum(2, 437_513 * shape / shape.sum()).astype(int)))
    start = time.perf_counter()
    plan = epoch_plan(labels, 8142, class_sampling, 0, 1, 3, num_views=4)
    batches(plan, 256, 3, 8)
    assert time.perf_counter() - start < 1.0
    assert len(plan) == len(labels)
