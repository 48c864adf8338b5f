"""Validation logits that a trial leaves: small, exact where classes are decided, whole after a stop or a restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_data import CLASS_COUNTS, tiny_config, tiny_data, tiny_features
from trial_logits import trial_logits

from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.worker_group import SINGLE_WORKER
from imbvlm.training import validation_logits
from imbvlm.training.trial_run import build_trial
from imbvlm.training.trial_session import TrialReport, TrialSession, TrialSettings
from imbvlm.training.validation_logits import RowLogits, ValLogitsWriter, read_logits

NUM_CLASSES = len(CLASS_COUNTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return tiny_data(tmp_path_factory.mktemp("features"))


@pytest.fixture
def settings(tmp_path: Path) -> TrialSettings:
    return TrialSettings(
        config=tiny_config("linear_probe", train__num_epochs=6, optim__lr=0.3),
        feature_set=tiny_features(tmp_path / "features"),
        objective="val/balanced_accuracy",
        logits_file=str(tmp_path / "logits.safetensors"),
    )


def reports_of(settings: TrialSettings) -> Generator[TrialReport, None, None]:
    return TrialSession(torch.device("cpu")).reports(settings)


def relative(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.amax(dim=1, keepdim=True)


# ------------------------------------------------------------------------------------------------- one epoch's logits


def test_large_logits_keep_their_probabilities_and_predictions() -> None:
    """Half precision has steps of 64 at 1e5: relative to the largest, what counts is near 0 and exact."""
    logits = 1e5 + 3 * torch.randn(50, 20, dtype=torch.float64)
    logits[0, 3] = 9e5
    row_logits = RowLogits(50, 20)
    row_logits.add(np.arange(50), logits)
    gathered = row_logits.gathered(SINGLE_WORKER)
    assert gathered.dtype == torch.float16
    assert torch.isfinite(gathered).all()
    assert torch.equal(gathered.argmax(dim=1), logits.argmax(dim=1))
    torch.testing.assert_close(F.softmax(gathered.double(), dim=1), F.softmax(logits, dim=1), atol=0.01, rtol=0)


def test_rows_may_come_in_any_order_and_those_never_seen_are_nan() -> None:
    logits = torch.randn(5, 3)
    row_logits = RowLogits(6, 3)
    row_logits.add(np.array([4, 0]), logits[[4, 0]])
    row_logits.add(np.array([2, 1, 3]), logits[[2, 1, 3]])
    gathered = row_logits.gathered(SINGLE_WORKER)
    torch.testing.assert_close(gathered[:5].float(), relative(logits), atol=2e-3, rtol=1e-3)
    assert gathered[5].isnan().all()


def test_more_than_fits_is_not_kept(monkeypatch: pytest.MonkeyPatch, data: TrialData) -> None:
    assert RowLogits.fits(20_000, 1000)
    assert RowLogits.fits(24_000, 8142), "iNaturalist's held-out validation"
    assert not RowLogits.fits(10**6, 1000)
    assert not RowLogits.fits(0, 10)
    monkeypatch.setattr(validation_logits, "MAX_BYTES", 10)
    run = build_trial(tiny_config("linear_probe"), data)
    assert "val/loss" in next(run.epochs()).metrics
    assert run.val_logits is None


@pytest.mark.parametrize("second_stage", [None, "disalign", "tau_normalization"])
def test_they_are_those_that_the_metrics_are_of(data: TrialData, second_stage: str | None) -> None:
    overrides = {} if second_stage is None else {"second_stage__name": second_stage, "classifier__kind": "linear"}
    run = build_trial(tiny_config("decoder", **overrides), data)
    last = list(run.epochs())[-1].metrics
    kept = run.val_logits.gathered(SINGLE_WORKER).float()
    torch.testing.assert_close(kept, relative(trial_logits(run, data.val)), atol=0.02, rtol=2e-3)
    accuracy = (kept.argmax(dim=1).numpy() == data.val.labels).mean()
    assert last["val/top1_accuracy"] == pytest.approx(accuracy)


# --------------------------------------------------------------------------------------------------- what is written


def test_a_trial_leaves_its_best_and_its_last_epoch(settings: TrialSettings, data: TrialData) -> None:
    reports = list(reports_of(settings))
    kept = read_logits(settings.logits_file)
    values = [report.metrics["val/balanced_accuracy"] for report in reports]
    best = int(np.argmax(values)) + 1
    assert kept.epochs == {"best": best, "last": 6}
    assert kept.targets.tolist() == data.val.labels.tolist()
    assert [stats.counts.tolist() for stats in kept.stats] == [list(CLASS_COUNTS)]
    for logits, report in ((kept.best(), reports[best - 1]), (kept.last(), reports[-1])):
        accuracy = (logits.argmax(dim=1) == kept.targets).double().mean()
        assert report.metrics["val/top1_accuracy"] == pytest.approx(float(accuracy))
    assert ("last" in kept.logits) == (best != 6), "one copy where they are the same"


def test_a_trial_that_is_stopped_leaves_its_best_so_far(settings: TrialSettings) -> None:
    running = reports_of(settings)
    values = [next(running).metrics["val/balanced_accuracy"] for _ in range(3)]
    running.close()
    kept = read_logits(settings.logits_file)
    assert kept.epochs == {"best": int(np.argmax(values)) + 1}
    assert kept.last() is None
    assert kept.best() is not None


def test_what_was_left_before_a_restart_counts(settings: TrialSettings, tmp_path: Path) -> None:
    """The best epoch was before the restart: its logits are still there at the end."""
    whole = dataclasses.replace(settings, logits_file=str(tmp_path / "whole.safetensors"))
    list(reports_of(whole))
    expected = read_logits(whole.logits_file)
    stop = expected.epochs["best"]
    checkpointed = dataclasses.replace(settings, checkpoint_folder=str(tmp_path / "c"), checkpoint_seconds=0.0)
    running = reports_of(checkpointed)
    for _ in range(min(stop, 5)):
        next(running)
    running.close()
    list(reports_of(checkpointed))
    found = read_logits(settings.logits_file)
    assert found.epochs == expected.epochs
    assert torch.equal(found.best(), expected.best())
    assert torch.equal(found.last(), expected.last())


def test_better_epochs_in_a_row_are_not_written_one_by_one(tmp_path: Path, data: TrialData) -> None:
    uri = tmp_path / "l.safetensors"
    keeper = ValLogitsWriter.open(str(uri), [data], seconds=3600)
    shape = len(data.val.labels), NUM_CLASSES
    keeper.keep(1, torch.zeros(shape).half(), is_best=True, is_last=False)
    written = uri.stat().st_mtime_ns
    keeper.keep(2, torch.ones(shape).half(), is_best=True, is_last=False)
    assert uri.stat().st_mtime_ns == written
    keeper.flush()
    assert read_logits(str(uri)).epochs == {"best": 2}
    keeper.keep(3, torch.ones(shape).half(), is_best=False, is_last=True)
    assert read_logits(str(uri)).epochs == {"best": 2, "last": 3}


def test_nothing_or_a_damaged_file_is_none(tmp_path: Path) -> None:
    assert read_logits(str(tmp_path / "none")) is None
    (tmp_path / "damaged").write_bytes(b"not safetensors")
    assert read_logits(str(tmp_path / "damaged")) is None


def test_counts_that_are_one_array_are_written(tmp_path: Path, data: TrialData) -> None:
    keeper = ValLogitsWriter.open(
        str(tmp_path / "l"), [dataclasses.replace(data, class_stats=ClassStats.from_counts(CLASS_COUNTS))]
    )
    keeper.keep(1, torch.zeros(len(data.val.labels), NUM_CLASSES).half(), is_best=True, is_last=True)
    assert read_logits(str(tmp_path / "l")).stats[0].split_counts.tolist() == list(CLASS_COUNTS)
