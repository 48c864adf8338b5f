"""Tables of a report: scores, best trials, strata, reasons for stopping, classes, confused pairs, left-out files."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import duration, mean_std, percent
from imbvlm.data.manifest import Manifest
from imbvlm.inference.taxonomy_file import RANK_SCORES_FILE, ModelTaxonomy, learn_for, read_rank_scores
from imbvlm.longtail.group_gap import group_note
from imbvlm.longtail.metrics import per_class_accuracy
from imbvlm.longtail.roll_up import RankScores, is_broken
from imbvlm.sweep.records.difference import ALL_SPLITS, splits_of, title_in
from imbvlm.sweep.records.resource_usage import throughput_key
from imbvlm.sweep.records.summary_tables import (
    HEADINGS,
    METRICS,
    format_value,
    objective_text,
    pareto_records,
    pareto_rows,
    rank_rows,
    seeds_rows,
)
from imbvlm.sweep.records.trial_log import TrialRecord, describe_trial, refit_folder
from imbvlm.sweep.report.plotting import Table
from imbvlm.sweep.report.report_data import PerClassResults, ReportData
from imbvlm.training.test_predictions import POST_HOC

# Precisions whose roll-up is shown.
PRECISIONS = (0.95, 0.9)
# Begins the sentence on promises that test images break.
BROKEN = (
    "Test images break a promise, since they don't come as those of validation (other cameras, artists or shares of "
    "classes):"
)
NUM_BEST = 12
NUM_CLASSES = 8
NUM_PAIRS = 12
MAX_ROWS = 500
# Headings of the accuracies on the test split.
ACCURACIES = {**dict(zip(METRICS, HEADINGS, strict=True)), "zero_train_accuracy": "no training"}
# The reason in the record of a trial that the scheduler has stopped, and its text for readers.
BY_SCHEDULER, STOPPED_EARLY = "by the trial scheduler", "early, since others were ahead"


def scores(source: ReportData) -> Table | None:
    """The refits' scores on the test split, in the form that papers use."""
    if not source.has_test:
        return None
    columns = {**ACCURACIES, "expected_calibration_error": "calibration error"}
    shown = [metric for metric in columns if any(refit.values(f"test/{metric}") for refit in source.scored)]
    rows = []
    for refit in source.scored:
        for split in splits_of(refit.records, shown, ALL_SPLITS):
            values = (mean_std(refit.values(f"{split}/{metric}")) for metric in shown)
            rows.append([title_in(refit.name, split), *values, str(len(refit.records)), refit.records[0].views])
    header = ["what", *(columns[metric] for metric in shown), "seeds", "views"]
    caption = "Percent, means over seeds, ± their standard deviation. Retrained on all training images; test read once."
    if source.classes is not None and source.classes.averaged_over:
        caption += f" {source.classes.averaged_over}"
    return Table("scores", "Test split", header, rows, caption=caption)


def rank_errors(source: ReportData) -> Table | None:
    """Errors by rank of the delivered model and the other refits, as exported; None without a taxonomy."""
    rows = rank_rows([record for refit in source.scored for record in refit.records])
    caption = (
        "Percent, means over classes and seeds: images whose predicted class lies in another family, genus and so on "
        "than their own. The last column is the height of the lowest common ancestor, which is the sum of the errors."
    )
    return Table("rank_errors", "Errors by rank", rows[0], rows[1:], caption=caption) if rows else None


def roll_up(source: ReportData, manifest: Manifest | str) -> Table | None:
    """Shares of images that the delivered model names at each rank, by precision; None without a taxonomy."""
    if isinstance(manifest, str) or source.delivered is None:
        return None
    tree = ModelTaxonomy.read(source.folder, manifest.class_names)
    if tree is None:
        if manifest.taxonomy is None:
            return None
        missing = f"not computed by an earlier version; this adds it: imbvlm sweep resume {source.folder}"
        return Table("roll_up", "Roll-up", ["precision", "rank"], [["-", missing]], 2)
    splits = {"validation images": tree.scores, "test images": _rank_scores_on_test(source, len(tree.taxonomy.ranks))}
    shown = {name: split for name, split in splits.items() if isinstance(split, RankScores) and len(split)}
    rows, broken = [], []
    for precision in PRECISIONS:
        try:
            thresholds = learn_for(tree, precision)
        except ImbvlmError as error:
            rows.append([percent(precision), str(error).partition(". ")[0], *["-"] * (2 * len(shown))])
            continue
        counts = [thresholds.counts(split) for split in shown.values()]
        columns = [_shares(*own, len(split)) for own, split in zip(counts, shown.values(), strict=True)]
        broken += [
            f"{percent(right / named)} % of the names of {rank} for {percent(precision)} %"
            for rank, named, right in zip(tree.taxonomy.ranks, *counts[-1], strict=True)
            if "test images" in shown and is_broken(right, named, precision)
        ]
        for number, rank in enumerate((*tree.taxonomy.ranks[::-1], "none")):
            rows.append([percent(precision), rank, *(cell for column in columns for cell in column[number])])
    caption = (
        "Percent. An image is named at the lowest rank whose most probable taxon passes the rank's threshold. At "
        "least so large a share of the names of each rank is right, at 95 % confidence, for images that come as those "
        "of validation. No image was scored by a model that trained on it, and test images chose nothing. "
        "`imbvlm predict --roll-up` names images this way."
    )
    if broken:
        caption += f" {BROKEN} {', '.join(broken)}."
    header = ["precision", "rank", *(cell for name in shown for cell in (name, "right"))]
    return Table("roll_up", "Roll-up", header, rows, 2, caption)


def _rank_scores_on_test(source: ReportData, num_ranks: int) -> RankScores | None:
    """The delivered model's scores of the test split; None in sweeps without them."""
    delivered = source.delivered
    folder = "" if delivered is None else refit_folder(source.folder, delivered.records[0].trial_id)
    has_scores = storage.exists(storage.join(folder, RANK_SCORES_FILE))
    return read_rank_scores(folder, num_ranks, {}) if has_scores else None


def _shares(named: list[int], right: list[int], num_rows: int) -> list[tuple[str, str]]:
    """The share of rows named at each rank, and of those that are right, from the classes up, then those without."""
    shares = [
        (percent(number / num_rows), percent(correct / number) if number else "-")
        for number, correct in zip(named[::-1], right[::-1], strict=True)
    ]
    return [*shares, (percent(1 - sum(named) / num_rows), "")]


def blend(source: ReportData) -> Table:
    """The members of the delivered blend, the largest weight first, with what each adds and what its pass costs."""
    paces = {} if source.compute.paces is None else source.compute.paces.seconds
    rows = []
    for member in source.members:
        record = source.log.records[member.name]
        key = throughput_key(record.trial_config())
        cost = f"{1000 * paces[key]:.3g}" if key in paces else "-"
        numbers = (f"{member.weight:.2f}", f"{member.gain:+.3f}")
        rows.append([member.name, record.name or describe_trial(record), *numbers, key, cost])
    caption = (
        "Logits of members, averaged by weight. `adds`: class-balanced log-likelihood on validation above the blend "
        "without it. Members of one encoder and size share its pass over an image; milliseconds are those of the "
        "sweep's whole cluster."
    )
    return Table("blend", "The blend", ["member", "what", "weight", "adds", "pass", "ms an image"], rows, 2, caption)


def margins(source: ReportData) -> Table | None:
    """The gain of the delivered model over each baseline by shot group, over seeds, with its 95 % interval."""
    winner = source.delivered_runs
    if winner is None:
        return None
    shown, rows = [metric for metric in ACCURACIES if winner.values(f"test/{metric}")], []
    for other, split in [(refit, split) for refit in source.references for split in refit.splits]:
        difference = source.differences.get((other.name, split))
        if difference is not None:
            gains = (
                gain(winner.values_in(winner.splits[-1], metric), other.values_in(split, metric)) for metric in shown
            )
            interval = (
                "-" if math.isinf(difference.low) else f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
            )
            rows.append([f"over {difference.other}", *gains, interval])
    notes = {group_note(difference.num_groups) for difference in source.differences.values()} - {""}
    groups = f" Images have groups: {', '.join(notes)}." if notes else ""
    caption = (
        "Points. ± is the standard deviation over the seeds of both models. The number of test images determines the "
        f"interval; a win has the whole interval above 0.{groups}"
    )
    header = [winner.title, *(ACCURACIES[metric] for metric in shown), "95 % interval (balanced)"]
    return Table("margins", "Margin", header, rows, caption=caption)


def gain(left: list[float], right: list[float]) -> str:
    """The difference of two means in points, and the standard deviation over the seeds of both; a dash without one."""
    if not left or not right:
        return "-"
    points = f"{100 * (statistics.fmean(left) - statistics.fmean(right)):+.1f}"
    spreads = [statistics.stdev(values) for values in (left, right) if len(values) > 1]
    return f"{points} ± {100 * math.hypot(*spreads):.1f}" if spreads else points


def unseen_groups(source: ReportData) -> list[Table]:
    """The gap between folds at random and folds of unseen groups, and the worst of these; none where not measured."""
    gap = source.gap
    if gap is None:
        return []
    heads = ["heads of the delivered model", percent(gap.at_random), percent(gap.of_groups), gap.points]
    header = ["what", "images at random", "unseen groups", "gap"]
    few = "" if gap.interval is not None else " They are too few for an interval."
    caption = (
        "Percent and points: balanced accuracy over folds of the training images, trained again in each. Both kinds of "
        f"folds have as many images of each class. Over {gap.num_groups:,} groups and {gap.num_classes:,} classes; the "
        f"interval resamples groups.{few}"
    )
    worst = [[name, f"{number:,}", percent(share)] for name, number, share in gap.worst]
    return [
        Table("gap", "On groups that it hasn't seen", header, [heads], caption=caption),
        Table(
            "worst_groups",
            "The worst groups",
            ["group", "images", "right"],
            worst,
            caption="Percent of each group's images.",
        ),
    ]


def over_seeds(source: ReportData) -> Table:
    """The best few trials over several seeds; without rows if no trial ran with more than one."""
    rows = seeds_rows(source.log, source.spec)
    caption = "Percent on validation, best epochs; ± is the standard deviation over seeds. The best mean is the winner."
    header = ["trial", "what", "seeds", objective_text(source.spec)]
    return Table("over_seeds", "The best few over several seeds", header, rows, 2, caption)


def best_trials(source: ReportData) -> Table | None:
    """The best trials and the baselines on validation, each at its best epoch; None before the first result."""
    best = source.log.best(source.spec.objective)[:NUM_BEST]
    if not best:
        return None
    rows = [
        [
            record.trial_id,
            record.name or describe_trial(record),
            *(percent(epoch.get(f"val/{metric}")) for metric in METRICS),
            str(len(record.epochs)),
            _time(record.seconds()) if record.ended_at is not None else "-",
            record.views,
            record.state,
        ]
        for record in [*best, *sorted(source.log.of("baseline"), key=lambda record: -(source.value(record) or 0.0))]
        for epoch in [record.best_epoch(source.spec.objective) or {}]
    ]
    header = ["trial", "what", *HEADINGS, "epochs", "time", "views", "state"]
    caption = "Percent, at each trial's best epoch. Selection used these numbers, so compare models on the test split."
    return Table("best_trials", "Best trials", header, rows, 2, caption)


def pareto(source: ReportData) -> Table:
    """The Pareto set of a sweep with several objectives."""
    spec = source.spec
    rows = pareto_rows(pareto_records(source.log, spec), spec) if spec.other_objectives else []
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
    # The record's reason names the epoch, which would make a group for each one.
    counts = Counter(
        (record.state, STOPPED_EARLY if record.state == "stopped" else record.stop_reason or "still running")
        for record in source.log.of("search")
    )
    rows = [[state, reason, str(count)] for (state, reason), count in counts.most_common(20)]
    return Table("stops", "Why each trial stopped", ["state", "why", "trials"], rows, 2)


def class_changes(orders: Sequence[Table]) -> list[Table]:
    """The ends of the classes' order by change: the largest gains and losses."""
    if len(orders) < 3:
        return []
    title, name = orders[2].header[3:5]
    header = ["class", "training images", name, title, "change"]
    changes = [(float(row[-1]), row) for row in orders[2].rows if row[-1] != "-"]
    gained = [row for change, row in sorted(changes, key=lambda pair: -pair[0]) if change > 0]
    lost = [row for change, row in changes if change < 0]
    return [
        Table(key, f"{text} {name}", header, [[*row[:2], row[4], row[3], row[5]] for row in rows[:NUM_CLASSES]])
        for key, text, rows in (("gained", "Gained most over", gained), ("lost", "Lost most against", lost))
        if rows
    ]


def class_groups(source: ReportData) -> Table | None:
    """Numbers of classes by shot group that gain and lose against the best trained baseline or are never right."""
    shown = compared_classes(source)
    if len(shown) < 2:
        return None
    (title, ours), (name, theirs) = shown
    accuracies = np.stack([per_class_accuracy(results.correct, results.total) for results in (ours, theirs)])
    rows = []
    for group, labels in ours.stats.shot_groups.items():
        our, their = accuracies[:, labels[~np.isnan(accuracies[0, labels])]]
        if len(our):
            counts = (len(our), (our > their).sum(), (our < their).sum(), (our == 0).sum(), (their == 0).sum())
            rows.append([group_name(group), *(f"{count:,}" for count in counts)])
    header = ["", "classes", "gain", "lose", "never right", f"never right, {name}"]
    caption = f"Classes with test images over all seeds, {title} compared with {name}."
    return Table("class_groups", "Classes that gain and lose", header, rows, caption=caption)


def group_name(group: str) -> str:
    """The text for a shot group or for all classes."""
    return {"top1": "overall", "zero_train": "no training"}.get(group, group.replace("_", "-"))


def compared_classes(source: ReportData) -> list[tuple[str, PerClassResults]]:
    """Titles and results per class, as exported, of the winner and the first baseline that have them."""
    shown = [refit for refit in source.headline if refit.classes is not None]
    num_compared = 2 if source.delivered in shown else 1
    return [(title_in(item.name, item.classes.split), item.classes) for item in shown[:num_compared] if item.classes]


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


def class_orders(source: ReportData) -> list[Table]:
    """Every class by accuracy, by size, and by change against the best trained baseline if there is one."""
    shown = compared_classes(source)
    if not shown:
        return []
    record = shown[0][1]
    accuracies = [per_class_accuracy(results.correct, results.total) for _, results in shown]
    change = accuracies[0] - accuracies[-1]
    rows = [
        [
            name,
            f"{record.stats.split_counts[label]:,}",
            f"{record.total[label] // record.num_seeds:,}",
            *("-" if np.isnan(accuracy[label]) else percent(accuracy[label]) for accuracy in accuracies),
            "-" if np.isnan(change[label]) else f"{100 * change[label]:+.1f}",
        ]
        for label, name in enumerate(record.class_names)
    ]
    header = ["class", "training images", "test images", *(title for title, _ in shown), "change"]
    orders = {"accuracy, lowest first": accuracies[0], "size, largest first": -record.stats.split_counts}
    orders["change, losses first"] = change
    # A model without a baseline has no change.
    end = None if shown[1:] else -1
    return [
        Table(f"by-{title.partition(',')[0]}", title, header[:end], [rows[label][:end] for label in order])
        for title, values in [*orders.items()][:end]
        for order in [np.argsort(values, kind="stable")]
    ]


@dataclass(frozen=True)
class ConfusedPair:
    """A class and the class that it is taken for: images per seed, their share of the class, and some rows."""

    class_names: tuple[str, str]
    num_images: float
    share: float
    num_trained: int
    rows: Sequence[int]


def worst_pairs(source: ReportData) -> list[ConfusedPair]:
    """The most confused pairs; ties go to the larger share of a class."""
    record = source.classes
    if record is None:
        return []
    names, total, trained = record.class_names, record.total, record.stats.split_counts
    ranked = sorted(
        record.confusions.items(), key=lambda item: (-item[1][0], -item[1][0] / max(1, total[item[0][0]]), item[0])
    )
    return [
        ConfusedPair((names[a], names[b]), count / record.num_seeds, count / total[a], int(trained[a]), rows)
        for (a, b), (count, rows) in ranked[:NUM_PAIRS]
    ]


def confused_pairs(pairs: Sequence[ConfusedPair]) -> Table:
    """Confused pairs as a table."""
    rows = [
        [*pair.class_names, f"{pair.num_images:.1f}", percent(pair.share), f"{pair.num_trained:,}"] for pair in pairs
    ]
    header = ["class", "taken for", "images", "share of class", "training images"]
    return Table("confused", "Confused most, as a table", header, rows, 2)


def suspects(source: ReportData) -> Table:
    """The images whose labels look wrong."""
    rows = [
        [own.given, own.looks_like, percent(own.given_probability), percent(own.other_probability), own.image]
        for own in (source.suspects or [])[:MAX_ROWS]
    ]
    header = ["labeled", "looks like", "probability of the label", "of what it looks like", "image"]
    return Table("suspect_labels", "As a table", header, rows, 2)


def quarantine(source: ReportData) -> Table:
    """Files that could not be decoded, by class."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in source.quarantine:
        groups[row["class_name"], row["shot_group"]].append(row["reason"])
    rows = [
        [name, group_name(group), str(len(reasons)), Counter(reasons).most_common(1)[0][0]]
        for (name, group), reasons in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    header = ["class", "shot group", "files", "most common reason"]
    return Table("quarantine_by_class", "Left out, by class", header, rows[:MAX_ROWS], 4)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else duration(seconds)
