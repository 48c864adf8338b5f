"""The gap phase: the delivered model's heads over folds at random, and over folds of groups that they haven't seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from imbvlm.base import storage
from imbvlm.base.formatting import pluralize
from imbvlm.base.plugin_files import plugin_options
from imbvlm.data.folds import deal_folds
from imbvlm.data.split_power import NUM_FOLDS
from imbvlm.longtail.group_gap import GroupedRows, group_gap, worst_groups
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.sweep.plan.feasibility import gap_folds
from imbvlm.sweep.records.adjustment_selection import logits_file
from imbvlm.sweep.records.delivered_model import DeliveredMember, delivered_members
from imbvlm.sweep.records.sweep_folder import GAP_FILE, GapReport, write_gap
from imbvlm.sweep.run.sweep_run import SweepRun, run_fixed_jobs, settings_with_logits
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.tune.jobs import Job
from imbvlm.training.validation_logits import read_logits

_SIDES = {"random": True, "groups": False}


def measure_gap(run: SweepRun) -> None:
    """Train the delivered model's heads over both kinds of folds, and write gap.json (docs/protocol.md, Groups)."""
    if not run.manifest.has_groups or run.num_refits_left:
        return
    # Another model may have been delivered before.
    storage.delete(storage.join(run.folder, GAP_FILE))
    members = delivered_members(run.folder, run.log, run.spec, run.selection)
    num_folds = run.num_folds if run.num_folds > 1 else NUM_FOLDS
    folds = gap_folds(run.spec, run.manifest)
    problem = folds if isinstance(folds, str) else ""
    if any(member.refit.config.reads_images for member in members):
        problem = "the delivered model trains in the encoder, and folds take stored features"
    if problem:
        run.console.print(f"the gap to unseen groups isn't measured: {problem}")
        return
    jobs = [
        Job(_trial_id(member, side), "gap", member.refit.name, member.refit.config)
        for member in members
        for side in _SIDES
    ]
    random_ids = {_trial_id(member, "random") for member in members}
    waiting = run.unfinished(jobs)
    if waiting:
        run.console.print(f"measuring the gap to unseen groups: {pluralize(len(waiting), 'run')} over folds")
        run_fixed_jobs(
            run,
            waiting,
            lambda job: settings_with_logits(run, job, num_folds=num_folds, folds_at_random=job.trial_id in random_ids),
            "gap",
            len(jobs),
        )
    results = {side: _fold_results(run, members, num_folds, side) for side in _SIDES}
    at_random, of_groups = results["random"], results["groups"]
    if at_random is None or of_groups is None:
        run.console.print(
            "the gap to unseen groups isn't measured: not all of its runs have a result. Lost ones run again with: "
            f"imbvlm sweep resume {run.folder}{plugin_options()}"
        )
        return
    names = run.manifest.table.column("group").to_pylist()
    gap = group_gap(at_random, of_groups)
    # A joined group has the name of its first row.
    worst = [(names[row] or "without a group", total, share) for row, total, share in worst_groups(of_groups)]
    report = GapReport(gap.at_random, gap.of_groups, gap.interval, gap.num_groups, gap.num_classes, worst)
    write_gap(run.folder, report)
    run.console.print(report.describe())


def _trial_id(member: DeliveredMember, side: str) -> str:
    return f"{member.refit.record.trial_id}-{side}"


def _fold_results(run: SweepRun, members: Sequence[DeliveredMember], num_folds: int, side: str) -> GroupedRows | None:
    """The members' predictions together for the rows of all folds; None where a run has no logits.

    Heads count as adjusted, without their share of zero-shot logits, which no fold trains.
    """
    table = run.manifest.label_rows()
    assert table.groups is not None, "only manifests with groups have a gap"
    folds = deal_folds(table, num_folds, run.spec.split_seed, at_random=_SIDES[side])
    total = torch.zeros(())
    for member in members:
        saved = read_logits(logits_file(run.folder, _trial_id(member, side)))
        logits = None if saved is None else saved.last()
        if saved is None or logits is None or logits.isnan().any():
            return None
        store = run.features[feature_key(member.refit.config)].store("train")
        readable = table.rows_of("train")[store.ok]
        rows = np.concatenate([fold.val[np.isin(fold.val, readable)] for fold in folds.folds])
        of_folds = torch.arange(len(rows))
        adjustment = replace(member.adjustment or PostHocAdjustment(), alpha=0.0)
        adjusted = adjustment.apply(logits[: len(rows)].float(), saved.class_counts(of_folds))
        total = total + member.weight * adjusted / member.temperature
    labels = table.labels[rows]
    # A group's id is the number of its first row.
    _, first, index = np.unique(table.groups, return_index=True, return_inverse=True)
    return GroupedRows(labels, first[index][rows], total.argmax(dim=1).numpy() == labels)
