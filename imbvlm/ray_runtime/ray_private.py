"""All private names of Ray that this package uses, each with a fallback for a version of Ray that lacks it."""

from __future__ import annotations

import importlib
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from imbvlm.base.schema import Tree
from imbvlm.ray_runtime.environment import variables_set

# The setting that Ray copies into ENABLE_RAY_CLUSTER when it is imported; its processes do so again.
OPEN_PORTS_SETTING = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# How the namespaces of Ray's own programs begin. Parts of the dashboard join when a page is opened, and stay.
_INTERNAL_NAMESPACES = "_ray_internal_"
_ADDRESS = "A running cluster is joined only if RAY_ADDRESS names it."
_AUTOSCALER = "A head with a launcher's file counts as autoscaled, unless IMBVLM_AUTOSCALER is set."
_ATTEMPTS = "Work at which processes are lost again and again is repeated without end."
_LAUNCHER = "Ray's launcher does not check the cluster file."
_MEMORY = "A trial that uses up a machine's memory may end the sweep, which a resume then continues."
# MODULE:ATTRIBUTE of each name, and what is missing without it.
NAMES: Mapping[str, tuple[str, str]] = {
    "is_head": (
        "ray._private.worker:_global_node.is_head",
        "A cluster that this process has started counts as one that was running already.",
    ),
    "dead_processes": (
        "ray._private.worker:_global_node.dead_processes",
        "A lost process of Ray is noticed only when the cluster no longer answers.",
    ),
    # The public list_jobs asks the cluster that RAY_ADDRESS names, also where another one is connected.
    "jobs": (
        "ray._private.worker:global_worker.gcs_client.get_all_job_info",
        "Commands that have joined this command's cluster end with it.",
    ),
    "dashboard": (
        "ray._private.worker:get_dashboard_url",
        "The dashboard's address is read by a second ray.init.",
    ),
    "local_addresses": (
        "ray._private.services:find_gcs_addresses",
        "Several clusters on this machine are not noticed.",
    ),
    "address_to_join": ("ray._private.services:get_ray_address_from_environment", _ADDRESS),
    "address_on_network": ("ray._private.services:canonicalize_bootstrap_address", _ADDRESS),
    "has_open_ports": (
        "ray._private.ray_constants:ENABLE_RAY_CLUSTER",
        f"A started cluster listens on the network, unless {OPEN_PORTS_SETTING}=0 is set.",
    ),
    "set_sigterm": (
        "ray._private.utils:set_sigterm_handler",
        "A SIGTERM while Ray starts ends this process without a message.",
    ),
    "stored_value": ("ray.experimental.internal_kv:_internal_kv_get", _AUTOSCALER),
    "put_value": ("ray.experimental.internal_kv:_internal_kv_put", _ATTEMPTS),
    "stored_keys": ("ray.experimental.internal_kv:_internal_kv_list", _ATTEMPTS),
    "delete_values": ("ray.experimental.internal_kv:_internal_kv_del", _ATTEMPTS),
    "autoscaler_key": ("ray._private.ray_constants:DEBUG_AUTOSCALING_STATUS", _AUTOSCALER),
    "prepare_launcher": ("ray.autoscaler._private.util:prepare_config", _LAUNCHER),
    "check_launcher": ("ray.autoscaler._private.util:validate_config", _LAUNCHER),
    "sent_variables": (
        "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE",
        "Ray logs the AWS keys of the environment.",
    ),
    "added_variables": (
        "ray.tune.execution.class_cache:DEFAULT_ENV_VARS",
        "Trials do not use the processes that Ray has started in advance.",
    ),
    "train_variables": (
        "ray.train.v2._internal.constants:ENV_VARS_TO_PROPAGATE",
        "With another cluster on a machine Ray Train's cleaners of ended trials stay, and workers are freed later.",
    ),
    "actor_manager": ("ray.tune.execution.tune_controller:RayActorManager", _MEMORY),
    "task_failed": ("ray.tune.execution.tune_controller:RayActorManager._actor_task_failed", _MEMORY),
}


def _private(key: str, fallback: Any) -> Any:
    """A private object of Ray, or the fallback with a warning, which Python shows once."""
    name, without = NAMES[key]
    module, _, attribute = name.partition(":")
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError):
        # Level 1 is this line, for all callers, so that Python shows each name once.
        warnings.warn(f"Ray {ray.__version__} has no {name}. {without}", RuntimeWarning, stacklevel=1)
        return fallback


@contextmanager
def _replaced(key: str, replace: Callable[[Any], Any]) -> Iterator[bool]:
    """Within, a global of Ray has the value of `replace(before)`; gives whether this version of Ray has it."""
    before = _private(key, None)
    if before is None:
        yield False
        return
    module, _, attribute = NAMES[key][0].partition(":")
    owner = importlib.import_module(module)
    setattr(owner, attribute, replace(before))
    try:
        yield True
    finally:
        setattr(owner, attribute, before)


def is_own_cluster() -> bool:
    """Whether the connected cluster was started by this process.

    A record of our own starts would miss a cluster that a notebook's own ray.init has started.
    """
    return bool(_private("is_head", lambda: False)())


def dead_processes() -> list[tuple[str, Any]]:
    """Name and Popen of each Ray process that this process started and that has ended; Ray must be connected."""
    return list(_private("dead_processes", list)())


def dashboard_address() -> str:
    """HOST:PORT of the connected cluster's dashboard, or an empty text.

    The public way is the fallback: ray.init sets Ray's SIGTERM handler at each call, and warns in a thread.
    """

    def reconnect() -> str | None:
        with sigterm_kept():
            return ray.init(ignore_reinit_error=True, configure_logging=False).dashboard_url

    return _private("dashboard", reconnect)() or ""


def num_other_drivers() -> int:
    """Programs beside this one that are connected to the cluster, without those of Ray's dashboard."""
    own, list_jobs = ray.get_runtime_context().get_job_id(), _private("jobs", lambda **options: {})
    jobs = list_jobs(skip_submission_job_info_field=True, skip_is_running_tasks_field=True).values()
    return sum(
        not job.is_dead and job.job_id.hex() != own and not job.config.ray_namespace.startswith(_INTERNAL_NAMESPACES)
        for job in jobs
    )


def local_addresses() -> set[str]:
    """Addresses of the clusters whose heads run on this machine."""
    return set(_private("local_addresses", set)())


def address_to_join() -> str:
    """The address of the cluster that Ray would join, or `local`. Raises ConnectionError without one."""
    setting = os.environ.get("RAY_ADDRESS", "")
    fallback = "local" if setting in ("", "auto") else setting
    return str(_private("address_to_join", lambda address, temp_dir: fallback)("auto", None))


def address_on_network(address: str) -> str | None:
    """The address with loopback replaced by this machine's address on the network; None for `local`."""
    on_network: str | None = _private("address_on_network", lambda text: None if text == "local" else text)(address)
    return on_network


def ports_closed() -> AbstractContextManager[bool]:
    """Within, Ray expects no other machines, unless the user's setting says otherwise; gives whether it does."""
    is_set = OPEN_PORTS_SETTING in os.environ
    return _replaced("has_open_ports", lambda expected: expected and is_set)


def sigterm_kept() -> AbstractContextManager[bool]:
    """Within, Ray does not replace the handler of SIGTERM; gives whether that holds."""
    return _replaced("set_sigterm", lambda before: lambda handler: None)


def has_autoscaler() -> bool:
    """Whether an autoscaler has reported its state to the connected cluster."""
    key = _private("autoscaler_key", None)
    return key is None or bool(_private("stored_value", lambda key: True)(key.encode()))


def add_record(path: str, name: str) -> list[str]:
    """Add a name below a path of the cluster's key-value store, and return all names there.

    The store is part of the cluster's head. An actor in its place was killed on a machine without memory.
    """
    _private("put_value", lambda key, value: None)(f"{path}/{name}", b"")
    keys = _private("stored_keys", lambda prefix: [])(f"{path}/")
    return [key.decode().removeprefix(f"{path}/") for key in keys]


def delete_records(path: str) -> None:
    """Delete the names below a path and its parts."""
    _private("delete_values", lambda key, del_by_prefix: None)(f"{path}/", del_by_prefix=True)


def check_launcher_file(tree: Tree) -> None:
    """Let Ray's cluster launcher check the content of its file; it raises errors of several types."""
    prepare, check = _private("prepare_launcher", None), _private("check_launcher", None)
    if prepare is not None and check is not None:
        check(prepare(tree))


@contextmanager
def tune_patches() -> Iterator[None]:
    """Within, globals of Tune have other values; afterwards, also after an error, they are as before."""
    is_patched = _private("task_failed", None) is not None
    with (
        # Tune sends these variables with each trial, and Ray logs them: AWS keys must not be among them.
        _replaced("sent_variables", lambda names: {name for name in names if not name.startswith("AWS_")}),
        # A variable for Lightning, which keeps trials out of the processes that Ray has started in advance.
        _replaced("added_variables", lambda variables: {}),
        _replaced("actor_manager", _surviving) if is_patched else nullcontext(),
    ):
        yield


@contextmanager
def address_sent(address: str) -> Iterator[None]:
    """Within, processes that Ray Train starts get the address of their cluster as RAY_ADDRESS.

    With another cluster on a machine Ray Train's cleaner fails, and never frees the workers of a stopped trial.
    """
    with (
        variables_set({"RAY_ADDRESS": address}),
        _replaced("train_variables", lambda names: {*names, "RAY_ADDRESS"}),
    ):
        yield


def _surviving(manager: type) -> type:
    """Tune's actor manager, for which a trial's process is lost whatever error Ray gives.

    Tune expects a dead process or an error in it. Ray gives another error for a process that it killed on a machine
    without memory, and Tune would end the whole sweep.
    """

    class SurvivingManager(manager):
        def _actor_task_failed(self, tracked_actor_task: object, exception: Exception) -> None:
            if not isinstance(exception, (RayActorError, RayTaskError)):
                exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
            super()._actor_task_failed(tracked_actor_task, exception)

    return SurvivingManager
