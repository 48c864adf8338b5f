"""The trials in each process of a run: who trains with whom, who has reported, and who has ended.

Each Tune trial is a pack of one or several trials of the sweep. What its searcher, scheduler and callback need to know
of them stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from imbvlm.base import storage
from imbvlm.sweep.tune.in_process_trial import PackPayload
from imbvlm.sweep.tune.jobs import Job
from imbvlm.training.trial_session import TrialReport, TrialSettings

End = Literal["finished", "failed", "stopped", "closed", "lost"]


@dataclass(frozen=True)
class MemberTrial:
    """A trial in a process: `pack_size` trials share its seconds, and the first in a process of several is `pack`."""

    job: Job
    pack_size: int = 1
    pack: str = ""

    @property
    def trial_id(self) -> str:
        return self.job.trial_id


@dataclass(frozen=True)
class MemberEvent:
    """A member has reported, has ended, or both.

    The scheduler has `stopped` it, its process was `closed` from outside, or `lost`.
    """

    member: MemberTrial
    report: TrialReport | None = None
    end: End | None = None


@dataclass
class _Pack:
    """The members that have not ended by their trial ids, those that are to end with their next report, and ended."""

    members: dict[str, MemberTrial]
    stopped: set[str] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)


class Members:
    """The members of every Tune trial, by the Tune trial's id; `folder` has the files of ended members."""

    def __init__(self, folder: str, settings: Callable[[Job], TrialSettings]) -> None:
        self._folder, self._settings = folder, settings
        self._packs: dict[str, _Pack] = {}

    def open(self, tune_id: str, jobs: Sequence[Job]) -> PackPayload:
        """Register the jobs of a new process."""
        together = len(jobs) > 1 and all(may_train_with_others(job) for job in jobs)
        pack = jobs[0].trial_id if len(jobs) > 1 else ""
        # Baselines that train nothing end together, after the turn of the last one.
        num_untrained = sum(job.config.train is None for job in jobs)
        sizes = [len(jobs) if together else num_untrained if job.config.train is None else 1 for job in jobs]
        self._packs[tune_id] = _Pack(
            {job.trial_id: MemberTrial(job, size, pack) for job, size in zip(jobs, sizes, strict=True)}
        )
        return PackPayload(tuple(map(self._settings, jobs)), together, self._ended_file(tune_id))

    def of(self, tune_id: str) -> list[MemberTrial]:
        """Return the members that have not ended."""
        return list(self._packs[tune_id].members.values()) if tune_id in self._packs else []

    def stop(self, tune_id: str, trial_id: str) -> None:
        """End a member with the report that is taken next."""
        if tune_id in self._packs:
            self._packs[tune_id].stopped.add(trial_id)

    def take(self, tune_id: str, reports: Sequence[TrialReport]) -> list[MemberEvent]:
        """Return what the reports of a process mean; those of members that have ended before mean nothing.

        The process reads from a file which members have ended, before its next epoch and after a restart.
        """
        pack = self._packs.get(tune_id)
        if pack is None:
            return []
        events = [
            MemberEvent(pack.members[report.trial_id], report, _end(report, is_stopped=report.trial_id in pack.stopped))
            for report in reports
            if report.trial_id in pack.members
        ]
        ended = [event.member.trial_id for event in events if event.end is not None]
        for trial_id in ended:
            del pack.members[trial_id]
        pack.ended += ended
        if ended and pack.members:
            storage.write_json(self._ended_file(tune_id), pack.ended)
        return events

    def close(self, tune_id: str, *, is_lost: bool = False) -> list[MemberEvent]:
        """Return the ends of all members that have not ended."""
        pack = self._packs.pop(tune_id, None)
        return (
            []
            if pack is None
            else [MemberEvent(member, end="lost" if is_lost else "closed") for member in pack.members.values()]
        )

    def _ended_file(self, tune_id: str) -> str:
        return storage.join(self._folder, f"ended-{tune_id}.json")


def may_train_with_others(job: Job) -> bool:
    """Return whether a trial may join a pack: baselines end by their patience, restarted trials are at any epoch."""
    return not job.alone and (job.kind == "search" or (job.is_over_folds and job.config.train is not None))


def _end(report: TrialReport, *, is_stopped: bool) -> End | None:
    if report.failure is not None:
        return "failed"
    if report.has_finished:
        return "finished"
    return "stopped" if is_stopped else None
