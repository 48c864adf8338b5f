"""Exported models whose prediction needs a plug-in: their copy of it, who may run it, and what is refused."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documented_plugins import documented
from exported_model import CLASS_NAMES
from PIL import Image
from towers import write_tower

import imbvlm
from imbvlm.base.errors import PluginNeededError
from imbvlm.base.plugin_files import use_plugins
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.inference.blend_folder import write_blend
from imbvlm.inference.blend_merging import TrainedMember
from imbvlm.inference.model_folder import write_model
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_state import own_state_dict

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)


def write(folder: Path, code: Path, *, blended: bool = False, **sections: Any) -> Path:
    """A model with a plug-in and random weights; returns its folder."""
    section = {"name": write_tower(folder / "tower", "vit")}
    encoder = create_encoder(EncoderConfig(**section), EvalConfig())
    with use_plugins(str(code)):
        config = TrialConfig.from_tree(
            {"data": {"manifest": "m"}, "encoder": section, "method": "linear_probe", **sections}
        )
        torch.manual_seed(0)
        tensors = own_state_dict(METHODS[config.method].restore(config, encoder.info, len(CLASS_NAMES), {}))
        if blended:
            write_blend(str(folder / "model"), [TrainedMember("own", config, [tensors], encoder)], CLASS_NAMES, {})
        else:
            write_model(str(folder / "model"), config, tensors, encoder, CLASS_NAMES, {})
    return folder / "model"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A plug-in with a method, which leaves a mark where it runs."""
    path = tmp_path / "own" / "methods.py"
    path.parent.mkdir()
    path.write_text(f"{documented('methods.py')}\nprint('the plug-in runs')\n")
    return path


@pytest.mark.parametrize("blended", [False, True])
def test_a_model_runs_a_plug_in_only_where_it_is_named(
    tmp_path: Path, code: Path, capsys: pytest.CaptureFixture[str], blended: bool
) -> None:
    folder = write(tmp_path, code, blended=blended, method="hidden_probe", hidden_probe={"width": 5})
    copy = folder / "plugins" / "methods.py"
    assert copy.read_bytes() == code.read_bytes()
    capsys.readouterr()
    with pytest.raises(PluginNeededError, match=r"needs the plug-in methods.py") as refused:
        imbvlm.load(folder, "cpu")
    assert refused.value.copies == (str(copy),)
    assert capsys.readouterr().out == ""
    model = imbvlm.load(folder, "cpu", plugins=[copy])
    # Also after it was loaded, without the plug-in's entries.
    (prediction,) = model.predict([PICTURE], top=3)
    assert set(prediction.class_names) == set(CLASS_NAMES)
    with use_plugins(str(code)):
        assert imbvlm.load(folder, "cpu").predict([PICTURE], top=3) == [prediction]


def test_a_changed_plug_in_is_refused_with_the_difference(tmp_path: Path, code: Path) -> None:
    folder = write(tmp_path, code, method="hidden_probe")
    copy = folder / "plugins" / "methods.py"
    copy.write_text(copy.read_text().replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(PluginNeededError, match=r"isn't the plug-in that .* was made with"):
        imbvlm.load(folder, "cpu", plugins=[copy])
    assert imbvlm.load(folder, "cpu", plugins=[code])


@pytest.mark.slow
def test_the_command_that_is_printed_works(tmp_path: Path, code: Path) -> None:
    folder = write(tmp_path, code, method="hidden_probe")
    Image.fromarray(PICTURE).save(tmp_path / "a photo.png")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    wrong = ("--plugin", str(code), "--plugin=own/../own/methods.py")
    code.write_text(f"{code.read_text()}# edited\n")
    for given in ((), wrong):
        refused = run("imbvlm", "predict", str(folder), "a photo.png", "--top", "1", *given)
        assert refused.returncode == 1
        assert "the plug-in runs" not in refused.stdout or given
        command = shlex.split(refused.stderr.splitlines()[-1].removeprefix("imbvlm: then run: "))
        assert command == ["imbvlm", "predict", str(folder), "a photo.png", "--top", "1", "--plugin",
                           str(folder / "plugins" / "methods.py")]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "a photo.png" in done.stdout


def test_a_loss_is_not_needed_to_predict(tmp_path: Path) -> None:
    code = tmp_path / "losses.py"
    code.write_text(documented("losses.py"))
    folder = write(tmp_path, code, loss={"name": "poly1", "epsilon": 2.0})
    description = json.loads((folder / "config.json").read_text())
    assert description["config"]["loss"] == {"name": "poly1", "epsilon": 2.0}
    assert "plugins" not in description
    assert not (folder / "plugins").exists()
    assert imbvlm.load(folder, "cpu").predict([PICTURE])[0].error is None


def test_a_second_stage_is_needed_to_predict(tmp_path: Path) -> None:
    code = tmp_path / "stages.py"
    code.write_text(documented("stages.py"))
    section = {"name": "offset", "num_epochs": 1}
    folder = write(tmp_path, code, second_stage=section, classifier={"kind": "linear"})
    with pytest.raises(PluginNeededError, match=r"needs the plug-in stages.py"):
        imbvlm.load(folder, "cpu")
    assert imbvlm.load(folder, "cpu", plugins=[code]).predict([PICTURE])[0].error is None
