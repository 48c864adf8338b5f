"""CSV that a spreadsheet doesn't execute: text that looks like a formula is written with a leading apostrophe."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

# OWASP's list under "CSV injection". Leading apostrophes count too, so that every text is read back unchanged.
_FORMULA = r"'*[=+\-@\t\r\n]"
# Valid for Arrow's RE2, too. Replacing the match by its group unescapes a cell.
ESCAPED = rf"^'({_FORMULA})"
# csv quotes cells with the characters of its line terminator: with \n alone, a cell with \r would become two rows.
_END = "\r\n"


def escape_cell(text: str) -> str:
    """A text cell for CSV, with a leading apostrophe where the text looks like a formula."""
    return f"'{text}" if re.match(_FORMULA, text) else text


def unescape_cell(cell: str) -> str:
    """The text that `escape_cell` was given."""
    return re.sub(ESCAPED, r"\1", cell)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV, text cells escaped."""
    return "".join(csv_line(escape_cell(cell) if isinstance(cell, str) else cell for cell in row) for row in rows)


def read_rows(text: str) -> list[list[str]]:
    """The rows of `csv_text`, its texts unescaped."""
    return [[unescape_cell(cell) for cell in row] for row in csv.reader(io.StringIO(text, newline=""))]


def csv_line(cells: Iterable[object]) -> str:
    """One row with its line break; the caller escapes text cells."""
    line = io.StringIO()
    csv.writer(line, lineterminator=_END).writerow(cells)
    return f"{line.getvalue().removesuffix(_END)}\n"
