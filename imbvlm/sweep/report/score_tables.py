"""Tables of a report: scores, best trials, strata, reasons for stopping, classes, confused pairs, left-out files."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict

import numpy as np

from imbvlm.base.formatting import duration, mean_std, percent
from imbvlm.longtail.metrics import per_class_accuracy
from imbvlm.sweep.records.difference import ALL_SPLITS, POST_HOC, difference_on_test, splits_of, title_in
from imbvlm.sweep.records.summary_tables import (
    HEADINGS,
    METRICS,
    format_value,
    objective_text,
    pareto_records,
    pareto_rows,
    seeds_rows,
)
from imbvlm.sweep.records.trial_log import TrialRecord, describe_trial
from imbvlm.sweep.report.plotting import Table
from imbvlm.sweep.report.report_data import PerClassResults, ReportData

NUM_BEST = 12
NUM_CLASSES = 8
NUM_PAIRS = 12
MAX_ROWS = 500
# The reason in the record of a trial that the scheduler has stopped, and its text for readers.
BY_SCHEDULER, STOPPED_EARLY = "by the trial scheduler", "early, since others were ahead"


def scores(source: ReportData) -> Table | None:
    """The refits' scores on the test split, in the form that papers use."""
    if not source.has_test:
        return None
    metrics = [*METRICS, "zero_train_accuracy", "expected_calibration_error"]
    headings = [*HEADINGS, "no training", "calibration error"]
    shown = [
        (metric, heading) for metric, heading in zip(metrics, headings, strict=True)
        if any(refit.values(f"test/{metric}") for refit in source.scored)
    ]  # fmt: skip
    rows = []
    for refit in source.scored:
        for split in splits_of(refit.records, [metric for metric, _ in shown], ALL_SPLITS):
            values = (mean_std(refit.values(f"{split}/{metric}")) for metric, _ in shown)
            rows.append([title_in(refit.name, split), *values, str(len(refit.records)), refit.records[0].views])
    header = ["what", *(heading for _, heading in shown), "seeds", "views"]
    caption = "Percent, means over seeds, ± their standard deviation. Retrained on all training images; test read once."
    if source.classes is not None and source.classes.averaged_over:
        caption += f" {source.classes.averaged_over}"
    return Table("scores", "Test split", header, rows, caption=caption)


def margins(source: ReportData) -> Table | None:
    """The gain of the winner as exported over each baseline by shot group, with its 95 % interval."""
    winner = source.winner
    if winner is None:
        return None
    metrics, ours = [*METRICS, "zero_train_accuracy"], winner.splits[-1]
    shown = [
        (metric, heading) for metric, heading in zip(metrics, [*HEADINGS, "no training"], strict=True)
        if winner.values(f"test/{metric}")
    ]  # fmt: skip
    rows = []
    for other, split in [(refit, split) for refit in source.references for split in refit.splits]:
        difference = difference_on_test(winner.records, other.records, split, other.name)
        if difference is not None:
            gains = (_gain(winner.values_in(ours, metric), other.values_in(split, metric)) for metric, _ in shown)
            interval = (
                "-"
                if difference.standard_error is None
                else f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
            )
            rows.append([f"over {difference.other}", *gains, interval])
    if not rows:
        return None
    caption = (
        "Points. ± is the standard deviation over the seeds of both models. The number of test images determines the "
        "interval; a win has the whole interval above 0."
    )
    header = [winner.title, *(heading for _, heading in shown), "95 % interval (balanced)"]
    return Table("margins", "Margin", header, rows, caption=caption)


def _gain(left: list[float], right: list[float]) -> str:
    if not left or not right:
        return "-"
    gain = f"{100 * (statistics.fmean(left) - statistics.fmean(right)):+.1f}"
    spreads = [statistics.stdev(values) for values in (left, right) if len(values) > 1]
    return f"{gain} ± {100 * math.hypot(*spreads):.1f}" if spreads else gain


def over_seeds(source: ReportData) -> Table | None:
    """The best few trials over several seeds; None if no trial ran with more than one."""
    rows = seeds_rows(source.log, source.spec)
    if not rows:
        return None
    caption = "Percent on validation, best epochs; ± is the standard deviation over seeds. The best mean is the winner."
    header = ["trial", "what", "seeds", objective_text(source.spec)]
    return Table("over_seeds", "The best few over several seeds", header, rows, 2, caption)


def best_trials(source: ReportData) -> Table:
    """The best trials and the baselines on validation, each at its best epoch."""
    best = source.log.best(source.spec.objective)[:NUM_BEST]
    rows = [_trial_row(source, record) for record in [*best, *_baselines(source)]]
    header = ["trial", "what", *HEADINGS, "epochs", "time", "views", "state"]
    caption = "Percent, at each trial's best epoch. Selection used these numbers, so compare models on the test split."
    return Table("best_trials", "Best trials", header, rows, 2, caption)


def pareto(source: ReportData) -> Table | None:
    """The Pareto set of a sweep with several objectives."""
    spec = source.spec
    rows = pareto_rows(pareto_records(source.log, spec), spec) if spec.other_objectives else []
    if not rows:
        return None
    caption = "Percent on validation. No trial is better in all objectives than one of these."
    return Table("pareto", "Pareto set", ["trial", "what", *spec.objectives], rows, 2, caption)


def all_trials(source: ReportData) -> Table:
    """Every trial of the search with its sampled values."""
    records = source.log.of("search")
    keys = list(dict.fromkeys(key for record in records for key in record.draw))
    rows = [
        [
            record.trial_id,
            record.state,
            record.stop_reason.replace(BY_SCHEDULER, STOPPED_EARLY),
            percent(source.value(record)),
            str(len(record.epochs)),
            f"{record.seconds():.1f}" if record.ended_at is not None else "-",
            *(format_value(key, record.draw[key]) if key in record.draw else "" for key in keys),
        ]
        for record in records
    ]
    return Table("trials", "All trials", ["trial", "state", "why", "best", "epochs", "seconds", *keys], rows, 3)


def strata(source: ReportData) -> list[Table]:
    """The results of each value of a stratified key, or of each method without stratification."""
    tables = []
    for key in source.spec.stratify or ["method"]:
        groups: dict[str, list[tuple[TrialRecord, float]]] = defaultdict(list)
        for record, value in source.valued():
            if key in record.draw:
                groups[format_value(key, record.draw[key])].append((record, value))
        rows = [
            [
                name,
                str(len(pairs)),
                percent(max(value for _, value in pairs)),
                percent(statistics.median(value for _, value in pairs)),
                _time(statistics.fmean(record.seconds() for record, _ in pairs)),
            ]
            for name, pairs in sorted(groups.items(), key=lambda item: -max(value for _, value in item[1]))
        ]
        if len(rows) > 1:
            header = [key, "trials", "best", "median", "mean time"]
            tables.append(Table(f"arms_{key}", f"By {key}", header, rows))
    return tables


def stops(source: ReportData) -> Table:
    """Reasons why trials ended, counted."""
    counts = Counter((record.state, _reason(record)) for record in source.log.of("search"))
    rows = [[state, reason, str(count)] for (state, reason), count in counts.most_common(20)]
    return Table("stops", "Why each trial stopped", ["state", "why", "trials"], rows, 2)


def class_changes(source: ReportData) -> list[Table]:
    """The classes with the largest gains and losses against the best trained baseline."""
    pair = compared_classes(source)
    if pair is None:
        return []
    ours, theirs, title, name = pair
    gain = per_class_accuracy(ours.correct, ours.total) - per_class_accuracy(theirs.correct, theirs.total)
    valid = np.flatnonzero(~np.isnan(gain))
    order = valid[np.argsort(-gain[valid], kind="stable")]
    header = ["class", "training images", name, title, "change"]
    tables = []
    for title, key, labels in (
        (f"Gained most over {name}", "gained", [label for label in order[:NUM_CLASSES] if gain[label] > 0]),
        (f"Lost most against {name}", "lost", [label for label in order[::-1][:NUM_CLASSES] if gain[label] < 0]),
    ):
        rows = [
            [
                ours.class_names[label],
                f"{ours.stats.split_counts[label]:,}",
                percent(theirs.correct[label] / theirs.total[label]),
                percent(ours.correct[label] / ours.total[label]),
                f"{100 * gain[label]:+.1f}",
            ]
            for label in labels
        ]
        if rows:
            tables.append(Table(key, title, header, rows))
    return tables


def class_groups(source: ReportData) -> Table | None:
    """Numbers of classes by shot group that gain and lose against the best trained baseline or are never right."""
    pair = compared_classes(source)
    if pair is None:
        return None
    ours, theirs, title, name = pair
    accuracies = np.stack([per_class_accuracy(results.correct, results.total) for results in (ours, theirs)])
    rows = []
    for group, labels in ours.stats.shot_groups.items():
        our, their = accuracies[:, labels[~np.isnan(accuracies[0, labels])]]
        if len(our):
            counts = (len(our), (our > their).sum(), (our < their).sum(), (our == 0).sum(), (their == 0).sum())
            rows.append([group.replace("_", "-"), *(f"{count:,}" for count in counts)])
    header = ["", "classes", "gain", "lose", "never right", f"never right, {name}"]
    caption = f"Classes with test images over all seeds, {title} compared with {name}."
    return Table("class_groups", "Classes that gain and lose", header, rows, caption=caption)


def compared_classes(source: ReportData) -> tuple[PerClassResults, PerClassResults, str, str] | None:
    """Results per class of the winner and of the first baseline that has them, as exported, and both titles."""
    available = [(refit, refit.classes) for refit in source.headline if refit.classes is not None]
    if len(available) < 2 or available[0][0] is not source.winner:
        return None
    (winner, ours), (other, theirs), *_ = available
    return ours, theirs, title_in(winner.name, ours.split), title_in(other.name, theirs.split)


def per_class(source: ReportData) -> Table | None:
    """Every class of every refit: written as a file, too long for the page."""
    columns_of = [
        (title_in(refit.name, record.split), record)
        for refit in source.scored
        for record in (refit.as_trained, refit.adjusted if POST_HOC in refit.splits else None)
        if record is not None
    ]
    if not columns_of:
        return None
    first = columns_of[0][1]
    columns = [(name, per_class_accuracy(record.correct, record.total)) for name, record in columns_of]
    rows = [
        [
            class_name,
            str(first.stats.split_counts[label]),
            first.stats.group_of(label),
            str(first.total[label] // max(1, first.num_seeds)),
            *("" if np.isnan(accuracy[label]) else f"{accuracy[label]:.4f}" for _, accuracy in columns),
        ]
        for label, class_name in enumerate(first.class_names)
    ]
    header = ["class", "training_images", "shot_group", "test_images", *(f"{name}_accuracy" for name, _ in columns)]
    return Table("per_class", "Per class", header, rows)


def worst_pairs(record: PerClassResults) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """(label, predicted, count over seeds, rows) of the most confused pairs; ties go to the larger share of a class."""
    ranked = sorted(
        record.confusions.items(),
        key=lambda item: (-item[1][0], -item[1][0] / max(1, record.total[item[0][0]]), item[0]),
    )
    return [(label, predicted, count, rows) for (label, predicted), (count, rows) in ranked[:NUM_PAIRS]]


def confused_pairs(source: ReportData) -> Table | None:
    """The worst pairs as a table."""
    record = source.classes
    if record is None or not record.confusions:
        return None
    rows = [
        [
            record.class_names[label],
            record.class_names[predicted],
            f"{count / record.num_seeds:.1f}",
            percent(count / record.total[label]),
            f"{record.stats.split_counts[label]:,}",
        ]
        for label, predicted, count, _ in worst_pairs(record)
    ]
    header = ["class", "taken for", "images", "share of class", "training images"]
    return Table("confused", "Confused most, as a table", header, rows, 2)


def quarantine(source: ReportData) -> Table | None:
    """Files that could not be decoded, by class."""
    if not source.quarantine:
        return None
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in source.quarantine:
        groups[row["class_name"], row["shot_group"]].append(row["reason"])
    rows = [
        [name, group.replace("_", "-"), str(len(reasons)), Counter(reasons).most_common(1)[0][0]]
        for (name, group), reasons in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    header = ["class", "shot group", "files", "most common reason"]
    return Table("quarantine_by_class", "Left out, by class", header, rows[:MAX_ROWS], 4)


def _baselines(source: ReportData) -> list[TrialRecord]:
    """The baselines, the best first, those without a value last."""
    return sorted(source.log.of("baseline"), key=lambda record: -(source.value(record) or 0.0))


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else duration(seconds)


def _trial_row(source: ReportData, record: TrialRecord) -> list[str]:
    best = record.best_epoch(source.spec.objective) or {}
    return [
        record.trial_id,
        record.name or describe_trial(record),
        *(percent(best.get(f"val/{metric}")) for metric in METRICS),
        str(len(record.epochs)),
        _time(record.seconds()) if record.ended_at is not None else "-",
        record.views,
        record.state,
    ]


def _reason(record: TrialRecord) -> str:
    # The record's reason names the epoch, which would make a group for each one.
    return STOPPED_EARLY if record.state == "stopped" else record.stop_reason or "still running"
