"""What others watch while a sweep runs: Prometheus' text of the cluster, TensorBoard's files, Optuna's journal."""

from __future__ import annotations

import json
import re
import struct
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from faulty_sweep import NUM_TRIALS, Sweep, write_manifest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweep_folder import sweep_spec, write_sweep

from imbvlm.longtail.class_stats import SHOT_GROUPS
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.tune.monitoring import MetricsExporter

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]
SAMPLE = re.compile(r"ray_(imbvlm_\w+)\{(.*)\} (\S+)")

Metrics = dict[tuple[str, ...], float]


def metrics_of(sweep: str) -> Metrics:
    """What Prometheus would read of a sweep now: (name, labels but Ray's own) -> value."""
    # Where the guide says that Prometheus finds its targets.
    targets = json.loads(Path("/tmp/ray/prom_metrics_service_discovery.json").read_text())
    metrics: Metrics = {}
    for target in {address for group in targets for address in group["targets"]}:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
            text = page.read().decode()
        for name, labels, value in SAMPLE.findall(text):
            given = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if given.get("sweep") == sweep:
                metrics[(name, *(given[key] for key in ("kind", "objective", "group", "state") if key in given))] = (
                    float(value)
                )
    return metrics


def wait_for(read: Callable[..., Any], seconds: float = 90) -> Any:
    """The first answer that isn't empty; Ray tells its metrics every few seconds."""
    deadline = time.monotonic() + seconds
    while not (answer := read()):
        assert time.monotonic() < deadline, "it didn't come to that"
        time.sleep(1)
    return answer


def events_of(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of TensorBoard's files, which are records of length, check sum, event, check sum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            events += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return events


def optuna_trials(path: Path) -> dict[str, tuple[str, float | None]]:
    """As optuna-dashboard opens it: parameters -> state and value."""
    (name,) = optuna.get_all_study_names(JournalStorage(JournalFileBackend(str(path))))
    study = optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(path))))
    return {json.dumps(trial.params, sort_keys=True): (trial.state.name, trial.value) for trial in study.trials}


def expected(sweep: Sweep) -> Metrics:
    """What its records say."""
    records, best = sweep.records().values(), "val/best_balanced_accuracy"
    ended = [record for record in records if record["state"] == "finished"]
    winner = max(ended, key=lambda record: record["epochs"][-1][best])
    epoch = max(winner["epochs"], key=lambda epoch: epoch["val/balanced_accuracy"])
    groups = [group for group in ("top1", "balanced", *SHOT_GROUPS) if f"val/{group}_accuracy" in epoch]
    assert len(groups) >= 4
    return {
        ("imbvlm_trials", "search", "finished"): len(ended),
        ("imbvlm_trials", "search", "running"): sum(record["state"] == "running" for record in records),
        ("imbvlm_trials", "search", "failed"): 0,
        ("imbvlm_trials", "baseline", "finished"): 5,
        ("imbvlm_best_value", "val/balanced_accuracy"): winner["epochs"][-1][best],
        **{("imbvlm_best_accuracy", group): epoch[f"val/{group}_accuracy"] for group in groups},
        ("imbvlm_gpu_hours",): 0.0,
    }


def test_a_running_sweep_is_seen_in_prometheus_tensorboard_and_optuna(
    ray_cluster: str, order: Callable[..., Any], tmp_path: Path
) -> None:
    write_manifest(tmp_path / "few.parquet")
    first = [{"loss.name": name, "optim.lr": 0.05} for name in ("cross_entropy", "balanced_softmax", "focal")]
    sweep = Sweep(tmp_path, tmp_path / "few.parquet", first_trials=first)
    # The third trial stands still, so that the metrics don't change while they are compared.
    with order(losses={"focal": "hang"}):
        sweep.start()
        sweep.wait_for(lambda: len(sweep.records()) == 3)
        wanted = expected(sweep)
        assert wanted[("imbvlm_trials", "search", "finished")] == 2
        assert wanted[("imbvlm_trials", "search", "running")] == 1
        wait_for(lambda: wanted.items() <= metrics_of(sweep.path.name).items())
        asked = optuna_trials(sweep.path / "optuna.log")
        assert sorted(state for state, _ in asked.values()) == ["COMPLETE", "COMPLETE", "RUNNING"]
    sweep.end()
    records = sweep.records()
    assert len(records) == NUM_TRIALS
    values = {
        json.dumps(record["draw"], sort_keys=True): ("COMPLETE", record["epochs"][-1]["val/best_balanced_accuracy"])
        for record in records.values()
    }
    assert optuna_trials(sweep.path / "optuna.log") == values
    for trial_id, record in {**records, **sweep.records("refit")}.items():
        curves = {
            (int(epoch["epoch"]), tag): pytest.approx(value)
            for epoch in record["epochs"] for tag, value in epoch.items() if "/" in tag
        }  # fmt: skip
        events = events_of(sweep.path / "tensorboard" / trial_id)
        assert len(events) == len(curves)
        assert {(step, tag): value for step, tag, value in events} == curves
    assert {tag for _, tag, _ in events_of(sweep.path / "tensorboard" / "t00001")} >= {
        "val/balanced_accuracy", "val/few_shot_accuracy", "train/lr", "train/images_per_second",
    }  # fmt: skip


def test_hours_of_booked_gpus_are_told(ray_cluster: str, tmp_path: Path) -> None:
    log = TrialLog.read(str(write_sweep(tmp_path / "made", [200, 50, 8], num_trials=6, refits=False)))
    spec = sweep_spec(num_workers=2, gpus_per_worker=0.5)
    MetricsExporter(spec, log, tmp_path, "made-of-records").setup()
    seconds = sum(record.ended_at - record.started_at for record in log.records.values())
    told = wait_for(lambda: metrics_of("made-of-records").get(("imbvlm_gpu_hours",)))
    assert told == pytest.approx(seconds / 3600)
