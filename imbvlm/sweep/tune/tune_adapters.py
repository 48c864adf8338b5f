"""What Ray Tune calls: a searcher that starts packs of jobs, and a scheduler that stops their members."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.spec.baselines import BASELINES_PER_ENCODER, feature_key
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.jobs import Job, JobSource
from imbvlm.sweep.tune.pack_members import Members, may_train_with_others
from imbvlm.sweep.tune.unpickled import Unpickled
from imbvlm.training.trial_pack import pack_key
from imbvlm.training.trial_session import from_result

# How much larger a process's next pack may be while a search begins. On a CPU two probes together take as long as one
# after the other, and four 0.6 to 0.7 of that (tests/benchmarks/RESULTS.md).
PACK_GROWTH = 4


@dataclass(frozen=True)
class _Waiting:
    """A job that is not handed out yet; up to `size` jobs of its `key` may share a process."""

    job: Job
    key: str | None
    size: int


class TuneSearcher(Unpickled, Searcher):
    """Asks a source for jobs in advance, and hands out those of one `pack_key` as one Tune trial.

    `pack_size` gives the size of a configuration's pack; None lets each job have a process of its own. The baselines of
    an encoder share a process too, although each trains alone: they take seconds, and Tune would start a process for
    each of them. With `at_once`, the number of processes, each of these begins the search with packs of 1, 4, 16, ...
    trials, since a pack's first result takes as long as its last. `resources` are those of a trial's workers. Nothing
    is saved: a resumed sweep reads its records.
    """

    def __init__(
        self,
        source: JobSource,
        members: Members,
        pack_size: Callable[[TrialConfig], int] | None,
        resources: dict[str, float],
        at_once: int | None = None,
    ) -> None:
        super().__init__(metric="epoch", mode="max")
        self._source, self._members, self._pack_size, self._resources = source, members, pack_size, resources
        self._at_once, self._num_search_packs = at_once, 0
        self._waiting: list[_Waiting] = []

    def suggest(self, trial_id: str) -> Tree | str:
        if not self._waiting and not self._ask():
            return str(Searcher.FINISHED)
        first = self._waiting[0]
        size = first.size
        if first.job.kind == "search" and self._at_once is not None:
            size = min(size, PACK_GROWTH ** (self._num_search_packs // self._at_once))
            self._num_search_packs += 1
        while first.key is not None and len(self._waiting) < size and self._ask():
            pass
        together = [waiting for waiting in self._waiting[1:] if first.key is not None and waiting.key == first.key]
        group = [first, *together[: size - 1]]
        self._waiting = [waiting for waiting in self._waiting if not any(waiting is taken for taken in group)]
        jobs = [waiting.job for waiting in group]
        payload = self._members.open(trial_id, jobs).encode()
        return {"trial_ids": [job.trial_id for job in jobs], "payload": payload, "resources": self._resources}

    def _ask(self) -> bool:
        """Put one more job into the waiting list; return False if there is none."""
        job = self._source.next_job()
        if job is None:
            return False
        key, size = None, 1
        if self._pack_size is None:
            pass
        elif not job.alone and (job.kind == "baseline" or (job.is_over_folds and job.config.train is None)):
            key, size = f"baselines of {feature_key(job.config)}", BASELINES_PER_ENCODER
        elif may_train_with_others(job) and (size := self._pack_size(job.config)) > 1:
            key = pack_key(job.config)
        self._waiting.append(_Waiting(job, key, size))
        return True

    def on_trial_complete(self, trial_id: str, result: Tree | None = None, error: bool = False) -> None:
        """Do nothing: the source hears of each member's end."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class TuneScheduler(Unpickled, FIFOScheduler):
    """Asks ASHA whether a member stops; a pack ends with its last member."""

    def __init__(self, brackets: AshaBrackets, members: Members) -> None:
        super().__init__()
        self._brackets, self._members = brackets, members

    def on_trial_add(self, tune_controller: object, trial: Trial) -> None:
        for member in self._members.of(trial.trial_id):
            self._brackets.add(member.job)

    def on_trial_result(self, tune_controller: object, trial: Trial, result: dict[str, Any]) -> str:
        jobs = {member.trial_id: member.job for member in self._members.of(trial.trial_id)}
        for report in from_result(result):
            job = jobs.get(report.trial_id)
            if job is None:
                continue
            if report.is_last:
                del jobs[report.trial_id]
            elif self._brackets.should_stop(job, report):
                del jobs[report.trial_id]
                self._members.stop(trial.trial_id, report.trial_id)
        return str(TrialScheduler.CONTINUE if jobs else TrialScheduler.STOP)
