"""open_clip's models and tags, and local folders: what a name means, and the QuickGELU that its weights need."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.config.input_sections import HF_HUB, LOCAL_DIR, TIMM, EncoderConfig
from imbvlm.models.encoders.encoder_source import EncoderSource, check_pixel_scale, read_origin
from imbvlm.models.encoders.hub_files import HubFile

CONFIG_FILE = "open_clip_config.json"
SUFFIX = "-quickgelu"
# Those of tags are open_clip's own choice, and are read as safetensors or as tensors without code.
SAFE_WEIGHTS, ANY_WEIGHTS = (HF_SAFE_WEIGHTS_NAME,), (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
# Every tokenizer has one of these, and OTHER_TOKENIZER_FILES as its kind needs.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
OTHER_TOKENIZER_FILES = (
    "tokenizer.json", "special_tokens_map.json", "config.json", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
# Far above any existing encoder; a larger one would fill memory before its weights are read.
_MAX_LAYERS = 1000
# timm takes other names for addresses of the hub, or for folders.
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def folder_source(config: EncoderConfig, folder: str, hub: HubFile | None = None) -> EncoderSource:
    """An open_clip model in a local folder, by the description that comes with it; raises ImbvlmError.

    `hub` is its file of weights where the folder is one of the hub's cache. There a description that doesn't name an
    activation means the plain one, as to open_clip.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        raise ImbvlmError(
            f"encoder.name is {config.name!r}: {path} is not there; the folder needs {CONFIG_FILE} and its weights."
        )
    try:
        data = storage.read_json(str(path))
        model_config, preprocess = data["model_cfg"], _with_defaults(data.get("preprocess_cfg", {}))
        check_pixel_scale(preprocess)
        model_config["embed_dim"]
        sides = ("vision_cfg", "text_cfg", *(["multimodal_cfg"] if "multimodal_cfg" in model_config else []))
        num_layers = max(_num_layers(model_config[side]) for side in sides)
        runs_code = "trust_remote_code" in (model_config["text_cfg"].get("tokenizer_kwargs") or {})
        timm_name = model_config["vision_cfg"].get("timm_model_name")
    except (storage.StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}: {path} is not a model's description "
            f"({type(error).__name__}: {error}); it needs model_cfg with embed_dim, vision_cfg and text_cfg."
        ) from None
    if num_layers > _MAX_LAYERS:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {path} asks for {num_layers:,} layers; at most {_MAX_LAYERS:,} can "
            "be built. Choose another encoder."
        )
    if runs_code:
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {path} sets trust_remote_code: its tokenizer would run code that "
            "comes with it; take that out."
        )
    if timm_name is not None and not (isinstance(timm_name, str) and _TIMM_NAME.fullmatch(timm_name)):
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, and {path} has timm_model_name {timm_name!r}; an encoder in a folder "
            "has the plain name of an architecture of timm, such as vit_base_patch16_224, and no path or hub name."
        )
    if config.weights is not None:
        raise ImbvlmError(
            f"encoder.weights is {config.weights!r}, which has no effect with {config.name!r}: the folder has its own "
            "weights; remove encoder.weights, or name open_clip's architecture instead of the folder."
        )
    described, stated = model_config.get("quick_gelu"), config.quick_gelu
    if described is not None and stated is not None and bool(described) != stated:
        raise ImbvlmError(
            f"encoder.quick_gelu is {_yaml(stated)} and {path} says {_yaml(described)}; remove encoder.quick_gelu, or "
            "correct the file if it is wrong."
        )
    if hub is None and described is None and stated is None and _needs_quick_gelu_stated(model_config):
        raise ImbvlmError(
            f"{path} doesn't say which activation its weights were trained with; set encoder.quick_gelu to true "
            "(OpenAI's and DFN's weights) or false (most others), or add quick_gelu to its model_cfg."
        )
    quick_gelu = bool(described) if described is not None else bool(stated)
    tokenizer = None if hub is None else _tokenizer(config, model_config)
    return EncoderSource(
        config.name, "open_clip", LOCAL_DIR + folder, None, hub, model_config, preprocess, quick_gelu,
        tokenizer, read_origin(data),
    )  # fmt: skip


def _num_layers(side: Mapping[str, Any]) -> int:
    """Layers of one side, or the sum over its stages; 0 where the name of its architecture says."""
    layers = side.get("layers", 0)
    return int(sum(layers) if isinstance(layers, list) else layers)


# ------------------------------------------------------------------------------- open_clip's models and tags


def tag_source(config: EncoderConfig, name: str, short_names: Collection[str]) -> EncoderSource:
    """One of open_clip's models by MODEL/TAG, or by MODEL with a file of weights.

    Raises ImbvlmError with the nearest name, also among `short_names`.
    """
    model, _, tag = name.partition("/")
    model_config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if model_config is None:
        raise _unknown_model(config, model, short_names)
    tag_config: Mapping[str, Any] = get_pretrained_cfg(model, tag) if tag else {}
    if tag and not tag_config:
        raise _unknown_tag(config, model, tag)
    if not tag and config.weights is None:
        tags = ", ".join(list_pretrained_tags_by_model(model))
        fix = f"write {model}/TAG with one of {tags}, or" if tags else "open_clip has none for it;"
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, an architecture without weights; {fix} set encoder.weights."
        )
    weights = config.absolute().weights
    if weights is not None and not os.path.isfile(weights):
        raise ImbvlmError(f"encoder.weights is {config.weights!r}, and there is no such file; give its path.")
    quick_gelu = _quick_gelu(config, model, tag, bool(tag_config.get("quick_gelu")), model_config)
    preprocess = _with_defaults(tag_config) if tag else _common_preprocess(config, model)
    repository, filename = os.path.split(tag_config.get("hf_hub", ""))
    names = (str(Path(filename).with_suffix(".safetensors")), filename) if filename else ANY_WEIGHTS
    hub = HubFile(repository, names) if repository else None
    tokenizer = _tokenizer(config, model_config)
    return EncoderSource(config.name, "open_clip", model, weights, hub, model_config, preprocess, quick_gelu, tokenizer)


def _tokenizer(config: EncoderConfig, model_config: Mapping[str, Any]) -> HubFile | None:
    """The file that every tokenizer of the hub has, None for open_clip's own; raises ImbvlmError for a path."""
    repository = model_config["text_cfg"].get("hf_tokenizer_name")
    if not repository:
        return None
    if not (isinstance(repository, str) and _REPOSITORY.fullmatch(repository)):
        raise ImbvlmError(
            f"encoder.name is {config.name!r}, whose description has hf_tokenizer_name {repository!r}, which is no "
            "repository of the hub; choose another encoder."
        )
    return HubFile(repository, TOKENIZER_FILES)


def _common_preprocess(config: EncoderConfig, model: str) -> dict[str, Any]:
    """The preprocessing that all published weights of an architecture share: a file of weights doesn't say its own."""
    tags = list_pretrained_tags_by_model(model)
    first, *others = [_with_defaults(get_pretrained_cfg(model, tag)) for tag in tags] or [_with_defaults({})]
    if any(other != first for other in others):
        raise ImbvlmError(
            f"encoder.name is {config.name!r} with weights of its own, and {model} is used with several means and "
            f"deviations; name the tag that the file stems from, {model}/TAG with one of {', '.join(tags)}."
        )
    return first


def _quick_gelu(config: EncoderConfig, model: str, tag: str, by_tag: bool, model_config: Mapping[str, Any]) -> bool:
    """The activation of the weights; open_clip only warns when the model, the tag and the user disagree."""
    by_model, stated = model_config.get("quick_gelu"), config.quick_gelu
    if by_model and stated is False:
        raise ImbvlmError(
            f"encoder.quick_gelu is false and {model} has QuickGELU; "
            f"{_plain_model(model, config.weights is not None) or 'remove encoder.quick_gelu'}."
        )
    if by_model and tag and not by_tag and stated is None:
        raise ImbvlmError(
            f"{model} has QuickGELU, which open_clip's list doesn't give its weights {tag!r}; "
            f"{_plain_model(model, tag in list_pretrained_tags_by_model(model.removesuffix(SUFFIX)))}"
            "set encoder.quick_gelu: true if you know that they were trained with it."
        )
    if by_model:
        return True
    if tag and stated is not None and stated != by_tag:
        raise ImbvlmError(
            f"encoder.quick_gelu is {_yaml(stated)} and {model}/{tag} was trained {'with' if by_tag else 'without'} "
            f"QuickGELU; set it to {_yaml(by_tag)} or remove it."
        )
    if config.weights is not None and stated is None and _needs_quick_gelu_stated(model_config):
        hint = f" ({model}/{tag} itself: {_yaml(by_tag)})" if tag else ""
        raise ImbvlmError(
            f"encoder.weights is {config.weights!r}, and a file doesn't say which activation it was trained with; set "
            f"encoder.quick_gelu to true or false{hint}."
        )
    return by_tag if stated is None else stated


def _plain_model(model: str, offered: bool) -> str:
    plain = model.removesuffix(SUFFIX)
    return f"use {plain}, or " if plain != model and offered else ""


def _unknown_model(config: EncoderConfig, model: str, short_names: Collection[str]) -> ImbvlmError:
    if timm.is_model(config.name.partition(".")[0]):
        return ImbvlmError(f"encoder.name is {config.name!r}, a model of timm; write {TIMM}{config.name}.")
    valid = open_clip.list_models() if "/" in config.name else [*short_names, *open_clip.list_models()]
    closest = suggest_name(model, valid)
    if "/" in config.name and not closest.endswith("?"):
        return ImbvlmError(
            f"encoder.name is {config.name!r}, and {model!r} is no model of open_clip; write {HF_HUB}{config.name} if "
            "that is a repository of the hub."
        )
    return ImbvlmError(
        f"encoder.name is {config.name!r}, and {model!r} is no model of open_clip; "
        f"{closest}{'' if closest.endswith('?') else '.'} "
        f"It is one of {', '.join(short_names)}, or open_clip's MODEL/TAG, or {TIMM}NAME, or "
        f"{HF_HUB}OWNER/REPO, or {LOCAL_DIR}PATH."
    )


def _unknown_tag(config: EncoderConfig, model: str, tag: str) -> ImbvlmError:
    plain = model.removesuffix(SUFFIX)
    if plain != model and get_pretrained_cfg(plain, tag):
        return ImbvlmError(
            f"encoder.name is {config.name!r}, and {tag!r} was trained without QuickGELU; use {plain}/{tag}."
        )
    tags = list_pretrained_tags_by_model(model)
    if not tags:
        return ImbvlmError(
            f"encoder.name is {config.name!r}, and open_clip has no weights for {model}; give a file of yours as "
            f"encoder.weights with encoder.name: {model}."
        )
    return ImbvlmError(
        f"encoder.name is {config.name!r}, and {model} has no weights {tag!r}; {suggest_name(tag, tags)}"
    )


# ---------------------------------------------------------------------------------------------------- small


def _needs_quick_gelu_stated(model_config: Mapping[str, Any]) -> bool:
    """Whether an architecture has the switch for its image tower: open_clip's own towers, not timm's."""
    return "timm_model_name" not in model_config.get("vision_cfg", {})


def _with_defaults(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, deviation, interpolation and resize mode as open_clip completes them."""
    defaults = PreprocessCfg()
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {key: preprocess.get(key) or getattr(defaults, key) for key in keys}


def _yaml(value: object) -> str:
    return "true" if value else "false"
