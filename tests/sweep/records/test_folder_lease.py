"""Two runs never work in one folder: who still runs is refused, who has ended gives way at once or after a silence."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from leases import assert_one_has_it, race, race_of_processes, work_until_ended
from sweep_folder import sweep_spec, write_sweep

from imbvlm.base import interrupts
from imbvlm.base.console import Console
from imbvlm.base.errors import ImbvlmError
from imbvlm.sweep.records import folder_lease
from imbvlm.sweep.records.folder_lease import Holder
from imbvlm.sweep.records.lease_file import Content, LocalLeaseFile
from imbvlm.sweep.run.run_phases import run_sweep


def write(folder: Path, holder: Holder) -> Path:
    """As another process takes it: whole, and as another file than the one before."""
    path = folder / folder_lease.LEASE_FILE
    path.with_suffix(".new").write_text(json.dumps(asdict(holder)))
    return path.with_suffix(".new").replace(path)


def holder_of(folder: Path) -> Holder:
    return Holder(**json.loads((folder / folder_lease.LEASE_FILE).read_text()))


def silence(text: str) -> None:
    """Nothing is said."""
    raise AssertionError(text)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEARTBEAT_SECONDS", 0.02), ("HEARTBEAT_TIMEOUT_SECONDS", 0.3), ("POLL_SECONDS", 0.02)):
        monkeypatch.setattr(folder_lease, name, seconds)


def test_a_sweep_that_still_runs_is_not_run_again_and_nothing_is_touched(tmp_path: Path) -> None:
    data, tower = {"manifest": "embedded:fashion_mnist_lt"}, {"name": "tinylit_lite0", "image_size": 64}
    fields = {"base": {"data": data, "encoder": tower}}
    folder = write_sweep(tmp_path / "made", [30, 20, 10], refits=False, **fields)
    write(folder, Holder.here())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ImbvlmError, match=r"this sweep still runs \(host .*, process \d+, since 20.*running.json"):
        run_sweep(sweep_spec(**fields), str(folder), Console())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_file_goes_with_its_run_however_that_ends(tmp_path: Path) -> None:
    def end_by(error: type[BaseException]) -> None:
        with folder_lease.folder_lease(str(tmp_path), silence):
            assert (tmp_path / folder_lease.LEASE_FILE).exists()
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            end_by(error)
        assert not (tmp_path / folder_lease.LEASE_FILE).exists()


def test_a_killed_run_gives_way_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from imbvlm.sweep.records.folder_lease import folder_lease\n"
        "with folder_lease(sys.argv[1], print): print('here', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        with (
            pytest.raises(ImbvlmError, match=f"still runs.*process {process.pid}"),
            folder_lease.folder_lease(str(tmp_path), silence),
        ):
            pass
        process.kill()
        # Also before somebody has waited for it.
        while not holder_of(tmp_path).is_gone:
            time.sleep(0.01)
        with folder_lease.folder_lease(str(tmp_path), silence):
            pass


def test_a_number_of_a_process_that_was_given_again_is_no_run(tmp_path: Path) -> None:
    write(tmp_path, replace(Holder.here(), born="1"))
    with folder_lease.folder_lease(str(tmp_path), silence):
        assert not holder_of(tmp_path).is_gone


def elsewhere(**fields: object) -> Holder:
    """Of this very number, in another namespace of processes."""
    return replace(Holder.here(), place="another", host="far", **fields)  # type: ignore[arg-type]


def test_a_run_elsewhere_has_ended_when_it_has_been_silent_for_long(tmp_path: Path, quick: None) -> None:
    path, said = write(tmp_path, elsewhere()), list[str]()
    with folder_lease.folder_lease(str(tmp_path), said.append):
        assert holder_of(tmp_path).host != "far"
    assert "host far" in said[0]
    assert f"delete {path}" in said[0]
    write(tmp_path, elsewhere(beat=time.time() - 1))
    with folder_lease.folder_lease(str(tmp_path), silence):
        pass


def test_a_run_elsewhere_that_gives_a_sign_of_life_still_runs(tmp_path: Path, quick: None) -> None:
    write(tmp_path, elsewhere())

    def beat(text: str) -> None:
        write(tmp_path, elsewhere(beat=1.0))

    with pytest.raises(ImbvlmError, match=r"still runs \(host far"), folder_lease.folder_lease(str(tmp_path), beat):
        pass
    assert holder_of(tmp_path).host == "far"


def test_deleting_the_file_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lease, "POLL_SECONDS", 0.02)
    path = write(tmp_path, elsewhere())
    began = time.monotonic()
    with folder_lease.folder_lease(str(tmp_path), lambda text: path.unlink()):
        assert time.monotonic() - began < folder_lease.HEARTBEAT_TIMEOUT_SECONDS / 2


def work_between_signals() -> None:
    """As within a library that makes an error of an interrupt: signals wait for the next step."""
    with interrupts.held():
        for _ in range(600):
            time.sleep(0.1)
            interrupts.check()
    raise AssertionError("it went on without its folder")


@pytest.mark.parametrize("work", [work_until_ended, work_between_signals])
@pytest.mark.parametrize("has_handler", [False, True])
def test_a_run_that_lost_its_folder_ends_at_once_and_does_not_come_back(
    tmp_path: Path, quick: None, work: Callable[[], None], has_handler: bool
) -> None:
    def lose() -> None:
        with (
            interrupts.handled() if has_handler else nullcontext(),
            folder_lease.folder_lease(str(tmp_path), silence) as ours,
        ):
            first = holder_of(tmp_path).beat
            while holder_of(tmp_path).beat == first:
                time.sleep(0.01)
            ours.check()
            write(tmp_path, other)
            work()

    other, before, began = elsewhere(), signal.getsignal(signal.SIGINT), time.monotonic()
    with pytest.raises(ImbvlmError, match=r"another run's now \(host far"):
        lose()
    assert time.monotonic() - began < 10
    assert holder_of(tmp_path) == other
    assert not any(thread.name == "lease" for thread in threading.enumerate())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_late_heartbeat_does_not_reach_the_file_of_the_next_run(tmp_path: Path) -> None:
    """As of a machine that slept: it had looked before another run took the folder."""
    file = LocalLeaseFile(tmp_path / folder_lease.LEASE_FILE)
    assert file.create(b"first")
    assert LocalLeaseFile(tmp_path / folder_lease.LEASE_FILE).replace(Content(b"first", ""), "first", b"other")
    file.renew(b"first")
    assert (tmp_path / folder_lease.LEASE_FILE).read_bytes() == b"other"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_claim_of_a_killed_run_keeps_nobody_from_the_folder(tmp_path: Path) -> None:
    """It was killed between its claim and the replacement of the file."""
    path = tmp_path / folder_lease.LEASE_FILE
    path.write_bytes(b"ended")
    claim = tmp_path / f".{folder_lease.LEASE_FILE}.token"
    claim.write_bytes(b"killed")
    before, file = Content(b"ended", ""), LocalLeaseFile(path)
    assert not file.replace(before, "token", b"next"), "the other one may still replace it"
    os.utime(claim, (time.time() - 120, time.time() - 120))
    assert not file.replace(before, "token", b"next")
    assert file.replace(before, "token", b"next")
    assert [entry.name for entry in tmp_path.iterdir()] == [folder_lease.LEASE_FILE]
    assert path.read_bytes() == b"next"


@pytest.mark.parametrize("before", ["nothing", "killed", "silent"])
def test_of_runs_that_start_together_one_has_the_folder(tmp_path: Path, quick: None, before: str) -> None:
    switch = sys.getswitchinterval()
    # Threads take turns more often than processes would be interrupted.
    sys.setswitchinterval(1e-5)
    try:
        for number in range(8):
            folder = tmp_path / str(number)
            folder.mkdir()
            if before != "nothing":
                ended = replace(Holder.here(), born="1") if before == "killed" else elsewhere(beat=time.time() - 1)
                write(folder, ended)
            assert_one_has_it(race(str(folder), 2 + number % 3))
            assert list(folder.iterdir()) == []
    finally:
        sys.setswitchinterval(switch)


def test_without_hard_links_one_has_the_folder_too(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: Path) -> None:
        raise PermissionError(errno.EPERM, "as on FAT")

    monkeypatch.setattr(os, "link", refuse)
    for number in range(5):
        ends = race(str(tmp_path / str(number)))
        assert ends.count("has it") == 1, ends
    write(tmp_path, replace(Holder.here(), born="1"))
    assert_one_has_it(race(str(tmp_path)))


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / folder_lease.LEASE_FILE).write_text("{")
    with (
        pytest.raises(ImbvlmError, match=r"running.json is damaged.*Delete it"),
        folder_lease.folder_lease(str(tmp_path), silence),
    ):
        pass


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("before", ["nothing", "silent"])
def test_of_200_pairs_of_processes_none_has_the_folder_twice(tmp_path: Path, before: str) -> None:
    race_of_processes(str(tmp_path), 200, before == "silent", {})
