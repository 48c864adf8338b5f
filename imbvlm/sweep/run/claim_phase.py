"""The claim phase: what the delivered model gains from training on more images than the models of the folds."""

from __future__ import annotations

from functools import partial

import numpy as np

from imbvlm.base.formatting import pluralize
from imbvlm.data.manifest_schema import Rows
from imbvlm.features.trial_data import TrialData
from imbvlm.sweep.records.adjustment_selection import zero_shot_baseline
from imbvlm.sweep.records.refit_selection import refit_config
from imbvlm.sweep.records.trial_log import TrialRecord
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.records.winner_selection import correct_claims, write_selection
from imbvlm.sweep.run.sweep_run import SweepRun, run_fixed_jobs, settings_with_logits
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.tune.jobs import Job


def correct_for_size(run: SweepRun) -> None:
    """Correct the claims on what folds have scored, by models without each two folds (docs/protocol.md, Claims).

    Claims stay as they are with fewer than three folds, where a model of a pair can't be trained, and where time is up.
    """
    selection = run.selection
    if selection is None or not selection.claims or selection.num_folds < 3 or selection.num_official:
        return
    delivered = [member.name for member in selection.members] or [selection.winner]
    records = {trial_id: run.log.records[trial_id] for trial_id in delivered}
    for record in list(records.values()):
        zero_shot = zero_shot_baseline(record, run.log)
        if zero_shot is not None:
            records[zero_shot.trial_id] = zero_shot
    jobs = [
        Job(f"{trial_id}-pairs", "pairs", trial_id, refit_config(record, run.spec))
        for trial_id, record in records.items()
    ]
    waiting = run.unfinished(jobs)
    if waiting and run.budget.exhausted() is None:
        run.console.print(
            f"training without two of the {selection.num_folds} folds, to learn what a model gains from all images: "
            f"{pluralize(len(waiting), 'run')}"
        )
        run_fixed_jobs(
            run,
            waiting,
            partial(settings_with_logits, run, in_pairs=True),
            "pairs",
            len(jobs),
        )
        write_results_table(run.log)
    runs = {job.name: run.log.records.get(job.trial_id) for job in jobs}
    finished = {name: record for name, record in runs.items() if record is not None and record.state == "finished"}
    if len(finished) == len(jobs):
        row_of = _rows_of_pairs(run, records[delivered[0]])
        run.selection = correct_claims(run.folder, run.log, run.spec, selection, finished, row_of)
        write_selection(run.folder, run.selection)


def _rows_of_pairs(run: SweepRun, record: TrialRecord) -> Rows:
    """For each row that pairs of folds score (N (K - 1),) its position among the rows that folds score (N,)."""
    config = record.trial_config()
    features = run.features[feature_key(config)]
    of_folds, of_pairs = (
        np.concatenate(
            [fold.val.rows for fold in TrialData.open_folds(config, features, run.num_folds, in_pairs=pairs)]
        )
        for pairs in (False, True)
    )
    order = np.argsort(of_folds)
    return order[np.searchsorted(of_folds, of_pairs, sorter=order)]
