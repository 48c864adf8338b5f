"""An encoder without text the whole way, from the command line: plan, sweep, report, export, prediction and ONNX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_sweep import sweep_spec
from PIL import Image
from tiny_images import image_manifest
from towers import write_tower

import imbvlm
from imbvlm.base.yaml_file import dump_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SPACE = {
    "parameters": {"method": {"choice": ["linear_probe", "decoder"]}, "classifier.init": {"choice": ["class_mean"]}}
}


def command(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run imbvlm to its end; its output, standard error behind it."""
    done = subprocess.run(
        [sys.executable, "-m", "imbvlm", *arguments], cwd=cwd, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_spec(folder: Path, **fields: Any) -> None:
    spec = sweep_spec(folder / "images" / "manifest.parquet", "runs", space=SPACE, num_trials=2)
    tree = {**spec.model_dump(mode="json"), **fields}
    tree["base"] |= {"encoder": {"name": f"local-dir:{folder / 'encoder'}", "image_size": 96}}
    (folder / "spec.yaml").write_text(dump_yaml(tree))


@pytest.fixture(scope="module")
def folder(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, an encoder with random weights, and the specification of a sweep."""
    folder = tmp_path_factory.mktemp("image-only")
    image_manifest(folder / "images")
    write_tower(folder / "encoder", "image_only_vit")
    write_spec(folder)
    return folder


@pytest.fixture(scope="module")
def sweep(folder: Path) -> Path:
    command("sweep", "run", "spec.yaml", cwd=folder)
    return next(path.parent for path in (folder / "runs").glob("*/sweep.yaml"))


@pytest.fixture(scope="module")
def model(folder: Path, sweep: Path) -> Path:
    command("export", str(sweep), "-o", "exported", "--onnx", cwd=folder)
    return folder / "exported" / "model"


def test_a_plan_has_no_zero_shot_and_no_image_embeddings(folder: Path) -> None:
    printed = command("plan", "spec.yaml", cwd=folder)
    assert "image_embedding" not in printed
    assert "zero-shot" not in printed


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"method": {"choice": ["linear_probe", "zero_shot"]}}, "method zero_shot compares images"),
        ({"method": {"choice": ["prompt_tuning"]}}, "method prompt_tuning compares images"),
        ({"classifier.init": {"choice": ["random", "text"]}}, "classifier.init is text"),
        ({"prompts.templates": {"choice": ["plain", "imagenet"]}}, "the section prompts is set"),
    ],
)
def test_what_needs_text_is_refused_before_anything_is_made(
    folder: Path, tmp_path: Path, parameters: dict[str, Any], says: str
) -> None:
    write_spec(folder, space={"parameters": parameters})
    (folder / "spec.yaml").rename(tmp_path / "spec.yaml")
    write_spec(folder)
    printed = command("sweep", "run", "spec.yaml", cwd=tmp_path, code=1)
    assert says in printed
    assert "is image-only: it has no text" in printed
    assert not (tmp_path / "runs").exists()


def test_a_sweep_has_all_baselines_but_zero_shot_and_a_report(sweep: Path) -> None:
    records = [json.loads(path.read_text()) for path in (sweep / "trials").glob("*.json")]
    assert {record["state"] for record in records} == {"finished"}
    heads = ["class means", "discriminant", "prototype cache"]
    baselines = {record["name"] for record in records if record["kind"] == "baseline"}
    assert baselines == {"linear probe", *heads}
    methods = {"linear_probe", "decoder", *(name.replace(" ", "_") for name in heads)}
    assert {record["config"]["method"] for record in records} == methods
    page = (sweep / "report.html").read_text()
    assert "linear probe" in page
    assert "zero-shot" not in page.lower().replace("zero-shot logits", "")
    assert not (sweep.parent / "features" / "class-embeddings").exists()


def test_an_exported_model_and_its_graph_predict_the_same(folder: Path, model: Path) -> None:
    import onnxruntime

    assert json.loads((model / "config.json").read_text())["encoder"]["embedding_width"] is None
    assert "clip" not in (model / "README.md").read_text().split("---")[1]
    loaded = imbvlm.load(model, "cpu")
    side = loaded.inputs[0].image_size
    crops = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(str(model / "onnx" / "model.onnx"))
    probabilities = session.run(["probabilities"], {"images": crops.numpy()})[0]
    np.testing.assert_allclose(probabilities, loaded.probabilities(crops).numpy(), atol=2e-3)
    Image.new("RGB", (50, 60), (200, 40, 40)).save(folder / "photo.png")
    (prediction,) = loaded.predict([folder / "photo.png"], top=1)
    assert prediction.class_names[0] in command("predict", "exported", "photo.png", cwd=folder)


def test_a_method_that_trains_inside_the_encoder_runs_too(folder: Path, sweep: Path) -> None:
    tree = {
        "data": {"manifest": str(folder / "images" / "manifest.parquet")},
        "encoder": {"name": f"local-dir:{folder / 'encoder'}", "image_size": 96},
        "method": "adapter",
        "train": {"num_epochs": 1, "batch_size": 32},
    }
    (folder / "adapter.yaml").write_text(dump_yaml(tree))
    assert "best validation balanced accuracy" in command("train", "adapter.yaml", cwd=folder)


def test_features_are_extracted_without_image_embeddings(folder: Path) -> None:
    arguments = ("features", "extract", "images/manifest.parquet", "--encoder", f"local-dir:{folder / 'encoder'}")
    assert "pooled of" in command(*arguments, "--image-size", "96", "--dry-run", cwd=folder)
    printed = command(*arguments, "--output", "image_embedding", "--dry-run", cwd=folder, code=1)
    assert "is image-only and has no image_embedding" in printed
