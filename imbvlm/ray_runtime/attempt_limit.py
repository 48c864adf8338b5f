"""Limits how often processes are lost at the same work: Ray would start new ones forever."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import ray
from ray.util.state import get_worker
from ray.util.state.exception import RayStateApiException

from imbvlm.base.errors import LostProcessesError
from imbvlm.ray_runtime.ray_private import add_record, delete_records

# Random machine failures rarely hit the same work several times in a row.
MAX_LOST_WORKERS = 5
OUT_OF_MEMORY = "NODE_OUT_OF_MEMORY"


@dataclass(frozen=True)
class AttemptLimiter:
    """Records which work the processes of a pass have begun.

    The driver of the pass creates it; its processes get a copy.
    """

    path: str = field(default_factory=lambda: f"imbvlm-attempt/{uuid.uuid4().hex}")

    @contextmanager
    def at(self, key: str, work: str, *, num_at_once: int = 1) -> Iterator[None]:
        """Record an attempt of this process at `work`, which names it in the error and which `num_at_once` may do.

        Raises LostProcessesError where MAX_LOST_WORKERS processes in a row were lost at it.
        """
        key, worker_id = f"{self.path}/{key}", ray.get_runtime_context().get_worker_id()
        others = set(add_record(key, worker_id)) - {worker_id}
        # The record of the first attempt, usually the only one, stays, and counts once if its process is lost later and
        # the work must be repeated.
        if not others:
            yield
            return
        # As many may be alive, and the others were lost: the first that does the work deletes the records.
        if (num_lost := len(others) - num_at_once + 1) >= MAX_LOST_WORKERS:
            raise LostProcessesError(_sentence(work, num_lost, out_of_memory=any(map(_was_out_of_memory, others))))
        try:
            yield
        finally:
            delete_records(key)

    def close(self) -> None:
        """Delete the records of the pass, which may outlive the connection."""
        if ray.is_initialized():
            delete_records(self.path)


def _was_out_of_memory(worker_id: str) -> bool:
    """Whether Ray ended a process for its machine's memory; False without a dashboard, which answers it."""
    with suppress(RayStateApiException):
        state = get_worker(worker_id, address=ray.get_runtime_context().gcs_address)
        return state is not None and state.exit_type == OUT_OF_MEMORY
    return False


def _sentence(work: str, number: int, *, out_of_memory: bool) -> str:
    if out_of_memory:
        return (
            f"{work}: {number} processes in a row were ended, since their machine ran out of memory. Use machines with "
            "more, or start Ray with fewer CPUs (ray start --num-cpus), so that fewer processes share it."
        )
    return (
        f"{work}: {number} processes in a row were lost. Read Ray's logs on their machine; without a reason there, "
        "check its memory first."
    )
