"""Claims without a test split: corrected by models without each two folds, once, and only where there is time."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driven_jobs import Driver, driven
from tiny_data import tiny_config, tiny_features

from imbvlm.base.console import Console
from imbvlm.data.manifest import Manifest
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.sweep.records.adjustment_selection import logits_file, read_validation, select_adjustment
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.records.winner_selection import Selection, read_selection, select_winner
from imbvlm.sweep.run.claim_phase import correct_for_size
from imbvlm.sweep.run.sweep_run import SweepRun, run_fixed_jobs, settings_with_logits
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.jobs import Job, RunContext
from imbvlm.training.validation_logits import SavedValLogits, read_logits

TRIALS = {"t00000": tiny_config("linear_probe", optim__lr=0.1)}
BASELINES = {"b00001": tiny_config("zero_shot"), "b00002": tiny_config("class_means")}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return driven(monkeypatch)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """Training images alone, of classes that lie close together."""
    official = tiny_features(tmp_path_factory.mktemp("features"), (40, 20, 9, 4))
    whole, path = Manifest.read(official.manifest), str(Path(official.manifest).with_name("train.parquet"))
    whole.take(whole.rows_of("train")).write(path)
    return replace(official, manifest=path, splits={"train": official.splits["train"]})


def searched(folder: Path, features: FeatureSet, num_folds: int = 5, **fields: Any) -> SweepRun:
    """A sweep whose trials and baselines have ended, before the winner is selected."""
    base = {key: value for key, value in tiny_config("linear_probe").to_tree().items() if key != "optim"}
    space = {"parameters": {"optim.lr": {"loguniform": [0.001, 1.0]}}}
    spec = SweepSpec.from_tree(
        {"name": "s", "base": base, "space": space, "num_trials": 1, "num_folds": num_folds, **fields}
    )
    folder.mkdir(exist_ok=True)
    spec.to_yaml(folder / "sweep.yaml")
    manifest, log, console = Manifest.read(features.manifest), TrialLog.read(str(folder)), Console(io.StringIO())
    budget = Budget.open(spec, str(folder), 0.0)
    context = RunContext(spec.resolve(), str(folder), log, console, 1, budget, len(manifest.class_names))
    run = SweepRun(context.sweep, manifest, str(folder), log, console, budget, context, (), frozenset(), {}, num_folds)
    kinds: dict[TrialKind, Any] = {"baseline": BASELINES, "search": TRIALS}
    for kind, configs in kinds.items():
        run.features |= {feature_key(config): features for config in configs.values()}
        jobs = [Job(trial_id, kind, "", config) for trial_id, config in configs.items()]
        run_fixed_jobs(
            run,
            run.unfinished(jobs),
            partial(settings_with_logits, run),
            kind,
            len(jobs),
        )
    run.selection = select_winner(run.folder, run.log, run.spec)
    return run


def selected(run: SweepRun) -> Selection:
    assert run.selection is not None
    return run.selection


def saved(run: SweepRun, trial_id: str) -> SavedValLogits:
    logits = read_logits(logits_file(run.folder, trial_id))
    assert logits is not None
    return logits


def adjusted_correct(run: SweepRun, record: TrialRecord, runs: dict[str, TrialRecord]) -> list[bool]:
    rows = read_validation(run.folder, record, run.log, runs)
    assert rows is not None
    return (select_adjustment(rows, run.spec)[1].argmax(dim=1) == rows.targets).tolist()


@pytest.mark.parametrize("num_folds", [3, 5])
def test_claims_gain_what_the_models_without_two_folds_lack(
    tmp_path: Path, features: FeatureSet, driver: Driver, num_folds: int
) -> None:
    run = searched(tmp_path, features, num_folds, blend=None)
    before = selected(run)
    assert not before.is_size_corrected
    driver.groups = []
    correct_for_size(run)
    after = selected(run)
    assert after.is_size_corrected
    assert read_selection(run.folder) == after
    assert sum(map(len, driver.groups)) == len(run.log.of("pairs"))
    of_folds, of_pairs = saved(run, before.winner), saved(run, f"{before.winner}-pairs")
    # Every row is scored by the models of as many pairs as there are other folds.
    assert len(of_pairs.targets) == (num_folds - 1) * len(of_folds.targets)
    assert len(of_pairs.stats) == num_folds * (num_folds - 1) // 2
    lacking = {int(of_folds.stats[0].split_counts.sum() - stats.counts.sum()) for stats in of_pairs.stats}
    assert max(lacking) <= 2 * np.bincount(of_folds.folds).max()
    # By hand: what a row loses with a second fold, its mean over the pairs without the row, by 1 / sqrt(images seen).
    record = run.log.records[before.winner]
    runs = {name: run.log.records[f"{name}-pairs"] for name in (before.winner, "b00001")}
    folds, pairs = (
        TrialData.open_folds(record.trial_config(), features, num_folds, in_pairs=in_pairs)
        for in_pairs in (False, True)
    )
    right, without = adjusted_correct(run, record, {}), adjusted_correct(run, record, runs)
    by_row: dict[int, list[tuple[bool, float]]] = {row: [] for fold in folds for row in fold.val.rows}
    scored = [(row, label, pair) for pair in pairs for row, label in zip(pair.val.rows, pair.val.labels, strict=True)]
    for (row, label, pair), is_right in zip(scored, without, strict=True):
        by_row[row].append((is_right, pair.class_stats.counts[label] ** -0.5))
    of_class: dict[int, list[tuple[float, float, float]]] = {label: [] for label in of_folds.targets.tolist()}
    totals, seen = of_folds.stats[0].split_counts, [fold.class_stats.counts for fold in folds for _ in fold.val.rows]
    for label, is_right, others, counts in zip(of_folds.targets.tolist(), right, by_row.values(), seen, strict=True):
        assert len(others) == num_folds - 1
        loss = is_right - np.mean([was_right for was_right, _ in others])
        root = counts[label] ** -0.5
        of_class[label].append((loss, np.mean([other for _, other in others]) - root, root - totals[label] ** -0.5))
    gains = []
    for losses, steps, missing in (np.array(rows).T for rows in of_class.values()):
        gains.append(losses.sum() / steps.sum() * missing.mean())
    plain = before.claims["balanced_accuracy"]
    assert after.claims["balanced_accuracy"].value == pytest.approx(min(plain.value + np.mean(gains), 1.0))
    for metric, claim in after.claims.items():
        assert claim.standard_error >= before.claims[metric].standard_error


def test_a_resumed_sweep_trains_no_pair_twice_and_claims_the_same(
    tmp_path: Path, features: FeatureSet, driver: Driver
) -> None:
    run = searched(tmp_path, features)
    correct_for_size(run)
    driver.groups = []
    again = searched(tmp_path, features)
    correct_for_size(again)
    assert driver.groups == []
    assert again.selection == run.selection


def test_where_time_is_up_claims_stay_and_say_what_they_are_of(
    tmp_path: Path, features: FeatureSet, driver: Driver
) -> None:
    run = searched(tmp_path, features, max_hours=1.0)
    (tmp_path / "spent.json").write_text('{"seconds": 3601, "gpu_seconds": 0, "machine_seconds": 3601, "phases": {}}')
    run.budget = Budget.open(run.spec, run.folder, 0.0)
    driver.groups = []
    correct_for_size(run)
    assert driver.groups == []
    assert "by models of 80 % of the training images" in selected(run).basis


def test_two_folds_correct_nothing(tmp_path: Path, features: FeatureSet, driver: Driver) -> None:
    run = searched(tmp_path, features, num_folds=2)
    driver.groups = []
    correct_for_size(run)
    assert driver.groups == []
    assert not selected(run).is_size_corrected
