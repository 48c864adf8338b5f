"""Fixtures of several test files: one local Ray cluster, faults ordered in its processes, and an S3 server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from s3_server import S3Server

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tensors here are tiny: a second thread only waits for the first, for minutes where the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Commands that tests start without `ray_cluster` must not join that of the other test process.
os.environ["RAY_ADDRESS"] = "local"
# Ray's workers have a low priority by default, and wait for minutes where another test process is at work.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Every run draws the same: two logits closer than float32 can tell failed a test once in 27 runs."""
    # Behind the setting of its threads.
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_sigint() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, although Ray Train may have left its handler in this test process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def fault_orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, not there yet, in which a test orders faults of the processes of `ray_cluster` (fault_hook)."""
    path = tmp_path_factory.mktemp("faults") / "orders.json"
    os.environ["IMBVLM_TEST_FAULTS"] = str(path)
    # Ray's workers have a path of their own making, with what stood in PYTHONPATH on it.
    hook = str(Path(__file__).parent / "fault_hook")
    os.environ["PYTHONPATH"] = os.pathsep.join([hook, *filter(None, [os.environ.get("PYTHONPATH")])])
    return path


@pytest.fixture(scope="session")
def ray_cluster(fault_orders: Path) -> Iterator[str]:
    """The address of this test process's Ray cluster, of two CPUs with a dashboard (Tune over Train hangs without)."""
    import ray

    context = ray.init(
        # A cluster that a killed head or another test process has left behind must not be joined.
        address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False
    )  # fmt: skip
    address = context.address_info["gcs_address"]
    # Sweeps that tests start as processes join this cluster, whatever else runs on the machine.
    os.environ["RAY_ADDRESS"] = address
    yield address
    os.environ["RAY_ADDRESS"] = "local"
    ray.shutdown()


@pytest.fixture
def order(fault_orders: Path) -> Callable[..., AbstractContextManager[Callable[[str], list[int]]]]:
    """Order faults for the length of a `with` block, which gets the ids of the processes of a kind that saw them."""

    @contextmanager
    def ordered(**orders: Any) -> Iterator[Callable[[str], list[int]]]:
        for path in fault_orders.parent.glob("*-*"):
            path.unlink()
        fault_orders.write_text(json.dumps(orders))
        try:
            yield lambda kind: [int(path.name.partition("-")[2]) for path in fault_orders.parent.glob(f"{kind}-*")]
        finally:
            fault_orders.unlink()

    return ordered


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on this machine, with one empty bucket."""
    from s3_server import serve

    with serve(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's AWS settings pointing at it."""
    from s3_server import use

    use(monkeypatch, server.settings())
    return server


@pytest.fixture
def own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's plan is of this machine, whatever clusters run on it: of several a plan asks which one is meant."""
    monkeypatch.setenv("RAY_ADDRESS", "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need Ray come first: with several test processes (`-n`) the long ones mustn't be left for the end."""
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in with_ray)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All files that need Ray go to one test process, since a second cluster would take an eighth of a core idly."""
    from xdist.scheduler import LoadFileScheduling

    @cache
    def group(file: str) -> str:
        return "ray" if "mark.ray" in (config.rootpath / file).read_text() else file

    class OneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(super()._split_scope(nodeid))

    return OneCluster(config, log)
