"""Ends trials that hang, frees what ended ones held, and reports a cluster that is too small for any trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from imbvlm.base import interrupts
from imbvlm.base.console import Console
from imbvlm.base.schema import Tree
from imbvlm.ray_runtime.capacity_notice import LOOK_SECONDS, NoticeThrottle
from imbvlm.ray_runtime.job_records import JobRecords, process_key, workers_key
from imbvlm.sweep.plan.feasibility import Driver
from imbvlm.sweep.tune.unpickled import Unpickled

# Workers of an ended trial may still write their files. Ray's own cleaner frees them within seconds.
FREE_AFTER_SECONDS = 10.0
_FREE_LOOK_SECONDS = 0.1


class TrialTimeout(FIFOScheduler):
    """Ends trials that run longer than `minutes`, and leaves all else to another scheduler, if there is one.

    Only the time on workers since their last start counts, not the time of waiting for a machine. `reasons` has a
    sentence for each ended trial by its id in the sweep. It has none for the trials of a pack, of which any may hang:
    they are lost, and continue alone.
    """

    def __init__(self, minutes: float | None, scheduler: TrialScheduler | None, records: JobRecords) -> None:
        super().__init__()
        self._minutes, self._scheduler, self._records = minutes, scheduler or FIFOScheduler(), records
        self._running_since: dict[str, float] = {}
        # By Tune's id of the trial or pack, until Tune has noticed that its process is dead.
        self._killed: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        # Tune asks several times a second.
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
        if reason := self._killed.pop(trial.trial_id, None):
            # The last failure of its file, instead of Ray's sentence on a killed actor.
            trial.handle_error(TuneError(reason))
        self._scheduler.on_trial_error(tune_controller, trial)

    def _check(self, tune_controller: Any, minutes: float) -> None:
        running = [trial for trial in tune_controller.get_live_trials() if trial.status == Trial.RUNNING]
        now = time.monotonic()
        self._running_since = {trial.trial_id: self._running_since.get(trial.trial_id, now) for trial in running}
        for trial in running:
            # The trials of a pack share its time.
            is_late = now - self._running_since[trial.trial_id] > 60 * minutes * len(trial.config["trial_ids"])
            if is_late and trial.trial_id not in self._killed:
                self._kill(trial, minutes)

    def _kill(self, trial: Trial, minutes: float) -> None:
        epoch = int((trial.last_result or {}).get("epoch", 0))
        names = trial.config["trial_ids"]
        pack = f"its pack of {len(names)} " if len(names) > 1 else ""
        last = f"its last report was of epoch {epoch}. Raise the limit for trials that are slow"
        reason = f"{pack}ran longer than max_trial_minutes {minutes:g}; {last}"
        if not pack:
            self.reasons[names[0]] = reason
        # No restart: the trial would hang again.
        trial.max_failures = 0
        # Tune would wait for a hanging process that it asks to stop, and then reuse it for the next trial.
        for process in self._records.get(process_key(trial.trial_id)):
            ray.kill(process)
            self._killed[trial.trial_id] = reason


class CapacityWatch(Unpickled, tune.Callback):
    """Prints from time to time why no trial can run; `shortage` returns a sentence, or None.

    The sweep continues to wait, since another machine may join.
    """

    def __init__(self, shortage: Callable[[], str | None], console: Console) -> None:
        self._shortage, self._console = shortage, console
        self._checked_at, self._throttle = time.monotonic(), NoticeThrottle()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        # Tune takes a step several times a second.
        now = time.monotonic()
        if now - self._checked_at < LOOK_SECONDS:
            return
        self._checked_at = now
        if sentence := self._throttle.to_say(self._shortage()):
            self._console.print(sentence)


class TrialCleaner(Unpickled, tune.Callback):
    """Forgets the processes of ended trials, and frees the placement groups of their workers.

    Ray Train has a process for that after Tune has ended a trial. A machine without memory kills that process too, and
    the trial's CPUs and GPUs would stay reserved. Only trials under Ray Train have such groups.
    """

    def __init__(self, records: JobRecords, driver: Driver) -> None:
        self._records, self._driver = records, driver
        self._ended_at: dict[str, float] = {}

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._clean(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._clean(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended_at[trial.trial_id] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        now = time.monotonic()
        for trial_id in [key for key, at in self._ended_at.items() if now - at > FREE_AFTER_SECONDS]:
            self._clean(trial_id)
            del self._ended_at[trial_id]

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Free the last trials' workers, without which the next phase might wait forever."""
        if self._driver == "in_process":
            return
        for trial_id, ended_at in self._ended_at.items():
            groups = self._records.get(workers_key(trial_id))
            while any(map(_is_reserved, groups)) and time.monotonic() - ended_at <= FREE_AFTER_SECONDS:
                interrupts.check()
                time.sleep(_FREE_LOOK_SECONDS)
            self._clean(trial_id)

    def _clean(self, trial_id: str) -> None:
        for group in self._records.get(workers_key(trial_id)):
            remove_placement_group(group)
        for key in (process_key(trial_id), workers_key(trial_id)):
            self._records.delete(key)


def _is_reserved(group: PlacementGroup) -> bool:
    return placement_group_table(group).get("state", "REMOVED") != "REMOVED"
