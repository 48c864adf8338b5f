"""Joins the Ray cluster that runs on this machine, or starts a local one with its dashboard."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from imbvlm.errors import ImbvlmError

_ANSWER_SECONDS = 5.0


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
    """Within, Ray is connected; a cluster that was started here is stopped afterwards.

    Raises ImbvlmError where RAY_ADDRESS names a cluster that doesn't answer.
    """
    if ray.is_initialized():
        yield _describe(started_here=False)
        return
    _check_address()
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
    """The cluster that a sweep would join, or None; starts nothing.

    Raises ImbvlmError where RAY_ADDRESS names one that doesn't answer, RuntimeError where its versions aren't ours.
    """
    if ray.is_initialized():
        return _describe(started_here=False)
    _check_address()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        return None
    try:
        return _describe(started_here=False)
    finally:
        ray.shutdown()


def _check_address() -> None:
    """Ray ends the whole process, without a word, where nothing listens at RAY_ADDRESS."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        raise ImbvlmError(
            f"RAY_ADDRESS is {address}, and no cluster answers there ({error}); unset it, or start the cluster"
        ) from None


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
