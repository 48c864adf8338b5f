"""Check that every machine of a cluster sees a folder."""

from __future__ import annotations

import socket
import time
import uuid

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError

_PROBE_SECONDS = 120.0


def nodes_without_access(folder: str) -> list[str]:
    """A sentence for each node that doesn't see a file that this process writes to a folder, or can't write there.

    Raises StorageError where this process can't write there itself.
    """
    name = f".probe-{uuid.uuid4().hex}"
    probe = storage.join(folder, name)
    storage.write_bytes(probe, name.encode())
    try:
        answers = {
            node["NodeID"]: ray.remote(num_cpus=0, max_retries=1)(_answer_probe)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(probe)
            for node in ray.nodes()
            if node["Alive"]
        }
        results, deadline = [], time.monotonic() + _PROBE_SECONDS
        for node_id, answer in answers.items():
            try:
                results.append(ray.get(answer, timeout=max(0.0, deadline - time.monotonic())))
            except RayError as error:
                # A machine that is lost meanwhile does not count.
                node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
                if node["Alive"]:
                    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                    results.append((node["NodeManagerHostname"], "", f"a task there gives no answer ({last[:300]})"))
        return [
            f"{host}: {problem or 'what it writes there is not seen here'}"
            for host, written, problem in results
            if problem or not storage.exists(written)
        ]
    finally:
        for file in storage.list_files(folder):
            if file.startswith(name):
                storage.delete(storage.join(folder, file))


def _answer_probe(probe: str) -> tuple[str, str, str]:
    """Read the probe and write an answer next to it; returns this node's name, the answer, and the problem if any."""
    host, answer = socket.gethostname(), f"{probe}-{uuid.uuid4().hex}"
    try:
        if not storage.exists(probe):
            return host, answer, "what is written there isn't seen"
        storage.write_bytes(answer, b"seen")
    except ImbvlmError as error:
        return host, answer, str(error)
    return host, answer, ""
