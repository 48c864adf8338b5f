"""A model's card, README.md in the form of the Hugging Face hub: data, metrics, selection, limits, license."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import mean_std, percent, pluralize
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.encoder_entries import EncoderTerms
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.inference.blend_merging import TrainedMember
from imbvlm.inference.calibration_file import ModelCalibration
from imbvlm.inference.taxonomy_file import ModelTaxonomy, learn_for
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.longtail.roll_up import RankScores
from imbvlm.sweep.records.difference import (
    POST_HOC_MEANS,
    Verdict,
    delivered_runs,
    delivered_verdict,
    refits_of,
    splits_of,
    title_in,
    verdict_on_test,
)
from imbvlm.sweep.records.summary_tables import HEADINGS, METRICS, rank_cells, rank_metrics
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord, describe_trial, last_values
from imbvlm.sweep.records.winner_selection import describe_claim, read_selection
from imbvlm.sweep.report.rendering import environment
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.test_predictions import POST_HOC, TEST

CARD_FILE = "README.md"
# Precision and coverage for which a card says what is promised.
CARD_LEVEL = 0.9
UNSTATED = "other"


@dataclass(frozen=True)
class CardContext:
    """The data of a card; `refits` are the records that were scored on the test split, one per seed.

    `members` are those of the model as delivered; none for a trial's first refit.
    """

    spec: SweepSpec
    log: TrialLog
    manifest: Manifest
    record: TrialRecord
    config: TrialConfig
    adjustment: PostHocAdjustment | None
    refits: Sequence[TrialRecord]
    license_id: str
    has_onnx: bool
    has_text: bool
    # The commit of the hub that the encoder is from.
    revision: str
    encoder_terms: EncoderTerms
    # Why probabilities may not be called calibrated; empty where they may.
    uncalibrated: str = ""
    # Scores in the model's folder, for decisions and for roll-up.
    calibration: ModelCalibration | None = None
    tree: ModelTaxonomy | None = None
    members: Sequence[TrainedMember] = ()

    @property
    def is_adjusted(self) -> bool:
        """Whether the logits are adjusted, and the adjusted model was scored if any was."""
        was_scored = bool(last_values(self.refits, f"{POST_HOC}/top1_accuracy"))
        return self.adjustment not in (None, PostHocAdjustment()) and (was_scored or not self.refits)


def model_card(card: CardContext) -> str:
    """The whole README.md."""
    best, adjustment, rows = card.record.best_epoch(card.spec.objective) or {}, card.adjustment, _rows(card)
    scores = [[title, str(len(records)), *map(mean_std, _scores(records, split))] for title, records, split in rows]
    on_validation = [["split", *HEADINGS], ["validation", *(percent(best.get(f"val/{metric}")) for metric in METRICS)]]
    is_baseline = bool(card.refits) and card.refits[0].name in {record.name for record in card.log.of("baseline")}
    manifest = card.manifest
    templates = environment("imbvlm.sweep.export")
    templates.filters["pluralize"] = pluralize
    return templates.get_template("README.md").render(
        card=card,
        metadata=_metadata(card, rows),
        name=_name(card),
        encoder=card.config.encoder.name,
        what=describe_trial(card.record),
        stats=manifest.class_stats(),
        table=[["what", "seeds", *HEADINGS], *scores] if card.refits else on_validation,
        rank_table=_rank_table(rows),
        has_adjusted_baseline=any(split == POST_HOC for title, _, split in rows if title.startswith("baseline")),
        verdict=None if is_baseline else _verdict(card),
        members=_members(card),
        selected=_selected(card),
        claims=_claims(card),
        decisions=_decisions(card),
        adjustment=adjustment,
        is_plain=adjustment in (None, PostHocAdjustment()),
        config_yaml=dump_yaml(card.config.to_tree()),
        test_labels=manifest.labels[manifest.rows_of("test")].tolist(),
        POST_HOC_MEANS=POST_HOC_MEANS,
        UNSTATED=UNSTATED,
    )


def _is_winner(card: CardContext) -> bool:
    return card.log.selected is not None and card.record.trial_id == card.log.selected.winner


def _verdict(card: CardContext) -> Verdict | None:
    """The comparison with the baselines: of the delivered model that of its runs."""
    if card.members:
        return delivered_verdict(card.log, card.spec.objective)
    return verdict_on_test(card.log, card.refits, "this model", card.spec.objective)


def _members(card: CardContext) -> list[list[str]]:
    """Rows on a blend's members; none for a single trial."""
    rows = []
    for member in card.members if card.members[1:] else ():
        record = card.log.records[member.name]
        adjustment = PostHocAdjustment() if member.post_hoc is None else member.post_hoc.adjustment
        numbers = (member.weight, member.temperature * adjustment.temperature, adjustment.tau, adjustment.alpha)
        rows.append([member.name, record.name or describe_trial(record), *(f"{number:.3g}" for number in numbers)])
    return rows


def _name(card: CardContext) -> str:
    return f"{card.spec.name}-{card.record.trial_id}"


def _selected(card: CardContext) -> str:
    """How the model was selected, the beginning of a sentence."""
    log, record = card.log, card.record
    num_trials = sum(trial.is_over for trial in log.of("search"))
    if card.members[1:] or _is_winner(card):
        own = f"the baseline {record.name}, the winner" if record.kind == "baseline" else "the winner"
        own = f"a blend of {len(card.members)}" if card.members[1:] else own
        number, selection = pluralize(len(log.of("baseline")), "baseline"), read_selection(log.folder)
        rows = "validation images" if selection is None else selection.rows
        return (
            f"{own[0].upper()}{own[1:]} of {pluralize(num_trials, 'trial')} and {number} by class-balanced "
            f"log-likelihood on {rows}"
        )
    rank = [trial.trial_id for trial in log.best(card.spec.objective)].index(record.trial_id) + 1
    return f"Number {rank} of {pluralize(num_trials, 'trial')} by {card.spec.best_objective} on validation images"


def _claims(card: CardContext) -> tuple[str, str] | None:
    """The basis of the delivered model's claims, and the claims; None for other trials."""
    selection = read_selection(card.log.folder) if _is_winner(card) else None
    if selection is None or not selection.claims or (selection.members and not card.members):
        return None
    return selection.basis, ", ".join(describe_claim(metric, claim) for metric, claim in selection.claims.items())


def _decisions(card: CardContext) -> list[str]:
    """Sentences on what decisions and roll-ups promise; none for a model without scores."""
    calibration, tree = card.calibration, card.tree
    if calibration is None or isinstance(calibration.rows, str):
        return []
    basis, *notes = calibration.decide(accept=CARD_LEVEL, sets=CARD_LEVEL).notes
    if tree is not None and isinstance(tree.scores, RankScores):
        try:
            thresholds = learn_for(tree, CARD_LEVEL).thresholds
        except ImbvlmError:
            thresholds = (math.inf,) * len(tree.taxonomy.ranks)
        ranks = zip(tree.taxonomy.ranks, thresholds, strict=True)
        given = [rank for rank, threshold in ranks if threshold < math.inf]
        notes.append(f"roll-up {CARD_LEVEL:g}: names of {' and '.join(given) or 'no rank'} have a promise")
    return [f"{basis[0].upper()}{basis[1:]}. They hold for images that come as those alone.", *notes]


def _rows(card: CardContext) -> list[tuple[str, Sequence[TrialRecord], str]]:
    """The scored models, each with its records and the split of its scores: this one first, then the baselines."""
    ours, own_name = card.refits, card.refits[0].name if card.refits else ""
    rows = [("this model", ours, POST_HOC if card.is_adjusted else TEST)]
    if card.is_adjusted and POST_HOC in splits_of(ours, METRICS):
        rows.append(("before its adjustments", ours, TEST))
    runs = delivered_runs(card.log) if card.members else []
    if len(runs) > 1 and ours:
        rows.append((f"each of its {len(runs)} seeds", runs, splits_of(runs)[-1]))
    for name in dict.fromkeys(record.name for record in card.log.of("baseline") if record.name != own_name):
        theirs = refits_of(card.log, name)
        splits = splits_of(theirs, METRICS) if theirs else []
        rows += [(f"baseline: {title_in(name, split)}", theirs, split) for split in splits]
    return rows


def _scores(records: Sequence[TrialRecord], split: str) -> list[list[float]]:
    return [last_values(records, f"{split}/{metric}") for metric in METRICS]


def _rank_table(rows: Sequence[tuple[str, Sequence[TrialRecord], str]]) -> list[list[str]]:
    """Errors by rank of the scored models under a heading; none without a taxonomy."""
    metrics = rank_metrics(record for _, records, _ in rows for record in records)
    cells = [[title, *rank_cells(records, split, metrics)] for title, records, split in rows] if metrics else []
    return [["what", *metrics.values()], *cells] if cells else []


def _metadata(card: CardContext, rows: Sequence[tuple[str, Sequence[TrialRecord], str]]) -> str:
    """The metadata for the hub: scores of the model as exported, and those before its adjustments apart from them."""
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=card.manifest.name,
            dataset_name=card.manifest.name,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"{heading} accuracy, test{'' if title == 'this model' else f', {title}'}",
            metric_value=round(statistics.fmean(values), 4),
        )
        for title, records, split in rows
        if records is card.refits
        for heading, values in zip(HEADINGS, _scores(records, split), strict=True)
        if values
    ]
    is_stated = card.license_id != UNSTATED
    data = ModelCardData(
        license=card.license_id,
        license_name=None if is_stated else "not-stated",
        license_link=None if is_stated else "#license",
        library_name="imbvlm",
        pipeline_tag="image-classification",
        tags=[
            "image-classification", "imbvlm", "long-tail",
            *(["clip"] if card.has_text else []), *(["onnx"] if card.has_onnx else []),
        ],
        model_name=_name(card) if results else None,
        eval_results=results or None,
        encoder_license=card.encoder_terms.license or None,
        encoder_notes=card.encoder_terms.notes or None,
    )  # fmt: skip
    # The library writes YAML 1.1, in which a data set called 5e-4 is no text for the hub.
    return dump_yaml(data.to_dict())  # type: ignore[no-untyped-call]
