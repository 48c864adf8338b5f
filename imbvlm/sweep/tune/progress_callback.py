"""The Tune callback, in the driver, that writes each trial's record and shows the live view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from imbvlm.base import storage
from imbvlm.base.errors import DiskFullError, StorageError
from imbvlm.base.formatting import pluralize
from imbvlm.sweep.records.trial_log import CHECKPOINTS_FOLDER, ENDED, TrialKind, TrialRecord
from imbvlm.sweep.tune.jobs import RunContext
from imbvlm.sweep.tune.live_status import Countdown, ProgressSnapshot, live_lines, seconds_left
from imbvlm.sweep.tune.pack_members import MemberEvent, Members, MemberTrial
from imbvlm.sweep.tune.unpickled import Unpickled
from imbvlm.training.trial_session import TrialReport, from_result

SAVE_AFTER_SECONDS = 20.0
# Texts of Tune and of Ray Train about a process that Ray killed on a machine without memory.
MEMORY_SIGNS = ("OutOfMemoryError", "node running low on memory")


class ProgressCallback(Unpickled, tune.Callback):
    """Takes the reports of all packs, and updates the trial log with what happens to their members.

    Then `listeners` receive each event. `ran_too_long` has the reasons of trials that timed out.
    """

    def __init__(
        self,
        context: RunContext,
        members: Members,
        kind: TrialKind,
        total: int,
        ran_too_long: Mapping[str, str],
        listeners: Sequence[Callable[[MemberEvent], None]] = (),
    ) -> None:
        self._context, self._members, self._listeners = context, members, listeners
        self._log, self._console, self._budget = context.log, context.console, context.budget
        self._kind, self._total, self._ran_too_long = kind, total, ran_too_long
        # Whether trials have ended in the present one of Tune's steps.
        self._has_ended = False
        # Trials that Tune gave up before their restarts were spent, which happens while it awaits no report, and trials
        # of packs, since another member may be the cause.
        self.num_lost = 0
        # The error of writing a record, after which no further result could be written.
        self.storage_error: StorageError | None = None
        self._started, self._countdown = time.monotonic(), Countdown()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if self._has_ended and self.storage_error is None:
            self._has_ended = False
            try:
                self._context.prune_logits()
            except StorageError as error:
                self.storage_error = error
        # Also between events, which may be minutes apart: the terminal may be resized, and time passes.
        self._show()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        for member in self._members.of(trial.trial_id):
            self._start(member)
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        for event in self._members.take(trial.trial_id, from_result(result)):
            if event.report is not None:
                self._add_epoch(event.report)
            self._handle(event)
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        for event in self._members.close(trial.trial_id):
            self._handle(event)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._note_full_disk(read_failures(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        failures = read_failures(trial)
        self._note_full_disk(failures)
        for event in self._members.close(trial.trial_id, is_lost=True):
            trial_id = event.member.trial_id
            # A reused process may die before it starts the trial, which then has no record yet.
            record = self._log.records.setdefault(trial_id, self._new_record(event.member))
            if trial_id in self._ran_too_long:
                record.state, record.stop_reason = "failed", self._ran_too_long[trial_id]
            else:
                self.num_lost += bool(event.member.pack) or trial.num_failures <= trial.max_failures
                record.state, record.stop_reason = "error", failure_cause(failures, record, self._sizes())
            self._handle(event)

    def _new_record(self, member: MemberTrial) -> TrialRecord:
        job = member.job
        return TrialRecord(
            trial_id=job.trial_id,
            kind=job.kind,
            name=job.name,
            config=job.config.to_tree(),
            draw=job.draw,
            started_at=time.time(),
            driver=self._context.driver,
            num_threads=self._context.num_threads,
            pack_size=member.pack_size,
            pack=member.pack,
        )

    def _sizes(self) -> str:
        """Describe, for errors about memory, what all trials have in common."""
        workers = pluralize(self._context.spec.num_workers, "worker")
        return f"{workers}, {pluralize(self._context.num_classes, 'class')}"

    def _start(self, member: MemberTrial) -> None:
        before = self._log.records.get(member.trial_id)
        if before is not None and before.state in ("paused", "error"):
            # The time of its pause doesn't count.
            before.started_at, before.ended_at = time.time() - before.seconds(), None
            before.pack_size, before.pack = member.pack_size, member.pack
            before.state, before.stop_reason = "running", ""
            self._save(before)
        elif before is None or before.state != "running":
            self._save(self._new_record(member))

    def _add_epoch(self, report: TrialReport) -> None:
        record = self._log.records[report.trial_id]
        if report.restart is not None:
            record.restart_reason = report.restart
            self._console.print(f"{record.trial_id} starts again from its first epoch: {record.restart_reason}")
        self._log.add_epoch(record.trial_id, report.values)
        # After a crash a trial continues from its checkpoint with its earlier epochs, and a short one starts again.
        if record.seconds() > SAVE_AFTER_SECONDS:
            self._save(record)

    def _handle(self, event: MemberEvent) -> None:
        if event.end is not None:
            record = self._log.records[event.member.trial_id]
            epoch = f"after epoch {int(record.epochs[-1]['epoch']) if record.epochs else 0}"
            if event.report is not None and event.report.failure is not None:
                record.state, record.stop_reason = "failed", event.report.failure
            elif event.end == "finished":
                record.state, record.stop_reason = "finished", "trained to its end"
            elif event.end == "closed" and self.storage_error is not None:
                # The full disk ended it with all others, and a resumed sweep continues it.
                return
            elif (
                event.end == "closed"
                and self._kind == "search"
                and (limit := self._budget.exhausted(keep_for_refits=True))
            ):
                record.state, record.stop_reason = "paused", f"by {limit} {epoch}"
            elif event.end != "lost":
                record.state, record.stop_reason = "stopped", f"by the trial scheduler {epoch}"
            self._end(record)
        for listener in self._listeners:
            listener(event)

    def _end(self, record: TrialRecord) -> None:
        record.ended_at = time.time()
        self._save(record)
        if record.state in ENDED and self.storage_error is None:
            self._remove_checkpoint(record)
        self._has_ended = True
        self._context.count_spent(is_search=self._kind == "search")
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

    def _note_full_disk(self, failures: str) -> None:
        """Note an error of a full disk: neither a restart nor another trial could write its checkpoint."""
        name = f"{DiskFullError.__module__}.{DiskFullError.__qualname__}: "
        full = f"{name}can't write {self._log.folder}/"
        for line in failures.splitlines():
            if full in line:
                self.storage_error = self.storage_error or DiskFullError(line.partition(name)[2].strip())

    def _show(self) -> None:
        if not self._console.is_due:
            return
        seconds, used = time.monotonic() - self._started, self._budget.describe()
        snapshot = ProgressSnapshot(self._kind, self._total, time.time(), seconds, used)
        self._countdown.update(seconds_left(self._log, snapshot), snapshot.now)
        self._console.update_live(
            live_lines(self._log, self._context.spec.objective, snapshot, self._countdown.seconds)
        )


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
