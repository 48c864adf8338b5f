"""An encoder that is fetched where there is a network is the same one where there is none."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from command_line import run_command
from hub_server import Hub, hub_server, use_hub
from safetensors.torch import save_file
from towers import write_tower

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.models.encoders.encoder_factory import create_encoder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with use_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def imbvlm(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imbvlm", *arguments],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_following_an_offline_message_to_its_end_gives_the_encoder(tmp_path: Path) -> None:
    write_tower(tmp_path / "tower", "vit")
    with hub_server() as hub:
        hub.add("org/repo", tmp_path / "tower")
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "there")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "here")}
        refused = imbvlm("doctor", str(tmp_path), "--encoder", "hf-hub:org/repo", **offline)
        assert refused.returncode == 1
        command = re.search(r"run `imbvlm (encoder fetch .*?)`", refused.stdout)
        assert command is not None, refused.stdout
        folder = tmp_path / "carried"
        fetched = imbvlm(*shlex.split(command[1].replace("DIR", str(folder))), **online)
        assert fetched.returncode == 0, fetched.stderr
        assert f"encoder.name: local-dir:{folder}" in fetched.stdout
        there = imbvlm("doctor", str(tmp_path), "--encoder", f"local-dir:{folder}", "--json", **offline)
        assert json.loads(there.stdout)[-1]["state"] == "ok"
    info = create_encoder(EncoderConfig(name=f"local-dir:{folder}"), EvalConfig()).info
    first = create_encoder(EncoderConfig(name=f"local-dir:{tmp_path / 'tower'}"), EvalConfig()).info
    # Stored features of the one are those of the other.
    assert info.weights_fingerprint == first.weights_fingerprint
    assert info.revision == "a" * 40


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
