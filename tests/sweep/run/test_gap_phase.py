"""The gap to unseen groups: what runs, what is written and said, and when it isn't measured."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from driven_jobs import Driver, begun, driven
from tiny_data import tiny_features

from imbvlm.data.folds import deal_folds
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import with_column
from imbvlm.features.feature_set import FeatureSet
from imbvlm.sweep.plan.cost_estimate import ALONE, Estimator, Interval, SpeedTable, SplitSizes, cost_key
from imbvlm.sweep.plan.speed_benchmark import TrialSpeed
from imbvlm.sweep.plan.sweep_plan import split_sizes
from imbvlm.sweep.records.adjustment_selection import logits_file
from imbvlm.sweep.records.sweep_folder import read_gap
from imbvlm.sweep.run.gap_phase import measure_gap
from imbvlm.training.validation_logits import read_logits


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return driven(monkeypatch)


def with_cameras(folder: Path, num_groups: int) -> FeatureSet:
    features = tiny_features(folder)
    manifest = Manifest.read(features.manifest)
    names = [f"cam{row % num_groups}" for row in range(len(manifest))]
    column = pa.array(names, manifest.table.schema.field("group").type)
    replace(manifest, table=with_column(manifest.table, "group", column)).write(features.manifest)
    return features


@pytest.mark.parametrize("num_groups", [4, 12])
def test_both_kinds_of_folds_are_scored_and_the_difference_is_said(
    tmp_path: Path, driver: Driver, num_groups: int
) -> None:
    features, printed = with_cameras(tmp_path / "features", num_groups), io.StringIO()
    run = begun(tmp_path / "sweep", features, printed)
    measure_gap(run)
    gap, winner = read_gap(run.folder), run.log.winner_first(run.spec.objective)[0].trial_id
    assert gap is not None
    assert (gap.num_groups, gap.interval is None) == (num_groups, num_groups < 10)
    manifest = run.manifest
    rows, num_folds = manifest.label_rows(), min(5, num_groups)
    for side, value in (("random", gap.at_random), ("groups", gap.of_groups)):
        saved = read_logits(logits_file(run.folder, f"{winner}-{side}"))
        assert saved is not None
        of_folds = saved.targets[saved.folds < num_folds]
        val_rows = deal_folds(rows, 5, run.spec.split_seed, at_random=side == "random").val_rows
        assert of_folds.tolist() == manifest.labels[val_rows].tolist()
        hits = (saved.last()[: len(of_folds)].argmax(dim=1) == of_folds).double().numpy()
        by_class = np.bincount(of_folds, weights=hits) / np.bincount(of_folds)
        assert value == pytest.approx(by_class.mean())
    shares = dict.fromkeys(manifest.table.column("group").to_pylist(), 0)
    for row in deal_folds(rows, 5, run.spec.split_seed).val_rows:
        shares[manifest.table.column("group")[int(row)].as_py()] += 1
    assert all(shares[name] == number for name, number, _ in gap.worst)
    assert len(gap.worst) == min(10, num_groups)
    assert "heads of the delivered model have balanced" in printed.getvalue()
    assert ("too few for an interval" in printed.getvalue()) == (num_groups < 10)
    assert saved.groups is not None
    assert saved.groups.tolist()[: len(of_folds)] == rows.groups[val_rows].tolist()
    # Nothing is run twice.
    driver.groups = []
    measure_gap(begun(tmp_path / "sweep", features))
    assert driver.groups == []
    assert read_gap(run.folder) == gap


@pytest.mark.parametrize("num_groups", [4, 12])
def test_the_plan_counts_the_runs_that_measure_it(tmp_path: Path, driver: Driver, num_groups: int) -> None:
    run = begun(tmp_path / "sweep", with_cameras(tmp_path / "features", num_groups))
    measure_gap(run)
    jobs = [record for record in run.log.records.values() if record.kind == "gap"]
    rows = split_sizes(run.sweep, run.manifest)
    for job in jobs:
        saved, sizes = read_logits(logits_file(run.folder, job.trial_id)), rows.of_gap(job.trial_config())
        assert saved is not None
        assert len(saved.stats) == sizes.num_runs == rows.gap_folds
        num_train = [int(stats.counts.sum()) for stats in saved.stats]
        assert sizes.train == pytest.approx(np.mean(num_train), abs=1)
        assert sizes.val == int((saved.folds < rows.gap_folds).sum())
    config = jobs[0].trial_config()
    speed = TrialSpeed(seconds_per_train_image=1.0, eval_seconds=0.5, host_bytes=0, device_bytes=0)
    speeds = SpeedTable({cost_key(config): (config.method, speed)})

    def refits(rows: SplitSizes) -> Interval:
        estimate = Estimator(run.sweep, [config], [], speeds, rows, 1, start=3.0).estimate(0.0, ALONE)
        assert estimate.refits is not None
        return estimate.refits

    sizes = rows.of_gap(config)
    seconds = 3.0 + (sizes.num_runs * sizes.train + 0.5 * sizes.val) * config.train.num_epochs
    more = refits(rows).low - refits(replace(rows, gap_folds=1)).low
    assert more == pytest.approx(len(jobs) * seconds)


def test_it_is_not_measured_without_groups_or_before_the_refits(tmp_path: Path, driver: Driver) -> None:
    run = begun(tmp_path / "sweep", tiny_features(tmp_path / "features"))
    measure_gap(run)
    assert read_gap(run.folder) is None
    run = begun(tmp_path / "other", with_cameras(tmp_path / "cameras", 12))
    run.num_refits_left = 1
    measure_gap(run)
    assert read_gap(run.folder) is None
    assert driver.groups == []


@pytest.mark.parametrize(
    ("num_groups", "problem"), [(1, "its groups don't give two folds"), (9999, "every training image is a group")]
)
def test_groups_that_say_nothing_are_said(tmp_path: Path, num_groups: int, problem: str) -> None:
    features, printed = with_cameras(tmp_path / "features", num_groups), io.StringIO()
    run = begun(tmp_path / "sweep", features, printed)
    measure_gap(run)
    assert f"the gap to unseen groups isn't measured: {problem}" in printed.getvalue()
    assert read_gap(run.folder) is None
