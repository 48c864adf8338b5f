"""The value that a sweep's phases share, and the jobs that several of them run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.plugin_files import plugin_options
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.feature_set import FeatureSet
from imbvlm.sweep.plan.feasibility import driver_of
from imbvlm.sweep.records.adjustment_selection import AdjustmentSelection, logits_file
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import CHECKPOINTS_FOLDER, ENDED, SPEC_FILE, TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.records.winner_selection import Selection
from imbvlm.sweep.spec.baselines import Baseline, feature_key
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.sweep.tune.jobs import FixedJobs, Job, RunContext
from imbvlm.sweep.tune.tune_runner import run_jobs
from imbvlm.training.trial_session import TrialSettings


@dataclass
class SweepRun:
    """One run of a sweep. Each phase fills in its part and skips what an earlier run has finished.

    `encoders` has one configuration for each encoder and way of reading images, `outputs` what is stored of them, and
    `baselines` the baselines by their trial ids.
    """

    sweep: ResolvedSweep
    manifest: Manifest
    folder: str
    log: TrialLog
    console: Console
    budget: Budget
    context: RunContext
    encoders: tuple[TrialConfig, ...]
    outputs: frozenset[OutputName]
    baselines: Mapping[str, Baseline]
    # Folds that score trials on stored features; 1 without folds.
    num_folds: int
    # Training and validation features by `feature_key`.
    features: dict[str, FeatureSet] = field(default_factory=dict)
    quarantined: list[dict[str, str | int]] = field(default_factory=list)
    # None where the objective selects the winner.
    selection: Selection | None = None
    # By the refits' names.
    adjustments: dict[str, AdjustmentSelection] = field(default_factory=dict)
    scored: list[TrialRecord] = field(default_factory=list)
    # The limit that is used up, such as `max_hours 8`.
    exhausted_limit: str | None = None
    num_refits_left: int = 0

    @property
    def spec(self) -> SweepSpec:
        return self.sweep.spec

    @property
    def encoder_infos(self) -> list[EncoderInfo]:
        """The extracted encoders."""
        return [features.info for features in self.features.values()]

    def has_ended(self, trial_id: str) -> bool:
        """Return whether a trial needs no further run."""
        record = self.log.records.get(trial_id)
        return record is not None and record.state in ENDED

    def was_lost(self, trial_id: str) -> bool:
        """Return whether a trial's process ended before the trial did."""
        record = self.log.records.get(trial_id)
        return record is not None and record.state == "error"

    def unfinished(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that have not ended."""
        return [job for job in jobs if not self.has_ended(job.trial_id)]

    def raise_limit_hint(self) -> str:
        """Return the command that resumes the sweep with a higher limit."""
        name = "max_hours" if self.exhausted_limit is None else self.exhausted_limit.split()[0]
        return f"go on with: imbvlm sweep resume {self.folder}{plugin_options()} --set {name}=MORE"


def trial_settings(run: SweepRun, job: Job) -> TrialSettings:
    """Make the settings that trials of every kind share, on training and validation features."""
    return TrialSettings(
        config=job.config,
        feature_set=run.features[feature_key(job.config)],
        checkpoint_folder=storage.join(run.folder, CHECKPOINTS_FOLDER, job.trial_id),
        objective=run.spec.objective,
        num_threads=run.context.num_threads,
        marker=storage.join(run.folder, SPEC_FILE),
        trial_id=job.trial_id,
        num_folds=run.num_folds,
    )


def settings_with_logits(run: SweepRun, job: Job, **changes: Any) -> TrialSettings:
    """Make the settings of a trial that keeps its validation logits, with the fields that its phase changes."""
    return replace(trial_settings(run, job), logits_file=logits_file(run.folder, job.trial_id), **changes)


def run_fixed_jobs(
    run: SweepRun,
    waiting: list[Job],
    settings: Callable[[Job], TrialSettings],
    kind: TrialKind,
    total: int,
    pack_size: Callable[[TrialConfig], int] = lambda config: 1,
) -> None:
    """Run given jobs, and repeat those that Tune gave up before their restarts were spent, then each alone."""
    for _ in range(1 + run.spec.max_failures):
        waiting = [replace(job, alone=run.was_lost(job.trial_id)) for job in waiting]
        num_lost = 0
        drivers = [driver_of(run.sweep, job.config) for job in waiting]
        # That of the first job begins: a limit may leave the last ones out.
        for driver in dict.fromkeys(drivers):
            own = [job for job, job_driver in zip(waiting, drivers, strict=True) if job_driver == driver]
            jobs = FixedJobs(own, run.budget, keep_for_refits=kind in ("search", "folds"))
            num_lost += run_jobs(replace(run.context, own_driver=driver), jobs, settings, None, kind, total, pack_size)
        waiting = run.unfinished(waiting)
        if not num_lost:
            break
    run.console.end_live()
