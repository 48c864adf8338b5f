"""A running sweep shows trials, the best so far, images a second, and a remaining time to rely on."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pty_screen import PtyScreen, RewrappingScreen
from quickstart_sweep import QUICKSTART
from sweep_folder import sweep_spec, write_sweep
from trial_epochs import set_metrics

from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.tune.live_status import Countdown, ProgressSnapshot, live_lines, seconds_left

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
    set_metrics(records[-2], {"train/images_per_second": 1234.5})
    return log


def test_the_view_has_states_the_best_with_its_groups_throughput_time_left_and_failures(log: TrialLog) -> None:
    snapshot = ProgressSnapshot("search", 30, 1e9 + 100, 100.0, "5 min 0 s of 1 h 0 min")
    lines = live_lines(log, OBJECTIVE, snapshot, 185.0)
    assert list(lines) == ["trials", "best", "speed", "left", "used", "failed", "lost"]
    assert lines["trials"] == "22 of 30 done (15 to their end, 5 stopped early, 1 failed, 1 lost), 1 running, 1 paused"
    best = log.best(OBJECTIVE)[0]
    epoch = best.best_epoch(OBJECTIVE)
    assert lines["best"].startswith(
        f"{best.trial_id} balanced {100 * epoch[OBJECTIVE]:.1f} (overall {100 * epoch['val/top1_accuracy']:.1f}, "
        f"few {100 * epoch['val/few_shot_accuracy']:.1f}), "
    )
    assert lines["best"].endswith(f"{100 * (epoch[OBJECTIVE] - 0.5):+.1f} points to linear probe")
    assert lines["speed"] == "1,234 images a second"
    assert lines["left"] == "about 3 min 5 s"
    assert lines["used"] == "5 min 0 s of 1 h 0 min"
    assert (lines["failed"], lines["lost"]) == ("t00021: the loss wasn't finite", "t00022: its worker was lost")
    log.of("search")[-2].epochs.clear()
    assert "speed" not in live_lines(log, OBJECTIVE, snapshot)


def test_what_is_not_known_yet_is_not_shown(tmp_path: Path) -> None:
    (only,) = live_lines(TrialLog(str(tmp_path)), OBJECTIVE, ProgressSnapshot("search", 8, 1e9, 1.0, "")).items()
    assert only == ("trials", "0 of 8 done, 0 running")


# ------------------------------------------------------------------------------------------------ remaining time


def simulated(
    num_trials: int,
    pack_size: int = 1,
    stopped_share: float = 0.0,
    order: int = 0,
    seconds_at: Callable[[int, float], float] = lambda number, seconds: 3.0,
) -> Iterator[tuple[float, TrialLog, ProgressSnapshot]]:
    """A search of two processes at each moment, with the seconds that are truly left.

    A trial has 12 epochs, and so have those of a pack together. One takes `seconds_at(trial, seconds of the search)`.
    ASHA stops some after 4 epochs, from the first on.
    """
    chance, log, began, clock = random.Random(order), TrialLog("nowhere"), 1e9, 1e9
    config = sweep_spec().trial({"method": "linear_probe", "loss.name": "focal", "optim.lr": 0.1}).to_tree()
    processes: list[list[TrialRecord]] = [[], []]
    done: dict[str, float] = {}
    moments, ids = [], iter(range(num_trials))
    stopped = {ten + number for ten in range(0, num_trials, 10)
               for number in chance.sample(range(10), round(10 * stopped_share))}  # fmt: skip
    while True:
        for process in processes:
            if not process:
                numbers = list(itertools.islice(ids, pack_size))
                for number in numbers:
                    pack = f"t{numbers[0]}" if len(numbers) > 1 else ""
                    process.append(TrialRecord(trial_id=f"t{number:05d}", kind="search", config=config,
                                               started_at=clock, pack_size=len(numbers), pack=pack))  # fmt: skip
                log.records |= {record.trial_id: record for record in process}
        if not any(processes):
            break
        clock += 1.5
        for process in processes:
            for record in list(process):
                number = int(record.trial_id[1:])
                done[record.trial_id] = done.get(record.trial_id, 0.0) + 1.5 / seconds_at(number, clock - began)
                record.epochs = [
                    {"epoch": float(epoch), "train/images_per_second": 900.0 * record.pack_size}
                    for epoch in range(1, int(done[record.trial_id] + 1e-9) + 1)
                ]
                if len(record.epochs) >= (4 if number in stopped else 12):
                    record.state, record.ended_at = ("stopped" if number in stopped else "finished"), clock
                    process.remove(record)
        moments.append((clock, log_copy(log), ProgressSnapshot("search", num_trials, clock, clock - began, "")))
    for now, then, moment in moments:
        yield clock - now, then, moment


def log_copy(log: TrialLog) -> TrialLog:
    copied = TrialLog(log.folder)
    copied.records = {key: record.model_copy() for key, record in log.records.items()}
    return copied


def shown_times(moments: list[tuple[float, TrialLog, ProgressSnapshot]], every: int) -> list[tuple[float, float]]:
    """Seconds that are truly left and those that are shown, of each `every`-th moment in which a time is shown."""
    countdown, times = Countdown(), []
    for left, log, moment in moments[::every]:
        countdown.update(seconds_left(log, moment), moment.now)
        if countdown.seconds is not None:
            times.append((left, countdown.seconds))
    return times


def largest_jump(times: list[tuple[float, float]]) -> float:
    """The largest factor by which the shown end of the sweep moves away or comes closer from one time to the next."""
    jumps = [
        (after + 10) / (max(0.0, before - (left - later)) + 10)
        for (left, before), (later, after) in itertools.pairwise(times)
    ]
    return max(max(jump, 1 / jump) for jump in jumps)


# In a log file a line comes every 15 s.
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("pack_size", [1, 6])
@pytest.mark.parametrize("stopped_share", [0.0, 0.7])
def test_at_a_constant_speed_the_time_left_is_shown_early_is_true_and_does_not_jump(
    pack_size: int, stopped_share: float, every: int
) -> None:
    for order in range(2):
        moments = list(simulated(48 if pack_size == 1 else 120, pack_size, stopped_share, order))
        times = shown_times(moments, every)
        assert len(times) > 0.85 * len(moments[::every])
        for left, shown in times:
            assert left / 1.7 - 15 < shown < 1.7 * left + 15
        assert largest_jump(times) < 1.4


def slow_first(number: int, seconds: float) -> float:
    """The first trial compiles, imports and fills caches."""
    return 30.0 if number < 2 else 3.0


def slow_later(number: int, seconds: float) -> float:
    """Another program takes most of the machine."""
    return 3.0 if seconds < 400 else 12.0


def fast_later(number: int, seconds: float) -> float:
    return 12.0 if seconds < 800 else 3.0


def mixed(number: int, seconds: float) -> float:
    """Every third trial is a large model."""
    return 12.0 if number % 3 == 0 else 1.5


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(
    ("speed", "settles_after"), [(slow_first, 400), (slow_later, 1500), (fast_later, 1500), (mixed, 100)]
)
def test_where_the_speed_changes_the_time_left_follows_without_a_jump(
    speed: Callable[[int, float], float], settles_after: float, every: int
) -> None:
    """It was 16 minutes at the first trial, and 3 a minute later."""
    moments = list(simulated(100, seconds_at=speed))
    times = shown_times(moments, every)
    total = moments[-1][2].seconds
    assert largest_jump(times) < 1.6
    for left, shown in times:
        if total - left > settles_after:
            assert left / 2 - 15 < shown < 2 * left + 15


def test_a_last_trial_that_outlasts_the_others_is_waited_for() -> None:
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
    assert seconds_left(log, ProgressSnapshot("search", 11, 1e9 + 134, 134.0, "")) == pytest.approx(14 * 7 / 5)


# ----------------------------------------------------------------------------------------------- images a second


def test_trials_of_a_pack_are_one_process_and_its_images_count_once() -> None:
    """Each of 24 members reports 24 times as many, since the time of an epoch is shared among them."""
    _, log, moment = list(simulated(48, 24))[9]
    lines = live_lines(log, OBJECTIVE, moment)
    assert lines["trials"] == "0 of 48 done, 48 running in 2 processes"
    assert lines["speed"] == "1,800 images a second"


def test_members_that_are_stopped_do_not_change_the_images_that_the_others_read() -> None:
    moments = [(log, moment) for _, log, moment in simulated(12, 6, 0.7) if moment.seconds in (12.0, 13.5)]
    assert [live_lines(log, OBJECTIVE, moment)["speed"] for log, moment in moments] == ["1,800 images a second"] * 2


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
