"""What the user sees while a sweep runs; Ray's, Optuna's and the libraries' own chatter goes to a file."""

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

# On a terminal it is drawn anew at most so often; in a log file a line is written, later on less often; in CI hardly.
REDRAW_SECONDS = 0.1
LOG_SECONDS = ((0.0, 15.0), (300.0, 60.0), (3600.0, 300.0))
CI_SECONDS = 300.0
LABEL_WIDTH = 8
# What is too long for a row of a narrow terminal goes on in the next, as far as this.
MAX_ROWS = 3
BOLD, RED, PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[0m"


class Console:
    """Sentences and one live view: redrawn on a terminal, a line now and then in a log file or CI.

    Colours are for terminals without NO_COLOR; a dumb terminal is written to as a log file is.
    """

    def __init__(self, stream: TextIO | None = None, environment: Mapping[str, str] = os.environ) -> None:
        self._stream = stream or sys.stdout
        self._redraws = self._stream.isatty() and environment.get("TERM") != "dumb"
        self._has_colours = self._redraws and not environment.get("NO_COLOR")
        self._is_ci = environment.get("CI", "").lower() not in ("", "0", "false")
        self._num_live_lines = 0
        self._terminals, self._is_gone = [one for one in (1, 2) if os.isatty(one)], False
        self._started, self._drawn_at = time.monotonic(), -math.inf
        self._copy: Path | None = None
        self._copied_at = -math.inf

    def copy_to(self, path: Path) -> None:
        """Write what is said, and the live view now and then, into a file as well."""
        _make_parent(path)
        self._copy = path

    def print(self, text: str = "") -> None:
        """Print lines that stay."""
        text = printable(text, keep=LINE_BREAKS)
        self._clear()
        self._write(f"{text}\n")
        self._write_copy(text)

    def last_word(self, fix: str) -> LastWord:
        """How the sentence is said with which this process may end, where it can't say it itself."""
        try:
            descriptor = self._stream.fileno()
        except OSError:
            descriptor = subprocess.DEVNULL
        return LastWord(fix, descriptor, str(self._copy or os.devnull), "\n" if self._redraws else "")

    def update_live(self, text: str | Mapping[str, str]) -> None:
        """Replace the live view by a line, or by several under their labels."""
        if not self.is_due:
            return
        self._drawn_at = time.monotonic()
        in_one = text if isinstance(text, str) else "; ".join(f"{label}: {one}" for label, one in text.items())
        if not self._redraws:
            self.print(in_one)
            return
        if self._drawn_at - self._copied_at >= self._log_pause:
            self._copied_at = self._drawn_at
            self._write_copy(in_one)
        self._clear()
        lines = {"": text} if isinstance(text, str) else text
        lines = {label: printable(one) for label, one in lines.items()}
        columns, rows = self._size()
        drawn = [row for label, one in lines.items() for row in self._rows(label, one, columns - 1)]
        # What has scrolled away couldn't be taken away again.
        drawn = drawn[: max(1, rows - 1)]
        # The cursor stays behind the last line, so that what is said next begins where the view did.
        self._write("\n".join(drawn))
        self._num_live_lines = len(drawn)

    def end_live(self) -> None:
        """Take the live view away and go on in its place; the next is drawn at once."""
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
        """Rows of the view that the terminal needn't wrap: what it wraps couldn't be taken away again."""
        head = f"{label:<{LABEL_WIDTH}}" if label else ""
        room = max(10, width - len(head))
        first, *more = textwrap.wrap(text, room, max_lines=MAX_ROWS, placeholder="…") or [""]
        if self._has_colours and label:
            first = f"{RED if label == 'failed' else BOLD}{head}{PLAIN}{first}"
        else:
            first = head + first
        return [first, *(" " * len(head) + row for row in more)]

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # Its connection or window is gone, and the copy has what is said.
            self._redraws, self._is_gone = False, True
            _to_nowhere(self._stream.fileno())

    def _write_copy(self, text: str) -> None:
        # On a full disk the copy's lines are lost: what must be kept says so, and how to go on.
        if self._copy is not None:
            with suppress(OSError), self._copy.open("a", encoding="utf-8") as stream:
                stream.write(f"{text}\n")

    def _clear(self) -> None:
        if self._num_live_lines:
            up = f"\x1b[{self._num_live_lines - 1}A" if self._num_live_lines > 1 else ""
            self._write(f"\r{up}\x1b[J")
            self._num_live_lines = 0

    def _size(self) -> tuple[int, int]:
        """Columns and rows by now: a terminal may have become another size."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns = rows = 0
        # One that nobody has told its size says 0.
        return columns or 100, rows or 24

    @contextmanager
    def redirect_output(self, log: Path | None) -> Iterator[None]:
        """Send what else this process and its libraries print to a file; `print` and `update_live` go on to the user.

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
                _to_nowhere(*self._terminals)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage.storage_error("write", str(path), error) from None


def _to_nowhere(*descriptors: int) -> None:
    """What couldn't be written is written again as this process ends, which would end it as a failure."""
    with open(os.devnull, "wb") as nowhere:
        for one in descriptors:
            os.dup2(nowhere.fileno(), one)


@dataclass(frozen=True)
class LastWord:
    """How this process's last sentence is said: what it tells to do, to which descriptor, and a file that has it too.

    `before` is printed first, as where a live view has left the cursor at the end of its line.
    """

    fix: str = "type the command again"
    descriptor: int = 2
    copy: str = os.devnull
    before: str = ""

    def text(self, sentence: str) -> str:
        return f"imbvlm: {sentence}; then {self.fix}"
