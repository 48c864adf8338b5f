"""Join the Ray cluster that runs on this machine, or start a local one with its dashboard."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import ray

from imbvlm.base import interrupts
from imbvlm.base.console import LAST_WORD, LastWord
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.base.plugins import active_plugins, call_with
from imbvlm.ray_runtime.capacity_notice import ended_when
from imbvlm.ray_runtime.cluster_resources import Cluster, connected_cluster
from imbvlm.ray_runtime.environment import variables_set
from imbvlm.ray_runtime.ray_private import (
    OPEN_PORTS_SETTING,
    address_on_network,
    address_to_join,
    dead_processes,
    is_own_cluster,
    local_addresses,
    num_other_drivers,
    ports_closed,
    sigterm_kept,
)

# glibc reads it at a process's start; other C libraries ignore it. Blocks of up to 64 MB come from huge pages, and as
# much freed memory is kept. Otherwise each tensor of a step takes new small pages, 10 to 50 % of a decoder's time.
MALLOC_SETTING = "GLIBC_TUNABLES"
HUGE_PAGES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 64 * 2**20, "trim_threshold": 64 * 2**20}.items()
)
LOOPBACK = ("127.0.0.1", "localhost")
_ANSWER_SECONDS = 5.0
# Ray tries for a minute to reach a lost head, where another may be started, and then ends this process.
_HEAD_SECONDS, _HEAD_LOOK_SECONDS = 45.0, 5.0
_ASKED_SECONDS = 15.0
_OTHERS_SECONDS = 1.0
# Ray's names of the processes that a cluster needs.
_VITAL = ("raylet", "gcs_server")

Result = TypeVar("Result")


@contextmanager
def ray_session(
    last_word: LastWord | None = None, notify_waiting: Callable[[str], None] | None = None
) -> Iterator[Cluster]:
    """Within, Ray is connected; a cluster that this process started is stopped afterwards.

    With `notify_waiting` it is stopped only when the commands that have joined it have ended, and `notify_waiting` gets
    a sentence about them; Ctrl-C or an error stops it at once.

    If the cluster is lost meanwhile, the process ends with code 1 and a last sentence, by default on standard error.
    Raises ImbvlmError where RAY_ADDRESS names a cluster that doesn't answer or denies access, or none of several.
    """
    if ray.is_initialized():
        yield connected_cluster()
        return
    _check_address()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Without it Ray warns at each start about a changed default of its accelerator detection.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address, watch = _address_that_answers(), _Watch()
    try:
        # Ray may end this process without a message while it connects, too.
        with ended_when(watch.lost, last_word or LAST_WORD.get()):
            if address is None:
                _start_here()
            else:
                _join(address, logging.WARNING)
            watch.begin()
            # Ray may have swallowed a signal meanwhile.
            interrupts.check()
            yield connected_cluster()
            if notify_waiting is not None and address is None:
                _wait_for_others(notify_waiting)
    finally:
        # Ray's processes may have had a SIGTERM, too, and end by themselves; without them shutdown would hang.
        if (signals := interrupts.current()) is None or signals.received is not signal.SIGTERM:
            ray.shutdown()


def _wait_for_others(notify: Callable[[str], None]) -> None:
    """Wait while other drivers use the cluster, until Ctrl-C: it would take their work with it."""
    num_told = 0
    try:
        while num_others := num_other_drivers():
            if num_others > num_told:
                others = pluralize(num_others, "other command")
                notify(f"all done; Ray stays for {others} on this machine, and Ctrl-C ends it with them")
                num_told = num_others
            interrupts.sleep(_OTHERS_SECONDS)
    except KeyboardInterrupt:
        signals = interrupts.current()
        if signals is None or signals.received is signal.SIGTERM:
            raise
        # This command's own work is done.
        signals.forget()


class _Watch:
    """Detects a lost cluster, by Ray processes that this process started and by whether the head answers."""

    def __init__(self) -> None:
        self._ended_at: float | None = None
        self._is_connected = False

    def begin(self) -> None:
        """Start to watch; Ray must be connected."""
        self._is_own, self._address = is_own_cluster(), ray.get_runtime_context().gcs_address
        self._heard = self._asked = time.monotonic()
        self._knows_head = _answers(self._address)
        self._is_connected = True

    def lost(self, failed: bool) -> str | None:
        """A sentence when the cluster is lost; `failed` asks whether that is the likely cause of an error."""
        return self._lost_process(failed) or self._lost_head(failed) if self._is_connected else None

    def _lost_process(self, failed: bool) -> str | None:
        # No process of a joined cluster was started by this one.
        dead = [pair for pair in dead_processes() if pair[0] in _VITAL]
        if not dead:
            return None
        (name, process), now = dead[0], time.monotonic()
        self._ended_at = self._ended_at or now
        code = process.returncode
        # A job or service may have ended all its processes by SIGTERM; this one then ends by its own handler.
        if code in (0, -signal.SIGTERM) and not failed and now - self._ended_at < _ASKED_SECONDS:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"has ended with code {code}"
        return (
            f"Ray's {name} on this machine {how}, and nothing runs without it; its logs are in "
            "/tmp/ray/session_latest/logs; without a reason there check this machine's memory"
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
    """Start a cluster of this machine, which ends with this process.

    It needs the dashboard: without it Tune never frees the workers of a stopped Ray Train trial.
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
        # Ray raises a bare Exception after a timeout of a minute, and may add twenty lines of a log.
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
        raise ImbvlmError(
            f"Ray can't be started on this machine: {cause}. If it is busy with other work try again later; Ray's logs "
            "are in /tmp/ray."
        ) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within, a started cluster listens on loopback only, unless the user's setting of Ray says otherwise.

    That is Ray's default on Windows and macOS, where it expects no other machines; elsewhere all its ports but the
    dashboard's are open. Ray reads the setting when it is imported, and its processes do so again.
    """
    with ports_closed() as holds, _unless_set(OPEN_PORTS_SETTING, "0") if holds else nullcontext():
        yield


@contextmanager
def _own_signals() -> Iterator[None]:
    """Within, Ray connects, and this process's handler keeps SIGTERM.

    Ray sets two handlers in Python, which end the process without a message, and one in C++, which ends it by SIGABRT.
    """
    ours = interrupts.current()
    if ours is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        with sigterm_kept():
            yield
    finally:
        ours.own()


def _unless_set(setting: str, value: str) -> AbstractContextManager[None]:
    """Within, a setting has a value in the environment, unless the user has set it."""
    return nullcontext() if setting in os.environ else variables_set({setting: value})


@contextmanager
def on_this_machine() -> Iterator[None]:
    """Within, a running cluster is joined only if RAY_ADDRESS names it or it is connected already."""
    with _unless_set("RAY_ADDRESS", "local"):
        yield


def run_on_worker(function: Callable[..., Result], *arguments: Any, num_cpus: float, num_gpus: float) -> Result:
    """The result of a module's function on a machine of the connected cluster with free CPUs and GPUs."""
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(call_with)
    return ray.get(remote.remote(active_plugins(), function, *arguments))


def owns_machine() -> bool:
    """Whether this process has the machine to itself: no cluster is or would be connected but its own."""
    return is_own_cluster() if ray.is_initialized() else _address_that_answers() is None


def find_cluster() -> Cluster | None:
    """The cluster that a sweep would join, or None; starts nothing.

    Raises ImbvlmError where RAY_ADDRESS names one that doesn't answer, RuntimeError for one of other versions.
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


def _join(address: str, logging_level: int) -> None:
    """Connect to the cluster at an address that answers; Ray finds its token only if it gets no address itself."""
    try:
        with _own_signals(), _on_loopback() if address.rpartition(":")[0] in LOOPBACK else nullcontext():
            ray.init(address="auto", log_to_driver=False, logging_level=logging_level)
    except ConnectionError as error:
        fix = "read its logs, or set RAY_ADDRESS=local for a cluster of the sweep's own"
        if "InvalidAuthToken" in str(error.__context__):
            fix = "it needs its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN if ~/.ray/auth_token isn't it"
        raise ImbvlmError(f"the Ray cluster can't be joined: {error}; {fix}.") from None


def _address_that_answers() -> str | None:
    """The address of the cluster that Ray would join, if it answers: Ray tries a dead one's address for minutes.

    Ray replaces loopback by this machine's address on the network, where a cluster may not listen.
    Raises ImbvlmError where RAY_ADDRESS is a Ray client's address.
    """
    try:
        address = address_to_join()
        if address.startswith("ray://"):
            raise ImbvlmError(
                f"RAY_ADDRESS is {address}, and a sweep can't run behind Ray's client. Run it on a machine of the "
                "cluster, by `ray submit` or `ray job submit`, or unset RAY_ADDRESS for a cluster of its own."
            )
        on_network = address_on_network(address)
    except ConnectionError:
        return None
    if on_network is None:
        return None
    return next(filter(_answers, dict.fromkeys((on_network, address))), None)


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
    return sorted(filter(_answers, local_addresses()))


def _check_address() -> None:
    """Raise ImbvlmError for a RAY_ADDRESS that doesn't answer, and for several clusters without one.

    Ray would end the process without a message, or join any of the clusters.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    running = [] if address else _clusters_here()
    if len(running) > 1:
        raise ImbvlmError(
            f"{len(running)} Ray clusters run on this machine ({', '.join(running)}). Set RAY_ADDRESS to one of them, "
            "or to local for one of the sweep's own."
        )
    location = address.removeprefix("ray://")
    if location.rpartition(":")[2].isdigit() and not _answers(location):
        raise ImbvlmError(f"RAY_ADDRESS is {address}, and no cluster answers there. Unset it, or start the cluster.")


@contextmanager
def existing_cluster() -> Iterator[None]:
    """Within, a running cluster is connected, so that its resources count and not this machine's; starts none."""
    with nullcontext() if owns_machine() else ray_session():
        yield
