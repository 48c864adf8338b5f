"""Joins the Ray cluster that runs on this machine, or starts a local one with its dashboard."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Cluster:
    """What a sweep may use: the dashboard, CPUs and GPUs in all and of each machine, whether we started it."""

    dashboard: str
    num_cpus: float
    num_gpus: float
    started_here: bool
    nodes: tuple[tuple[float, float], ...]


@contextmanager
def connected() -> Iterator[Cluster]:
    """Within, Ray is connected; a cluster that was started here is stopped afterwards."""
    if ray.is_initialized():
        yield _describe(started_here=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Ray's accelerator probing warns about a change of default on every start otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
        started = False
    except ConnectionError:
        # With the dashboard: without it Tune never frees the workers of a stopped Ray Train trial.
        ray.init(include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False, logging_level=logging.WARNING)
        started = True
    try:
        yield _describe(started_here=started)
    finally:
        ray.shutdown()


def running_cluster() -> Cluster | None:
    """The cluster that a sweep would join, or None; starts nothing. Raises RuntimeError where it can't be joined."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return _describe(started_here=False)
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        if os.environ.get("RAY_ADDRESS"):
            raise RuntimeError(f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']}, and nothing answers there") from error
        return None
    try:
        return _describe(started_here=False)
    finally:
        ray.shutdown()


def _describe(*, started_here: bool) -> Cluster:
    resources = ray.cluster_resources()
    url = ray._private.worker.get_dashboard_url() or ""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(
        f"http://{url}" if url else "",
        resources.get("CPU", 0.0),
        resources.get("GPU", 0.0),
        started_here,
        tuple((machine.get("CPU", 0.0), machine.get("GPU", 0.0)) for machine in machines),
    )
