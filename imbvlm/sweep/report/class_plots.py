"""Figures of classes: accuracy by shot group, over class size, calibration; readable for ten and for 8,142 classes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from imbvlm.base.formatting import percent
from imbvlm.longtail.class_stats import MANY_SHOT_ABOVE, MEDIUM_SHOT_FROM, SHOT_GROUPS
from imbvlm.longtail.group_gap import GroupedRows, group_standard_error
from imbvlm.longtail.metrics import balanced_standard_error, per_class_accuracy
from imbvlm.sweep.records.difference import title_in
from imbvlm.sweep.report.plotting import (
    MARKERS,
    PALE,
    PALETTE,
    WINNER,
    Figure,
    finish,
    log_axis,
    method_look,
    percent_tick,
    titles,
)
from imbvlm.sweep.report.report_data import PerClassResults, ReportData, ScoredRefit
from imbvlm.training.test_predictions import POST_HOC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Up to this number of classes each one has a mark; above, only the curves of classes of similar size are drawn.
MAX_MARKS = 120
NUM_BINS = 14
MAX_POINTS = 200
_ACCURACY = "accuracy, test (%)"


def _look(source: ReportData, scored: ScoredRefit) -> tuple[str, str]:
    """Color and marker of a refit, the same in every figure."""
    return (WINNER, MARKERS[0]) if scored is source.delivered else method_look(str(scored.records[0].config["method"]))


def shown_splits(source: ReportData) -> list[tuple[ScoredRefit, str]]:
    """Refits and splits that are shown: winner and baselines as trained, and as adjusted if that changes accuracy."""
    return [(refit, split) for refit in source.headline for split in refit.splits]


def shot_group_bars(source: ReportData) -> Figure | None:
    """Accuracy of winner and baselines by shot group on the test split; whiskers are the deviation over seeds."""
    shown = shown_splits(source)
    groups = [
        group for group in ("top1", "balanced", *SHOT_GROUPS)
        if any(refit.values(f"test/{group}_accuracy") for refit in source.headline)
    ]  # fmt: skip
    width = 0.84 / max(1, len(shown))
    bars = [
        (place + (index - (len(shown) - 1) / 2) * width, scored, split, _group_name(group), values)
        for place, group in enumerate(groups) for index, (scored, split) in enumerate(shown)
        if (values := scored.values_in(split, f"{group}_accuracy"))
    ]  # fmt: skip
    if not bars:
        return None

    def draw(axes: Axes) -> None:
        for x, scored, split, group, values in bars:
            mean, deviation, title = statistics.fmean(values), _deviation(values), title_in(scored.name, split)
            is_exported = split == scored.splits[-1]
            axes.bar(
                x, mean, 0.92 * width, color=_look(source, scored)[0], alpha=1 if is_exported else PALE,
                yerr=deviation, error_kw={"ecolor": PALETTE["ink"][0], "elinewidth": 1.4},
                label=title, gid=titles([f"{title}, {group}: {percent(mean)} %"]),
            )  # fmt: skip
            if is_exported:
                axes.text(x, mean + deviation + 0.012, f"{100 * mean:.0f}", ha="center", fontsize=10.5)
        axes.set(ylim=(0, 1), xticks=range(len(groups)), xticklabels=map(_group_name, groups))
        finish(axes, "", _ACCURACY)

    data = [
        [title_in(scored.name, split), group, statistics.fmean(values), _deviation(values), len(values)]
        for _, scored, split, group, values in bars
    ]
    return Figure(
        "shot_groups", "Accuracy by shot group",
        "Test split, means over seeds. Many: more than 100 training images, medium: 20 to 100, few: 1 to 19."
        f"{' Pale: as trained, before adjustment.' if len(shown) > len(source.headline) else ''}", draw,
        [["what", "group", "accuracy", "deviation_over_seeds", "seeds"], *data],
    )  # fmt: skip


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _group_name(group: str) -> str:
    return {"top1": "overall", "zero_train": "no training"}.get(group, group.removesuffix("_shot"))


@dataclass(frozen=True)
class _Curve:
    """A refit in a figure: points (x, accuracy, ...) of its line, and marks with their texts."""

    name: str
    look: tuple[str, str]
    points: Sequence[Sequence[float]]
    marks: Sequence[tuple[float, float, str]] = ()
    alpha: float = 1


def _figure_of(
    curves: Sequence[_Curve], texts: tuple[str, str, str], columns: Sequence[str], x_label: str,
    draw_ground: Callable[[Axes], object],
) -> Figure | None:  # fmt: skip
    """Draw accuracies on the test split on a ground; `texts` are the figure's name, title and caption."""
    curves = [curve for curve in curves if curve.points]

    def draw(axes: Axes) -> None:
        draw_ground(axes)
        for curve in curves:
            color, marker = curve.look
            axes.plot(*np.array(curve.points).T[:2], color=color, alpha=curve.alpha, label=curve.name)
            if curve.marks:
                *place, notes = zip(*curve.marks, strict=True)
                axes.plot(*place, marker, color=color, alpha=0.7 * curve.alpha, gid=titles(notes))
        axes.set_ylim(-0.01, 1.01)
        finish(axes, x_label, _ACCURACY)

    data = [[curve.name, *point] for curve in curves for point in curve.points]
    return Figure(*texts, draw, [["what", *columns], *data]) if curves else None


def accuracy_over_size(source: ReportData) -> Figure | None:
    """Accuracy against a class's training images; curves are means over classes of similar size."""
    results = [(refit, refit.classes) for refit in source.headline if refit.classes is not None]
    has_marks = bool(results) and len(results[0][1].total) <= MAX_MARKS
    curves = [
        _Curve(
            title_in(refit.name, record.split), _look(source, refit), binned_accuracy(record, rows),
            _class_marks(record) if has_marks else (),
        ) for refit, record in results
        for rows in [source.grouped_rows if refit is source.delivered else None]
    ]  # fmt: skip

    def draw(axes: Axes) -> None:
        sizes, means, errors = np.array(curves[0].points).T
        log_axis(axes, "x", sizes)
        band = np.clip((means - errors, means + errors), 0, 1)
        axes.fill_between(sizes, *band, color=curves[0].look[0], alpha=0.15, linewidth=0)
        for limit in (MEDIUM_SHOT_FROM - 0.5, MANY_SHOT_ABOVE + 0.5):
            if sizes[0] < limit < sizes[-1]:
                axes.axvline(limit, color=PALETTE["line"][0], linewidth=1, zorder=0)

    marks = "Marks are classes, curves" if has_marks else "Curves"
    caption = f"{marks} are means over classes of similar size, the band the winner's standard error.{_note(source)}"
    texts = ("class_size", "Accuracy against class size", caption)
    return _figure_of(
        curves, texts, ("training_images", "accuracy", "standard_error"), "training images of a class", draw
    )


def _class_marks(record: PerClassResults) -> list[tuple[float, float, str]]:
    classes = zip(record.class_names, record.correct, record.total, record.stats.split_counts, strict=True)
    return [
        (max(0.5, count), right / total, f"{name} ({count} training images): {percent(right / total)} %")
        for name, right, total, count in classes if total
    ]  # fmt: skip


def _note(source: ReportData) -> str:
    """A note if a figure shows the winner as trained although the headline shows it as adjusted, else empty."""
    winner = source.delivered
    if winner is None or winner.classes is None or winner.classes.split == winner.splits[-1]:
        return ""
    return " This sweep has stored its classes as trained, before adjustment."


def binned_accuracy(record: PerClassResults, rows: GroupedRows | None = None) -> list[tuple[float, float, float]]:
    """Size, mean accuracy and its standard error of groups of classes of similar size, the smallest first.

    The error of `rows` with groups of images is that of resampled groups, not a number where these are too few.
    """
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
        if rows is not None:
            of_groups = group_standard_error(rows.of_classes(labels), error)
            error = math.nan if of_groups is None else of_groups
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
    curves = list[_Curve]()
    for refit in source.headline:
        if (record := refit.as_trained) is None:
            continue
        look, before, after = _look(source, refit), record.confidence_bins, refit.adjusted_bins
        if after is not None:
            name = title_in(refit.name, POST_HOC)
            curves.append(_Curve(name, look, *_confidence_points(name, after, record.num_seeds)))
        if after is None or refit is source.delivered:
            points, marks = _confidence_points(refit.name, before, record.num_seeds)
            curves.append(_Curve(refit.name, look, points, marks, 1 if after is None else PALE))

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], "--", color=PALETTE["faint"][0], linewidth=1.2, gid=titles(["perfect calibration"]))
        axes.xaxis.set_major_formatter(percent_tick)

    is_adjusted = source.delivered is not None and source.delivered.adjusted_bins is not None
    pale = " Pale: the winner as trained. Its export has the adjustment, temperature included." if is_adjusted else ""
    texts = ("calibration", "Calibration", f"Below the diagonal a model is surer than it should be.{pale}")
    return _figure_of(curves, texts, ("confidence", "accuracy", "images_over_seeds"), "confidence (%)", draw)


def _confidence_points(
    name: str, bins: npt.NDArray[np.float64], num_seeds: int
) -> tuple[list[tuple[float, float, int]], list[tuple[float, float, str]]]:
    rows = bins[0]
    # The accuracy of a handful of images is noise.
    full = bins.T[rows >= max(5, 0.002 * rows.sum())]
    points = [(sure / n, correct / n, int(n)) for n, correct, sure in full.tolist()]
    return points, [(x, y, f"{name}: {n // max(1, num_seeds):,} images") for x, y, n in points]


def sorted_classes(source: ReportData) -> Figure | None:
    """The accuracies of all classes, the worst first, as a curve for each refit."""
    curves = list[_Curve]()
    for refit, record in [(refit, refit.classes) for refit in source.headline if refit.classes is not None]:
        accuracy = per_class_accuracy(record.correct, record.total)
        ranked = np.sort(accuracy[~np.isnan(accuracy)])
        ranks = np.unique(np.linspace(0, len(ranked) - 1, min(len(ranked), MAX_POINTS)).round().astype(np.int64))
        points = np.column_stack(((ranks + 0.5) / len(ranked), ranked[ranks])).tolist()
        curves.append(_Curve(title_in(refit.name, record.split), _look(source, refit), points))
    caption = f"A curve that leaves the bottom early has few classes that it never gets right.{_note(source)}"
    texts, label = ("sorted_classes", "Classes by their accuracy", caption), "share of classes, the worst first (%)"
    return _figure_of(
        curves,
        texts,
        ("share_of_classes", "accuracy"),
        label,
        lambda axes: axes.xaxis.set_major_formatter(percent_tick),
    )


def class_sizes(counts: npt.NDArray[np.int64], name: str) -> Figure:
    """The training images of each class of a data set, the largest first."""
    ordered = np.sort(counts)[::-1]

    def draw(axes: Axes) -> None:
        heights = np.maximum(ordered, 0.5)
        log_axis(axes, "y", heights)
        axes.plot(np.arange(1, len(ordered) + 1), heights, "o-", color=WINNER, markersize=3)
        axes.set(title=name, xlabel=f"classes from head to tail ({len(ordered):,}); training images, log scale")

    data = [["class_rank", "training_images"], *enumerate(ordered.tolist(), 1)]
    return Figure("class_sizes", name, "Training images of each class, from head to tail.", draw, data)
