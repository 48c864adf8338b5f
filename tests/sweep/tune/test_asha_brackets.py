"""ASHA: each method among its own, baselines and refits untouched, nobody stopped before a third of the budget."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from imbvlm.sweep.spec.sweep_spec import AshaConfig
from imbvlm.sweep.tune.asha_brackets import AshaBrackets, asha

BEST = "val/best_balanced_accuracy"
STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


def trial(trial_id: str, method: str = "decoder", kind: str = "search", stage: str | None = None) -> Trial:
    second_stage = None if stage is None else {"name": stage}
    record = {"kind": kind, "config": {"method": method, "second_stage": second_stage}}
    return Trial("trainable", config={"record": record}, trial_id=trial_id, stub=True)


def run(scheduler: AshaBrackets, one: Trial, value: float, num_epochs: int = 12) -> int:
    """Epochs until the scheduler stops a trial that always reports the same value."""
    scheduler.on_trial_add(None, one)
    for epoch in range(1, num_epochs + 1):
        result: dict[str, Any] = {"progress": epoch / num_epochs, BEST: value, "training_iteration": 1}
        if scheduler.on_trial_result(None, one, result) == STOP:
            return epoch
    scheduler.on_trial_complete(None, one, result)
    return num_epochs


def test_bad_trials_are_stopped_at_a_third_and_good_ones_run_to_their_end() -> None:
    scheduler = asha(AshaConfig(), BEST)
    ends = [run(scheduler, trial(f"t{number}"), value) for number, value in enumerate([0.5, 0.6, 0.7, 0.1, 0.8])]
    assert ends == [12, 12, 12, 4, 12]


def test_a_method_is_compared_with_its_own_kind_alone() -> None:
    scheduler = asha(AshaConfig(), BEST)
    for number in range(5):
        assert run(scheduler, trial(f"p{number}", "linear_probe"), 0.9 + number / 100) == 12
    assert run(scheduler, trial("d0", "decoder"), 0.1) == 12
    assert run(scheduler, trial("d1", "decoder"), 0.2) == 12
    assert run(scheduler, trial("p9", "linear_probe"), 0.1) == 4


def test_a_first_stage_that_leaves_the_tail_to_a_second_is_not_stopped_by_trials_without_one() -> None:
    scheduler = asha(AshaConfig(), BEST)
    for number in range(5):
        assert run(scheduler, trial(f"p{number}"), 0.9 + number / 100) == 12
    assert run(scheduler, trial("s0", stage="disalign"), 0.1) == 12
    assert run(scheduler, trial("s1", stage="marc"), 0.1) == 12
    assert run(scheduler, trial("p9"), 0.1) == 4


@pytest.mark.parametrize("kind", ["baseline", "refit"])
def test_baselines_and_refits_are_never_stopped_and_stop_nobody(kind: str) -> None:
    scheduler = asha(AshaConfig(), BEST)
    for number in range(5):
        assert run(scheduler, trial(f"k{number}", kind=kind), 0.9) == 12
    assert run(scheduler, trial("t0"), 0.1) == 12
    for number in range(1, 5):
        run(scheduler, trial(f"t{number}"), 0.5)
    assert run(scheduler, trial("k9", kind=kind), 0.0) == 12


@pytest.mark.parametrize(("longest", "grace"), [(1, 1), (2, 1), (3, 1), (9, 3), (12, 4), (20, 7), (30, 10)])
def test_grace_is_at_least_a_third(longest: int, grace: int) -> None:
    scheduler = asha(AshaConfig(), BEST)
    for number in range(4):
        run(scheduler, trial(f"t{number}"), 0.5 + number / 10, longest)
    assert run(scheduler, trial("bad"), 0.0, longest) == grace


def test_going_on_after_a_restart_counts_epochs_and_not_iterations() -> None:
    """Tune's training_iteration starts again at 1; the epoch goes on."""
    scheduler = asha(AshaConfig(), BEST)
    for number in range(4):
        run(scheduler, trial(f"t{number}"), 0.5 + number / 10)
    late = trial("late")
    scheduler.on_trial_add(None, late)
    assert scheduler.on_trial_result(None, late, {"progress": 5 / 12, BEST: 0.0, "training_iteration": 1}) == STOP


def test_a_failed_trial_has_no_metric_and_breaks_nothing() -> None:
    scheduler = asha(AshaConfig(), BEST)
    one = trial("t0")
    scheduler.on_trial_add(None, one)
    scheduler.on_trial_complete(None, one, {"epoch": 0, "failure": "the loss is NaN"})
    scheduler.on_trial_error(None, trial("t1"))
    assert run(scheduler, trial("t2"), 0.5) == 12


def test_trials_of_other_lengths_are_compared_at_the_same_share_of_theirs() -> None:
    """A long trial at 6 of 18 epochs meets short ones at 2 of 6, not at their end."""
    scheduler = asha(AshaConfig(), BEST)
    for number in range(4):
        short = trial(f"s{number}")
        scheduler.on_trial_add(None, short)
        assert scheduler.on_trial_result(None, short, {"progress": 2 / 6, BEST: 0.3}) == CONTINUE
        scheduler.on_trial_result(None, short, {"progress": 1.0, BEST: 0.9})
    long = trial("long")
    scheduler.on_trial_add(None, long)
    assert scheduler.on_trial_result(None, long, {"progress": 5 / 18, BEST: 0.1}) == CONTINUE
    assert scheduler.on_trial_result(None, long, {"progress": 6 / 18, BEST: 0.4}) == CONTINUE
