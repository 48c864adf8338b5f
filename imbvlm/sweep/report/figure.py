"""The parts of a report: figures and tables with their names and sentences, and what a table is in other forms."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from imbvlm.csv_cells import csv_line, escape_cell
from imbvlm.sweep.report.svg import NUM_COLOURS, Drawing

WIDTH, HEIGHT = 460.0, 310.0
# Where a plot begins, below its legend and the name of its upright axis.
TOP = 50.0


# One color for one thing on the whole page. A baseline has its method's; the other methods take those that are left.
WINNER_COLOUR = "c0"
METHOD_COLOURS = {"linear_probe": "c1", "zero_shot": "c2"}


def method_colour(method: str, methods: Sequence[str]) -> str:
    """The color of a method among those of a page."""
    others = sorted(set(methods) - METHOD_COLOURS.keys())
    first = len(METHOD_COLOURS) + 1
    return METHOD_COLOURS.get(method) or f"c{first + others.index(method) % (NUM_COLOURS - first)}"


@dataclass(frozen=True)
class Figure:
    """A drawing with its file's name, heading and caption; `wide` takes the page's whole width.

    `data` are the numbers that it is drawn from, a row of headings first.
    """

    name: str
    title: str
    caption: str
    drawing: Drawing
    data: Sequence[Sequence[object]]
    wide: bool = False

    def csv(self) -> str:
        """Its numbers as CSV: accuracies and shares as fractions."""
        return "".join(csv_line(map(_figure_cell, row)) for row in self.data)


@dataclass(frozen=True)
class Table:
    """Cells as words; columns from `first_number` on are numbers."""

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
        """A number, or the dash of an absent one, stays as it is; a text mustn't become a formula."""
        is_number = cell == "-" or (column >= self.first_number and _NUMBER.fullmatch(cell))
        return cell if is_number else escape_cell(cell)

    def latex(self) -> str:
        """The table in the papers' form, for booktabs."""
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
