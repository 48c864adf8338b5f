"""Records that processes of one Ray job keep for each other: lists of values by key, in an actor beside the driver."""

from __future__ import annotations

from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# The actor answers in a millisecond. Ray's calls wait forever for a machine that no longer answers.
_ANSWER_SECONDS = 10.0


class _Values:
    def __init__(self) -> None:
        self._values: dict[str, list[bytes]] = {}

    def add(self, key: str, value: bytes) -> list[bytes]:
        values = self._values.setdefault(key, [])
        values.append(value)
        return values

    def get(self, key: str) -> list[bytes]:
        return self._values.get(key, [])

    def delete(self, key: str) -> None:
        self._values.pop(key, None)


class JobRecords:
    """A handle of the actor, which may be pickled. A lost actor has no values, and adding one is without effect.

    The actor is not restarted: on a machine without memory Ray kills what it may restart before all else. It gets
    values as bytes: to unpickle a handle of a trial's actor it would import the trial's libraries for seconds.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def open(cls) -> JobRecords:
        """Records of this job; its first caller, the driver, starts the actor on its own machine."""
        here = ray.get_runtime_context()
        on_this_node = NodeAffinitySchedulingStrategy(here.get_node_id(), soft=False)
        options = {"num_cpus": 0, "name": f"imbvlm-records-{here.get_job_id()}", "get_if_exists": True}
        return cls(ray.remote(_Values).options(**options, scheduling_strategy=on_this_node).remote())

    def add(self, key: str, value: Any) -> list[Any]:
        """Append a value to a key's list, and return the list."""
        return self._ask("add", key, cloudpickle.dumps(value))

    def get(self, key: str) -> list[Any]:
        """A key's values."""
        return self._ask("get", key)

    def delete(self, key: str) -> None:
        """Delete a key; returns at once."""
        self._actor.delete.remote(key)

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        try:
            values = ray.get(getattr(self._actor, method).remote(*arguments), timeout=_ANSWER_SECONDS)
        except (RayActorError, OutOfMemoryError, GetTimeoutError):
            return []
        return [cloudpickle.loads(value) for value in values]


def process_key(trial_id: str) -> str:
    """The key of the actors in which a trial has run."""
    return f"process/{trial_id}"


def workers_key(trial_id: str) -> str:
    """The key of the placement groups of a trial's Train workers."""
    return f"workers/{trial_id}"


def record_process(trial_id: str) -> None:
    """Record the calling actor as a trial's process, so that the driver can end it."""
    JobRecords.open().add(process_key(trial_id), ray.get_runtime_context().current_actor)


def record_workers(trial_id: str) -> None:
    """Record the calling worker's placement group as a trial's, so that the driver can free it."""
    JobRecords.open().add(workers_key(trial_id), get_current_placement_group())
