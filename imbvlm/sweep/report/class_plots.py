"""Figures of classes: accuracy by shot group, over class size, calibration; readable for ten and for 8,142 classes."""

from __future__ import annotations

import math
import statistics

import numpy as np
import numpy.typing as npt

from imbvlm.base.formatting import percent
from imbvlm.longtail.class_stats import SHOT_GROUPS
from imbvlm.longtail.metrics import balanced_standard_error, per_class_accuracy
from imbvlm.sweep.records.difference import POST_HOC, title_in
from imbvlm.sweep.report.plotting import (
    HEIGHT,
    TOP,
    WIDTH,
    WINNER_COLOR,
    Drawing,
    Figure,
    Scale,
    frame,
    legend,
    method_color,
    number,
    percent_tick,
)
from imbvlm.sweep.report.report_data import PerClassResults, ReportData, ScoredRefit

# Up to this number of classes each one has a mark; above, only the curves of classes of similar size are drawn.
MAX_MARKS = 120
NUM_BINS = 14
MAX_POINTS = 200


def color(source: ReportData, scored: ScoredRefit) -> tuple[str, int]:
    """Color and shape of a refit, the same in every figure."""
    index = source.headline.index(scored)
    method = str(scored.records[0].config["method"])
    return WINNER_COLOR if scored is source.winner else method_color(method, [method]), index


def shown_splits(source: ReportData) -> list[tuple[ScoredRefit, str]]:
    """Refits and splits that are shown: winner and baselines as trained, and as adjusted if that changes accuracy."""
    return [(refit, split) for refit in source.headline for split in refit.splits]


def shot_group_bars(source: ReportData) -> Figure | None:
    """Accuracy of winner and baselines by shot group on the test split; whiskers are the deviation over seeds."""
    groups = [
        group for group in ("top1", "balanced", *SHOT_GROUPS)
        if any(refit.values(f"test/{group}_accuracy") for refit in source.headline)
    ]  # fmt: skip
    if not groups:
        return None
    drawing = Drawing(WIDTH, HEIGHT)
    y, step = Scale(0, 1, HEIGHT - 46, TOP), (WIDTH - 60) / len(groups)
    frame(drawing, Scale(0, 1, 48, WIDTH - 12), y, ("", "accuracy, test (%)"), y_format=percent_tick)
    shown = shown_splits(source)
    width, data = min(30.0, step * 0.85 / len(shown)), list[list[object]]()
    for group_index, group in enumerate(groups):
        middle = 48 + step * (group_index + 0.5)
        for index, (scored, split) in enumerate(shown):
            values = scored.values_in(split, f"{group}_accuracy")
            if not values:
                continue
            mean, name = statistics.fmean(values), title_in(scored.name, split)
            data.append([name, _group_name(group), mean, _deviation(values), len(values)])
            left = middle + (index - len(shown) / 2) * width
            title = f"{name}, {_group_name(group)}: {percent(mean)} %"
            drawing.bar(left + 1, y(mean), width - 2, y.start - y(mean), _bar_style(source, scored, split), title)
            deviation, at = _deviation(values), left + width / 2
            drawing.text(at, y(min(1, mean + deviation)) - 5, f"{100 * mean:.0f}", anchor="middle", size=10.5)
            if deviation:
                drawing.rule(at, y(mean - deviation), at, y(min(1, mean + deviation)), "whisker")
        drawing.text(middle, HEIGHT - 26, _group_name(group), anchor="middle", size=11.5)
    legend(
        drawing, 48, 14, [(title_in(refit.name, split), _bar_style(source, refit, split), 1) for refit, split in shown]
    )
    return Figure(
        "shot_groups", "Accuracy by shot group",
        "Test split, means over seeds. Many: more than 100 training images, medium: 20 to 100, few: 1 to 19."
        f"{' Pale: as trained, before adjustment.' if len(shown) > len(source.headline) else ''}", drawing,
        [["what", "group", "accuracy", "deviation_over_seeds", "seeds"], *data],
    )  # fmt: skip


def _bar_style(source: ReportData, scored: ScoredRefit, split: str) -> str:
    return f"{color(source, scored)[0]}{'' if split == scored.splits[-1] else ' dim'}"


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _group_name(group: str) -> str:
    return {"top1": "overall", "zero_train": "no training"}.get(group, group.removesuffix("_shot"))


def accuracy_over_size(source: ReportData) -> Figure | None:
    """Accuracy against a class's training images; curves are means over classes of similar size."""
    results = [(refit, refit.classes) for refit in source.headline if refit.classes is not None]
    if not results:
        return None
    counts = results[0][1].stats.split_counts
    drawing = Drawing(WIDTH, HEIGHT)
    low, high = max(0.5, float(counts.min())), max(2.0, float(counts.max()))
    x, y = Scale(low * 0.85, high * 1.2, 52, WIDTH - 12, log=True), Scale(0, 1, HEIGHT - 46, TOP)
    frame(drawing, x, y, ("training images of a class", "accuracy, test (%)"), x_format=number, y_format=percent_tick)
    for limit in (19.5, 100.5):
        if low < limit < high:
            drawing.rule(x(limit), y.start, x(limit), y.end, "grid")
    for index, (scored, record) in enumerate(results):
        style, shape = color(source, scored)
        if len(counts) <= MAX_MARKS:
            _class_marks(drawing, record, x, y, style, shape)
        _size_curve(drawing, record, x, y, style, band=index == 0)
    legend(drawing, 52, 14, _class_legend(source, results))
    marks = "Marks are classes, curves" if len(counts) <= MAX_MARKS else "Curves"
    caption = f"{marks} are means over classes of similar size, the band the winner's standard error.{_note(source)}"
    data: list[list[object]] = [
        [title_in(refit.name, record.split), *point] for refit, record in results for point in binned_accuracy(record)
    ]
    header = ["what", "training_images", "accuracy", "standard_error"]
    return Figure("class_size", "Accuracy against class size", caption, drawing, [header, *data])


def _class_legend(source: ReportData, results: list[tuple[ScoredRefit, PerClassResults]]) -> list[tuple[str, str, int]]:
    return [(title_in(refit.name, record.split), *color(source, refit)) for refit, record in results]


def _note(source: ReportData) -> str:
    """A note if a figure shows the winner as trained although the headline shows it as adjusted, else empty."""
    winner = source.winner
    if winner is None or winner.classes is None or winner.classes.split == winner.splits[-1]:
        return ""
    return " This sweep has stored its classes as trained, before adjustment."


def _class_marks(drawing: Drawing, record: PerClassResults, x: Scale, y: Scale, style: str, shape: int) -> None:
    for label, (right, total, count) in enumerate(
        zip(record.correct, record.total, record.stats.split_counts, strict=True)
    ):
        if total:
            title = f"{record.class_names[label]} ({count} training images): {percent(right / total)} %"
            drawing.dot(x(max(0.5, count)), y(right / total), f"{style} dim", title, shape=shape, size=3)


def _size_curve(drawing: Drawing, record: PerClassResults, x: Scale, y: Scale, style: str, *, band: bool) -> None:
    points = [(x(size), mean, error) for size, mean, error in binned_accuracy(record)]
    if band:
        upper = [(at, y(min(1, mean + error))) for at, mean, error in points]
        lower = [(at, y(max(0, mean - error))) for at, mean, error in points]
        drawing.area([*upper, *reversed(lower)], style)
    drawing.line([(at, y(mean)) for at, mean, _ in points], style)


def binned_accuracy(record: PerClassResults) -> list[tuple[float, float, float]]:
    """Size, mean accuracy and its standard error of groups of classes of similar size, the smallest first."""
    scored = np.flatnonzero(record.total > 0)
    order = scored[np.argsort(record.stats.split_counts[scored], kind="stable")]
    groups = _groups_of_like_size(record.stats.split_counts[order])
    points = []
    for group in groups:
        labels = order[group]
        sizes = np.maximum(record.stats.split_counts[labels], 0.5)
        accuracy = record.correct[labels] / record.total[labels]
        # All seeds score the same images, so they don't reduce the error.
        seeds = max(1, record.num_seeds)
        error = balanced_standard_error(record.correct[labels] // seeds, np.maximum(record.total[labels] // seeds, 1))
        points.append((math.exp(float(np.log(sizes).mean())), float(accuracy.mean()), error))
    return points


def _groups_of_like_size(sorted_counts: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Positions grouped by equal steps of the logarithm of size; a group per size if there are few classes."""
    if len(sorted_counts) <= NUM_BINS:
        return [np.flatnonzero(sorted_counts == size) for size in np.unique(sorted_counts)]
    logs = np.log(np.maximum(sorted_counts, 0.5))
    edges = np.linspace(logs[0], logs[-1] + 1e-9, NUM_BINS + 1)
    bins = np.clip(np.searchsorted(edges, logs, side="right") - 1, 0, NUM_BINS - 1)
    return [np.flatnonzero(bins == index) for index in np.unique(bins)]


def calibration(source: ReportData) -> Figure | None:
    """Accuracy against confidence on the test split: models as exported, and the winner also as trained."""
    curves: list[tuple[str, tuple[str, int], npt.NDArray[np.float64], int]] = []
    for refit in source.headline:
        if refit.as_trained is None:
            continue
        (style, shape), seeds = color(source, refit), refit.as_trained.num_seeds
        if refit.adjusted_bins is not None:
            curves.append((title_in(refit.name, POST_HOC), (style, shape), refit.adjusted_bins, seeds))
            style = f"{style} dim"
        if refit.adjusted_bins is None or refit is source.winner:
            curves.append((refit.name, (style, shape), refit.as_trained.confidence_bins, seeds))
    if not curves:
        return None
    drawing, data = Drawing(WIDTH, HEIGHT), list[list[object]]()
    x, y = Scale(0, 1, 52, WIDTH - 12), Scale(0, 1, HEIGHT - 46, TOP)
    frame(drawing, x, y, ("confidence (%)", "accuracy, test (%)"), x_format=percent_tick, y_format=percent_tick)
    drawing.line([(x(0), y(0)), (x(1), y(1))], "faint", width=1.2, dash="5 4", title="perfect calibration")
    for name, (style, shape), (rows, right, confidence), num_seeds in curves:
        # The accuracy of a handful of images is noise.
        full = rows >= max(5, 0.002 * rows.sum())
        bins = [(c / n, r / n, int(n)) for n, r, c in zip(rows[full], right[full], confidence[full], strict=True)]
        drawing.line([(x(sure), y(accuracy)) for sure, accuracy, _ in bins], style, width=1.6)
        for sure, accuracy, n in bins:
            title = f"{name}: {n // max(1, num_seeds):,} images"
            drawing.dot(x(sure), y(accuracy), style, title, shape=shape, size=3.2)
            data.append([name, float(sure), float(accuracy), n])
    legend(drawing, 52, 14, [(name, *mark) for name, mark, _, _ in curves])
    is_adjusted = source.winner is not None and source.winner.adjusted_bins is not None
    after = " Pale: the winner as trained. Its export has the adjustment, temperature included." if is_adjusted else ""
    caption = f"Below the diagonal a model is surer than it should be.{after}"
    header = ["what", "confidence", "accuracy", "images_over_seeds"]
    return Figure("calibration", "Calibration", caption, drawing, [header, *data])


def sorted_classes(source: ReportData) -> Figure | None:
    """The accuracies of all classes, the worst first, as a curve for each refit."""
    results = [(refit, refit.classes) for refit in source.headline if refit.classes is not None]
    if not results:
        return None
    drawing = Drawing(WIDTH, HEIGHT)
    x, y = Scale(0, 1, 52, WIDTH - 12), Scale(0, 1, HEIGHT - 46, TOP)
    frame(
        drawing, x, y, ("share of classes, the worst first (%)", "accuracy, test (%)"),
        x_format=percent_tick, y_format=percent_tick,
    )  # fmt: skip
    data = list[list[object]]()
    for scored, record in results:
        accuracy = per_class_accuracy(record.correct, record.total)
        ranked = np.sort(accuracy[~np.isnan(accuracy)])
        ranks = np.unique(np.linspace(0, len(ranked) - 1, min(len(ranked), MAX_POINTS)).round().astype(np.int64))
        points = [(x((rank + 0.5) / len(ranked)), y(ranked[rank])) for rank in ranks]
        style, shape = color(source, scored)
        drawing.line(points, style)
        title = title_in(scored.name, record.split)
        data += [[title, (rank + 0.5) / len(ranked), float(ranked[rank])] for rank in ranks.tolist()]
        if len(ranked) <= NUM_BINS:
            for at, height in points:
                drawing.dot(at, height, style, shape=shape, size=3)
    legend(drawing, 52, 14, _class_legend(source, results))
    caption = f"A curve that leaves the bottom early has few classes that it never gets right.{_note(source)}"
    header = ["what", "share_of_classes", "accuracy"]
    return Figure("sorted_classes", "Classes by their accuracy", caption, drawing, [header, *data])
