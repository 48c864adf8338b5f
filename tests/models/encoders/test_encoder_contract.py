"""What holds for every implementation of an encoder: open_clip's towers and timm's models without text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from towers import IMAGE_ONLY, write_tower

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.models.encoder_classifier import EncoderClassifier
from imbvlm.models.encoders.encoder import Encoder, require_text
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.models.encoders.encoder_registry import has_text

KINDS = ["vit", "timm_efficientnet", "timm_eva_map", *IMAGE_ONLY]
SIZES = {
    "vit": 48, "timm_efficientnet": 96, "timm_eva_map": 96, "image_only_vit": 96, "image_only_convnext": 96,
    "image_only_dinov3": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: write_tower(root / kind, kind) for kind in KINDS}


def load(name: str, image_size: int | None = None) -> Encoder:
    return create_encoder(EncoderConfig(name=name, image_size=image_size), EvalConfig())


def images(encoder: Encoder) -> torch.Tensor:
    size = encoder.info.image_size
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_that_the_info_describes(folders: dict[str, str], kind: str) -> None:
    encoder = load(folders[kind])
    output = encoder.forward_images(images(encoder))
    present = {name: value for name, value in output._asdict().items() if value is not None}
    assert {name: tuple(value.shape[1:]) for name, value in present.items()} == encoder.info.shapes
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in present.values())
    assert not any(value.requires_grad for value in present.values())
    encoder.check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_finds_outputs_that_are_not_the_librarys(
    folders: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(folders[kind])
    monkeypatch.setattr(encoder, "own_output", lambda pixels: torch.ones(1))
    with pytest.raises(ImbvlmError, match="computes something unknown here"):
        encoder.check()


@pytest.mark.parametrize("size", [None, "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_description_needs_no_weights_and_agrees(folders: dict[str, str], kind: str, size: str | None) -> None:
    config = EncoderConfig(name=folders[kind], image_size=SIZES[kind] if size else None)
    loaded = create_encoder(config, EvalConfig()).info
    described = describe_encoder(config)
    assert dataclasses.replace(loaded, logit_scale=0.0, weights_fingerprint="") == dataclasses.replace(
        described, logit_scale=0.0
    )


@pytest.mark.parametrize("size", [None, "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_the_same_encoder(
    folders: dict[str, str], kind: str, size: str | None, tmp_path: Path
) -> None:
    encoder = load(folders[kind], SIZES[kind] if size else None)
    encoder.save(str(tmp_path / "saved"))
    saved = create_encoder(EncoderConfig(name=f"local-dir:{tmp_path / 'saved'}"), EvalConfig(), with_text=False)
    assert saved.text is None
    assert saved.preprocess == encoder.preprocess
    # open_clip's settings, which the fingerprint covers, name the size.
    same = {"name": "", "weights_fingerprint": ""} if size else {"name": ""}
    assert dataclasses.replace(saved.info, **same) == dataclasses.replace(encoder.info, **same)
    crops = images(encoder)
    for before, after in zip(encoder.forward_images(crops), saved.forward_images(crops), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_images_computes_the_encoders_outputs_with_gradients(folders: dict[str, str], kind: str) -> None:
    encoder = load(folders[kind])
    crops, model = images(encoder), EncoderClassifier(encoder, "pooled", torch.nn.Identity())
    model.tower.requires_grad_(True)
    features = model.features(crops)
    torch.testing.assert_close(features, encoder.forward_images(crops).pooled)
    features.sum().backward()
    blocks = encoder.blocks()
    assert all(name in dict(encoder.image_tower.named_modules()) for name in blocks)
    assert all(any(param.grad is not None for param in block.parameters()) for block in blocks.values())


@pytest.mark.parametrize("kind", KINDS)
def test_computing_in_bfloat16_rounds(folders: dict[str, str], kind: str) -> None:
    plain, rounded = load(folders[kind]), load(folders[kind]).compute_in("bfloat16")
    crops = images(plain)
    expected, got = plain.forward_images(crops).pooled, rounded.forward_images(crops).pooled
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_there_or_refused_by_name(folders: dict[str, str], kind: str) -> None:
    encoder = load(folders[kind])
    assert (encoder.text is not None) == encoder.info.has_text == has_text(EncoderConfig(name=folders[kind]))
    if encoder.info.has_text:
        width, scale = encoder.info.text_space
        assert require_text(encoder).encode_text(["a boot"]).shape == (1, width)
        assert scale > 0
        assert len(require_text(encoder).fingerprint()) == 64
        return
    assert kind in IMAGE_ONLY
    for ask in (lambda: require_text(encoder), lambda: encoder.info.text_space):
        with pytest.raises(ImbvlmError, match="is image-only and has no text; choose one with text"):
            ask()
