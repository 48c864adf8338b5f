"""ASHA apart for each method and second stage: a probe that learns fast must not stop a decoder that learns slowly."""

from __future__ import annotations

from collections.abc import Callable

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from imbvlm.base.schema import Tree
from imbvlm.sweep.spec.sweep_spec import AshaConfig


class AshaBrackets(FIFOScheduler):
    """Asks the bracket of the trial's method and second stage; baselines and refits (no bracket) run to their end."""

    def __init__(self, make: Callable[[], AsyncHyperBandScheduler]) -> None:
        super().__init__()
        self._make = make
        self._brackets: dict[tuple[str, str | None], AsyncHyperBandScheduler] = {}

    def _bracket(self, trial: Trial) -> TrialScheduler | None:
        record = trial.config["record"]
        if record["kind"] != "search":
            return None
        # A first stage that leaves the tail to its second stage must not be judged beside one that doesn't.
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
    """Rungs from `grace_fraction` of a trial's own length up, on the running maximum over epochs.

    Trials of other lengths are compared at the same share of theirs: half-way through its schedule a long trial isn't
    worse than a short one at its end.
    """

    def make() -> AsyncHyperBandScheduler:
        return AsyncHyperBandScheduler(
            time_attr="progress",
            metric=best_objective,
            mode="max",
            # 4 of 12 epochs must not miss the rung at a third by a rounding error.
            grace_period=config.grace_fraction - 1e-9,
            # Above every progress: a trial ends by itself.
            max_t=2.0,
            reduction_factor=config.reduction_factor,
        )

    return AshaBrackets(make)
