"""What breaks while a sweep runs, with real processes: no finished work is lost and the end is that of a quiet run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from apart import Apart, apart_with_ray, free_port, start_head
from faulty_sweep import (
    LOSSES,
    NUM_TRIALS,
    Sweep,
    assert_same_states,
    assert_same_trials,
    kill,
    runs,
    sweep_spec,
    wait_gone,
    write_manifest,
)

from imbvlm.sweep.records.budget import SAVE_AFTER_SECONDS
from imbvlm.training.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def manifest(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "few.parquet"
    write_manifest(path)
    return path


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features are computed once for all tests."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def quiet(manifest: Path, storage: Path) -> Sweep:
    """The undisturbed run."""
    sweep = Sweep(storage / "quiet", manifest, storage=str(storage / "quiet" / "runs"))
    sweep.run()
    assert len(sweep.outcome()) == NUM_TRIALS
    return sweep


@pytest.fixture
def make_sweep(quiet: Sweep, manifest: Path, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """Other sweeps of the same six configurations, their features there already; none is left running."""
    made = []

    def make(**fields: Any) -> Sweep:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "features").symlink_to(quiet.folder / "runs" / "features")
        made.append(Sweep(tmp_path, manifest, **fields))
        return made[-1]

    yield make
    for sweep in made:
        sweep.stop()


@pytest.fixture
def sweep(make_sweep: Callable[..., Sweep]) -> Sweep:
    return make_sweep()


def assert_same_end(sweep: Sweep, quiet: Sweep) -> None:
    """The same trials with the same numbers, none twice, the same best; a baseline and the refits too."""
    assert_same_trials(sweep, quiet)
    assert sweep.best() == quiet.best()
    assert not list((sweep.path / "checkpoints").glob("*"))
    for kind in ("baseline", "refit"):
        assert_same_states(sweep, quiet, kind)


# -------------------------------------------------------------------------------------------- processes that die


@pytest.mark.parametrize("driver", ["in_process", "ray_train"])
def test_a_killed_worker_costs_no_trial(
    quiet: Sweep, make_sweep: Callable[..., Sweep], order: Callable[..., Any], driver: str
) -> None:
    sweep = make_sweep(driver=driver, cpus_per_worker=0.9)
    with order(loss_seconds=0.1) as ids:
        sweep.start()
        sweep.wait_for(lambda: sweep.num_ended() >= 1)
        # Under Ray Train each trial has workers of its own: those of the first have done their work.
        done = set(ids("trial")) if driver == "ray_train" else set()
        sweep.wait_for(lambda: any(map(runs, set(ids("trial")) - done)))
        assert kill(ids("trial")) >= 1
    printed = sweep.end()
    assert "failed" not in printed
    assert_same_end(sweep, quiet)


@pytest.mark.parametrize("driver", ["in_process", "ray_train"])
def test_a_killed_driver_goes_on(
    quiet: Sweep, make_sweep: Callable[..., Sweep], order: Callable[..., Any], driver: str
) -> None:
    sweep = make_sweep(driver=driver, cpus_per_worker=0.9)
    with order(loss_seconds=0.1):
        sweep.start()
        sweep.wait_for(lambda: sweep.num_ended() >= 3)
        # Another one beside it would read the test split again. It waits meanwhile, so that it doesn't end.
        os.kill(sweep.process.pid, signal.SIGSTOP)
        beside = Sweep(sweep.folder, sweep.manifest, **sweep.fields).run("--resume", code=1)
        assert f"this sweep still runs (host {socket.gethostname()}, process {sweep.process.pid}, since" in beside
        os.kill(sweep.process.pid, signal.SIGKILL)
        sweep.process.wait()
    ended = sweep.finished()
    assert "resuming" in sweep.run("--resume")
    assert {key: sweep.records()[key] for key in ended} == ended
    assert_same_end(sweep, quiet)


def test_a_driver_killed_between_refits_delivers_the_same_model(
    quiet: Sweep, sweep: Sweep, order: Callable[..., Any]
) -> None:
    """The members of its blend are chosen again, and no refit reads the test split twice."""
    with order(loss_seconds=0.1):
        sweep.start()
        sweep.wait_for(lambda: any(record["state"] == "finished" for record in sweep.records("refit").values()))
        os.kill(sweep.process.pid, signal.SIGKILL)
        sweep.process.wait()
    read = [key for key, record in sweep.records("refit").items() if record["state"] == "finished"]
    assert not sweep.records("delivered")
    before = sweep.records("refit")
    assert "resuming" in sweep.run("--resume")
    assert {key: sweep.records("refit")[key] for key in read} == {key: before[key] for key in read}
    assert_same_end(sweep, quiet)
    delivered, expected = (
        {key: record["epochs"] for key, record in each.records("delivered").items()} for each in (sweep, quiet)
    )
    assert delivered == expected
    assert delivered


def children(pid: int, name: str) -> list[int]:
    """Processes of that name which a process has started."""
    pids = [int(text) for path in Path(f"/proc/{pid}/task").glob("*/children") for text in path.read_text().split()]
    return [child for child in pids if Path(f"/proc/{child}/comm").read_text().strip() == name]


@pytest.mark.parametrize("process", ["raylet", "gcs_server"])
def test_a_ray_of_its_own_that_is_gone_ends_the_sweep_with_how_to_go_on(
    quiet: Sweep, sweep: Sweep, order: Callable[..., Any], process: str
) -> None:
    with order(loss_seconds=0.1) as ids:
        sweep.start(environment={"RAY_ADDRESS": "local"})
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        assert kill(children(sweep.process.pid, process)) == 1
        began = time.monotonic()
        printed = sweep.end(1, seconds=120)
        assert time.monotonic() - began < 10
        for pid in ids("trial"):
            # A process that calls its GCS waits 60 s for another one (Ray's gcs_rpc_server_reconnect_timeout_s).
            wait_gone(pid, 120)
    way_on = f"; then go on with: imbvlm sweep resume {sweep.path}"
    (sentence,) = (line for line in printed.splitlines() if line.endswith(way_on))
    # Ray may be faster, and ends this process without a word.
    own, others = (
        f"imbvlm: Ray's {process} on this machine was killed by signal 9",
        "imbvlm: this run was ended without",
    )
    assert sentence.startswith((own, others) if process == "raylet" else own)
    assert "Traceback" not in printed
    assert sentence in (sweep.path / "progress.log").read_text()
    sweep.begin("sweep", "resume", str(sweep.path)).end()
    assert_same_end(sweep, quiet)


def test_a_joined_cluster_whose_head_is_gone_ends_the_sweep_with_how_to_go_on(
    quiet: Sweep, make_sweep: Callable[..., Sweep], tmp_path: Path, order: Callable[..., Any]
) -> None:
    with apart_with_ray(tmp_path) as there:
        sweep, port = make_sweep(there=there), free_port()
        start_head(there, tmp_path, port, "--num-cpus=2")
        with order(loss_seconds=0.1):
            sweep.start(environment={"RAY_ADDRESS": f"127.0.0.1:{port}"})
            sweep.wait_for(lambda: sweep.num_ended() >= 2)
            there.run("pkill", "-KILL", "-x", "gcs_server")
            printed = sweep.end(1, seconds=120)
    sweep.there = None
    assert f"imbvlm: nothing answers at 127.0.0.1:{port}, where the Ray cluster's head was" in printed
    assert f"; then go on with: imbvlm sweep resume {sweep.path}" in printed
    assert "Traceback" not in printed
    sweep.begin("sweep", "resume", str(sweep.path)).end()
    assert_same_end(sweep, quiet)


def test_ctrl_c_shows_what_there_is_and_how_to_go_on(quiet: Sweep, sweep: Sweep, order: Callable[..., Any]) -> None:
    with order(loss_seconds=0.1):
        sweep.start()
        sweep.wait_for(lambda: sweep.num_ended() >= 3)
        os.kill(sweep.process.pid, signal.SIGINT)
        printed = sweep.end(130)
    assert f"imbvlm sweep resume {sweep.path}" in printed
    partial = printed.split("interrupted")[1]
    assert "t00001" in partial
    assert "zero-shot" in partial
    assert not (sweep.path / "test.json").exists()
    assert (sweep.path / "unfinished").exists()
    assert not (sweep.path / "running.json").exists()
    sweep.run("--resume", str(sweep.path))
    assert_same_end(sweep, quiet)
    assert not (sweep.path / "unfinished").exists()


def below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [grandchild for child in children for grandchild in below(child)]


@pytest.mark.parametrize("told", ["driver", "everything"])
def test_sigterm_ends_within_ten_seconds_as_ctrl_c_does(
    quiet: Sweep, sweep: Sweep, order: Callable[..., Any], told: str
) -> None:
    """`kill` tells the driver alone, `systemctl stop` and `scancel` all processes, those of its own Ray too."""
    with order(loss_seconds=0.1):
        sweep.start(environment={"RAY_ADDRESS": "local"})
        sweep.wait_for(lambda: sweep.num_ended() >= 3)
        driver = sweep.process.pid
        pids = [driver, *below(driver)] if told == "everything" else [driver]
        assert len(pids) > 5 or told == "driver"
        began = time.monotonic()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        printed = sweep.end(143)
    assert time.monotonic() - began < 10
    assert f"imbvlm sweep resume {sweep.path}" in printed
    assert "Traceback" not in printed
    partial = printed.split("interrupted by SIGTERM")[1]
    assert "t00001" in partial
    assert not (sweep.path / "test.json").exists()
    sweep.run("--resume", str(sweep.path), environment={"RAY_ADDRESS": "local"})
    assert_same_end(sweep, quiet)


def test_an_extraction_that_is_ended_says_so(sweep: Sweep, order: Callable[..., Any]) -> None:
    shards = lambda: set((sweep.folder / "runs" / "features").rglob("*.arrow"))  # noqa: E731
    before = shards()
    with order(tower_seconds=1.0):
        words = ("features", "extract", "embedded:fashion_mnist_lt", "--encoder", "tinylit_lite0")
        sweep.begin(*words, environment={"RAY_ADDRESS": "local"})
        sweep.wait_for(lambda: shards() > before)
        assert_ends_with_a_line(sweep, signal.SIGTERM, "imbvlm: interrupted by SIGTERM")


def test_a_training_that_is_ended_says_so(sweep: Sweep) -> None:
    config = sweep.folder / "trial.yaml"
    sweep.spec().trial({"train.num_epochs": 100000}).to_yaml(config)
    sweep.begin("train", str(config), environment={"RAY_ADDRESS": "local"})
    lines = []
    while "epoch 2" not in (lines or [""])[-1]:
        lines.append(sweep.process.stdout.readline())
        assert lines[-1], lines
    assert_ends_with_a_line(sweep, signal.SIGINT, "imbvlm: interrupted")


def assert_ends_with_a_line(sweep: Sweep, number: signal.Signals, line: str) -> None:
    """Within ten seconds of a signal a command ends with the signal's exit code and this last line."""
    began = time.monotonic()
    sweep.process.send_signal(number)
    printed = sweep.end(128 + number)
    assert time.monotonic() - began < 10
    assert printed.splitlines()[-1] == line
    assert "Traceback" not in printed


def test_a_terminal_that_goes_away_does_not_end_the_sweep(
    quiet: Sweep, sweep: Sweep, order: Callable[..., Any]
) -> None:
    """As where ssh loses its connection: all that runs in the session is told, and writing fails from then on."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    with order(loss_seconds=0.1):
        sweep.process = subprocess.Popen(
            [sys.executable, "-m", "imbvlm", "sweep", "run", "spec.yaml"], cwd=sweep.folder,
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "RAY_ADDRESS": "local", "TERM": "xterm"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while b"to their end" not in shown:
            shown += os.read(ours, 65536)
        os.close(ours)
    assert sweep.process.wait(240) == 0, sweep.log()
    assert "winner" in (sweep.path / "progress.log").read_text()
    assert_same_end(sweep, quiet)


# ----------------------------------------------------------------------------------------- trials that go wrong


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("nan", "wasn't finite"),
        ("inf", "wasn't finite"),
        ("raise", "ValueError: a fault of the tests"),
        ("out_of_memory", "out of memory with train.batch_size 32 over 1 worker, 10 classes"),
    ],
)
def test_a_bad_loss_fails_its_trials_alone_and_says_why(
    quiet: Sweep, sweep: Sweep, order: Callable[..., Any], fault: str, sentence: str
) -> None:
    with order(losses={"focal": fault}):
        printed = sweep.run()
    assert "2 trials failed" in printed
    assert sentence in printed
    states = {record["draw"]["loss.name"]: record["state"] for record in sweep.records().values()}
    assert states == {"cross_entropy": "finished", "focal": "failed", "balanced_softmax": "finished"}
    assert len(sweep.records()) == NUM_TRIALS
    expected = {key: value for key, value in quiet.outcome().items() if "focal" not in key}
    assert sweep.outcome() == expected


@pytest.mark.timeout(900)
@pytest.mark.parametrize("driver", ["in_process", "ray_train"])
def test_a_trial_that_hangs_is_ended_and_the_others_go_on(
    quiet: Sweep, make_sweep: Callable[..., Sweep], order: Callable[..., Any], driver: str
) -> None:
    losses = ["cross_entropy", "focal"] if driver == "ray_train" else ["cross_entropy", "focal", "balanced_softmax"]
    # A trial of Ray Train takes up to a minute on a busy machine, so that one of them hangs.
    rates, minutes = ([0.05], 1.5) if driver == "ray_train" else ([0.05, 0.5], 0.3)
    space = {"parameters": {"loss.name": {"choice": losses}, "optim.lr": {"choice": rates}}}
    sweep = make_sweep(
        max_trial_minutes=minutes, driver=driver, cpus_per_worker=0.9, space=space, num_trials=len(rates) * len(losses)
    )
    with order(losses={"focal": "hang"}) as ids:
        printed = sweep.start().end()
        hung = ids("trial")
    sentence = f"ran longer than max_trial_minutes {minutes:g}"
    assert (f"{len(rates)} x {sentence}" if len(rates) > 1 else sentence) in printed
    sound = [
        json.dumps({"loss.name": loss, "optim.lr": rate}, sort_keys=True)
        for loss in losses
        for rate in rates
        if loss != "focal"
    ]
    assert sweep.outcome() == {key: quiet.outcome()[key] for key in sound}
    for pid in hung:
        wait_gone(pid)


def share_of_memory(more_bytes: int) -> float:
    """What is used of this machine's memory, and so many bytes more."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    memory = {key: 1024 * int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
    return (memory["MemTotal"] - memory["MemAvailable"] + more_bytes) / memory["MemTotal"]


def run_with_little_memory(there: Apart, sweep: Sweep, folder: Path, num_bytes: int, **expected: Any) -> str:
    """Where Ray ends a process once so many bytes more are taken than are now."""
    # Otherwise Ray waits longer after each such end of a task, for minutes in all.
    settings = {"RAY_memory_usage_threshold": f"{share_of_memory(num_bytes):.3f}",
                "RAY_memory_monitor_refresh_ms": "100", "RAY_task_oom_retry_delay_base_ms": "100"}  # fmt: skip
    port = free_port()
    start_head(there, folder, port, "--num-cpus=2", **settings)
    return sweep.run(environment={"RAY_ADDRESS": f"127.0.0.1:{port}", **settings}, **expected)


@pytest.mark.parametrize(("driver", "rates"), [("in_process", [0.05, 0.5]), ("ray_train", [0.05])])
def test_a_machine_without_memory_left_ends_the_trials_that_took_it_and_says_so(
    quiet: Sweep,
    make_sweep: Callable[..., Sweep],
    tmp_path: Path,
    order: Callable[..., Any],
    driver: str,
    rates: list[float],
) -> None:
    """Ray ends a process before the kernel does; the sweep goes on. What else runs on this machine counts, too."""
    space = {"parameters": {"loss.name": {"choice": ["cross_entropy", "focal"]}, "optim.lr": {"choice": rates}}}
    with apart_with_ray(tmp_path) as there, order(losses={"focal": "hoard"}) as ids:
        sweep = make_sweep(
            there=there, driver=driver, cpus_per_worker=0.9, max_failures=1, space=space, num_trials=2 * len(rates)
        )
        printed = run_with_little_memory(there, sweep, tmp_path, 8_000_000_000)
        states = {(record["draw"]["loss.name"], record["state"]) for record in sweep.records().values()}
        outcome, num_records, num_processes = sweep.outcome(), len(sweep.records()), len(ids("trial"))
    sentence = "its machine ran out of memory with train.batch_size 32 over 1 worker, 10 classes"
    assert f"{len(rates)} x {sentence}" in printed
    assert states == {("cross_entropy", "finished"), ("focal", "error")}
    kept = [json.dumps({"loss.name": "cross_entropy", "optim.lr": rate}, sort_keys=True) for rate in rates]
    assert outcome == {key: quiet.outcome()[key] for key in kept}
    assert num_records == 2 * len(rates)
    # Each has been started again once.
    assert num_processes >= 2 * len(rates)


def test_all_trials_failing_is_an_error_with_the_causes(sweep: Sweep, order: Callable[..., Any]) -> None:
    faults = {"cross_entropy": "nan", "focal": "raise", "balanced_softmax": "raise"}
    with order(losses=faults):
        printed = sweep.run(code=1)
    assert "no trial of 6 gave a result" in printed
    assert "4 x ValueError: a fault of the tests" in printed
    assert not (sweep.path / "test.json").exists()


# ---------------------------------------------------------------------------------------------------- extraction


def test_a_tower_worker_killed_in_the_middle_of_extraction_costs_nothing(
    quiet: Sweep, manifest: Path, tmp_path: Path, order: Callable[..., Any]
) -> None:
    sweep = Sweep(tmp_path, manifest)
    shards = lambda: list((tmp_path / "runs" / "features").rglob("*.arrow"))  # noqa: E731
    with order(tower_seconds=1.0) as ids:
        sweep.start()
        sweep.wait_for(lambda: len(shards()) >= 3)
        assert kill(ids("tower")) >= 1
    sweep.end()
    assert_same_end(sweep, quiet)


def test_a_tower_that_takes_all_memory_once_costs_nothing(
    quiet: Sweep, manifest: Path, tmp_path: Path, order: Callable[..., Any], fault_orders: Path
) -> None:
    with apart_with_ray(tmp_path) as there, order(hoards={"tower": 1}):
        sweep = Sweep(tmp_path, manifest, there=there)
        run_with_little_memory(there, sweep, tmp_path, 5_000_000_000)
    assert (fault_orders.parent / "hoards-tower-0").exists()
    sweep.there = None
    assert_same_end(sweep, quiet)


@pytest.mark.parametrize(
    ("kind", "work"),
    [("tower", "running the encoder over "), ("tower_start", "starting an encoder worker: "), ("loading", "loading ")],
)
def test_extraction_that_takes_all_memory_again_and_again_ends_and_says_so(
    quiet: Sweep, manifest: Path, tmp_path: Path, order: Callable[..., Any], kind: str, work: str
) -> None:
    with apart_with_ray(tmp_path) as there, order(hoards={kind: 99}) as ids:
        sweep = Sweep(tmp_path, manifest, there=there)
        printed = run_with_little_memory(there, sweep, tmp_path, 5_000_000_000, code=1)
        # Ray gives a tower's process several blocks, and another one of them after each loss.
        assert len(ids(kind)) < 60
    sweep.there = None
    assert f"imbvlm: {work}" in printed
    assert re.search(r"\d processes in a row were ended, since their machine ran out of memory\. Use machines", printed)
    assert f"then go on with: imbvlm sweep resume {sweep.path}" in printed
    sweep.run("--resume")
    assert_same_end(sweep, quiet)


# --------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Apart]:
    """A place where the folder `runs` is on a disk of 24 MB, and Ray one's own."""
    (tmp_path / "runs").mkdir()
    with apart_with_ray(tmp_path, f"mount -t tmpfs -o size=24m none {tmp_path}/runs") as there:
        yield there


def fill(there: Apart, folder: Path, room: int = 0) -> Path:
    """Fill the disk but for `room` bytes; the file whose removal makes it empty again."""
    path = there.path(folder) / "filler"
    with path.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)):
            pass
    os.truncate(path, path.stat().st_size - room)
    return path


def assert_says_what_to_do(printed: str, path: Path) -> None:
    assert "the disk is full; free some space there" in printed
    assert f"then go on with: imbvlm sweep resume {path}" in printed
    assert "Traceback" not in printed


def test_a_disk_that_is_full_while_the_store_is_written(
    quiet: Sweep, manifest: Path, tmp_path: Path, small_disk: Apart, order: Callable[..., Any]
) -> None:
    sweep, alone = Sweep(tmp_path, manifest, there=small_disk), {"RAY_ADDRESS": "local"}
    shards = lambda: list((small_disk.path(tmp_path) / "runs" / "features").rglob("*.arrow"))  # noqa: E731
    with order(tower_seconds=1.0):
        sweep.start(environment=alone)
        sweep.wait_for(lambda: len(shards()) >= 3)
        filler = fill(small_disk, tmp_path / "runs")
        before = {path: path.stat().st_mtime_ns for path in shards()}
        printed = sweep.end(1)
    assert_says_what_to_do(printed, tmp_path / "runs" / sweep.path.name)
    assert not sweep.records()
    filler.unlink()
    sweep.run("--resume", environment=alone)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in shards()}.items()
    assert_same_end(sweep, quiet)


def test_a_disk_that_is_full_while_records_are_written(
    quiet: Sweep, manifest: Path, tmp_path: Path, small_disk: Apart, order: Callable[..., Any]
) -> None:
    first = [{"loss.name": name, "optim.lr": 0.05} for name in LOSSES]
    sweep, alone = Sweep(tmp_path, manifest, there=small_disk, first_trials=first), {"RAY_ADDRESS": "local"}
    with order(losses={LOSSES[-1]: "hang"}):
        sweep.start(environment=alone)
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        # So late that what the sweep has spent would be written, too.
        time.sleep(SAVE_AFTER_SECONDS)
        filler = fill(small_disk, tmp_path / "runs")
    printed = sweep.end(1)
    assert_says_what_to_do(printed, tmp_path / "runs" / sweep.path.name)
    ended = sweep.finished()
    assert 2 <= len(ended) < NUM_TRIALS
    filler.unlink()
    sweep.run("--resume", environment=alone)
    assert {key: sweep.records()[key] for key in ended} == ended
    assert_same_end(sweep, quiet)


@pytest.mark.parametrize("driver", ["in_process", "ray_train"])
def test_a_disk_that_is_full_while_a_checkpoint_is_written(
    quiet: Sweep, manifest: Path, tmp_path: Path, small_disk: Apart, order: Callable[..., Any], driver: str
) -> None:
    sweep, alone = Sweep(tmp_path, manifest, there=small_disk, driver=driver), {"RAY_ADDRESS": "local"}
    checkpoints = lambda: list((small_disk.path(tmp_path) / "runs").glob("faults-*/checkpoints/t*/state.json"))  # noqa: E731
    with order(slow_losses={"focal": 0.5, "balanced_softmax": 0.5}, checkpoint_seconds=4):
        sweep.start(environment=alone)
        sweep.wait_for(lambda: sweep.num_ended() >= 1 and checkpoints())
        filler = fill(small_disk, tmp_path / "runs")
        (saved,) = checkpoints()
        before = load_checkpoint(str(saved.parent))
        printed = sweep.end(1)
    trial_id = saved.parent.name
    path = tmp_path / "runs" / sweep.path.name
    assert_says_what_to_do(printed, path)
    # Under Ray Train also Tune may need the room first, which notes the worker's failure in a file.
    assert f"can't write {path}" + ("" if driver == "ray_train" else f"/checkpoints/{trial_id}/state-") in printed
    kept = load_checkpoint(str(saved.parent))
    assert kept.scalars["step"] >= before.scalars["step"] > 0
    ended = sweep.finished()
    assert 1 <= len(ended) < NUM_TRIALS
    assert trial_id not in ended
    filler.unlink()
    sweep.run("--resume", environment=alone)
    assert {key: sweep.records()[key] for key in ended} == ended
    assert_same_end(sweep, quiet)


# --------------------------------------------------------------------------------------------- trials in packs


def assert_nearly_the_same_end(sweep: Sweep, quiet: Sweep) -> None:
    """As assert_same_end, to the rounding of a pack's joint sums."""
    ended, expected = sweep.outcome(), quiet.outcome()
    assert ended.keys() == expected.keys()
    for key, epochs in expected.items():
        assert ended[key] == [(epoch, pytest.approx(loss, rel=1e-4), pytest.approx(value, abs=0.02))
                              for epoch, loss, value in epochs]  # fmt: skip
    assert len(sweep.records()) == NUM_TRIALS


def test_a_killed_worker_costs_no_trial_of_its_pack(
    quiet: Sweep, make_sweep: Callable[..., Sweep], order: Callable[..., Any]
) -> None:
    sweep = make_sweep(max_pack_size=NUM_TRIALS)
    with order(loss_seconds=0.3) as ids:
        sweep.start()
        sweep.wait_for(lambda: len(sweep.records()) == NUM_TRIALS)
        # Into its first epochs.
        time.sleep(5)
        assert kill(ids("trial")) == 1
    printed = sweep.end()
    assert {record["pack_size"] for record in sweep.records().values()} == {NUM_TRIALS}
    assert "failed" not in printed
    assert_nearly_the_same_end(sweep, quiet)


def test_a_killed_worker_costs_no_trial_of_a_pack_of_decoders(
    manifest: Path, tmp_path: Path, order: Callable[..., Any]
) -> None:
    """By turns they give exactly what each gives alone."""
    base = {**sweep_spec(manifest, "runs").base, "method": "decoder", "decoder": {"depth": 1}}
    alone, packed = (Sweep(tmp_path / str(size), manifest, base=base, max_pack_size=size) for size in (1, NUM_TRIALS))
    alone.run()
    with order(loss_seconds=0.3) as ids:
        packed.start()
        packed.wait_for(lambda: len(packed.records()) == NUM_TRIALS)
        # Into its first epochs.
        time.sleep(5)
        assert kill(ids("trial")) == 1
    assert "failed" not in packed.end()
    assert {record["pack_size"] for record in packed.records().values()} == {NUM_TRIALS}
    assert_same_end(packed, alone)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("hang", "2 x ran longer than max_trial_minutes 0.2"),
        ("out_of_memory", "out of memory with train.batch_size 32 over 1 worker, 10 classes"),
    ],
)
def test_a_trial_at_fault_in_a_pack_is_ended_alone(
    quiet: Sweep, make_sweep: Callable[..., Sweep], order: Callable[..., Any], fault: str, sentence: str
) -> None:
    """Nobody sees which of a pack it is: its trials go on alone, and what is at fault shows there."""
    sweep = make_sweep(max_pack_size=NUM_TRIALS, max_trial_minutes=0.2, max_failures=0)
    with order(losses={"focal": fault}):
        printed = sweep.run()
    assert sentence in printed
    states = {
        (record["draw"]["loss.name"], record["state"], record["pack_size"]) for record in sweep.records().values()
    }
    assert states == {("cross_entropy", "finished", 1), ("balanced_softmax", "finished", 1), ("focal", "failed", 1)}
    assert sweep.outcome() == {key: value for key, value in quiet.outcome().items() if "focal" not in key}
    assert len(sweep.records()) == NUM_TRIALS


# ----------------------------------------------------------------------------------------- other places, other code


def test_a_moved_folder_goes_on_in_its_new_place(
    quiet: Sweep, sweep: Sweep, order: Callable[..., Any], tmp_path: Path
) -> None:
    with order(loss_seconds=0.1):
        sweep.start()
        sweep.wait_for(lambda: sweep.num_ended() >= 3)
        sweep.stop()
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "runs").rename(tmp_path / "elsewhere" / "results")
    assert moved.is_dir()
    sweep.storage = "elsewhere/results"
    before = sweep.finished()
    sweep.begin("sweep", "resume", str(sweep.path)).end()
    assert {key: sweep.records()[key] for key in before} == before
    assert_same_end(sweep, quiet)
    assert not (tmp_path / "runs").exists()


def test_a_changed_sweep_is_refused_with_the_difference_and_forks_with_what_is_still_valid(
    quiet: Sweep, sweep: Sweep, order: Callable[..., Any]
) -> None:
    with order(loss_seconds=0.1):
        sweep.start()
        sweep.wait_for(lambda: sweep.num_ended() >= 4)
        sweep.stop()
    begun, baselines = sweep.path, sweep.records("baseline")
    ended = {json.dumps(r["draw"], sort_keys=True): r for r in sweep.records().values() if r["state"] == "finished"}
    losses = {"choice": ["cross_entropy", "balanced_softmax"]}
    sweep.change(space={"parameters": {"loss.name": losses, "optim.lr": {"choice": [0.05, 0.5]}}}, num_trials=4)
    printed = sweep.run("--resume", str(begun), code=1)
    assert "num_trials was 6 when the sweep began and is 4 now" in printed
    assert "space.parameters.loss.name.choice was ['cross_entropy', 'focal', 'balanced_softmax']" in printed
    assert "add --fork" in printed
    printed = sweep.run("--resume", str(begun), "--fork")
    assert sweep.path != begun
    expected = {key: value for key, value in quiet.outcome().items() if "focal" not in key}
    assert sweep.outcome() == expected
    after = {json.dumps(r["draw"], sort_keys=True): r for r in sweep.records().values()}
    kept = set(ended) & set(expected)
    assert {key: after[key] for key in kept} == {key: ended[key] for key in kept}
    assert f"{len(kept) + len(baselines)} trials are kept" in printed
    assert "left behind: the space no longer has it" in printed


def test_changed_code_is_refused_by_name(sweep: Sweep, order: Callable[..., Any]) -> None:
    with order(loss_seconds=0.1):
        sweep.start()
        sweep.wait_for(lambda: sweep.num_ended() >= 1)
        sweep.stop()
    path = sweep.path / "provenance.json"
    provenance = json.loads(path.read_text())
    provenance["code"]["longtail/losses.py"] = "of another version"
    path.write_text(json.dumps(provenance))
    printed = sweep.run("--resume", str(sweep.path), code=1)
    assert "imbvlm/longtail/losses.py has changed since the sweep began" in printed
    printed = sweep.run("--resume", str(sweep.path), "--fork")
    assert "0 trials are kept" in printed
    assert len(sweep.outcome()) == NUM_TRIALS
