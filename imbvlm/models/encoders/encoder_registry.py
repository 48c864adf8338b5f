"""Which tower a name means: open_clip's models and tags, local folders and files, and the QuickGELU that each needs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg

from imbvlm.assets import tower_path
from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.base.registry import Registry
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.models.encoders.encoder_weights import WeightsState, _address, _cached, _download, unreachable

LOCAL_DIR = "local-dir:"
EMBEDDED = "embedded:"
SUFFIX = "-quickgelu"
CONFIG_FILE = "open_clip_config.json"
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")
# Far above any tower that there is; what a file asks for beyond would fill memory before its weights are looked at.
_MOST_LAYERS = 1000
# timm takes other names for addresses of the hub, or for folders.
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class EncoderEntry:
    """An encoder with a short name: open_clip's architecture and tag, or an encoder that comes with the package."""

    model: str
    tag: str | None
    summary: str


ENCODERS = Registry(
    "encoder",
    {
        "openai_rn50": EncoderEntry("RN50", "openai", "CLIP's ResNet-50, of the study"),
        "openai_rn101": EncoderEntry("RN101", "openai", "CLIP's ResNet-101, of the study"),
        "openai_vit_b32": EncoderEntry("ViT-B-32", "openai", "CLIP's ViT-B/32, of the study"),
        "openai_vit_b16": EncoderEntry("ViT-B-16", "openai", "CLIP's ViT-B/16, of the study"),
        "openai_vit_l14": EncoderEntry("ViT-L-14", "openai", "CLIP's ViT-L/14, of the study"),
        "openai_vit_l14_336": EncoderEntry("ViT-L-14-336", "openai", "CLIP's ViT-L/14 at 336 px"),
        "laion400m_vit_b16": EncoderEntry("ViT-B-16", "laion400m_e32", "ViT-B/16 trained on LAION-400M, of the study"),
        "laion400m_vit_l14": EncoderEntry("ViT-L-14", "laion400m_e32", "ViT-L/14 trained on LAION-400M, of the study"),
        "laion2b_vit_b16": EncoderEntry("ViT-B-16", "laion2b_s34b_b88k", "ViT-B/16 trained on LAION-2B, of the study"),
        "laion2b_vit_l14": EncoderEntry("ViT-L-14", "laion2b_s32b_b82k", "ViT-L/14 trained on LAION-2B, of the study"),
        "dfn2b_vit_b16": EncoderEntry("ViT-B-16", "dfn2b", "ViT-B/16 trained on DFN-2B"),
        "dfn2b_vit_l14": EncoderEntry("ViT-L-14", "dfn2b", "ViT-L/14 trained on DFN-2B"),
        "siglip_vit_b16": EncoderEntry("ViT-B-16-SigLIP", "webli", "SigLIP's ViT-B/16, no class token"),
        "siglip_vit_l16_256": EncoderEntry(
            "ViT-L-16-SigLIP-256", "webli", "SigLIP's ViT-L/16 at 256 px, no class token"
        ),
        "tinylit_lite0": EncoderEntry(
            EMBEDDED + "tinylit-lite0", None, "small, comes with the package: EfficientNet-Lite0"
        ),
    },
)


@dataclass(frozen=True)
class EncoderSource:
    """Everything about a tower but its weights: `model` is what open_clip takes, an architecture or a local folder."""

    name: str
    model: str
    tag: str | None
    weights: str | None
    model_config: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    quick_gelu: bool

    @property
    def is_local(self) -> bool:
        return self.model.startswith(LOCAL_DIR)

    def weights_file(self) -> str | None:
        """The file to load, downloaded where need be; None for a folder, which open_clip searches itself.

        Raises ImbvlmError where there is none or the download fails.
        """
        if self.weights is not None:
            return self.weights
        if self.is_local:
            if not self._folder_files():
                raise ImbvlmError(
                    f"encoder.name is {self.name!r}, and {self.model.removeprefix(LOCAL_DIR)} has no weights "
                    f"({', '.join(f'*{suffix}' for suffix in _WEIGHTS_SUFFIXES)})"
                )
            return None
        return _download(self.name, get_pretrained_cfg(self.model, self.tag))

    def weights_bytes(self) -> int | None:
        """Bytes of the user's own file, of a folder's files the largest; None without one, or for open_clip's tags."""
        if self.weights is not None:
            return os.path.getsize(self.weights)
        return max((path.stat().st_size for path in self._folder_files()), default=None)

    def _folder_files(self) -> list[Path]:
        """Weights in a local folder; none where there is no folder. Raises ImbvlmError for a pipe or a device."""
        folder = Path(self.model.removeprefix(LOCAL_DIR))
        if not self.is_local or not folder.is_dir():
            return []
        paths = [path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES]
        for path in paths:
            # open_clip would open it, and wait for ever.
            if not path.is_file():
                raise ImbvlmError(f"encoder.name is {self.name!r}, and {path} is no file with weights; remove it")
        return paths

    @property
    def has_weights(self) -> bool:
        """Whether the weights are on this machine; asks no network, raises ImbvlmError for a folder without."""
        if self.weights is not None or self.is_local:
            self.weights_file()
            return True
        return _cached(get_pretrained_cfg(self.model, self.tag)) is not None

    def weights_state(self) -> WeightsState:
        """Where the weights are or would be fetched from, without doing so; raises ImbvlmError for a folder without."""
        if self.weights is not None or self.is_local:
            self.weights_file()
            return WeightsState(True, self.weights or self.model, None)
        tag_config = get_pretrained_cfg(self.model, self.tag)
        cached, address = _cached(tag_config), _address(tag_config)
        return WeightsState(cached is not None, address, None if cached else unreachable(address))


def absolute_encoder(config: EncoderConfig) -> EncoderConfig:
    """The same tower for a process with another working directory."""
    name = config.name
    if name.startswith(LOCAL_DIR):
        name = LOCAL_DIR + _absolute(name.removeprefix(LOCAL_DIR))
    weights = None if config.weights is None else _absolute(config.weights)
    return config.model_copy(update={"name": name, "weights": weights})


def resolve_encoder(config: EncoderConfig) -> EncoderSource:
    """What `encoder.name` means; reads small files only. Raises ImbvlmError with the nearest name or the mend."""
    entry = ENCODERS.get(config.name)
    name = config.name if entry is None else entry.model if entry.tag is None else f"{entry.model}/{entry.tag}"
    if name.startswith(EMBEDDED):
        return _local_tower(config, str(tower_path(name.removeprefix(EMBEDDED))))
    if name.startswith(LOCAL_DIR):
        return _local_tower(config, _absolute(name.removeprefix(LOCAL_DIR)))
    return _open_clip_tower(config, name)


def needs_quick_gelu_stated(model_config: Mapping[str, Any]) -> bool:
    """Whether an architecture has the switch for its image tower: open_clip's own towers, not timm's."""
    return "timm_model_name" not in model_config.get("vision_cfg", {})


# ------------------------------------------------------------------------------------------- local folders


def _local_tower(config: EncoderConfig, folder: str) -> EncoderSource:
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        raise ImbvlmError(
            f"encoder.name is {config.name!r}: {path} is not there; the folder needs {CONFIG_FILE} and its weights"
        )
    try:
        data = storage.read_json(str(path))
        model_config, preprocess = data["model_cfg"], data.get("preprocess_cfg", {})
        model_config["embed_dim"]
        sides = ("vision_cfg", "text_cfg", *(["multimodal_cfg"] if "multimodal_cfg" in model_config else []))
        num_layers = max(_num_layers(model_config[side]) for side in sides)
        runs_code = "trust_remote_code" in (model_config["text_cfg"].get("tokenizer_kwargs") or {})
        timm_name = model_config["vision_cfg"].get("timm_model_name")
    except (storage.StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}: {path} is not a model's description "
            f"({type(error).__name__}: {error}); it needs model_cfg with embed_dim, vision_cfg and text_cfg"
        ) from None
    if num_layers > _MOST_LAYERS:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {path} asks for {num_layers:,} layers; at most {_MOST_LAYERS:,} can "
            "be built"
        )
    if runs_code:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {path} sets trust_remote_code: its tokenizer would run code that "
            "comes with it; take that out"
        )
    if timm_name is not None and not (isinstance(timm_name, str) and _TIMM_NAME.fullmatch(timm_name)):
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {path} has timm_model_name {timm_name!r}; a tower in a folder has "
            "the plain name of an architecture of timm, such as vit_base_patch16_224, and none of the hub or a path"
        )
    if config.weights is not None:
        raise ImbvlmError(
            f"encoder.weights is {config.weights!r}, which has no effect with {config.name!r}: the folder has its own "
            "weights; remove encoder.weights, or name open_clip's architecture instead of the folder"
        )
    said, stated = model_config.get("quick_gelu"), config.quick_gelu
    if said is not None and stated is not None and bool(said) != stated:
        raise ImbvlmError(
            f"encoder.quick_gelu is {_yaml(stated)} and {path} says {_yaml(said)}; remove encoder.quick_gelu, or "
            "correct the file if it is wrong"
        )
    if said is None and stated is None and needs_quick_gelu_stated(model_config):
        raise ImbvlmError(
            f"{path} doesn't say which activation its weights were trained with; set encoder.quick_gelu to true "
            "(OpenAI's and DFN's weights) or false (most others), or add quick_gelu to its model_cfg"
        )
    quick_gelu = bool(said) if said is not None else bool(stated)
    return EncoderSource(
        config.name, LOCAL_DIR + folder, None, None, model_config, _with_defaults(preprocess), quick_gelu
    )


def _num_layers(side: Mapping[str, Any]) -> int:
    """Layers of a tower, or the sum over its stages; 0 where its architecture has a name that says."""
    layers = side.get("layers", 0)
    return int(sum(layers) if isinstance(layers, list) else layers)


# ------------------------------------------------------------------------------- open_clip's models and tags


def _open_clip_tower(config: EncoderConfig, name: str) -> EncoderSource:
    model, _, tag = name.partition("/")
    model_config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if model_config is None:
        raise _unknown_model(config, model)
    tag_config = get_pretrained_cfg(model, tag) if tag else {}
    if tag and not tag_config:
        raise _unknown_tag(config, model, tag)
    if not tag and config.weights is None:
        tags = list_pretrained_tags_by_model(model)
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, an architecture without weights; write {model}/TAG with one of "
            f"{', '.join(tags) or 'no tags (it has none)'}, or set encoder.weights"
        )
    weights = None if config.weights is None else _absolute(config.weights)
    if weights is not None and not os.path.isfile(weights):
        raise ImbvlmError(f"encoder.weights is {config.weights!r}, and there is no such file")
    quick_gelu = _quick_gelu(config, model, tag, bool(tag_config.get("quick_gelu")), model_config)
    preprocess = _with_defaults(tag_config) if tag else _common_preprocess(config, model)
    return EncoderSource(config.name, model, tag or None, weights, model_config, preprocess, quick_gelu)


def _common_preprocess(config: EncoderConfig, model: str) -> dict[str, Any]:
    """The preprocessing that all published weights of an architecture share: a file of weights doesn't say its own."""
    tags = list_pretrained_tags_by_model(model)
    known = [_with_defaults(get_pretrained_cfg(model, tag)) for tag in tags] or [_with_defaults({})]
    if any(other != known[0] for other in known):
        raise ImbvlmError(
            f"encoder.name is {config.name!r} with weights of its own, and {model} is used with several means and "
            f"deviations; name the tag that the file stems from, {model}/TAG with one of {', '.join(tags)}"
        )
    return known[0]


def _quick_gelu(config: EncoderConfig, model: str, tag: str, by_tag: bool, model_config: Mapping[str, Any]) -> bool:
    """The activation of the weights; open_clip only warns when the model, the tag and the user disagree."""
    by_model, stated = model_config.get("quick_gelu"), config.quick_gelu
    if by_model and stated is False:
        raise ImbvlmError(
            f"encoder.quick_gelu is false and {model} has QuickGELU; "
            f"{_plain_model(model, config.weights is not None) or 'remove encoder.quick_gelu'}"
        )
    if by_model and tag and not by_tag and stated is None:
        raise ImbvlmError(
            f"{model} has QuickGELU, which open_clip's list doesn't give its weights {tag!r}; "
            f"{_plain_model(model, tag in list_pretrained_tags_by_model(model.removesuffix(SUFFIX)))}"
            "set encoder.quick_gelu: true if you know that they were trained with it"
        )
    if by_model:
        return True
    if tag and stated is not None and stated != by_tag:
        raise ImbvlmError(
            f"encoder.quick_gelu is {_yaml(stated)} and {model}/{tag} was trained {'with' if by_tag else 'without'} "
            f"QuickGELU; set it to {_yaml(by_tag)} or remove it"
        )
    if config.weights is not None and stated is None and needs_quick_gelu_stated(model_config):
        hint = f" ({model}/{tag} itself: {_yaml(by_tag)})" if tag else ""
        raise ImbvlmError(
            f"encoder.weights is {config.weights!r}, and a file doesn't say which activation it was trained with; set "
            f"encoder.quick_gelu to true or false{hint}"
        )
    return by_tag if stated is None else stated


def _plain_model(model: str, offered: bool) -> str:
    plain = model.removesuffix(SUFFIX)
    return f"use {plain}, or " if plain != model and offered else ""


def _unknown_model(config: EncoderConfig, model: str) -> ImbvlmError:
    if config.name.startswith("hf-hub:"):
        return ImbvlmError(
            f"encoder.name is {config.name!r}: download that repository and name its folder, {LOCAL_DIR}PATH"
        )
    valid = open_clip.list_models() if "/" in config.name else [*ENCODERS, *open_clip.list_models()]
    closest = suggest_name(model, valid)
    return ImbvlmError(
        f"encoder.name is {config.name!r}, and {model!r} is no model of open_clip; "
        f"{closest}{'' if closest.endswith('?') else '.'} "
        f"It is one of {', '.join(ENCODERS)}, or open_clip's MODEL/TAG, or {LOCAL_DIR}PATH"
    )


def _unknown_tag(config: EncoderConfig, model: str, tag: str) -> ImbvlmError:
    plain = model.removesuffix(SUFFIX)
    if plain != model and get_pretrained_cfg(plain, tag):
        return ImbvlmError(
            f"encoder.name is {config.name!r}, and {tag!r} was trained without QuickGELU; use {plain}/{tag}"
        )
    tags = list_pretrained_tags_by_model(model)
    if not tags:
        return ImbvlmError(
            f"encoder.name is {config.name!r}, and open_clip has no weights for {model}; give a file of yours as "
            f"encoder.weights with encoder.name: {model}"
        )
    return ImbvlmError(
        f"encoder.name is {config.name!r}, and {model} has no weights {tag!r}; {suggest_name(tag, tags)}"
    )


# ---------------------------------------------------------------------------------------------------- small


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _with_defaults(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, deviation, interpolation and resize mode as open_clip completes them."""
    defaults = PreprocessCfg()
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {key: preprocess.get(key) or getattr(defaults, key) for key in keys}


def _yaml(value: object) -> str:
    return "true" if value else "false"
