"""The model that a sweep delivers: the winner, or a blend of trials and baselines, and its scores on the test split.

Its logits are the weighted sum of its members' adjusted logits. A member counts as it is exported: by the mean of its
refits where that is the mean of their logits, else by the first.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imbvlm.base import storage
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.inference.blend_merging import is_affine
from imbvlm.inference.calibration_file import ModelCalibration
from imbvlm.inference.taxonomy_file import ModelTaxonomy, write_rank_scores
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.decisions.scored_rows import ScoredRows
from imbvlm.longtail.logits import at_least_float32
from imbvlm.longtail.post_hoc_adjustment import CHUNK_SIZE, PostHocAdjustment
from imbvlm.longtail.roll_up import RankScores
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.sweep.records.adjustment_selection import (
    logits_file,
    read_adjustment,
    read_validation,
    zero_shot_baseline,
)
from imbvlm.sweep.records.difference import refits_of
from imbvlm.sweep.records.refit_selection import Refit, confirmed, refits
from imbvlm.sweep.records.trial_log import BLEND, DELIVERED, TrialLog, TrialRecord, refit_folder
from imbvlm.sweep.records.winner_selection import Selection
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.checkpoint import load_model_tensors
from imbvlm.training.evaluator import EvalAccumulator, EvalResult
from imbvlm.training.per_class_results import read_per_class_results, split_results, write_per_class_results
from imbvlm.training.test_predictions import (
    TEST,
    TestPredictions,
    has_test_logits,
    read_test_logits,
    write_test_logits,
)
from imbvlm.training.validation_logits import VAL_LOGITS_FILE, SavedValLogits, read_logits


@dataclass(frozen=True)
class DeliveredMember:
    """A member by its refit, whose logits as adjusted are divided by `temperature` and count by `weight`."""

    refit: Refit
    adjustment: PostHocAdjustment | None
    weight: float = 1.0
    temperature: float = 1.0


def delivered_members(
    folder: str, log: TrialLog, spec: SweepSpec, selection: Selection | None
) -> list[DeliveredMember]:
    """The members of a sweep's delivered model, the largest weight first; of a single trial the winner."""
    chosen: dict[str, Refit] = {}
    for refit in refits(log, spec):
        if not refit.is_fresh:
            chosen.setdefault(refit.record.trial_id, refit)
    if selection is None or not selection.members:
        winner = next(iter(chosen.values()))
        return [DeliveredMember(winner, read_adjustment(folder, winner.name))]
    members = []
    for member in selection.members:
        adjustment = read_adjustment(folder, chosen[member.name].name)
        own = 1.0 if adjustment is None else adjustment.temperature
        # A blend's temperatures take the place of the members' own.
        temperature = member.temperature * selection.temperature / own
        members.append(DeliveredMember(chosen[member.name], adjustment, member.weight, temperature))
    return members


def delivered_names(members: Sequence[DeliveredMember]) -> dict[str, str]:
    """The names of the delivered model's records by their ids: one as exported, and one for each seed of a blend.

    The ids differ for other members, weights or temperatures.
    """
    content = [[member.refit.record.trial_id, member.weight, member.temperature] for member in members]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
    num_seeds = max(len(member.refit.seeds) for member in members) if len(members) > 1 else 0
    return {f"{DELIVERED}-{key}": DELIVERED, **{f"{BLEND}-{key}-{number}": BLEND for number in range(num_seeds)}}


def score_delivered(
    folder: str, log: TrialLog, members: Sequence[DeliveredMember], info_of: Callable[[TrialConfig], EncoderInfo]
) -> str | None:
    """Score the delivered model on the test split from its refits' logits, and add it to the sweep's records.

    A blend is also scored for each seed. Returns the reason where it can't be scored.
    """
    names = delivered_names(members)
    if names.keys() <= log.records.keys():
        return None
    runs = [refits_of(log, member.refit.name) for member in members]
    for member, records in zip(members, runs, strict=True):
        if not records or not all(has_test_logits(refit_folder(folder, record.trial_id)) for record in records):
            return f"{member.refit.name} has no refit with logits of the test split"
    scored = [TestPredictions.read(refit_folder(folder, record.trial_id)) for records in runs for record in records]
    rows = scored[0]
    if rows is None or any(other is None or not other.has_rows_of(rows) for other in scored):
        return "its members were scored on different images"
    descriptions = [read_per_class_results(refit_folder(folder, records[0].trial_id)) for records in runs]
    stats = ClassStats.from_counts(descriptions[0]["class_counts"], descriptions[0]["split_counts"])
    totals = [torch.zeros(len(rows.labels), stats.num_classes) for _ in names]
    for member, records in zip(members, runs, strict=True):
        _add(totals, folder, member, records, info_of)
    for (trial_id, name), logits in zip(names.items(), totals, strict=True):
        _save(folder, log, members[0], trial_id, name, logits, rows, stats, _summed(descriptions))
    return None


@dataclass(frozen=True)
class ScoredValidation:
    """Adjusted logits (N, C) of the rows of `saved` that are `seen`, whose counts are those of a training.

    `is_exported` says that they are of the exported weights, not of models of the search.
    """

    logits: Tensor
    saved: SavedValLogits
    seen: Tensor
    is_exported: bool = False

    @property
    def labels(self) -> Tensor:
        """The rows' labels (N,)."""
        return self.saved.targets[self.seen]


def validation_logits(
    folder: str, log: TrialLog, spec: SweepSpec, members: Sequence[DeliveredMember]
) -> ScoredValidation | str:
    """Logits of the rows that chose a model, by the models of the search, which did not train on them.

    Returns the reason where there are none.
    """
    runs, first, total = confirmed(log, spec), None, torch.zeros(())
    for member in members:
        adjustment = member.adjustment or PostHocAdjustment()
        rows = read_validation(folder, member.refit.record, log, runs)
        if rows is None or (adjustment.alpha and rows.zero_shot is None):
            return f"the sweep has no validation scores of {member.refit.record.trial_id}"
        first = first or rows
        if not (torch.equal(rows.targets, first.targets) and torch.equal(rows.saved.folds, first.saved.folds)):
            return "its members were validated on different images"
        logits = adjustment.apply(rows.logits, rows.class_counts, rows.zero_shot)
        total = total + member.weight / member.temperature * logits
    assert first is not None, "a model has a member"
    return ScoredValidation(total, first.saved, first.seen)


def write_decision_scores(
    out: str,
    folder: str,
    log: TrialLog,
    spec: SweepSpec,
    members: Sequence[DeliveredMember],
    manifest: Manifest,
    exported: Sequence[Sequence[TrialRecord]],
) -> None:
    """Write what a model decides and rolls up by into the folder `out`, and the tree of its manifest, if it has one.

    The scores are those of official validation rows by its refits, else those of the search. `exported` has the refits
    of each member whose mean logits it is exported as.
    """
    scored = _exported_logits(folder, log, members, exported) or validation_logits(folder, log, spec, members)
    names, tree = manifest.class_names, manifest.taxonomy
    if isinstance(scored, str):
        ModelCalibration(names, scored).write(out)
        if tree is not None:
            ModelTaxonomy(tree, names, scored).write(out)
        return
    by_class = ScoredRows.from_logits(scored.logits, scored.labels, scored.saved.stats[0])
    ModelCalibration(names, by_class, scored.is_exported).write(out)
    if tree is not None:
        by_rank = RankScores.from_logits(tree, scored.logits, scored.labels)
        ModelTaxonomy(tree, names, by_rank, scored.is_exported).write(out)


def _exported_logits(
    folder: str, log: TrialLog, members: Sequence[DeliveredMember], exported: Sequence[Sequence[TrialRecord]]
) -> ScoredValidation | None:
    """Logits of official validation rows by the exported weights; None where not all members' refits have them.

    A model of five crops is exported with them, and refits score one.
    """
    first, total = None, torch.zeros(())
    for member, records in zip(members, exported, strict=True):
        adjustment = member.adjustment or PostHocAdjustment()
        files = [storage.join(refit_folder(folder, record.trial_id), VAL_LOGITS_FILE) for record in records]
        baseline = zero_shot_baseline(member.refit.record, log) if adjustment.alpha else None
        files += [] if baseline is None else [logits_file(folder, baseline.trial_id)]
        rows = [saved for saved in map(read_logits, files) if saved is not None]
        logits = [last.float() for saved in rows if (last := saved.last()) is not None]
        is_whole = bool(records) and len(logits) == len(records) + bool(adjustment.alpha)
        if not is_whole or member.refit.config.eval.tte != "none":
            return None
        first = first or rows[0]
        if not all(torch.equal(saved.targets, first.targets) for saved in rows):
            return None
        zero_shot = logits.pop() if adjustment.alpha else None
        mean = torch.stack(logits).mean(dim=0)
        total = total + member.weight / member.temperature * adjustment.apply(mean, rows[0].stats[0].counts, zero_shot)
    assert first is not None, "a model has a member"
    return ScoredValidation(total, first, torch.ones(len(first.targets), dtype=torch.bool), is_exported=True)


def exported_refits(
    folder: str,
    records: Sequence[TrialRecord],
    info_of: Callable[[TrialConfig], EncoderInfo],
    num_classes: int,
) -> Sequence[TrialRecord]:
    """The refits of a member whose mean logits it is exported as: all, or the first where weights have no mean."""
    if len(records) < 2:
        return records
    config, tensors = records[0].trial_config(), load_model_tensors(refit_folder(folder, records[0].trial_id))
    return records if is_affine(config, info_of(config), num_classes, tensors) else records[:1]


def _add(
    totals: Sequence[Tensor],
    folder: str,
    member: DeliveredMember,
    records: Sequence[TrialRecord],
    info_of: Callable[[TrialConfig], EncoderInfo],
) -> None:
    """Add a member's logits to those of the model as exported, the first of the totals, and of each seed."""
    logits = [at_least_float32(read_test_logits(refit_folder(folder, record.trial_id))) for record in records]
    num_exported = len(exported_refits(folder, records, info_of, totals[0].shape[1]))
    by_seed = [logits[number % len(logits)] for number in range(len(totals) - 1)]
    for total, own in zip(totals, (torch.stack(logits[:num_exported]).mean(dim=0), *by_seed), strict=True):
        total += member.weight / member.temperature * own


def _save(
    folder: str,
    log: TrialLog,
    member: DeliveredMember,
    trial_id: str,
    name: str,
    logits: Tensor,
    rows: TestPredictions,
    stats: ClassStats,
    description: Mapping[str, Any],
) -> None:
    """Write a record with scores, and results by row and by class; the record has the first member's configuration."""
    tree = description.get("taxonomy")
    taxonomy = None if tree is None else Taxonomy.from_dict(tree, stats.num_classes)
    evaluated = replace(_evaluated(logits, rows.labels), has_groups=rows.groups is not None)
    result = evaluated.with_rank_errors(taxonomy, rows.labels.numpy())
    now = time.time()
    record = TrialRecord(
        trial_id=trial_id,
        kind="delivered",
        name=name,
        state="finished",
        config=member.refit.config.to_tree(),
        epochs=[{"epoch": 1.0, **{f"{TEST}/{metric}": value for metric, value in result.metrics(stats).items()}}],
        started_at=now,
        ended_at=now,
    )
    own_folder = refit_folder(folder, record.trial_id)
    replace(rows, predicted={TEST: result.predicted}).write(own_folder)
    if name == DELIVERED:
        write_test_logits(own_folder, (logits - logits.amax(dim=1, keepdim=True)).half())
    if taxonomy is not None and name == DELIVERED:
        write_rank_scores(own_folder, RankScores.from_logits(taxonomy, logits, rows.labels), {})
    results = {TEST: split_results(rows.labels.numpy(), rows.rows.numpy(), result)}
    write_per_class_results(own_folder, {**description, "splits": results})
    log.save(record)


def _evaluated(logits: Tensor, labels: Tensor) -> EvalResult:
    """Counts and predictions of logits (N, C); rows of NaN are unreadable images."""
    evaluated = EvalAccumulator(*logits.shape)
    for rows in torch.split(torch.nonzero(~logits.isnan().any(dim=1)).flatten(), CHUNK_SIZE):
        evaluated.add(logits[rows], labels[rows], rows.numpy())
    return evaluated.result()


def _summed(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The description of a model with all members: each encoder counts once, and all that was trained."""
    encoders = {own["tower"]: own["num_parameters"] - own["num_trained_parameters"] for own in descriptions}
    num_trained = sum(own["num_trained_parameters"] for own in descriptions)
    return {
        **descriptions[0],
        "num_parameters": sum(encoders.values()) + num_trained,
        "num_trained_parameters": num_trained,
    }
