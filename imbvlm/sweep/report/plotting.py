"""Figures and tables of a report: their look, SVG, PNG and CSV."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from imbvlm.base.csv_cells import csv_line, escape_cell
from imbvlm.config.method_registry import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Each color on light and on dark ground. c0 is the winner, the next ones are the methods in their registry's order,
# and r0 to r7 are values from low to high.
PALETTE = {
    "bg": ("#ffffff", "#12161c"),
    "ink": ("#1c2430", "#e4e8ee"),
    "muted": ("#5c6675", "#9aa5b4"),
    "line": ("#dfe3ea", "#2b333f"),
    "axis": ("#8a94a3", "#6c7788"),
    "faint": ("#a3acb9", "#5d6878"),
    "c0": ("#1d5fd1", "#6aa5ff"),
    "c1": ("#6b7280", "#a0a8b5"),
    "c2": ("#9a7b06", "#dfbf4c"),
    "c3": ("#c4610a", "#f0a052"),
    "c4": ("#0f8a6b", "#45c9a0"),
    "c5": ("#9333a8", "#cf8be0"),
    "c6": ("#c2255c", "#f783ac"),
    "c7": ("#0b7285", "#66d9e8"),
    "c8": ("#7a4a1e", "#d9a06b"),
    "c9": ("#5f7d1f", "#b5d16b"),
    "c10": ("#8f2d21", "#e58c7d"),
    "c11": ("#4a3aa8", "#a99cf0"),
    "r0": ("#f2dfb3", "#3a2f4a"),
    "r1": ("#eec68a", "#54375c"),
    "r2": ("#e7a66d", "#74406a"),
    "r3": ("#db8360", "#97496f"),
    "r4": ("#c4605e", "#bb576c"),
    "r5": ("#a1435f", "#d9705f"),
    "r6": ("#762d5b", "#eb9a5f"),
    "r7": ("#471c4b", "#f6cf7d"),
}
NUM_LEVELS = 8
WINNER, *METHOD_COLORS = (light for name, (light, _) in PALETTE.items() if name.startswith("c"))
MARKERS = "osD^vPX"
# Opacity of what is shown next to something more important.
PALE = 0.45
# Pixels of an SVG at its own size, in which a point of type is a pixel, too.
WIDTH, HEIGHT = 420.0, 290.0
DPI = 72
# About 300 dots per inch if a figure is as wide as a paper's column.
ZOOM = 3
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "figure.dpi": DPI,
    "figure.facecolor": PALETTE["bg"][0],
    "figure.constrained_layout.use": True,
    "font.size": 11.5,
    "text.color": PALETTE["ink"][0],
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": PALETTE["ink"][0],
    "axes.edgecolor": PALETTE["axis"][0],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.04,
    "axes.ymargin": 0.06,
    "grid.color": PALETTE["line"][0],
    "xtick.color": PALETTE["axis"][0],
    "xtick.labelcolor": PALETTE["muted"][0],
    "ytick.color": PALETTE["axis"][0],
    "ytick.left": False,
    "ytick.labelcolor": PALETTE["muted"][0],
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "lines.markeredgewidth": 0,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "legend.handlelength": 1,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.2,
}
_VARIABLES = {light: f"var(--{name}, {light})" for name, (light, _) in PALETTE.items()}
_COLOR = re.compile("|".join(_VARIABLES))
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def figure_css() -> str:
    """The colors of figures as CSS variables, light or dark by the reader's setting, and the marks under a pointer."""
    light, dark = ("".join(f"--{name}:{pair[index]};" for name, pair in PALETTE.items()) for index in (0, 1))
    hover = "svg use:hover{stroke:var(--ink)!important}svg path:has(title):hover{stroke-width:4!important}"
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{hover}"


def method_look(method: str) -> tuple[str, str]:
    """Color and marker of a method, the same in every report."""
    index = list(METHODS).index(method)
    return METHOD_COLORS[index % len(METHOD_COLORS)], MARKERS[index % len(MARKERS)]


def titles(texts: Iterable[str]) -> str:
    """The `gid` of an artist whose marks, in their order, get these texts to be shown under the pointer."""
    return json.dumps(list(texts))


def percent_tick(value: float, position: object = None) -> str:
    """A fraction as a percentage on an axis."""
    return f"{100 * value:.4g}"


def log_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Scale an axis logarithmically, with as many round numbers as fit the range of `values`."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis, exponents = getattr(axes, f"{which}axis"), [math.log10(value) for value in values]
    decades = max(exponents) - min(exponents)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.7 else (1, 3) if decades < 3 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,g}")


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Name both axes, the second one a percentage, and the labeled artists in as many columns as fit."""
    axes.set(xlabel=x_label, title=y_label)
    axes.yaxis.set_major_formatter(percent_tick)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    columns = max(1, int(WIDTH / (28 + 6.3 * max(map(len, named)))))
    axes.figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=columns)


@dataclass(frozen=True)
class Figure:
    """A figure with its file's name, heading and caption; `wide` takes the page's whole width.

    `draw` draws on empty axes. `data` has a row of headings and then the plotted numbers.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], None]
    data: Sequence[Sequence[object]]
    size: tuple[float, float] = (WIDTH, HEIGHT)
    wide: bool = False

    def csv(self) -> str:
        """The plotted numbers as CSV: accuracies and shares as fractions."""
        return "".join(csv_line(map(_figure_cell, row)) for row in self.data)

    def png(self) -> bytes:
        """The figure as a PNG file."""
        return self._render("png", {"Software": None}, dpi=DPI * ZOOM)

    def svg(self, *, alone: bool = False) -> str:
        """The figure as an element of a page that has `figure_css`, or with `alone` as the content of an SVG file."""
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        root = ElementTree.fromstring(self._render("svg", metadata, transparent=not alone))
        _tidy(root, has_variables=not alone)
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "stroke-linejoin": "round"}
        if alone:
            size = dict(zip(("width", "height"), map(str, self.size), strict=True))
            root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", **size}
        root[:0] = [_with_text("title", self.title), _with_text("desc", self.caption)]
        return ElementTree.tostring(root, encoding="unicode")

    def _render(self, file_format: str, metadata: dict[str, None], **options: Any) -> bytes:
        # A home that can't be written to, or a first search for fonts, would print lines on it.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        import matplotlib.figure
        import matplotlib.style

        stream, style = io.BytesIO(), {**STYLE, "svg.hashsalt": self.name}
        with matplotlib.style.context(style, after_reset=True), warnings.catch_warnings():
            # Its font lacks letters of some languages, which browsers have.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure = matplotlib.figure.Figure((self.size[0] / DPI, self.size[1] / DPI))
            self.draw(figure.add_subplot())
            figure.savefig(stream, format=file_format, metadata=metadata, **options)
        return stream.getvalue()


def _with_text(tag: str, text: str) -> ElementTree.Element:
    element = ElementTree.Element(tag)
    element.text = text
    return element


def _tidy(root: ElementTree.Element, *, has_variables: bool) -> None:
    """Shorten matplotlib's SVG, move texts of marks from ids to titles, and replace colors by CSS variables."""
    for element in root.iter():
        element.tag, element.tail = element.tag.rpartition("}")[2], None
        element.text = element.text if element.tag == "text" else None
        # Nothing is drawn outside of its axes.
        pairs = [(key.rpartition("}")[2], value) for key, value in element.items() if key != "clip-path"]
        element.attrib = {key: _tidy_value(key, value, has_variables) for key, value in pairs}
    for parent in root.iter():
        for defs in parent.findall("defs"):
            if defs[0].tag in ("style", "clipPath"):
                parent.remove(defs)
    for group in root.iter("g"):
        identity = group.attrib.pop("id", "")
        if identity.startswith("["):
            marks = [mark for mark in group.iter() if mark.tag == "use" or (mark.tag == "path" and not mark.get("id"))]
            for mark, text in zip(marks, json.loads(identity), strict=True):
                mark.append(_with_text("title", text))
        uses = group.findall("use")
        for mark in uses if len({mark.get("style") for mark in uses}) == 1 else ():
            group.attrib["style"] = mark.attrib.pop("style")


def _tidy_value(key: str, value: str, has_variables: bool) -> str:
    if key == "style":
        style = re.sub("'DejaVu Sans'[^;]*", "system-ui, sans-serif", value)
        return _COLOR.sub(lambda color: _VARIABLES[color[0]], style) if has_variables else style
    if key in ("d", "x", "y", "transform"):
        return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.4g}", value).replace("\n", "")
    return value


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


# Such as +1,234.5 ± 0.1 or 3e-05.
_NUMBER = re.compile(r"[+-]?[\d,.]+(e[+-]?\d+)?( ± [\d.]+)?")


def _figure_cell(cell: object) -> object:
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return escape_cell(cell) if isinstance(cell, str) else cell
