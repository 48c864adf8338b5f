"""The confirmation phase: the best few trials again with more seeds."""

from __future__ import annotations

from dataclasses import replace

from imbvlm.base.formatting import pluralize
from imbvlm.sweep.records.adjustment_selection import logits_file
from imbvlm.sweep.records.summary_tables import seeds_table
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.run.sweep_run import SweepRun, run_fixed_jobs, trial_settings
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.tune.jobs import Job


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
            lambda job: replace(
                trial_settings(run, job, run.features[feature_key(job.config)]),
                logits_file=logits_file(run.folder, job.trial_id) if run.spec.selects_by_likelihood else None,
            ),
            "confirm",
            len(jobs),
        )
        write_results_table(run.log)
    if jobs:
        run.console.print(seeds_table(run.log, run.spec, run.console.width))
