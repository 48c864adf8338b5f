"""The whole way with real processes: a sweep from the command line, killed, resumed, exported, asked, repeated."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from quickstart_sweep import QUICKSTART, ROOT, imbvlm, newest, run, trials

from imbvlm.data.manifest import Manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def home(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def smoke(home: Path) -> tuple[Path, str]:
    """The smoke sweep's folder and what it printed."""
    printed = run(QUICKSTART, "--smoke", cwd=home)
    return newest(home), printed


def test_a_sweep_ends_with_tables_files_and_what_to_type_next(smoke: tuple[Path, str]) -> None:
    sweep, printed = smoke
    validation, test = printed.split("test split, read once")
    for heading in ("overall", "balanced", "many", "medium", "few"):
        assert heading in validation
        assert heading in test
    for row in ("zero-shot", "linear probe", "winner"):
        assert re.search(rf"^{row} ", test, re.MULTILINE)
    assert re.search(r"^b00001 .*zero-shot", validation, re.MULTILINE)
    assert f"{sweep}/report.html" in printed
    assert re.search(r"points (above|below|from) linear probe", (sweep / "report.html").read_text())
    # The report's first sentence stands in the terminal too.
    assert re.search(r"the (winner(, post hoc,)?|blend) is .* on the test split \(95 % interval ", test, re.IGNORECASE)
    for name in ("best.yaml", "results.parquet", "test.json", "ray.log", "refits/refit-winner-seed0/model.safetensors"):
        assert (sweep / name).exists()
    assert f"imbvlm export {sweep}" in printed
    # A convolution tower takes neither adapters nor low-rank updates.
    assert "not tried: prompt_tuning, bias_tuning, fine_tuning; docs/guides/choosing.md" in printed
    chosen = json.loads((sweep / "post_hoc.json").read_text())
    assert set(chosen) >= {"winner", "linear probe", "class means", "discriminant", "prototype cache"}
    assert "after training, chosen on 500 rows of validation, winner:" in test
    both = r"[\d.]+ before and [\d.]+ after"
    assert re.search(rf"expected calibration error \(%\) on validation {both}, on test {both}", test)


def test_libraries_chatter_stays_in_the_log(smoke: tuple[Path, str]) -> None:
    _, printed = smoke
    for noise in ("INFO", "WARNING", "Tip:", "raylet", "optuna", "Tune"):
        assert noise not in printed


def test_the_winner_beats_plain_softmax_on_the_test_split(smoke: tuple[Path, str]) -> None:
    records = trials(smoke[0])
    last = {name: records[f"refit-{name}-seed0"]["epochs"][-1] for name in ("winner", "linear-probe")}
    gain = {
        key: last["winner"][f"test/{key}"] - last["linear-probe"][f"test/{key}"]
        for key in ("balanced_accuracy", "few_shot_accuracy")
    }
    assert gain["balanced_accuracy"] > 0.02
    assert gain["few_shot_accuracy"] > 0.05


def test_the_table_of_results_is_typed_and_has_every_trial(smoke: tuple[Path, str]) -> None:
    sweep, _ = smoke
    table = pq.read_table(sweep / "results.parquet")
    kinds = table.column("kind").to_pylist()
    assert (kinds.count("baseline"), kinds.count("search")) == (5, 8)
    assert kinds.count("refit") >= 6, "the winner, the baselines, and the members of a blend"
    assert kinds.count("delivered") >= 1
    assert str(table.schema.field("config.optim.lr").type) == "double"
    assert str(table.schema.field("val/best_balanced_accuracy").type) == "double"
    row = table.slice(kinds.index("search"), 1).to_pylist()[0]
    assert json.loads(row["config"])["method"] == row["config.method"]
    assert len(row["epochs"]) == row["num_epochs"]
    focal = [loss == "focal" for loss in table.column("config.loss.name").to_pylist()]
    for is_focal, gamma in zip(focal, table.column("config.loss.gamma").to_pylist(), strict=True):
        assert is_focal == (gamma is not None)


def test_the_test_split_is_read_only_by_refits(smoke: tuple[Path, str]) -> None:
    for record in trials(smoke[0]).values():
        reads = any(key.startswith("test/") for epoch in record["epochs"] for key in epoch)
        # The delivered model has the logits of its refits.
        assert reads == (record["kind"] in ("refit", "delivered"))


def test_a_finished_sweep_resumes_to_the_same_end_and_reads_nothing_again(smoke: tuple[Path, str], home: Path) -> None:
    sweep, printed = smoke
    before = {path.name: path.read_bytes() for path in (sweep / "trials").iterdir()}
    reading = (sweep / "test.json").read_bytes()
    again = run(QUICKSTART, "--smoke", "--resume", str(sweep), cwd=home)
    assert {path.name: path.read_bytes() for path in (sweep / "trials").iterdir()} == before
    assert (sweep / "test.json").read_bytes() == reading
    assert printed.split("validation, at")[1].split("best:")[0] == again.split("validation, at")[1].split("best:")[0]


def test_resuming_another_spec_is_refused_with_the_difference(smoke: tuple[Path, str], home: Path) -> None:
    printed = run(QUICKSTART, "--smoke", "--set", "searcher.seed=7", "--resume", str(smoke[0]), cwd=home, code=1)
    assert "searcher.seed was 0" in printed
    assert "is 7 now" in printed


def test_a_killed_driver_resumes_to_the_same_number_of_trials_none_twice(smoke: tuple[Path, str], home: Path) -> None:
    arguments = [sys.executable, QUICKSTART, "--smoke", "--set", "num_trials=6", "--storage", "runs"]
    driver = subprocess.Popen(
        arguments, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    killed: Path | None = None
    while time.monotonic() < deadline and killed is None:
        time.sleep(0.1)
        sweep = newest(home)
        if sweep != smoke[0] and sum(r["kind"] == "search" and r["state"] != "running" for r in trials_now(sweep)) >= 2:
            killed = sweep
    assert killed is not None
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = {key: r for key, r in trials(killed).items() if r["state"] in ("finished", "stopped")}
    printed = imbvlm("sweep", "resume", str(killed), cwd=home)
    after = trials(killed)
    assert "resuming" in printed
    assert sorted(key for key in after if key.startswith("t")) == [f"t{number:05d}" for number in range(1, 7)]
    assert all(r["state"] in ("finished", "stopped") for r in after.values())
    assert {key: after[key] for key in before} == before
    drawn = [json.dumps(r["draw"], sort_keys=True) for r in after.values() if r["kind"] == "search"]
    assert len(set(drawn)) == 6


def trials_now(sweep: Path) -> list[dict]:
    """Records while they are being written: each file is whole or not there."""
    return list(trials(sweep).values())


def test_export_predict_and_train_again(smoke: tuple[Path, str], home: Path) -> None:
    sweep, _ = smoke
    imbvlm("export", str(sweep), "-o", "my-model", cwd=home)
    rows = pq.read_table(ROOT / "imbvlm" / "assets" / "fashion_mnist_lt.parquet").to_pylist()
    names = json.loads((home / "my-model" / "model" / "config.json").read_text())["class_names"]
    wanted = [next(r for r in rows if r["split"] == "test" and r["label"] == label) for label in (1, 8)]
    for row in wanted:
        (home / "photos").mkdir(exist_ok=True)
        (home / "photos" / f"{names[row['label']]} ü.png").write_bytes(row["bytes"])
    (home / "photos" / "broken.jpg").write_bytes(b"<html>")
    (home / "my-model").rename(home / "moved")
    lines = [
        json.loads(line)
        for line in imbvlm(
            "predict", "moved", "photos", "--json", "--accept", "0.8", "--sets", "0.9", cwd=home
        ).splitlines()
        if line.startswith("{")
    ]
    assert len(lines) == 3
    for line in lines:
        if "broken" in line["image"]:
            assert line["error"]
        else:
            assert line["classes"][0]["class"] in line["image"]
            assert line["decision"] in ("accept", "review")
            assert line["set"][0] == line["classes"][0]["class"]
            assert sum(one["probability"] for one in line["classes"]) <= 1 + 1e-5
    calibration = json.loads((home / "moved" / "model" / "calibration.json").read_text())
    assert calibration["is_exported"], "the quickstart has official validation images"
    best = max(
        (r for r in trials(sweep).values() if r["kind"] == "search"),
        key=lambda r: max(e["val/balanced_accuracy"] for e in r["epochs"]),
    )
    metrics = json.loads(imbvlm("train", "moved/best.yaml", "--json", cwd=home))
    assert metrics["val/best_balanced_accuracy"] == max(e["val/balanced_accuracy"] for e in best["epochs"])


def test_labels_that_look_wrong_are_those_of_their_images(smoke: tuple[Path, str]) -> None:
    sweep, printed = smoke
    manifest = Manifest.read("embedded:fashion_mnist_lt")
    counts = re.search(r"labels that look wrong: (\d+) of (\d+) images", printed)
    assert counts is not None
    listed = list(csv.DictReader((sweep / "suspect_labels.csv").open(encoding="utf-8")))
    assert len(listed) == int(counts[1])
    assert 0 < len(listed) < 0.1 * int(counts[2])
    for own in listed:
        row = int(own["row"])
        entry = manifest.table.slice(row, 1).to_pylist()[0]
        assert (own["image"], own["split"]) == (entry["uri"], entry["split"])
        assert own["class"] == manifest.class_names[manifest.labels[row]]
        assert float(own["probability_of_looks_like"]) > 10 * float(own["probability_of_class"])


def test_a_second_sweep_computes_no_features_and_without_a_trial_leaves_with_the_causes_grouped(
    smoke: tuple[Path, str], home: Path
) -> None:
    before = feature_times(home)
    printed = run(
        QUICKSTART, "--smoke", "--set", "num_trials=2", "--set", "optim.lr=1.0e+30", "--set", "method=linear_probe",
        "--set", "classifier.kind=linear", "--set", "loss.name=cross_entropy", "--set", "train.clip_grad_norm=null",
        cwd=home, code=1,
    )  # fmt: skip
    assert "images to compute" not in printed
    assert feature_times(home) == before
    assert "failed:" in printed
    assert "wasn't finite" in printed
    assert "no trial of" in printed
    assert all(r["state"] == "failed" for r in trials(newest(home)).values() if r["kind"] == "search")


def feature_times(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (home / "runs" / "features").rglob("*.arrow")}


def test_what_the_cluster_can_never_hold_is_refused_with_both_numbers_and_leaves_no_folder(home: Path) -> None:
    before = sorted(home.rglob("*"))
    printed = run(QUICKSTART, "--smoke", "--set", "num_workers=64", cwd=home, code=1)
    assert "the cluster h" in printed
    assert "num_workers" in printed
    assert sorted(home.rglob("*")) == before


def test_the_best_few_run_again_with_more_seeds_and_the_best_mean_is_refitted(
    smoke: tuple[Path, str], home: Path
) -> None:
    settings = [f"--set={setting}" for setting in ("confirm_trials=2", "num_trials=3", "select_by=objective")]
    printed = run(QUICKSTART, "--smoke", *settings, cwd=home)
    sweep, found = newest(home), trials(newest(home))
    again = [record for record in found.values() if record["kind"] == "confirm"]
    assert sorted(record["config"]["train"]["seed"] for record in again) == [1, 1, 2, 2]
    means = {
        name: sum(max(e["val/balanced_accuracy"] for e in r["epochs"]) for r in [found[name], *same]) / 3
        for name in {record["name"] for record in again}
        if (same := [record for record in again if record["name"] == name])
    }
    winner = max(means, key=lambda name: means[name])
    assert f"best: {winner} of" in printed
    assert found["refit-winner-seed0"]["config"]["optim"]["lr"] == found[winner]["config"]["optim"]["lr"]
    assert "The best few over several seeds" in (sweep / "report.html").read_text()
    before = len(found)
    run(QUICKSTART, "--smoke", *settings, "--resume", str(sweep), cwd=home)
    assert len(trials(sweep)) == before


@pytest.mark.parametrize("driver", ["ray_train"])
def test_ray_train_gives_the_numbers_of_the_process(smoke: tuple[Path, str], home: Path, driver: str) -> None:
    sweeps = []
    for chosen in ("in_process", driver):
        run(QUICKSTART, "--smoke", "--set", "num_trials=1", "--set", "trial_scheduler.name=none",
            "--set", f"driver={chosen}", "--set", "cpus_per_worker=0.9", cwd=home)  # fmt: skip
        sweeps.append(trials(newest(home))["t00001"])
    values = [[epoch["train/loss"] for epoch in record["epochs"]] for record in sweeps]
    assert values[0] == values[1]


def test_what_needs_no_ray_train_runs_in_process_beside_a_search_in_the_encoder(home: Path) -> None:
    """A start under Ray Train takes 15 s, and a baseline on stored features a second."""
    settings = ["method=bias_tuning", "num_trials=1", "train.num_epochs=1", "cpus_per_worker=0.9"]
    printed = run(QUICKSTART, "--smoke", *(f"--set={setting}" for setting in settings), cwd=home)
    assert "driver ray_train" in printed
    records = trials(newest(home)).values()
    drivers = {(record["config"]["method"], record["driver"]) for record in records if record["kind"] != "delivered"}
    assert ("bias_tuning", "ray_train") in drivers
    assert {driver for method, driver in drivers if method != "bias_tuning"} == {"in_process"}
    assert {record["name"] for record in records if record["kind"] == "refit"} > {"winner", "linear probe"}
    assert all(record["state"] == "finished" for record in records)
