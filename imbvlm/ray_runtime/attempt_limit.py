"""How often a process was lost over the same piece of work: Ray starts another one each time, without end."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import state
from ray.core.generated import common_pb2, gcs_pb2
from ray.experimental import internal_kv

from imbvlm.base.errors import LostProcessesError

# Machines go away by chance, but not so often in a row at the same work.
MAX_LOST_WORKERS = 5


class AttemptLimiter:
    """What processes of a pass have begun: notes in the cluster's own store of keys and values.

    Made where the pass is begun; its processes carry it.
    """

    def __init__(self) -> None:
        self._prefix = f"imbvlm-attempt-{uuid.uuid4().hex}"

    @contextmanager
    def at(self, key: str, work: str) -> Iterator[None]:
        """One more attempt, by this process; `work` says at what.

        Raises LostProcessesError where MAX_LOST_WORKERS of those before it were lost, none has ended since.
        """
        first, again = f"{self._prefix}/{key}", f"{self._prefix}/{key}/"
        worker_id = ray.get_runtime_context().get_worker_id()
        # Each call waits for the cluster's head, and nearly all work is done at the first attempt: that costs one call.
        # Its note stays, and counts once where its process is lost later and the work must be done again.
        if not internal_kv._internal_kv_put(first, worker_id, overwrite=False):
            yield
            return
        begun = [name.decode().removeprefix(again) for name in internal_kv._internal_kv_list(again)]
        begun += [noted.decode() for noted in [internal_kv._internal_kv_get(first)] if noted is not None]
        if len(begun) >= MAX_LOST_WORKERS:
            exits = [found for one in begun if (found := _exit_of(one)) is not None]
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
        """The pass has ended; one that nobody waits for any more may outlive the connection."""
        if internal_kv._internal_kv_initialized():
            internal_kv._internal_kv_del(f"{self._prefix}/", del_by_prefix=True)


def _exit_of(worker_id: str) -> int | None:
    """How a process has ended, as Ray numbers it; None for one that runs."""
    found = state.state._connect_and_get_accessor().get_worker_info(ray.WorkerID(bytes.fromhex(worker_id)))
    if found is None:
        return int(common_pb2.WorkerExitType.SYSTEM_ERROR)
    worker = gcs_pb2.WorkerTableData.FromString(found)
    return None if worker.is_alive else int(worker.exit_type)


def _sentence(work: str, number: int, *, out_of_memory: bool) -> str:
    if out_of_memory:
        return (
            f"{work}: {number} processes in a row were ended, since their machine ran out of memory; use machines with "
            "more, or start Ray with fewer CPUs (ray start --num-cpus), so that fewer processes share it"
        )
    return (
        f"{work}: {number} processes in a row were lost; Ray's logs on their machine may say why, and where they don't "
        "look at its memory first"
    )
