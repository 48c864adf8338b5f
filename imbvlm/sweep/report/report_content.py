"""What a report says, section by section, before any of it is HTML."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import duration, percent, pluralize
from imbvlm.longtail.class_stats import SHOT_GROUPS
from imbvlm.sweep.records.difference import POST_HOC, title_in, verdict_on_test
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
    """Two classes that are taken for each other, with pictures (data: URIs) of some of the images."""

    words: tuple[str, str]
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
    """A long table, closed at first."""

    table: Table


@dataclass(frozen=True)
class Columns:
    """Tables side by side where there is room."""

    tables: Sequence[Table]


Block = Figure | Grid | Table | Columns | ConfusedPairs | CollapsedTable | str


@dataclass
class ReportSection:
    """A heading with blocks; a str is a paragraph."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class HeadlineNumber:
    """One number of the headline."""

    label: str
    value: str
    # The same of what it stands beside.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page: `beside` goes on from the statement; `extra_tables` are only written beside the page.

    `facts_note` says what the headline's numbers are of. `notes` are sentences on what the page lacks.
    """

    title: str
    subtitle: str
    statement: str
    beside: str
    is_win: bool
    facts: list[HeadlineNumber]
    facts_note: str
    sections: list[ReportSection]
    extra_tables: list[Table]
    notes: list[str]


def build(source: ReportData) -> ReportContent:
    """The report of what a sweep's folder holds by now."""
    classes, notes = _classes(source)
    sections = [_result(source), classes, _search(source), _mattered(source), _compute(source), _data(source)]
    statement, beside, is_win = _statement(source)
    extra = [table for table in (score_tables.per_class(source), score_tables.all_trials(source)) if table]
    return ReportContent(
        title=source.spec.name,
        subtitle=_subtitle(source),
        statement=statement,
        beside=beside,
        is_win=is_win,
        facts=_facts(source),
        facts_note=_facts_note(source),
        sections=[section for section in sections if section.blocks],
        extra_tables=extra,
        notes=notes,
    )


# --------------------------------------------------------------------------------------------------- headline


def _statement(source: ReportData) -> tuple[str, str, bool]:
    """The result beside the best baseline, beside the others, and whether it is a win."""
    best = source.log.best(source.spec.objective)
    if not best:
        return "No trial has given a result yet.", "", False
    winner = source.winner
    found = None if winner is None else verdict_on_test(source.log, winner.records, "the winner")
    if found is None:
        sentence = verdict(source.log, source.spec)
        beside = "No test split has been scored: it takes images in a folder test/ beside train/, or --test-share."
        return f"{sentence[0].upper()}{sentence[1:]}.", beside, False
    return found.statement, found.beside, found.is_win


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
            for other, split in class_plots.splits_beside(source):
                theirs = other.values_in(split, f"{group}_accuracy")
                name = "as trained" if other is winner else title_in(other.name, split)
                if theirs and (other, split) != (winner, exported):
                    note.append(f"{name} {percent(statistics.fmean(theirs))}")
            facts.append(HeadlineNumber(_group_words(group), f"{percent(statistics.fmean(values))} %", tuple(note)))
    elif best:
        others = source.log.best(source.spec.objective, "baseline")[:2]
        known = [(one.name, one.best_epoch(source.spec.objective) or {}) for one in others]
        epoch = best[0].best_epoch(source.spec.objective) or {}
        for group in ("balanced", "top1", *SHOT_GROUPS):
            key = f"val/{group}_accuracy"
            note = [f"{name} {percent(theirs[key])}" for name, theirs in known if key in theirs]
            if key in epoch:
                facts.append(
                    HeadlineNumber(f"{_group_words(group)}, validation", f"{percent(epoch[key])} %", tuple(note))
                )
    return facts


def _facts_note(source: ReportData) -> str:
    """The model of the headline's numbers, and the numbers of the one seed whose weights are exported."""
    winner = source.winner
    if winner is None or not source.has_test:
        return ""
    split, first = winner.splits[-1], winner.records[0]
    config, num_seeds = first.trial_config(), len(winner.records)
    how = "adjusted post hoc, as imbvlm export gives it" if split == POST_HOC else "as imbvlm export gives it"
    words = f"Large numbers: the winner {how}, on the test split"
    if num_seeds > 1 and config.train is not None:
        keys = (("balanced", "balanced_accuracy"), ("overall", "top1_accuracy"))
        alone = [f"{name} {percent(values[0])}" for name, key in keys if (values := winner.values_in(split, key))]
        words += (
            f", means of {num_seeds} seeds. The exported weights are those of seed {config.train.seed}: counting what "
            f"imbvlm predict gives for the test images finds {', '.join(alone)}"
        )
    crops = " imbvlm predict reads five crops of an image, and these numbers one." if config.eval.tte != "none" else ""
    return f"{words}.{crops}"


def _group_words(group: str) -> str:
    return {"top1": "overall", "zero_train": "no training"}.get(group, group.replace("_", "-"))


def _subtitle(source: ReportData) -> str:
    search = source.log.of("search")
    words = [f"{sum(record.state != 'running' for record in search)} of {source.spec.num_trials} trials"]
    words.append(f"on {source.spec.base['data']['manifest']}")
    if source.compute.spent.seconds:
        words.append(f"in {duration(source.compute.spent.seconds)}")
    return f"{', '.join(words)}; {_encoder_words(source)}"


def _encoder_words(source: ReportData) -> str:
    """The encoder of the winner, or of any trial before there is one, and the size of its images."""
    # Fetched here: it takes seconds.
    from imbvlm.models.encoders.open_clip_encoder import describe_encoder

    record = source.best or next(iter(source.log.records.values()))
    encoder = record.trial_config().encoder
    try:
        size = describe_encoder(encoder).image_size
    except ImbvlmError:
        # A folder with an encoder may be gone by now, and the page has its name all the same.
        return f"encoder {encoder.name}"
    return f"encoder {encoder.name} at {size} x {size} pixels"


# --------------------------------------------------------------------------------------------------- sections


def _result(source: ReportData) -> ReportSection:
    section, best = ReportSection("result", "Result"), source.log.best(source.spec.objective)
    if best:
        section.blocks.append(f"Winner: {best[0].trial_id}, {describe_trial(best[0])}.")
        section.blocks += study_tables.study_tables(source)
    figures = [one for one in (class_plots.shot_group_bars(source), class_plots.accuracy_over_size(source)) if one]
    section.blocks += [Grid(figures)] if figures else []
    tables = (score_tables.scores(source), score_tables.margins(source), study_tables.fresh_gap(source),
              score_tables.over_seeds(source))  # fmt: skip
    section.blocks += [table for table in tables if table]
    if best:
        section.blocks.append(score_tables.best_trials(source))
    return section


def _classes(source: ReportData) -> tuple[ReportSection, list[str]]:
    """The section, and why it lacks images of confused pairs."""
    section = ReportSection("classes", "Classes")
    groups, changes = score_tables.class_groups(source), score_tables.class_changes(source)
    section.blocks += [groups] if groups else []
    section.blocks += [Columns(changes)] if changes else []
    shown = source.classes
    if shown is not None and (shown.split == POST_HOC or shown.num_seeds > 1):
        title = title_in(source.scored[0].name, shown.split)
        section.blocks.insert(0, f"Classes of the model {title!r}, over its {shown.num_seeds} seeds together.")
    pairs, reason = _pairs(source)
    notes = [f"Not all images of confused pairs are shown: {reason}"] if reason else []
    if pairs:
        section.blocks += [ConfusedPairs("Confused most", pairs), *notes]
    confused = score_tables.confused_pairs(source)
    section.blocks += [CollapsedTable(confused)] if confused else []
    figures = [one for one in (class_plots.sorted_classes(source), class_plots.calibration(source)) if one]
    section.blocks += [Grid(figures)] if figures else []
    return section, notes


def _pairs(source: ReportData) -> tuple[list[ConfusedPair], str]:
    """Cards of the pairs that are confused most, and why some of their images can't be shown; empty where all are."""
    record = source.classes
    if record is None or not record.confusions:
        return [], ""
    manifest = read_manifest(source.spec, source.folder)
    found, reasons = [], [manifest] if isinstance(manifest, str) else []
    for label, predicted, count, rows in score_tables.worst_pairs(record):
        share = percent(count / record.total[label])
        trained = record.stats.split_counts[label]
        detail = f"{share} % of its test images ({trained:,} training image{'s' if trained != 1 else ''})"
        pictures, lost = ([], []) if isinstance(manifest, str) else thumbnails(manifest, "test", rows)
        reasons += lost
        found.append(ConfusedPair((record.class_names[label], record.class_names[predicted]), detail, tuple(pictures)))
    return found, "; ".join([*reasons[:1], *([f"and {len(reasons) - 1:,} more"] if len(reasons) > 1 else [])])


def _search(source: ReportData) -> ReportSection:
    figures = (
        search_plots.history(source),
        search_plots.against_cost(source),
        search_plots.against_few_shot(source),
        search_plots.rung_against_end(source),
    )
    section = ReportSection("search", "Search")
    found = [figure for figure in figures if figure is not None]
    front = score_tables.pareto(source)
    section.blocks += [front] if front else []
    section.blocks += [Grid(found), score_tables.stops(source)] if found else []
    trials = score_tables.all_trials(source)
    if 0 < len(trials.rows) <= score_tables.MAX_ROWS:
        section.blocks.append(CollapsedTable(trials))
    return section


def _mattered(source: ReportData) -> ReportSection:
    fair, words = search_bias_note(source)
    # Nothing was drawn from a list, so that nothing can be said on what drawing it gave.
    if source.spec.study:
        return ReportSection("mattered", "What mattered")
    section = ReportSection("mattered", "What mattered" if fair else "What may have mattered")
    found = importances(source)
    order = [one.key for one in found]
    stopped = any(record.state == "stopped" for record, _ in source.valued())
    slices, lines = search_plots.slices(source, order), search_plots.parallel(source, order)
    if not slices:
        return section
    section.blocks.append(words)
    tables = score_tables.arms(source)
    section.blocks += [Columns(tables)] if tables else []
    bars = search_plots.importance_bars(found)
    section.blocks += [Grid([bars])] if bars else ["There are too few trials to say how much each parameter mattered."]
    section.blocks.append(
        f"Each parameter's values and what trials with them reached ({search_plots.objective_name(source)}). Colors "
        "are methods, as under Search, the ring is the winner"
        f"{', pale marks were stopped early' if stopped else ''}, short lines are medians."
    )
    section.blocks.append(Grid(slices, small=True))
    section.blocks += [lines] if lines else []
    return section


def _compute(source: ReportData) -> ReportSection:
    section, compute = ReportSection("compute", "Compute"), source.compute
    search = source.log.of("search")
    seconds = sum(record.seconds() for record in search if record.ended_at)
    rows = [["search", f"{len(search)} trials, {duration(seconds)} of their own time"]]
    for what, words in (("feature store", store_text(compute)), ("early stopping", stopping_text(compute))):
        rows += [[what, f"{words[0].upper()}{words[1:]}."]] if words else []
    for rung in rungs(source):
        known = "too few to tell" if rung.correlation is None else f"{rung.correlation:.2f}"
        rows.append(
            [
                f"rung at {rung.share:.0%}",
                f"Rank correlation with the end: {known}, over the {rung.num_trials} trials that finished.",
            ]
        )
    times = phase_rows(compute)
    if times and compute.plan is None:
        section.blocks.append(Table("time", "Where the time went", ["", "took"], [[row[0], row[2]] for row in times]))
    elif times:
        section.blocks.append(Table("time", "Where the time went", ["", "planned", "took"], times))
    section.blocks.append(Table("compute", "Spent and spared", ["", ""], rows, 2))
    trained = study_tables.parameters(source)
    section.blocks += [trained] if trained else []
    return section


def _data(source: ReportData) -> ReportSection:
    section, record = ReportSection("data", "Data"), source.classes
    if record is not None:
        stats = record.stats
        groups = ", ".join(
            f"{len(getattr(stats, group)):,} {group.replace('_', '-')}"
            for group in SHOT_GROUPS
            if len(getattr(stats, group))
        )
        section.blocks.append(
            f"{stats.num_classes:,} classes ({groups}), {int(stats.split_counts.sum()):,} training images, imbalance "
            f"factor {stats.imbalance_factor:,.4g}."
        )
    table = score_tables.quarantine(source)
    if table is not None:
        section.blocks += [f"Left out: {pluralize(len(source.quarantine), 'file')} that could not be decoded.", table]
    elif section.blocks:
        section.blocks.append("Every file could be decoded.")
    if source.read_at is not None:
        section.blocks.append(f"The test split was read once, at {source.read_at}.")
    return section
