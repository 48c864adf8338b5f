"""The user's view of a running sweep; the output of Ray, Optuna and other libraries goes to a file."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions
from rich.control import Control
from rich.live_render import LiveRender
from rich.segment import ControlType
from rich.text import Text

from imbvlm.base import storage
from imbvlm.base.errors import LINE_BREAKS, printable
from imbvlm.base.text_tables import UNLIMITED, label_grid

# Pauses between live views: on a terminal, in a log file from so many seconds on, and in CI.
REDRAW_SECONDS = 0.25
LOG_SECONDS = ((0.0, 15.0), (300.0, 60.0), (3600.0, 300.0))
CI_SECONDS = 300.0
LABEL_WIDTH = 6
# Rows of a narrow terminal over which a long text is wrapped.
MAX_ROWS = 3
# The last lines, which are printed again when a terminal is resized.
MAX_RECENT = 200


class Console:
    """Prints sentences and one live view, which is redrawn on a terminal and printed at intervals in a log file or CI.

    Colors are for terminals without NO_COLOR; a dumb terminal counts as a log file.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        # It renders into a string: rich ends the process where a stream has lost its reader, and a sweep goes on.
        self._rich = RichConsole(
            file=io.StringIO(), force_terminal=self._stream.isatty(), force_jupyter=False,
            color_system=None if os.environ.get("NO_COLOR") else "auto",
        )  # fmt: skip
        self._redraws = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._is_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        # Not a `Live`, which hides the cursor: a process that is killed couldn't show it again.
        self._view: LiveRender | None = None
        self._lock = threading.RLock()
        self._recent: deque[str] = deque(maxlen=MAX_RECENT)
        self._terminals, self._is_gone = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)], False
        self._started, self._drawn_at = time.monotonic(), -math.inf
        self._copy: Path | None = None
        self._copied_at = -math.inf

    def copy_to(self, path: Path) -> None:
        """Also write all text, and the live view at intervals, to a file."""
        _open(path).close()
        self._copy = path

    def print(self, text: str = "") -> None:
        """Print lines that stay."""
        text = printable(text, keep=LINE_BREAKS)
        with self._screen():
            self._rich.out(text, highlight=False)
        self._recent.extend(text.split("\n"))
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
        lines = {"": text} if isinstance(text, str) else text
        joined = printable("; ".join(f"{label}: {line}" if label else line for label, line in lines.items()))
        if not self._redraws:
            self.print(joined)
            return
        if self._drawn_at - self._copied_at >= self._log_pause:
            self._copied_at = self._drawn_at
            self._write_copy(joined)
        max_cells = MAX_ROWS * max(1, self.width - LABEL_WIDTH - 2)
        grid = label_grid(list(lines.items()), LABEL_WIDTH, max_cells) if any(lines) else Text(joined, overflow="fold")
        with self._screen():
            self._view = self._view or LiveRender("")
            self._view.set_renderable(grid)

    def end_live(self) -> None:
        """Erase the live view; the next is drawn at once."""
        with self._screen():
            self._view = None
        self._drawn_at = -math.inf if self._redraws else self._drawn_at

    @property
    def is_due(self) -> bool:
        """Whether a live view would be shown by now."""
        pause = REDRAW_SECONDS if self._redraws else CI_SECONDS if self._is_ci else self._log_pause
        return time.monotonic() - self._drawn_at >= pause

    @property
    def width(self) -> int:
        """Columns of the terminal; UNLIMITED for a file."""
        return self._size().width if self._stream.isatty() else UNLIMITED

    @property
    def _log_pause(self) -> float:
        since_start = time.monotonic() - self._started
        return next(pause for since, pause in reversed(LOG_SECONDS) if since_start >= since)

    @contextmanager
    def _screen(self) -> Iterator[None]:
        """Within, rich renders for this console's stream; the view fits the terminal, which the user may resize.

        Some terminals then wrap long rows again or show rows of the scrollback, and others cut rows off. In all of them
        rich no longer knows where its view begins: every row is erased, and the last sentences are printed again. Rows
        that are erased one by one don't reach the scrollback, unlike those of a cleared screen.
        """
        size = self._size()
        with self._lock:
            with self._rich.capture() as captured:
                if self._view is not None and size != self._rich.size:
                    erased = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_DOWN, 1)) * size.height
                    self._rich.control(Control(ControlType.HOME, *erased, ControlType.HOME))
                    for sentence in list(self._recent)[-(size.height // 2) :]:
                        self._rich.out(sentence, highlight=False)
                elif self._view is not None:
                    self._rich.control(self._view.position_cursor())
                self._rich.size = size
                yield
                if self._view is not None:
                    self._rich.print(self._view, end="")
            self._write(captured.get())

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

    def _size(self) -> ConsoleDimensions:
        columns = rows = 0
        with suppress(OSError):
            columns, rows = os.get_terminal_size(self._stream.fileno())
        # A terminal whose size nobody has set reports 0.
        return ConsoleDimensions(columns or 80, rows or 24)

    @contextmanager
    def redirect_output(self, log: Path | None) -> Iterator[None]:
        """Redirect the output of this process and its libraries to a file; this console's own still reaches the user.

        At the end the live view is erased. Raises StorageError where the file can't be written.
        """
        with ExitStack() as at_end:
            if log is not None:
                at_end.enter_context(self._output_to(log))
            at_end.callback(self.end_live)
            yield

    @contextmanager
    def _output_to(self, log: Path) -> Iterator[None]:
        sink = _open(log)
        sys.stdout.flush()
        sys.stderr.flush()
        saved, ours = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}, self._stream
        with sink:
            for descriptor in saved:
                os.dup2(sink.fileno(), descriptor)
        if ours is sys.stdout:
            self._stream = os.fdopen(os.dup(saved[1]), "w", buffering=1, encoding="utf-8")
        token = LAST_WORD.set(LastWord(descriptor=saved[2], before="\n" if self._redraws else ""))
        try:
            yield
        finally:
            LAST_WORD.reset(token)
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            if self._stream is not ours:
                self._stream.close()
                self._stream = ours
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor)
                os.close(copy)
            if self._is_gone:
                _discard_output(*self._terminals)


def _open(log: Path) -> BinaryIO:
    """Open a file to append to it, and make its folder."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return open(log, "ab")
    except OSError as error:
        raise storage.storage_error("write", str(log), error) from None


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


# On standard error, also while the output of libraries is redirected to a file.
LAST_WORD: ContextVar[LastWord] = ContextVar("LAST_WORD", default=LastWord())  # noqa: B039
