"""What is seen while a sweep runs: the view's words, its redrawing on a terminal, and quiet in logs and CI."""

from __future__ import annotations

import codecs
import fcntl
import io
import itertools
import os
import pty
import random
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickstart_sweep import QUICKSTART
from sweep_folder import sweep_spec, write_sweep

from imbvlm.base import console as console_file
from imbvlm.base.console import Console
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.tune.live_status import ProgressSnapshot, live_lines, seconds_left

OBJECTIVE = "val/balanced_accuracy"


@pytest.fixture
def log(tmp_path: Path) -> TrialLog:
    """24 ended trials of 30, the last four changed: failed, lost, running, paused."""
    log = TrialLog.read(str(write_sweep(tmp_path / "a", [120, 60, 30, 12], refits=False)))
    records = log.of("search")
    states = {"failed": "the loss wasn't finite", "error": "its worker was lost", "running": "", "paused": ""}
    for record, (state, reason) in zip(records[-4:], states.items(), strict=True):
        record.state, record.stop_reason = state, reason
    records[-4].ended_at, records[-2].ended_at = 1e9 + 50, None
    records[-2].epochs[-1]["train/images_per_second"] = 1234.5
    return log


def test_the_view_has_states_the_best_with_its_groups_throughput_time_left_and_failures(log: TrialLog) -> None:
    lines = live_lines(log, OBJECTIVE, ProgressSnapshot("search", 30, 1e9 + 100, 100.0, "5 min 0 s of 1 h 0 min"))
    assert lines["trials"] == "22 of 30 done (15 to their end, 5 stopped early, 1 failed, 1 lost), 1 running, 1 paused"
    best = log.best(OBJECTIVE)[0]
    epoch = best.best_epoch(OBJECTIVE)
    assert lines["best"].startswith(
        f"{best.trial_id} balanced {100 * epoch[OBJECTIVE]:.1f} (overall {100 * epoch['val/top1_accuracy']:.1f}, "
        f"few {100 * epoch['val/few_shot_accuracy']:.1f}), "
    )
    assert lines["best"].endswith(f"{100 * (epoch[OBJECTIVE] - 0.5):+.1f} points to linear probe")
    assert lines["speed"].startswith("1,234 images a second, ")
    assert lines["used"] == "5 min 0 s of 1 h 0 min"
    log.of("search")[-2].epochs.clear()
    between = live_lines(log, OBJECTIVE, ProgressSnapshot("search", 30, 1e9 + 100, 100.0, ""))
    assert between["left"]
    assert "speed" not in between
    assert lines["failed"] == "t00021: the loss wasn't finite; t00022: its worker was lost"


def test_what_is_not_known_yet_is_not_shown(tmp_path: Path) -> None:
    (only,) = live_lines(TrialLog(str(tmp_path)), OBJECTIVE, ProgressSnapshot("search", 8, 1e9, 1.0, "")).items()
    assert only == ("trials", "0 of 8 done, 0 running")


def simulated(
    num_trials: int, num_processes: int, pack_size: int, stopped_share: float, order: int
) -> Iterator[tuple[float, TrialLog, ProgressSnapshot]]:
    """A search, moment by moment, with what is truly left: a trial has 12 epochs of 3 s, or of a pack's together 3 s.

    ASHA stops some after 4 epochs, from the first on.
    """
    chance, log, clock = random.Random(order), TrialLog("nowhere"), 1e9
    config = sweep_spec().trial({"method": "linear_probe", "loss.name": "focal", "optim.lr": 0.1}).to_tree()
    processes: list[list[TrialRecord]] = [[] for _ in range(num_processes)]
    moments, began, ids = [], clock, iter(range(num_trials))
    stopped = {ten + number for ten in range(0, num_trials, 10)
               for number in chance.sample(range(10), round(10 * stopped_share))}  # fmt: skip
    while True:
        for process in processes:
            if not process:
                numbers = [number for _, number in zip(range(pack_size), ids, strict=False)]
                for number in numbers:
                    pack = f"t{numbers[0]}" if len(numbers) > 1 else ""
                    process.append(TrialRecord(trial_id=f"t{number}", kind="search", config=config, started_at=clock,
                                               pack_size=len(numbers), pack=pack))  # fmt: skip
                log.records |= {record.trial_id: record for record in process}
        if not any(processes):
            break
        clock += 1.5
        for process in processes:
            for record in list(process):
                done = int((clock - record.started_at) / 3)
                record.epochs = [
                    {"epoch": float(epoch), "train/images_per_second": 900.0} for epoch in range(1, done + 1)
                ]
                if done == (4 if int(record.trial_id[1:]) in stopped else 12):
                    record.state, record.ended_at = ("stopped" if done == 4 else "finished"), clock
                    process.remove(record)
        moments.append((clock, log_copy(log), ProgressSnapshot("search", num_trials, clock, clock - began, "")))
    for now, then, moment in moments:
        yield clock - now, then, moment


def log_copy(log: TrialLog) -> TrialLog:
    copied = TrialLog(log.folder)
    copied.records = {key: record.model_copy() for key, record in log.records.items()}
    return copied


@pytest.mark.parametrize("pack_size", [1, 6])
@pytest.mark.parametrize("stopped_share", [0.0, 0.7])
def test_the_time_left_is_said_when_it_is_known_and_does_not_jump(pack_size: int, stopped_share: float) -> None:
    """It was 16 minutes at the first trial, and 3 a minute later."""
    for order in range(2):
        *moments, (_, _, end) = simulated(48 if pack_size == 1 else 120, 2, pack_size, stopped_share, order)
        # The last trials may be longer or shorter than most.
        early = [(left, log, moment) for left, log, moment in moments if left > 75]
        bounds = [seconds_left(log, log.of("search"), moment) for _, log, moment in early]
        first = next(index for index, bound in enumerate(bounds) if bound is not None)
        assert early[first][2].seconds < 0.3 * end.seconds
        known = [bound for bound in bounds[first:] if bound is not None]
        assert len(known) == len(bounds[first:])
        for (low, high), (left, _, _) in zip(known, early[first:], strict=True):
            assert low / 1.6 < left < 1.6 * high
        for before, after in itertools.pairwise(map(sum, known)):
            assert 0.67 < after / before < 1.5


def test_a_last_trial_that_outlasts_the_others_has_a_bound() -> None:
    """Ten were stopped after 12 s; it is at 14 s and has 5 of 12 epochs."""
    config = sweep_spec().trial({"method": "linear_probe", "loss.name": "focal", "optim.lr": 0.1}).to_tree()
    log = TrialLog("nowhere")
    for number in range(11):
        start, is_last = 1e9 + 12 * number, number == 10
        log.records[f"t{number}"] = TrialRecord(
            trial_id=f"t{number}", kind="search", state="running" if is_last else "stopped", config=config,
            epochs=[{"epoch": float(epoch)} for epoch in range(1, 6 if is_last else 5)],
            started_at=start, ended_at=None if is_last else start + 12,
        )  # fmt: skip
    assert live_lines(log, OBJECTIVE, ProgressSnapshot("search", 11, 1e9 + 134, 134.0, ""))["left"] == "up to 20 s"


def test_trials_of_a_pack_are_one_process_and_its_speed_counts_once() -> None:
    *_, (_, log, moment) = itertools.islice(simulated(48, 2, 24, 0.0, 0), 10)
    lines = live_lines(log, OBJECTIVE, moment)
    assert lines["trials"] == "0 of 48 done, 48 running in 2 processes"
    assert lines["speed"] == "1,800 images a second"


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


def screen(written: str) -> list[str]:
    """What a terminal shows of it: as much as the console uses of ECMA-48."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part.endswith("J") and part.startswith("\x1b"):
            lines = [*lines[:row], lines[row][:column]]
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


WORDS = st.text("abc ", min_size=1, max_size=150)
VIEW = st.one_of(WORDS, st.dictionaries(st.sampled_from(["trials", "best", "failed"]), WORDS, min_size=1))
STEPS = st.lists(st.tuples(st.sampled_from(["say", "live"]), WORDS, VIEW), max_size=12)


@settings(deadline=None, max_examples=60)
@given(STEPS)
def test_on_a_terminal_sentences_stay_and_only_the_last_view_is_there(
    steps: list[tuple[str, str, str | dict[str, str]]],
) -> None:
    stream = Terminal()
    made = Console(stream, {})
    said: list[str] = []
    shown = 0
    for what, sentence, view in steps:
        if what == "say":
            made.print(sentence)
            said.append(sentence)
            shown = 0
        else:
            made.end_live()  # so that the next is drawn at once
            made.update_live(view)
            shown = 1 if isinstance(view, str) else len(view)
    lines = screen(stream.getvalue())
    assert [line[:80] for line in lines[: len(said)]] == [line[:80] for line in said]
    assert max(1, shown) <= len(lines) - len(said) <= max(1, shown * console_file.MAX_ROWS)
    assert all(len(line) < 100 for line in lines[len(said) :])
    made.end_live()
    assert screen(stream.getvalue())[len(said) :] == [""]


@pytest.mark.parametrize(
    ("environment", "colours", "redraws"),
    [({}, True, True), ({"NO_COLOR": "1"}, False, True), ({"TERM": "dumb"}, False, False)],
)
def test_colours_are_for_terminals_that_want_them(environment: dict[str, str], colours: bool, redraws: bool) -> None:
    stream = Terminal()
    made = Console(stream, environment)
    made.update_live({"trials": "1 of 2", "failed": "t1"})
    assert ("\x1b[31m" in stream.getvalue()) == colours
    made.print("done")
    assert ("\x1b[J" in stream.getvalue()) == redraws


@pytest.mark.parametrize(("environment", "num_lines"), [({}, 3), ({"CI": "true"}, 1)])
def test_a_log_file_gets_whole_lines_now_and_then_and_ci_hardly_any(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], num_lines: int
) -> None:
    stream, clock = io.StringIO(), time.monotonic()
    monkeypatch.setattr(console_file.time, "monotonic", lambda: clock)
    made = Console(stream, environment)
    for second in range(40):
        clock += 1.0
        made.update_live({"trials": f"{second} of 40", "best": "t1"})
    lines = stream.getvalue().splitlines()
    assert len(lines) == num_lines
    assert lines[0] == "trials: 0 of 40; best: t1"
    assert "\x1b" not in stream.getvalue()


def test_a_long_sweep_does_not_fill_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), time.monotonic()
    monkeypatch.setattr(console_file.time, "monotonic", lambda: clock)
    made = Console(stream, {})
    for _ in range(12 * 3600 // 5):
        clock += 5.0
        made.update_live("line")
    assert stream.getvalue().count("\n") < 250


# ------------------------------------------------------------------------------------------- on a real terminal


def window(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def typed_text(written: str) -> list[str]:
    """What was written between two movements of the cursor, row by row, without colours."""
    plain = re.sub(r"\x1b\[\d*m", "", written).replace("\r\n", "\n")
    return [row for part in re.split(r"\r|\x1b\[\d*[AJ]", plain) for row in part.split("\n")]


def test_when_the_terminal_is_gone_the_log_has_what_is_said(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        console = Console(stream, {"TERM": "xterm"})
        console.copy_to(tmp_path / "progress.log")
        console.update_live({"trials": "1 of 2 done"})
        os.close(ours)
        console.print("2 of 2 done")
        console.update_live("nobody sees it")
        stream.write("nor this")
    assert "2 of 2 done" in (tmp_path / "progress.log").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_where_the_log_has_no_room_the_user_is_told_all_the_same(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(stream, {})
    (tmp_path / "progress.log").symlink_to("/dev/full")
    console.copy_to(tmp_path / "progress.log")
    console.print("1 of 2 done")
    assert stream.getvalue() == "1 of 2 done\n"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_sweep_on_a_terminal_that_shrinks_and_is_interrupted_leaves_it_as_it_was(
    ray_cluster: str, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    window(theirs, 80)
    before = termios.tcgetattr(theirs)
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
    endless = ["--set", "num_trials=500", "--set", "max_pack_size=1", "--set", "method=linear_probe"]
    process = subprocess.Popen(
        [sys.executable, QUICKSTART, "--smoke", *endless], cwd=tmp_path, env={**environment, "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    written, sizes, decoder = "", dict[str, int](), codecs.getincrementaldecoder("utf-8")()
    while process.poll() is None or select.select([ours], [], [], 0.5)[0]:
        if not select.select([ours], [], [], 0.5)[0]:
            continue
        written += decoder.decode(os.read(ours, 65536))
        drawn = written.count("to their end")
        if drawn > 3 and "shrunk" not in sizes:
            window(ours, 40)
            sizes["shrunk"] = len(written)
        if "shrunk" in sizes and written[sizes["shrunk"] :].count("to their end") > 5 and "interrupted" not in sizes:
            sizes["interrupted"] = len(written)
            os.write(ours, b"\x03")
    assert process.returncode == 130
    assert termios.tcgetattr(theirs) == before
    wide, narrow = written[: sizes["shrunk"]], written[sizes["shrunk"] : sizes["interrupted"]]
    assert "\x1b[1mtrials  \x1b[0m" in wide
    assert max(len(row) for row in typed_text(wide) if row.startswith("best    ")) > 39
    # The one view that was being drawn as the window shrank may be wider.
    rows = [row for row in typed_text(narrow.split("\x1b[J", 2)[2]) if row]
    assert max(map(len, rows)) < 40
    assert any("running" in row for row in rows)
    # The view is gone, and sentences have taken its place.
    last = typed_text(written)
    end = last.index("interrupted; finished trials are kept")
    assert not any(row.startswith(("trials  ", "best    ", "speed   ")) for row in last[end:])
    assert any("go on with: imbvlm sweep resume" in row for row in last[end:])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_sweeps_log_file_has_lines_of_whole_sentences(ray_cluster: str, tmp_path: Path) -> None:
    environment, started = {name: value for name, value in os.environ.items() if name != "CI"}, time.monotonic()
    done = subprocess.run(
        [sys.executable, QUICKSTART, "--smoke"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert not set("\x1b\r") & set(done.stdout)
    assert 1 <= done.stdout.count("\ntrials: ") <= 1 + (time.monotonic() - started) / 15
