"""The parts of a report: figures and tables with their names and sentences, and what a table is in other forms."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from imbvlm.sweep.report.svg import Drawing

WIDTH, HEIGHT = 460.0, 310.0
# Where a plot begins, below its legend and the name of its upright axis.
TOP = 50.0


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
        return _csv([[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in self.data])


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
        return _csv([self.header, *self.rows])

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


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "±": "$\\pm$",
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
}


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in cell)
