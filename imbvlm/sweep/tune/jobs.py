"""The jobs that Ray Tune runs: what each trains, where, and with which settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from ray.tune.search import Searcher

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.plan.feasibility import uses_ray_train
from imbvlm.sweep.records.adjustment_selection import prune_logits
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.refit_selection import refit_seconds
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.sweep.tune.unpickled import Unpickled
from imbvlm.training.trial_session import TrialSettings


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


class UnsavedSearcher(Unpickled, Searcher):
    """A searcher without saved state: a resumed sweep reads its trials' records instead."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class FixedJobs(UnsavedSearcher):
    """Hands out given jobs until time or money is used up; the sampler does not learn from them."""

    def __init__(self, jobs: list[Job], payload: Callable[[Job], Tree], budget: Budget) -> None:
        super().__init__(metric="epoch", mode="max")
        self._jobs = list(jobs)
        self._payload, self._budget = payload, budget

    def suggest(self, trial_id: str) -> Tree | str:
        if not self._jobs or self._budget.exhausted():
            return str(Searcher.FINISHED)
        return self._payload(self._jobs.pop(0))

    def on_trial_complete(self, trial_id: str, result: Tree | None = None, error: bool = False) -> None:
        """Report nothing to a sampler."""


@dataclass(frozen=True)
class RunContext:
    """What all jobs of a sweep share; up to `max_concurrent` of them run at once."""

    sweep: ResolvedSweep
    folder: str
    log: TrialLog
    console: Console
    max_concurrent: int
    budget: Budget
    num_classes: int

    @property
    def spec(self) -> SweepSpec:
        return self.sweep.spec

    @property
    def local_folder(self) -> Path:
        """The local folder for files that grow while the sweep runs, which an object store can't hold."""
        return local_folder(self.folder)

    @property
    def driver(self) -> str:
        """The driver of the sweep's trials."""
        return "ray_train" if uses_ray_train(self.sweep) else "in_process"

    def count_spent(self) -> None:
        """Write the used budget, and reserve a part of a limited one for the refits."""
        if self.budget.is_limited:
            self.budget.refit_seconds = refit_seconds(self.log, self.spec, self.max_concurrent)
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


def payload(context: RunContext, settings: Callable[[Job], TrialSettings]) -> Callable[[Job], Tree]:
    """Return the function that makes a job's Tune configuration, which carries it to the trial's process."""

    def of(job: Job) -> Tree:
        record = TrialRecord(
            trial_id=job.trial_id,
            kind=job.kind,
            name=job.name,
            config=job.config.to_tree(),
            draw=job.draw,
            driver=context.driver,
            num_threads=context.num_threads,
        )
        spec = context.spec
        return {
            "record": record.model_dump(mode="json"),
            "settings": settings(job).to_dict(),
            "resources": {
                "num_workers": spec.num_workers,
                "cpus_per_worker": spec.cpus_per_worker,
                "gpus_per_worker": spec.gpus_per_worker,
            },
            "alone": job.alone,
        }

    return of
