"""Joins the Ray cluster that runs on this machine, or starts a local one with its dashboard."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray._private import services

from imbvlm.errors import ImbvlmError

_ANSWER_SECONDS = 5.0

Result = TypeVar("Result")


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
    started = not _cluster_answers()
    if not started:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    else:
        # With the dashboard: without it Tune never frees the workers of a stopped Ray Train trial.
        ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield _describe(started_here=started)
    finally:
        ray.shutdown()


def call_on_worker(function: Callable[..., Result], *arguments: Any, num_cpus: float, num_gpus: float) -> Result:
    """A call of a module's function on a machine of the connected cluster that has so many CPUs and GPUs free."""
    return ray.get(ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(function).remote(*arguments))


def ray_gpus() -> int | None:
    """GPUs of the cluster that this process is connected to; None where it is connected to none."""
    return int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else None


def running_cluster() -> Cluster | None:
    """The cluster that a sweep would join, or None; starts nothing.

    Raises ImbvlmError where RAY_ADDRESS names one that doesn't answer, RuntimeError where its versions aren't ours.
    """
    if ray.is_initialized():
        return _describe(started_here=False)
    _check_address()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not _cluster_answers():
        return None
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    try:
        return _describe(started_here=False)
    finally:
        ray.shutdown()


def _cluster_answers() -> bool:
    """Whether something listens where Ray would join: at a dead cluster's address it tries for minutes."""
    try:
        address = services.canonicalize_bootstrap_address("auto") or ""
    except ConnectionError:
        return False
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


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
