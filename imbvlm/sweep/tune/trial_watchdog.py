"""What Tune waits for without a word: a trial that hangs, and a cluster too small for any trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from imbvlm.base.console import Console
from imbvlm.base.schema import Tree
from imbvlm.ray_runtime.capacity_notice import LOOK_SECONDS, NoticeThrottle


class TrialTimeout(FIFOScheduler):
    """Ends trials that run longer than `minutes`; everything else is up to another scheduler, if there is one.

    Counted is the time on its workers, from the last time they were started: waiting for a machine isn't running.
    `reasons` has a sentence for each trial that was ended, by its id in the sweep. Of a pack nobody knows which of its
    trials hung: it has none, and they are lost trials that go on alone.
    """

    def __init__(self, minutes: float | None, scheduler: TrialScheduler | None) -> None:
        super().__init__()
        self._minutes, self._scheduler = minutes, scheduler or FIFOScheduler()
        self._running_since: dict[str, float] = {}
        self.reasons: dict[str, str] = {}

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        # Tune asks several times a second, whatever its trials do.
        if self._minutes is not None:
            self._check(tune_controller, self._minutes)
        return self._scheduler.choose_trial_to_run(tune_controller)

    def on_trial_add(self, tune_controller: object, trial: Trial) -> None:
        self._scheduler.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: object, trial: Trial, result: Tree) -> str:
        return str(self._scheduler.on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: object, trial: Trial, result: Tree) -> None:
        self._scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: object, trial: Trial) -> None:
        self._scheduler.on_trial_error(tune_controller, trial)

    def _check(self, tune_controller: Any, minutes: float) -> None:
        running = [trial for trial in tune_controller.get_live_trials() if trial.status == Trial.RUNNING]
        now = time.monotonic()
        self._running_since = {one.trial_id: self._running_since.get(one.trial_id, now) for one in running}
        for trial in running:
            # Of a pack's time each of its trials has a share.
            if now - self._running_since[trial.trial_id] > 60 * minutes * len(_names(trial)):
                self._end(tune_controller, trial, minutes)

    def _end(self, tune_controller: Any, trial: Trial, minutes: float) -> None:
        epoch = int((trial.last_result or {}).get("epoch", 0))
        names = _names(trial)
        pack = f"its pack of {len(names)} " if len(names) > 1 else ""
        reason = f"{pack}ran longer than max_trial_minutes {minutes:g}; its last report was of epoch {epoch}"
        if not pack:
            self.reasons[names[0]] = reason
        # Asked to stop, a process that hangs would be waited for, and then be handed to the next trial.
        actor = trial.temporary_state.ray_actor
        if actor is not None:
            ray.kill(actor)
        # It would hang again, so it isn't restarted. Tune's public stop_trial keeps the process for reuse.
        trial.max_failures = 0
        tune_controller._tune_controller._process_trial_failure(trial, TuneError(reason))


def _names(trial: Trial) -> list[str]:
    """The trials that a Tune trial is: itself, or the members of a pack."""
    return trial.config.get("names") or [str(trial.config["record"]["trial_id"])]


class CapacityWatch(tune.Callback):
    """Asks now and then what keeps every trial from running, and says it; `lacking` gives a sentence, or None.

    The sweep goes on to wait: another machine may come.
    """

    def __init__(self, lacking: Callable[[], str | None], console: Console) -> None:
        self._lacking, self._console = lacking, console
        self._looked_at, self._patience = time.monotonic(), NoticeThrottle()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore that we don't use.
        return {}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        # Tune takes a step several times a second, whatever its trials do.
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        if sentence := self._patience.to_say(self._lacking()):
            self._console.print(sentence)
