"""CPUs, GPUs and machines of the connected cluster."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import ray_constants
from ray.experimental import internal_kv

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.yaml_file import read_foreign_yaml

# Where `ray up` leaves the cluster's file on the head.
BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"
# Where the head's machine doesn't know it, this says which workers may come: [[count, CPUs, GPUs], ...].
AUTOSCALER_SETTING = "IMBVLM_AUTOSCALER"


@dataclass(frozen=True)
class Cluster:
    """What a sweep may use: the dashboard, CPUs and GPUs in all and of each machine, whether we started it.

    `max_nodes` has the machines when an autoscaler has brought all that it may; without one they are `nodes`.
    """

    dashboard: str
    num_cpus: float
    num_gpus: float
    started_here: bool
    nodes: tuple[tuple[float, float], ...]
    max_nodes: tuple[tuple[float, float], ...]

    @property
    def can_grow(self) -> bool:
        return self.max_nodes != self.nodes

    @property
    def max_cpus(self) -> float:
        """CPUs of all machines when it has grown."""
        return sum(cpus for cpus, _ in self.max_nodes)

    @property
    def max_gpus(self) -> float:
        """GPUs of all machines when it has grown."""
        return sum(gpus for _, gpus in self.max_nodes)


def ray_gpus() -> int | None:
    """GPUs of the connected cluster when it has grown as far as it may; None where none is connected."""
    return int(connected_cluster().max_gpus) if ray.is_initialized() else None


def is_single_node() -> bool:
    """Whether what runs runs on this machine: no cluster is connected, or one of a single node."""
    return not ray.is_initialized() or sum(bool(node["Alive"]) for node in ray.nodes()) < 2


def has_many_machines() -> bool:
    """Whether a cluster is connected that has, or may grow to, more machines than one."""
    return ray.is_initialized() and len(connected_cluster().max_nodes) > 1


def _started_here() -> bool:
    """Whether the connected cluster was started by this process."""
    return bool(ray._private.worker._global_node.is_head())


def connected_cluster() -> Cluster:
    """The connected cluster as it is by now."""
    resources, started_here = ray.cluster_resources(), _started_here()
    url = ray._private.worker.get_dashboard_url() or ""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((one.get("CPU", 0.0), one.get("GPU", 0.0)) for one in alive)
    heads = [node for node, one in zip(nodes, alive, strict=True) if "node:__internal_head__" in one]
    workers = [] if started_here else _autoscaled_workers()
    return Cluster(
        f"http://{url}" if url else "",
        resources.get("CPU", 0.0),
        resources.get("GPU", 0.0),
        started_here,
        nodes,
        (*heads, *workers) if workers else nodes,
    )


def _autoscaled_workers() -> list[tuple[float, float]]:
    """CPUs and GPUs of each worker that the cluster's autoscaler may start; the largest, where not all may at once.

    Ray keeps its limits only in the file from which `ray up` started the head; on Kubernetes they are in a setting.
    """
    told = os.environ.get(AUTOSCALER_SETTING)
    if told:
        try:
            return [(float(cpus), float(gpus)) for count, cpus, gpus in json.loads(told) for _ in range(count)]
        except (ValueError, TypeError):
            example = "[[8, 16, 1]] for 8 workers of 16 CPUs and a GPU"
            raise ImbvlmError(f"{AUTOSCALER_SETTING} is {told!r}; it should look like {example}") from None
    runs = internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS.encode())
    path = Path(BOOTSTRAP_FILE).expanduser()
    if not runs or not path.exists():
        return []
    config = read_foreign_yaml(path).data
    most = int(config.get("max_workers", 0))
    found = [
        (float(resources.get("CPU", 0)), float(resources.get("GPU", 0)))
        for name, node_type in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type") and (resources := node_type.get("resources"))
        for _ in range(min(most, int(node_type.get("max_workers", most))))
    ]
    return sorted(found, key=lambda node: (node[1], node[0]), reverse=True)[:most]
