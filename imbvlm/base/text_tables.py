"""Tables as text, with columns as wide as a terminal allows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console, JustifyMethod, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from imbvlm.base.errors import printable

NUMBER = re.compile(r"[-+.± ]*\d[-+.±\d ]*|-?")
# Columns of a file, whose lines have no limit.
UNLIMITED = 100_000


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = UNLIMITED) -> str:
    """A table of untrusted cells: words aligned to the left, numbers to the right.

    Cells are wrapped at their words where `width` columns of a terminal are too few. Each row becomes a list of labels
    and texts if the columns of words are too few as well.
    """
    grid = _grid(header, rows, 2)
    if _width(grid).maximum > width:
        # Rows of several lines need gaps between them.
        grid = _grid(header, [cells for row in rows for cells in (row, [""] * len(header))][:-1], 1)
    if _width(grid).minimum > width:
        return "\n\n".join(labeled(list(zip(header, row, strict=True)), width) for row in rows)
    return _text(grid, width)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]], gap: int) -> Table:
    grid = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)
    for name, *cells in zip(header, *rows, strict=True):
        justify: JustifyMethod = "right" if all(map(NUMBER.fullmatch, cells)) else "left"
        # Paths and ids stay whole as long as there are words to wrap.
        is_wrapped = any(" " in cell for cell in cells)
        grid.add_column(Text(name), justify=justify, no_wrap=not is_wrapped, overflow="fold")
    grid.add_row(*(Rule(characters="-") for _ in header))
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    return grid


def _width(grid: Table) -> Measurement:
    return _console(UNLIMITED).measure(grid)


def labeled(rows: Sequence[tuple[str, str]], width: int = UNLIMITED) -> str:
    """Indented lines of a label and a text, each wrapped below its own beginning; without a text it's left out."""
    rows = [row for row in rows if row[1]]
    return _text(Padding.indent(label_grid(rows, min_width=10), 2), width)


def label_grid(rows: Sequence[tuple[str, str]], min_width: int, max_cells: int = UNLIMITED) -> Table:
    """A row for each label and its text, of which terminals show `max_cells` cells at most."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=min_width, overflow="fold")
    for label, text in rows:
        shown = Text(printable(text), overflow="fold")
        shown.truncate(max_cells, overflow="ellipsis")
        grid.add_row(Text(printable(label), style="red" if label == "failed" else "bold"), shown)
    return grid


def _console(width: int) -> Console:
    return Console(width=width, color_system=None, force_jupyter=False)


def _text(grid: RenderableType, width: int) -> str:
    console = _console(width)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
