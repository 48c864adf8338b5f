"""ASHA for each method and second stage, so that a fast probe doesn't stop a slow decoder."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from imbvlm.sweep.spec.sweep_spec import AshaConfig
from imbvlm.sweep.tune.jobs import Job
from imbvlm.training.trial_session import TrialReport


class AshaBrackets:
    """One ASHA bracket for each method and second stage; baselines and refits have none and run to their end.

    Rungs begin at `grace_fraction` of a trial's own length and compare the running maximum of the objective. Trials of
    different lengths are compared at the same fraction of their schedules: a long trial halfway through is not compared
    with a short one at its end.
    """

    def __init__(self, config: AshaConfig, best_objective: str) -> None:
        self._config, self._best_objective = config, best_objective
        self._brackets: dict[tuple[str, str | None], AsyncHyperBandScheduler] = {}

    def _bracket(self, job: Job) -> AsyncHyperBandScheduler | None:
        if job.kind != "search":
            return None
        # A first stage may leave the tail to its second stage, so it is not compared with trials that have none.
        stage = job.config.second_stage
        key = (job.config.method, None if stage is None else stage.name)
        if key not in self._brackets:
            self._brackets[key] = AsyncHyperBandScheduler(
                time_attr="progress",
                metric=self._best_objective,
                mode="max",
                # A rounding error must not keep 4 of 12 epochs below the rung at 1/3.
                grace_period=self._config.grace_fraction - 1e-9,
                # Above the largest progress, since the trial ends without the scheduler.
                max_t=2.0,
                reduction_factor=self._config.reduction_factor,
            )
        return self._brackets[key]

    def add(self, job: Job) -> None:
        """Add a trial."""
        if (bracket := self._bracket(job)) is not None:
            bracket.on_trial_add(None, job)

    def should_stop(self, job: Job, report: TrialReport) -> bool:
        """Record a trial's progress, and return whether better ones leave no hope for it."""
        bracket = self._bracket(job)
        return bracket is not None and bracket.on_trial_result(None, job, _result(report)) == TrialScheduler.STOP

    def complete(self, job: Job, report: TrialReport) -> None:
        """Record a trial's last report."""
        if (bracket := self._bracket(job)) is not None:
            bracket.on_trial_complete(None, job, _result(report))


def _result(report: TrialReport) -> dict[str, Any]:
    return {"progress": report.progress, **report.metrics}
