"""The jobs that Ray Tune runs: what each trains, where, and with which settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import optuna

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.plan.feasibility import Driver, driver_of
from imbvlm.sweep.records.adjustment_selection import prune_logits
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.refit_selection import confirm_seconds, refit_seconds
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog
from imbvlm.sweep.spec.objectives import Epochs
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec


@dataclass
class AskedTrial:
    """An Optuna trial in the study that proposes, and its number in the journal, if there is one."""

    trial: optuna.trial.Trial
    journal_number: int | None


@dataclass
class Job:
    """One trial to run. `asked` is its Optuna trial, which baselines don't have; `alone` keeps it out of packs."""

    trial_id: str
    kind: TrialKind
    name: str
    config: TrialConfig
    draw: Params = field(default_factory=dict)
    asked: AskedTrial | None = None
    alone: bool = False

    @property
    def is_over_folds(self) -> bool:
        """Whether folds, or pairs of them, score a configuration again."""
        return self.kind in ("folds", "pairs")


class JobSource(Protocol):
    """Where the jobs of a run come from."""

    def next_job(self) -> Job | None:
        """The next job; None if there is none now."""

    def finished(self, job: Job, epochs: Epochs) -> None:
        """Receive the epochs of a job that has ended, none if it failed."""


class FixedJobs:
    """Hands out given jobs until time or money is used up, or, with `keep_for_refits`, all but that of the refits.

    The sampler does not learn from them.
    """

    def __init__(self, jobs: Sequence[Job], budget: Budget, *, keep_for_refits: bool = False) -> None:
        self._jobs, self._budget, self._keep_for_refits = list(jobs), budget, keep_for_refits

    def next_job(self) -> Job | None:
        if not self._jobs or self._budget.exhausted(keep_for_refits=self._keep_for_refits):
            return None
        return self._jobs.pop(0)

    def finished(self, job: Job, epochs: Epochs) -> None:
        """Learn nothing."""


@dataclass(frozen=True)
class RunContext:
    """What all jobs of a sweep share; up to `max_concurrent` of them run at once.

    `confirm_folds` is 1 where the best trials aren't scored again. `own_driver` is that of jobs
    which the search's driver doesn't run.
    """

    sweep: ResolvedSweep
    folder: str
    log: TrialLog
    console: Console
    max_concurrent: int
    budget: Budget
    num_classes: int
    confirm_folds: int = 1
    own_driver: Driver | None = None

    @property
    def spec(self) -> SweepSpec:
        return self.sweep.spec

    @property
    def driver(self) -> Driver:
        """The driver of the jobs."""
        return self.own_driver or driver_of(self.sweep)

    @property
    def local_folder(self) -> Path:
        """The local folder for files that grow while the sweep runs, which an object store can't hold."""
        return local_folder(self.folder)

    def count_spent(self, *, is_search: bool) -> None:
        """Write the used budget, and reserve a part of a limited one for what follows, the refits after all else."""
        if self.budget.is_limited:
            self.budget.refit_seconds = refit_seconds(self.log, self.spec, self.max_concurrent)
            folds = self.confirm_folds if is_search else 1
            self.budget.confirm_seconds = confirm_seconds(self.log, self.spec, folds, self.max_concurrent)
        self.budget.keep()

    def prune_logits(self, *, is_over: bool = False) -> None:
        """Delete validation logits that no selection will read; `is_over` if no trial runs."""
        prune_logits(self.folder, self.log, self.spec, is_over=is_over)

    @property
    def num_threads(self) -> int:
        """Torch threads of one worker."""
        return max(1, int(self.spec.cpus_per_worker))


def local_folder(folder: str) -> Path:
    """Return a local sweep's own folder, or a local folder of its name for a sweep in an object store."""
    return storage.local_path(folder) if storage.is_local(folder) else Path(folder.rstrip("/").rpartition("/")[2])
