"""Trials that hang, what ended ones held, and a cluster that is too small: when it is said, and what to do."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import pytest

from imbvlm.base.console import Console
from imbvlm.ray_runtime.capacity_notice import PATIENCE_SECONDS, SAY_AGAIN_SECONDS
from imbvlm.ray_runtime.cluster_resources import Cluster
from imbvlm.sweep.plan.feasibility import shortage
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.sweep.tune import trial_watchdog as module
from imbvlm.sweep.tune.trial_watchdog import FREE_AFTER_SECONDS, CapacityWatch, TrialCleaner, TrialTimeout

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


class Records:
    """Stands for the records of a job, which need Ray."""

    def __init__(self, **values: list[str]) -> None:
        self.values = {key.replace("_", "/", 1): value for key, value in values.items()}

    def get(self, key: str) -> list[str]:
        return self.values.get(key, [])

    def delete(self, key: str) -> None:
        self.values.pop(key, None)


class Running:
    """Stands for a trial of Tune that runs, and for its controller."""

    status, last_result = "RUNNING", {"epoch": 3}

    def __init__(self, trial_id: str, *names: str) -> None:
        self.trial_id, self.max_failures = trial_id, 2
        self.config = {"trial_ids": list(names)}
        self.failures: list[str] = []

    def get_live_trials(self) -> list[Running]:
        return [self]

    def handle_error(self, error: Exception) -> None:
        self.failures.append(str(error))


@pytest.mark.parametrize("names", [("t1",), ("t1", "t2", "t3")])
def test_the_process_of_a_late_trial_is_killed_once_and_its_failure_says_why(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    now, killed = 1000.0, []
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module.ray, "kill", killed.append)
    records, trial = Records(), Running("a1", *names)
    timeout = TrialTimeout(2.0, None, records)
    monkeypatch.setattr(timeout._scheduler, "choose_trial_to_run", lambda controller: None)

    def step(seconds: float) -> None:
        nonlocal now
        now += seconds
        timeout.choose_trial_to_run(trial)

    step(0)
    # The trials of a pack share its time.
    step(120 * len(names))
    assert trial.max_failures == 2
    # Its process is recorded late: it is killed then.
    step(1)
    assert killed == []
    records.values["process/a1"] = ["the process"]
    step(1)
    step(1)
    assert killed == ["the process"]
    assert trial.max_failures == 0
    timeout.on_trial_error(None, trial)
    timeout.on_trial_error(None, trial)
    what = (
        "ran longer than max_trial_minutes 2; its last report was of epoch 3. Raise the limit for trials that are slow"
    )
    assert trial.failures == [what if len(names) == 1 else f"its pack of 3 {what}"]
    # Any trial of a pack may hang: none of them is at fault before it has run alone.
    assert timeout.reasons == ({"t1": what} if len(names) == 1 else {})


def test_what_ended_trials_held_is_freed_at_once_after_an_error_and_later_after_a_regular_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, freed = 1000.0, []
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module, "remove_placement_group", freed.append)
    groups = {f"workers_{name}": [f"group of {name}"] for name in ("lost", "failed", "done", "next")}
    records = Records(**groups, process_lost=["process"], process_done=["process"])
    cleaner = TrialCleaner(records, "ray_train")
    cleaner.on_trial_recover(0, [], Running("lost", "t1"))
    cleaner.on_trial_error(0, [], Running("failed", "t2"))
    assert freed == ["group of lost", "group of failed"]
    cleaner.on_trial_complete(0, [], Running("done", "t3"))
    now += FREE_AFTER_SECONDS
    cleaner.on_step_end(0, [])
    assert len(freed) == 2
    now += 1
    cleaner.on_step_end(0, [])
    cleaner.on_step_end(0, [])
    assert freed == ["group of lost", "group of failed", "group of done"]
    assert list(records.values) == ["workers/next"]


def test_what_the_last_trials_held_is_freed_before_the_next_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's cleaner frees one group in 2 s, and is gone for the other one."""
    now, freed = 1000.0, []
    reserved_until = {"group of cleaned": 1002.0, "group of kept": math.inf}

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def table(group: str) -> dict[str, str]:
        return {"state": "CREATED" if now < reserved_until[group] else "REMOVED"}

    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module, "placement_group_table", table)
    monkeypatch.setattr(module, "remove_placement_group", lambda group: freed.append((group, now)))
    records = Records(**{f"workers_{name}": [f"group of {name}"] for name in ("cleaned", "kept")}, process_probe=["p"])
    cleaner = TrialCleaner(records, "ray_train")
    for name in ("probe", "cleaned", "kept"):
        cleaner.on_trial_complete(0, [], Running(name, "t1"))
    cleaner.on_experiment_end([])
    assert [group for group, _ in freed] == ["group of cleaned", "group of kept"]
    assert [at for _, at in freed] == pytest.approx([1002, 1000 + FREE_AFTER_SECONDS], abs=0.2)
    assert records.values == {}
