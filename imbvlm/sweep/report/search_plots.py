"""Figures of the search: history, cost, few-shot accuracy, rungs, importance, slices, parallel coordinates."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from imbvlm.base.formatting import duration, percent
from imbvlm.sweep.records.summary_tables import format_value
from imbvlm.sweep.records.trial_log import TrialRecord, describe_trial
from imbvlm.sweep.report.plotting import (
    NUM_LEVELS,
    PALE,
    PALETTE,
    WIDTH,
    WINNER,
    Figure,
    finish,
    log_axis,
    method_look,
    percent_tick,
    titles,
)
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.report_statistics import Importance, rungs
from imbvlm.sweep.spec.objectives import SECONDS, pareto_indices

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_AXES = 9
MAX_LINES = 1000
MAX_SLICES = 12
NUM_BASELINES = 3
# The height at which lines pass below an axis, in its lengths.
NOT_SAMPLED = -0.1
_FAINT, _MUTED = PALETTE["faint"][0], PALETTE["muted"][0]
_HEADER = ["trial", "method", "state", "objective"]


def objective_name(source: ReportData) -> str:
    """The objective as an axis's label, such as `balanced accuracy, validation (%)`."""
    return f"{source.spec.objective.removeprefix('val/').replace('_', ' ')}, validation (%)"


@dataclass(frozen=True)
class _Mark:
    """A trial in a figure, with a note for its title."""

    record: TrialRecord
    value: float
    x: float
    y: float
    note: str = ""

    @property
    def title(self) -> str:
        record = self.record
        stopped = f", stopped after {len(record.epochs)} epochs" if record.state == "stopped" else ""
        return f"{record.trial_id}: {percent(self.value)} %{self.note}{stopped} ({describe_trial(record)})"


def _row(record: TrialRecord, value: float) -> list[Any]:
    """The first columns of a trial's row in a figure's CSV."""
    return [record.trial_id, str(record.config["method"]), record.state, value]


def _draw_marks(axes: Axes, source: ReportData, marks: Sequence[_Mark], size: float = 7) -> None:
    """Draw trials: color and shape show the method, pale ones were stopped, a ring shows the winner."""
    best, size, series = (
        source.best,
        min(size, max(4.5, 120 / len(marks) ** 0.5)),
        dict[tuple[bool, str], list[_Mark]](),
    )
    for mark in marks:
        series.setdefault((mark.record.state != "stopped", str(mark.record.config["method"])), []).append(mark)
    for (is_full, method), group in sorted(series.items()):
        color, marker = method_look(method)
        axes.plot(
            [mark.x for mark in group], [mark.y for mark in group], marker, color=color, alpha=1 if is_full else PALE,
            markersize=size, label=method.replace("_", " "), gid=titles(mark.title for mark in group),
        )  # fmt: skip
    for mark in (mark for mark in marks if mark.record is best):
        axes.plot(
            mark.x, mark.y, "o", color="none", markeredgecolor=WINNER, markeredgewidth=2.2, markersize=size + 5,
            zorder=5, label="winner", gid=titles([f"winner, {mark.title}"]),
        )  # fmt: skip


def history(source: ReportData) -> Figure | None:
    """The value of each trial in the order of starting, and the best value so far."""
    pairs = source.valued()
    if not pairs:
        return None
    values = [value for _, value in pairs]
    marks = [_Mark(record, value, int(record.trial_id[1:]), value) for record, value in pairs]
    # A baseline far below would compress the trials into a line; tables have its value.
    lowest = 2 * min(values) - max(values)
    baselines = [
        (record, value) for record in source.log.best(source.spec.objective, "baseline")[:NUM_BASELINES]
        if (value := source.value(record)) is not None and value > lowest
    ]  # fmt: skip

    def draw(axes: Axes) -> None:
        _draw_marks(axes, source, marks)
        axes.step([mark.x for mark in marks], np.maximum.accumulate(values), where="post", color=_MUTED, linewidth=1.4)
        for record, value in baselines:
            color, _ = method_look(str(record.config["method"]))
            axes.axhline(value, color=color, linestyle="--", linewidth=1.4, label=f"{record.name}, baseline")
        axes.locator_params("x", integer=True)
        finish(axes, "trial", objective_name(source))

    data = [_row(*pair) for pair in pairs] + [[r.trial_id, r.name, r.state, value] for r, value in baselines]
    pale = " (pale: stopped early)" if any(record.state == "stopped" for record, _ in pairs) else ""
    caption = f"Each mark is a trial{pale}, the line the best so far, dashes the best baselines, the ring the winner."
    return Figure("history", "Search history", caption, draw, [_HEADER, *data])


def against_cost(source: ReportData) -> Figure | None:
    """Accuracy against seconds, with the Pareto front."""
    timed = [(record, value, max(0.05, record.seconds())) for record, value in source.valued() if record.ended_at]
    marks = [_Mark(record, value, cost, value, f", {duration(cost)}") for record, value, cost in timed]
    texts = ("cost", "Accuracy against cost", "The line is the Pareto front: no trial is both faster and better.")
    labels = ("seconds of a trial, its start included", objective_name(source))
    return _scatter(source, marks, texts, labels, ["seconds"], (SECONDS, source.spec.objective))


def against_few_shot(source: ReportData) -> Figure | None:
    """Overall against few-shot accuracy, or medium-shot without few-shot classes, at each trial's best epoch."""
    epochs = [(record, value, record.best_epoch(source.spec.objective) or {}) for record, value in source.valued()]
    groups = [group for group in ("few_shot", "medium_shot") if any(f"val/{group}_accuracy" in e for *_, e in epochs)]
    if not groups:
        return None
    columns, name = [f"{groups[0]}_accuracy", "top1_accuracy"], groups[0].replace("_", "-")
    metrics = (f"val/{columns[0]}", f"val/{columns[1]}")
    marks = [
        _Mark(record, value, few, top, f", {name} {percent(few)}, overall {percent(top)}")
        for record, value, epoch in epochs if metrics[0] in epoch
        for few, top in [(epoch[metrics[0]], epoch[metrics[1]])]
    ]  # fmt: skip
    texts = ("few_shot", f"Overall against {name} accuracy", "The trade-off of head and tail, and the Pareto front.")
    labels = (f"{name} accuracy, validation (%)", "overall accuracy, validation (%)")
    return _scatter(source, marks, texts, labels, columns, metrics)


def rung_against_end(source: ReportData) -> Figure | None:
    """The best values of finished trials against their values at ASHA's first rung."""
    rung = next(iter(rungs(source)), None)
    if rung is None or rung.num_trials < 2:
        return None
    marks = [_Mark(record, end, early, end, f", {percent(early)} % at the rung") for record, early, end in rung.pairs]
    correlation = "" if rung.correlation is None else f"Rank correlation {rung.correlation:.2f}. "
    caption = f"{correlation}Finished trials only: it is unknown how stopped trials would have ended."
    labels = (f"at {rung.share:.0%} of its length, validation (%)", objective_name(source))
    return _scatter(
        source, marks, ("rung", "Where early stopping decides, and the end", caption), labels, ["at_the_rung"]
    )


def _scatter(
    source: ReportData, marks: Sequence[_Mark], texts: tuple[str, str, str], labels: tuple[str, str],
    columns: Sequence[str], metrics: tuple[str, str] | None = None,
) -> Figure | None:  # fmt: skip
    """Draw trials as marks, and the Pareto front of their `metrics` as a line; `texts` are name, title and caption."""
    points = [(mark.x, mark.y) for mark in marks]
    front = pareto_indices(points, metrics) if metrics else []

    def draw(axes: Axes) -> None:
        if metrics and metrics[0] == SECONDS:
            log_axis(axes, "x", [mark.x for mark in marks])
        else:
            axes.xaxis.set_major_formatter(percent_tick)
        axes.plot(*np.array(sorted(points[index] for index in front)).reshape(-1, 2).T, color=_FAINT)
        _draw_marks(axes, source, marks)
        finish(axes, *labels)

    data = [
        [*_row(mark.record, mark.value), *point[: len(columns)], *([index in front] if metrics else [])]
        for index, (mark, point) in enumerate(zip(marks, points, strict=True))
    ]
    header = [*_HEADER, *columns, *(["on_front"] if metrics else [])]
    return Figure(*texts, draw, [header, *data]) if marks else None


def importance_bars(importances: list[Importance]) -> Figure | None:
    """The importance of each parameter, the largest first."""
    rows = importances[:12]

    def draw(axes: Axes) -> None:
        bars = axes.barh([row.key for row in rows], [row.share for row in rows], 0.62, color=_FAINT)
        axes.bar_label(bars, [f"{percent(row.share)} %" for row in rows], padding=5, color=_MUTED)
        axes.set(xlim=(0, 1.25 * rows[0].share + 1e-9), xticks=[], ylim=(len(rows) - 0.5, -0.5))
        axes.grid(visible=False)
        axes.spines.bottom.set_visible(False)

    caption = "Share in the difference between the best quarter of the trials with the parameter and all of them."
    data = [[row.key, row.share, row.num_trials] for row in importances]
    header, size = ["parameter", "share", "trials"], (WIDTH, 24.0 + 24 * len(rows))
    return Figure("importance", "Parameter importance", caption, draw, [header, *data], size) if rows else None


def slices(source: ReportData, order: Sequence[str]) -> list[Figure]:
    """The objective over the values of each sampled key: a small figure per key, all on one scale."""
    figures = []
    for key in _keys(source, order)[:MAX_SLICES]:
        pairs = [(record, value) for record, value in source.valued() if key in record.draw]
        if len({repr(record.draw[key]) for record, _ in pairs}) > 1:
            figures.append(_slice(source, key, pairs))
    return figures


def _slice(source: ReportData, key: str, pairs: list[tuple[TrialRecord, float]]) -> Figure:
    best, values = source.best, [value for _, value in source.valued()]
    assert best is not None

    def draw(axes: Axes) -> None:
        position, num_choices = _set_scale(axes, "x", source, key, [record.draw[key] for record, _ in pairs], 12)
        groups = dict[float, list[float]]()
        marks = list[_Mark]()
        for index, (record, value) in enumerate(pairs):
            x = position(record.draw[key])
            groups.setdefault(x, []).append(value)
            # Trials with the same value are drawn side by side, so that they don't hide each other.
            note, shift = f", {key} {format_value(key, record.draw[key])}", (index % 7 - 3) * 0.008 * num_choices
            marks.append(_Mark(record, value, x + shift, value, note))
        _draw_marks(axes, source, marks, 6)
        if key not in best.draw:
            axes.axhline(source.value(best) or 0, color=WINNER, linestyle=":", linewidth=1.6, gid=titles(["winner"]))
        for x, group in groups.items() if num_choices else ():
            text = titles([f"median of {len(group)}"])
            axes.plot([x - 0.3, x + 0.3], [statistics.median(group)] * 2, color=_FAINT, gid=text)
        for label in axes.get_xticklabels() if num_choices > 4 else ():
            label.set(rotation=24, ha="right", rotation_mode="anchor")
        margin = 0.06 * (max(values) - min(values)) or 0.01
        axes.set_ylim(min(values) - margin, max(values) + margin)
        axes.yaxis.set_major_formatter(percent_tick)

    data = [[*_row(record, value), record.draw[key]] for record, value in pairs]
    has_winner = f"Winner: {format_value(key, best.draw[key])}." if key in best.draw else ""
    caption = has_winner or "The winner has no such value; the dotted line is its result."
    return Figure(f"slice_{key}", key, caption, draw, [[*_HEADER, key], *data], (340, 230))


def parallel(source: ReportData, order: Sequence[str]) -> Figure | None:
    """Trials as lines over the sampled keys, the most important first; colors show the objective."""
    best, valued = source.best, source.valued()
    pairs = sorted(valued, key=lambda pair: (pair[0] is best, pair[1]))[-MAX_LINES:]
    # No trial may have sampled a parameter that depends on another's value.
    keys = [key for key in _keys(source, order) if any(key in record.draw for record, _ in pairs)][:MAX_AXES]
    if len(pairs) < 2 or not keys:
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.collections import LineCollection

        axes.set(xlim=(0, len(keys)), ylim=(0, 1), xticks=[], yticks=[])
        axes.spines.bottom.set_visible(False)
        columns = [
            {row: record.draw[key] for row, (record, _) in enumerate(pairs) if key in record.draw} for key in keys
        ]
        columns.append({row: 100 * value for row, (_, value) in enumerate(pairs)})
        heights = np.full((len(pairs), len(columns)), NOT_SAMPLED)
        for index, (name, values) in enumerate(zip([*keys, "objective (%)"], columns, strict=True)):
            heights[list(values), index] = _add_axis(axes, source, index, name, values)
            if len(values) < len(pairs):
                axes.text(index, NOT_SAMPLED - 0.02, "not sampled", ha="center", va="top", color=_MUTED)
        levels = [PALETTE[f"r{row * NUM_LEVELS // len(pairs)}"][0] for row in range(len(pairs))]
        texts = [_Mark(record, value, 0, 0).title for record, value in pairs]
        lines = [np.column_stack((range(len(columns)), line)) for line in heights]
        width = min(1.4, max(0.6, 20 / len(lines) ** 0.5))
        axes.add_collection(
            LineCollection(lines, colors=levels, linewidths=width, alpha=0.7, clip_on=False, gid=titles(texts))
        )
        axes.plot(*lines[-1].T, color=WINNER, linewidth=3, clip_on=False, gid=titles([f"winner, {texts[-1]}"]))

    limit = f" Only the best {MAX_LINES:,} of {len(valued):,} trials are drawn." if len(valued) > MAX_LINES else ""
    caption = (
        "Each line is a trial, colored by the eighth of all trials that its objective is in; the winner is blue. Lines "
        f"pass below the axis of a parameter that their trials don't have.{limit}"
    )
    data = [[*_row(record, value), *(record.draw.get(key, "") for key in keys)] for record, value in pairs]
    return Figure(
        "parallel", "Parallel coordinates", caption, draw, [[*_HEADER, *keys], *data], (1000, 390), wide=True
    )  # fmt: skip


def _add_axis(axes: Axes, source: ReportData, index: int, name: str, values: Mapping[int, Any]) -> npt.NDArray[Any]:
    """Add a vertical axis with the `values` of trials; return their heights in the axis's length."""
    twin = axes.twinx()
    twin.grid(visible=False)
    twin.spines.bottom.set_visible(False)
    twin.spines.right.set(visible=True, position=("data", index))
    position, num_choices = _set_scale(twin, "y", source, name, list(values.values()), 15)
    # Trials with the same choice pass next to each other.
    shifts = [(row * 37 % 101 - 50) / 1000 * bool(num_choices) for row in values]
    points = np.array([(0, position(value) + shift) for value, shift in zip(values.values(), shifts, strict=True)])
    # It draws nothing and sets the limits.
    twin.plot(*points.reshape(-1, 2).T, linestyle="none")
    twin.autoscale_view()
    axes.text(index, 1.03 + 0.07 * (index % 2), name, ha="center")
    for label in twin.get_yticklabels():
        label.set_bbox({"facecolor": PALETTE["bg"][0], "alpha": 0.75, "edgecolor": "none", "pad": 1})
    return (twin.transScale + twin.transLimits).transform(points.reshape(-1, 2))[:, 1]


def _keys(source: ReportData, order: Sequence[str]) -> list[str]:
    """The keys of the space, those of `order` first."""
    return list(dict.fromkeys([*order, *(parameter.key for parameter in source.space.parameters)]))


def _set_scale(
    axes: Axes, which: Literal["x", "y"], source: ReportData, key: str, values: Sequence[Any], max_letters: int
) -> tuple[Callable[[Any], float], int]:
    """Set up an axis for the values of a key; return where on it a value stands, and the number of choices or 0."""
    ranges = source.space.of(key)
    if all(parameter.kind != "choice" for parameter in ranges):
        if any(parameter.kind == "loguniform" for parameter in ranges):
            log_axis(axes, which, values)
        return float, 0
    texts = {repr(value): textwrap.fill(format_value(key, value), max_letters) for value in values}
    listed = [repr(value) for parameter in ranges for value in parameter.finite_values() or ()]
    names = [name for name in dict.fromkeys([*listed, *texts]) if name in texts]
    axes.set(**{f"{which}ticks": range(len(names)), f"{which}ticklabels": [texts[name] for name in names]})
    return lambda value: names.index(repr(value)), len(names)
