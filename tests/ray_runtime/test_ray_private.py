"""Private names of Ray: each is there and does what we take it for, and without it all else works."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apart import apart_with_ray

from imbvlm.ray_runtime import ray_private
from imbvlm.ray_runtime.cluster_launcher import launcher_problem
from imbvlm.ray_runtime.ray_private import NAMES

ROOT = Path(__file__).parents[2]


def owners(key: str) -> Iterator[tuple[Any, str]]:
    """Each object on the way to a name, the module first, and its attribute that leads on."""
    module, _, path = NAMES[key][0].partition(":")
    holder: Any = importlib.import_module(module)
    for attribute in path.split("."):
        yield holder, attribute
        holder = getattr(holder, attribute)


def owner(key: str) -> tuple[Any, str]:
    """The object with the attribute that a name ends with, and the attribute."""
    *_, last = owners(key)
    return last


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Takes a private name away, as another version of Ray may; gives what says so."""

    def take(key: str) -> Any:
        # What an object passes on for another one can't be taken away; the object can.
        steps = [(place, name) for holder, name in owners(key) for place in (type(holder), holder)]
        *_, removable = ((place, name) for place, name in steps if name in getattr(place, "__dict__", ()))
        monkeypatch.delattr(*removable)
        name, without = NAMES[key]
        return pytest.warns(RuntimeWarning, match=re.escape(f"has no {name}. {without}"))

    return take


@pytest.fixture(autouse=True)
def no_other_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Ray .* has no ", RuntimeWarning)
        yield


@pytest.mark.ray
@pytest.mark.parametrize("key", NAMES)
def test_this_version_of_ray_has_the_name(ray_cluster: str, key: str) -> None:
    assert hasattr(*owner(key))


def test_a_missing_name_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*owner("local_addresses"))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        assert [ray_private.local_addresses() for _ in range(3)] == [set()] * 3
    assert len(shown) == 1
    assert str(shown[0].message).endswith("Several clusters on this machine are not noticed.")


# ---------------------------------------------------------------------------------------- the connected cluster


@pytest.mark.ray
def test_the_cluster_of_this_process_is_its_own(ray_cluster: str, without: Callable[[str], Any]) -> None:
    assert ray_private.is_own_cluster()
    with without("is_head"):
        assert not ray_private.is_own_cluster()


@pytest.mark.ray
def test_processes_of_ray_that_have_ended_are_listed(ray_cluster: str, without: Callable[[str], Any]) -> None:
    from ray._private import ray_constants

    # The names by which a lost cluster is noticed.
    assert (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER) == ("raylet", "gcs_server")
    node, _ = owner("dead_processes")
    assert {"raylet", "gcs_server"} <= {name for name, _ in node.live_processes()}
    assert not {"raylet", "gcs_server"} & {name for name, _ in ray_private.dead_processes()}
    with without("dead_processes"):
        assert ray_private.dead_processes() == []


JOINS = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
print("joined", flush=True)
sys.stdin.readline()
"""


@pytest.mark.ray
def test_programs_count_while_they_are_connected_to_the_cluster(
    ray_cluster: str, without: Callable[[str], Any]
) -> None:
    """Also where RAY_ADDRESS says `local`, as for this process."""
    before = ray_private.num_other_drivers()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", JOINS, ray_cluster], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"joined\n"
        assert ray_private.num_other_drivers() == before + 1
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while ray_private.num_other_drivers() > before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with without("jobs"):
        assert ray_private.num_other_drivers() == 0


@pytest.mark.ray
def test_an_open_dashboard_is_no_program_beside(ray_cluster: str) -> None:
    """A sweep would wait for it without end."""
    before = ray_private.num_other_drivers()
    # The overview page asks for this, and a part of the dashboard joins the cluster for it.
    request = urllib.request.Request(f"http://{ray_private.dashboard_address()}/api/serve/applications/")
    token = Path("~/.ray/auth_token").expanduser()
    if token.exists():
        request.add_header("Authorization", f"Bearer {token.read_text().strip()}")
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=60)
    assert any("ServeHead" in job.entrypoint for job in value_of("jobs")().values())
    assert ray_private.num_other_drivers() == before


@pytest.mark.ray
def test_the_dashboard_is_found_with_the_handler_of_sigterm_as_it_was(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, before = ray_private.dashboard_address(), signal.getsignal(signal.SIGTERM)
    assert expected.startswith("127.0.0.1:")
    # Ray itself calls the function in ray.init: another version has it under another name.
    renamed = (f"{NAMES['dashboard'][0]}_of_another_version", NAMES["dashboard"][1])
    monkeypatch.setitem(ray_private.NAMES, "dashboard", renamed)
    with pytest.warns(RuntimeWarning, match="get_dashboard_url_of_another_version"):
        assert ray_private.dashboard_address() == expected
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.ray
def test_the_address_of_the_cluster_that_runs_here(
    ray_cluster: str, without: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_cluster in ray_private.local_addresses()
    assert ray_private.address_to_join() == ray_cluster
    with without("address_to_join"):
        assert ray_private.address_to_join() == ray_cluster
        monkeypatch.delenv("RAY_ADDRESS")
        assert ray_private.address_to_join() == "local"


def test_an_address_on_the_network(without: Callable[[str], Any]) -> None:
    assert ray_private.address_on_network("10.1.2.3:6379") == "10.1.2.3:6379"
    assert str(ray_private.address_on_network("127.0.0.1:6379")).endswith(":6379")
    assert ray_private.address_on_network("local") is None
    with without("address_on_network"):
        assert ray_private.address_on_network("127.0.0.1:6379") == "127.0.0.1:6379"
        assert ray_private.address_on_network("local") is None


@pytest.mark.ray
@pytest.mark.parametrize("key", ["stored_value", "autoscaler_key"])
def test_the_report_of_an_autoscaler(
    ray_cluster: str, without: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    from ray._private import ray_constants
    from ray.experimental import internal_kv

    # Each head without autoscaler v2 has a monitor that writes it.
    internal_kv._internal_kv_put(ray_constants.DEBUG_AUTOSCALING_STATUS.encode(), b"{}")
    assert ray_private.has_autoscaler()
    with monkeypatch.context() as other:
        other.setattr(ray_constants, "DEBUG_AUTOSCALING_STATUS", "imbvlm: nobody writes this")
        assert not ray_private.has_autoscaler()
    with without(key):
        assert ray_private.has_autoscaler()


@pytest.mark.ray
def test_records_of_a_path_are_names_once_each_until_they_are_deleted(ray_cluster: str) -> None:
    path = f"imbvlm-test/{os.getpid()}"
    assert ray_private.add_record(f"{path}/a", "first") == ["first"]
    assert sorted(ray_private.add_record(f"{path}/a", "second")) == ["first", "second"]
    assert sorted(ray_private.add_record(f"{path}/a", "second")) == ["first", "second"]
    assert ray_private.add_record(f"{path}/a b", "other") == ["other"]
    ray_private.delete_records(f"{path}/a")
    assert ray_private.add_record(f"{path}/a", "anew") == ["anew"]
    assert sorted(ray_private.add_record(f"{path}/a b", "more")) == ["more", "other"]
    ray_private.delete_records(path)
    assert ray_private.add_record(f"{path}/a b", "last") == ["last"]


@pytest.mark.ray
@pytest.mark.parametrize("key", ["put_value", "stored_keys", "delete_values"])
def test_without_the_store_nothing_is_limited(ray_cluster: str, without: Callable[[str], Any], key: str) -> None:
    path = f"imbvlm-test/without/{key}"
    with without(key):
        for number in range(3):
            ray_private.add_record(path, str(number))
            ray_private.delete_records(path)


# ------------------------------------------------------------------------------------------- globals and functions


def value_of(key: str) -> Any:
    return getattr(*owner(key))


def test_ports_are_closed_within_unless_the_user_says_otherwise(
    without: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ray_private.OPEN_PORTS_SETTING, raising=False)
    assert value_of("has_open_ports") is True
    with ray_private.ports_closed() as holds:
        assert holds
        assert value_of("has_open_ports") is False
    assert value_of("has_open_ports") is True
    monkeypatch.setenv(ray_private.OPEN_PORTS_SETTING, "1")
    with ray_private.ports_closed():
        assert value_of("has_open_ports") is True
    with without("has_open_ports"), ray_private.ports_closed() as holds:
        assert not holds


def test_ray_sets_no_handler_within(without: Callable[[str], Any]) -> None:
    before = value_of("set_sigterm")
    assert len(inspect.signature(before).parameters) == 1
    with ray_private.sigterm_kept():
        value_of("set_sigterm")(lambda *_: pytest.fail("it was set"))
        assert value_of("set_sigterm") is not before
    assert value_of("set_sigterm") is before
    with without("set_sigterm"), ray_private.sigterm_kept() as holds:
        assert not holds


@pytest.mark.parametrize("key", ["prepare_launcher", "check_launcher"])
def test_a_launcher_s_file_is_checked_by_ray_or_by_us_alone(without: Callable[[str], Any], key: str) -> None:
    provider = {"type": "local", "head_ip": "h", "worker_ips": []}
    wrong = {"cluster_name": "c", "max_workers": "many", "provider": provider}
    assert launcher_problem(wrong)
    with without(key):
        assert launcher_problem(wrong) is None


TUNE = ("sent_variables", "added_variables", "actor_manager")


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_tune_s_globals_are_as_before_after_a_run_and_after_an_error(error: type[BaseException] | None) -> None:
    before = [value_of(key) for key in TUNE]
    assert "AWS_SECRET_ACCESS_KEY" in before[0]
    try:
        with ray_private.tune_patches():
            sent, added, manager = (value_of(key) for key in TUNE)
            assert sent == {variable for variable in before[0] if not variable.startswith("AWS_")}
            assert added == {}
            assert issubclass(manager, before[2])
            if error is not None:
                raise error
    except (ZeroDivisionError, KeyboardInterrupt):
        pass
    assert all(value_of(key) is value for key, value in zip(TUNE, before, strict=True))


@pytest.mark.parametrize("key", ["sent_variables", "added_variables", "task_failed"])
def test_tune_runs_without_one_of_them(without: Callable[[str], Any], key: str) -> None:
    with without(key), ray_private.tune_patches():
        others = [other for other in TUNE if other != key and (key, other) != ("task_failed", "actor_manager")]
        changed = [value_of(other) for other in others]
    assert all(value_of(other) is not value for other, value in zip(others, changed, strict=True))


@pytest.mark.parametrize("before", [None, "local"])
def test_ray_train_sends_the_address_of_the_cluster(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if before is not None:
        monkeypatch.setenv("RAY_ADDRESS", before)
    with ray_private.address_sent("192.0.2.1:6379"):
        assert get_env_vars_to_propagate()["RAY_ADDRESS"] == "192.0.2.1:6379"
    assert os.environ.get("RAY_ADDRESS") == before
    assert "RAY_ADDRESS" not in get_env_vars_to_propagate()


def test_a_process_that_ray_ended_for_its_memory_is_a_lost_one_for_tune() -> None:
    from ray.exceptions import OutOfMemoryError, RayActorError

    received = []

    class Manager:
        def _actor_task_failed(self, tracked_actor_task: object, exception: Exception) -> None:
            received.append(exception)

    manager, lost = ray_private._surviving(Manager)(), RayActorError(error_msg="gone")
    for error in (lost, OutOfMemoryError("no memory is left")):
        manager._actor_task_failed(None, error)
    assert received[0] is lost
    assert isinstance(received[1], RayActorError)
    assert "OutOfMemoryError: no memory is left" in str(received[1])


WITHOUT_ALL = """
import runpy, sys, warnings
from imbvlm.ray_runtime import ray_private

def missing(key, fallback):
    warnings.warn("Ray has no {}. {}".format(*ray_private.NAMES[key]), RuntimeWarning, stacklevel=1)
    return fallback

ray_private._private = missing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_runs_to_its_end_without_any_private_name_and_says_what_is_missing(tmp_path: Path) -> None:
    brief = ["--smoke", "--storage", str(tmp_path / "runs"), "--set", "num_trials=2", "--set", "method=linear_probe"]
    with apart_with_ray(tmp_path) as there:
        done = subprocess.run(
            there.command(sys.executable, "-c", WITHOUT_ALL, "sweeps/quickstart.py", *brief, folder=ROOT),
            env={**os.environ, "RAY_ADDRESS": "", "PYTHONWARNINGS": "default::RuntimeWarning"},
            capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "winner " in done.stdout
    assert "Ray: 2 CPUs, 0 GPUs (a cluster that was running already)" in done.stdout
    # Python shows a warning once, and again after a library has changed its filters.
    shown = done.stderr + "".join(path.read_text() for path in (tmp_path / "runs").rglob("ray.log"))
    for key in ("is_head", "local_addresses", "has_open_ports", "sent_variables"):
        assert shown.count("Ray has no {}. {}".format(*NAMES[key])) in (1, 2)
