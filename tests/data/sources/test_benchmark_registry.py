"""BENCHMARKS: each entry is whole, and another benchmark is one entry."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.registry import Registry
from imbvlm.data.manifest import ManifestError
from imbvlm.data.sources import benchmarks
from imbvlm.data.sources.benchmark_registry import BENCHMARKS, Benchmark
from imbvlm.data.sources.benchmarks import benchmark_of, build_dataset
from imbvlm.data.sources.folders_and_lists import from_lists
from imbvlm.sweep.spec.published_recipes import PUBLISHED


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_entry_s_sizes_agree_and_its_files_can_be_had(name: str) -> None:
    benchmark = BENCHMARKS[name]
    (low, high), num_train = benchmark.class_range, benchmark.sizes["train"]
    assert set(benchmark.sizes) in ({"train", "test"}, {"train", "val", "test"})
    assert 0 < low < high
    assert low * benchmark.num_classes <= num_train <= high * benchmark.num_classes
    assert bool(benchmark.files) == bool(benchmark.folders) == ("https://" in benchmark.download)


def test_published_scores_are_of_benchmarks() -> None:
    assert {published.dataset for published in PUBLISHED} <= set(BENCHMARKS)


def test_an_unknown_benchmark_is_answered_with_the_nearest() -> None:
    with pytest.raises(ImbvlmError, match=r"'inat2017' is no benchmark; did you mean 'inat2018'\?"):
        build_dataset("inat2017", "")


def test_another_benchmark_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Benchmark(
        build=lambda root: from_lists({split: f"{root}/{split}.txt" for split in ("train", "test")}, root, "mine"),
        files=("train.txt", "test.txt"), folders=("images",), download="both lists from https://example.org",
        sizes={"train": 3, "test": 2}, num_classes=2, class_range=(1, 2),
    )  # fmt: skip
    monkeypatch.setattr(benchmarks, "BENCHMARKS", Registry("benchmark", {**BENCHMARKS, "mine": mine}))
    with pytest.raises(ManifestError, match=r"(?s)train\.txt is missing.*test\.txt is missing.*Download both lists"):
        build_dataset("mine", str(tmp_path))
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "train.txt").write_text("images/0.png 0\nimages/1.png 0\nimages/2.png 1\n")
    (tmp_path / "test.txt").write_text("images/3.png 0\nimages/4.png 1\n")
    manifest = build_dataset("mine", str(tmp_path))
    assert benchmark_of(manifest) == "mine"
    assert not any("missing" in note for note in manifest.notes)
    (tmp_path / "test.txt").write_text("images/3.png 0\n")
    with pytest.raises(ManifestError, match="test has 1 images, and the official list has 2"):
        build_dataset("mine", str(tmp_path))
