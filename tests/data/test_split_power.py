"""Standard errors of a split against simulated accuracies, and where a manifest's summary and check show them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from imbvlm.cli.app import main
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_check import check_manifest
from imbvlm.data.manifest_summary import summary
from imbvlm.data.split_power import (
    NUM_FOLDS,
    SplitPower,
    resolve_confirm_folds,
    resolve_folds,
    split_power,
    split_powers,
)
from imbvlm.longtail.class_stats import ClassStats

COUNTS = np.array([40, 12, 3, 1, 0])


def power(counts: np.ndarray = COUNTS) -> SplitPower:
    return split_power(np.repeat(np.arange(len(counts)), counts), stats())


def stats() -> ClassStats:
    return folder([500, 200, 15, 9, 4]).class_stats()


def folder(train: list[int], val: tuple[int, ...] = ()) -> Manifest:
    labels = np.concatenate([np.repeat(np.arange(len(train)), train), np.repeat(np.arange(len(val)), val)])
    splits = ["train"] * sum(train) + ["val"] * sum(val)
    contents = [str(row).encode() for row in range(len(labels))]
    table = pa.table({"bytes": contents, "label": labels.astype(np.int32), "split": splits})
    return Manifest.build(table, [f"class {label}" for label in range(len(train))], "folder")


def test_the_errors_are_those_of_accuracies_that_are_drawn() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.binomial(COUNTS[:4], 0.5, size=(20_000, 4)) / COUNTS[:4]
    assert power().error == pytest.approx(drawn.mean(axis=1).std(), rel=0.02)
    # Few-shot classes are the third to the last, which has no images.
    assert power().few_shot_error == pytest.approx(drawn[:, 2:].mean(axis=1).std(), rel=0.02)
    assert (power().num_scored, power().num_classes, power().thin) == (4, 5, (2, 3))


def test_images_in_groups_decide_at_worst_as_little_as_their_groups() -> None:
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(3), (40, 12, 3))
    groups = rng.integers(15, size=len(labels))
    right = (rng.random((20_000, 15)) < 0.5)[:, groups]
    accuracies = np.mean([right[:, labels == label].mean(axis=1) for label in range(3)], axis=0)
    of_groups = split_power(labels, stats(), groups)
    assert of_groups.error == pytest.approx(accuracies.std(), rel=0.03)
    assert "at worst, where images of a group are right or wrong together" in of_groups.intervals()
    alone, plain = split_power(labels, stats(), rng.permutation(len(labels))), split_power(labels, stats())
    assert (alone.error, alone.few_shot_error) == pytest.approx((plain.error, plain.few_shot_error))


@pytest.mark.parametrize("number", [2, 30, 200])
def test_the_optimism_is_that_of_the_best_of_equal_choices(number: int) -> None:
    best = np.random.default_rng(0).normal(scale=power().error, size=(20_000, number)).max(axis=1).mean()
    assert power().optimism(number) == pytest.approx(best, rel=0.05)


def test_without_few_shot_images_nothing_is_said_of_them() -> None:
    without = power(np.array([40, 12, 0, 0, 0]))
    assert without.few_shot_error is None
    assert "few-shot" not in without.intervals()


def test_a_folder_without_a_validation_split_has_the_power_of_its_folds() -> None:
    """As in most folders: held out would be three rows of each class of 15 or more, one of 9, none of 4."""
    counts = [500, 200, 15, 9, 4, 1]
    powers = split_powers(folder(counts), split_seed=0)
    assert list(powers) == ["val"]
    assert powers["val"].error == pytest.approx(np.sqrt(0.25 * sum(1 / number for number in counts[:5])) / 5)
    text = summary(folder(counts))
    assert (
        "val               none; 5 folds of the training images score trials, on 728 images, 1 class without any"
        in text
    )
    assert "val decides       balanced accuracy over 5 of 6 classes to ± 12.9 points" in text
    assert "the best of 30 equally good configurations looks up to 13.5 points better than it is" in text


def test_folds_are_for_data_whose_held_out_rows_decide_too_little() -> None:
    few, many = folder([500, 200, 15, 9, 4]), folder([30] * 1000)
    assert resolve_folds(None, few, 0) == NUM_FOLDS
    assert resolve_folds(1, few, 0) == 1
    assert resolve_folds(3, few, 0) == 3
    assert resolve_folds(None, many, 0) == 1, "3 rows of each of 1,000 classes: a standard error of 0.9 points"
    assert resolve_folds(10, many, 0) == 10
    assert resolve_folds(10, folder([30, 3], (2, 2)), 0) == 1, "an official split"
    assert resolve_folds(None, folder([4, 3, 2]), 0) == NUM_FOLDS, "nothing would be held out"


def test_folds_confirm_where_an_official_split_decides_too_little() -> None:
    assert resolve_confirm_folds(5, folder([30, 3], (50, 50)), 0) == 5, "a standard error of 5 points"
    assert resolve_confirm_folds(5, folder([300, 200], (1300, 1300)), 0) == 1, "0.98 points"
    assert resolve_confirm_folds(5, folder([300, 3], (6000, 700)), 0) == 1, "0.998 points, few-shot 1.9"
    assert resolve_confirm_folds(5, folder([300, 300, 3], (9000, 9000, 600)), 0) == 5, "few-shot 2.04 points"
    assert resolve_confirm_folds(5, folder([1, 1], (50, 50)), 0) == 1, "no class can be divided"
    assert resolve_confirm_folds(5, folder([30, 3]), 0) == 1, "no official split"


def test_a_class_of_single_images_alone_can_select_nothing() -> None:
    findings = check_manifest(folder([1, 1, 1])).findings
    assert any("nothing can be selected" in finding.message for finding in findings if finding.severity == "error")


def test_check_warns_of_a_split_that_decides_next_to_nothing_and_names_its_thin_classes() -> None:
    findings = check_manifest(folder([500, 200, 15, 3, 2])).findings
    (warning,) = [finding for finding in findings if "val decides" in finding.message]
    assert (warning.severity, "± 18.7 points" in warning.message) == ("warning", True)
    (thin,) = [finding for finding in findings if "1 to 3 images in val" in finding.message]
    assert thin.severity == "note"
    assert thin.examples == ("class 3", "class 4")
    enough = check_manifest(folder([500, 200], (400, 400))).findings
    (note,) = [finding for finding in enough if "decides" in finding.message]
    assert note.severity == "note"


def test_show_has_the_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["manifest", "show", "embedded:fashion_mnist_lt", "--json"])
    errors = json.loads(capsys.readouterr().out)["standard_errors"]
    assert errors["val"]["balanced_accuracy"] == pytest.approx(0.5 / np.sqrt(50 * 10))
    assert errors["test"]["few_shot_accuracy"] == pytest.approx(0.5 / np.sqrt(200 * 2))
