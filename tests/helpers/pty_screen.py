"""A pseudo terminal whose size can be changed, and what it shows."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
from contextlib import suppress
from typing import TextIO

import pyte


class ClippingScreen(pyte.Screen):
    """Cuts rows off when it becomes smaller, as xterm does: those below the cursor first, then those at the top.

    A plain `pyte.Screen` cuts at the top, also where the rest is empty, and leaves the cursor where it was.
    """

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        cut = max(0, self.lines - (lines or self.lines))
        row, column, below = self.cursor.y, self.cursor.x, min(cut, self.lines - 1 - self.cursor.y)
        if below:
            self.cursor.y = 0
            self.insert_lines(below)
        super().resize(lines, columns)
        self.cursor.y, self.cursor.x = row - (cut - below), min(column, self.columns - 1)


class RewrappingScreen(pyte.Screen):
    """Wraps long rows again when its size changes, and moves rows into a scrollback and back.

    So do most terminals.
    """

    def __init__(self, columns: int, lines: int) -> None:
        super().__init__(columns, lines)
        self.scrollback: list[str] = []

    def index(self) -> None:
        if self.cursor.y == self.lines - 1:
            self.scrollback.append(self.display[0].rstrip())
        super().index()

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        width, height = columns or self.columns, lines or self.lines
        rows = [*self.scrollback, *(row.rstrip() for row in self.display[: self.cursor.y + 1])]
        pieces = [row[start : start + width] for row in rows for start in range(0, max(1, len(row)), width)]
        super().resize(height, width)
        self.erase_in_display(2)
        # The cursor stays in its row at best, with rows of the scrollback above.
        num_shown = min(height, len(pieces))
        self.scrollback = pieces[: len(pieces) - num_shown]
        for row, piece in enumerate(pieces[len(pieces) - num_shown :], 1):
            self.cursor_position(row, 1)
            self.draw(piece)


class PtyScreen:
    """A terminal with a program's side, `descriptor` and `stream`, and a screen that shows what is written to it."""

    def __init__(self, columns: int, lines: int, screen: type[pyte.Screen] = ClippingScreen) -> None:
        self.controller, self.descriptor = pty.openpty()
        self.stream: TextIO = os.fdopen(os.dup(self.descriptor), "w", encoding="utf-8")
        self.screen, self.written = screen(columns, lines), b""
        self._parser = pyte.ByteStream(self.screen)
        self._set_size(columns, lines)

    def __enter__(self) -> PtyScreen:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.stream.close()
        for descriptor in (self.controller, self.descriptor):
            # A test may have closed it.
            with suppress(OSError):
                os.close(descriptor)

    def resize(self, columns: int, lines: int) -> None:
        """Show all that was written so far, and change the size."""
        self.read()
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def read(self, timeout: float = 0.0) -> None:
        """Show what is written until nothing more comes within so many seconds."""
        while select.select([self.controller], [], [], timeout)[0]:
            try:
                written = os.read(self.controller, 65536)
            except OSError:
                # The program's side is closed.
                return
            self.written += written
            self._parser.feed(written)

    @property
    def rows(self) -> list[str]:
        """The rows down to the cursor, without spaces at their ends."""
        self.read()
        return [row.rstrip() for row in self.screen.display[: self.screen.cursor.y + 1]]

    def type(self, text: bytes) -> None:
        """Type on the terminal's keyboard."""
        os.write(self.controller, text)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
