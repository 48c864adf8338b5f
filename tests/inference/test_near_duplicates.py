"""Near-duplicates by embedding: pairs and chains by brute force, a threshold without labels, and a check of photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_images import extraction_in_this_process

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.images.decoding import decode_picture
from imbvlm.data.manifest import Manifest
from imbvlm.inference import near_duplicates
from imbvlm.inference.near_duplicates import (
    MAX_COPIES,
    MIN_COPIES,
    Threshold,
    join,
    mildly_changed,
    similar_pairs,
)


def test_blocks_find_the_pairs_of_the_whole_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BLOCK_SIZE", 7)
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).half()
    whole = torch.nn.functional.normalize(values.float(), dim=1).double()
    expected = {
        (first, second) for first in range(40) for second in range(first + 1, 40) if whole[first] @ whole[second] >= 0.8
    }
    parts = list(similar_pairs(values, 0.8))
    pairs = [pair for first, second, _ in parts for pair in zip(first.tolist(), second.tolist(), strict=True)]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected
    assert expected
    assert len(parts) == 6 * 7 // 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=12), max_size=4))
def test_chains_are_connected_components_by_their_lowest_row(parts: list[list[tuple[int, int]]]) -> None:
    chains, expected = np.arange(20), np.arange(20)
    for pairs in parts:
        chains = join(chains, *np.array(pairs, np.int64).reshape(-1, 2).T)
        for first, second in pairs:
            ends = sorted((expected[first], expected[second]))
            expected[expected == ends[1]] = ends[0]
    assert chains.tolist() == expected.tolist()


def test_the_threshold_lets_copies_pass_and_few_others() -> None:
    generator = torch.Generator().manual_seed(0)
    copies = 0.9 + 0.1 * torch.rand(200, generator=generator)
    apart = Threshold.select(copies, 0.5 * torch.rand(200, generator=generator))
    assert apart.share_of_copies == pytest.approx(MAX_COPIES, abs=0.01)
    assert apart.share_of_others == 0
    between = Threshold.select(copies, 0.92 * torch.rand(200, generator=generator).sqrt())
    assert MIN_COPIES < between.share_of_copies < MAX_COPIES or between.similarity < 0.92
    assert between.share_of_others <= 0.06
    # All in bursts: the nearest other image is a near-duplicate, and must not hide the others.
    bursts = Threshold.select(copies, copies.flip(0))
    assert bursts.share_of_copies == pytest.approx(MIN_COPIES, abs=0.01)
    same = Threshold.select(torch.ones(5), torch.ones(5))
    assert (same.similarity < 1, same.share_of_copies) == (True, 1)


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (3, 200)])
def test_a_mild_change_is_another_image_of_the_same_content(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(size)
    changed = mildly_changed(picture, rng)
    assert changed.mode == "RGB"
    assert all(0 < new <= old for new, old in zip(changed.size, size, strict=True))
    difference = np.asarray(changed.resize(size), float) - np.asarray(picture, float)
    assert np.abs(difference).mean() < 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty emoji of two classes; the first six of training are in test again, compressed as JPEG."""
    folder, source = tmp_path_factory.mktemp("photos"), Manifest.read("embedded:emoji_lt")
    for number, row in enumerate(range(0, 2400, 40)):
        picture = decode_picture(source.table.column("bytes")[row].as_py())
        place = folder / ("train" if number < 50 else "test") / ("one", "two")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number}.png")
        if number < 6:
            copy = folder / "test" / ("one", "two")[number % 2] / f"copy-{number}.jpg"
            copy.parent.mkdir(parents=True, exist_ok=True)
            picture.save(copy, quality=80)
    assert run_command("manifest", "build", "--folders", folder, "-o", folder / "photos.parquet") == 0
    return folder


def test_a_check_names_copies_in_test_and_writes_them_as_groups(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("manifest", "check", photos / "photos.parquet", "--encoder", "tinylit_lite0")
    words = (*words, "--features", tmp_path / "features", "-o", tmp_path / "all.csv")
    with extraction_in_this_process():
        assert run_command(*words, "--write-groups", tmp_path / "grouped.parquet") == 0
    printed, listed = capsys.readouterr().out, (tmp_path / "all.csv").read_text(encoding="utf-8")
    assert "near-duplicates are images with a cosine similarity of" in printed
    assert "chains of near-duplicates in two splits" in printed
    named = [number for number in range(6) if f"/{number}.png (train" in listed and f"copy-{number}.jpg" in listed]
    assert len(named) >= 5
    grouped = Manifest.read(str(tmp_path / "grouped.parquet"))
    names = dict(zip(grouped.table.column("uri").to_pylist(), grouped.table.column("group").to_pylist(), strict=True))
    by_name = {Path(uri).stem: name for uri, name in names.items()}
    assert all(by_name[str(number)] == by_name[f"copy-{number}"] is not None for number in named)
    assert grouped.table.column("label").equals(Manifest.read(str(photos / "photos.parquet")).table.column("label"))


def test_groups_of_the_manifest_join_with_chains() -> None:
    table = Manifest.read("embedded:emoji_lt").take(np.arange(6))
    column = ["a", "b", None, None, "a", None]
    manifest = near_duplicates.with_groups(table, column, "--group-by x")
    threshold = Threshold(0.9, 6, 1, 0)
    chains = np.array([0, 1, 2, 2, 4, 1])
    grouped = near_duplicates.NearDuplicates("e", threshold, chains, ()).grouped(manifest)
    assert grouped.table.column("group").to_pylist() == ["a", "b", "near row 2", "near row 2", "a", "b"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--write-groups", "g.parquet"), "--write-groups needs --encoder"),
        (("--encoder", "tinylit_lite"), "did you mean 'tinylit_lite0'"),
    ],
)
def test_a_wrong_check_is_one_sentence(photos: Path, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ImbvlmError, match=sentence):
        run_command("manifest", "check", photos / "photos.parquet", *words)
