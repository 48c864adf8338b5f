"""The confirmation phase: the best few trials again with more seeds, and over folds with the baselines."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from imbvlm.base.formatting import pluralize
from imbvlm.sweep.plan.feasibility import packing
from imbvlm.sweep.records.refit_selection import folds_id, refit_config, to_confirm
from imbvlm.sweep.records.summary_tables import failure_causes, seeds_table
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.run.sweep_run import SweepRun, run_fixed_jobs, settings_with_logits, trial_settings
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.tune.jobs import Job
from imbvlm.training.trial_pack import pack_key


def confirm(run: SweepRun) -> None:
    """Run the best few trials with more seeds; the best mean wins (docs/protocol.md, Splits, counts, selection)."""
    ranked = run.log.ranked(run.spec.objective)[: run.spec.confirm_trials]
    best = [record for record in ranked if record.config.get("train")]
    jobs = [
        Job(
            f"{record.trial_id}-seed{seed}",
            "confirm",
            record.trial_id,
            record.trial_config().with_overrides({"train.seed": seed}),
        )
        for record in best
        for seed in run.spec.more_seeds
    ]
    waiting = run.unfinished(jobs)
    if waiting and run.budget.exhausted(keep_for_refits=True) is None:
        run.console.print(f"running the best {len(best)} again with more seeds: {pluralize(len(waiting), 'run')}")
        run_fixed_jobs(
            run,
            waiting,
            partial(settings_with_logits if run.spec.selects_by_likelihood else trial_settings, run),
            "confirm",
            len(jobs),
        )
        write_results_table(run.log)
    if jobs:
        run.console.print(seeds_table(run.log, run.spec, run.console.width))


def confirm_over_folds(run: SweepRun) -> None:
    """Score the best trials and the baselines over folds (docs/protocol.md, Splits, counts, selection)."""
    folds = run.context.confirm_folds
    if folds == 1:
        return
    jobs = [
        Job(folds_id(record.trial_id), "folds", record.trial_id, refit_config(record, run.spec))
        for record in to_confirm(run.log, run.spec)
    ]
    # Those that share features, and then those that train together, are next to each other.
    jobs.sort(key=lambda job: (feature_key(job.config), pack_key(job.config) or ""))
    waiting = run.unfinished(jobs)
    # The reserved time is for this.
    run.budget.confirm_seconds = 0.0
    if waiting and run.budget.exhausted(keep_for_refits=True) is None:
        scored = f"the best trials and the baselines over {folds} folds of the training images"
        run.console.print(f"scoring {scored}: {pluralize(len(waiting), 'run')}")
        packs = packing(run.sweep, run.encoder_infos, run.manifest, run.context.max_concurrent)
        packs = replace(packs, num_folds=folds, num_val=packs.num_train + packs.num_val)
        run_fixed_jobs(
            run,
            waiting,
            partial(settings_with_logits, run, num_folds=folds),
            "folds",
            len(jobs),
            packs.size,
        )
        write_results_table(run.log)
    failed = [record for record in run.log.of("folds") if record.state == "failed"]
    if failed:
        run.console.print(f"{failure_causes(failed, 'run')}\ntheir trials are no candidates")
    if num_left := len(run.unfinished(jobs)):
        run.exhausted_limit = run.exhausted_limit or run.budget.exhausted(keep_for_refits=True)
        run.console.print(
            f"{num_left} of {len(jobs)} runs over folds are left, so that the validation images alone select; "
            f"{run.raise_limit_hint()}"
        )
