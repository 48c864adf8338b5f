"""Towers: the three outputs of every visual class, QuickGELU, names, sizes, identity."""

import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva
from torch.nn import functional as F
from towers import CONFIGS, write_config, write_tower

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_entries import ENCODERS
from imbvlm.config.input_sections import HF_HUB, EncoderConfig, EvalConfig
from imbvlm.models.encoder_classifier import EncoderClassifier
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.models.encoders.encoder_outputs import OUTPUTS, TimmTower, visual_rules
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.models.encoders.image_encoder import MAX_DIFFERENCE
from imbvlm.models.encoders.token_pooling import pooling_matrix

# Other image sizes that each kind can be given.
OTHER_SIZE = {
    "vit": 48, "vit_avg": 16, "resnet": 96, "timm_vit": 96, "timm_vit_registers": 96, "timm_siglip": 96,
    "timm_eva_map": 96, "timm_fastvit": 128, "timm_efficientnet": 96, "timm_convnext": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("towers")
    return {kind: write_tower(root / kind, kind) for kind in CONFIGS}


def load(name: str, image_size: int | None = None, **options: Any) -> Encoder:
    return create_encoder(EncoderConfig(name=name, image_size=image_size, **options), EvalConfig())


def images(encoder: Encoder, count: int = 2) -> torch.Tensor:
    size = encoder.info.image_size
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalized(encoder: Encoder, crops: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (encoder.info.mean, encoder.info.std))
    return (crops.float() / 255 - mean) / std


@pytest.mark.parametrize(("kind", "size"), [*((kind, None) for kind in CONFIGS), *OTHER_SIZE.items()])
def test_image_embedding_is_the_models_own(folders: dict[str, str], kind: str, size: int | None) -> None:
    encoder = load(folders[kind], size)
    crops = images(encoder)
    with torch.no_grad():
        expected = encoder.model.encode_image(normalized(encoder, crops))
    output = encoder.forward_images(crops)
    torch.testing.assert_close(output.image_embedding, expected, atol=1e-5, rtol=1e-5)
    encoder.check()
    for name in ("tokens", "pooled", "image_embedding"):
        assert tuple(getattr(output, name).shape[1:]) == encoder.info.shapes[name], name
        assert getattr(output, name).dtype == torch.float32


@pytest.mark.parametrize("kind", CONFIGS)
def test_in_bfloat16_the_outputs_are_the_same_to_its_rounding(folders: dict[str, str], kind: str) -> None:
    plain, encoder = load(folders[kind]), load(folders[kind]).compute_in("bfloat16")
    crops = images(plain)
    expected, output = plain.forward_images(crops), encoder.forward_images(crops)
    for name in ("tokens", "pooled", "image_embedding"):
        got, wanted = getattr(output, name), getattr(expected, name)
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got.flatten(1), wanted.flatten(1)).min() > 0.999, name
        assert not torch.equal(got, wanted), name
    assert encoder.compute_in("bfloat16") is encoder


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["vit", "timm_siglip", "timm_eva_map", "timm_vit_registers"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_encoder_has_the_same_outputs_to_rounding(
    folders: dict[str, str], backend: str, kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `eager` torch captures the graph and compiles nothing, which takes a CPU most of the time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    encoder = load(folders[kind], OTHER_SIZE[kind]).compute_in(precision)
    crops = images(encoder, 4)
    expected = encoder.forward_images(crops)
    assert encoder.compile(4) is None
    assert encoder._tower_outputs is not encoder.rules.outputs
    for got, wanted in zip(encoder.forward_images(crops), expected, strict=True):
        assert (got - wanted).norm() <= MAX_DIFFERENCE[precision] * wanted.norm()
    torch._dynamo.reset()


def wrong(function: Any) -> Any:
    return lambda *arguments: type(function(*arguments))(*(1.1 * output for output in function(*arguments)))


def unavailable(function: Any) -> Any:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    return fail


@pytest.mark.parametrize(
    ("compiled", "says"),
    [
        (wrong, "compiled outputs differ by 0.1 of their norm"),
        (unavailable, "RuntimeError: Failed to find C compiler."),
    ],
)
def test_an_encoder_that_compiles_to_something_else_stays_as_it_was(
    folders: dict[str, str], compiled: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(folders["vit"])
    crops = images(encoder)
    expected = encoder.forward_images(crops)
    monkeypatch.setattr(torch, "compile", compiled)
    reason = encoder.compile(2)
    assert reason is not None
    assert reason.startswith(says)
    assert torch.equal(encoder.forward_images(crops).pooled, expected.pooled)


def test_a_gpu_without_units_for_bfloat16_is_refused(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At best it would emulate them, slowly."""
    encoder = load(folders["vit"])
    encoder.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ImbvlmError, match=r"the Tesla T4 of .* set features.computed_in: float32"):
        encoder.compute_in("bfloat16")


def test_a_tower_on_the_cpu_takes_no_memory_of_a_gpu(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep's own process has one beside the GPUs of its trials, and to ask a GPU is to open it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: pytest.fail("a GPU was asked"))
    encoder = load(folders["vit"])
    encoder.forward_images(images(encoder))


@pytest.mark.parametrize("kind", OTHER_SIZE)
def test_description_without_weights_agrees_with_the_tower(folders: dict[str, str], kind: str) -> None:
    config = EncoderConfig(name=folders[kind], image_size=OTHER_SIZE[kind])
    described, loaded = describe_encoder(config), create_encoder(config, EvalConfig()).info
    unknown = {"logit_scale": 0.0, "weights_fingerprint": ""}
    assert asdict(described) | unknown == asdict(loaded) | unknown


@pytest.mark.parametrize("kind", CONFIGS)
def test_pooled_tokens_are_means_of_neighbors_and_all_else_stays(folders: dict[str, str], kind: str) -> None:
    plain, encoder = load(folders[kind]), load(folders[kind], token_pooling=2)
    crops = images(plain)
    whole, pooled = plain.forward_images(crops), encoder.forward_images(crops)
    torch.testing.assert_close(pooled.pooled, whole.pooled)
    torch.testing.assert_close(pooled.image_embedding, whole.image_embedding)
    assert tuple(pooled.tokens.shape[1:]) == encoder.info.shapes["tokens"]
    described = describe_encoder(EncoderConfig(name=folders[kind], token_pooling=2))
    assert (described.num_tokens, described.token_pooling) == (encoder.info.num_tokens, 2)
    front = int(encoder.info.has_class_token)
    torch.testing.assert_close(pooled.tokens[:, :front], whole.tokens[:, :front])
    side = math.isqrt(whole.tokens.shape[1] - front)
    grid = whole.tokens[:, front:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    # Where the grid is odd its edge has fewer neighbors.
    expected = F.avg_pool2d(grid, 2, ceil_mode=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled.tokens[:, front:], expected)


def test_a_model_on_images_pools_tokens_as_the_store_does(folders: dict[str, str]) -> None:
    encoder = load(folders["vit"], token_pooling=2)
    crops, model = images(encoder), EncoderClassifier(encoder, "tokens", torch.nn.Identity())
    torch.testing.assert_close(model(crops), encoder.forward_images(crops).tokens)
    assert "token_pool" not in model.state_dict()


def test_tokens_on_no_grid_are_not_pooled() -> None:
    with pytest.raises(ImbvlmError, match=r"the 12 tokens of some/tower are no square; set encoder\.token_pooling: 1"):
        pooling_matrix(13, 1, 2, "some/tower")
    with pytest.raises(ImbvlmError, match="gives one token at this image size"):
        pooling_matrix(2, 1, 2, "some/tower")


def test_vit_tokens_are_the_last_blocks_with_the_class_token_first(folders: dict[str, str]) -> None:
    encoder = load(folders["vit"])
    seen = {}
    encoder.image_tower.transformer.resblocks[-1].register_forward_hook(lambda *args: seen.update(last=args[2]))
    output = encoder.forward_images(images(encoder))
    torch.testing.assert_close(output.tokens, seen["last"])
    assert encoder.info.has_class_token
    assert encoder.info.num_tokens == 17
    norm = encoder.final_norm()
    assert norm is not None
    pooled = F.layer_norm(output.tokens[:, 0], (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(pooled, output.pooled)
    torch.testing.assert_close(output.pooled @ encoder.projection(), output.image_embedding)


def test_vit_that_averages_and_norms_afterwards(folders: dict[str, str]) -> None:
    encoder = load(folders["vit_avg"])
    output = encoder.forward_images(images(encoder))
    norm = encoder.final_norm()
    pooled = F.layer_norm(output.tokens[:, 1:].mean(dim=1), (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(pooled, output.pooled)


def test_resnet_gives_the_last_maps_positions_and_the_attention_pool(folders: dict[str, str]) -> None:
    encoder = load(folders["resnet"])
    seen = {}
    encoder.image_tower.layer4.register_forward_hook(lambda *args: seen.update(last=args[2]))
    output = encoder.forward_images(images(encoder))
    torch.testing.assert_close(output.tokens[:, 1], seen["last"][:, :, 0, 1])
    torch.testing.assert_close(output.pooled, output.image_embedding)
    torch.testing.assert_close(output.pooled @ encoder.projection(), output.image_embedding)
    assert (encoder.info.kind, encoder.info.has_class_token, encoder.final_norm()) == ("convolution", False, None)


@pytest.mark.parametrize("kind", ["timm_vit", "timm_vit_registers", "timm_siglip", "timm_eva_map"])
def test_timm_tokens_come_before_the_norm(folders: dict[str, str], kind: str) -> None:
    encoder = load(folders[kind])
    crops = images(encoder)
    output = encoder.forward_images(crops)
    trunk = encoder.image_tower.trunk
    with torch.no_grad():
        features = trunk.forward_features(normalized(encoder, crops))
        is_class = trunk.cls_token is not None
        # Without the registers behind the class token.
        expected = torch.cat([features[:, :is_class], features[:, trunk.num_prefix_tokens :]], dim=1)
        torch.testing.assert_close(trunk.norm(output.tokens), expected, atol=1e-5, rtol=1e-5)
        pooled = trunk.forward_head(features, pre_logits=True)
    torch.testing.assert_close(output.pooled, pooled, atol=1e-5, rtol=1e-5)
    assert encoder.info.kind == "vit"
    assert encoder.info.has_class_token == (trunk.cls_token is not None)
    assert encoder.final_norm() is not None


def test_a_token_stands_for_a_patch_or_the_class(folders: dict[str, str]) -> None:
    counts = {"vit": (16, 1), "timm_vit_registers": (100, 0), "timm_eva_map": (576, 1), "timm_fastvit": (64, 0)}
    for kind, (num_patches, num_class) in counts.items():
        info = describe_encoder(EncoderConfig(name=folders[kind]))
        assert (info.num_tokens, info.has_class_token) == (num_patches + num_class, bool(num_class)), kind


def test_a_transformer_without_any_prefix_token_gives_its_patches() -> None:
    """As PE-Core's largest, of timm's class whose other members have a class token or registers."""
    tower = TimmTower(Eva(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=0, class_token=False), 32).eval()
    with torch.no_grad():
        output = visual_rules(tower, "own").outputs(tower, pixels := torch.rand(2, 3, 32, 32))
        torch.testing.assert_close(tower.trunk.norm(output.tokens), tower.trunk.forward_features(pixels))
        torch.testing.assert_close(output.pooled, tower.trunk(pixels))
    assert output.tokens.shape == (2, 16, 32)


def test_an_encoder_for_images_of_any_shape_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = {**CONFIGS["timm_siglip"], "embed_dim": 768}
    vision = {**config["vision_cfg"], "timm_model_name": "naflexvit_base_patch16_siglip", "image_size": 384}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**config, "vision_cfg": vision}}))
    (tmp_path / "open_clip_model.safetensors").write_bytes(bytes(8))
    for name in (f"local-dir:{tmp_path}", "timm:naflexvit_base_patch16_siglip.v2_webli"):
        with pytest.raises(ImbvlmError, match=r"NaFlexVit, which reads patches of images in sizes of their own"):
            describe_encoder(EncoderConfig(name=name))


@pytest.mark.parametrize("kind", ["timm_vit", "timm_vit_registers", "timm_siglip", "timm_eva_map", "timm_fastvit"])
def test_the_embedding_is_the_pooled_vector_through_the_projection(folders: dict[str, str], kind: str) -> None:
    encoder = load(folders[kind])
    output, projection = encoder.forward_images(images(encoder, 3)), encoder.projection()
    assert projection is not None
    # Up to the constant of a bias.
    difference = output.image_embedding - output.pooled @ projection
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["timm_efficientnet", "timm_convnext", "timm_swin"])
def test_timm_feature_maps_are_flattened_row_by_row(folders: dict[str, str], kind: str) -> None:
    encoder = load(folders[kind])
    crops = images(encoder)
    with torch.no_grad():
        features = encoder.image_tower.trunk.forward_features(normalized(encoder, crops))
    channels_last = features if kind == "timm_swin" else features.permute(0, 2, 3, 1)
    tokens = encoder.forward_images(crops).tokens
    torch.testing.assert_close(tokens, channels_last.flatten(1, 2), atol=1e-5, rtol=1e-4)
    assert (encoder.projection() is None) == (kind == "timm_convnext")


@pytest.mark.parametrize("kind", ["vit", "timm_siglip", "timm_eva_map"])
def test_another_size_is_what_open_clip_would_make_of_it(folders: dict[str, str], kind: str) -> None:
    encoder = load(folders[kind], OTHER_SIZE[kind])
    model = open_clip.create_model(folders[kind], force_image_size=OTHER_SIZE[kind]).eval()
    crops = images(encoder)
    with torch.no_grad():
        expected = model.encode_image(normalized(encoder, crops))
    torch.testing.assert_close(encoder.forward_images(crops).image_embedding, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_weights_run_in_float32_at_any_size(tmp_path: Path) -> None:
    encoder = load(write_tower(tmp_path / "half", "vit", half=True), 48)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    assert encoder.forward_images(images(encoder)).pooled.isfinite().all()


@pytest.mark.parametrize(("kind", "size", "valid"), [("vit", 36, "32 or 40"), ("resnet", 80, "64 or 96")])
def test_a_size_that_does_not_fit_names_those_that_do(
    folders: dict[str, str], kind: str, size: int, valid: str
) -> None:
    for attempt in (describe_encoder, lambda config: create_encoder(config, EvalConfig())):
        with pytest.raises(ImbvlmError, match=f"encoder.image_size is {size}.*use {valid}"):
            attempt(EncoderConfig(name=folders[kind], image_size=size))


def test_the_tower_never_trains_and_gives_no_gradients(folders: dict[str, str]) -> None:
    encoder = load(folders["timm_efficientnet"])
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    first = encoder.forward_images(images(encoder))
    second = encoder.forward_images(images(encoder))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not first.pooled.requires_grad


def test_embedded_tower_uses_its_own_mean_and_size() -> None:
    encoder = load("tinylit_lite0", 96)
    assert (encoder.info.mean, encoder.info.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert encoder.info.shapes["tokens"] == (9, 1280)
    assert encoder.preprocess.image_size == 96
    assert encoder.preprocess.resize == pytest.approx(8 / 7)
    output = encoder.forward_images(images(encoder))
    torch.testing.assert_close(output.tokens.mean(dim=1), output.pooled, atol=1e-5, rtol=1e-4)


def test_preprocessing_comes_from_the_tower_unless_the_configuration_says_otherwise(folders: dict[str, str]) -> None:
    config = EncoderConfig(name=folders["vit"])
    preprocess = create_encoder(config, EvalConfig()).preprocess
    assert (preprocess.interpolation, preprocess.resize_mode) == ("bilinear", "squash")
    assert preprocess.mean == (0.4, 0.5, 0.6)
    other = create_encoder(config, EvalConfig(resize=1.25, interpolation="bicubic")).preprocess
    assert (other.resize, other.interpolation) == (1.25, "bicubic")
    faster = create_encoder(config, EvalConfig(jpeg_downscale=2)).preprocess
    assert (preprocess.jpeg_downscale, faster.jpeg_downscale) == (None, 2)
    assert faster.to_dict() != preprocess.to_dict()


def test_mean_and_size_of_tags_are_the_tags() -> None:
    siglip, clip = (
        describe_encoder(EncoderConfig(name=name)) for name in ("siglip_vit_l16_256", "ViT-L-14-336/openai")
    )
    assert (siglip.mean, siglip.image_size, siglip.resize_mode) == ((0.5, 0.5, 0.5), 256, "squash")
    assert (clip.image_size, clip.num_tokens) == (336, 577)
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


@pytest.mark.slow
def test_every_named_tower_is_described_in_seconds() -> None:
    start = time.monotonic()
    # The description of the others lies on the hub.
    names = [name for name, entry in ENCODERS.items() if not entry.name.startswith(HF_HUB)]
    infos = {name: describe_encoder(EncoderConfig(name=name)) for name in names}
    assert time.monotonic() - start < 2 * len(names)
    assert infos["openai_rn50"].shapes["tokens"] == (49, 2048)
    assert infos["openai_rn50"].shapes["pooled"] == (1024,)
    assert infos["openai_vit_l14"].shapes["tokens"] == (257, 1024)
    assert infos["siglip_vit_b16"].shapes["tokens"] == (196, 768)
    assert not infos["siglip_vit_b16"].has_class_token


# ------------------------------------------------------------------------------------------------ QuickGELU


def test_local_folder_must_state_quick_gelu(tmp_path: Path) -> None:
    for kind in ("vit", "resnet"):
        name = write_tower(tmp_path / kind, kind, quick_gelu=None)
        with pytest.raises(ImbvlmError, match=r"encoder\.quick_gelu to true"):
            load(name)
    quick, plain = load(name, quick_gelu=True), load(name, quick_gelu=False)
    assert quick.info.weights_fingerprint != plain.info.weights_fingerprint
    assert load(write_tower(tmp_path / "conv", "timm_efficientnet")).info.kind == "convolution"


def test_stated_quick_gelu_is_used_and_may_not_contradict_the_folder(tmp_path: Path) -> None:
    name = write_tower(tmp_path / "vit", "vit", quick_gelu=None)
    encoder = load(name, quick_gelu=True)
    assert isinstance(encoder.image_tower.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    stated = write_tower(tmp_path / "stated", "vit", quick_gelu=True)
    assert load(stated, quick_gelu=True).info.weights_fingerprint == encoder.info.weights_fingerprint
    with pytest.raises(ImbvlmError, match=r"encoder\.quick_gelu is false and .*open_clip_config\.json says true"):
        load(stated, quick_gelu=False)


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        ({"name": "ViT-B-16/openai", "quick_gelu": False}, "trained with QuickGELU; set it to true"),
        ({"name": "laion2b_vit_b16", "quick_gelu": True}, "trained without QuickGELU; set it to false"),
        ({"name": "ViT-L-14-quickgelu/laion2b_s32b_b82k"}, "use ViT-L-14/laion2b_s32b_b82k"),
        ({"name": "ViT-L-14-quickgelu/openai", "quick_gelu": False}, "ViT-L-14-quickgelu has QuickGELU"),
        ({"name": "roberta-ViT-B-32/laion2b_s12b_b32k"}, "encoder.quick_gelu: true"),
    ],
)
def test_quick_gelu_that_contradicts_a_tag_names_the_right_value(config: dict, fix: str) -> None:
    with pytest.raises(ImbvlmError, match=fix):
        describe_encoder(EncoderConfig(**config))


@pytest.mark.parametrize("name", ["ViT-L-14/openai", "RN50/openai", "ViT-B-16/dfn2b", "ViT-B-32-quickgelu/openai"])
def test_tags_that_need_quick_gelu_get_it(name: str) -> None:
    assert resolve_encoder(EncoderConfig(name=name)).quick_gelu


# ---------------------------------------------------------------------------------------- names and weights


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("openai_vit_b17", "did you mean 'openai_vit_b16'"),
        ("ViT-B-33/openai", "did you mean 'ViT-B-32'"),
        ("ViT-B-32/opnai", "did you mean 'openai'"),
        ("ViT-B-32", "write ViT-B-32/TAG with one of openai"),
        ("hf-hub:org/repo", "encoder fetch hf-hub:org/repo"),
        ("vit_base_patch16_dinov3.lvd1689m", "a model of timm; write timm:vit_base_patch16_dinov3.lvd1689m"),
        ("local-dir:/nowhere", "/nowhere/open_clip_config.json is not there"),
        ("ViT-S-16/openai", "has no weights"),
        ("ViT-S-16", "without weights; open_clip has none for it; set encoder.weights"),
        ("google/siglip2-base", "write hf-hub:google/siglip2-base if that is a repository of the hub"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "attentional pooler"),
    ],
)
def test_unknown_and_unusable_names_say_what_would_do(name: str, says: str) -> None:
    with pytest.raises(ImbvlmError, match=says):
        describe_encoder(EncoderConfig(name=name))


def test_other_visual_classes_are_refused_by_name(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OUTPUTS, open_clip.modified_resnet.ModifiedResNet)
    with pytest.raises(
        ImbvlmError, match="its image tower is a ModifiedResNet; known are VisionTransformer, TimmModel"
    ):
        load(folders["resnet"])


def test_relative_folder_is_relative_to_the_working_directory(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(folders["vit"].removeprefix("local-dir:"))
    monkeypatch.chdir(folder.parent)
    config = EncoderConfig(name=f"local-dir:{folder.name}")
    assert describe_encoder(config).image_size == 32
    assert config.absolute().name == folders["vit"]


@pytest.mark.parametrize("content", ["{", "[]", '{"model_cfg": {"embed_dim": 8}}', '{"embed_dim": 8}'])
def test_damaged_description_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ImbvlmError, match="is not a model's description"):
        describe_encoder(EncoderConfig(name=f"local-dir:{tmp_path}"))


def test_folder_without_weights_and_weights_that_do_not_fit(tmp_path: Path) -> None:
    name = write_tower(tmp_path / "vit", "vit")
    weights = tmp_path / "vit" / "open_clip_model.safetensors"
    state = load_file(weights)
    weights.unlink()
    with pytest.raises(ImbvlmError, match="has no weights"):
        load(name)
    save_file({key: value for key, value in state.items() if key != "visual.proj"}, weights)
    with pytest.raises(ImbvlmError, match=r"visual\.proj"):
        load(name)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ImbvlmError, match="can't load the encoder"):
        load(name)


def test_weights_file_for_a_tags_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("RN50", load_weights=False)
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    with pytest.raises(ImbvlmError, match=r"set encoder\.quick_gelu to true or false \(RN50/openai itself: true\)"):
        load("openai_rn50", weights=str(path))
    encoder = load("openai_rn50", weights=str(path), quick_gelu=True)
    assert torch.equal(encoder.image_tower.conv1.weight, model.visual.conv1.weight)
    assert encoder.info.name == "openai_rn50"
    with pytest.raises(ImbvlmError, match="there is no such file"):
        load("RN50", weights=str(tmp_path / "other.pt"), quick_gelu=True)
    with pytest.raises(ImbvlmError, match="used with several means"):
        load("ViT-L-14", weights=str(path), quick_gelu=True)


def test_weights_that_can_not_be_downloaded_are_a_sentence_and_quick() -> None:
    start = time.monotonic()
    with pytest.raises(ImbvlmError, match=r"openai_vit_b32 needs open_clip_model\.safetensors .*encoder fetch"):
        load("openai_vit_b32")
    assert time.monotonic() - start < 30


def test_weights_in_the_hubs_cache_are_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    weights = repository / "snapshots" / "abc" / "open_clip_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_encoder(EncoderConfig(name="openai_vit_b32")).weights_file() == str(weights)


def test_fingerprint_knows_the_weights_and_not_where_they_lie(tmp_path: Path) -> None:
    first = load(write_config(tmp_path / "a", CONFIGS["vit"])).info.weights_fingerprint
    same = load(write_config(tmp_path / "b", CONFIGS["vit"])).info.weights_fingerprint
    other = load(write_config(tmp_path / "c", CONFIGS["vit"], seed=1)).info.weights_fingerprint
    assert first == same != other
    assert len(first) == 64


def test_loading_leaves_logging_alone(folders: dict[str, str]) -> None:
    import logging

    before = (list(logging.getLogger().handlers), logging.root.manager.disable)
    load(folders["vit"])
    assert (list(logging.getLogger().handlers), logging.root.manager.disable) == before
