"""`--only`: a model predicts among the classes of a list, and every name of it that is no class is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_model import CLASS_NAMES, write_model_folder
from PIL import Image

import imbvlm
from imbvlm.base.errors import ImbvlmError
from imbvlm.cli import app
from imbvlm.inference.possible_classes import possible_labels, read_possible


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


def images(number: int = 6) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8) for seed in range(number)]


def predicted(folder: Path, photos: Path, *options: str) -> tuple[object, list[dict[str, str]]]:
    """The exit code of `imbvlm predict`, and the rows of its table."""
    out = photos / "out.csv"
    with pytest.raises(SystemExit) as caught:
        app.main(["predict", str(folder), str(photos), "--no-ray", "-o", str(out), *options])
    return caught.value.code, list(csv.DictReader(out.open(encoding="utf-8"))) if out.exists() else []


def test_probabilities_are_those_of_the_possible_classes(folder: Path) -> None:
    model = imbvlm.load(folder, "cpu")
    limited = model.limited_to([CLASS_NAMES[2], CLASS_NAMES[0]])
    for all_classes, some in zip(model.predict(images(), top=3), limited.predict(images(), top=3), strict=True):
        possible = {name: value for name, value in all_classes.ranked if name != CLASS_NAMES[1]}
        assert [name for name, _ in some.ranked] == list(possible)
        assert some.probabilities == pytest.approx([value / sum(possible.values()) for value in possible.values()])
    crops = model.random_crops(0, 2)
    assert limited.probabilities(crops)[:, 1].tolist() == [0, 0]
    torch.testing.assert_close(limited.logits(crops), model.logits(crops))
    assert [own.probabilities for own in model.limited_to(CLASS_NAMES[1]).predict(images(2))] == [(1.0,), (1.0,)]
    assert model.num_possible == 3, "the model itself stays as it is"


def test_classes_of_one_name_are_all_possible() -> None:
    assert possible_labels(["crane", "crow"], ["crane", "owl", "crane", "crow"]) == [0, 2, 3]


def test_unknown_names_are_refused_with_the_nearest(folder: Path) -> None:
    model = imbvlm.load(folder, "cpu")
    with pytest.raises(ImbvlmError) as caught:
        model.limited_to(["cat", "cats", "dog"])
    assert "'cats': did you mean 'cat'?" in str(caught.value)
    assert "'dog': did you mean 'dog, wet'?" in str(caught.value)
    with pytest.raises(ImbvlmError, match="needs a possible class, got none"):
        model.limited_to([])
    unknown = [f"name {number}" for number in range(1_000)]
    with pytest.raises(ImbvlmError, match="'name 999'"):
        possible_labels(unknown, [f"class {number}" for number in range(9_000)])
    with pytest.raises(ImbvlmError) as caught:
        possible_labels(["x" * 100_000], CLASS_NAMES)
    assert len(str(caught.value)) < 500, "a file of one long line is no list"


def test_a_list_is_a_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffcat \r\n\n dog, wet\n".encode())
    assert read_possible(str(path)) == ("cat", "dog, wet")
    path.write_bytes(b" \n\n")
    with pytest.raises(ImbvlmError, match="is empty"):
        read_possible(str(path))
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ImbvlmError, match="must be UTF-8, and byte 3"):
        read_possible(str(path))


def test_the_command_predicts_among_the_listed_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, image in enumerate(images()):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    listed = tmp_path / "list.txt"
    listed.write_text("cat\ndog, wet\n")
    code, rows = predicted(folder, tmp_path, "--only", str(listed))
    assert code == 0
    assert set(rows[0]) == {"image", "class_1", "probability_1", "class_2", "probability_2", "error"}
    assert {row["class_1"] for row in rows} | {row["class_2"] for row in rows} == {"cat", "dog, wet"}
    (tmp_path / "out.csv").unlink()
    listed.write_text("cta\n")
    code, rows = predicted(folder, tmp_path, "--only", str(listed))
    assert (code, rows) == (1, [])
    assert "did you mean 'cat'?" in capsys.readouterr().err
    code, rows = predicted(folder, tmp_path, "--only", "")
    assert (code, rows) == (1, []), "an empty name is no list of all classes"
