"""Debug-size encoders of open_clip and timm with random weights, written as local-dir folders."""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def _native(**vision: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "quick_gelu": False, "vision_cfg": vision, "text_cfg": dict(_TEXT)}


def _timm(name: str, **vision: Any) -> dict[str, Any]:
    config = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", **vision}
    return {"embed_dim": 24, "custom_text": True, "vision_cfg": config, "text_cfg": dict(_TEXT)}


_VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}

# One of each kind that open_clip has: its own ViT and ResNet, and timm's ViTs (PE-Core's with RoPE), FastViT and maps.
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": _native(**_VIT),
    "vit_avg": _native(**_VIT, pool_type="avg", final_ln_after_pool=True),
    "resnet": _native(image_size=64, layers=[1, 1, 1, 1], width=8, head_width=64),
    "timm_vit": _timm("test_vit", image_size=160, timm_pool="token"),
    "timm_vit_registers": _timm("test_vit2", image_size=160, timm_pool="avg"),
    "timm_siglip": {**_timm("test_vit3", image_size=160, timm_pool="map", timm_proj="none"), "embed_dim": 96},
    "timm_eva_map": _timm("vit_pe_core_tiny_patch16_384", image_size=384, timm_pool="map", timm_proj=None),
    "timm_fastvit": _timm("fastvit_t8", image_size=256, timm_pool="avg", timm_proj=None),
    "timm_efficientnet": _timm("test_efficientnet", image_size=64, timm_pool="avg", timm_proj_bias=True),
    "timm_convnext": _timm("test_convnext", image_size=64, timm_pool="avg", timm_proj="mlp"),
    "timm_swin": _timm("swin_tiny_patch4_window7_224", image_size=224, timm_pool="avg"),
}


# timm's architectures without text.
IMAGE_ONLY = {
    "image_only_vit": "test_vit",
    "image_only_convnext": "test_convnext",
    "image_only_dinov3": "vit_tiny_patch16_dinov3_qkvb",
}


def write_tower(folder: Path, kind: str, *, half: bool = False, **changes: Any) -> str:
    """Write a tower of IMAGE_ONLY, or of CONFIGS with `changes` to its model_cfg (None: no key); returns its name."""
    if kind in IMAGE_ONLY:
        return write_image_only(folder, IMAGE_ONLY[kind])
    config = copy.deepcopy(CONFIGS[kind])
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    return write_config(folder, config, half=half)


def write_config(folder: Path, config: dict[str, Any], *, half: bool = False, seed: int = 0) -> str:
    """Write any model_cfg with random weights; returns its local-dir: name."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    _shake(model)
    state = {
        name: tensor.half() if half and tensor.is_floating_point() else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def write_image_only(folder: Path, architecture: str) -> str:
    """Write a timm model with random weights as timm does for its hub; returns its local-dir: name."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0)
    _shake(model)
    save_for_hf(model, folder, safe_serialization=True)
    return f"local-dir:{folder}"


def _shake(model: torch.nn.Module) -> None:
    """Zeros and ones at the start would hide a norm or a branch that is left out."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and "running_var" not in name and name != "logit_scale":
            tensor.add_(0.05 * torch.randn_like(tensor))
