"""The Tune callback, in the driver, that writes each trial's record and shows the live view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.errors import DiskFullError, StorageError
from imbvlm.base.schema import Tree
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import CHECKPOINTS_FOLDER, ENDED, TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.tune.live_status import Countdown, ProgressSnapshot, live_lines, seconds_left
from imbvlm.sweep.tune.unpickled import Unpickled

NUMBER = (int, float)
SAVE_AFTER_SECONDS = 20.0
# Texts of Tune and of Ray Train about a process that Ray killed on a machine without memory.
MEMORY_SIGNS = ("OutOfMemoryError", "node running low on memory")


class ProgressCallback(Unpickled, tune.Callback):
    """Updates the trial log with Tune's reports; `ran_too_long` has the reasons of trials that timed out.

    `sizes` describes, for errors about memory, what all trials have in common.
    """

    def __init__(
        self,
        log: TrialLog,
        console: Console,
        best_objective: str,
        kind: TrialKind,
        total: int,
        budget: Budget,
        after_end: Callable[[], None],
        after_step: Callable[[], None],
        ran_too_long: Mapping[str, str],
        sizes: str,
    ) -> None:
        self._budget, self._ran_too_long, self._sizes = budget, ran_too_long, sizes
        # Called when a trial has ended, and after each of Tune's steps in which trials have ended.
        self._after_end, self._after_step, self._has_ended = after_end, after_step, False
        # Trials that Tune gave up before their restarts were spent, which happens while it awaits no report, and trials
        # of packs, since another member may be the cause.
        self.num_lost = 0
        # The error of writing a record, after which no further result could be written.
        self.storage_error: StorageError | None = None
        self._log, self._console, self._objective = log, console, best_objective
        self._kind, self._total = kind, total
        self._started, self._countdown = time.monotonic(), Countdown()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if self._has_ended and self.storage_error is None:
            self._has_ended = False
            try:
                self._after_step()
            except StorageError as error:
                self.storage_error = error
        # Also between events, which may be minutes apart: the terminal may be resized, and time passes.
        self._show()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        record = TrialRecord.model_validate({**trial.config["record"], "started_at": time.time()})
        before = self._log.records.get(record.trial_id)
        if before is not None and before.state in ("paused", "error"):
            # The time of its pause doesn't count.
            before.started_at, before.ended_at = time.time() - before.seconds(), None
            before.pack_size, before.pack = record.pack_size, record.pack
            before.state, before.stop_reason = "running", ""
            self._save(before)
        elif before is None or before.state != "running":
            self._save(record)
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: Tree, **info: Any) -> None:
        # A trial's own keys are `epoch`, `step` and those with a slash. Tune adds others.
        metrics = {
            key: float(value)
            for key, value in result.items()
            if isinstance(value, NUMBER) and not isinstance(value, bool)
            if key in ("epoch", "step") or ("/" in key and not key.startswith("config/"))
        }
        record = self._log.records[_id(trial)]
        if result.get("restart"):
            record.restart_reason = str(result["restart"])
            self._console.print(f"{record.trial_id} starts again from its first epoch: {record.restart_reason}")
        self._log.add_epoch(record.trial_id, metrics)
        # After a crash a trial continues from its checkpoint with its earlier epochs, and a short one starts again.
        if record.seconds() > SAVE_AFTER_SECONDS:
            self._save(record)
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result or {}
        record = self._log.records[_id(trial)]
        if result.get("failure"):
            record.state, record.stop_reason = "failed", str(result["failure"])
        elif result.get("done_training"):
            record.state, record.stop_reason = "finished", "trained to its end"
        elif self.storage_error is not None:
            # The full disk ended it with all others, and a resumed sweep continues it.
            return
        elif self._kind == "search" and (limit := self._budget.exhausted(keep_for_refits=True)):
            record.state, record.stop_reason = "paused", f"by {limit} after epoch {result.get('epoch')}"
        else:
            record.state, record.stop_reason = "stopped", f"by the trial scheduler after epoch {result.get('epoch')}"
        self._end(record)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._note_full_disk(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._note_full_disk(trial)
        # A reused process may die before it starts the trial, which then has no record yet.
        new = TrialRecord.model_validate({**trial.config["record"], "started_at": time.time()})
        record = self._log.records.get(_id(trial), new)
        if record.trial_id in self._ran_too_long:
            record.state, record.stop_reason = "failed", self._ran_too_long[record.trial_id]
        else:
            self.num_lost += trial.run_metadata.num_failures <= trial.max_failures
            record.state, record.stop_reason = "error", failure_cause(read_failures(trial), record, self._sizes)
        self._end(record)

    def _end(self, record: TrialRecord) -> None:
        record.ended_at = time.time()
        self._save(record)
        if record.state in ENDED and self.storage_error is None:
            self._remove_checkpoint(record)
        self._has_ended = True
        self._after_end()
        self._show()

    def _save(self, record: TrialRecord) -> None:
        # Tune would take an error here for the trial's own failure.
        try:
            self._log.save(record)
        except StorageError as error:
            self.storage_error = self.storage_error or error

    def _remove_checkpoint(self, record: TrialRecord) -> None:
        """Delete an ended trial's checkpoint, which for a fine-tuned encoder is as large as several models."""
        try:
            storage.delete(storage.join(self._log.folder, CHECKPOINTS_FOLDER, record.trial_id))
        except StorageError as error:
            self.storage_error = error

    def _note_full_disk(self, trial: Trial) -> None:
        """Note an error of a full disk: neither a restart nor another trial could write its checkpoint."""
        name = f"{DiskFullError.__module__}.{DiskFullError.__qualname__}: "
        full = f"{name}can't write {self._log.folder}/"
        for line in read_failures(trial).splitlines():
            if full in line:
                self.storage_error = self.storage_error or DiskFullError(line.partition(name)[2].strip())

    def _show(self) -> None:
        if not self._console.is_due:
            return
        seconds, used = time.monotonic() - self._started, self._budget.describe()
        snapshot = ProgressSnapshot(self._kind, self._total, time.time(), seconds, used)
        self._countdown.update(seconds_left(self._log, snapshot), snapshot.now)
        objective = self._objective.replace("best_", "")
        self._console.update_live(live_lines(self._log, objective, snapshot, self._countdown.seconds))


def _id(trial: Trial) -> str:
    return str(trial.config["record"]["trial_id"])


def read_failures(trial: Trial) -> str:
    """Return Tune's file of a trial's failures; its copy in the sweep's folder comes later, if the disk has room."""
    path = None if trial.error_file is None else Path(trial.error_file)
    return path.read_text() if path is not None and path.exists() else ""


def failure_cause(failures: str, record: TrialRecord, sizes: str) -> str:
    """Return the last line of the last failure's traceback, or a sentence on memory that names what to lower."""
    error = failures.rpartition("\nFailure # ")[2]
    # The first line is the time of the failure.
    lines = [line.strip() for line in error.splitlines()[1:] if line.strip()]
    if not lines:
        return "its worker was lost"
    if any(sign in error for sign in MEMORY_SIGNS):
        batch_size = (record.config.get("train") or {}).get("batch_size")
        width = (record.config.get("decoder") or {}).get("width")
        decoder = "" if width is None else f" or decoder.width ({width})"
        return (
            f"its machine ran out of memory with train.batch_size {batch_size} over {sizes}; lower train.batch_size"
            f"{decoder}, or run fewer trials at once (max_concurrent_trials)"
        )
    return lines[-1][:500]
