"""Two runs never work in one folder: who still runs is refused, who has ended gives way at once or after a silence."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sweep_folder import sweep_spec, write_sweep

from imbvlm.errors import ImbvlmError
from imbvlm.sweep import lease
from imbvlm.sweep.console import Console
from imbvlm.sweep.lease import Holder, held
from imbvlm.sweep.run import run


def write(folder: Path, holder: Holder) -> Path:
    path = folder / lease.LEASE_FILE
    path.write_text(json.dumps(asdict(holder)))
    return path


def holder_of(folder: Path) -> Holder:
    return Holder(**json.loads((folder / lease.LEASE_FILE).read_text()))


def silence(text: str) -> None:
    """Nothing is said."""
    raise AssertionError(text)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_SECONDS", 0.02), ("SILENT_SECONDS", 0.3), ("LOOK_SECONDS", 0.02)):
        monkeypatch.setattr(lease, name, seconds)


def test_a_sweep_that_still_runs_is_not_run_again_and_nothing_is_touched(tmp_path: Path) -> None:
    data, tower = {"manifest": "embedded:fashion_mnist_lt"}, {"name": "tinylit_lite0", "image_size": 64}
    fields = {"base": {"data": data, "encoder": tower}}
    folder = write_sweep(tmp_path / "made", [30, 20, 10], refits=False, **fields)
    write(folder, Holder.here())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ImbvlmError, match=r"this sweep still runs \(host .*, process \d+, since 20.*running.json"):
        run(sweep_spec(**fields), str(folder), Console())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_file_goes_with_its_run_however_that_ends(tmp_path: Path) -> None:
    def end_by(error: type[BaseException]) -> None:
        with held(str(tmp_path), silence):
            assert (tmp_path / lease.LEASE_FILE).exists()
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            end_by(error)
        assert not (tmp_path / lease.LEASE_FILE).exists()


def test_a_killed_run_gives_way_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from imbvlm.sweep.lease import held\n"
        "with held(sys.argv[1], print): print('here', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        with pytest.raises(ImbvlmError, match=f"still runs.*process {process.pid}"), held(str(tmp_path), silence):
            pass
        process.kill()
        # Also before somebody has waited for it.
        while not holder_of(tmp_path).is_gone:
            time.sleep(0.01)
        with held(str(tmp_path), silence):
            pass


def test_a_number_of_a_process_that_was_given_again_is_no_run(tmp_path: Path) -> None:
    write(tmp_path, replace(Holder.here(), born="1"))
    with held(str(tmp_path), silence):
        assert not holder_of(tmp_path).is_gone


def elsewhere(**fields: object) -> Holder:
    """Of this very number, in another namespace of processes."""
    return replace(Holder.here(), place="another", host="far", **fields)  # type: ignore[arg-type]


def test_a_run_elsewhere_has_ended_when_it_has_been_silent_for_long(tmp_path: Path, quick: None) -> None:
    path, said = write(tmp_path, elsewhere()), list[str]()
    with held(str(tmp_path), said.append):
        assert holder_of(tmp_path).host != "far"
    assert "host far" in said[0]
    assert f"delete {path}" in said[0]
    write(tmp_path, elsewhere(beat=time.time() - 1))
    with held(str(tmp_path), silence):
        pass


def test_a_run_elsewhere_that_gives_a_sign_of_life_still_runs(tmp_path: Path, quick: None) -> None:
    write(tmp_path, elsewhere())

    def beat(text: str) -> None:
        write(tmp_path, elsewhere(beat=1.0))

    with pytest.raises(ImbvlmError, match=r"still runs \(host far"), held(str(tmp_path), beat):
        pass
    assert holder_of(tmp_path).host == "far"


def test_deleting_the_file_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.02)
    path = write(tmp_path, elsewhere())
    began = time.monotonic()
    with held(str(tmp_path), lambda text: path.unlink()):
        assert time.monotonic() - began < lease.SILENT_SECONDS / 2


def test_a_run_beats_and_one_that_lost_its_folder_ends_and_does_not_come_back(tmp_path: Path, quick: None) -> None:
    with held(str(tmp_path), silence) as ours:
        first = holder_of(tmp_path).beat
        while holder_of(tmp_path).beat == first:
            time.sleep(0.01)
        ours.check()
        other = elsewhere()
        write(tmp_path, other)
        with pytest.raises(ImbvlmError, match=r"another run's now \(host far"):
            ours.check()
        while any(thread.name == "lease" for thread in threading.enumerate()):
            write(tmp_path, other)
            time.sleep(0.01)
    assert holder_of(tmp_path) == other


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / lease.LEASE_FILE).write_text("{")
    with pytest.raises(ImbvlmError, match=r"running.json is damaged.*delete it"), held(str(tmp_path), silence):
        pass
