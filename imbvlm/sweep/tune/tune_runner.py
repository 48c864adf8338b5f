"""Runs jobs as Tune trials, in process or under Ray Train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.stopper import CombinedStopper

from imbvlm.base import interrupts, storage
from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.ray_runtime.cluster_resources import connected_cluster
from imbvlm.ray_runtime.environment import variables_set
from imbvlm.ray_runtime.job_records import JobRecords
from imbvlm.ray_runtime.ray_private import tune_patches
from imbvlm.sweep.plan.feasibility import DRIVER_CPUS, shortage
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialKind
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.in_process_trial import InProcessTrial
from imbvlm.sweep.tune.jobs import Job, JobSource, RunContext
from imbvlm.sweep.tune.monitoring import MetricsExporter
from imbvlm.sweep.tune.pack_members import MemberEvent, Members
from imbvlm.sweep.tune.progress_callback import ProgressCallback
from imbvlm.sweep.tune.ray_train_trial import ray_train_trial
from imbvlm.sweep.tune.trial_watchdog import CapacityWatch, TrialCleaner, TrialTimeout
from imbvlm.sweep.tune.tune_adapters import TuneScheduler, TuneSearcher
from imbvlm.training.trial_session import TrialSettings

RAY_FOLDER = "ray"
TUNE_SETTINGS = (
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
    # Ctrl-C ends the sweep. Tune would end the search alone, and the refit phase would read the test split.
    "TUNE_DISABLE_SIGINT_HANDLER",
    # A failed trial's report has no metrics, and the objective's name was checked with the specification.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING",
)


def run_jobs(
    context: RunContext,
    source: JobSource,
    settings: Callable[[Job], TrialSettings],
    brackets: AshaBrackets | None,
    kind: TrialKind,
    total: int,
    pack_size: Callable[[TrialConfig], int] = lambda config: 1,
) -> int:
    """Run a source's jobs and write their records; progress shows trials of `kind`, of which there are `total`.

    In process up to `pack_size(config)` trials train together. Returns the number of trials that need another run,
    since Tune gave them up before their restarts were spent.
    """
    spec = context.spec
    members = Members(storage.join(context.folder, RAY_FOLDER), settings)
    scheduler = None if brackets is None else TuneScheduler(brackets, members)
    # Opened before the trials: their processes must not start the actor.
    records = JobRecords.open()
    timeout = TrialTimeout(spec.max_trial_minutes, scheduler, records)
    metrics = MetricsExporter(spec, context.log, context.local_folder, context.folder.rpartition("/")[2])
    progress = ProgressCallback(
        context, members, kind, total, timeout.reasons, [metrics.update, end_listener(context, source, brackets)]
    )
    resources = {
        "num_workers": spec.num_workers,
        "cpus_per_worker": spec.cpus_per_worker,
        "gpus_per_worker": spec.gpus_per_worker,
    }
    tuner = tune.Tuner(
        tune.with_resources(*_trainable(context)),
        tune_config=tune.TuneConfig(
            search_alg=TuneSearcher(
                source,
                members,
                pack_size if context.driver == "in_process" else None,
                resources,
                # Who sets a size gets it from the first pack on.
                context.max_concurrent if spec.max_pack_size is None else None,
            ),
            scheduler=timeout,
            num_samples=-1,
            max_concurrent_trials=context.max_concurrent,
            reuse_actors=context.driver == "in_process",
            trial_dirname_creator=lambda trial: str(trial.config["trial_ids"][0]),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(context.local_folder.absolute() / RAY_FOLDER),
            stop=CombinedStopper(
                StopOnStorageError(progress), *([StopOnBudget(context.budget)] if kind == "search" else [])
            ),
            callbacks=[
                progress,
                metrics,
                TrialCleaner(records, context.driver),
                EndAtSignal(),
                CapacityWatch(lambda: shortage(context.sweep, connected_cluster()), context.console),
            ],
            failure_config=tune.FailureConfig(max_failures=spec.max_failures),
            verbose=0,
        ),
    )
    try:
        with tune_settings(), tune_patches(), interrupts.held():
            tuner.fit()
    except (OSError, tune.TuneError) as error:
        progress.storage_error = progress.storage_error or find_storage_error(error, context.folder)
        if progress.storage_error is None:
            raise
    finally:
        # On a full disk the error that ended the sweep is raised, and not that of writing the budget.
        with nullcontext() if progress.storage_error is None else suppress(storage.StorageError):
            context.budget.keep(now=True)
    if progress.storage_error is not None:
        raise progress.storage_error
    # A resumed sweep reads its own records and no snapshots of Tune.
    for folder in (context.folder, str(context.local_folder)):
        storage.delete(storage.join(folder, RAY_FOLDER))
    return progress.num_lost


def end_listener(
    context: RunContext, source: JobSource, brackets: AshaBrackets | None
) -> Callable[[MemberEvent], None]:
    """Return a function that reports ended trials to their source and to ASHA."""

    def report_end(event: MemberEvent) -> None:
        job = event.member.job
        if event.end == "finished" and event.report is not None and brackets is not None:
            brackets.complete(job, event.report)
        if event.end is not None:
            source.finished(job, [] if event.end in ("failed", "lost") else context.log.records[job.trial_id].epochs)

    return report_end


def tune_settings() -> AbstractContextManager[None]:
    """Within, the environment has Tune's settings; afterwards it is as before."""
    return variables_set(dict.fromkeys(TUNE_SETTINGS, "1"))


def find_storage_error(error: BaseException | None, folder: str) -> storage.StorageError | None:
    """Return the storage error behind an error of Tune, which hides what searcher, scheduler and callbacks raise."""
    while error is not None:
        if isinstance(error, storage.StorageError):
            return error
        # An OSError without a number is not about a file: Ray raises such errors for its own timeouts.
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            return storage.storage_error("write", folder, error)
        error = error.__cause__ or error.__context__
    return None


class EndAtSignal(tune.Callback):
    """Ends the sweep at Ctrl-C between two of Tune's steps, which take a tenth of a second each.

    Within a step Tune may take the interrupt for a trial's error, and the sweep would continue.
    """

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        interrupts.check()


class StopOnStorageError(tune.Stopper):
    """Ends the sweep once a record can't be written."""

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress = progress

    def __call__(self, trial_id: str, result: Tree) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._progress.storage_error is not None


class StopOnBudget(tune.Stopper):
    """Ends each trial at its next report once time or money is used up. Refits run to their end."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __call__(self, trial_id: str, result: Tree) -> bool:
        return self._budget.exhausted(keep_for_refits=True) is not None

    def stop_all(self) -> bool:
        return False


def _trainable(context: RunContext) -> tuple[object, object]:
    spec = context.spec
    if context.driver == "ray_train":
        return ray_train_trial, {"cpu": DRIVER_CPUS}
    resources = {"cpu": spec.cpus_per_worker}
    if spec.gpus_per_worker:
        resources["gpu"] = spec.gpus_per_worker
    return InProcessTrial, resources
