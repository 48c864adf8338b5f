"""CPUs, GPUs and machines of the connected cluster."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import ray

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.yaml_file import read_foreign_yaml
from imbvlm.ray_runtime.ray_private import dashboard_address, has_autoscaler, is_own_cluster

# Path of the cluster's file on the head after `ray up`.
BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"
# Environment variable with the workers that may be added, if the head has no such file: [[count, CPUs, GPUs], ...].
AUTOSCALER_SETTING = "IMBVLM_AUTOSCALER"


@dataclass(frozen=True)
class Cluster:
    """A cluster's dashboard, its CPUs and GPUs in total and by machine, and whether this process started it.

    `max_nodes` are the machines once an autoscaler has added all that it may; without one they are `nodes`.
    """

    dashboard: str
    num_cpus: float
    num_gpus: float
    is_own: bool
    nodes: tuple[tuple[float, float], ...]
    max_nodes: tuple[tuple[float, float], ...]

    @property
    def can_grow(self) -> bool:
        """Whether an autoscaler may add machines."""
        return self.max_nodes != self.nodes

    @property
    def max_cpus(self) -> float:
        """CPUs of `max_nodes`."""
        return sum(cpus for cpus, _ in self.max_nodes)

    @property
    def max_gpus(self) -> float:
        """GPUs of `max_nodes`."""
        return sum(gpus for _, gpus in self.max_nodes)


def ray_gpus() -> int | None:
    """GPUs of the connected cluster's `max_nodes`; None without a cluster."""
    return int(connected_cluster().max_gpus) if ray.is_initialized() else None


def is_single_node() -> bool:
    """Whether all work runs on this machine: no cluster is connected, or one with a single node."""
    return not ray.is_initialized() or sum(bool(node["Alive"]) for node in ray.nodes()) < 2


def has_many_machines() -> bool:
    """Whether a cluster is connected that has, or may get, more than one machine."""
    return ray.is_initialized() and len(connected_cluster().max_nodes) > 1


def connected_cluster() -> Cluster:
    """The present state of the connected cluster."""
    total, is_own = ray.cluster_resources(), is_own_cluster()
    address = dashboard_address()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive)
    heads = [node for node, resources in zip(nodes, alive, strict=True) if "node:__internal_head__" in resources]
    workers = [] if is_own else _autoscaled_workers()
    return Cluster(
        f"http://{address}" if address else "",
        total.get("CPU", 0.0),
        total.get("GPU", 0.0),
        is_own,
        nodes,
        (*heads, *workers) if workers else nodes,
    )


def _autoscaled_workers() -> list[tuple[float, float]]:
    """CPUs and GPUs of each worker that the cluster's autoscaler may start; the largest ones, if not all fit its limit.

    Ray has the limits only in the file from which `ray up` started the head; on Kubernetes they are in a variable.
    """
    text = os.environ.get(AUTOSCALER_SETTING)
    if text:
        try:
            return [(float(cpus), float(gpus)) for count, cpus, gpus in json.loads(text) for _ in range(count)]
        except (ValueError, TypeError):
            example = "[[8, 16, 1]] for 8 workers of 16 CPUs and a GPU"
            raise ImbvlmError(f"{AUTOSCALER_SETTING} is {text!r}; it should look like {example}.") from None
    path = Path(BOOTSTRAP_FILE).expanduser()
    if not path.exists() or not has_autoscaler():
        return []
    config = read_foreign_yaml(path).data
    max_workers = int(config.get("max_workers", 0))
    workers = [
        (float(resources.get("CPU", 0)), float(resources.get("GPU", 0)))
        for name, node_type in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type") and (resources := node_type.get("resources"))
        for _ in range(min(max_workers, int(node_type.get("max_workers", max_workers))))
    ]
    return sorted(workers, key=lambda node: (node[1], node[0]), reverse=True)[:max_workers]
