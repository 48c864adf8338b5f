"""Tokens, pooled and image embedding by the class of an image tower (docs/protocol.md, Encoder outputs)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.efficientvit_mit import EfficientVit
from timm.models.eva import Eva, EvaBlock
from timm.models.fastvit import FastVit
from timm.models.maxxvit import MaxxVit
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.naflexvit import NaFlexVit
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError


class EncoderOutput(NamedTuple):
    """tokens (B, T, D) before the final norm; pooled (B, P) after it, before the projection; image_embedding (B, E).

    `image_embedding` is None without text.
    """

    tokens: Tensor
    pooled: Tensor
    image_embedding: Tensor | None


class FinalNorm(NamedTuple):
    """The last layer norm: weight (D,), bias (D,), eps."""

    weight: Tensor
    bias: Tensor
    eps: float


class VisualRules(NamedTuple):
    """The structure of one class of image towers; every function takes the module.

    `blocks` are the modules that images pass one after another, by their names in the tower; empty where unknown.
    `refusal` says why a tower of the class can't be used.
    """

    outputs: Callable[[Any, Tensor], EncoderOutput]
    final_norm: Callable[[Any], FinalNorm | None]
    projection: Callable[[Any], Tensor | None]
    has_class_token: Callable[[Any], bool]
    is_vit: Callable[[Any], bool]
    blocks: Callable[[Any], dict[str, nn.Module]]
    resize: Callable[[Any, int], None]
    refusal: Callable[[Any], str | None]


def visual_rules(image_tower: nn.Module, name: str) -> VisualRules:
    """The rules for the class of an image tower; raises ImbvlmError by name for one whose outputs aren't defined."""
    rules = OUTPUTS.get(type(image_tower))
    if rules is None:
        reason: str | None = f"its image tower is a {type(image_tower).__name__}; known are {_names(OUTPUTS)}"
    else:
        reason = rules.refusal(image_tower)
    if rules is None or reason is not None:
        raise ImbvlmError(f"the encoder {name} can't be used: {reason}. Choose another one.")
    return rules


# ------------------------------------------------------------------------------------- open_clip's own ViT


def _vit_outputs(image_tower: Any, images: Tensor) -> EncoderOutput:
    # Not output_tokens=True: that gives the projected pooled vector and drops the class token.
    tokens = image_tower.transformer(image_tower._embeds(images))
    if image_tower.final_ln_after_pool:
        pooled = image_tower.ln_post(_vit_pool(image_tower, tokens))
    else:
        pooled = _vit_pool(image_tower, image_tower.ln_post(tokens))
    return EncoderOutput(tokens, pooled, pooled if image_tower.proj is None else pooled @ image_tower.proj)


def _vit_pool(image_tower: Any, tokens: Tensor) -> Tensor:
    return tokens[:, 0] if image_tower.pool_type == "tok" else tokens[:, 1:].mean(dim=1)


def _vit_refusal(image_tower: Any) -> str | None:
    if image_tower.attn_pool is not None:
        return "its VisionTransformer has an attentional pooler (CoCa's), which has no token output of its own"
    if image_tower.pool_type not in ("tok", "avg"):
        return f"its VisionTransformer has pool_type {image_tower.pool_type!r}, which gives no pooled vector"
    return None


def _vit_projection(image_tower: Any) -> Tensor:
    return _eye(image_tower.ln_post.weight) if image_tower.proj is None else image_tower.proj.detach()


def _vit_blocks(image_tower: Any) -> dict[str, nn.Module]:
    return _members("transformer.resblocks", image_tower.transformer.resblocks)


def _vit_resize(image_tower: Any, image_size: int) -> None:
    patch = image_tower.patch_size[0]
    if image_size % patch:
        raise ImbvlmError(_not_a_multiple(image_size, patch, "patches"))
    image_tower.positional_embedding = _resized_positions(image_tower.positional_embedding, image_size // patch)
    image_tower.image_size = (image_size, image_size)
    image_tower.grid_size = (image_size // patch, image_size // patch)


# -------------------------------------------------------------------------------------- open_clip's ResNet


def _resnet_outputs(image_tower: Any, images: Tensor) -> EncoderOutput:
    positions = image_tower.layer4(image_tower.layer3(image_tower.layer2(image_tower.layer1(image_tower.stem(images)))))
    pooled = image_tower.attnpool(positions)
    return EncoderOutput(positions.flatten(2).transpose(1, 2), pooled, pooled)


def _resnet_blocks(image_tower: Any) -> dict[str, nn.Module]:
    return {name: getattr(image_tower, name) for name in ("layer1", "layer2", "layer3", "layer4")}


def _resnet_resize(image_tower: Any, image_size: int) -> None:
    if image_size % 32:
        raise ImbvlmError(_not_a_multiple(image_size, 32, "strides"))
    image_tower.attnpool.positional_embedding = _resized_positions(
        image_tower.attnpool.positional_embedding, image_size // 32
    )
    image_tower.image_size = image_size


# ---------------------------------------------------------------------------------------------- timm's trunks


# timm's classes that image-only encoders may be of: their tokens, or positions of a map, come row by row.
TIMM_TRUNKS: tuple[type[nn.Module], ...] = (
    TimmVisionTransformer, Eva, Beit, SwinTransformer, SwinTransformerV2, MaxxVit, ConvNeXt, ResNet, EfficientNet,
    MobileNetV3, FastVit, EfficientVit,
)  # fmt: skip


class TimmTower(nn.Module):
    """timm's model without a classifier, as the image tower of an image-only encoder."""

    def __init__(self, trunk: nn.Module, image_size: int) -> None:
        super().__init__()
        self.trunk, self.head, self.image_size = trunk, nn.Sequential(), image_size

    def set_input_size(self, image_size: int) -> None:
        """Take images of another size; raises what timm raises for one that doesn't fit."""
        trunk: Any = self.trunk
        if hasattr(trunk, "set_input_size"):
            trunk.set_input_size(img_size=image_size)
        self.image_size = image_size


def _timm_outputs(image_tower: Any, images: Tensor) -> EncoderOutput:
    features, tokens, pooled = _trunk_outputs(image_tower, images)
    if hasattr(image_tower.head, "pool"):
        pooled = image_tower.head.pool(pooled)
    return EncoderOutput(tokens, pooled.flatten(1), image_tower.head(image_tower.trunk.forward_head(features)))


def _image_only_outputs(tower: Any, images: Tensor) -> EncoderOutput:
    _, tokens, pooled = _trunk_outputs(tower, images)
    return EncoderOutput(tokens, pooled.flatten(1), None)


def _timm_refusal(image_tower: Any) -> str | None:
    if isinstance(image_tower.trunk, NaFlexVit):
        return "it is timm's NaFlexVit, which reads patches of images in sizes of their own; here all are squares"
    return None


def _trunk_refusal(tower: Any) -> str | None:
    reason = _timm_refusal(tower)
    if reason is not None:
        return reason
    if isinstance(tower.trunk, TIMM_TRUNKS):
        return None
    return f"it is timm's {type(tower.trunk).__name__}; known without text are timm's {_names(TIMM_TRUNKS)}"


def _trunk_outputs(image_tower: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of timm's trunk, its tokens before the final norm, and its features pooled."""
    trunk = image_tower.trunk
    if _timm_is_vit(image_tower):
        # timm's Eva fails where prefix tokens are asked for and it has none, as PE-Core's ViT-G.
        features, last = trunk.forward_intermediates(
            images, indices=1, norm=False, output_fmt="NLC", return_prefix_tokens=trunk.num_prefix_tokens > 0
        )
        patches, prefix = last[0] if isinstance(last[0], tuple) else (last[0], None)
        # Registers, behind the class token, are scratch space of the blocks and stand for no part of the image.
        has_class = prefix is not None and _timm_has_class_token(image_tower)
        tokens = torch.cat([prefix[:, :1], patches], dim=1) if has_class else patches
    else:
        features = trunk.forward_features(images)
        tokens = _flat_positions(trunk, features)
    return features, tokens, trunk.forward_head(features, pre_logits=True)


def _flat_positions(trunk: Any, features: Tensor) -> Tensor:
    """(B, H x W, C) of a feature map; timm's Swin and kin keep channels last."""
    if features.ndim == 3:
        return features
    if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)


def _timm_is_vit(image_tower: Any) -> bool:
    return hasattr(image_tower.trunk, "num_prefix_tokens") and hasattr(image_tower.trunk, "forward_intermediates")


def num_registers(image_tower: Any) -> int:
    """Number of an image tower's register tokens, which are no part of its outputs."""
    num_prefix = int(getattr(getattr(image_tower, "trunk", None), "num_prefix_tokens", 0))
    return num_prefix - int(_timm_has_class_token(image_tower)) if num_prefix else 0


def gains_from_compile(image_tower: nn.Module) -> bool:
    """Whether torch.compile pays on GPUs: timm's tables have 26 to 61 % for its transformers, 3 to 12 % for CLIP's."""
    return isinstance(image_tower, TimmModel | TimmTower) and _timm_is_vit(image_tower)


def _timm_has_class_token(image_tower: Any) -> bool:
    return getattr(image_tower.trunk, "cls_token", None) is not None


def _timm_final_norm(image_tower: Any) -> FinalNorm | None:
    if not _timm_is_vit(image_tower):
        return None
    # Trunks that average have their norm behind the pooling.
    norms = (getattr(image_tower.trunk, name, None) for name in ("norm", "fc_norm"))
    return next((_layer_norm(norm) for norm in norms if isinstance(norm, nn.LayerNorm)), None)


def _timm_projection(image_tower: Any) -> Tensor | None:
    """The weight of a single linear map, the identity where nothing projects; None for anything else."""
    if hasattr(image_tower.head, "pool"):
        return _eye(next(image_tower.parameters()), image_tower.head.pool.out_features)
    steps = [module for module in image_tower.head if not isinstance(module, nn.Dropout | nn.Identity)]
    if image_tower.trunk.num_classes:
        steps.insert(0, image_tower.trunk.get_classifier())
    if not steps:
        return _eye(next(image_tower.parameters()), image_tower.trunk.num_features)
    return steps[0].weight.detach().T if len(steps) == 1 and isinstance(steps[0], nn.Linear) else None


def _timm_blocks(image_tower: Any) -> dict[str, nn.Module]:
    """timm calls a trunk's blocks or stages by one of few names."""
    for name in ("blocks", "stages", "layers"):
        members = getattr(image_tower.trunk, name, None)
        if isinstance(members, nn.Sequential | nn.ModuleList):
            return _members(f"trunk.{name}", members)
    numbered = (f"layer{number}" for number in range(1, 5))
    return {f"trunk.{name}": getattr(image_tower.trunk, name) for name in numbered if hasattr(image_tower.trunk, name)}


def _timm_resize(image_tower: Any, image_size: int) -> None:
    # Of patches behind convolutions `patch_size` is 1, and what is over would be cut off.
    feat_ratio = getattr(getattr(image_tower.trunk, "patch_embed", None), "feat_ratio", None)
    if feat_ratio is not None and image_size % (step := feat_ratio()):
        raise ImbvlmError(_not_a_multiple(image_size, step, "patches"))
    if hasattr(image_tower.head, "pool"):
        raise ImbvlmError(
            f"encoder.image_size is {image_size}, and this encoder's attention pool fits its own size only. "
            "Leave encoder.image_size out."
        )
    try:
        image_tower.set_input_size(image_size)
    except (ValueError, AssertionError, RuntimeError, TypeError) as error:
        raise ImbvlmError(
            f"encoder.image_size is {image_size}, which this encoder doesn't take ({error}). Leave it out."
        ) from None


# ------------------------------------------------------------------------------------------------------ small


def _names(classes: Iterable[type[nn.Module]]) -> str:
    return ", ".join(cls.__name__ for cls in classes)


def _members(name: str, modules: nn.Sequential | nn.ModuleList) -> dict[str, nn.Module]:
    return {f"{name}.{number}": module for number, module in enumerate(modules)}


def _layer_norm(norm: nn.LayerNorm) -> FinalNorm:
    weight = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()
    return FinalNorm(weight, bias, norm.eps)


def _eye(like: Tensor, width: int | None = None) -> Tensor:
    return torch.eye(width or len(like), device=like.device)


def _resized_positions(positions: Tensor, grid: int) -> nn.Parameter:
    """Positional embeddings (1 + G x G, D) interpolated to another grid as open_clip does; the first stays."""
    first, rest = positions.detach()[:1], positions.detach()[1:]
    old = round(len(rest) ** 0.5)
    square = rest.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    return nn.Parameter(torch.cat([first, resized]), requires_grad=False)


def _not_a_multiple(image_size: int, step: int, unit: str) -> str:
    below = max(step, image_size // step * step)
    return (
        f"encoder.image_size is {image_size}, which is no multiple of this encoder's {unit} of {step} px; "
        f"use {below} or {below + step}."
    )


def _none(image_tower: Any) -> None:
    return None


OUTPUTS: dict[type[nn.Module], VisualRules] = {
    VisionTransformer: VisualRules(
        outputs=_vit_outputs,
        final_norm=lambda image_tower: _layer_norm(image_tower.ln_post),
        projection=_vit_projection,
        has_class_token=lambda image_tower: True,
        is_vit=lambda image_tower: True,
        blocks=_vit_blocks,
        resize=_vit_resize,
        refusal=_vit_refusal,
    ),
    ModifiedResNet: VisualRules(
        outputs=_resnet_outputs,
        final_norm=_none,
        # The attention pool projects, so that pooled is in the text space already.
        projection=lambda image_tower: _eye(image_tower.attnpool.c_proj.bias),
        has_class_token=lambda image_tower: False,
        is_vit=lambda image_tower: False,
        blocks=_resnet_blocks,
        resize=_resnet_resize,
        refusal=_none,
    ),
    TimmModel: VisualRules(
        outputs=_timm_outputs,
        final_norm=_timm_final_norm,
        projection=_timm_projection,
        has_class_token=_timm_has_class_token,
        is_vit=_timm_is_vit,
        blocks=_timm_blocks,
        resize=_timm_resize,
        refusal=_timm_refusal,
    ),
    TimmTower: VisualRules(
        outputs=_image_only_outputs,
        final_norm=_timm_final_norm,
        projection=_none,
        has_class_token=_timm_has_class_token,
        is_vit=_timm_is_vit,
        blocks=_timm_blocks,
        resize=_timm_resize,
        refusal=_trunk_refusal,
    ),
}

# Blocks that add attention(norm(x)) and then mlp(norm(x)), scaled by LayerScale where they have one: the second norm.
PRE_NORM_BLOCKS: dict[type[nn.Module], str] = {
    ResidualAttentionBlock: "ln_2",
    CustomResidualAttentionBlock: "ln_2",
    Block: "norm2",
    EvaBlock: "norm2",
}
