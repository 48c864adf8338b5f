"""The refit phase: winner and baselines on all training images, each read on the test split once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from imbvlm.base import storage
from imbvlm.base.formatting import pluralize
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.feature_set import FeatureSet
from imbvlm.sweep.records.adjustment_selection import select_adjustments, write_post_hoc
from imbvlm.sweep.records.delivered_model import (
    DeliveredMember,
    delivered_members,
    delivered_names,
    exported_refits,
    score_delivered,
    write_decision_scores,
)
from imbvlm.sweep.records.difference import refits_of
from imbvlm.sweep.records.refit_selection import SUPERSEDED, mark_superseded, refits
from imbvlm.sweep.records.summary_tables import failure_causes
from imbvlm.sweep.records.sweep_folder import TEST_FILE, read_readings
from imbvlm.sweep.records.trial_log import ENDED, WINNER, refit_folder
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.records.winner_selection import select_winner, write_selection
from imbvlm.sweep.run.extract_phase import extract_splits
from imbvlm.sweep.run.sweep_run import SweepRun, run_fixed_jobs, trial_settings
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.tune.jobs import Job
from imbvlm.training.trial_session import TrialSettings
from imbvlm.training.validation_logits import VAL_LOGITS_FILE


def refit(run: SweepRun) -> None:
    """Train winner and baselines again on all training rows over the seeds, and read the test split once for each."""
    run.budget.enter("features")
    test_features = extract_splits(run, ("test",)) if "test" in run.manifest.splits else {}
    run.budget.enter("refits")
    run.selection = select_winner(run.folder, run.log, run.spec, len(run.manifest.rows_of("test")))
    if run.selection is not None:
        write_selection(run.folder, run.selection)
        run.log.selected = run.selection.selected
    selected = refits(run.log, run.spec)
    jobs = [
        Job(chosen.trial_id(seed, run.log), "refit", chosen.name, config)
        for chosen in selected
        for seed, config in chosen.seeded()
    ]
    waiting = run.unfinished(jobs)
    run.adjustments = select_adjustments(run.folder, selected, run.log, run.spec)
    write_post_hoc(run.folder, run.adjustments)
    members = delivered_members(run.folder, run.log, run.spec, run.selection)
    mark_superseded(run.log, {**{job.trial_id: job.name for job in jobs}, **delivered_names(members)})
    if waiting and run.budget.exhausted() is None:
        blend = ", the blend's members" if len(members) > 1 else ""
        models = "everything" if run.spec.study else f"the winner{blend} and the baselines"
        run.console.print(f"refitting {models} on all training images: {pluralize(len(waiting), 'run')}")
        run_fixed_jobs(run, waiting, lambda job: _refit_settings(run, job, test_features), "refit", len(jobs))
    run.num_refits_left = len(run.unfinished(jobs))
    _report_left(run, len(jobs))
    failed = [record for record in run.log.of("refit") if record.state == "failed"]
    if failed:
        run.console.print(failure_causes(failed, "refit"))
    run.scored = [run.log.records[job.trial_id] for job in jobs if job.trial_id in run.log.records]
    run.scored += [
        record for record in run.log.of("refit") if record.name.startswith(SUPERSEDED) and record.state in ENDED
    ]
    if test_features:
        _write_reading(run)
        _score_delivered(run, members)
    if not run.num_refits_left:
        _calibrate(run, members)
    write_results_table(run.log)
    run.budget.keep(now=True)


def _score_delivered(run: SweepRun, members: Sequence[DeliveredMember]) -> None:
    """Score the model that the sweep delivers, once all its refits are there."""
    if run.num_refits_left:
        return
    reason = score_delivered(run.folder, run.log, members, partial(_info_of, run))
    if reason is not None:
        run.console.print(f"the delivered model isn't scored on the test split: {reason}")
    run.scored = [*run.log.of("delivered"), *run.scored]


def _calibrate(run: SweepRun, members: Sequence[DeliveredMember]) -> None:
    """Write the scores by which the delivered model decides."""
    names, info_of = run.manifest.class_names, partial(_info_of, run)
    runs = [refits_of(run.log, member.refit.name) for member in members]
    exported = [exported_refits(run.folder, records, info_of, len(names)) for records in runs]
    write_decision_scores(run.folder, run.folder, run.log, run.spec, members, run.manifest, exported)


def _info_of(run: SweepRun, config: TrialConfig) -> EncoderInfo:
    return run.features[feature_key(config)].info


def _refit_settings(run: SweepRun, job: Job, test_features: Mapping[str, FeatureSet]) -> TrialSettings:
    settings, test = trial_settings(run, job), test_features.get(feature_key(job.config))
    features = settings.feature_set
    if test is not None:
        features = replace(features, splits={**features.splits, **test.splits}, five_crop=test.five_crop)
    selection, folder = run.adjustments.get(job.name), refit_folder(run.folder, job.trial_id)
    return replace(
        settings,
        feature_set=features,
        refit=True,
        score_test=test is not None,
        # After a resumption any refit may be a member of another blend.
        keeps_test_logits=job.name == WINNER or run.spec.blends is not None,
        # A refit trains on rows that were held out, and not on official validation rows, which calibrate it.
        logits_file=storage.join(folder, VAL_LOGITS_FILE) if "val" in run.manifest.splits else None,
        model_folder=folder,
        post_hoc=None if selection is None else selection.adjustment,
    )


def _report_left(run: SweepRun, num_jobs: int) -> None:
    """Print why refits are left, and how to resume."""
    num_left = run.num_refits_left
    if not num_left:
        return
    if limit := run.budget.exhausted():
        run.exhausted_limit = limit
        run.console.print(
            f"{limit} is used up: {num_left} of {num_jobs} refits are left, and the test split was not read for "
            f"them; {run.raise_limit_hint()}"
        )
    else:
        run.console.print(
            f"{pluralize(num_left, 'refit')} lost with a machine; go on with: imbvlm sweep resume {run.folder}"
        )


def _write_reading(run: SweepRun) -> None:
    """Add new test scores to test.json, with the time at which the test split was read for them."""
    scores = {
        record.trial_id: {key: value for key, value in record.epochs[-1].items() if key.startswith("test")}
        for record in run.scored
        if record.epochs
    }
    before = read_readings(run.folder) or {"scores": {}, "readings": []}
    new = {trial_id: answer for trial_id, answer in scores.items() if trial_id not in before["scores"]}
    if new:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        readings = [*before["readings"], {"read_at": now, "trials": sorted(new)}]
        reading = {"read_at": now, "scores": {**before["scores"], **new}, "readings": readings}
        storage.write_json(storage.join(run.folder, TEST_FILE), reading)
