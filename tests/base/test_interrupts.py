"""Ctrl-C and SIGTERM: one line and 130 or 143 from the first import on, and no library makes an error of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import pytest
from sweep_folder import sweep_spec

from imbvlm.base import interrupts
from imbvlm.base.errors import ImbvlmError
from imbvlm.sweep.tune import study_search

CODES = {signal.SIGINT: (130, "imbvlm: interrupted"), signal.SIGTERM: (143, "imbvlm: interrupted by SIGTERM")}
signals = pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)


def start(*command: str | Path, cwd: Path, **more: Any) -> subprocess.Popen[str]:
    """A program that handles signals as in a terminal, whatever the tests run in."""
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in CODES], **more,
    )  # fmt: skip


def end(process: subprocess.Popen[str], *numbers: signal.Signals, pause: float = 0.0) -> tuple[int, list[str]]:
    """Send signals once it has printed a line; its exit code and the lines of what it says on stderr."""
    assert process.stdout is not None
    assert process.stdout.readline() != "", process.communicate()
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.split("\n")


def program(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(text))
    return path


# ----------------------------------------------------------------------------------------- while modules are imported

# As numpy's and others' compiled parts do, which import numpy in C.
SLOW_MODULE = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    raise ImportError("numpy.core.multiarray failed to import") from None
"""
SCRIPT = Path(sysconfig.get_path("scripts")) / "imbvlm"


OLD_SCRIPT = """
from imbvlm.sweep.command import main
from imbvlm.sweep.spec import SweepSpec

main(SweepSpec(name="x", base={"encoder": {"name": "tinylit_lite0"}}, space="quickstart", num_trials=1))
"""
SCRIPT_OF_NOW = OLD_SCRIPT.replace("from imbvlm.sweep.command import main", "from imbvlm import run_script as main")


@signals
@pytest.mark.parametrize(
    ("slow", "command"),
    [
        ("pyarrow", ["program.py", "--dry-run"]),
        ("pyarrow", ["old.py", "--dry-run"]),
        ("torch", ["program.py"]),
        ("pydantic", [SCRIPT, "train", "trial.yaml"]),
        ("difflib", [SCRIPT, "--help"]),
        ("pyarrow", ["-m", "imbvlm", "predict", "model", "photo.jpg"]),
    ],
)
def test_while_modules_are_imported_a_signal_leaves_one_line(
    tmp_path: Path, number: signal.Signals, slow: str, command: Sequence[str | Path]
) -> None:
    (tmp_path / "old.py").write_text(OLD_SCRIPT)
    program(tmp_path, SCRIPT_OF_NOW)
    (tmp_path / f"{slow}.py").write_text(SLOW_MODULE)
    process = start(*command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)})
    code, said = CODES[number]
    assert end(process, number) == (code, ["", said, ""])


@signals
def test_between_its_imports_and_the_sweep_a_script_ends_likewise_after_its_own_cleaning_up(
    tmp_path: Path, number: signal.Signals
) -> None:
    path = program(
        tmp_path,
        """
        import sys, time
        from imbvlm.cli.app import main
        try:
            print("here", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", file=sys.stderr)
        """,
    )
    code, said = CODES[number]
    assert end(start(path, cwd=tmp_path), number) == (code, ["cleaned up", "", said, ""])


def test_importing_a_command_from_elsewhere_changes_no_handler() -> None:
    code = "import signal; import imbvlm.cli.app; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    process = start("-c", code, cwd=Path.cwd())
    assert process.communicate()[0] == "True\n"
    assert interrupts.current() is None


def test_what_ignores_ctrl_c_goes_on_ignoring_it(tmp_path: Path) -> None:
    """As a script's background job."""
    path = program(
        tmp_path,
        """
        import os, signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from imbvlm.base import interrupts
        with interrupts.handled():
            os.kill(os.getpid(), signal.SIGINT)
        print("went on")
        """,
    )
    assert start(path, cwd=tmp_path).communicate()[0] == "went on\n"


# ------------------------------------------------------------------------------------------------- while it is at work


@signals
@pytest.mark.parametrize("becomes", ["an error", "nothing"])
def test_what_a_library_makes_of_a_signal_does_not_count(number: signal.Signals, becomes: str, tmp_path: Path) -> None:
    """In a process of its own, since a SIGTERM leaves a process a few seconds to end."""
    path = program(
        tmp_path,
        f"""
        import signal
        from imbvlm.cli import app as cli
        from imbvlm.sweep.records import sweep_folder as listing

        def show(*_):
            try:
                signal.raise_signal({int(number)})
            except KeyboardInterrupt:
                if {becomes == "an error"}:
                    raise FileNotFoundError("optuna.log.lock.rename") from None
            return "all is well"

        listing.sweeps_under = listing.list_text = show
        cli.main(["sweep", "list"])
        """,
    )
    process = start(path, cwd=tmp_path)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (CODES[number][0], f"\n{CODES[number][1]}\n")


def test_held_back_a_signal_waits_for_the_next_check() -> None:
    steps = []

    def work() -> None:
        with interrupts.held():
            try:
                signal.raise_signal(signal.SIGINT)
                steps.append("a step goes to its end")
                interrupts.check()
            finally:
                steps.append("checked")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["a step goes to its end", "checked"]
    assert signal.getsignal(signal.SIGINT) is before


def test_held_back_a_signal_outweighs_an_error_and_comes_without_a_check() -> None:
    def work() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            raise ImbvlmError("its processes had the signal too")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_waiting_for_a_store_that_is_away_ends_at_a_signal() -> None:
    began = time.monotonic()

    def wait() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            interrupts.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        wait()
    assert time.monotonic() - began < 10


SWALLOWED = """
    import signal
    from contextlib import suppress
    from imbvlm.base import interrupts
    from imbvlm.ray_runtime import connection
    def start_here():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    connection._start_here = start_here
    connection._Watch.begin = lambda self: None
    connection.connected_cluster = lambda: None
    with interrupts.handled():
        try:
            with connection.ray_session():
                print("it goes on")
        except KeyboardInterrupt:
            print("heeded")
    """


def test_a_signal_of_which_ray_makes_nothing_while_it_starts_is_heeded_once_it_is_up(tmp_path: Path) -> None:
    """The sweep went on, and only a second Ctrl-C ended it."""
    # In a process of its own: where tests share a Ray that is up, none would start.
    process = start(program(tmp_path, SWALLOWED), cwd=tmp_path, env=os.environ | {"RAY_ADDRESS": "local"})
    assert process.communicate(timeout=60)[0] == "heeded\n"


STUCK = """
    import hashlib, threading
    from imbvlm.base import interrupts
    interrupts.GRACE_SECONDS, interrupts.AGAIN_SECONDS = 0.5, 0.2
    def work():
        signals.folder = "runs/night"
        threading.Timer(0.5, print, ["here"], {"flush": True}).start()
        # Python calls no handler before this comes back, in a quarter of an hour.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    with interrupts.handled() as signals:
        signals.outlast(work)
    """


def test_sigterm_ends_a_process_whose_main_thread_does_not_come_back(tmp_path: Path) -> None:
    process = start(program(tmp_path, STUCK), cwd=tmp_path)
    said = f"{CODES[signal.SIGTERM][1]}; go on with: imbvlm sweep resume runs/night"
    assert end(process, signal.SIGTERM) == (143, ["", said, ""])


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    process = start(program(tmp_path, STUCK), cwd=tmp_path)
    said = f"{CODES[signal.SIGINT][1]}; go on with: imbvlm sweep resume runs/night"
    assert end(process, signal.SIGINT, signal.SIGINT, pause=0.6) == (130, ["", said, ""])


# ------------------------------------------------------------------------------------------------- a sweep's journal


def test_an_interrupt_at_any_step_of_the_journal_is_one(tmp_path: Path) -> None:
    """Within Optuna's lock it became FileNotFoundError, which Tune logged and went on."""
    journal = study_search.OptunaJournal.create(tmp_path / "optuna.log", sweep_spec())
    trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    remaining = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal remaining
        if "optuna/storages/journal/_file.py" not in frame.f_code.co_filename and not frame.f_code.co_filename.endswith(
            "tune/study_search.py"
        ):
            return None
        remaining -= 1
        if not remaining:
            raise KeyboardInterrupt
        return trace

    steps = 0
    before = sys.gettrace()
    try:
        while remaining <= 0:
            steps += 1
            remaining = steps
            sys.settrace(trace)
            try:
                journal.add(trial)
            except KeyboardInterrupt:
                remaining = 0
            finally:
                sys.settrace(before)
    finally:
        sys.settrace(before)
    assert steps > 10


def test_a_lock_that_a_killed_run_left_does_not_hold_the_next_one_up(tmp_path: Path) -> None:
    path, lock = tmp_path / "optuna.log", tmp_path / "optuna.log.lock"
    path.touch()
    lock.symlink_to(path)
    began = time.monotonic()
    journal = study_search.OptunaJournal.create(path, sweep_spec())
    journal.add(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING))
    assert time.monotonic() - began < 10
    # A dashboard that writes there would wait for it too.
    assert not lock.is_symlink()
