"""Sweeps on several nodes: one is killed, one is taken away, one doesn't share the folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_sweep import NUM_TRIALS, Sweep, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "few.parquet"
    write_manifest(path)
    return path


@contextmanager
def cluster_of(num_nodes: int, num_cpus: int = 1):
    """Nodes on this machine, and how to reach them; the first is the head and runs no trials."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1"},
    )
    try:
        workers = [cluster.add_node(num_cpus=num_cpus) for _ in range(num_nodes - 1)]
        cluster.wait_for_nodes()
        yield cluster, workers, {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


def order(fault_orders: Path, **orders) -> None:
    fault_orders.write_text(json.dumps(orders))


@pytest.fixture(autouse=True)
def no_orders(fault_orders):
    yield
    fault_orders.unlink(missing_ok=True)


def test_a_killed_node_costs_no_trial(manifest, tmp_path, fault_orders):
    with cluster_of(3) as (cluster, workers, environment):
        quiet = Sweep(tmp_path / "quiet", manifest, max_concurrent_trials=2)
        quiet.run(environment=environment)
        sweep = Sweep(tmp_path / "killed", manifest, max_concurrent_trials=2)
        (tmp_path / "killed" / "runs").mkdir()
        (tmp_path / "killed" / "runs" / "features").symlink_to(quiet.folder / "runs" / "features")
        order(fault_orders, loss_seconds=0.15)
        sweep.start(environment=environment)
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        cluster.remove_node(workers[0], allow_graceful=False)
        printed = sweep.end()
    assert "failed" not in printed
    assert sweep.outcome() == quiet.outcome()
    assert len(sweep.records()) == NUM_TRIALS
    assert sweep.best() == quiet.best()


def test_a_machine_that_is_taken_away_does_not_spend_the_restarts(manifest, tmp_path, fault_orders):
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    with cluster_of(3) as (cluster, workers, environment):
        sweep = Sweep(tmp_path, manifest, max_concurrent_trials=2, max_failures=0)
        order(fault_orders, loss_seconds=0.15)
        sweep.start(environment=environment)
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        deadline = int((time.time() + 1) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(cluster.address).drain_node(workers[0].node_id, reason, "spot", deadline)
        assert accepted, why
        time.sleep(1.5)
        if workers[0] in cluster.worker_nodes:
            cluster.remove_node(workers[0], allow_graceful=False)
        printed = sweep.end()
    assert "failed" not in printed
    assert len(sweep.outcome()) == NUM_TRIALS


def test_a_folder_that_the_nodes_do_not_share_is_refused_at_the_start(manifest, tmp_path):
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
