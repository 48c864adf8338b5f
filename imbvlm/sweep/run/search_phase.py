"""The search phase: baselines, then trials of the space until the number of trials or a limit is reached."""

from __future__ import annotations

from collections.abc import Sequence

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.sweep.plan.feasibility import driver_of, packing
from imbvlm.sweep.records.earlier_sweeps import WarmStart, WarmTrial, warm_trials
from imbvlm.sweep.records.summary_tables import failure_causes
from imbvlm.sweep.records.trial_log import ENDED
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.run.sweep_run import SweepRun, run_fixed_jobs, settings_with_logits
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.spec.sweep_spec import AshaConfig
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.jobs import Job
from imbvlm.sweep.tune.study_search import StudySearch
from imbvlm.sweep.tune.tune_runner import run_jobs
from imbvlm.training.trial_session import TrialSettings

OPTUNA_FILE = "optuna.log"


def search(run: SweepRun, starts: Sequence[WarmStart]) -> None:
    """Run the baselines and the search; raises ImbvlmError if no trial gave a result.

    The sampler first receives the trials of earlier sweeps, `starts`.
    """
    run.budget.enter("trials")
    for start in starts:
        run.console.print(start.describe())
    if run.context.driver == "ray_train":
        _run_baselines_in_process(run)
    # One more than a trial's restarts: the trials of a lost pack are restarted one by one.
    for _ in range(2 + run.spec.max_failures):
        searcher, num_lost = _search_once(run, warm_trials(starts))
        if not num_lost:
            break
    write_results_table(run.log)
    run.console.end_live()
    ended = [record for record in run.log.of("search") if record.is_over]
    _report_limit(run, len(ended))
    if searcher.exhausted:
        run.console.print(
            f"the space has no further configuration: {len(ended)} trials instead of {run.sweep.num_trials}"
        )
    if searcher.num_repeats:
        proposals = pluralize(searcher.num_repeats, "proposal")
        run.console.print(f"{proposals} repeated an earlier trial, took its value and didn't count")
    run.context.prune_logits(is_over=True)
    failed = [record for record in ended if record.state in ("failed", "error")]
    if failed:
        run.console.print(failure_causes(failed))
    if run.log.best(run.spec.objective):
        return
    if run.exhausted_limit is not None:
        raise ImbvlmError(f"{run.exhausted_limit} is used up, and no trial has ended yet; {run.raise_limit_hint()}")
    raise ImbvlmError(
        f"no trial of {len(ended)} gave a result, so there is no best configuration; "
        f"`imbvlm sweep show {run.folder}` has their causes"
    )


def _search_once(run: SweepRun, warm: Sequence[WarmTrial]) -> tuple[StudySearch, int]:
    """Run what has not ended yet; return the searcher and the number of trials that were lost too early."""
    jobs = [*_baseline_jobs(run), *_unfinished_jobs(run)]
    ended = [record for record in run.log.of("search") if record.state in ENDED]
    run.context.count_spent(is_search=True)
    searcher = StudySearch.open(run.sweep, jobs, ended, run.budget, warm, run.context.local_folder / OPTUNA_FILE)
    is_complete = not jobs and len(ended) >= run.sweep.num_trials
    if is_complete or run.budget.exhausted(keep_for_refits=True):
        return searcher, 0
    size = packing(run.sweep, run.encoder_infos, run.manifest, run.context.max_concurrent).size
    config = run.spec.trial_scheduler
    brackets = AshaBrackets(config, run.spec.best_objective) if isinstance(config, AshaConfig) else None
    num_lost = run_jobs(
        run.context,
        searcher,
        lambda job: _search_settings(run, job),
        brackets,
        "search",
        run.sweep.num_trials,
        size,
    )
    return searcher, num_lost


def _run_baselines_in_process(run: SweepRun) -> None:
    """Run the baselines that don't need Ray Train, the search's driver."""
    run.context.count_spent(is_search=True)
    jobs = [job for job in _baseline_jobs(run) if driver_of(run.sweep, job.config) == "in_process"]
    run_fixed_jobs(run, jobs, lambda job: _search_settings(run, job), "search", run.sweep.num_trials)


def _baseline_jobs(run: SweepRun) -> list[Job]:
    jobs = [
        Job(trial_id, "baseline", baseline.name, baseline.config, alone=run.was_lost(trial_id))
        for trial_id, baseline in run.baselines.items()
        if not run.has_ended(trial_id)
    ]
    # Those of an encoder are next to each other, because they share a process.
    return sorted(jobs, key=lambda job: feature_key(job.config))


def _unfinished_jobs(run: SweepRun) -> list[Job]:
    return [
        Job(record.trial_id, "search", "", record.trial_config(), record.draw, alone=run.was_lost(record.trial_id))
        for record in run.log.of("search")
        if record.state not in ENDED
    ]


def _search_settings(run: SweepRun, job: Job) -> TrialSettings:
    baseline = run.baselines.get(job.trial_id)
    return settings_with_logits(run, job, patience=None if baseline is None else baseline.patience)


def _report_limit(run: SweepRun, num_ended: int) -> None:
    """Print which limit has ended the search before its last trial, and how to resume."""
    if num_ended >= run.sweep.num_trials:
        return
    run.exhausted_limit = run.budget.exhausted(keep_for_refits=True) or run.budget.trials_exhausted(num_ended)
    if run.exhausted_limit is None:
        return
    num_paused = sum(not record.is_over for record in run.log.of("search"))
    paused = f", {num_paused} paused" if num_paused else ""
    run.console.print(
        f"{run.exhausted_limit} is used up: {num_ended} of {run.sweep.num_trials} trials have ended{paused}; "
        f"{run.raise_limit_hint()}"
    )
