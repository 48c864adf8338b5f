"""What is seen while a sweep runs: trials, the best so far, images a second, and a remaining time to rely on."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pty_screen import PtyScreen, RewrappingScreen
from quickstart_sweep import QUICKSTART
from sweep_folder import sweep_spec, write_sweep

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


# ------------------------------------------------------------------------------------------- on a real terminal


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_sweep_on_a_terminal_that_is_resized_and_interrupted_leaves_it_as_it_was(
    ray_cluster: str, tmp_path: Path
) -> None:
    with PtyScreen(80, 24, RewrappingScreen) as terminal:
        before = termios.tcgetattr(terminal.descriptor)
        environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
        endless = ["--set", "num_trials=500", "--set", "max_pack_size=1", "--set", "method=linear_probe"]
        process = subprocess.Popen(
            [sys.executable, QUICKSTART, "--smoke", *endless], cwd=tmp_path, env={**environment, "TERM": "xterm"},
            stdin=terminal.descriptor, stdout=terminal.descriptor, stderr=terminal.descriptor, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

        def view(min_trials: int) -> list[str]:
            """The view's rows when so many trials are done, without the rows above."""
            while process.poll() is None:
                terminal.read(0.2)
                rows = terminal.rows
                starts = [index for index, row in enumerate(rows) if row.startswith("trials  ")]
                if starts and int(rows[starts[0]].split()[1]) >= min_trials:
                    assert len(starts) == 1, rows
                    return rows[starts[0] :]
            raise AssertionError("\n".join(terminal.rows))

        rows = view(4)
        assert any(len(row) > 60 for row in rows)
        for number, (columns, lines) in enumerate([(200, 40), (40, 24), (80, 20)]):
            terminal.resize(columns, lines)
            time.sleep(1.0)
            rows = view(6 + 2 * number)
            assert max(map(len, rows)) <= columns
            labels = [row[:8].strip() for row in rows if row[:8].strip()]
            assert labels[:2] == ["trials", "best"]
            assert len(labels) == len(set(labels))
        terminal.type(b"\x03")
        while process.poll() is None:
            terminal.read(0.2)
        terminal.read(0.5)
        assert process.returncode == 130
        assert termios.tcgetattr(terminal.descriptor) == before
        assert not terminal.screen.cursor.hidden
        # The view is gone, and sentences have taken its place.
        rows = terminal.rows
        assert not any(row.startswith(("trials  ", "best    ", "speed   ", "left    ")) for row in rows)
        text = "".join(["".join(row.split()) for row in (*terminal.screen.scrollback, *rows)])
        assert "goonwith:imbvlmsweepresume" in text


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
