"""An encoder of the hub on a machine that doesn't reach it: from the first message to a prediction, as a user types."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_sweep import sweep_spec
from hub_server import hub_server
from PIL import Image
from tiny_images import image_manifest
from towers import write_tower

import imbvlm
from imbvlm.base.yaml_file import dump_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SPACE = {
    "parameters": {"method": {"choice": ["linear_probe", "decoder"]}, "classifier.init": {"choice": ["class_mean"]}}
}
COMMIT = "a" * 40


class Machine:
    """A folder of a user's, and the hub's settings there."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.settings = folder, {"HF_HOME": str(folder / "hub"), "RAY_ADDRESS": "local", **settings}
        folder.mkdir()

    def imbvlm(self, *words: str, code: int = 0) -> str:
        """Run imbvlm to its end; its output, standard error behind it."""
        done = subprocess.run(
            [sys.executable, "-m", "imbvlm", *words],
            env={**os.environ, **self.settings}, cwd=self.folder,
            capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def write_spec(self, encoder: str) -> None:
        spec = sweep_spec(self.folder / "images" / "manifest.parquet", "runs", space=SPACE, num_trials=2)
        tree = spec.model_dump(mode="json")
        tree["base"] |= {"encoder": {"name": encoder}}
        (self.folder / "spec.yaml").write_text(dump_yaml(tree))


@pytest.mark.parametrize("kind", ["vit", "image_only_vit"])
def test_what_a_message_says_leads_to_a_model_that_predicts(tmp_path: Path, kind: str) -> None:
    write_tower(tmp_path / "tower", kind)
    here = Machine(tmp_path / "here", HF_HUB_OFFLINE="1")
    image_manifest(here.folder / "images")
    here.write_spec("hf-hub:org/repo")
    # Each says so before anything starts.
    for words in (
        ("plan", "spec.yaml"),
        ("sweep", "run", "spec.yaml"),
        ("doctor", ".", "--encoder", "hf-hub:org/repo"),
    ):
        refused = " ".join(here.imbvlm(*words, code=1).split())
        assert "/org/repo was not asked, since HF_HUB_OFFLINE is set." in refused
    assert not (here.folder / "runs").exists()
    command = re.search(r"run `imbvlm (encoder fetch .*?)`", refused)
    assert command is not None
    with hub_server() as hub:
        hub.add("org/repo", tmp_path / "tower")
        there = Machine(tmp_path / "there", HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")
        assert "next: encoder.name: local-dir:" in there.imbvlm(*shlex.split(command[1]))
    (there.folder / "DIR").rename(here.folder / "DIR")

    here.write_spec("local-dir:DIR")
    encoder = json.loads(here.imbvlm("doctor", ".", "--encoder", "local-dir:DIR", "--json"))[-1]
    assert encoder["state"] == "ok"
    here.imbvlm("sweep", "run", "spec.yaml", "--dry-run")
    here.imbvlm("plan", "spec.yaml")
    here.imbvlm("sweep", "run", "spec.yaml")
    (sweep,) = (path.parent for path in (here.folder / "runs").glob("*/sweep.yaml"))
    records = [json.loads(path.read_text()) for path in (sweep / "trials").glob("*.json")]
    assert {record["state"] for record in records} == {"finished"}
    assert ("zero_shot" in {record["config"]["method"] for record in records}) == (kind == "vit")
    # The folder's encoder is the published one, and what is made of it says so.
    assert COMMIT in (sweep / "provenance.json").read_text()
    here.imbvlm("export", str(sweep), "-o", "exported", "--onnx")
    exported = here.folder / "exported" / "model"
    assert COMMIT in (exported / "config.json").read_text()
    assert any("hf-hub:org/repo" in path.read_text() for path in exported.glob("*/*config.json"))

    Image.new("RGB", (50, 60), (200, 40, 40)).save(here.folder / "photo.png")
    model = imbvlm.load(here.folder / "exported", "cpu")
    (prediction,) = model.predict([here.folder / "photo.png"], top=1)
    assert prediction.class_names[0] in here.imbvlm("predict", "exported", "photo.png")
    import onnxruntime

    side = model.inputs[0].image_size
    crops = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(str(exported / "onnx" / "model.onnx"))
    probabilities = session.run(["probabilities"], {"images": crops.numpy()})[0]
    np.testing.assert_allclose(probabilities, model.probabilities(crops).numpy(), atol=2e-3)
