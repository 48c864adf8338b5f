"""The content of a report, independent of HTML: headline, figures, tables, confused pairs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import Z95, duration, join_limited, mean_std, percent, pluralize
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.data.manifest import Manifest
from imbvlm.longtail.claims import Claim
from imbvlm.longtail.class_stats import SHOT_GROUPS
from imbvlm.longtail.group_gap import GroupedRows, group_note, group_standard_error
from imbvlm.longtail.metrics import balanced_standard_error
from imbvlm.sweep.plan.feasibility import data_counts, num_folds
from imbvlm.sweep.records.difference import Verdict, title_in
from imbvlm.sweep.records.resource_usage import phase_rows, stopping_text, store_text
from imbvlm.sweep.records.summary_tables import encoder_notes, verdict
from imbvlm.sweep.records.sweep_folder import SuspectLabel
from imbvlm.sweep.records.trial_log import TrialRecord
from imbvlm.sweep.records.winner_selection import MAX_HALF_WIDTH
from imbvlm.sweep.report import class_plots, score_tables, search_plots, study_tables
from imbvlm.sweep.report.plotting import Figure, Table
from imbvlm.sweep.report.report_data import PerClassResults, ReportData, ScoredRefit
from imbvlm.sweep.report.report_statistics import importances, rungs
from imbvlm.sweep.report.review_sheet import ReviewSheet, review_sheet
from imbvlm.sweep.report.score_tables import ConfusedPair
from imbvlm.sweep.report.thumbnails import read_manifest, thumbnails

# Images with suspicious labels that are shown.
NUM_SUSPECTS = 24
# Classes whose accuracies stand in large type.
GROUPS = ("balanced", "top1", *SHOT_GROUPS)


@dataclass(frozen=True)
class HeadlineNumber:
    """A number of the headline; `notes` have the same number of other models."""

    label: str
    value: str
    notes: Sequence[str]


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page, and the tables that are written to files only.

    Numbers of images are by split; a split whose number is unknown is absent. Figures and tables are by their place on
    the page. `review` has the review sheet's sentences. `class_orders` has all classes in several orders. Confused
    pairs stand with images as data: URIs, and `pairs_problem` says why some are missing; empty if none are. The first
    of `suspects` stand with theirs, empty where it can't be read.
    """

    source: ReportData
    encoders: Sequence[str]
    image_sizes: Sequence[int]
    encoder_notes: Sequence[str]
    num_images: Mapping[str, int]
    verdict: Verdict
    facts: Sequence[HeadlineNumber]
    figures: Mapping[str, Sequence[Figure]]
    tables: Mapping[str, Sequence[Table]]
    class_orders: Sequence[Table]
    pairs: Sequence[tuple[ConfusedPair, Sequence[str]]]
    pairs_problem: str
    review: ReviewSheet | None
    suspects: Sequence[tuple[SuspectLabel, str]]

    @property
    def all_figures(self) -> list[Figure]:
        """The figures in the page's order."""
        return [*itertools.chain(*self.figures.values())]

    @property
    def all_tables(self) -> list[Table]:
        """The tables in the page's order, without the orders of classes."""
        return [*itertools.chain(*self.tables.values())]


def build(source: ReportData) -> ReportContent:
    """Build the report of a sweep's present state."""
    manifest = read_manifest(source.spec, source.folder)
    record = source.best or next(iter(source.log.records.values()))
    delivered = [source.log.records[member.name] for member in source.members] or [record]
    configs = dict.fromkeys(part.trial_config().encoder for part in delivered)
    pairs = score_tables.worst_pairs(source)
    images, problems = _images(pairs, manifest)
    sheet, update = review_sheet(source, manifest), source.update
    orders, notes = score_tables.class_orders(source), encoder_notes(source.log, source.spec)
    # A study samples nothing, so there is no parameter to judge.
    ranked = [] if source.spec.study else importances(source)
    order = [importance.key for importance in ranked]
    slices = [] if source.spec.study else search_plots.slices(source, order)
    figures: dict[str, Sequence[Figure | None]] = {
        "result": [class_plots.shot_group_bars(source), class_plots.accuracy_over_size(source)],
        "classes": [class_plots.sorted_classes(source), class_plots.calibration(source)],
        "search": [
            search_plots.history(source),
            search_plots.against_cost(source),
            search_plots.against_few_shot(source),
            search_plots.rung_against_end(source),
        ],
        "importance": [search_plots.importance_bars(ranked)],
        "slices": slices,
        "parallel": [search_plots.parallel(source, order)] if slices else [],
    }
    tables: dict[str, Sequence[Table | None]] = {
        "study": [] if source.best is None else study_tables.study_tables(source),
        "result": [
            score_tables.scores(source),
            score_tables.rank_errors(source),
            score_tables.roll_up(source, manifest),
            score_tables.blend(source),
            score_tables.margins(source),
            *score_tables.unseen_groups(source),
            *([] if update is None else update.tables),
            study_tables.fresh_gap(source),
            score_tables.over_seeds(source),
            score_tables.best_trials(source),
        ],
        "review": [] if sheet is None else sheet.tables,
        "suspects": [score_tables.suspects(source)],
        "class_groups": [score_tables.class_groups(source)],
        "class_changes": score_tables.class_changes(orders),
        "confused": [score_tables.confused_pairs(pairs)],
        "pareto": [score_tables.pareto(source)],
        "stops": [score_tables.stops(source)],
        "trials": [score_tables.all_trials(source)],
        "strata": score_tables.strata(source),
        "compute": [*_compute(source), study_tables.parameters(source)],
        "data": [score_tables.quarantine(source)],
        "files": [score_tables.per_class(source), Table("notes", "Notes", ["note"], [[note] for note in notes])],
    }
    return ReportContent(
        source=source,
        encoders=[*dict.fromkeys(config.name for config in configs)],
        image_sizes=sorted({size for config in configs if (size := _image_size(config)) is not None}),
        encoder_notes=notes,
        num_images=_num_images(source, record, manifest),
        verdict=_verdict(source),
        facts=_facts(source),
        figures={place: [figure for figure in items if figure] for place, items in figures.items()},
        tables={place: [table for table in items if table and table.rows] for place, items in tables.items()},
        class_orders=orders,
        pairs=[*zip(pairs, images, strict=True)],
        pairs_problem=join_limited(problems, 1),
        review=sheet,
        suspects=_suspects(source, manifest),
    )


def _image_size(config: EncoderConfig) -> int | None:
    """The side of the encoder's square input in pixels; None if the folder of a local encoder is gone."""
    # Imported here because it takes seconds.
    from imbvlm.models.encoders.encoder_factory import describe_encoder

    try:
        return describe_encoder(config).image_size
    except ImbvlmError:
        return None


def _num_images(source: ReportData, record: TrialRecord, manifest: Manifest | str) -> dict[str, int]:
    if not isinstance(manifest, str):
        spec, config = source.spec, record.trial_config()
        folds = 1 if config.reads_images else num_folds(spec, manifest)
        stats, num_val = data_counts(manifest, spec.split_seed, folds)
        return {
            "training": int(stats.counts.sum()),
            "validation": sum(num_val),
            "test": len(manifest.rows_of("test")),
        }
    return {} if source.classes is None else {"test": int(source.classes.total.sum()) // source.classes.num_seeds}


def _verdict(source: ReportData) -> Verdict:
    """The winner against the baselines: on the test split if it was scored, else on validation."""
    if source.best is None:
        return Verdict("No trial has given a result yet.", "", False)
    if source.verdict_on_test is not None:
        return source.verdict_on_test
    sentence = verdict(source.log, source.spec, source.selection)
    details = "No test split has been scored: it takes images in a folder test/ next to train/, or --test-share."
    return Verdict(f"{sentence[0].upper()}{sentence[1:]}.", details, False)


def _facts(source: ReportData) -> list[HeadlineNumber]:
    """Accuracies of the delivered model on the test split; without one what may be claimed of it, or a validation.

    A validation score of the best of many trials is too high, and a claim is not.
    """
    if source.has_test and source.delivered is not None:
        return _test_facts(source, source.delivered)
    if source.selection is not None and source.selection.claims:
        return [_claimed(metric, claim, source.selection.basis) for metric, claim in source.selection.claims.items()]
    objective = source.spec.objective
    records = [source.best, *source.log.best(objective, "baseline")[:2]] if source.best is not None else []
    epochs = [(record.name, record.best_epoch(objective) or {}) for record in records]
    return [
        HeadlineNumber(
            f"{score_tables.group_name(group)}, validation",
            f"{percent(epochs[0][1][key])} %",
            tuple(f"{name} {percent(epoch[key])}" for name, epoch in epochs[1:] if key in epoch),
        )
        for group, key in ((group, f"val/{group}_accuracy") for group in GROUPS)
        if epochs and key in epochs[0][1]
    ]


def _test_facts(source: ReportData, delivered: ScoredRefit) -> list[HeadlineNumber]:
    """The delivered model's accuracies with their 95 % intervals; as notes those of its seeds and of the baselines."""
    split = delivered.splits[-1]
    others = [(refit, side) for refit, side in class_plots.shown_splits(source) if (refit, side) != (delivered, split)]
    facts = []
    for group in GROUPS:
        metric = f"{group}_accuracy"
        values = delivered.values_in(split, metric)
        if not values:
            continue
        half_width, rows = _interval(delivered.classes, group, source.grouped_rows)
        runs = source.delivered_runs
        seeds = [] if runs is None or runs is delivered else runs.values_in(runs.splits[-1], metric)
        notes = [rows, *([f"over {len(seeds)} seeds {mean_std(seeds)}"] if len(seeds) > 1 else [])]
        for refit, side in others:
            name = "as trained" if refit is delivered else title_in(refit.name, side)
            theirs = refit.values_in(side, metric)
            notes += [f"{name} {percent(statistics.fmean(theirs))}"] if theirs else []
        value = f"{percent(statistics.fmean(values))}{half_width} %"
        facts.append(HeadlineNumber(score_tables.group_name(group), value, [note for note in notes if note]))
    return facts


def _interval(classes: PerClassResults | None, group: str, rows: GroupedRows | None) -> tuple[str, str]:
    """A 95 % interval's half-width such as ` ± 2.1`, by the sampling of images in each class, and their number.

    `rows` with groups have it by resampled groups, or none where these are too few.
    """
    if classes is None:
        return "", ""
    members = classes.stats.shot_groups.get(group, np.arange(len(classes.total)))
    correct, total = classes.correct[members] / classes.num_seeds, classes.total[members] // classes.num_seeds
    if group == "top1":
        correct, total = correct.sum(keepdims=True), total.sum(keepdims=True)
    counts = f"{total.sum():,} test images in {pluralize(int((classes.total[members] > 0).sum()), 'class')}"
    error: float | None = balanced_standard_error(correct, total)
    if rows is not None and error is not None:
        rows = rows.of_classes(members, joined=group == "top1")
        error, counts = group_standard_error(rows, error), f"{counts}, {group_note(rows.num_groups)}"
    return "" if error is None else f" ± {percent(Z95 * error)}", counts


def _claimed(metric: str, claim: Claim, basis: str) -> HeadlineNumber:
    is_number = claim.half_width <= MAX_HALF_WIDTH
    value = f"{percent(claim.value)} ± {percent(claim.half_width)} %" if is_number else "not known"
    groups = f", {group_note(claim.num_groups)}" if claim.num_groups is not None else ""
    rows = f"to expect, over {pluralize(claim.num_classes, 'class')} and {claim.num_rows:,} validation images{groups}"
    is_wide = not is_number and claim.standard_error is not None
    notes = (rows, basis, *([f"they tell it to ± {percent(claim.half_width)} points"] if is_wide else []))
    return HeadlineNumber(score_tables.group_name(metric.removesuffix("_accuracy")), value, notes)


def _images(pairs: Sequence[ConfusedPair], manifest: Manifest | str) -> tuple[list[list[str]], list[str]]:
    """Some images of each pair as data: URIs, and why others can't be shown."""
    if isinstance(manifest, str):
        return [[] for _ in pairs], [manifest] if pairs else []
    shown = [thumbnails(manifest, "test", pair.rows) for pair in pairs]
    return [uris for uris, _ in shown], [problem for _, problems in shown for problem in problems]


def _suspects(source: ReportData, manifest: Manifest | str) -> list[tuple[SuspectLabel, str]]:
    """The first images whose labels look wrong, each as a data: URI."""
    shown = []
    for suspect in (source.suspects or [])[:NUM_SUSPECTS]:
        uris: Sequence[str] = ()
        if not isinstance(manifest, str):
            position = int(np.searchsorted(manifest.rows_of(suspect.split), suspect.row))
            uris, _ = thumbnails(manifest, suspect.split, [position])
        shown.append((suspect, "".join(uris)))
    return shown


def _compute(source: ReportData) -> list[Table]:
    """The time of each phase, if it was counted, and the time that was used and saved."""
    compute, search = source.compute, source.log.of("search")
    seconds = sum(record.seconds() for record in search if record.ended_at)
    savings = {"feature store": store_text(compute), "early stopping": stopping_text(compute)}
    correlations = {
        f"rung at {rung.share:.0%}": f"rank correlation with the end: "
        f"{'too few to tell' if rung.correlation is None else f'{rung.correlation:.2f}'}, over the "
        f"{rung.num_trials} trials that finished"
        for rung in rungs(source)
    }
    rows = [
        ["search", f"{len(search)} trials, {duration(seconds)} of their own time"],
        *([name, f"{text[0].upper()}{text[1:]}."] for name, text in {**savings, **correlations}.items() if text),
    ]
    header, *times = [
        row if compute.plan is not None else row[::2] for row in (["", "planned", "took"], *phase_rows(compute))
    ]
    return [Table("time", "Where the time went", header, times), Table("compute", "Used and saved", ["", ""], rows, 2)]
