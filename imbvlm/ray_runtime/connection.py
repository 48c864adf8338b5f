"""Join the Ray cluster that runs on this machine, or start a local one with its dashboard."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import ray
from ray._private import ray_constants, services

from imbvlm.base import interrupts
from imbvlm.base.console import LastWord
from imbvlm.base.errors import ImbvlmError
from imbvlm.ray_runtime.capacity_notice import ended_when
from imbvlm.ray_runtime.cluster_resources import Cluster, _started_here, connected_cluster

# Read by glibc where a process begins; others ignore it. Blocks of up to 64 MB come from huge pages, of which as much
# is kept when it is free. Else each tensor of a step takes new small pages, a tenth to a half of a decoder's time.
MALLOC_SETTING = "GLIBC_TUNABLES"
HUGE_PAGES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 64 * 2**20, "trim_threshold": 64 * 2**20}.items()
)
LOOPBACK = ("127.0.0.1", "localhost")
_ANSWER_SECONDS = 5.0
# Ray tries for a minute to reach a head that is gone, since another may be started there; then it ends this process.
_HEAD_SECONDS, _HEAD_LOOK_SECONDS = 45.0, 5.0
_ASKED_SECONDS = 15.0
# What no cluster goes on without, by Ray's names of its processes.
_VITAL = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)

Result = TypeVar("Result")


@contextmanager
def ray_session(last_word: LastWord | None = None) -> Iterator[Cluster]:
    """Within, Ray is connected; a cluster that was started here is stopped afterwards.

    Where the cluster is gone meanwhile, the process ends with code 1 and a last word, by default on standard error.
    Raises ImbvlmError where RAY_ADDRESS names a cluster that doesn't answer or refuses, or names none of several.
    """
    if ray.is_initialized():
        yield connected_cluster()
        return
    _check_address()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Ray's accelerator probing warns about a change of default on every start otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address, watch = _address_that_answers(), _Watch()
    try:
        # Ray may end this process without a word also while it connects.
        with ended_when(watch.lost, last_word or LastWord()):
            if address is None:
                _start_here()
            else:
                _join(address, logging.WARNING, runtime_env=_runtime_env(address))
            watch.begin()
            # Ray may have made nothing of it meanwhile.
            interrupts.check()
            yield connected_cluster()
    finally:
        # After SIGTERM, which Ray's processes may have had too, they end with this one: without them this would hang.
        if (signals := interrupts.current()) is None or signals.received is not signal.SIGTERM:
            ray.shutdown()


class _Watch:
    """Sees whether the connected cluster is gone: processes that were started here, and whether its head answers."""

    def __init__(self) -> None:
        self._ended_at: float | None = None
        self._is_connected = False

    def begin(self) -> None:
        """From now on; Ray is connected."""
        self._is_own, self._address = _started_here(), ray.get_runtime_context().gcs_address
        self._heard = self._asked = time.monotonic()
        self._knows_head = _answers(self._address)
        self._is_connected = True

    def lost(self, failed: bool) -> str | None:
        """A sentence once it is gone, or is likely to be the cause of an error that has come."""
        return self._lost_process(failed) or self._lost_head(failed) if self._is_connected else None

    def _lost_process(self, failed: bool) -> str | None:
        # A cluster that was joined has no process that this one started.
        dead = [pair for pair in ray._private.worker._global_node.dead_processes() if pair[0] in _VITAL]
        if not dead:
            return None
        (name, process), now = dead[0], time.monotonic()
        self._ended_at = self._ended_at or now
        code = process.returncode
        # Asked to end, perhaps by what asks all processes of a job or service: this one has its own way to end then.
        if code in (0, -signal.SIGTERM) and not failed and now - self._ended_at < _ASKED_SECONDS:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"has ended with code {code}"
        return (
            f"Ray's {name} on this machine {how}, and nothing runs on without it; its logs are in "
            "/tmp/ray/session_latest/logs, and where they don't say why look at this machine's memory"
        )

    def _lost_head(self, failed: bool) -> str | None:
        now = time.monotonic()
        if not self._knows_head or (now - self._asked < _HEAD_LOOK_SECONDS and not failed):
            return None
        self._asked = now
        if _answers(self._address):
            self._heard = now
            return None
        if now - self._heard < _HEAD_SECONDS and not failed:
            return None
        fix = "" if self._is_own else "; start the cluster again"
        return f"nothing answers at {self._address}, where the Ray cluster's head was{fix}"


def _start_here() -> None:
    """A cluster of this machine, which ends with this process.

    With the dashboard: without it Tune never frees the workers of a stopped Ray Train trial.
    """
    try:
        with _own_signals(), _on_loopback(), _unless_set(MALLOC_SETTING, HUGE_PAGES):
            ray.init(
                address="local",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    except Exception as error:
        # Ray has no word of its own for it: a bare Exception, where it took a minute to no end.
        raise ImbvlmError(
            f"Ray can't be started on this machine: {str(error).rstrip('.')}. Where it is busy with other work try "
            "again later; Ray's logs are in /tmp/ray"
        ) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within, a cluster that is started listens on no address of the network, unless Ray's setting asks for it.

    Where Ray expects no other machines, as on Windows and macOS, that is its default; elsewhere all of its ports but
    the dashboard's are open. It reads the setting when it is imported, and its processes do so again.
    """
    expected = ray_constants.ENABLE_RAY_CLUSTER
    with _unless_set(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0") as is_ours:
        ray_constants.ENABLE_RAY_CLUSTER = expected and not is_ours
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = expected


@contextmanager
def _own_signals() -> Iterator[None]:
    """Within, Ray is connected and SIGTERM stays with this process's handler.

    Ray sets two in Python, which end the process without a word, and one of its own in C++, which ends it by SIGABRT.
    """
    ours, set_handler = interrupts.current(), ray._private.utils.set_sigterm_handler
    if ours is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = set_handler
        ours.own()


@contextmanager
def _unless_set(setting: str, value: str) -> Iterator[bool]:
    """Within, the environment has a value for a setting, unless it has the user's: whether it is ours."""
    if setting in os.environ:
        yield False
        return
    os.environ[setting] = value
    try:
        yield True
    finally:
        del os.environ[setting]


@contextmanager
def on_this_machine() -> Iterator[None]:
    """Within, a running cluster is joined only where RAY_ADDRESS names it or it is connected already."""
    with _unless_set("RAY_ADDRESS", "local"):
        yield


def run_on_worker(function: Callable[..., Result], *arguments: Any, num_cpus: float, num_gpus: float) -> Result:
    """A call of a module's function on a machine of the connected cluster that has so many CPUs and GPUs free."""
    return ray.get(ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(function).remote(*arguments))


def owns_machine() -> bool:
    """Whether what runs shares this machine with no cluster's work: none is connected or would be, but its own."""
    return _started_here() if ray.is_initialized() else _address_that_answers() is None


def find_cluster() -> Cluster | None:
    """The cluster that a sweep would join, or None; starts nothing.

    Raises ImbvlmError where RAY_ADDRESS names one that doesn't answer, RuntimeError where its versions aren't ours.
    """
    if ray.is_initialized():
        return connected_cluster()
    _check_address()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = _address_that_answers()
    if address is None:
        return None
    _join(address, logging.ERROR)
    try:
        return connected_cluster()
    finally:
        ray.shutdown()


def _join(address: str, logging_level: int, **settings: Any) -> None:
    """Connect to the cluster that answers there; Ray looks for a token by itself only where no address is given."""
    try:
        with _own_signals(), _on_loopback() if address.rpartition(":")[0] in LOOPBACK else nullcontext():
            ray.init(address="auto", log_to_driver=False, logging_level=logging_level, **settings)
    except ConnectionError as error:
        mend = "look at its logs, or set RAY_ADDRESS=local for a cluster of the sweep's own"
        if "InvalidAuthToken" in str(error.__context__):
            mend = "it wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN where ~/.ray/auth_token isn't it"
        raise ImbvlmError(f"the Ray cluster can't be joined: {error}; {mend}") from None


def _address_that_answers() -> str | None:
    """Where the cluster listens that Ray would join, or None: at a dead one's address it tries for minutes.

    For loopback Ray takes this machine's address on the network, on which a cluster needn't listen.
    Raises ImbvlmError where RAY_ADDRESS names a Ray client's.
    """
    try:
        found = services.get_ray_address_from_environment("auto", None)
        if found.startswith("ray://"):
            raise ImbvlmError(
                f"RAY_ADDRESS is {found}, and a sweep can't run behind Ray's client: run it on a machine of the "
                "cluster, by `ray submit` or `ray job submit`, or unset RAY_ADDRESS for a cluster of its own"
            )
        on_network = services.canonicalize_bootstrap_address(found)
    except ConnectionError:
        return None
    if on_network is None:
        return None
    return next(filter(_answers, dict.fromkeys((on_network, found))), None)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not port:
        return False
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _clusters_here() -> list[str]:
    """Addresses of the clusters whose heads run on this machine and answer."""
    return sorted(filter(_answers, services.find_gcs_addresses()))


def _runtime_env(address: str) -> dict[str, Any] | None:
    """Beside another cluster on this machine, its processes are told which one is theirs.

    Ray Train's own cleaner would ask the other one, and never free the workers of a trial that was stopped.
    """
    if len(_clusters_here()) < 2:
        return None
    return {"env_vars": {"RAY_ADDRESS": address}}


def _check_address() -> None:
    """Ray ends the process without a word where nothing listens at RAY_ADDRESS, and takes any of several clusters."""
    address = os.environ.get("RAY_ADDRESS", "")
    running = [] if address else _clusters_here()
    if len(running) > 1:
        raise ImbvlmError(
            f"{len(running)} Ray clusters run on this machine ({', '.join(running)}): set RAY_ADDRESS to that which is "
            "meant, or to local for one of the sweep's own"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        raise ImbvlmError(
            f"RAY_ADDRESS is {address}, and no cluster answers there ({error}); unset it, or start the cluster"
        ) from None


@contextmanager
def existing_cluster() -> Iterator[None]:
    """Within, a cluster that runs already is connected: what it can do decides, not this machine. None is started."""
    with nullcontext() if owns_machine() else ray_session():
        yield
