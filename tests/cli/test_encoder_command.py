"""An encoder that is fetched is the same where there is no network; encoders are compared before any sweep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import run_command
from hub_server import Hub, use_hub
from safetensors.torch import save_file
from tiny_images import extraction_in_this_process
from towers import write_tower

from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.models.encoders.encoder_factory import create_encoder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with use_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.mark.parametrize("kind", ["timm_siglip", "image_only_vit"])
def test_a_fetched_folder_has_the_same_features_and_names_its_origin(hub: Hub, tmp_path: Path, kind: str) -> None:
    write_tower(tmp_path / "tower", kind)
    hub.add("org/repo", tmp_path / "tower")
    assert run_command("encoder", "fetch", "hf-hub:org/repo", "-o", tmp_path / "out") == 0
    hub.repositories.clear()
    names = ("hf-hub:org/repo", f"local-dir:{tmp_path / 'out'}")
    cached, fetched = (create_encoder(EncoderConfig(name=name), EvalConfig()) for name in names)
    assert cached.info.weights_fingerprint == fetched.info.weights_fingerprint
    assert cached.preprocess == fetched.preprocess
    assert cached.info.revision == fetched.info.revision == "a" * 40


def test_a_model_of_timm_is_fetched_by_its_name(hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "files").mkdir()
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "files" / "model.safetensors")
    hub.add("timm/test_vit.r160_in1k", tmp_path / "files")
    assert run_command("encoder", "fetch", "timm:test_vit.r160_in1k", "-o", tmp_path / "out") == 0
    names = ("timm:test_vit.r160_in1k", f"local-dir:{tmp_path / 'out'}")
    cached, fetched = (create_encoder(EncoderConfig(name=name), EvalConfig()).info for name in names)
    assert cached.weights_fingerprint == fetched.weights_fingerprint


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, says in ((tmp_path, "is there already"), ("s3://bucket/x", "must be a folder of this machine")):
        with pytest.raises(ImbvlmError, match=says):
            run_command("encoder", "fetch", "tinylit_lite0", "-o", out)


# ------------------------------------------------------------------------------------------------------ comparison

FASHION = "embedded:fashion_mnist_lt"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names of two encoders with random weights, one of them image-only, and of one whose weights are damaged."""
    folder = tmp_path_factory.mktemp("encoders")
    names = {kind: write_tower(folder / kind, kind) for kind in ("vit", "image_only_vit")}
    names["damaged"] = write_tower(folder / "damaged", "vit")
    weights = folder / "damaged" / "open_clip_model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    return names


def compare(folder: Path, encoders: str, *words: object) -> int:
    with extraction_in_this_process():
        return run_command(
            "encoder", "compare", FASHION, "--encoders", encoders, "--images", 60, "--features", folder, *words
        )


def test_encoders_are_compared_on_a_sample_and_the_lines_are_those_of_a_space(
    tmp_path: Path, encoders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second comparison reads what the first has stored, and has the same numbers."""
    both = f"{encoders['vit']}, {encoders['image_only_vit']}"
    assert compare(tmp_path, both, "--sizes", "32,48", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["num_sampled"], data["num_train"], data["seed"]) == (60, 2480, 0)
    rows = data["encoders"]
    sizes = {(row["encoder"], row["image_size"]) for row in rows}
    assert sizes == {(encoders[kind], size) for kind in ("vit", "image_only_vit") for size in (32, 48)}
    for row in rows:
        has_text = row["encoder"] == encoders["vit"]
        assert row["failure"] is None
        assert set(row["scores"]) == {"linear probe", "class means", *(["zero-shot"] if has_text else [])}
        best = max(row["scores"].values(), key=lambda score: score["balanced_accuracy"])
        assert {key: row[key] for key in best} == best
        assert 0 < best["balanced_accuracy"] <= 1
        assert 0 < best["balanced_standard_error"] < 0.2
        assert ("image_embedding" in row["bytes_per_image"]) == has_text
        assert row["images_per_second"] > 0
        assert row["license"] == ""
    accuracies = [row["balanced_accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert data["space"]["encoder.name"]["choice"][0] == rows[0]["encoder"]
    stores = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert compare(tmp_path, both, "--sizes", "32,48") == 0
    text = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == stores
    assert "60 of 2,480 training images of fashion_mnist_lt (seed 0), at most 6 of a class" in text
    assert f"  encoder.name: {{choice: [{', '.join(data['space']['encoder.name']['choice'])}]}}" in text
    assert "  encoder.image_size: {choice: [" in text
    assert f"{100 * rows[0]['balanced_accuracy']:.1f} ± {100 * rows[0]['balanced_standard_error']:.1f}" in text


def test_an_encoder_that_cannot_be_loaded_is_named_with_its_cause(
    tmp_path: Path, encoders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, f"{encoders['damaged']},{encoders['vit']}") == 1
    text = capsys.readouterr().out
    assert f"failed: {encoders['damaged']} at 32 px: " in text
    assert f"encoder.name: {{choice: [{encoders['vit']}]}}" in text


def test_a_ctrl_c_prints_the_rows_that_are_finished(
    tmp_path: Path, encoders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import imbvlm.sweep.plan.encoder_comparison as comparison

    whole = comparison.score_head

    def interrupted(config: Any, *arguments: Any) -> Any:
        if config.encoder.name == encoders["image_only_vit"]:
            raise KeyboardInterrupt
        return whole(config, *arguments)

    monkeypatch.setattr(comparison, "score_head", interrupted)
    assert compare(tmp_path, f"{encoders['vit']},{encoders['image_only_vit']}", "--json") == 130
    data = json.loads(capsys.readouterr().out)
    assert [row["encoder"] for row in data["encoders"]] == [encoders["vit"]]


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path, encoders: dict[str, str]) -> None:
    folder = tmp_path / "features"
    with pytest.raises(ConfigError) as error:
        compare(folder, f"openai_vit_b61,{encoders['vit']}", "--sizes", "32,36,large")
    assert len(error.value.problems) == 3
    with pytest.raises(ImbvlmError, match="torch finds no GPU here"):
        compare(folder, encoders["vit"], "--device", "cuda")
    assert not folder.exists()
