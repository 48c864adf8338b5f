"""A running command shows one view on a terminal of any size, and writes quiet logs."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pty_screen import ClippingScreen, PtyScreen, RewrappingScreen

from imbvlm.base import console as console_file
from imbvlm.base.console import Console

VIEW = {
    "trials": "22 of 30 done (15 to their end, 5 stopped early, 1 failed, 1 lost), 1 running, 1 paused",
    "best": "t00013 balanced 74.5 (overall 79.5, few 54.5), decoder depth 2, lr 0.0312; +24.5 points to linear probe",
    "left": "about 5 min 3 s",
    "failed": "t00021: the loss wasn't finite; t00022: its worker was lost",
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's, without what a shell or CI may have set."""
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


# --------------------------------------------------------------------------------------------- on a terminal

WORD = st.text("abcde", min_size=1, max_size=9)
# At 24 columns a view shows 48 letters of a text.
WORDS = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
VIEWS = st.one_of(WORDS, st.dictionaries(st.sampled_from(["trials", "best", "failed"]), WORDS, min_size=1))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("print"), WORD),
        st.tuples(st.just("view"), VIEWS),
        st.tuples(st.just("resize"), st.tuples(st.integers(24, 120), st.integers(16, 24))),
    ),
    max_size=8,
)


@pytest.mark.parametrize("screen", [ClippingScreen, RewrappingScreen])
@settings(deadline=None, max_examples=15)
@given(STEPS)
def test_sentences_stay_and_only_the_last_view_is_there_however_the_terminal_is_resized(
    screen: type[pyte.Screen], steps: list[tuple[str, Any]]
) -> None:
    with PtyScreen(80, 20, screen) as terminal:
        check_steps(terminal, steps)


def check_steps(terminal: PtyScreen, steps: list[tuple[str, Any]]) -> None:
    console, sentences = Console(terminal.stream), list[str]()
    view: str | dict[str, str] = "the first one"
    for kind, value in (*steps, ("view", "the last one")):
        if kind == "print":
            console.print(value)
            sentences.append(value)
            continue
        if kind == "resize":
            terminal.resize(*value)
        else:
            view = value
        console._drawn_at = -1e9
        console.update_live(view)
        shown = view if isinstance(view, str) else " ".join(itertools.chain(*view.items()))
        rows = terminal.rows
        above = next(index for index in range(len(rows) + 1) if " ".join(" ".join(rows[index:]).split()) == shown)
        assert rows[:above] == (sentences[-above:] if above else [])
        assert above >= min(len(sentences), 5)
    console.end_live()
    rows = terminal.rows
    assert rows == [*sentences[len(sentences) - len(rows) + 1 :], ""]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_view_uses_the_columns_that_there_are_and_wraps_below_its_labels(columns: int) -> None:
    with PtyScreen(columns, 24) as terminal:
        Console(terminal.stream).update_live(VIEW)
        rows = terminal.rows
    assert all(row[:8].strip() in (*VIEW, "") for row in rows)
    assert len(rows) == {40: 10, 80: 6, 200: 4}[columns]
    if columns > 40:
        assert " ".join(rows).split() == " ".join(itertools.chain(*VIEW.items())).split()


def test_a_long_failure_leaves_room_for_the_rest_and_a_low_terminal_shows_what_fits() -> None:
    with PtyScreen(80, 30) as terminal:
        Console(terminal.stream).update_live({"failed": "x" * 2000, "left": "about 5 min"})
        assert terminal.rows[-1] == "left    about 5 min"
        assert len(terminal.rows) <= 1 + console_file.MAX_ROWS
    with PtyScreen(80, 6) as terminal:
        console = Console(terminal.stream)
        console.update_live("features: 10 of 20 images")
        assert terminal.rows == ["features: 10 of 20 images"]
        console.end_live()
        console.print("a sentence")
        console.update_live({**VIEW, "failed": "x" * 2000})
        assert terminal.rows[0].startswith("trials  22 of 30")
        console.end_live()
        assert terminal.rows == [""]


def test_the_cursor_stays_visible_since_a_killed_process_cannot_show_it_again() -> None:
    with PtyScreen(80, 24) as terminal:
        Console(terminal.stream).update_live(VIEW)
        assert terminal.rows
        assert not terminal.screen.cursor.hidden


@pytest.mark.parametrize(
    ("name", "value", "has_colors", "redraws"),
    [("CI", "", True, True), ("NO_COLOR", "1", False, True), ("TERM", "dumb", False, False)],
)
def test_colors_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, has_colors: bool, redraws: bool
) -> None:
    monkeypatch.setenv(name, value)
    with PtyScreen(80, 24) as terminal:
        console = Console(terminal.stream)
        console.update_live({"trials": "1 of 2", "failed": "t1"})
        console.print("done")
        terminal.read()
    # Those who set NO_COLOR see no bold labels, either.
    assert (re.findall(rb"\x1b\[\d+m", terminal.written) != []) == has_colors
    assert (b"\x1b[31m" in terminal.written) == has_colors
    assert (b"\x1b" in terminal.written) == redraws
    if not redraws:
        assert terminal.written == b"trials: 1 of 2; failed: t1\r\ndone\r\n"


def test_names_with_control_characters_neither_move_the_cursor_nor_forge_lines() -> None:
    with PtyScreen(80, 24) as terminal:
        console = Console(terminal.stream)
        console.update_live({"best": "cat\x1b[2J\nfailed  all of it\r", "failed": "\x9b31mred\x07"})
        assert terminal.rows == [r"best    cat\x1b[2J\nfailed  all of it\r", r"failed  \x9b31mred\x07"]
        console.print("dog\x1b]0;title\x07 [bold]not markup[/bold] :smile:")
        assert terminal.rows[0] == r"dog\x1b]0;title\x07 [bold]not markup[/bold] :smile:"


def test_letters_of_two_columns_are_measured_as_such() -> None:
    with PtyScreen(40, 24) as terminal:
        console = Console(terminal.stream)
        console.update_live({"best": "猫" * 30, "left": "about 5 min"})
        assert terminal.rows[-1] == "left    about 5 min"
        console.end_live()
        assert terminal.rows == [""]


# ------------------------------------------------------------------------------------------ in a file and in CI


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "20"}])
def test_a_file_gets_whole_lines_without_escapes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    long = "a sentence  with two spaces" * 10
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        console = Console(stream)
        console.print(long)
        console.update_live(VIEW)
    joined = "; ".join(f"{label}: {line}" for label, line in VIEW.items())
    assert (tmp_path / "log").read_text().splitlines() == [long, joined]


@pytest.mark.parametrize(("ci", "num_lines"), [("", 3), ("false", 3), ("true", 1)])
def test_a_log_file_gets_a_line_now_and_then_and_ci_hardly_any(
    monkeypatch: pytest.MonkeyPatch, ci: str, num_lines: int
) -> None:
    monkeypatch.setenv("CI", ci)
    stream, clock = io.StringIO(), time.monotonic()
    monkeypatch.setattr(console_file.time, "monotonic", lambda: clock)
    console = Console(stream)
    for second in range(40):
        clock += 1.0
        console.update_live({"trials": f"{second} of 40", "best": "t1"})
    lines = stream.getvalue().splitlines()
    assert len(lines) == num_lines
    assert lines[0] == "trials: 0 of 40; best: t1"


def test_a_long_sweep_does_not_fill_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), time.monotonic()
    monkeypatch.setattr(console_file.time, "monotonic", lambda: clock)
    console = Console(stream)
    for _ in range(12 * 3600 // 5):
        clock += 5.0
        console.update_live("line")
    assert stream.getvalue().count("\n") < 250


# ------------------------------------------------------------------------------------- when the terminal is gone


def terminal_and_end() -> tuple[TextIO, int]:
    controller, descriptor = pty.openpty()
    return os.fdopen(descriptor, "w"), controller


def pipe_and_end() -> tuple[TextIO, int]:
    reader, writer = os.pipe()
    return os.fdopen(writer, "w"), reader


@pytest.mark.parametrize("make", [terminal_and_end, pipe_and_end])
def test_when_the_terminal_or_the_reader_is_gone_the_sweep_goes_on_and_the_log_has_what_is_said(
    tmp_path: Path, make: Callable[[], tuple[TextIO, int]]
) -> None:
    stream, end = make()
    with stream:
        console = Console(stream)
        console.copy_to(tmp_path / "progress.log")
        console.update_live({"trials": "1 of 2 done"})
        os.close(end)
        console.print("2 of 2 done")
        console.update_live("nobody sees it")
        console.end_live()
        stream.write("nor this")
    assert "2 of 2 done" in (tmp_path / "progress.log").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_where_the_log_has_no_room_the_user_is_told_all_the_same(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(stream)
    (tmp_path / "progress.log").symlink_to("/dev/full")
    console.copy_to(tmp_path / "progress.log")
    console.print("1 of 2 done")
    assert stream.getvalue() == "1 of 2 done\n"


# ------------------------------------------------------------------------------------------- others' output


def test_libraries_write_to_the_log_and_sentences_to_the_user(tmp_path: Path) -> None:
    code = """
import os, subprocess, sys
from pathlib import Path
from typing import Any, TextIO
from imbvlm.base.console import Console
console = Console()
with console.redirect_output(Path("deep/others.log")):
    print("chatter")
    print("more chatter", file=sys.stderr)
    subprocess.run(["echo", "of another process"])
    console.print("a sentence")
console.print("another")
print("and print is back")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "a sentence\nanother\nand print is back\n"
    assert done.stderr == ""
    log = (tmp_path / "deep" / "others.log").read_text()
    assert sorted(log.splitlines()) == ["chatter", "more chatter", "of another process"]


def test_a_stream_of_ones_own_stays_ones_own(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(stream)
    with console.redirect_output(tmp_path / "others.log"):
        console.print("inside")
    console.print("outside")
    assert stream.getvalue() == "inside\noutside\n"


@pytest.mark.parametrize("log", ["None", "Path('others.log')"])
def test_an_error_or_an_interrupt_erases_the_view_and_the_terminal_keeps_its_size_while_output_is_redirected(
    tmp_path: Path, log: str
) -> None:
    """Without a log, as for a storage in S3, the view stayed there."""
    code = f"""
    import signal
    from pathlib import Path
    from imbvlm.base.console import Console
    console = Console()
    console.print("a sentence")
    try:
        with console.redirect_output({log}):
            console.update_live({VIEW!r})
            input()
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted")
    """
    with PtyScreen(200, 24) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, stdin=subprocess.PIPE,
            stdout=terminal.descriptor, stderr=terminal.descriptor,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while len(terminal.rows) < 1 + len(VIEW) and time.monotonic() < deadline:
            terminal.read(0.1)
        assert terminal.rows == ["a sentence", *(f"{label:<8}{line}" for label, line in VIEW.items())]
        process.communicate(b"\n", timeout=60)
        assert terminal.rows == ["a sentence", "interrupted", ""]
    assert process.returncode == 0
