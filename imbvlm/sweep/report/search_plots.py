"""Figures of the search: history, cost, few-shot accuracy, rungs, importance, slices, parallel coordinates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imbvlm.base.formatting import duration, percent
from imbvlm.sweep.records.summary_tables import format_value
from imbvlm.sweep.records.trial_log import TrialRecord, describe_trial
from imbvlm.sweep.report.plotting import (
    HEIGHT,
    RING,
    TOP,
    WIDTH,
    WINNER_COLOR,
    Drawing,
    Figure,
    Point,
    Scale,
    frame,
    legend,
    method_color,
    number,
    percent_tick,
    spread,
)
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.report_statistics import Importance, rungs
from imbvlm.sweep.spec.objectives import SECONDS, pareto_indices

MAX_AXES = 9
MAX_LINES = 400
MAX_SLICES = 12
NEVER = "–"


def objective_name(source: ReportData) -> str:
    """The objective as an axis's label, such as `balanced accuracy, validation (%)`."""
    return f"{source.spec.objective.removeprefix('val/').replace('_', ' ')}, validation (%)"


def methods(source: ReportData) -> list[str]:
    """The methods of the search's trials; a method's index determines its color and shape."""
    return sorted({str(record.config["method"]) for record in source.log.of("search")})


@dataclass(frozen=True)
class TrialMarks:
    """Marks of trials in every figure of the search: color and shape show the method, a ring shows the winner."""

    methods: Sequence[str]
    winner_id: str

    @staticmethod
    def of(source: ReportData) -> TrialMarks:
        """Marks for the trials of a sweep."""
        return TrialMarks(methods(source), "" if source.best is None else source.best.trial_id)

    def dot(
        self, drawing: Drawing, x: float, y: float, record: TrialRecord, value: float, more: str = "", *,
        size: float = 3.6,
    ) -> None:  # fmt: skip
        """Draw a trial."""
        method = str(record.config["method"])
        stopped = f", stopped after {len(record.epochs)} epochs" if record.state == "stopped" else ""
        title = f"{record.trial_id}: {percent(value)} %{more}{stopped} ({describe_trial(record)})"
        style = f"{method_color(method, self.methods)}{' dim' if record.state == 'stopped' else ''}"
        drawing.dot(x, y, style, title, shape=self.methods.index(method), size=size)
        if record.trial_id == self.winner_id:
            drawing.dot(x, y, WINNER_COLOR, f"winner, {title}", shape=RING, size=size)

    @property
    def legend(self) -> list[tuple[str, str, int]]:
        """Legend entries of the methods and of the winner's ring."""
        kinds = [
            (method.replace("_", " "), method_color(method, self.methods), index)
            for index, method in enumerate(self.methods)
        ]
        return [*kinds, ("winner", WINNER_COLOR, RING)]


def history(source: ReportData) -> Figure | None:
    """The value of each trial in the order of starting, and the best value so far."""
    pairs = source.valued()
    if not pairs:
        return None
    drawing, marks = Drawing(WIDTH, HEIGHT), TrialMarks.of(source)
    numbers = [int(record.trial_id[1:]) for record, _ in pairs]
    references = [
        (record, value) for record in source.log.of("baseline") if (value := source.value(record)) is not None
    ]
    low, high = min(value for _, value in pairs), max(value for _, value in pairs)
    # A baseline far below would compress the trials into a line; tables have its value.
    references = [(record, value) for record, value in references if value > low - (high - low)]
    x = spread([*numbers, 1], 52, WIDTH - 12, pad=0.03)
    y = spread([value for _, value in [*pairs, *references]], HEIGHT - 46, TOP)
    frame(drawing, x, y, ("trial", objective_name(source)), x_format=_whole, y_format=percent_tick)
    for record, value in references:
        style = method_color(str(record.config["method"]), [*marks.methods, str(record.config["method"])])
        drawing.line([(x.start, y(value)), (x.end, y(value))], style, width=1.4, dash="5 4", title=record.name)
        drawing.text(x.end - 2, y(value) - 4, record.name, anchor="end", style="muted", size=11)
    best, steps = -math.inf, list[Point]()
    for number_, (_, value) in zip(numbers, pairs, strict=True):
        steps += [(x(number_), y(best))] if steps and value > best else []
        best = max(best, value)
        steps.append((x(number_), y(best)))
    drawing.line(steps, "faint", width=1.8)
    data = [_row(record, value) for record, value in pairs]
    data += [[record.trial_id, record.name, record.state, value] for record, value in references]
    for number_, (record, value) in zip(numbers, pairs, strict=True):
        marks.dot(drawing, x(number_), y(value), record, value)
    legend(drawing, 52, 14, marks.legend)
    caption = (
        f"Each mark is a trial{_pale(source)}, the line the best so far, dashes the baselines, the ring the winner."
    )
    return Figure("history", "Search history", caption, drawing, [_HEADER, *data])


# A trial in a scatter plot: its record and value, its point, and a note for its title.
_Scattered = tuple[TrialRecord, float, Point, str]


def against_cost(source: ReportData) -> Figure | None:
    """Accuracy against seconds, with the Pareto front."""
    timed = [(record, value, max(0.05, record.seconds())) for record, value in source.valued() if record.ended_at]
    if not timed:
        return None
    trials = [(record, value, (cost, value), f", {duration(cost)}") for record, value, cost in timed]
    labels = ("seconds of a trial, its start included", objective_name(source))
    drawing, front = _scatter(source, trials, labels, (SECONDS, source.spec.objective), is_log=True)
    data = [[*_row(record, value), cost, index in front] for index, (record, value, cost) in enumerate(timed)]
    caption = "The line is the Pareto front: no trial is both faster and better."
    return Figure("cost", "Accuracy against cost", caption, drawing, [[*_HEADER, "seconds", "on_front"], *data])


def against_few_shot(source: ReportData) -> Figure | None:
    """Overall against few-shot accuracy, or medium-shot without few-shot classes, at each trial's best epoch."""
    epochs = [(record, value, record.best_epoch(source.spec.objective) or {}) for record, value in source.valued()]
    groups = [group for group in ("few_shot", "medium_shot") if any(f"val/{group}_accuracy" in e for *_, e in epochs)]
    if not groups:
        return None
    metrics, name = (f"val/{groups[0]}_accuracy", "val/top1_accuracy"), groups[0].replace("_", "-")
    trials = list[_Scattered]()
    for record, value, epoch in epochs:
        if metrics[0] in epoch:
            few, top = epoch[metrics[0]], epoch[metrics[1]]
            trials.append((record, value, (few, top), f", {name} {percent(few)}, overall {percent(top)}"))
    labels = (f"{name} accuracy, validation (%)", "overall accuracy, validation (%)")
    drawing, front = _scatter(source, trials, labels, metrics)
    data = [[*_row(record, value), *point, i in front] for i, (record, value, point, _) in enumerate(trials)]
    header = [*_HEADER, *(metric.removeprefix("val/") for metric in metrics), "on_front"]
    caption = "The trade-off of head and tail, and the Pareto front."
    return Figure("few_shot", f"Overall against {name} accuracy", caption, drawing, [header, *data])


def rung_against_end(source: ReportData) -> Figure | None:
    """The best values of finished trials against their values at ASHA's first rung."""
    rung = next(iter(rungs(source)), None)
    if rung is None or rung.num_trials < 2:
        return None
    trials = [
        (record, value, (early, value), f", {percent(early)} % at the rung") for record, early, value in rung.pairs
    ]
    labels = (f"at {rung.share:.0%} of its length, validation (%)", objective_name(source))
    drawing, _ = _scatter(source, trials, labels)
    correlation = "" if rung.correlation is None else f"Rank correlation {rung.correlation:.2f}. "
    caption = f"{correlation}Finished trials only: it is unknown how stopped trials would have ended."
    data = [[*_row(record, value), early] for record, early, value in rung.pairs]
    header = [*_HEADER, "at_the_rung"]
    return Figure("rung", "Where early stopping decides, and the end", caption, drawing, [header, *data])


def _scatter(
    source: ReportData,
    trials: Sequence[_Scattered],
    labels: tuple[str, str],
    metrics: tuple[str, str] | None = None,
    *,
    is_log: bool = False,
) -> tuple[Drawing, list[int]]:
    """Draw trials as marks, and the Pareto front of the points' `metrics` as a line; returns the front's indices."""
    drawing, marks = Drawing(WIDTH, HEIGHT), TrialMarks.of(source)
    points = [point for _, _, point, _ in trials]
    x = spread([left for left, _ in points], 52, WIDTH - 12, log=is_log)
    y = spread([right for _, right in points], HEIGHT - 46, TOP)
    frame(drawing, x, y, labels, x_format=number if is_log else percent_tick, y_format=percent_tick)
    front = [] if metrics is None else pareto_indices(points, metrics)
    if len(front) > 1:
        line = sorted(points[index] for index in front)
        drawing.line([(x(left), y(right)) for left, right in line], "faint", width=1.8)
    for record, value, (left, right), note in trials:
        marks.dot(drawing, x(left), y(right), record, value, note)
    legend(drawing, 52, 14, marks.legend)
    return drawing, front


def importance_bars(importances: list[Importance]) -> Figure | None:
    """The importance of each parameter, the largest first."""
    if not importances:
        return None
    rows = importances[:12]
    drawing = Drawing(WIDTH, 40 + 24 * len(rows))
    left = 12 + 6.6 * max(len(importance.key) for importance in rows)
    for index, importance in enumerate(rows):
        top = 12 + 24 * index
        width = (WIDTH - left - 60) * importance.share / max(rows[0].share, 1e-9)
        drawing.text(left - 8, top + 13, importance.key, anchor="end")
        drawing.bar(left, top + 2, max(width, 1), 15, "faint", f"{importance.key}: {percent(importance.share)} %")
        drawing.text(left + max(width, 1) + 6, top + 14, f"{percent(importance.share)} %", style="muted")
    caption = "Share in the difference between the best quarter of the trials with the parameter and all of them."
    data: list[list[object]] = [[importance.key, importance.share, importance.num_trials] for importance in importances]
    header = ["parameter", "share", "trials"]
    return Figure("importance", "Parameter importance", caption, drawing, [header, *data])


def slices(source: ReportData, order: Sequence[str]) -> list[Figure]:
    """The objective over the values of each sampled key: a small figure per key, all on one scale."""
    figures = []
    for key in [*order, *(key for key in _keys(source) if key not in order)][:MAX_SLICES]:
        pairs = [(record, value) for record, value in source.valued() if key in record.draw]
        if len({repr(record.draw[key]) for record, _ in pairs}) > 1:
            data = [[*_row(record, value), record.draw[key]] for record, value in pairs]
            figures.append(Figure(f"slice_{key}", key, "", _slice(source, key, pairs), [[*_HEADER, key], *data]))
    return figures


def _slice(source: ReportData, key: str, pairs: list[tuple[TrialRecord, float]]) -> Drawing:
    named = {repr(record.draw[key]): format_value(key, record.draw[key]) for record, _ in pairs}
    crowded = sum(6 * len(word) + 10 for word in named.values()) > 286
    drawing, marks = Drawing(340, 258 if crowded else 218), TrialMarks.of(source)
    y = spread([value for _, value in source.valued()], 190, 14)
    x, positions = _value_axis(source, key, [record.draw[key] for record, _ in pairs], 44, 330)
    frame(
        drawing, x, y, ("", ""), x_format=number if positions is None else None, y_format=percent_tick, num_ticks=(4, 4)
    )
    for index, (record, value) in enumerate(pairs):
        # Trials with the same value are drawn side by side, so that they don't hide each other.
        at = x(record.draw[key]) if positions is None else positions[repr(record.draw[key])] + (index % 7 - 3) * 2.2
        marks.dot(drawing, at, y(value), record, value, f", {key} {format_value(key, record.draw[key])}", size=3)
    for name, at in (positions or {}).items():
        values = [value for record, value in pairs if repr(record.draw[key]) == name]
        middle = y(statistics.median(values))
        drawing.line([(at - 14, middle), (at + 14, middle)], "faint", title=f"median of {len(values)}")
        word = named[name] if len(named[name]) < 24 else f"{named[name][:22]}…"
        if crowded:
            drawing.text(at + 6, 206, word, anchor="end", style="muted", size=10.5, turn=-24)
        else:
            drawing.text(at, 206, word, anchor="middle", style="muted", size=11)
    return drawing


def parallel(source: ReportData, order: Sequence[str]) -> Figure | None:
    """Trials as lines over the sampled keys, the most important first; the winner and the best tenth stand out."""
    winner = TrialMarks.of(source).winner_id
    pairs = sorted(source.valued(), key=lambda pair: (pair[0].trial_id == winner, pair[1]))[-MAX_LINES:]
    keys = [*order, *(key for key in _keys(source) if key not in order)][:MAX_AXES]
    if len(pairs) < 2 or not keys:
        return None
    width, height = 1000.0, 360.0
    drawing, top, bottom = Drawing(width, height), 46.0, height - 44.0
    # The first name is centered on its axis.
    left = max(60.0, 3.4 * len(keys[0]))
    gap = (width - 60 - left) / len(keys)
    positions = [left + index * gap for index in range(len(keys) + 1)]
    columns = [_parallel_axis(source, key, pairs, top, bottom - 26) for key in keys]
    goal = spread([value for _, value in pairs], bottom - 26, top)
    num_best = max(1, len(pairs) // 10)
    for rank, (record, value) in enumerate(pairs):
        points = [
            (at, column.get(repr(record.draw.get(key, NEVER)), bottom))
            for at, key, column in zip(positions, keys, columns, strict=False)
        ]
        is_best, is_winner = rank >= len(pairs) - num_best, record.trial_id == winner
        title = f"{record.trial_id}: {percent(value)} % ({describe_trial(record)})"
        style, line_width = (WINNER_COLOR, 3) if is_winner else ("ink", 1.6) if is_best else ("faint", 1)
        drawing.line([*points, (positions[-1], goal(value))], f"{style} thread", width=line_width, title=title)
    for at, key, column in zip(positions, keys, columns, strict=False):
        drawing.rule(at, top, at, bottom - 26, "axis")
        drawing.text(at, 22 if keys.index(key) % 2 == 0 else 36, key, anchor="middle", size=11.5)
        for word, y in _labels(source, key, pairs, column):
            # Labels end before the next axis: 5.6 pixels is a letter's mean width at this size.
            drawing.text(at + 5, y + 4, word, style="halo", size=min(10.5, 10.5 * (gap - 8) / (5.6 * len(word))))
        if any(key not in record.draw for record, _ in pairs):
            drawing.text(at, bottom + 16, "not sampled", anchor="middle", style="muted", size=10.5)
    drawing.rule(positions[-1], top, positions[-1], bottom - 26, "axis")
    drawing.text(width - 4, 22, "objective (%)", anchor="end", size=11.5)
    for tick in goal.ticks(5):
        drawing.text(positions[-1] + 6, goal(tick) + 4, percent_tick(tick), style="halo", size=10.5)
    caption = (
        "Each line is a trial; the winner is blue, the best tenth dark. A trial without a parameter is at the bottom."
    )
    data = [[*_row(record, value), *(record.draw.get(key, "") for key in keys)] for record, value in pairs]
    return Figure("parallel", "Parallel coordinates", caption, drawing, [[*_HEADER, *keys], *data], wide=True)


# ------------------------------------------------------------------------------------------------------ parts


_HEADER = ["trial", "method", "state", "objective"]


def _pale(source: ReportData) -> str:
    return " (pale: stopped early)" if any(record.state == "stopped" for record, _ in source.valued()) else ""


def _row(record: TrialRecord, value: float) -> list[object]:
    """The first columns of a trial's row in a figure's CSV."""
    return [record.trial_id, str(record.config["method"]), record.state, value]


def _keys(source: ReportData) -> list[str]:
    """The keys of the space in its order."""
    return list(dict.fromkeys(parameter.key for parameter in source.space.parameters))


def _value_axis(
    source: ReportData, key: str, values: Sequence[Any], start: float, end: float
) -> tuple[Scale, dict[str, float] | None]:
    """A scale for numbers of a range; for choices also the position of each value by its repr."""
    ranges = source.space.of(key)
    if all(parameter.kind != "choice" for parameter in ranges):
        return spread(values, start, end, log=any(parameter.kind == "loguniform" for parameter in ranges)), None
    listed = dict.fromkeys(repr(value) for parameter in ranges for value in (parameter.finite_values() or ()))
    names = [name for name in listed if name in {repr(value) for value in values}]
    step = (end - start) / len(names)
    return Scale(0, 1, start, end), {name: start + step * (index + 0.5) for index, name in enumerate(names)}


def _parallel_axis(
    source: ReportData, key: str, pairs: list[tuple[TrialRecord, float]], top: float, bottom: float
) -> dict[str, float]:
    values = [record.draw[key] for record, _ in pairs if key in record.draw]
    if not values:
        return {}
    scale, positions = _value_axis(source, key, values, bottom, top)
    return positions if positions is not None else {repr(value): scale(value) for value in values}


def _labels(
    source: ReportData, key: str, pairs: list[tuple[TrialRecord, float]], column: dict[str, float]
) -> list[tuple[str, float]]:
    values = {repr(record.draw[key]): record.draw[key] for record, _ in pairs if key in record.draw}
    if all(parameter.kind == "choice" for parameter in source.space.of(key)):
        return [(format_value(key, value), column[name]) for name, value in values.items()]
    ends = [min(values.values()), max(values.values())] if values else []
    return [(format_value(key, value), column[repr(value)]) for value in ends]


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else ""
