"""ASHA for each method and second stage, so that a fast probe doesn't stop a slow decoder."""

from __future__ import annotations

from collections.abc import Callable

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from imbvlm.base.schema import Tree
from imbvlm.sweep.spec.sweep_spec import AshaConfig


class AshaBrackets(FIFOScheduler):
    """One ASHA bracket for each method and second stage; baselines and refits have none and run to their end."""

    def __init__(self, make: Callable[[], AsyncHyperBandScheduler]) -> None:
        super().__init__()
        self._make = make
        self._brackets: dict[tuple[str, str | None], AsyncHyperBandScheduler] = {}

    def _bracket(self, trial: Trial) -> TrialScheduler | None:
        record = trial.config["record"]
        if record["kind"] != "search":
            return None
        # A first stage may leave the tail to its second stage, so it is not compared with trials that have none.
        stage = record["config"].get("second_stage") or {}
        kind = (record["config"]["method"], stage.get("name"))
        if kind not in self._brackets:
            self._brackets[kind] = self._make()
        return self._brackets[kind]

    def on_trial_add(self, tune_controller: object, trial: Trial) -> None:
        bracket = self._bracket(trial)
        if bracket is not None:
            bracket.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: object, trial: Trial, result: Tree) -> str:
        bracket = self._bracket(trial)
        return str(
            TrialScheduler.CONTINUE if bracket is None else bracket.on_trial_result(tune_controller, trial, result)
        )

    def on_trial_complete(self, tune_controller: object, trial: Trial, result: Tree) -> None:
        bracket = self._bracket(trial)
        if bracket is not None and not result.get("failure"):
            bracket.on_trial_complete(tune_controller, trial, result)


def asha(config: AshaConfig, best_objective: str) -> AshaBrackets:
    """Make rungs from `grace_fraction` of a trial's own length on, over the running maximum of the objective.

    Trials of different lengths are compared at the same fraction of their schedules: a long trial halfway through is
    not compared with a short one at its end.
    """

    def make() -> AsyncHyperBandScheduler:
        return AsyncHyperBandScheduler(
            time_attr="progress",
            metric=best_objective,
            mode="max",
            # A rounding error must not keep 4 of 12 epochs below the rung at 1/3.
            grace_period=config.grace_fraction - 1e-9,
            # Above the largest progress, since the trial ends without the scheduler.
            max_t=2.0,
            reduction_factor=config.reduction_factor,
        )

    return AshaBrackets(make)
