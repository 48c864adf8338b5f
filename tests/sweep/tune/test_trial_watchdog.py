"""A cluster that has become too small for any trial: it is said once it has lasted, seldom again, and what to do."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest

from imbvlm.base.console import Console
from imbvlm.ray_runtime.capacity_notice import PATIENCE_SECONDS, SAY_AGAIN_SECONDS
from imbvlm.ray_runtime.cluster_resources import Cluster
from imbvlm.sweep.plan.feasibility import shortage
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.sweep.tune import trial_watchdog as module
from imbvlm.sweep.tune.trial_watchdog import CapacityWatch

BASE = {"data": {"manifest": "m"}, "encoder": {"name": "tiny"}, "method": "decoder"}


def sweep(**fields: Any) -> ResolvedSweep:
    return SweepSpec.from_tree({"name": "s", "base": BASE, "space": {"parameters": {}}, **fields}).resolve()


def cluster_of(*nodes: tuple[float, float]) -> Cluster:
    cpus, gpus = (sum(column) for column in zip(*nodes, strict=True))
    return Cluster("http://127.0.0.1:8265", cpus, gpus, False, nodes, nodes)


def test_what_a_trial_demands_what_is_left_and_how_to_go_on() -> None:
    of = sweep(cpus_per_worker=4, gpus_per_worker=1, max_concurrent_trials=2)
    assert shortage(of, cluster_of((0, 0), (8, 1), (8, 1))) is None
    # Fewer at once than were wanted go on.
    assert shortage(of, cluster_of((0, 0), (8, 1))) is None
    found = shortage(of, cluster_of((0, 0), (8, 0)))
    assert found is not None
    assert "a trial needs 1 GPU (num_workers 1 x gpus_per_worker 1) and the cluster has now 0" in found
    assert "lower num_workers or gpus_per_worker (0 trains on CPUs), and go on by --resume with --fork" in found
    assert "or add a machine that a trial fits on, for which the sweep waits" in found
    found = shortage(sweep(cpus_per_worker=4), cluster_of((2, 0), (3, 0)))
    assert found is not None
    assert "a worker needs 4 CPUs and 0 GPUs on one machine, and the largest has 3 CPUs" in found
    found = shortage(sweep(cpus_per_worker=2.5, num_workers=3), cluster_of((4, 0), (4, 0)))
    assert found is not None
    assert "a trial of 3 workers" in found


def test_what_an_autoscaler_may_still_bring_is_no_shortage() -> None:
    of = sweep(cpus_per_worker=4, gpus_per_worker=1)
    grown = dataclasses.replace(cluster_of((0, 0)), max_nodes=((0, 0), (8, 1)))
    assert shortage(of, grown) is None


def test_it_is_said_when_it_lasts_and_seldom_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lacks = 1000.0, ["too small"]
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    watch = CapacityWatch(lambda: lacks[0] if lacks else None, Console(stream))

    def said_within(seconds: float) -> int:
        nonlocal now
        before = stream.getvalue().count("too small\n")
        for _ in range(int(seconds)):
            now += 1
            watch.on_step_end(0, [])
        return stream.getvalue().count("too small\n") - before

    assert said_within(PATIENCE_SECONDS) == 0
    assert said_within(30) == 1
    assert said_within(SAY_AGAIN_SECONDS - 60) == 0
    assert said_within(100) == 1
    # A machine has come, and goes again; one that is back at once isn't missed.
    lacks.clear()
    assert said_within(2 * SAY_AGAIN_SECONDS) == 0
    lacks.append("too small")
    assert said_within(PATIENCE_SECONDS / 2) == 0
    lacks.clear()
    assert said_within(60) == 0
    lacks.append("too small")
    assert said_within(PATIENCE_SECONDS + 30) == 1
