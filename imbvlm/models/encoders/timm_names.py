"""timm's models and local folders of them, which are image-only: what a name means."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.config.input_sections import TIMM, EncoderConfig
from imbvlm.models.encoders.encoder_source import EncoderSource, check_pixel_scale, read_origin
from imbvlm.models.encoders.hub_files import HubFile

# timm's own names, so that its folders on the hub are read too.
TIMM_CONFIG_FILE, TIMM_WEIGHTS_FILE = "config.json", "model.safetensors"
# timm takes other names for addresses of the hub, or for folders.
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]+")
# Those of timm's model_args that stand elsewhere in its description too.
_READ_ARGUMENTS = {"num_classes", "in_chans", "global_pool", "img_size"}
_RESIZE_MODES = {"center": "shortest", "squash": "squash"}


def timm_source(config: EncoderConfig, name: str) -> EncoderSource:
    """One of timm's models by ARCHITECTURE.TAG, or by ARCHITECTURE with a file of weights.

    Raises ImbvlmError with the nearest name.
    """
    architecture, _, tag = name.partition(".")
    _check(config, architecture)
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and timm has no weights {tag!r} of {architecture}; "
            f"{suggest_name(name, tags)}"
        )
    if not tag and config.weights is None:
        fix = f"write {TIMM}NAME with one of {', '.join(tags)}, or" if tags else "timm has none for it;"
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, an architecture without weights; {fix} set encoder.weights."
        )
    weights = config.absolute().weights
    if weights is not None and not (weights.endswith(".safetensors") and os.path.isfile(weights)):
        raise ImbvlmError(
            f"encoder.weights is {config.weights!r}, and must be an existing file, *.safetensors; give its path."
        )
    try:
        first, *others = [_input(asdict(get_pretrained_cfg(each))) for each in ([name] if tag else tags or [name])]
    except (ValueError, LookupError, TypeError) as error:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and imbvlm can't prepare images as its training did "
            f"({type(error).__name__}: {error}); choose another encoder."
        ) from None
    if any(other != first for other in others):
        raise ImbvlmError(
            f"encoder.name is {config.name!r} with weights of its own, and {architecture} is used with several sizes, "
            f"means or deviations; name what the file stems from, {TIMM}NAME with one of {', '.join(tags)}."
        )
    hub = get_pretrained_cfg(name).hf_hub_id if tag else None
    if weights is None and hub is None:
        raise ImbvlmError(f"encoder.name is {config.name!r}, and the hub has no such weights; set encoder.weights.")
    return _source(config, architecture, weights, None if hub is None else HubFile(hub, (TIMM_WEIGHTS_FILE,)), first)


def timm_folder_source(config: EncoderConfig, folder: str, hub: HubFile | None = None) -> EncoderSource:
    """A timm model in a local folder, by the description that comes with it; raises ImbvlmError.

    `hub` is its file of weights where the folder is one of the hub's cache.
    """
    path, weights = Path(folder) / TIMM_CONFIG_FILE, Path(folder) / TIMM_WEIGHTS_FILE
    try:
        data = storage.read_json(str(path))
        architecture, unread = data["architecture"], sorted(set(data.get("model_args") or ()) - _READ_ARGUMENTS)
        images = {**_input(data["pretrained_cfg"]), "global_pool": data.get("global_pool")}
    except (storage.StorageError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}: {path} is not a timm model's description "
            f"({type(error).__name__}: {error}); it needs architecture, and pretrained_cfg with input_size, mean, std."
        ) from None
    _check(config, architecture)
    if unread:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {path} changes its architecture by model_args "
            f"({', '.join(unread)}), which are not read; use a plain architecture."
        )
    if config.weights is not None:
        raise ImbvlmError(
            f"encoder.weights is {config.weights!r}, which has no effect with {config.name!r}: the folder has its own "
            "weights; remove encoder.weights."
        )
    if hub is None and not weights.is_file():
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {folder} has no weights ({TIMM_WEIGHTS_FILE}); copy them there."
        )
    source = _source(config, architecture, str(weights) if hub is None else None, hub, images)
    return replace(source, stated_origin=read_origin(data))


def _check(config: EncoderConfig, architecture: object) -> None:
    if not (isinstance(architecture, str) and _ARCHITECTURE.fullmatch(architecture) and timm.is_model(architecture)):
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {architecture!r} is no architecture of timm; "
            f"{suggest_name(str(architecture), timm.list_models())}"
        )
    if config.quick_gelu is not None:
        raise ImbvlmError(
            f"encoder.quick_gelu has no effect with {config.name!r}, whose activation is its architecture's; remove it."
        )


def _source(
    config: EncoderConfig,
    architecture: str,
    weights: str | None,
    hub: HubFile | None,
    images: Mapping[str, Any],
) -> EncoderSource:
    preprocess = {key: images[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    model_config = {"global_pool": images.get("global_pool"), "image_size": images["image_size"]}
    return EncoderSource(config.name, "timm", architecture, weights, hub, model_config, preprocess, False)


def _input(pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Size, mean, deviation, interpolation and resize mode of images; raises ValueError, LookupError or TypeError."""
    channels, height, width = pretrained_cfg["input_size"]
    mean, std = (tuple(map(float, pretrained_cfg[key])) for key in ("mean", "std"))
    check_pixel_scale({"mean": mean, "std": std})
    if channels != 3 or height != width:
        raise ValueError("images must be squares of 3 channels")
    return {
        "image_size": int(width),
        "mean": mean,
        "std": std,
        "interpolation": pretrained_cfg.get("interpolation", "bicubic"),
        "resize_mode": _RESIZE_MODES[pretrained_cfg.get("crop_mode", "center")],
    }
