"""Decisions and sets of a model: the same in Python, in every file and through the command, or a reason for none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import exit_code
from exported_model import CLASS_NAMES, write_model_folder, write_noise

import imbvlm
from imbvlm.base.errors import ImbvlmError
from imbvlm.inference.calibration_file import CALIBRATION_FILE, SCORES_FILE, ModelCalibration, read_prevalence
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.decisions.acceptance import learn_acceptance
from imbvlm.longtail.decisions.prediction_sets import learn_sets
from imbvlm.longtail.decisions.scored_rows import ScoredRows

STATS = ClassStats.from_counts([90, 9, 1])


def made_rows(num_rows: int = 600, wrong_below: float = 0.77) -> ScoredRows:
    """Rows of three classes in turn, right above a confidence, which runs through the classes' rows."""
    predicted = np.arange(num_rows) % 3
    confidence = np.linspace(0.34, 1, num_rows).astype(np.float32).astype(np.float64)
    is_right = confidence > wrong_below
    labels = np.where(is_right, predicted, (predicted + 1) % 3)
    own = np.where(is_right, confidence, (1 - confidence) / 2)
    return ScoredRows(labels, predicted, confidence, own, np.full(3, 1 / 3), STATS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    ModelCalibration(CLASS_NAMES, made_rows(), is_exported=True).write(str(folder))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("photos"))


def run(*arguments: str) -> object:
    return exit_code("predict", "--no-ray", *arguments)


def test_each_image_is_decided_by_its_class_and_probability(folder: Path, photos: Path) -> None:
    model, images = imbvlm.load(folder, "cpu"), sorted(photos.glob("*.png"))
    predictions = model.deciding(accept=0.9, sets=0.8).predict(images, top=3)
    acceptance, sets = learn_acceptance(made_rows(), 0.9), learn_sets(made_rows(), 0.8)
    for own in predictions:
        accepts = own.probabilities[0] > acceptance.thresholds[own.labels[0]]
        assert own.decision == ("accept" if accepts else "review")
        is_in = [value >= sets.lowest[label] for label, value in zip(own.labels, own.probabilities, strict=True)]
        expected = [name for name, inside in zip(own.class_names, is_in, strict=True) if inside]
        assert own.class_set == tuple(expected or own.class_names[:1])
    assert {own.decision for own in predictions} == {"accept", "review"}
    plain = model.predict(images)
    assert [(own.decision, own.class_set) for own in plain] == [(None, None)] * 8, "the model itself stays as it is"
    assert [own.class_names for own in plain] == [own.class_names for own in predictions]
    assert model.deciding(sets=0.8).predict(images[0])[0].decision is None


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_have_decisions_and_sets(folder: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    flags = ["--accept", "0.9", "--sets", "0.99", "--prevalence", "even", "--top", "1", "-o", str(out)]
    assert run(str(folder), str(photos), *flags) == 0
    predictions = imbvlm.load(folder, "cpu").deciding(0.9, 0.99, "even").predict(sorted(photos.iterdir()))
    expected = [(own.decision, own.class_set) for own in predictions]
    if suffix == "csv":
        rows = list(csv.DictReader(out.open(encoding="utf-8")))
        assert list(rows[0]) == ["image", "class_1", "probability_1", "decision", "set", "error"]
        assert [(row["decision"], row["set"]) for row in rows] == [(a or "", "; ".join(b or ())) for a, b in expected]
    else:
        rows = pq.read_table(out).to_pylist() if suffix == "parquet" else list(map(json.loads, out.open()))
        assert [(row["decision"], row["set"]) for row in rows] == [(a, b and list(b)) for a, b in expected]
    assert any(len(own or ()) > 1 for _, own in expected)
    assert expected[-1] == (None, None), "an image that can't be read"


def test_the_command_says_what_is_promised(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder), str(photos), "--accept", "0.9", "--sets", "0.9", "--prevalence", "training") == 0
    printed = capsys.readouterr()
    assert "come as 600 validation images, which the exported weights have scored" in printed.err
    assert "approximate at this prevalence: " in printed.err
    assert "each promise holds at 95 %" in printed.err
    assert "sets 0.9: 3 classes covered one by one" in printed.err
    lines = printed.out.splitlines()
    assert all((" -> accept" in line or " -> review" in line) and " -> {" in line for line in lines[:8])
    assert "->" not in lines[8]


def test_scores_of_the_search_are_called_an_estimate_and_unseen_classes_are_named(tmp_path: Path) -> None:
    rows = made_rows()
    calibration = ModelCalibration(CLASS_NAMES, rows.subset(rows.labels < 2))
    notes = calibration.decide(sets=0.9, prevalence={"cat": 2, CLASS_NAMES[2]: 1}).notes
    assert notes[0].startswith("promises are estimates")
    assert notes[1].endswith(f"without {CLASS_NAMES[2]}, which no validation image has")
    own = {name: float(number) for name, number in zip(CLASS_NAMES, rows.counts, strict=True)}
    same = ModelCalibration(CLASS_NAMES, rows).decide(accept=0.9, prevalence=own)
    assert not any("approximate" in note for note in same.notes), "it is the rows' own prevalence"
    calibration.write(str(tmp_path))
    read = ModelCalibration.read(str(tmp_path), CLASS_NAMES)
    assert read is not None
    assert not read.is_exported
    assert read.decide(sets=0.9).notes == calibration.decide(sets=0.9).notes


def test_a_prevalence_file_has_a_class_and_a_share_in_each_row(tmp_path: Path) -> None:
    path = tmp_path / "shares.csv"
    path.write_text('class,share\ncat,0.2\n"dog, wet",3\n\n', encoding="utf-8")
    assert read_prevalence(str(path)) == {"cat": 0.2, "dog, wet": 3.0}
    path.write_text("cat,0.2\ncat,1\ndog,many\nfox\nowl,-1\nhen,nan\n", encoding="utf-8")
    with pytest.raises(ImbvlmError) as caught:
        read_prevalence(str(path))
    mistakes = str(caught.value).split("\n  ")
    assert [line.split(" must")[0] for line in mistakes[1:]] == [
        "line 2 has 'cat' again", "line 3", "line 4", "line 5", "line 6"
    ]  # fmt: skip
    path.write_text("class, Share\n cat , 0.5\n'=fox,1\n", encoding="utf-8")
    assert read_prevalence(str(path)) == {"cat": 0.5, "=fox": 1.0}, "spaces count for nothing"
    for text, mistake in (
        ("cat,0\n", "no share is above 0"),
        ("", "it has no row"),
        ("x" * 200_000, "read as CSV: field"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ImbvlmError, match=mistake):
            read_prevalence(str(path))
    path.write_text("cat;0.5\n" * 500, encoding="utf-8")
    with pytest.raises(ImbvlmError, match="and 480 more") as caught:
        read_prevalence(str(path))
    assert len(str(caught.value).splitlines()) == 22
    with pytest.raises(ImbvlmError, match="must be training, even or a CSV file, and evne is not there"):
        read_prevalence("evne")
    path.write_bytes(b"cat,\xff\n")
    with pytest.raises(ImbvlmError, match="must be UTF-8"):
        read_prevalence(str(path))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"accept": 1.5}, "the share to accept must be between 0 and 1, got 1.5"),
        ({"sets": 0.0}, "the coverage of sets must be between 0 and 1, got 0"),
        ({"prevalence": "even"}, "a prevalence is for decisions, and none was asked for"),
        ({"accept": 0.9, "prevalence": "balanced"}, "a prevalence must be training, even or shares by class"),
        ({"accept": 0.9, "prevalence": {"cats": 1}}, "did you mean 'cat'"),
        ({"accept": 0.9, "prevalence": {"cat": -1.0}}, "must be a number from 0 up"),
    ],
)
def test_what_makes_no_sense_is_refused(folder: Path, arguments: dict, reason: str) -> None:
    with pytest.raises(ImbvlmError, match=reason):
        imbvlm.load(folder, "cpu").deciding(**arguments)


def test_a_model_limited_to_some_classes_decides_nothing(
    folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, only = imbvlm.load(folder, "cpu"), tmp_path / "only.txt"
    with pytest.raises(ImbvlmError, match="promised for all classes"):
        model.limited_to("cat").deciding(accept=0.9)
    with pytest.raises(ImbvlmError, match="promised for all classes"):
        model.deciding(accept=0.9).limited_to("cat")
    only.write_text("cat\n")
    assert run(str(folder), str(photos), "--accept", "0.9", "--only", str(only)) == 1
    assert "promised for all classes" in capsys.readouterr().err


def test_models_without_scores_say_why(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model_folder(tmp_path)
    with pytest.raises(ImbvlmError, match="no scores to decide by, since an earlier version wrote it"):
        imbvlm.load(folder, "cpu").deciding(accept=0.9)
    ModelCalibration(CLASS_NAMES, "the sweep has no validation scores of t00001").write(str(folder))
    assert run(str(folder), str(photos), "--sets", "0.9") == 1
    assert "can't promise decisions: the sweep has no validation scores of t00001" in capsys.readouterr().err


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    ModelCalibration(CLASS_NAMES, made_rows()).write(str(folder))
    scores = folder / SCORES_FILE
    content = scores.read_bytes()
    scores.write_bytes(content[:-1] + b"x")
    with pytest.raises(ImbvlmError, match=f"{SCORES_FILE} is damaged"):
        imbvlm.load(folder, "cpu")
    scores.write_bytes(content)
    with pytest.raises(ImbvlmError, match="scores are of 3 classes, not 2"):
        ModelCalibration.read(str(folder), CLASS_NAMES[:2])
    (folder / CALIBRATION_FILE).write_text("{}")
    with pytest.raises(ImbvlmError, match=f"{CALIBRATION_FILE} is damaged"):
        imbvlm.load(folder, "cpu")
