"""Selects the winner by the class-balanced log-likelihood of calibrated validation logits, and what may be claimed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.formatting import pluralize
from imbvlm.base.json_file import read_json
from imbvlm.longtail.blending import BlendPool, Candidate
from imbvlm.longtail.claims import Claim, bias_corrected_claims
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.post_hoc_adjustment import balanced_row_weights
from imbvlm.sweep.records.adjustment_selection import read_validation, select_adjustment
from imbvlm.sweep.records.trial_log import SELECTION_FILE, TrialLog, TrialRecord
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.validation_logits import SavedValLogits

# Half-width of a claim's interval above which no number is shown.
MAX_HALF_WIDTH = 0.1


@dataclass(frozen=True)
class Selection:
    """The winner's trial id, log-likelihoods of all candidates as adjusted, by trial id, and claims by metric.

    A log-likelihood is the mean over seeds where a trial ran with several. Claims are of the winner's accuracies as
    adjusted, over `num_rows` validation rows of so many folds.
    """

    winner: str
    log_likelihoods: Mapping[str, float]
    claims: Mapping[str, Claim]
    num_rows: int
    num_folds: int = 1

    @property
    def basis(self) -> str:
        """The basis of the claims, as a clause."""
        share = (
            f", by models of {100 - 100 / self.num_folds:.0f} % of the training images" if self.num_folds > 1 else ""
        )
        return f"corrected for the selection{share}"


@dataclass
class _Pool:
    """Candidates that were scored on the same rows."""

    targets: Tensor
    folds: Tensor
    stats: ClassStats
    records: list[TrialRecord] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def has_rows_of(self, saved: SavedValLogits) -> bool:
        """Whether saved logits are of the same rows."""
        return torch.equal(self.targets, saved.targets) and torch.equal(self.folds, saved.folds)

    def fit(self) -> BlendPool:
        """Give each candidate its temperature."""
        candidates = [
            Candidate(record.trial_id, record.trial_id, logits)
            for record, logits in zip(self.records, self.logits, strict=True)
        ]
        return BlendPool.fit(candidates, self.targets)


def select_winner(folder: str, log: TrialLog, spec: SweepSpec) -> Selection | None:
    """Select among the trials and baselines that ran to their end and have logits; None if the objective selects.

    Trials that violate a constraint are no candidates. Methods that train the encoder may be scored on other rows than
    the others: each is compared by the log-likelihood of its own rows.
    """
    if not spec.selects_by_likelihood:
        return None
    pools = _read_pools(folder, log, spec)
    fitted = [(pool, pool.fit()) for pool in pools]
    likelihoods = {trial_id: value for _, blend_pool in fitted for trial_id, value in _likelihoods(blend_pool).items()}
    if not likelihoods:
        return None
    means = {trial_id: _mean_over_seeds(folder, log, spec, trial_id, value) for trial_id, value in likelihoods.items()}
    # Ties go to the earlier trial, and to a baseline.
    winner = max(sorted(means), key=lambda trial_id: means[trial_id])
    pool, blend_pool = next(pair for pair in fitted if winner in {record.trial_id for record in pair[0].records})
    num_folds = int(pool.folds.max()) + 1
    return Selection(winner, means, _claims(pool, blend_pool), len(pool.targets), num_folds)


def write_selection(folder: str, selection: Selection) -> None:
    """Write selection.json into a sweep's folder."""
    storage.write_bytes(storage.join(folder, SELECTION_FILE), json.dumps(asdict(selection), indent=1).encode())


def read_selection(folder: str) -> Selection | None:
    """The selection of a sweep's folder; None before there is one. Raises ImbvlmError for a damaged file."""

    def parse(content: Any) -> Selection:
        claims = {metric: Claim(**claim) for metric, claim in content["claims"].items()}
        return Selection(**{**content, "claims": claims})

    fix = f"Remove it and go on with: imbvlm sweep resume {folder}"
    return read_json(storage.join(folder, SELECTION_FILE), parse, fix)


def describe_selection(selection: Selection, log: TrialLog, spec: SweepSpec, has_test: bool) -> str:
    """Lines on the winner against the best trial by the objective, and on accuracies that may be claimed without test.

    A claim whose interval is wider than MAX_HALF_WIDTH each way is not a number.
    """
    winner, best = selection.winner, next(iter(log.best(spec.objective)), None)
    kind = "the baseline " if log.records[winner].kind == "baseline" else ""
    lines = [
        f"selected by class-balanced log-likelihood on {selection.num_rows:,} validation images: {kind}{winner} "
        f"({selection.log_likelihoods[winner]:.3f})"
    ]
    if best is not None and best.trial_id != winner:
        likelihood = selection.log_likelihoods.get(best.trial_id)
        value = "which has no logits of its last epoch" if likelihood is None else f"{likelihood:.3f}"
        lines[0] += f"; the best trial by {spec.objective.removeprefix('val/')} is {best.trial_id} ({value})"
    if not has_test and selection.claims:
        claims = ", ".join(describe_claim(metric, claim) for metric, claim in selection.claims.items())
        lines.append(f"to expect of images like these (95 %, {selection.basis}): {claims}")
    return "\n".join(lines)


def describe_claim(metric: str, claim: Claim) -> str:
    """A claim such as `balanced 64.1 ± 5.0 over 9 classes`, or how little is known."""
    name = metric.removesuffix("_accuracy").replace("_", "-")
    width = f"± {100 * claim.half_width:.1f} over {pluralize(claim.num_classes, 'class')}"
    if claim.half_width > MAX_HALF_WIDTH:
        return f"{name} not known ({width})"
    return f"{name} {100 * claim.value:.1f} {width}"


def _read_pools(folder: str, log: TrialLog, spec: SweepSpec) -> list[_Pool]:
    best = [record for record in log.ranked(spec.objective) if record.state == "finished"]
    eligible = [record for record in best if not log.constraint_violation(record, spec.objective)]
    pools: list[_Pool] = []
    for record in [*log.of("baseline"), *eligible]:
        rows = read_validation(folder, record, log)
        if rows is None or not rows.is_whole:
            continue
        _, logits = select_adjustment(rows, spec)
        pool = next((pool for pool in pools if pool.has_rows_of(rows.saved)), None)
        if pool is None:
            pools.append(pool := _Pool(rows.saved.targets, rows.saved.folds, rows.saved.stats[0]))
        pool.records.append(record)
        pool.logits.append(logits.half())
    return pools


def _likelihoods(pool: BlendPool) -> dict[str, float]:
    """The class-balanced log-likelihood of each candidate by its name."""
    scores = pool.extensions(()).double() @ balanced_row_weights(pool.targets)
    return {candidate.name: float(score) for candidate, score in zip(pool.candidates, scores, strict=True)}


def _mean_over_seeds(folder: str, log: TrialLog, spec: SweepSpec, trial_id: str, value: float) -> float:
    """The mean of a trial's log-likelihood and those of its runs with more seeds."""
    values = [value]
    for record in log.of("confirm"):
        rows = read_validation(folder, record, log) if record.name == trial_id else None
        if rows is not None:
            _, logits = select_adjustment(rows, spec)
            values += _likelihoods(BlendPool.fit([Candidate(record.trial_id, "", logits)], rows.targets)).values()
    return statistics.fmean(values)


def _claims(pool: _Pool, blend_pool: BlendPool) -> dict[str, Claim]:
    """Bias-corrected claims of what the whole selection delivers; none for a single row."""
    if len(pool.targets) < 2:
        return {}

    def correct_of_selected(row_weights: Tensor) -> Tensor:
        return blend_pool.correct(blend_pool.select(row_weights, 0))

    return bias_corrected_claims(correct_of_selected, pool.targets, pool.stats)
