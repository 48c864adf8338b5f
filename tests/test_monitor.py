"""What can be watched while a sweep runs: Prometheus' text, TensorBoard's files, Optuna's journal, the progress log."""

from __future__ import annotations

import re
import urllib.request

import optuna
import pytest
from faulty_sweep import NUM_TRIALS, Sweep, write_manifest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


def metrics() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What Ray's own endpoint gives Prometheus of ours, by name and labels."""
    import ray

    found = {}
    for node in ray.nodes():
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}", timeout=10) as answer:
            for name, labels, value in re.findall(r"^ray_(imbvlm_\w+){(.*)} (\S+)$", answer.read().decode(), re.M):
                ours = re.findall(r'(kind|state|group|objective|sweep)="([^"]*)"', labels)
                found[name, tuple(sorted(pair for pair in ours if pair[0] != "sweep"))] = float(value)
    return found


def test_a_running_sweep_can_be_watched(ray_cluster, tmp_path, fault_orders):
    write_manifest(tmp_path / "few.parquet")
    sweep = Sweep(tmp_path, tmp_path / "few.parquet")
    fault_orders.write_text('{"loss_seconds": 0.5}')
    try:
        sweep.start()
        finished = ("imbvlm_trials", (("kind", "search"), ("state", "finished")))
        sweep.wait_for(lambda: metrics().get(finished, 0) >= 2)
        told = metrics()
        journal = JournalStorage(JournalFileBackend(str(sweep.path / "optuna.log")))
        states = [one.state.name for one in optuna.load_study(study_name="faults", storage=journal).trials]
    finally:
        fault_orders.unlink()
    sweep.end()
    assert told["imbvlm_trials", (("kind", "search"), ("state", "running"))] == 1
    assert told["imbvlm_trials", (("kind", "baseline"), ("state", "finished"))] == 2
    assert 0 < told["imbvlm_best_value", (("objective", "val/balanced_accuracy"),)] < 1
    assert {labels[0][1] for name, labels in told if name == "imbvlm_best_accuracy"} >= {"top1", "balanced", "few_shot"}
    assert told["imbvlm_gpu_hours", ()] == 0
    assert states.count("COMPLETE") >= 2
    assert "RUNNING" in states
    for trial_id in sweep.records():
        assert list((sweep.path / "tensorboard" / trial_id).glob("events.out.tfevents.*"))
    progress = (sweep.path / "progress.log").read_text()
    assert f"of {NUM_TRIALS} trials" in progress or f"/{NUM_TRIALS} trials done" in progress
    assert "winner" in progress
