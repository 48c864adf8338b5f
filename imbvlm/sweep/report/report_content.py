"""The content of a report, section by section, independent of HTML."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import duration, percent, pluralize
from imbvlm.longtail.class_stats import SHOT_GROUPS
from imbvlm.sweep.records.difference import POST_HOC, Verdict, title_in, verdict_on_test
from imbvlm.sweep.records.resource_usage import phase_rows, stopping_text, store_text
from imbvlm.sweep.records.summary_tables import verdict
from imbvlm.sweep.records.trial_log import describe_trial
from imbvlm.sweep.report import class_plots, score_tables, search_plots, study_tables
from imbvlm.sweep.report.plotting import Figure, Table
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.report_statistics import importances, rungs, search_bias_note
from imbvlm.sweep.report.thumbnails import read_manifest, thumbnails


@dataclass(frozen=True)
class ConfusedPair:
    """A class and the class that it is taken for, with some of the images as data: URIs."""

    class_names: tuple[str, str]
    detail: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Figures side by side; small ones go three in a row."""

    figures: Sequence[Figure]
    small: bool = False


@dataclass(frozen=True)
class ConfusedPairs:
    """Confused pairs as cards."""

    title: str
    pairs: Sequence[ConfusedPair]


@dataclass(frozen=True)
class CollapsedTable:
    """A long table, initially closed."""

    table: Table


@dataclass(frozen=True)
class Columns:
    """Tables side by side on a wide page."""

    tables: Sequence[Table]


Block = Figure | Grid | Table | Columns | ConfusedPairs | CollapsedTable | str


@dataclass
class ReportSection:
    """A heading with blocks; a str is a paragraph."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block | None) -> None:
        """Append blocks; None stands for a block that the sweep has no data for."""
        self.blocks += [block for block in blocks if block is not None]


@dataclass(frozen=True)
class HeadlineNumber:
    """A number of the headline."""

    label: str
    value: str
    # The same number of other models.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page; `extra_tables` are written to files only.

    `facts_note` says which model the headline's numbers belong to. `notes` name everything that the page lacks.
    """

    title: str
    subtitle: str
    verdict: Verdict
    facts: list[HeadlineNumber]
    facts_note: str
    sections: list[ReportSection]
    extra_tables: list[Table]
    notes: list[str]


def build(source: ReportData) -> ReportContent:
    """Build the report of a sweep's present state."""
    classes, notes = _classes(source)
    sections = [_result(source), classes, _search(source), _mattered(source), _compute(source), _data(source)]
    extra = [table for table in (score_tables.per_class(source), score_tables.all_trials(source)) if table]
    return ReportContent(
        title=source.spec.name,
        subtitle=_subtitle(source),
        verdict=_verdict(source),
        facts=_facts(source),
        facts_note=_facts_note(source),
        sections=[section for section in sections if section.blocks],
        extra_tables=extra,
        notes=notes,
    )


# --------------------------------------------------------------------------------------------------- headline


def _verdict(source: ReportData) -> Verdict:
    """The winner against the baselines: on the test split if it was scored, else on validation."""
    if source.best is None:
        return Verdict("No trial has given a result yet.", "", False)
    on_test = None if source.winner is None else verdict_on_test(source.log, source.winner.records, "the winner")
    if on_test is not None:
        return on_test
    sentence = verdict(source.log, source.spec)
    details = "No test split has been scored: it takes images in a folder test/ next to train/, or --test-share."
    return Verdict(f"{sentence[0].upper()}{sentence[1:]}.", details, False)


def _facts(source: ReportData) -> list[HeadlineNumber]:
    best, facts = source.log.best(source.spec.objective), []
    winner = source.winner
    if winner is not None and source.has_test:
        for group in ("balanced", "top1", *SHOT_GROUPS):
            exported = winner.splits[-1]
            values = winner.values_in(exported, f"{group}_accuracy")
            if not values:
                continue
            note = []
            for other, split in class_plots.shown_splits(source):
                theirs = other.values_in(split, f"{group}_accuracy")
                name = "as trained" if other is winner else title_in(other.name, split)
                if theirs and (other, split) != (winner, exported):
                    note.append(f"{name} {percent(statistics.fmean(theirs))}")
            facts.append(HeadlineNumber(_group_name(group), f"{percent(statistics.fmean(values))} %", tuple(note)))
    elif best:
        others = source.log.best(source.spec.objective, "baseline")[:2]
        baselines = [(record.name, record.best_epoch(source.spec.objective) or {}) for record in others]
        epoch = best[0].best_epoch(source.spec.objective) or {}
        for group in ("balanced", "top1", *SHOT_GROUPS):
            key = f"val/{group}_accuracy"
            note = [f"{name} {percent(theirs[key])}" for name, theirs in baselines if key in theirs]
            if key in epoch:
                facts.append(
                    HeadlineNumber(f"{_group_name(group)}, validation", f"{percent(epoch[key])} %", tuple(note))
                )
    return facts


def _facts_note(source: ReportData) -> str:
    """The model that the headline's numbers belong to, and the numbers of the seed whose weights are exported."""
    winner = source.winner
    if winner is None or not source.has_test:
        return ""
    split, first = winner.splits[-1], winner.records[0]
    config, num_seeds = first.trial_config(), len(winner.records)
    how = "adjusted post hoc, as imbvlm export gives it" if split == POST_HOC else "as imbvlm export gives it"
    text = f"Large numbers: the winner {how}, on the test split"
    if num_seeds > 1 and config.train is not None:
        keys = (("balanced", "balanced_accuracy"), ("overall", "top1_accuracy"))
        alone = [f"{name} {percent(values[0])}" for name, key in keys if (values := winner.values_in(split, key))]
        text += (
            f", means of {num_seeds} seeds. The exported weights are those of seed {config.train.seed}: counting what "
            f"imbvlm predict gives for the test images finds {', '.join(alone)}"
        )
    crops = " imbvlm predict reads five crops of an image, and these numbers one." if config.eval.tte != "none" else ""
    return f"{text}.{crops}"


def _group_name(group: str) -> str:
    return {"top1": "overall", "zero_train": "no training"}.get(group, group.replace("_", "-"))


def _subtitle(source: ReportData) -> str:
    search = source.log.of("search")
    parts = [f"{sum(record.state != 'running' for record in search)} of {source.spec.num_trials} trials"]
    parts.append(f"on {source.spec.base['data']['manifest']}")
    if source.compute.spent.seconds:
        parts.append(f"in {duration(source.compute.spent.seconds)}")
    return f"{', '.join(parts)}; {_encoder_text(source)}"


def _encoder_text(source: ReportData) -> str:
    """The encoder of the best trial, or of any trial before there is a best one, and the size of its images."""
    # Imported here because it takes seconds.
    from imbvlm.models.encoders.encoder_factory import describe_encoder

    record = source.best or next(iter(source.log.records.values()))
    encoder = record.trial_config().encoder
    try:
        size = describe_encoder(encoder).image_size
    except ImbvlmError:
        # The folder of a local encoder may be gone; the page then shows only its name.
        return f"encoder {encoder.name}"
    return f"encoder {encoder.name} at {size} x {size} pixels"


# --------------------------------------------------------------------------------------------------- sections


def _result(source: ReportData) -> ReportSection:
    section, best = ReportSection("result", "Result"), source.best
    if best is not None:
        section.add(f"Winner: {best.trial_id}, {describe_trial(best)}.", *study_tables.study_tables(source))
    section.add(
        _grid(class_plots.shot_group_bars(source), class_plots.accuracy_over_size(source)),
        score_tables.scores(source),
        score_tables.margins(source),
        study_tables.fresh_gap(source),
        score_tables.over_seeds(source),
        None if best is None else score_tables.best_trials(source),
    )
    return section


def _grid(*figures: Figure | None) -> Grid | None:
    """The figures that the sweep has data for, side by side; None without any."""
    available = [figure for figure in figures if figure is not None]
    return Grid(available) if available else None


def _columns(tables: Sequence[Table]) -> Columns | None:
    return Columns(tables) if tables else None


def _classes(source: ReportData) -> tuple[ReportSection, list[str]]:
    """The section, and a note if it lacks images of confused pairs."""
    section, shown = ReportSection("classes", "Classes"), source.classes
    if shown is not None and (shown.split == POST_HOC or shown.num_seeds > 1):
        title = title_in(source.scored[0].name, shown.split)
        section.add(f"Classes of the model {title!r}, over its {shown.num_seeds} seeds together.")
    section.add(score_tables.class_groups(source), _columns(score_tables.class_changes(source)))
    pairs, reason = _pairs(source)
    notes = [f"Not all images of confused pairs are shown: {reason}"] if reason else []
    if pairs:
        section.add(ConfusedPairs("Confused most", pairs), *notes)
    confused = score_tables.confused_pairs(source)
    section.add(
        None if confused is None else CollapsedTable(confused),
        _grid(class_plots.sorted_classes(source), class_plots.calibration(source)),
    )
    return section, notes


def _pairs(source: ReportData) -> tuple[list[ConfusedPair], str]:
    """Cards of the most confused pairs, and why some of their images can't be shown, empty if all are."""
    record = source.classes
    if record is None or not record.confusions:
        return [], ""
    manifest = read_manifest(source.spec, source.folder)
    pairs, reasons = [], [manifest] if isinstance(manifest, str) else []
    for label, predicted, count, rows in score_tables.worst_pairs(record):
        share = percent(count / record.total[label])
        trained = record.stats.split_counts[label]
        detail = f"{share} % of its test images ({trained:,} training image{'s' if trained != 1 else ''})"
        images, errors = ([], []) if isinstance(manifest, str) else thumbnails(manifest, "test", rows)
        reasons += errors
        pairs.append(ConfusedPair((record.class_names[label], record.class_names[predicted]), detail, tuple(images)))
    return pairs, "; ".join([*reasons[:1], *([f"and {len(reasons) - 1:,} more"] if len(reasons) > 1 else [])])


def _search(source: ReportData) -> ReportSection:
    section = ReportSection("search", "Search")
    figures = _grid(
        search_plots.history(source),
        search_plots.against_cost(source),
        search_plots.against_few_shot(source),
        search_plots.rung_against_end(source),
    )
    section.add(score_tables.pareto(source), figures, score_tables.stops(source) if figures else None)
    trials = score_tables.all_trials(source)
    if 0 < len(trials.rows) <= score_tables.MAX_ROWS:
        section.add(CollapsedTable(trials))
    return section


def _mattered(source: ReportData) -> ReportSection:
    is_fair, note = search_bias_note(source)
    # A study samples nothing, so there is no parameter to judge.
    if source.spec.study:
        return ReportSection("mattered", "What mattered")
    section = ReportSection("mattered", "What mattered" if is_fair else "What may have mattered")
    ranked = importances(source)
    order = [importance.key for importance in ranked]
    has_stopped = any(record.state == "stopped" for record, _ in source.valued())
    slices = search_plots.slices(source, order)
    if not slices:
        return section
    bars = _grid(search_plots.importance_bars(ranked))
    section.add(
        note,
        _columns(score_tables.strata(source)),
        bars or "There are too few trials to say how much each parameter mattered.",
        f"Each parameter's values and the results of their trials ({search_plots.objective_name(source)}). Colors "
        "are methods, as under Search, the ring is the winner"
        f"{', pale marks were stopped early' if has_stopped else ''}, short lines are medians.",
        Grid(slices, small=True),
        search_plots.parallel(source, order),
    )
    return section


def _compute(source: ReportData) -> ReportSection:
    section, compute = ReportSection("compute", "Compute"), source.compute
    search = source.log.of("search")
    seconds = sum(record.seconds() for record in search if record.ended_at)
    rows = [["search", f"{len(search)} trials, {duration(seconds)} of their own time"]]
    for name, text in (("feature store", store_text(compute)), ("early stopping", stopping_text(compute))):
        rows += [[name, f"{text[0].upper()}{text[1:]}."]] if text else []
    for rung in rungs(source):
        correlation = "too few to tell" if rung.correlation is None else f"{rung.correlation:.2f}"
        text = f"Rank correlation with the end: {correlation}, over the {rung.num_trials} trials that finished."
        rows.append([f"rung at {rung.share:.0%}", text])
    times = phase_rows(compute)
    if times and compute.plan is None:
        section.add(Table("time", "Where the time went", ["", "took"], [[row[0], row[2]] for row in times]))
    elif times:
        section.add(Table("time", "Where the time went", ["", "planned", "took"], times))
    section.add(Table("compute", "Used and saved", ["", ""], rows, 2), study_tables.parameters(source))
    return section


def _data(source: ReportData) -> ReportSection:
    section, record = ReportSection("data", "Data"), source.classes
    if record is not None:
        stats = record.stats
        section.add(
            f"{stats.num_classes:,} classes ({stats.describe_groups()}), {int(stats.split_counts.sum()):,} training "
            f"images, imbalance factor {stats.imbalance_factor:,.4g}."
        )
    table = score_tables.quarantine(source)
    if table is not None:
        section.add(f"Left out: {pluralize(len(source.quarantine), 'file')} that could not be decoded.", table)
    elif section.blocks:
        section.add("Every file could be decoded.")
    if source.read_at is not None:
        section.add(f"The test split was read once, at {source.read_at}.")
    return section
