"""Sweeps on several nodes: one is killed or taken away, one has a disk of its own, some come as they are needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from apart import apart_with_ray, free_port, start_head
from faulty_sweep import LOSSES, Sweep, assert_same_trials, runs, undisturbed, write_manifest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "few.parquet"
    write_manifest(path)
    return path


@contextmanager
def cluster_of(num_nodes: int, num_cpus: int = 1) -> Iterator[tuple[Any, list[Any], dict[str, str]]]:
    """Nodes on this machine, and how to reach them; the first is the head and runs no trials."""
    from ray.cluster_utils import Cluster

    # The cluster that other tests share has the usual port.
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **dashboard})
    try:
        workers = [cluster.add_node(num_cpus=num_cpus) for _ in range(num_nodes - 1)]
        cluster.wait_for_nodes()
        yield cluster, workers, {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


def order(fault_orders: Path, **orders: Any) -> None:
    fault_orders.write_text(json.dumps(orders))


@pytest.fixture(autouse=True)
def no_orders(fault_orders: Path) -> Iterator[None]:
    yield
    for path in (fault_orders, *fault_orders.parent.glob("trial-*"), *fault_orders.parent.glob("tower-*")):
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def quiet(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The undisturbed run, on this machine alone."""
    return undisturbed(tmp_path_factory.mktemp("quiet"), manifest)


def make_sweep(folder: Path, manifest: Path, quiet: Sweep, **fields: Any) -> Sweep:
    """Another sweep of the same six configurations on two nodes of one CPU, its features there already."""
    (folder / "runs").mkdir()
    (folder / "runs" / "features").symlink_to(quiet.folder / "runs" / "features")
    return Sweep(folder, manifest, max_concurrent_trials=2, **fields)


@contextmanager
def trials_held_on_both(sweep: Sweep, fault_orders: Path) -> Iterator[None]:
    """Some trials have ended, and within a process on either node is at a loss, which ends when this does.

    Under Ray Train a short trial is over before the other one's workers have started.
    """
    pids = lambda: [int(path.name.partition("-")[2]) for path in fault_orders.parent.glob("trial-*")]  # noqa: E731
    baselines = lambda: [record["state"] for record in sweep.records("baseline").values()]  # noqa: E731
    sweep.wait_for(lambda: sweep.num_ended() >= 2 and set(baselines()) == {"finished"})
    order(fault_orders, losses=dict.fromkeys(LOSSES, "hang"))
    sweep.wait_for(lambda: len(running(sweep)) == 2 and sum(map(runs, pids())) == 2)
    yield
    order(fault_orders, loss_seconds=0.05)


def running(sweep: Sweep) -> list[str]:
    return [key for key, record in sweep.records().items() if record["state"] == "running"]


def assert_same_end(sweep: Sweep, quiet: Sweep, printed: str) -> None:
    assert "failed" not in printed
    assert_same_trials(sweep, quiet)
    assert sweep.best() == quiet.best()


@pytest.mark.parametrize("driver", ["in_process", "ray_train"])
def test_a_killed_node_costs_no_trial(
    manifest: Path, tmp_path: Path, quiet: Sweep, fault_orders: Path, driver: str
) -> None:
    with cluster_of(3) as (cluster, workers, environment):
        sweep = make_sweep(tmp_path, manifest, quiet, driver=driver, cpus_per_worker=0.9)
        # The baseline trains on cross_entropy, four times as long as a trial.
        order(fault_orders, slow_losses={"focal": 0.2, "balanced_softmax": 0.2})
        sweep.start(environment=environment)
        with trials_held_on_both(sweep, fault_orders):
            cluster.remove_node(workers[0], allow_graceful=False)
        printed = sweep.end()
    assert_same_end(sweep, quiet, printed)


@pytest.mark.parametrize("driver", ["in_process", "ray_train"])
def test_a_machine_that_is_taken_away_does_not_spend_the_restarts(
    manifest: Path, tmp_path: Path, quiet: Sweep, fault_orders: Path, driver: str
) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    with cluster_of(3) as (cluster, workers, environment):
        sweep = make_sweep(tmp_path, manifest, quiet, max_failures=0, driver=driver, cpus_per_worker=0.9)
        # The baseline trains on cross_entropy, four times as long as a trial.
        order(fault_orders, slow_losses={"focal": 0.2, "balanced_softmax": 0.2})
        sweep.start(environment=environment)
        with trials_held_on_both(sweep, fault_orders):
            deadline = int((time.time() + 1) * 1000)
            reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            accepted, why = GcsClient(cluster.address).drain_node(workers[0].node_id, reason, "spot", deadline)
            assert accepted, why
            time.sleep(1.5)
            if workers[0] in cluster.worker_nodes:
                cluster.remove_node(workers[0], allow_graceful=False)
        printed = sweep.end()
    assert_same_end(sweep, quiet, printed)


@pytest.mark.parametrize("driver", ["in_process", "ray_train"])
def test_what_is_left_too_small_for_any_trial_is_said_and_the_sweep_goes_on_with_another_node(
    manifest: Path, tmp_path: Path, quiet: Sweep, fault_orders: Path, driver: str
) -> None:
    with cluster_of(2) as (cluster, _, environment):
        large = cluster.add_node(num_cpus=2)
        sweep = make_sweep(tmp_path, manifest, quiet, driver=driver, cpus_per_worker=1.5)
        sweep.change(max_concurrent_trials=1)
        order(fault_orders, slow_losses={"focal": 0.2, "balanced_softmax": 0.2})
        sweep.start(environment=environment)
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        cluster.remove_node(large, allow_graceful=False)
        gone, progress = time.monotonic(), sweep.path / "progress.log"
        sweep.wait_for(lambda: "no trial fits on what is left of the cluster" in progress.read_text(), 120)
        print(f"said after {time.monotonic() - gone:.0f} s")
        ended = sweep.num_ended()
        assert ended < len(quiet.outcome())
        time.sleep(20)
        assert sweep.num_ended() == ended
        cluster.add_node(num_cpus=2)
        printed = sweep.end()
    assert re.search(
        r"a trial needs 1.51? CPUs \(num_workers 1 x cpus_per_worker 1.5.* and the cluster has now 1;", printed
    )
    assert "or add a machine that a trial fits on, for which the sweep waits" in printed
    assert printed.count("no trial fits") == 1
    assert_same_end(sweep, quiet, printed)


def test_a_node_killed_in_the_middle_of_extraction_costs_nothing(
    manifest: Path, tmp_path: Path, quiet: Sweep, fault_orders: Path
) -> None:
    """Half of the CPUs are gone for good, and what worked there comes to where the rest works."""
    with cluster_of(3) as (cluster, workers, environment):
        sweep = Sweep(tmp_path, manifest)
        shards = lambda: list((tmp_path / "runs" / "features").rglob("*.arrow"))  # noqa: E731
        order(fault_orders, tower_seconds=1.0)
        sweep.start(environment=environment)
        sweep.wait_for(lambda: len(shards()) >= 3)
        cluster.remove_node(workers[0], allow_graceful=False)
        printed = sweep.end()
    assert_same_end(sweep, quiet, printed)


def test_a_pass_that_no_machine_is_left_for_says_so_and_goes_on_with_another(
    manifest: Path, tmp_path: Path, quiet: Sweep, fault_orders: Path
) -> None:
    with cluster_of(2) as (cluster, workers, environment):
        sweep = Sweep(tmp_path, manifest)
        features = tmp_path / "runs" / "features"
        order(fault_orders, tower_seconds=1.0)
        sweep.start(environment=environment)
        sweep.wait_for(lambda: len(list(features.rglob("*.arrow"))) >= 3)
        progress = sweep.path / "progress.log"
        cluster.remove_node(workers[0], allow_graceful=False)
        sweep.wait_for(lambda: "waiting for a machine: an encoder worker needs" in progress.read_text(), 120)
        cluster.add_node(num_cpus=1)
        printed = sweep.end()
    assert_same_end(sweep, quiet, printed)


def test_a_prediction_that_no_machine_is_left_for_says_so_and_goes_on_with_another(
    manifest: Path, tmp_path: Path, quiet: Sweep, fault_orders: Path
) -> None:
    command = [sys.executable, "-m", "imbvlm"]
    subprocess.run([*command, "export", quiet.path, "-o", tmp_path / "model"], check=True)
    predict = [*command, "predict", tmp_path / "model", manifest]
    subprocess.run([*predict, "-o", tmp_path / "here.csv"], check=True)
    said = tmp_path / "said"
    with cluster_of(2) as (cluster, workers, environment), open(said, "w") as stream:
        order(fault_orders, tower_seconds=20.0)
        there = subprocess.Popen(
            [*predict, "--ray", "-o", tmp_path / "there.csv"], stderr=stream, env={**os.environ, **environment}
        )
        wait_until(lambda: list(fault_orders.parent.glob("tower-*")), there)
        cluster.remove_node(workers[0], allow_graceful=False)
        wait_until(lambda: "imbvlm: waiting for a machine: an encoder worker needs" in said.read_text(), there)
        order(fault_orders)
        cluster.add_node(num_cpus=2)
        assert there.wait(240) == 0
    assert (tmp_path / "there.csv").read_text() == (tmp_path / "here.csv").read_text()


def wait_until(happened: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def autoscaled_by_ray(port: int) -> dict:
    """What `ray up` would leave on a head whose autoscaler may start two workers of a CPU, here as processes."""
    lists = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
             "rsync_filter"]  # fmt: skip
    return {
        "cluster_name": "autoscaled",
        "max_workers": 2,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        **{key: [] for key in lists},
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
    }  # fmt: skip


def test_workers_come_for_a_sweep_on_an_autoscaled_head_and_what_they_never_could_is_refused(
    manifest: Path, tmp_path: Path, quiet: Sweep
) -> None:
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    file = home / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(autoscaled_by_ray(port)))
    settings = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}  # fmt: skip
    # A home of its own has no token, and Ray asks for one once it has started a cluster in this process.
    known = {"HOME": str(home), "RAY_AUTH_MODE": "disabled"}
    there_is = {"RAY_ADDRESS": f"127.0.0.1:{port}", **known}
    with apart_with_ray(tmp_path) as there:
        start_head(there, tmp_path, port, "--num-cpus=0", f"--autoscaling-config={file}", **known, **settings)
        large = Sweep(tmp_path / "large", manifest, there=there, cpus_per_worker=2, max_concurrent_trials=None)
        printed = large.run(code=1, environment=there_is)
        assert "a worker needs 2 CPUs and 0 GPUs on one machine, and the largest has 1 CPU " in printed
        large.change(cpus_per_worker=1, max_concurrent_trials=3)
        printed = large.run(code=1, environment=there_is)
        assert "max_concurrent_trials is 3 and the cluster holds 2 trials" in printed
        sweep = Sweep(tmp_path / "fits", manifest, there=there, max_concurrent_trials=None)
        printed = sweep.run(environment=there_is)
        nodes = [line for line in there.processes() if "raylet/raylet" in line]
        assert_same_end(sweep, quiet, printed)
    assert "Ray: 0 CPUs, 0 GPUs (a cluster that was running already), growing to 2 CPUs and 0 GPUs" in printed
    assert "2 trials at a time" in printed
    assert len(nodes) == 3


def test_a_folder_that_the_nodes_do_not_share_is_refused_at_the_start(manifest: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a node with a disk of its own needs the permission to mount")
    runs = tmp_path / "runs"
    runs.mkdir()
    with cluster_of(1) as (cluster, _, environment):
        start = f"mount -t tmpfs none {runs} && exec {RAY} start --address={cluster.address} --num-cpus=1 --block"
        node = subprocess.Popen(
            ["unshare", "-m", "bash", "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait_for_cpus(cluster.address)
            printed = Sweep(tmp_path, manifest).run(code=1, environment=environment)
        finally:
            os.killpg(node.pid, signal.SIGTERM)
            node.wait(30)
    assert "isn't shared by all nodes" in printed
    assert "--storage" in printed
    assert not list(runs.glob("faults-*/trials/*"))


def _wait_for_cpus(address: str) -> None:
    code = (
        "import ray, sys, time; ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "while ray.cluster_resources().get('CPU', 0) < 1: time.sleep(0.2)"
    )
    subprocess.run([sys.executable, "-c", code, address], check=True, timeout=90, capture_output=True)
