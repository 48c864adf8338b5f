"""Limits how often processes are lost at the same work: Ray would start new ones forever."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import state
from ray.core.generated import common_pb2, gcs_pb2
from ray.experimental import internal_kv

from imbvlm.base.errors import LostProcessesError

# Random machine failures rarely hit the same work several times in a row.
MAX_LOST_WORKERS = 5


class AttemptLimiter:
    """Records in the cluster's key-value store which work the processes of a pass have begun.

    The driver of the pass creates it; its processes get a copy.
    """

    def __init__(self) -> None:
        self._prefix = f"imbvlm-attempt-{uuid.uuid4().hex}"

    @contextmanager
    def at(self, key: str, work: str) -> Iterator[None]:
        """Record an attempt of this process at `work`, which names it in the error.

        Raises LostProcessesError where MAX_LOST_WORKERS processes in a row were lost at it.
        """
        first, again = f"{self._prefix}/{key}", f"{self._prefix}/{key}/"
        worker_id = ray.get_runtime_context().get_worker_id()
        # Each call waits for the cluster's head, so that the first attempt, usually the only one, makes a single call.
        # Its record stays, and counts once if its process is lost later and the work must be repeated.
        if not internal_kv._internal_kv_put(first, worker_id, overwrite=False):
            yield
            return
        begun = [name.decode().removeprefix(again) for name in internal_kv._internal_kv_list(again)]
        begun += [recorded.decode() for recorded in [internal_kv._internal_kv_get(first)] if recorded is not None]
        if len(begun) >= MAX_LOST_WORKERS:
            exits = [exit_type for worker in begun if (exit_type := _exit_type(worker)) is not None]
            if len(exits) >= MAX_LOST_WORKERS:
                out_of_memory = common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY in exits
                raise LostProcessesError(_sentence(work, len(exits), out_of_memory=out_of_memory))
        internal_kv._internal_kv_put(f"{again}{worker_id}", b"")
        try:
            yield
        finally:
            internal_kv._internal_kv_del(again, del_by_prefix=True)
            internal_kv._internal_kv_del(first)

    def close(self) -> None:
        """Delete the records of the pass, which may outlive the connection."""
        if internal_kv._internal_kv_initialized():
            internal_kv._internal_kv_del(f"{self._prefix}/", del_by_prefix=True)


def _exit_type(worker_id: str) -> int | None:
    """Ray's type of a process's exit; None for a running process."""
    info = state.state._connect_and_get_accessor().get_worker_info(ray.WorkerID(bytes.fromhex(worker_id)))
    if info is None:
        return int(common_pb2.WorkerExitType.SYSTEM_ERROR)
    worker = gcs_pb2.WorkerTableData.FromString(info)
    return None if worker.is_alive else int(worker.exit_type)


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
