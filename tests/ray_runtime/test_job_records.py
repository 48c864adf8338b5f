"""What processes of one job record for each other, and what a lost record costs: nothing fails for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from imbvlm.ray_runtime.job_records import JobRecords, process_key, record_process, record_workers, workers_key

pytestmark = pytest.mark.ray


@pytest.fixture
def records(ray_cluster: str) -> JobRecords:
    return JobRecords.open()


def test_processes_of_a_job_add_to_the_same_lists(records: JobRecords) -> None:
    import ray

    def add(handle: JobRecords, value: str) -> list[str]:
        handle.add("shared", f"{value} by its handle")
        return JobRecords.open().add("shared", f"{value} by its name")

    assert records.get("shared") == []
    values = ray.get(ray.remote(num_cpus=0)(add).remote(records, "a task"))
    assert values == records.get("shared") == ["a task by its handle", "a task by its name"]
    records.delete("shared")
    assert records.get("shared") == []


def test_a_deleted_key_leaves_the_others(records: JobRecords) -> None:
    for key in ("kept", "kept too"):
        records.add(key, "value")
    records.delete("kept")
    assert records.get("kept") == []
    assert records.get("kept too") == ["value"]


class WhereUnpickled:
    def __reduce__(self) -> tuple[Callable[[], int], tuple[()]]:
        return os.getpid, ()


def test_values_are_unpickled_by_those_who_ask(records: JobRecords) -> None:
    """The actor imported torch for seconds to unpickle the first trial's handle, and the trial waited for it."""
    records.add("here", WhereUnpickled())
    assert records.get("here") == [os.getpid()]


def test_a_trials_process_is_ended_and_its_workers_placement_group_freed(records: JobRecords) -> None:
    import ray
    from ray.exceptions import RayActorError
    from ray.util import placement_group, placement_group_table, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    class Process:
        def start(self) -> None:
            record_process("t1")
            record_workers("t1")

    group = placement_group([{"CPU": 1}])
    inside = PlacementGroupSchedulingStrategy(placement_group=group)
    process = ray.remote(Process).options(num_cpus=1, scheduling_strategy=inside).remote()
    ray.get(process.start.remote(), timeout=60)
    (recorded,), (reserved,) = records.get(process_key("t1")), records.get(workers_key("t1"))
    ray.kill(recorded)
    remove_placement_group(reserved)
    with pytest.raises(RayActorError):
        ray.get(process.start.remote(), timeout=60)
    deadline = time.monotonic() + 30
    while placement_group_table(group)["state"] != "REMOVED":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for key in (process_key("t1"), workers_key("t1")):
        records.delete(key)


def test_lost_records_are_empty_and_the_next_ones_start_anew(records: JobRecords) -> None:
    import ray

    records.add("kept", "by the lost actor")
    ray.kill(records._actor)
    # Ray answers before the actor is dead.
    deadline = time.monotonic() + 30
    while records.get("kept"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert records.add("kept", "in vain") == []
    assert records.get("kept") == []
    records.delete("kept")

    def opened() -> Any:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            values = JobRecords.open().add("kept", "anew")
            if values:
                return values
            time.sleep(0.2)
        return None

    assert opened() == ["anew"]
    JobRecords.open().delete("kept")
