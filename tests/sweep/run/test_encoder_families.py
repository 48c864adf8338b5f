"""A small sweep on each family of encoders, with its export, its graph and a prediction, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_sweep import sweep_spec
from tiny_images import image_manifest
from towers import write_tower

import imbvlm
from imbvlm.base.yaml_file import dump_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SPACE = {
    "parameters": {"method": {"choice": ["linear_probe", "decoder"]}, "classifier.init": {"choice": ["class_mean"]}}
}


def command(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imbvlm", *arguments], cwd=cwd, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "kind", ["resnet", "timm_eva_map", "timm_siglip", "timm_fastvit", "timm_vit", "image_only_dinov3"]
)
def test_a_smoke_sweep_and_its_model(ray_cluster: str, tmp_path: Path, kind: str) -> None:
    image_manifest(tmp_path / "images")
    name = write_tower(tmp_path / "encoder", kind)
    spec = sweep_spec(tmp_path / "images" / "manifest.parquet", "runs", space=SPACE, num_trials=2)
    tree = spec.model_dump(mode="json")
    tree["base"] |= {"encoder": {"name": name, "image_size": 96}}
    (tmp_path / "spec.yaml").write_text(dump_yaml(tree))
    command("sweep", "run", "spec.yaml", cwd=tmp_path)
    (sweep,) = (path.parent for path in (tmp_path / "runs").glob("*/sweep.yaml"))
    records = [json.loads(path.read_text()) for path in (sweep / "trials").glob("*.json")]
    assert {record["state"] for record in records} == {"finished"}
    command("export", str(sweep), "-o", "exported", "--onnx", cwd=tmp_path)
    import onnxruntime

    model = imbvlm.load(tmp_path / "exported" / "model", "cpu")
    crops = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(str(tmp_path / "exported" / "model" / "onnx" / "model.onnx"))
    probabilities = session.run(["probabilities"], {"images": crops.numpy()})[0]
    np.testing.assert_allclose(probabilities, model.probabilities(crops).numpy(), atol=2e-3)
