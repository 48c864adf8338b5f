"""A model's tree and its roll-up: the same names in Python, in every file and through the command."""

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
from imbvlm.inference.taxonomy_file import RANK_SCORES_FILE, TAXONOMY_FILE, ModelTaxonomy
from imbvlm.longtail.roll_up import RankScores, best_taxa, learn_roll_up
from imbvlm.longtail.taxonomy import Taxonomy

TREE = Taxonomy(("kind", "class"), (("=pet",), ("=pet",), ("wild",)))


def sure_from(low: float, high: float, number: int = 400) -> RankScores:
    """Rows that are right at the classes above a probability, and at the kind above a lower one."""
    values = np.linspace(0, 1, number)
    return RankScores(np.stack([values, values], axis=1), np.stack([values > low, values > high], axis=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tree, which may name a class from a probability of 0.5 and a kind from 0.4 on."""
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    ModelTaxonomy(TREE, CLASS_NAMES, sure_from(0.4, 0.5)).write(str(folder))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("photos"))


def run(*arguments: str) -> object:
    return exit_code("predict", "--no-ray", *arguments)


def test_each_image_is_named_at_the_lowest_rank_that_is_sure_enough(folder: Path, photos: Path) -> None:
    model = imbvlm.load(folder, "cpu")
    assert model.taxonomy == TREE
    images = sorted(photos.glob("*.png"))
    predictions = model.rolling_up(0.9).predict(images, top=3)
    probabilities = np.zeros((len(images), 3))
    for row, own in enumerate(predictions):
        probabilities[row, list(own.labels)] = own.probabilities
    taxa, values = best_taxa(TREE, probabilities)
    learned = learn_roll_up(TREE, sure_from(0.4, 0.5), 0.9)
    for row, own in enumerate(predictions):
        rank = int(learned.ranks(values[row : row + 1])[0])
        if rank < 0:
            assert own.roll_up is None
            continue
        assert own.roll_up is not None
        names = (("=pet", "wild"), CLASS_NAMES)[rank]
        assert (own.roll_up.taxon, own.roll_up.rank) == (names[taxa[row, rank]], TREE.ranks[rank])
        assert own.roll_up.probability == pytest.approx(values[row, rank], abs=1e-6)
    assert any(own.roll_up for own in predictions)
    assert all(own.roll_up is None for own in model.predict(images)), "the model itself stays as it is"
    assert model.limited_to("cat").rolling_up(0.9).predict(images[0])[0].roll_up is not None


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_have_the_names_with_their_ranks(folder: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    assert run(str(folder), str(photos), "--roll-up", "0.9", "--top", "1", "-o", str(out)) == 0
    if suffix == "csv":
        rows = list(csv.DictReader(out.open(encoding="utf-8")))
        assert list(rows[0]) == ["image", "class_1", "probability_1", "roll_up", "roll_up_rank", "error"]
        # As every text that a spreadsheet would run.
        named = [(row["roll_up"].replace("'=", "=") or None, row["roll_up_rank"] or None) for row in rows]
    else:
        rows = pq.read_table(out).to_pylist() if suffix == "parquet" else list(map(json.loads, out.open()))
        named = [(row["roll_up"], row["roll_up_rank"]) for row in rows]
    predictions = imbvlm.load(folder, "cpu").rolling_up(0.9).predict(sorted(photos.iterdir()))
    assert named == [(own.roll_up.taxon, own.roll_up.rank) if own.roll_up else (None, None) for own in predictions]


def test_lines_say_where_no_rank_is_sure(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder), str(photos), "--roll-up", "0.9") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(" -> class " in line or " -> kind " in line or " -> no name" in line for line in lines[:8])
    assert "->" not in lines[8], "an image that can't be read"


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ("the sweep has no validation scores of t00001", "the sweep has no validation scores of t00001"),
        (sure_from(0, 0, 20), "that takes 29 validation images that are all right, and there are 20"),
        (sure_from(1, 1), "too many of the surest are wrong"),
        (None, "needs a tree over the model's classes, and it has none"),
    ],
)
def test_models_that_cant_promise_say_why(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], scores: RankScores | str | None, reason: str
) -> None:
    folder = write_model_folder(tmp_path)
    if scores is not None:
        ModelTaxonomy(TREE, CLASS_NAMES, scores).write(str(folder))
    with pytest.raises(ImbvlmError, match=reason):
        imbvlm.load(folder, "cpu").rolling_up(0.9)
    assert run(str(folder), str(photos), "--roll-up", "0.9") == 1
    assert reason in capsys.readouterr().err


def test_damaged_files_are_named(tmp_path: Path) -> None:
    tree = ModelTaxonomy(TREE, CLASS_NAMES, sure_from(0.4, 0.5))
    tree.write(str(tmp_path))
    read = ModelTaxonomy.read(str(tmp_path), CLASS_NAMES)
    assert read is not None
    assert isinstance(read.scores, RankScores)
    np.testing.assert_array_equal(read.scores.is_right, sure_from(0.4, 0.5).is_right)
    for name, content in ((RANK_SCORES_FILE, b"cut"), (TAXONOMY_FILE, b'{"ranks": 3}'), (TAXONOMY_FILE, b"[]")):
        tree.write(str(tmp_path))
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImbvlmError, match=rf"{name} is damaged"):
            ModelTaxonomy.read(str(tmp_path), CLASS_NAMES)
    ModelTaxonomy(TREE, CLASS_NAMES, RankScores(np.ones((9, 3)), np.ones((9, 3), dtype=np.bool_))).write(str(tmp_path))
    with pytest.raises(ImbvlmError, match="must have scores of 2 ranks"):
        ModelTaxonomy.read(str(tmp_path), CLASS_NAMES)
