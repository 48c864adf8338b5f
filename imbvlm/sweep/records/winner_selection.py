"""Selects the winner by the class-balanced log-likelihood of calibrated validation logits, and what may be claimed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.formatting import pluralize
from imbvlm.base.json_file import read_json
from imbvlm.config.method_registry import METHODS
from imbvlm.data.folds import deal_units
from imbvlm.data.manifest_schema import Rows
from imbvlm.longtail.blending import (
    Blend,
    BlendDecision,
    BlendMember,
    BlendPool,
    Candidate,
    blended_logits,
    select_blend,
)
from imbvlm.longtail.claims import (
    Claim,
    Floats,
    PairedDifference,
    RowOutcomes,
    claims_of_rows,
    corrected_claims,
    out_of_bag_accuracy,
    paired_difference,
)
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.group_gap import group_note
from imbvlm.longtail.post_hoc_adjustment import balanced_row_weights, fit_temperature
from imbvlm.sweep.records.adjustment_selection import Validation, read_validation, select_adjustment
from imbvlm.sweep.records.refit_selection import confirmed
from imbvlm.sweep.records.trial_log import SELECTION_FILE, Selected, TrialLog, TrialRecord, resume_fix
from imbvlm.sweep.spec.baselines import pass_key
from imbvlm.sweep.spec.sweep_spec import BlendConfig, SweepSpec
from imbvlm.training.validation_logits import RowLogits, SavedValLogits

# Parts of the validation rows by which a blend is decided on where there are no folds.
NUM_PARTS = 10
# Logits (rows x classes x candidates) among which a blend is sought: seconds for each of its picks. Claims repeat the
# selection on resampled rows, on fewer.
MAX_ELEMENTS, MAX_CLAIM_ELEMENTS, MIN_CANDIDATES = 2**28, 2**25, 4
# Logits of all candidates above which a sweep with a test split corrects no gain: minutes for a line beside the test's.
MAX_GAIN_ELEMENTS = 2**22
# Half-width of a claim's interval above which no number is shown.
MAX_HALF_WIDTH = 0.1


@dataclass(frozen=True)
class Selection:
    """The winner's trial id, log-likelihoods of all candidates as adjusted, by trial id, and claims by metric.

    A log-likelihood is the mean over seeds where a trial ran with several. Without a test split, claims are of the
    delivered predictor's accuracies, over `num_rows` validation rows of so many folds, of which `num_official` are of
    the official split. `members` are those of the delivered blend, whose logits are divided by `temperature`; none
    where the winner alone is delivered. `decisions` were for or against blends, and `objection` says why none was
    sought. `is_size_corrected` says that the claims are of models that train on all images. `gain` is the delivered
    predictor's balanced accuracy, corrected for the selection, over that of the best baseline, whose id is `baseline`,
    as adjusted; None without either, and where a test split says it and the correction would take minutes.
    """

    winner: str
    log_likelihoods: Mapping[str, float]
    claims: Mapping[str, Claim]
    num_rows: int
    num_folds: int = 1
    members: tuple[BlendMember, ...] = ()
    decisions: tuple[BlendDecision, ...] = ()
    temperature: float = 1.0
    objection: str = ""
    num_official: int = 0
    is_size_corrected: bool = False
    baseline: str = ""
    gain: PairedDifference | None = None

    @property
    def rows(self) -> str:
        """The rows that chose, in a few words."""
        if not self.num_official:
            return f"{self.num_rows:,} validation images"
        return (
            f"{self.num_rows - self.num_official:,} training images over {self.num_folds} folds and "
            f"{self.num_official:,} validation images"
        )

    @property
    def basis(self) -> str:
        """The basis of the claims, as a clause."""
        if self.is_size_corrected:
            return f"corrected for the selection and for the images that models of {self.num_folds} folds lack"
        share = (
            f", by models of {100 - 100 / self.num_folds:.0f} % of the training images" if self.num_folds > 1 else ""
        )
        return f"corrected for the selection{share}"

    @property
    def selected(self) -> Selected:
        """The ids that a log keeps."""
        return Selected(self.winner, tuple(member.name for member in self.members), self.log_likelihoods)


@dataclass
class _Pool:
    """Candidates that were scored on the same rows."""

    targets: Tensor
    folds: Tensor
    stats: ClassStats
    num_folds: int
    groups: Tensor | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def has_rows_of(self, saved: SavedValLogits) -> bool:
        """Whether saved logits are of the same rows."""
        return torch.equal(self.targets, saved.targets) and torch.equal(self.folds, saved.folds)

    @property
    def rows(self) -> tuple[Tensor, ClassStats, Rows | None]:
        """Labels (N,), class statistics and groups (N,) of the rows."""
        return self.targets, self.stats, None if self.groups is None else self.groups.numpy()

    @property
    def is_official(self) -> Tensor:
        """Which rows (N,) are of the official split, scored by the models of all folds."""
        return self.folds == self.num_folds

    def parts(self, seed: int) -> Tensor:
        """The folds, or else ten parts, of the rows (N,), by which a blend is decided on; official rows join folds."""
        number, is_dealt = self.num_folds, self.is_official
        if number == 1:
            number, is_dealt = NUM_PARTS, torch.ones_like(is_dealt)
        labels, parts = self.targets[is_dealt].numpy(), self.folds.clone()
        parts[is_dealt] = torch.from_numpy(deal_units(labels, np.arange(len(labels)), number, seed))
        return parts


def select_winner(folder: str, log: TrialLog, spec: SweepSpec, num_test: int = 0) -> Selection | None:
    """Select among the trials and baselines that ran to their end and have logits; None if the objective selects.

    Trials that violate a constraint are no candidates. Methods that train the encoder may be scored on other rows than
    the others: each is compared by the log-likelihood of its own rows, or on the official ones, where these were scored
    over folds. Claims are made without test images only.
    """
    if not spec.selects_by_likelihood:
        return None
    runs = confirmed(log, spec)
    pools = [(pool, BlendPool.fit(pool.candidates, pool.targets)) for pool in _read_pools(folder, log, spec, runs)]
    if not pools:
        return None
    means, best = dict[str, float](), dict[str, tuple[float, _Pool, BlendPool]]()
    for pool, blend_pool in pools:
        own = {
            trial_id: statistics.fmean([value, *_of_more_seeds(folder, log, spec, runs, trial_id, pool)])
            for trial_id, value in _likelihoods(blend_pool, balanced_row_weights(pool.targets)).items()
        }
        # Ties go to the earlier trial, and to a baseline.
        first = max(sorted(own), key=lambda trial_id: own[trial_id])
        means |= own
        best[first] = (_comparable_value(pool, blend_pool, first, own[first]), pool, blend_pool)
    winner = max(sorted(best), key=lambda trial_id: best[trial_id][0])
    _, pool, blend_pool = best[winner]
    num_official = int(pool.is_official.sum())
    selection = Selection(winner, means, {}, len(pool.targets), pool.num_folds, num_official=num_official)
    num_passes, parts = 0, pool.parts(spec.split_seed)
    objection = _objection(pool, parts, num_test)
    if objection:
        selection = replace(selection, objection=objection)
    elif spec.blends is not None:
        blend, temperature = _select_blend(pool, blend_pool, parts, spec.blends)
        num_passes, members = blend.num_passes, blend.members if len(blend.members) > 1 else ()
        selection = replace(selection, members=members, decisions=blend.decisions, temperature=temperature)
    if num_test and len(pool.candidates) * pool.candidates[0].logits.numel() > MAX_GAIN_ELEMENTS:
        return selection
    correct = _corrected_outcomes(pool, blend_pool, spec, num_passes)
    if correct is None:
        return selection
    selection = _with_gain(selection, pool, {record.trial_id for record in log.of("baseline")}, correct)
    return selection if num_test else replace(selection, claims=claims_of_rows(correct, *pool.rows))


def correct_claims(
    folder: str, log: TrialLog, spec: SweepSpec, selection: Selection, pairs: Mapping[str, TrialRecord], row_of: Rows
) -> Selection:
    """The selection with claims of models that train on all images (docs/protocol.md, Claims).

    `pairs` has the runs without pairs of folds by their trials' ids, and `row_of` the row among those of the folds (N,)
    of each of theirs. It stays as it is where logits are missing.
    """
    members = selection.members or (BlendMember(selection.winner, "", 1.0, 1.0, 0.0),)
    of_folds = _scored_members(folder, log, spec, members, {})
    of_pairs = _scored_members(folder, log, spec, members, pairs)
    if of_folds is None or of_pairs is None:
        return selection
    (by_folds, saved), (by_pairs, _) = of_folds, of_pairs
    groups = None if saved.groups is None else saved.groups.numpy()
    claims = corrected_claims(selection.claims, by_folds, by_pairs, row_of, saved.targets, saved.stats[0], groups)
    return replace(selection, claims=claims, is_size_corrected=True)


def _scored_members(
    folder: str, log: TrialLog, spec: SweepSpec, members: Sequence[BlendMember], runs: Mapping[str, TrialRecord]
) -> tuple[RowOutcomes, SavedValLogits] | None:
    """Correctness of members' blended logits, and what was saved, of the runs in `runs`; None if some are missing."""
    logits, saved = dict[str, Tensor](), None
    for record in (log.records[member.name] for member in members):
        rows = read_validation(folder, record, log, runs)
        if rows is None or not rows.is_whole:
            return None
        logits[record.trial_id], saved = _adjusted(rows, record, spec), rows.saved
    if saved is None:
        return None
    correct = (blended_logits(members, logits).argmax(dim=1) == saved.targets).double().numpy()
    counts = np.stack([stats.counts for stats in saved.stats])
    return RowOutcomes(correct, counts[saved.folds.numpy(), saved.targets.numpy()]), saved


def write_selection(folder: str, selection: Selection) -> None:
    """Write selection.json into a sweep's folder."""
    storage.write_json(storage.join(folder, SELECTION_FILE), asdict(selection))


def read_selection(folder: str) -> Selection | None:
    """The selection of a sweep's folder; None before there is one. Raises ImbvlmError for a damaged file."""

    def parse(content: Any) -> Selection:
        claims = {metric: Claim(**claim) for metric, claim in content["claims"].items()}
        members = tuple(BlendMember(**member) for member in content["members"])
        decisions = tuple(BlendDecision(**decision) for decision in content["decisions"])
        gain = None if content.get("gain") is None else PairedDifference(**content["gain"])
        return Selection(**{**content, "claims": claims, "members": members, "decisions": decisions, "gain": gain})

    return read_json(storage.join(folder, SELECTION_FILE), parse, resume_fix(folder))


def describe_selection(selection: Selection, log: TrialLog, spec: SweepSpec, has_test: bool) -> str:
    """Lines on the winner against the best trial by the objective, and on accuracies that may be claimed without test.

    A claim whose interval is wider than MAX_HALF_WIDTH each way is not a number.
    """
    winner, best = selection.winner, next(iter(log.best(spec.objective)), None)
    kind = "the baseline " if log.records[winner].kind == "baseline" else ""
    lines = [
        f"selected by class-balanced log-likelihood on {selection.rows}: {kind}{winner} "
        f"({selection.log_likelihoods[winner]:.3f})"
    ]
    if best is not None and best.trial_id != winner:
        likelihood = selection.log_likelihoods.get(best.trial_id)
        unscored = "wasn't scored over folds" if selection.num_official else "has no logits of its last epoch"
        value = f"which {unscored}" if likelihood is None else f"{likelihood:.3f}"
        lines[0] += f"; the best trial by {spec.objective.removeprefix('val/')} is {best.trial_id} ({value})"
    lines += [] if spec.blends is None else [_describe_blend(selection)]
    if not has_test and selection.claims:
        claims = ", ".join(describe_claim(metric, claim) for metric, claim in selection.claims.items())
        lines.append(f"to expect of images like these (95 %, {selection.basis}): {claims}")
    return "\n".join(lines)


def _describe_blend(selection: Selection) -> str:
    """A line on the decision for or against a blend."""
    if selection.objection:
        return f"no blend was sought: {selection.objection}"
    gains = ", ".join(
        f"{decision.gain:+.3f} ± {decision.standard_error:.3f} over {pluralize(decision.num_passes, 'pass')}"
        for decision in selection.decisions
    )
    gain = f"gain in log-likelihood on images that selected neither it nor the single model: {gains}"
    if not selection.members:
        return f"no blend, since none is better: {gain}"
    members = ", ".join(f"{member.name} {member.weight:.2f}" for member in selection.members)
    return f"delivered is a blend of {members}; {gain}"


def describe_claim(metric: str, claim: Claim) -> str:
    """A claim such as `balanced 64.1 ± 5.0 over 9 classes`, or how little is known."""
    name = metric.removesuffix("_accuracy").replace("_", "-")
    groups = f", {group_note(claim.num_groups)}" if claim.num_groups is not None else ""
    interval = f"± {100 * claim.half_width:.1f}" if claim.standard_error is not None else "no interval"
    width = f"{interval} over {pluralize(claim.num_classes, 'class')}{groups}"
    if claim.half_width > MAX_HALF_WIDTH:
        return f"{name} not known ({width})"
    return f"{name} {100 * claim.value:.1f} {width}"


def _read_pools(folder: str, log: TrialLog, spec: SweepSpec, runs: Mapping[str, TrialRecord]) -> list[_Pool]:
    best = [record for record in log.ranked(spec.objective) if record.state == "finished"]
    eligible = [record for record in best if not log.constraint_violation(record, spec.objective)]
    pools: list[_Pool] = []
    for record in [*log.of("baseline"), *eligible]:
        config = record.trial_config()
        if runs and record.trial_id not in runs and not config.reads_images:
            continue
        rows = read_validation(folder, record, log, runs)
        if rows is None or not rows.is_whole:
            continue
        logits = _adjusted(rows, record, spec)
        pool = next((pool for pool in pools if pool.has_rows_of(rows.saved)), None)
        if pool is None:
            saved = rows.saved
            pools.append(pool := _Pool(saved.targets, saved.folds, saved.stats[0], len(saved.stats), saved.groups))
        pool.candidates.append(Candidate(record.trial_id, pass_key(config), logits.half()))
    return pools


def _adjusted(rows: Validation, record: TrialRecord, spec: SweepSpec) -> Tensor:
    """A trial's logits (N, C) as validation adjusts them; as in `select_adjustments`, only what has learned."""
    return select_adjustment(rows, spec)[1] if METHODS[record.config["method"]].learns else rows.logits


def _objection(pool: _Pool, parts: Tensor, num_test: int) -> str:
    """Why no blend can be decided on or scored; empty if nothing speaks against it."""
    if len(torch.unique(parts)) < 2:
        return "a single validation image can't decide"
    if num_test and not RowLogits.fits(num_test, pool.stats.num_classes):
        return f"the logits of {num_test:,} test images in {pool.stats.num_classes:,} classes take too much memory"
    return ""


def _select_blend(pool: _Pool, blend_pool: BlendPool, parts: Tensor, limits: BlendConfig) -> tuple[Blend, float]:
    """The blend among the strongest candidates, and the temperature that its logits need."""
    candidates = blend_pool.strongest(max(MIN_CANDIDATES, MAX_ELEMENTS // pool.candidates[0].logits.numel()))
    blend = select_blend(candidates, parts, max_members=limits.max_members, max_passes=limits.max_passes)
    logits = blend.combine({candidate.name: candidate.logits for candidate in candidates.candidates})
    return blend, fit_temperature(logits, pool.targets).accepted


def _likelihoods(pool: BlendPool, row_weights: Tensor) -> dict[str, float]:
    """The log-likelihood of each candidate by its name, with weights (N,) of rows."""
    scores = pool.extensions(()).double() @ row_weights
    return {candidate.name: float(score) for candidate, score in zip(pool.candidates, scores, strict=True)}


def _comparable_value(pool: _Pool, blend_pool: BlendPool, name: str, value: float) -> float:
    """A candidate's log-likelihood on the official rows, which other pools have too; without such rows its `value`."""
    if not pool.is_official.any():
        return value
    row_weights = torch.zeros(len(pool.targets), dtype=torch.float64)
    row_weights[pool.is_official] = balanced_row_weights(pool.targets[pool.is_official])
    return _likelihoods(blend_pool, row_weights)[name]


def _of_more_seeds(
    folder: str, log: TrialLog, spec: SweepSpec, runs: Mapping[str, TrialRecord], trial_id: str, pool: _Pool
) -> list[float]:
    """The log-likelihoods of a trial's runs with more seeds on the rows of its pool."""
    values = list[float]()
    for record in log.of("confirm"):
        rows = read_validation(folder, record, log, runs) if record.name == trial_id else None
        if rows is not None and pool.has_rows_of(rows.saved):
            _, logits = select_adjustment(rows, spec)
            of_seed = BlendPool.fit([Candidate(record.trial_id, "", logits)], rows.targets)
            values += _likelihoods(of_seed, balanced_row_weights(rows.targets)).values()
    return values


def _corrected_outcomes(pool: _Pool, blend_pool: BlendPool, spec: SweepSpec, num_passes: int) -> Floats | None:
    """How often (N,) what the whole selection delivers has a row correct; None for a single row or group."""
    *_, groups = pool.rows
    if len(np.unique(np.arange(len(pool.targets)) if groups is None else groups)) < 2:
        return None
    max_members = 1 if spec.blends is None else spec.blends.max_members
    strongest = blend_pool.strongest(max(MIN_CANDIDATES, MAX_CLAIM_ELEMENTS // pool.candidates[0].logits.numel()))

    def correct_of_selected(row_weights: Tensor) -> Tensor:
        return strongest.correct(strongest.select(row_weights, num_passes, max_members))

    return out_of_bag_accuracy(correct_of_selected, pool.targets, groups=groups)


def _with_gain(selection: Selection, pool: _Pool, baselines: Set[str], correct: Floats) -> Selection:
    """The selection with its gain over the best of the baselines on the same rows, whose logits are adjusted, too."""
    own = [candidate for candidate in pool.candidates if candidate.name in baselines]
    if not own:
        return selection
    best = max(own, key=lambda candidate: selection.log_likelihoods[candidate.name])
    theirs = (best.logits.argmax(dim=1) == pool.targets).numpy()
    labels, _, groups = pool.rows
    gain = paired_difference(correct, theirs, labels.numpy(), groups=groups)
    return replace(selection, baseline=best.name, gain=gain)
