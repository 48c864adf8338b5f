"""timm's models without text: names, weights, preprocessing, other sizes, and folders that somebody else has made."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from exported_model import write_model_folder
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from towers import write_tower

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.inference.model_folder import load as load_model
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.models.encoders.encoder_outputs import TimmTower, visual_rules
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.models.encoders.hub_files import HubFile


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file as timm publishes it: the trunk with a classifier."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return str(path)


def load(name: str, **section: Any) -> Encoder:
    return create_encoder(EncoderConfig(name=name, **section), EvalConfig())


def test_an_architecture_with_a_file_of_weights_is_timms_model_without_its_classifier(weights: str) -> None:
    encoder = load("timm:test_vit", weights=weights)
    model = timm.create_model("test_vit").eval()
    model.load_state_dict(load_file(weights))
    crops = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    pixels = (crops.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        features = model.forward_features(pixels)
        output = encoder.forward_images(crops)
        torch.testing.assert_close(output.pooled, model.forward_head(features, pre_logits=True), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.norm(output.tokens), features, atol=1e-5, rtol=1e-5)
    assert output.image_embedding is None
    assert encoder.info.name == "timm:test_vit"


def test_preprocessing_is_that_of_timms_configuration(weights: str) -> None:
    encoder = load("timm:test_vit", weights=weights)
    assert (encoder.preprocess.mean, encoder.preprocess.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (encoder.preprocess.image_size, encoder.preprocess.interpolation) == (160, "bicubic")
    assert encoder.preprocess.resize_mode == "shortest"
    described = describe_encoder(EncoderConfig(name="timm:convnext_base.fb_in22k_ft_in1k_384"))
    assert (described.resize_mode, described.image_size, described.kind) == ("squash", 384, "convolution")


def test_a_short_name_is_one_entry() -> None:
    info = describe_encoder(EncoderConfig(name="dinov2_vit_s14", image_size=224))
    assert info.shapes == {"tokens": (257, 384), "pooled": (384,)}
    assert (info.embedding_width, info.logit_scale) == (None, None)
    assert resolve_encoder(EncoderConfig(name="dinov2_vit_s14")).hub == HubFile(
        "timm/vit_small_patch14_dinov2.lvd142m", ("model.safetensors",)
    )


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"name": "timm:test_vitt"}, "'test_vitt' is no architecture of timm; did you mean 'test_vit'"),
        ({"name": "timm:hf_hub:org/x"}, "is no architecture of timm"),
        ({"name": "timm:test_vit"}, r"an architecture without weights; write timm:NAME with one of test_vit\.r160"),
        ({"name": "timm:test_vit.r1"}, r"no weights 'r1' of test_vit; did you mean 'test_vit\.r160_in1k'"),
        ({"name": "timm:test_vit", "weights": "other.pth"}, r"must be an existing file, \*\.safetensors"),
        ({"name": "timm:test_vit.r160_in1k", "quick_gelu": True}, "encoder.quick_gelu has no effect"),
        ({"name": "timm:test_vit.r160_in1k", "image_size": 100}, "no multiple of this encoder's patches of 16 px"),
        ({"name": "timm:test_nfnet.r160_in1k"}, "it is timm's NormFreeNet; known without text are timm's VisionTr"),
    ],
)
def test_what_can_not_be_used_is_refused_by_name(section: dict[str, Any], says: str) -> None:
    with pytest.raises(ImbvlmError, match=says):
        describe_encoder(EncoderConfig(**section))


def test_a_file_for_an_architecture_of_many_sizes_needs_its_tag(weights: str) -> None:
    with pytest.raises(ImbvlmError, match="several sizes, means or deviations; name what the file stems from"):
        describe_encoder(EncoderConfig(name="timm:resnet50", weights=weights))


def test_weights_that_do_not_fit_are_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ImbvlmError, match=r"can't load the encoder timm:test_vit3 from .*Missing key"):
        load("timm:test_vit3", weights=weights)
    state = load_file(weights)
    del state["cls_token"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ImbvlmError, match="cls_token"):
        load("timm:test_vit", weights=str(tmp_path / "part.safetensors"))


def test_weights_that_can_not_be_downloaded_are_a_sentence() -> None:
    with pytest.raises(
        ImbvlmError,
        match=r"timm:test_vit\.r160_in1k needs model\.safetensors of timm/test_vit\.r160_in1k, not cached here",
    ):
        load("timm:test_vit.r160_in1k")


def test_a_path_of_weights_holds_in_another_folder(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(weights).parent)
    config = EncoderConfig(name="timm:test_vit", weights="test_vit.safetensors").absolute()
    monkeypatch.chdir(tmp_path)
    assert resolve_encoder(config).has_weights


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "hf-hub:org/repo"}, "is no architecture of timm"),
        ({"architecture": "../x"}, "is no architecture of timm"),
        ({"architecture": 7}, "is no architecture of timm"),
        ({"architecture": "vit_huge_patch14_224"}, "don't belong together"),
        ({"model_args": {"depth": 10**9}}, r"changes its architecture by model_args \(depth\)"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, r"1 to 2,048 can be used|don't belong together"),
        ({"pretrained_cfg": {"input_size": [3, 160, 80]}}, "is not a timm model's description"),
        ({"pretrained_cfg": {"mean": "abc"}}, "is not a timm model's description"),
        ({"pretrained_cfg": {"crop_mode": "other"}}, "is not a timm model's description"),
        ({"pretrained_cfg": None}, "is not a timm model's description"),
        ({"global_pool": "nothing"}, "can't load the encoder"),
    ],
)
def test_a_folder_that_asks_for_anything_else_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    name = write_tower(tmp_path / "encoder", "image_only_vit")
    path = tmp_path / "encoder" / "config.json"
    description = json.loads(path.read_text())
    for key, value in change.items():
        description[key] = {**description[key], **value} if isinstance(value, dict) and key in description else value
    path.write_text(json.dumps(description))
    for attempt in (describe_encoder, lambda config: create_encoder(config, EvalConfig())):
        with pytest.raises(ImbvlmError, match=says):
            attempt(EncoderConfig(name=name))


def test_a_folder_without_weights_and_a_file_beside_it_are_refused(tmp_path: Path) -> None:
    name = write_tower(tmp_path / "encoder", "image_only_vit")
    with pytest.raises(ImbvlmError, match="which has no effect with"):
        describe_encoder(EncoderConfig(name=name, weights="other.safetensors"))
    (tmp_path / "encoder" / "model.safetensors").unlink()
    with pytest.raises(ImbvlmError, match=r"has no weights \(model\.safetensors\)"):
        describe_encoder(EncoderConfig(name=name))


def test_an_exported_model_is_loaded_without_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model_folder(tmp_path, "image_only_vit")

    def asked(*given: object, **named: object) -> None:
        pytest.fail(f"a request was made: {given}")

    monkeypatch.setattr("socket.getaddrinfo", asked)
    monkeypatch.setattr("socket.socket.connect", asked)
    (prediction,) = load_model(folder, "cpu").predict([np.zeros((40, 40, 3), np.uint8)])
    assert prediction.error is None


def test_weights_that_are_a_pickle_are_not_read(tmp_path: Path) -> None:
    name = write_tower(tmp_path / "encoder", "image_only_vit")
    size = (tmp_path / "encoder" / "model.safetensors").stat().st_size
    (tmp_path / "encoder" / "model.safetensors").write_bytes(pickle.dumps(print).ljust(size))
    with pytest.raises(ImbvlmError, match="can't load the encoder"):
        load(name)


def vit_behind_convolutions() -> torch.nn.Module:
    """As MobileCLIP 2's B."""
    stem = ConvStem(channels=(8, 8, 32), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=torch.nn.GELU)
    size: dict[str, Any] = {"img_size": 64, "patch_size": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    return VisionTransformer(**size, num_classes=0, no_embed_class=True, embed_layer=embed)


TRUNKS: dict[str, Callable[[], torch.nn.Module]] = {
    "vit_behind_convolutions": vit_behind_convolutions,
    "beit": lambda: Beit(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=0, use_rel_pos_bias=True),
    "swin": lambda: SwinTransformer(64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=0),
    "swin_v2": lambda: SwinTransformerV2(
        64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=0
    ),
    **{
        name: partial(timm.create_model, name, num_classes=0)
        for name in ("mobilenetv4_conv_small_035", "fastvit_t8", "efficientvit_b0", "maxvit_rmlp_pico_rw_256")
    },
}


@pytest.mark.parametrize("kind", TRUNKS)
def test_outputs_of_each_known_class_are_timms(kind: str) -> None:
    trunk: Any = TRUNKS[kind]().eval()
    size = {"beit": 32, "maxvit_rmlp_pico_rw_256": 256}.get(kind, 64)
    tower = TimmTower(trunk, size)
    with torch.no_grad():
        pixels = torch.randn(2, 3, size, size)
        tokens, pooled, embedding = visual_rules(tower, kind).outputs(tower, pixels)
        features = trunk.forward_features(pixels)
        torch.testing.assert_close(pooled, trunk(pixels))
    assert embedding is None
    if features.ndim == 4:
        features = (features if kind.startswith("swin") else features.permute(0, 2, 3, 1)).flatten(1, 2)
    # Beit's norm stands behind its mean.
    norm = trunk.norm if kind == "vit_behind_convolutions" else torch.nn.Identity()
    torch.testing.assert_close(norm(tokens), features)


def test_patches_behind_convolutions_fill_the_image() -> None:
    tower = TimmTower(vit_behind_convolutions(), 64)
    rules = visual_rules(tower, "vit")
    rules.resize(tower, 96)
    assert rules.outputs(tower, torch.zeros(1, 3, 96, 96)).tokens.shape[1] == 1 + 6 * 6
    with pytest.raises(ImbvlmError, match=r"no multiple of this encoder's patches of 16 px; use 64 or 80"):
        rules.resize(tower, 70)


def test_a_class_whose_tokens_lie_in_another_order_is_refused() -> None:
    tower = TimmTower(timm.create_model("hiera_tiny_224", num_classes=0, embed_dim=16, stages=(1, 1, 1, 1)), 224)
    with pytest.raises(ImbvlmError, match=r"it is timm's Hiera; known without text are timm's VisionTransformer, Eva"):
        visual_rules(tower, "hiera")
