"""Figures and tables of a report: SVG drawings, PNG files, CSV and LaTeX."""

from __future__ import annotations

import atexit
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import ImageFont

from imbvlm.base.csv_cells import csv_line, escape_cell

Point = tuple[float, float]
Format = Callable[[float], str]
NUM_COLORS = 9
# The shape of the mark around the winner.
RING = -1
# The style of a drawing outside the page.
ALONE = (
    "svg{font:12px system-ui,sans-serif}text{fill:#1c2430}.grid{stroke:#d9dee7}.axis{stroke:#5c6675}"
    ".muted{fill:#5c6675}.c0{color:#1d5fd1}.c1{color:#c4610a}.c2{color:#6b7280}"
    ".c3{color:#0f8a6b}.c4{color:#9333a8}.c5{color:#a88608}.c6{color:#c2255c}.c7{color:#0b7285}.c8{color:#7a4a1e}"
    ".ink{color:#1c2430}.faint{color:#9aa3b0}.dim{opacity:.45}"
    ".faint.thread{stroke-opacity:.55}.whisker{stroke:#1c2430;stroke-width:1.4}.halo{paint-order:stroke;stroke:#fff;stroke-width:3px;stroke-linejoin:round}"
)


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start if high == low else self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, num_ticks: int = 5) -> list[float]:
        """About `num_ticks` round values within the range."""
        if self.log:
            return _log_ticks(self.low, self.high, num_ticks)
        step = _nice_step((self.high - self.low) / max(1, num_ticks))
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _nice_step(raw: float) -> float:
    if raw <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)


def _log_ticks(low: float, high: float, num_ticks: int) -> list[float]:
    for digits in ((1, 2, 5), (1, 3), (1,)):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = [d * 10.0**power for power in range(first, last + 1) for d in digits]
        ticks = [value for value in ticks if low * 0.999 <= value <= high * 1.001]
        if len(ticks) <= num_ticks + 1:
            break
    # A narrow range contains no round value and gets its own middle.
    return ticks[:: math.ceil(len(ticks) / (num_ticks + 1))] if ticks else [math.sqrt(low * high)]


def spread(values: Iterable[float], start: float, end: float, *, log: bool = False, pad: float = 0.06) -> Scale:
    """A scale over values with a margin at both ends."""
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    if log:
        ratio = (high / low) ** pad if high > low else 1.5
        return Scale(low / ratio, high * ratio, start, end, log=True)
    margin = (high - low) * pad or abs(high) * 0.05 or 0.5
    return Scale(low - margin, high + margin, start, end)


@dataclass
class Drawing:
    """SVG marks in the order in which they are painted."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)
    # Painted after all other marks.
    on_top: list[str] = field(default_factory=list)

    def line(self, points: Sequence[Point], style: str, *, width: float = 2, dash: str = "", title: str = "") -> None:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        attributes = f'd="{path}" fill="none" stroke="currentColor" stroke-width="{width:g}"{dashes}'
        self.parts.append(_mark("path", f'class="{style}" {attributes}', title))

    def area(self, points: Sequence[Point], style: str, opacity: float = 0.15) -> None:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"
        self.parts.append(f'<path class="{style}" d="{path}" fill="currentColor" opacity="{opacity}"/>')

    def dot(self, x: float, y: float, style: str, title: str = "", *, size: float = 3.6, shape: int = 0) -> None:
        """Draw a circle, square, triangle or rhombus, so that shapes distinguish series too, or a RING on top."""
        if shape == RING:
            ring = f'class="{style}" fill="none" stroke="currentColor" stroke-width="2.2"'
            self.on_top.append(_mark("circle", f'{ring} cx="{x:.1f}" cy="{y:.1f}" r="{size + 2.2:g}"', title))
            return
        common = f'class="{style}" fill="currentColor"'
        if shape % 4 == 0:
            mark = _mark("circle", f'{common} cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"', title)
        else:
            outlines = (
                ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
                ((0.0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
                ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
            )
            corners = " ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in outlines[shape % 4 - 1])
            mark = _mark("polygon", f'{common} points="{corners}"', title)
        self.parts.append(mark)

    def bar(self, x: float, y: float, width: float, height: float, style: str, title: str = "") -> None:
        box = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}" rx="1.5"'
        self.parts.append(_mark("rect", f'class="{style}" fill="currentColor" {box}', title))

    def rule(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self.parts.append(f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        anchor: str = "start",
        style: str = "",
        turn: float = 0,
        size: float = 12,
    ) -> None:
        turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
        attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}" font-size="{size:g}"{turned}'
        self.parts.append(f"<text {attributes}>{escape(content)}</text>")

    def svg(self, title: str, *, alone: bool = False) -> str:
        """The drawing as an SVG element, or with `alone` as the content of an SVG file."""
        head = f'viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(title)}"'
        size = f' xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}"' if alone else ""
        background = f'<style>{ALONE}</style><rect width="100%" height="100%" fill="#fff"/>' if alone else ""
        return f"<svg {head}{size}>{background}{''.join([*self.parts, *self.on_top])}</svg>"


def _mark(tag: str, attributes: str, title: str) -> str:
    return f"<{tag} {attributes}><title>{escape(title)}</title></{tag}>" if title else f"<{tag} {attributes}/>"


def frame(
    drawing: Drawing,
    x: Scale,
    y: Scale,
    labels: tuple[str, str],
    *,
    x_format: Format | None = None,
    y_format: Format | None = None,
    num_ticks: tuple[int, int] = (6, 5),
) -> None:
    """Draw grid, axes, ticks and names of the axes; without `x_format` the caller draws the ticks of x."""
    for value in y.ticks(num_ticks[1]):
        drawing.rule(x.start, y(value), x.end, y(value), "grid")
        drawing.text(x.start - 7, y(value) + 4, (y_format or number)(value), anchor="end", style="muted")
    if x_format is not None:
        for value in x.ticks(num_ticks[0]):
            drawing.rule(x(value), y.start, x(value), y.start + 4, "axis")
            drawing.text(x(value), y.start + 18, x_format(value), anchor="middle", style="muted")
    drawing.rule(x.start, y.start, x.end, y.start, "axis")
    if labels[0]:
        drawing.text((x.start + x.end) / 2, drawing.height - 6, labels[0], anchor="middle")
    if labels[1]:
        drawing.text(x.start, y.end - 12, labels[1], anchor="start")


def legend(drawing: Drawing, x: float, y: float, entries: Sequence[tuple[str, str, int]]) -> None:
    """Draw names next to their marks, (name, style, shape), in one row or in as many as they need."""
    rows: list[list[tuple[float, str, str, int]]] = [[]]
    at = x
    for name, style, shape in entries:
        width = 24 + 6.3 * len(name)
        if rows[-1] and at + width > drawing.width + 10:
            rows.append([])
            at = x
        rows[-1].append((at, name, style, shape))
        at += width
    top = y - 5 * (len(rows) - 1)
    for index, row in enumerate(rows):
        for left, name, style, shape in row:
            drawing.dot(left + 5, top + 14 * index - 4, style, shape=shape, size=4.2)
            drawing.text(left + 14, top + 14 * index, name, size=11.5)


def number(value: float) -> str:
    """A short number: 0.003, 12, 3,400."""
    if value and abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent_tick(value: float) -> str:
    """A fraction as a percentage on an axis."""
    return f"{100 * value:.4g}"


ZOOM = 3


def png(svg: str) -> bytes:
    """PNG with three pixels per unit: about 300 per inch if a figure is as wide as a paper's column."""
    import resvg_py

    family, path = _font()
    if path is None:
        return resvg_py.svg_to_bytes(svg, zoom=ZOOM)
    # The machine's fonts are the fallback for letters that this font lacks.
    return resvg_py.svg_to_bytes(svg, zoom=ZOOM, font_files=[str(path)], sans_serif_family=family)


@cache
def _font() -> tuple[str, Path | None]:
    """The family of Pillow's font and a file of it for the life of this process; None if this Pillow has no font."""
    font = ImageFont.load_default(12)
    if not isinstance(font, ImageFont.FreeTypeFont) or not isinstance(font.path, io.BytesIO):
        return "", None
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "font.ttf"
    path.write_bytes(font.path.getvalue())
    return font.getname()[0] or "", path


WIDTH, HEIGHT = 460.0, 310.0
# The upper edge of a plot, below its legend and the name of its y axis.
TOP = 50.0


# A color has one meaning on the whole page: baselines have the color of their method, other methods the remaining ones.
WINNER_COLOR = "c0"
METHOD_COLORS = {"linear_probe": "c1", "zero_shot": "c2"}


def method_color(method: str, methods: Sequence[str]) -> str:
    """The color of a method among those of a page."""
    others = sorted(set(methods) - METHOD_COLORS.keys())
    first = len(METHOD_COLORS) + 1
    return METHOD_COLORS.get(method) or f"c{first + others.index(method) % (NUM_COLORS - first)}"


@dataclass(frozen=True)
class Figure:
    """A drawing with its file's name, heading and caption; `wide` takes the page's whole width.

    `data` has a row of headings and then the plotted numbers.
    """

    name: str
    title: str
    caption: str
    drawing: Drawing
    data: Sequence[Sequence[object]]
    wide: bool = False

    def csv(self) -> str:
        """The plotted numbers as CSV: accuracies and shares as fractions."""
        return "".join(csv_line(map(_figure_cell, row)) for row in self.data)


@dataclass(frozen=True)
class Table:
    """A table of texts; columns from `first_number` on are numbers."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    first_number: int = 1
    caption: str = ""

    def csv(self) -> str:
        """The table as CSV."""
        rows = (map(self._cell, row, itertools.count()) for row in self.rows)
        return "".join(map(csv_line, [map(escape_cell, self.header), *rows]))

    def _cell(self, cell: str, column: int) -> str:
        """A number or the dash of a missing one is unchanged; texts are escaped, so that none becomes a formula."""
        is_number = cell == "-" or (column >= self.first_number and _NUMBER.fullmatch(cell))
        return cell if is_number else escape_cell(cell)

    def latex(self) -> str:
        """The table in LaTeX, for the package booktabs."""
        columns = "l" * self.first_number + "c" * (len(self.header) - self.first_number)
        lines = [
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            f"{' & '.join(map(_latex, self.header))} \\\\",
            "\\midrule",
            *(f"{' & '.join(map(_latex, row))} \\\\" for row in self.rows),
            "\\bottomrule",
            "\\end{tabular}",
        ]
        return "\n".join(lines) + "\n"


# Such as +1,234.5 ± 0.1 or 3e-05.
_NUMBER = re.compile(r"[+-]?[\d,.]+(e[+-]?\d+)?( ± [\d.]+)?")


def _figure_cell(cell: object) -> object:
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return escape_cell(cell) if isinstance(cell, str) else cell


_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "±": "$\\pm$",
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
}


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in cell)
