"""CSV that a spreadsheet doesn't run: text that begins as a formula does is written with an apostrophe in front."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

# What OWASP lists under "CSV injection". Apostrophes before it count, so that reading back gives every text again.
_FORMULA = r"'*[=+\-@\t\r\n]"
# Of RE2, too, which Arrow has: replaced by its group, an escaped cell is the text again.
ESCAPED = rf"^'({_FORMULA})"
# Python quotes the letters of its line's end alone: with \n for one, a cell that has \r would be two rows.
_END = "\r\n"


def escape_cell(text: str) -> str:
    """A text cell as it is written to CSV: with an apostrophe in front where it begins as a formula does."""
    return f"'{text}" if re.match(_FORMULA, text) else text


def unescape_cell(cell: str) -> str:
    """The text that `escape_cell` was given."""
    return re.sub(ESCAPED, r"\1", cell)


def csv_line(cells: Iterable[object]) -> str:
    """One row with the end of its line; text cells are to be escaped before."""
    line = io.StringIO()
    csv.writer(line, lineterminator=_END).writerow(cells)
    return f"{line.getvalue().removesuffix(_END)}\n"
