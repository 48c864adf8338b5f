"""ASHA: each method among its own, baselines and refits untouched, nobody stopped before a third of the budget."""

from __future__ import annotations

import pytest

from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.records.trial_log import TrialKind
from imbvlm.sweep.spec.sweep_spec import AshaConfig
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.jobs import Job
from imbvlm.training.trial_session import TrialReport

BEST = "val/best_balanced_accuracy"


def asha() -> AshaBrackets:
    return AshaBrackets(AshaConfig(), BEST)


def trial(trial_id: str, method: str = "decoder", kind: TrialKind = "search", stage: str | None = None) -> Job:
    second_stage = {} if stage is None else {"second_stage": {"name": stage}, "classifier": {"kind": "linear"}}
    tree = {"data": {"manifest": "m"}, "encoder": {"name": "e"}, "method": method, **second_stage}
    return Job(trial_id, kind, "", TrialConfig.from_tree(tree))


def report(progress: float, value: float) -> TrialReport:
    return TrialReport("", 1, 1, progress, {BEST: value})


def run(brackets: AshaBrackets, job: Job, value: float, num_epochs: int = 12) -> int:
    """Epochs until ASHA stops a trial that always reports the same value."""
    brackets.add(job)
    for epoch in range(1, num_epochs + 1):
        if brackets.should_stop(job, report(epoch / num_epochs, value)):
            return epoch
    brackets.complete(job, report(1.0, value))
    return num_epochs


def test_bad_trials_are_stopped_at_a_third_and_good_ones_run_to_their_end() -> None:
    brackets = asha()
    ends = [run(brackets, trial(f"t{number}"), value) for number, value in enumerate([0.5, 0.6, 0.7, 0.1, 0.8])]
    assert ends == [12, 12, 12, 4, 12]


def test_a_method_is_compared_with_its_own_kind_alone() -> None:
    brackets = asha()
    for number in range(5):
        assert run(brackets, trial(f"p{number}", "linear_probe"), 0.9 + number / 100) == 12
    assert run(brackets, trial("d0", "decoder"), 0.1) == 12
    assert run(brackets, trial("d1", "decoder"), 0.2) == 12
    assert run(brackets, trial("p9", "linear_probe"), 0.1) == 4


def test_a_first_stage_that_leaves_the_tail_to_a_second_is_not_stopped_by_trials_without_one() -> None:
    brackets = asha()
    for number in range(5):
        assert run(brackets, trial(f"p{number}"), 0.9 + number / 100) == 12
    assert run(brackets, trial("s0", stage="disalign"), 0.1) == 12
    assert run(brackets, trial("s1", stage="marc"), 0.1) == 12
    assert run(brackets, trial("p9"), 0.1) == 4


@pytest.mark.parametrize("kind", ["baseline", "refit"])
def test_baselines_and_refits_are_never_stopped_and_stop_nobody(kind: TrialKind) -> None:
    brackets = asha()
    for number in range(5):
        assert run(brackets, trial(f"k{number}", kind=kind), 0.9) == 12
    assert run(brackets, trial("t0"), 0.1) == 12
    for number in range(1, 5):
        run(brackets, trial(f"t{number}"), 0.5)
    assert run(brackets, trial("k9", kind=kind), 0.0) == 12


@pytest.mark.parametrize(("longest", "grace"), [(1, 1), (2, 1), (3, 1), (9, 3), (12, 4), (20, 7), (30, 10)])
def test_grace_is_at_least_a_third(longest: int, grace: int) -> None:
    brackets = asha()
    for number in range(4):
        run(brackets, trial(f"t{number}"), 0.5 + number / 10, longest)
    assert run(brackets, trial("bad"), 0.0, longest) == grace


def test_going_on_after_a_restart_counts_the_share_of_the_trial_and_not_reports() -> None:
    brackets = asha()
    for number in range(4):
        run(brackets, trial(f"t{number}"), 0.5 + number / 10)
    late = trial("late")
    brackets.add(late)
    assert brackets.should_stop(late, report(5 / 12, 0.0))


def test_a_trial_that_ends_without_a_report_breaks_nothing() -> None:
    brackets = asha()
    brackets.add(trial("t0"))
    assert run(brackets, trial("t2"), 0.5) == 12


def test_trials_of_other_lengths_are_compared_at_the_same_share_of_theirs() -> None:
    """A long trial at 6 of 18 epochs meets short ones at 2 of 6, not at their end."""
    brackets = asha()
    for number in range(4):
        short = trial(f"s{number}")
        brackets.add(short)
        assert not brackets.should_stop(short, report(2 / 6, 0.3))
        brackets.should_stop(short, report(1.0, 0.9))
    long = trial("long")
    brackets.add(long)
    assert not brackets.should_stop(long, report(5 / 18, 0.1))
    assert not brackets.should_stop(long, report(6 / 18, 0.4))
