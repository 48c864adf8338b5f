"""The user's view of a running sweep; the output of Ray, Optuna and other libraries goes to a file."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from imbvlm.base import storage
from imbvlm.base.errors import LINE_BREAKS, printable

# Pauses between live views: on a terminal, in a log file from so many seconds on, and in CI.
REDRAW_SECONDS = 0.1
LOG_SECONDS = ((0.0, 15.0), (300.0, 60.0), (3600.0, 300.0))
CI_SECONDS = 300.0
LABEL_WIDTH = 8
# Rows of a narrow terminal over which a long text is wrapped.
MAX_ROWS = 3
BOLD, RED, PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[0m"


class Console:
    """Prints sentences and one live view, which is redrawn on a terminal and printed at intervals in a log file or CI.

    Colors are for terminals without NO_COLOR; a dumb terminal counts as a log file.
    """

    def __init__(self, stream: TextIO | None = None, environment: Mapping[str, str] = os.environ) -> None:
        self._stream = stream or sys.stdout
        self._redraws = self._stream.isatty() and environment.get("TERM") != "dumb"
        self._has_colors = self._redraws and not environment.get("NO_COLOR")
        self._is_ci = environment.get("CI", "").lower() not in ("", "0", "false")
        self._num_live_lines = 0
        self._terminals, self._is_gone = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)], False
        self._started, self._drawn_at = time.monotonic(), -math.inf
        self._copy: Path | None = None
        self._copied_at = -math.inf

    def copy_to(self, path: Path) -> None:
        """Also write all text, and the live view at intervals, to a file."""
        _make_parent(path)
        self._copy = path

    def print(self, text: str = "") -> None:
        """Print lines that stay."""
        text = printable(text, keep=LINE_BREAKS)
        self._clear()
        self._write(f"{text}\n")
        self._write_copy(text)

    def last_word(self, fix: str) -> LastWord:
        """The settings with which another process prints this one's last sentence, if this one can't."""
        try:
            descriptor = self._stream.fileno()
        except OSError:
            descriptor = subprocess.DEVNULL
        return LastWord(fix, descriptor, str(self._copy or os.devnull), "\n" if self._redraws else "")

    def update_live(self, text: str | Mapping[str, str]) -> None:
        """Replace the live view by a line, or by one line for each label."""
        if not self.is_due:
            return
        self._drawn_at = time.monotonic()
        joined = text if isinstance(text, str) else "; ".join(f"{label}: {line}" for label, line in text.items())
        if not self._redraws:
            self.print(joined)
            return
        if self._drawn_at - self._copied_at >= self._log_pause:
            self._copied_at = self._drawn_at
            self._write_copy(joined)
        self._clear()
        lines = {"": text} if isinstance(text, str) else text
        columns, num_rows = self._size()
        rows = [row for label, line in lines.items() for row in self._rows(label, printable(line), columns - 1)]
        # Rows that have scrolled away can't be erased.
        rows = rows[: max(1, num_rows - 1)]
        # The cursor stays behind the last row, so that the next text begins where the view did.
        self._write("\n".join(rows))
        self._num_live_lines = len(rows)

    def end_live(self) -> None:
        """Erase the live view; the next is drawn at once."""
        self._clear()
        self._drawn_at = -math.inf if self._redraws else self._drawn_at

    @property
    def is_due(self) -> bool:
        """Whether a live view would be shown by now."""
        pause = REDRAW_SECONDS if self._redraws else CI_SECONDS if self._is_ci else self._log_pause
        return time.monotonic() - self._drawn_at >= pause

    @property
    def _log_pause(self) -> float:
        since_start = time.monotonic() - self._started
        return next(pause for since, pause in reversed(LOG_SECONDS) if since_start >= since)

    def _rows(self, label: str, text: str, width: int) -> list[str]:
        """Rows of the view, wrapped here: rows that the terminal wraps can't be erased."""
        head = f"{label:<{LABEL_WIDTH}}" if label else ""
        first, *more = textwrap.wrap(text, max(10, width - len(head)), max_lines=MAX_ROWS, placeholder="…") or [""]
        if self._has_colors and label:
            first = f"{RED if label == 'failed' else BOLD}{head}{PLAIN}{first}"
        else:
            first = head + first
        return [first, *(" " * len(head) + row for row in more)]

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # The connection or window is gone, and the copy has the text.
            self._redraws, self._is_gone = False, True
            _discard_output(self._stream.fileno())

    def _write_copy(self, text: str) -> None:
        # On a full disk the copy loses lines. Files that must be written raise errors with a fix.
        if self._copy is not None:
            with suppress(OSError), self._copy.open("a", encoding="utf-8") as stream:
                stream.write(f"{text}\n")

    def _clear(self) -> None:
        if self._num_live_lines:
            up = f"\x1b[{self._num_live_lines - 1}A" if self._num_live_lines > 1 else ""
            self._write(f"\r{up}\x1b[J")
            self._num_live_lines = 0

    def _size(self) -> tuple[int, int]:
        """Columns and rows of the terminal, which the user may resize."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns = rows = 0
        # A terminal whose size nobody has set reports 0.
        return columns or 100, rows or 24

    @contextmanager
    def redirect_output(self, log: Path | None) -> Iterator[None]:
        """Redirect the output of this process and its libraries to a file; this console's own still reaches the user.

        Raises StorageError where the file can't be written.
        """
        if log is None:
            yield
            return
        _make_parent(log)
        try:
            sink = open(log, "ab")  # noqa: SIM115
        except OSError as error:
            raise storage.storage_error("write", str(log), error) from None
        sys.stdout.flush()
        sys.stderr.flush()
        saved_out, saved_err, ours = os.dup(1), os.dup(2), self._stream
        with sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        if ours is sys.stdout:
            self._stream = os.fdopen(os.dup(saved_out), "w", buffering=1, encoding="utf-8")
        try:
            yield
        finally:
            self._clear()
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            if self._stream is not ours:
                self._stream.close()
                self._stream = ours
            os.dup2(saved_out, 1)
            os.dup2(saved_err, 2)
            os.close(saved_out)
            os.close(saved_err)
            if self._is_gone:
                _discard_output(*self._terminals)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage.storage_error("write", str(path), error) from None


def _discard_output(*descriptors: int) -> None:
    """Point descriptors to /dev/null: a flush at exit that fails would end the process with an error."""
    with open(os.devnull, "wb") as sink:
        for descriptor in descriptors:
            os.dup2(sink.fileno(), descriptor)


@dataclass(frozen=True)
class LastWord:
    """Settings to print this process's last sentence: the fix in it, the descriptor, and a file for a copy.

    `before` is printed first, such as a line break after a live view.
    """

    fix: str = "type the command again"
    descriptor: int = 2
    copy: str = os.devnull
    before: str = ""

    def text(self, sentence: str) -> str:
        """The whole line."""
        return f"imbvlm: {sentence}; then {self.fix}"
