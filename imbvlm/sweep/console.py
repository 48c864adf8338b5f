"""What the user sees while a sweep runs; Ray's, Optuna's and the libraries' own chatter goes to a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LIVE_SECONDS_IN_A_LOG = 15.0


class Console:
    """Sentences and one live line; in a log file or CI the live line is printed only now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._live = ""
        self._last_logged = 0.0
        self._copy: Path | None = None
        self._last_copied = 0.0

    def copy_to(self, path: Path) -> None:
        """Write what is said, and the live line now and then, into a file as well."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._copy = path

    def say(self, text: str = "") -> None:
        """Print lines that stay."""
        self._clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()
        self._write_copy(text)

    def live(self, text: str) -> None:
        """Replace the live line."""
        if self._is_terminal:
            self._clear()
            self._live = text[: max(20, self._columns() - 1)]
            self._stream.write(self._live)
            self._stream.flush()
            if time.monotonic() - self._last_copied >= LIVE_SECONDS_IN_A_LOG:
                self._last_copied = time.monotonic()
                self._write_copy(text)
        elif time.monotonic() - self._last_logged >= LIVE_SECONDS_IN_A_LOG:
            self._last_logged = time.monotonic()
            self.say(text)

    def end_live(self) -> None:
        """Leave the live line and go on below it."""
        self._clear()

    def _write_copy(self, text: str) -> None:
        if self._copy is not None:
            with self._copy.open("a", encoding="utf-8") as stream:
                stream.write(f"{text}\n")

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K")
            self._live = ""

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            return 100

    @contextmanager
    def others_to(self, log: Path | None) -> Iterator[None]:
        """Send what else this process and its libraries print to a file; `say` and `live` go on to the user."""
        if log is None:
            yield
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        saved_out, saved_err, ours = os.dup(1), os.dup(2), self._stream
        with open(log, "ab") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        if ours is sys.stdout:
            self._stream = os.fdopen(os.dup(saved_out), "w", buffering=1, encoding="utf-8")
        try:
            yield
        finally:
            self._clear()
            sys.stdout.flush()
            sys.stderr.flush()
            if self._stream is not ours:
                self._stream.close()
                self._stream = ours
            os.dup2(saved_out, 1)
            os.dup2(saved_err, 2)
            os.close(saved_out)
            os.close(saved_err)


def duration(seconds: float) -> str:
    """Such as `42 s`, `3 min 5 s` or `2 h 10 min`."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one digit, or a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned: words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        return "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(cells, widths, numeric, strict=True)
        ).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _is_number(text: str) -> bool:
    return (
        text == "-"
        or text.replace(".", "").replace("-", "").replace("+", "").replace("±", "").replace(" ", "").isdigit()
    )
