"""What a driver hears of one trial: each epoch, the end, and failures as reports; resumed as if never stopped."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import CLASS_COUNTS, VAL_PER_CLASS, tiny_config, tiny_features

from imbvlm.base import storage
from imbvlm.base.errors import DiskFullError
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.training.trial_session import TrialReport, TrialSession, TrialSettings


@pytest.fixture
def settings(tmp_path: Path) -> TrialSettings:
    return TrialSettings(
        config=tiny_config("linear_probe", train__num_epochs=30, optim__lr=0.3),
        feature_set=tiny_features(tmp_path / "features"),
        checkpoint_folder=str(tmp_path / "checkpoint"),
        objective="val/balanced_accuracy",
        checkpoint_seconds=0.0,
        patience=4,
    )


def reports_of(settings: TrialSettings) -> Generator[TrialReport, None, None]:
    return TrialSession(torch.device("cpu")).reports(settings)


def test_patience_ends_a_trial_early_and_survives_a_restart(settings: TrialSettings) -> None:
    whole = [
        report.metrics["val/balanced_accuracy"]
        for report in reports_of(dataclasses.replace(settings, checkpoint_folder=None))
    ]
    best = max(range(len(whole)), key=whole.__getitem__)
    assert len(whole) == best + 1 + 4 < 30
    for stop in (1, best + 2):
        stopped = reports_of(settings)
        started = [next(stopped).metrics["val/balanced_accuracy"] for _ in range(stop)]
        stopped.close()
        resumed = list(reports_of(settings))
        assert started + [report.metrics["val/balanced_accuracy"] for report in resumed] == whole
        assert resumed[-1].has_finished
        assert [report.is_last for report in resumed] == [False] * (len(resumed) - 1) + [True]
        shutil.rmtree(settings.checkpoint_folder)


def cut_index(folder: Path) -> None:
    (folder / "state.json").write_text("{")


def change_a_byte(folder: Path) -> None:
    (path,) = folder.glob("state-*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def another_trials(folder: Path) -> None:
    index = json.loads((folder / "state.json").read_text())
    index["scalars"]["trial"] = "another"
    (folder / "state.json").write_text(json.dumps(index))


def without_its_epoch(folder: Path) -> None:
    index = json.loads((folder / "state.json").read_text())
    index["scalars"]["epoch"] = None
    (folder / "state.json").write_text(json.dumps(index))


def a_later_versions(folder: Path) -> None:
    index = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(index | {"format": 99}))


@pytest.mark.parametrize(
    "damage",
    [cut_index, change_a_byte, another_trials, without_its_epoch, a_later_versions],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_checkpoint_starts_its_trial_again_which_says_so_once(
    settings: TrialSettings, tmp_path: Path, damage: Callable[..., Any]
) -> None:
    """Else a bit on a disk loses the trial for good: what has failed isn't run again."""
    undamaged = list(reports_of(dataclasses.replace(settings, checkpoint_folder=None)))
    before = reports_of(settings)
    for _ in range(2):
        next(before)
    before.close()
    damage(tmp_path / "checkpoint")
    again = list(reports_of(settings))
    values = [[report.metrics["val/balanced_accuracy"] for report in reports] for reports in (again, undamaged)]
    assert values[0] == values[1]
    assert again[-1].has_finished
    assert "checkpoint" in again[0].restart
    assert not any(report.restart for report in again[1:])
    # The second run has replaced it.
    assert next(reports_of(settings)).restart is None


def test_a_diverging_trial_ends_with_a_failure(settings: TrialSettings) -> None:
    config = tiny_config("linear_probe", classifier__kind="linear", optim__lr=1e38, train__clip_grad_norm=None)
    (report,) = reports_of(dataclasses.replace(settings, config=config))
    assert report.is_last
    assert "wasn't finite" in report.failure
    assert not [key for key in report.metrics if key.startswith("val/")]


def test_a_refit_leaves_what_a_report_shows_of_its_classes(settings: TrialSettings, tmp_path: Path) -> None:
    """Counts, pairs and bins are of the same look at the test split as the scores; rows lead back to its images."""
    refit = dataclasses.replace(settings, refit=True, score_test=True, model_folder=str(tmp_path / "refit"))
    *_, last = reports_of(refit)
    record = json.loads((tmp_path / "refit" / "per_class.json").read_text())
    assert record["split_counts"] == list(CLASS_COUNTS)
    assert record["num_trained_parameters"] == record["num_parameters"] > 0
    results = record["splits"]["test"]
    assert sum(results["correct"]) / sum(results["total"]) == pytest.approx(last.metrics["test/top1_accuracy"])
    assert 0 <= last.metrics["test/expected_calibration_error"] <= 1
    wrong = sum(results["total"]) - sum(results["correct"])
    assert sum(pair["count"] for pair in results["confusions"]) == wrong > 0
    counts = [pair["count"] for pair in results["confusions"]]
    assert counts == sorted(counts, reverse=True)
    for pair in results["confusions"]:
        assert pair["label"] != pair["predicted"]
        assert all(row // VAL_PER_CLASS == pair["label"] for row in pair["rows"])
    assert sum(results["confidence_bins"][0]) == sum(results["total"])
    assert "adjusted" not in results


def test_a_refit_leaves_its_classes_as_adjusted_too(settings: TrialSettings, tmp_path: Path) -> None:
    """An export is adjusted, and a report shows the classes of the export."""
    post_hoc = PostHocAdjustment(tau=1.5, alpha=0.0, temperature=2.0)
    folder = str(tmp_path / "refit")
    refit = dataclasses.replace(settings, refit=True, score_test=True, model_folder=folder, post_hoc=post_hoc)
    *_, last = reports_of(refit)
    results = json.loads((tmp_path / "refit" / "per_class.json").read_text())["splits"]["test"]
    for counts, split in ((results, "test"), (results["adjusted"], "test_post_hoc")):
        assert sum(counts["correct"]) / sum(counts["total"]) == pytest.approx(last.metrics[f"{split}/top1_accuracy"])
        wrong = sum(counts["total"]) - sum(counts["correct"])
        assert sum(pair["count"] for pair in counts["confusions"]) == wrong
    assert results["adjusted"]["predicted"] != results["predicted"]
    # Version 0.1 reads them by this name.
    assert results["adjusted_confidence_bins"] == results["adjusted"]["confidence_bins"] != results["confidence_bins"]


def test_a_trial_whose_copies_have_no_room_beside_anothers_reads_in_place_and_says_so(
    settings: TrialSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two towers, and a disk for the copies of one: neither trial waits for the other, none is lost."""
    monkeypatch.setattr("imbvlm.features.feature_cache.WAIT_SECONDS", 0.0)
    both = [tiny_features(tmp_path / name) for name in ("a", "b")]
    splits = [both[0].store(split) for split in both[0].splits]
    sizes = [split.layout.num_bytes("pooled", split.num_rows * split.num_views) for split in splits]
    copies = FeatureCacheConfig(
        folder=str(tmp_path / "copies"), max_gigabytes=1.5 * sum(sizes) / 1e9, of_shared_folders=True
    )
    first, second = (
        dataclasses.replace(
            settings,
            feature_set=dataclasses.replace(features, cache=copies),
            checkpoint_folder=None,
            score_test=True,
        )
        for features in both
    )
    running = reports_of(first)
    next(running)
    assert len(list((tmp_path / "copies").glob("*/bytes"))) == 3, "training, validation and test rows at once"
    *_, last = reports_of(second)
    assert last.has_finished
    assert "test/top1_accuracy" in last.metrics
    (said,) = caplog.messages
    assert said.startswith("features are read in place, which may be slower: the feature cache on ")
    assert list(running)[-1].has_finished
    caplog.clear()
    assert list(reports_of(second))[-1].has_finished
    assert not caplog.messages, "now there is room"


def test_a_machine_without_a_disk_for_copies_reads_a_shared_folder_in_place(
    settings: TrialSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That a cluster's machines keep copies by themselves must cost none of them the memory that its /tmp lies in."""
    monkeypatch.setattr("os.major", lambda device: 0)
    features = dataclasses.replace(
        tiny_features(tmp_path / "shared"), cache=FeatureCacheConfig(folder=str(tmp_path / "copies"))
    )
    *_, last = reports_of(dataclasses.replace(settings, feature_set=features))
    assert last.has_finished
    assert not (tmp_path / "copies").exists()
    assert "is not on a disk of this machine" in caplog.text


def test_a_disk_that_others_fill_while_a_shared_folder_is_copied_ends_no_trial(
    settings: TrialSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the sweep would take it for its own disk, and stop."""

    write = storage.write_bytes

    def full(uri: str, data: bytes) -> None:
        if ".arrow" in uri:
            raise DiskFullError(f"can't write {uri}: the disk is full; free some space there")
        write(uri, data)

    copies = FeatureCacheConfig(folder=str(tmp_path / "copies"), of_shared_folders=True)
    features = dataclasses.replace(tiny_features(tmp_path / "shared"), cache=copies)
    monkeypatch.setattr(storage, "write_bytes", full)
    *_, last = reports_of(dataclasses.replace(settings, feature_set=features))
    assert last.has_finished
    assert "the disk is full" in caplog.text
