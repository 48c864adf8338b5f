"""Runs jobs as Tune trials, in process or under Ray Train; the rest of the project sees only `run_jobs`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.execution import class_cache, tune_controller
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import CombinedStopper

from imbvlm.base import interrupts, storage
from imbvlm.base.formatting import pluralize
from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.ray_runtime.cluster_resources import connected_cluster
from imbvlm.sweep.plan.feasibility import DRIVER_CPUS, shortage
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialKind
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.in_process_trial import InProcessTrial
from imbvlm.sweep.tune.jobs import RunContext
from imbvlm.sweep.tune.monitoring import MetricsExporter
from imbvlm.sweep.tune.pack_members import Packs, TuneCallback, TuneScheduler, TuneSearcher
from imbvlm.sweep.tune.progress_callback import ProgressCallback
from imbvlm.sweep.tune.ray_train_trial import FreeGroups, ray_train_trial
from imbvlm.sweep.tune.trial_watchdog import CapacityWatch, TrialTimeout

RAY_FOLDER = "ray"
TUNE_SETTINGS = (
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
    # Ctrl-C ends the sweep: Tune would end the search alone, and what comes next would read the test split.
    "TUNE_DISABLE_SIGINT_HANDLER",
    # A failed trial's report has no metrics; the objective's name was checked with the spec.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING",
)


def run_jobs(
    lane: RunContext,
    searcher: Searcher,
    scheduler: AshaBrackets | None,
    kind: TrialKind,
    total: int,
    pack_size: Callable[[TrialConfig], int] = lambda config: 1,
) -> int:
    """Run what the searcher hands out until it has no more; records land in the lane's log, progress counts `kind`.

    Of those that can train together up to `pack_size(config)` do so, in process. Returns how many trials should be run
    again, since Tune gave them up before their restarts were spent.
    """
    spec = lane.spec
    trainable = tune.with_resources(*_trainable(lane))
    packs = Packs(storage.join(lane.folder, RAY_FOLDER))
    asked: TrialScheduler | None = scheduler
    if lane.driver == "in_process":
        searcher = TuneSearcher(searcher, packs, pack_size)
        asked = None if scheduler is None else TuneScheduler(scheduler, packs)
    limit = TrialTimeout(spec.max_trial_minutes, asked)
    progress = ProgressCallback(
        lane.log, lane.console, spec.best_objective, kind, total, lane.budget, lane.count_spent, lane.prune_logits,
        limit.reasons, f"{pluralize(spec.num_workers, 'worker')}, {pluralize(lane.num_classes, 'class')}",
    )  # fmt: skip
    callbacks: list[tune.Callback] = [
        progress,
        MetricsExporter(spec, lane.log, lane.local_folder, lane.folder.rpartition("/")[2]),
    ]
    callbacks = [TuneCallback(callbacks, packs)] if lane.driver == "in_process" else [*callbacks, FreeGroups()]
    callbacks.append(EndAtSignal())
    callbacks.append(CapacityWatch(lambda: shortage(lane.sweep, connected_cluster()), lane.console))
    # Tune would send this process's AWS keys along with each trial, and Ray writes what is sent into its logs.
    class_cache.ENV_VARS_TO_PROPAGATE = {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")
    }
    # A variable for Lightning, by which trials couldn't begin in the processes that Ray has started beforehand.
    class_cache.DEFAULT_ENV_VARS = {}
    tune_controller.RayActorManager = _ActorManager
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=limit,
            num_samples=-1,
            max_concurrent_trials=lane.max_concurrent,
            reuse_actors=lane.driver == "in_process",
            trial_dirname_creator=lambda trial: str(trial.config["record"]["trial_id"]),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(lane.local_folder.absolute() / RAY_FOLDER),
            stop=CombinedStopper(
                StopOnStorageError(progress), *([StopOnBudget(lane.budget)] if kind == "search" else [])
            ),
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=spec.max_failures),
            verbose=0,
        ),
    )
    try:
        with _tune_settings(), interrupts.held():
            tuner.fit()
    except (OSError, tune.TuneError) as error:
        progress.storage_error = progress.storage_error or _of_storage(error, lane.folder)
        if progress.storage_error is None:
            raise
    finally:
        # On a full disk what ended the sweep is said, not what couldn't be kept either.
        with nullcontext() if progress.storage_error is None else suppress(storage.StorageError):
            lane.budget.keep(now=True)
    if progress.storage_error is not None:
        raise progress.storage_error
    # Resuming reads our own records; Tune's snapshots have served.
    for place in (lane.folder, str(lane.local_folder)):
        storage.delete(storage.join(place, RAY_FOLDER))
    return progress.num_lost


@contextmanager
def _tune_settings() -> Iterator[None]:
    """What Tune reads from this process's environment, which is its user's again afterwards."""
    before = {name: os.environ.get(name) for name in TUNE_SETTINGS}
    os.environ.update(dict.fromkeys(TUNE_SETTINGS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _of_storage(error: BaseException | None, folder: str) -> storage.StorageError | None:
    """What couldn't be kept, where that has ended Tune: it hides what its searcher, scheduler and callbacks raise."""
    while error is not None:
        if isinstance(error, storage.StorageError):
            return error
        # Without a number it is no file's: Ray's own waiting that took too long is one, too.
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            return storage.storage_error("write", folder, error)
        error = error.__cause__ or error.__context__
    return None


class _ActorManager(RayActorManager):
    """Tune's own, for which a trial's process is lost whatever else Ray says of its end.

    Tune expects a dead process or an error in it. Of one that Ray has ended since its machine ran out of memory Ray
    says something else, and the whole sweep would end.
    """

    def _actor_task_failed(self, tracked_actor_task: object, exception: Exception) -> None:
        if not isinstance(exception, (RayActorError, RayTaskError)):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        super()._actor_task_failed(tracked_actor_task, exception)


class EndAtSignal(tune.Callback):
    """Ends everything at Ctrl-C between two of Tune's steps, a tenth of a second each.

    Raised within a step, an interrupt may become an error of a trial, and the sweep would go on.
    """

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        interrupts.check()


class StopOnStorageError(tune.Stopper):
    """Ends everything once a record couldn't be written."""

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress = progress

    def __call__(self, trial_id: str, result: Tree) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._progress.storage_error is not None


class StopOnBudget(tune.Stopper):
    """Ends each trial at its next report once time or money is used up; a refit would be of no use half-done."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __call__(self, trial_id: str, result: Tree) -> bool:
        return self._budget.exhausted(keep_for_refits=True) is not None

    def stop_all(self) -> bool:
        return False


def _trainable(lane: RunContext) -> tuple[object, object]:
    spec = lane.spec
    if lane.driver == "ray_train":
        return ray_train_trial, {"cpu": DRIVER_CPUS}
    resources = {"cpu": spec.cpus_per_worker}
    if spec.gpus_per_worker:
        resources["gpu"] = spec.gpus_per_worker
    return InProcessTrial, resources
