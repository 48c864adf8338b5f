"""A trial over folds: each fold's numbers are those of training on its rows alone, and its scores are of all rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_data import tiny_config, tiny_features
from trial_logits import trial_logits

from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.folds import deal_folds
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import with_column
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.post_hoc_adjustment import adjust_logits, select_tau
from imbvlm.longtail.worker_group import SINGLE_WORKER
from imbvlm.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from imbvlm.training.folded_run import FoldedRun
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_run import build_trial
from imbvlm.training.trial_session import HAS_JOINED, TrialReport, TrialSession, TrialSettings
from imbvlm.training.validation_logits import SavedValLogits, read_logits

NUM_FOLDS = 3
# A class of one image is trained on and never scored.
COUNTS = (40, 12, 4, 2, 1, 0)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """With a validation split."""
    return tiny_features(tmp_path_factory.mktemp("features"), COUNTS)


@pytest.fixture(scope="module")
def features(official: FeatureSet) -> FeatureSet:
    """The same images without a validation split."""
    whole, path = Manifest.read(official.manifest), str(Path(official.manifest).with_name("unsplit.parquet"))
    whole.take(np.sort(np.concatenate([whole.rows_of(split) for split in ("train", "test")]))).write(path)
    splits = {split: path for split, path in official.splits.items() if split != "val"}
    return replace(official, manifest=path, splits=splits)


def folded(config: TrialConfig, features: FeatureSet) -> FoldedRun:
    return FoldedRun([build_trial(config, data) for data in TrialData.open_folds(config, features, NUM_FOLDS)])


def settings_of(config: TrialConfig, features: FeatureSet, folder: Path, **options: object) -> TrialSettings:
    logits = str(folder / "logits.safetensors")
    return TrialSettings(config, features, "val/balanced_accuracy", logits_file=logits, num_folds=NUM_FOLDS, **options)


def session() -> TrialSession:
    return TrialSession(torch.device("cpu"))


def saved(settings: TrialSettings) -> SavedValLogits:
    logits = read_logits(str(settings.logits_file))
    assert logits is not None
    return logits


def test_every_image_of_a_class_of_two_or_more_is_scored_by_a_model_that_never_saw_it(features: FeatureSet) -> None:
    config = tiny_config("linear_probe")
    folds = TrialData.open_folds(config, features, NUM_FOLDS)
    everything = np.arange(sum(COUNTS))
    for fold in folds:
        assert not np.intersect1d(fold.train.rows, fold.val.rows).size
        assert np.array_equal(np.union1d(fold.train.rows, fold.val.rows), everything)
        assert fold.class_stats.counts.tolist() == np.bincount(fold.train.labels, minlength=len(COUNTS)).tolist()
        assert fold.class_stats.split_counts.tolist() == list(COUNTS)
    scored = np.concatenate([fold.val.rows for fold in folds])
    assert sorted(scored) == everything[: sum(COUNTS[:4])].tolist()


def test_images_in_groups_keep_them_and_have_no_standard_error_of_independent_images(
    features: FeatureSet, tmp_path: Path
) -> None:
    manifest, path = Manifest.read(features.manifest), str(tmp_path / "cameras.parquet")
    names = [f"cam{row % 12}" for row in range(len(manifest))]
    column = pa.array(names, manifest.table.schema.field("group").type)
    grouped = replace(manifest, table=with_column(manifest.table, "group", column))
    grouped.write(path)
    config = tiny_config("class_means")
    runs = []
    for own in (features, replace(features, manifest=path)):
        settings = settings_of(config, own, tmp_path / f"{len(runs)}")
        runs.append((list(session().reports(settings))[-1].metrics, saved(settings).groups))
    (plain, no_groups), (metrics, groups) = runs
    assert no_groups is None
    assert set(plain) - set(metrics) == {"val/balanced_standard_error"}
    assert groups is not None
    assert (
        groups.tolist() == grouped.label_rows().groups[deal_folds(grouped.label_rows(), NUM_FOLDS, 0).val_rows].tolist()
    )


@pytest.mark.parametrize("method", ["linear_probe", "class_means", "discriminant", "zero_shot"])
def test_its_scores_are_of_all_folds_rows_and_its_models_those_of_each_fold(
    features: FeatureSet, tmp_path: Path, method: str
) -> None:
    config = tiny_config(method)
    settings = settings_of(config, features, tmp_path)
    last = list(session().reports(settings))[-1]
    assert last.has_finished
    logits, targets = [], []
    for data in TrialData.open_folds(config, features, NUM_FOLDS):
        alone = build_trial(config, data)
        list(alone.epochs())
        logits.append(trial_logits(alone, data.val))
        targets.append(torch.from_numpy(data.val.labels))
    stored, expected, labels = saved(settings), torch.cat(logits), torch.cat(targets)
    relative = expected - expected.amax(dim=1, keepdim=True)
    torch.testing.assert_close(stored.last().float(), relative.float(), atol=0.02, rtol=2e-3)
    assert torch.equal(stored.targets, labels)
    assert stored.folds.bincount().tolist() == [len(of_fold) for of_fold in targets]
    right = expected.argmax(dim=1) == labels
    by_class = [right[labels == label].double().mean() for label in labels.unique()]
    assert last.metrics["val/balanced_accuracy"] == pytest.approx(float(torch.stack(by_class).mean()))
    assert last.metrics["val/top1_accuracy"] == pytest.approx(float(right.double().mean()))


def test_the_best_epoch_is_that_of_all_folds_together(features: FeatureSet, tmp_path: Path) -> None:
    config = tiny_config("linear_probe", train__num_epochs=6, optim__lr=0.3)
    settings = settings_of(config, features, tmp_path)
    reports = list(session().reports(settings))
    values = [report.metrics["val/balanced_accuracy"] for report in reports]
    assert reports[-1].metrics["val/best_balanced_accuracy"] == max(values)
    assert saved(settings).epochs == {"best": int(np.argmax(values)) + 1, "last": 6}


def test_each_fold_is_adjusted_by_the_counts_of_its_own_training(features: FeatureSet, tmp_path: Path) -> None:
    settings = settings_of(tiny_config("linear_probe"), features, tmp_path)
    list(session().reports(settings))
    stored = saved(settings)
    logits, counts = stored.last().float(), stored.class_counts(torch.ones(len(stored.targets), dtype=torch.bool))
    by_fold = [
        adjust_logits(logits[stored.folds == fold], stats.counts, 1.0) for fold, stats in enumerate(stored.stats)
    ]
    assert torch.equal(adjust_logits(logits, counts, 1.0), torch.cat(by_fold))
    accuracy = dict(select_tau(logits, stored.targets, counts).candidates)[1.0]
    right = torch.cat(by_fold).argmax(dim=1) == stored.targets
    present = stored.targets.unique()
    assert accuracy == pytest.approx(
        float(torch.stack([right[stored.targets == c].double().mean() for c in present]).mean())
    )


def test_it_goes_on_from_a_checkpoint_to_the_same_numbers(features: FeatureSet, tmp_path: Path) -> None:
    config = tiny_config("linear_probe", train__num_epochs=4)
    whole = [result.metrics for result in folded(config, features).epochs(lambda: None)]
    begun = folded(config, features)
    epochs = begun.epochs(lambda: None)
    next(epochs)
    next(epochs)
    save_checkpoint(str(tmp_path), begun.state_dict())
    resumed = folded(config, features)
    resumed.load_state_dict(load_checkpoint(str(tmp_path)))
    rest = [result.metrics for result in resumed.epochs(lambda: None)]
    numbers = ("val/", "train/loss")
    for before, after in zip(whole[2:], rest, strict=True):
        assert {k: v for k, v in before.items() if k.startswith(numbers)} == {
            k: v for k, v in after.items() if k.startswith(numbers)
        }
    assert next(resumed.epochs(lambda: None)).metrics == rest[-1], "its last result, once it has ended"
    other = FoldedRun([build_trial(config, data) for data in TrialData.open_folds(config, features, 2)])
    with pytest.raises(CheckpointError, match="3 folds, and not 2"):
        other.load_state_dict(load_checkpoint(str(tmp_path)))


def test_trials_that_train_together_have_the_numbers_of_each_alone(features: FeatureSet, tmp_path: Path) -> None:
    configs = [tiny_config("linear_probe", optim__lr=rate) for rate in (0.01, 0.3)]
    pack, together = TrialPack(), []
    running = [
        session().reports(settings_of(config, features, tmp_path / str(number)), pack)
        for number, config in enumerate(configs)
    ]
    assert [next(reports) for reports in running] == [HAS_JOINED, HAS_JOINED]
    for _ in range(3):
        together.append([next(reports) for reports in running])
    for number, config in enumerate(configs):
        alone: list[TrialReport] = list(session().reports(settings_of(config, features, tmp_path / f"alone{number}")))
        for epoch, report in enumerate(alone):
            assert together[epoch][number].metrics["val/balanced_accuracy"] == pytest.approx(
                report.metrics["val/balanced_accuracy"]
            )
            assert together[epoch][number].metrics["val/loss"] == pytest.approx(report.metrics["val/loss"], rel=1e-4)


def test_a_fold_whose_numbers_run_away_ends_the_trial_with_its_sentence(features: FeatureSet, tmp_path: Path) -> None:
    config = tiny_config("linear_probe", optim__lr=1e30, train__clip_grad_norm=None)
    last = list(session().reports(settings_of(config, features, tmp_path)))[-1]
    assert last.failure is not None
    assert "lower optim.lr" in last.failure


def test_a_refit_trains_on_all_images(features: FeatureSet, tmp_path: Path) -> None:
    settings = settings_of(tiny_config("linear_probe"), features, tmp_path, refit=True, score_test=True)
    last = list(session().reports(settings))[-1]
    assert "test/balanced_accuracy" in last.metrics


def test_a_longer_fold_of_a_fixed_number_of_steps_ends_last(features: FeatureSet) -> None:
    """Folds of unequal size pass over their rows in unequal steps, and all take the same number of steps."""
    config = tiny_config("linear_probe").with_overrides({"train.num_epochs": None, "train.num_steps": 5})
    run = folded(config, features)
    results = list(run.epochs(lambda: None))
    assert len(results) == run.num_epochs
    assert {of_fold.step for of_fold in run.runs} == {5}
    assert run.gathered_logits(SINGLE_WORKER).shape == (sum(COUNTS[:4]), len(COUNTS))


@pytest.mark.parametrize("method", ["linear_probe", "discriminant", "zero_shot"])
def test_official_rows_are_scored_by_every_fold_model_and_trained_on_by_none(
    official: FeatureSet, features: FeatureSet, tmp_path: Path, method: str
) -> None:
    """The rows of the folds have the numbers that they have without a validation split."""
    config = tiny_config(method)
    settings = settings_of(config, official, tmp_path / "official")
    last = list(session().reports(settings))[-1]
    without = settings_of(config, features, tmp_path / "without")
    expected = list(session().reports(without))[-1]
    assert last.metrics["val/balanced_accuracy"] == expected.metrics["val/balanced_accuracy"]
    stored, of_folds = saved(settings), saved(without)
    is_official = stored.folds == NUM_FOLDS
    assert torch.equal(stored.last()[~is_official], of_folds.last())
    assert [stats.counts.tolist() for stats in stored.stats] == [stats.counts.tolist() for stats in of_folds.stats]
    whole = TrialData.open(config, official)
    assert stored.targets[is_official].tolist() == whole.val.labels.tolist()
    for tau in (0.0, 1.3):
        adjusted = []
        for data in TrialData.open_folds(config, official, NUM_FOLDS):
            run = build_trial(config, data)
            list(run.epochs())
            counts = np.maximum(np.bincount(data.train.labels, minlength=len(COUNTS)), 0.5)
            prior = torch.from_numpy(np.log(counts / counts.sum()))
            adjusted.append(trial_logits(run, whole.val).double() - tau * prior)
        mean = torch.stack(adjusted).mean(dim=0)
        counts = stored.class_counts(is_official)
        actual = adjust_logits(stored.last()[is_official].double(), counts, tau)
        torch.testing.assert_close(actual.softmax(dim=1), mean.softmax(dim=1), atol=2e-3, rtol=0)


def test_a_run_over_folds_goes_on_to_the_same_official_scores(official: FeatureSet, tmp_path: Path) -> None:
    config = tiny_config("linear_probe", train__num_epochs=4)
    whole = settings_of(config, official, tmp_path / "whole")
    list(session().reports(whole))
    stopped = settings_of(
        config, official, tmp_path / "stopped", checkpoint_folder=str(tmp_path / "c"), checkpoint_seconds=0.0
    )
    running = session().reports(stopped)
    next(running)
    next(running)
    running.close()
    assert read_logits(str(stopped.logits_file)) is None, "only the last epoch's are kept"
    list(session().reports(stopped))
    assert torch.equal(saved(stopped).last(), saved(whole).last())
    assert torch.equal(saved(stopped).folds, saved(whole).folds)
