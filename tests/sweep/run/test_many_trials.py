"""A thousand short trials: results are whole, nothing grows that needn't, and nothing is left behind."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from faulty_sweep import Sweep, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
SPACE = {
    "parameters": {
        "loss.name": {"choice": ["cross_entropy", "focal", "balanced_softmax"]},
        "optim.lr": {"loguniform": [0.01, 0.5]},
        "optim.weight_decay": {"loguniform": [1e-5, 1e-3]},
    }
}
# What the driver keeps of a trial: its record, which the report is made of, and what Optuna learns from.
DRIVER_BYTES_PER_TRIAL = 50_000
NOISE_BYTES = 10_000_000


def command_of(pid: int) -> str:
    """Empty for a process that has just ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    return ""


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def num_open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def working(pid: int) -> set[str]:
    """Names of a cluster's processes that do something; Ray Data keeps one of each of its own for every cluster."""
    names = {command_of(one).partition(".")[0] for one in family(pid)}
    return {name for name in names if name.startswith("ray::")} - {
        "ray::IDLE", "ray::_StatsActor", "ray::_AutoscalingCoordinatorActor", "ray::ActorLocationTracker",
    }  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What a sweep's driver and its cluster hold at a moment; `worker_bytes` of the largest worker."""

    num_trials: int
    driver_bytes: int
    driver_files: int
    driver_seconds: float
    worker_bytes: int
    num_processes: int
    cluster_files: int

    @staticmethod
    def at(driver: int, num_trials: int) -> Look:
        cluster = {pid: command for pid in family(os.getpid()) if pid != driver and (command := command_of(pid))}
        ray = [pid for pid, command in cluster.items() if "gcs_server" in command or "raylet/raylet" in command]
        assert len(ray) == 2
        workers = max(resident_bytes(pid) for pid, command in cluster.items() if command.startswith("ray::"))
        return Look(
            num_trials, resident_bytes(driver), num_open_files(driver), cpu_seconds(driver), workers, len(cluster),
            sum(num_open_files(pid) for pid in ray),
        )  # fmt: skip


@pytest.mark.parametrize(("num_trials", "pack_size"), [(1000, 20), (100, 1)])
def test_many_short_trials_leave_nothing_but_their_results(
    ray_cluster: str, tmp_path: Path, num_trials: int, pack_size: int
) -> None:
    from ray.util import placement_group_table

    write_manifest(tmp_path / "few.parquet")
    sweep = Sweep(
        tmp_path, tmp_path / "few.parquet", space=SPACE, num_trials=num_trials, max_pack_size=pack_size,
        trial_scheduler={"name": "asha"},
    )  # fmt: skip
    every, looks, before = num_trials // 10, list[Look](), working(os.getpid())

    def through() -> bool:
        if not sweep.started() or not (sweep.path / "trials").exists():
            return False
        begun = sum(name.startswith("t") for name in os.listdir(sweep.path / "trials"))
        if begun >= every * (len(looks) + 1):
            looks.append(Look.at(sweep.process.pid, begun))
        # Written when the search is through, before the refits.
        return (sweep.path / "results.parquet").exists()

    try:
        begin = time.monotonic()
        sweep.start()
        sweep.wait_for(through, 600)
        seconds = time.monotonic() - begin
        sweep.end()
    finally:
        sweep.stop()
    for look in looks:
        print(look)
    print(f"{num_trials} trials in {seconds:.0f} s")

    records = sweep.records()
    assert len(records) == num_trials
    assert {record["state"] for record in records.values()} <= {"finished", "stopped"}
    assert len({str(record["draw"]) for record in records.values()}) == num_trials
    table = [row for row in pq.read_table(sweep.path / "results.parquet").to_pylist() if row["kind"] == "search"]
    assert sorted(row["trial_id"] for row in table) == sorted(records)
    assert all(len(row["epochs"]) == len(records[row["trial_id"]]["epochs"]) for row in table)

    # The first tenth has brought all that is shared.
    first, last = looks[1], looks[-1]
    grown = last.num_trials - first.num_trials
    assert grown >= num_trials / 2
    assert last.driver_bytes - first.driver_bytes < grown * DRIVER_BYTES_PER_TRIAL + NOISE_BYTES
    assert last.worker_bytes < first.worker_bytes + 5 * NOISE_BYTES
    assert last.num_processes <= first.num_processes + 1
    assert last.driver_files <= first.driver_files + 5
    assert last.cluster_files <= first.cluster_files + 10
    # A trial costs the driver no more after many others: what each of them would be looked at again for is quadratic.
    # By medians: a single tenth of them took three times as long as any other once.
    costs = [(b.driver_seconds - a.driver_seconds) / (b.num_trials - a.num_trials) for a, b in pairwise(looks[1:])]
    early, late = statistics.median(costs[: len(costs) // 2]), statistics.median(costs[len(costs) // 2 :])
    assert late < 1.5 * early

    deadline = time.monotonic() + 60
    while left := working(os.getpid()) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    assert not [one for one in placement_group_table().values() if one["state"] != "REMOVED"]
