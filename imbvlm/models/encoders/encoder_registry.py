"""ENCODERS, the encoders with a short name, and what any name means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import DEFAULT_REVISION

from imbvlm.assets import encoder_path
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.registry import Registry
from imbvlm.config.input_sections import HF_HUB, LOCAL_DIR, TIMM, EncoderConfig, absolute_encoder_name
from imbvlm.models.encoders.encoder_source import EncoderSource, Loader
from imbvlm.models.encoders.hub_files import HubFile
from imbvlm.models.encoders.open_clip_names import CONFIG_FILE, SAFE_WEIGHTS, folder_source, tag_source
from imbvlm.models.encoders.timm_names import TIMM_CONFIG_FILE, TIMM_WEIGHTS_FILE, timm_folder_source, timm_source

# OWNER/REPO[@REVISION]; a revision is a branch, a tag or a commit.
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*))?")


@dataclass(frozen=True)
class EncoderEntry:
    """An encoder with a short name: its library, and there an architecture and the tag of its weights.

    `model` names a folder of the package where `tag` is None.
    """

    model: str
    tag: str | None
    summary: str
    loader: Loader = "open_clip"


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
        "tinylit_lite0": EncoderEntry("tinylit-lite0", None, "small, comes with the package: EfficientNet-Lite0"),
        "dinov2_vit_s14": EncoderEntry(
            "vit_small_patch14_dinov2", "lvd142m", "DINOv2's ViT-S/14 at 518 px, image-only", "timm"
        ),
    },
)


def has_text(config: EncoderConfig) -> bool:
    """Whether an encoder embeds texts too; reads or fetches its description at most. Raises ImbvlmError."""
    return resolve_encoder(config).loader == "open_clip"


def resolve_encoder(config: EncoderConfig) -> EncoderSource:
    """What `encoder.name` means; reads small files only, or fetches them from the hub.

    Raises ImbvlmError with the nearest name or the fix.
    """
    name, entry = absolute_encoder_name(config.name), ENCODERS.get(config.name)
    if entry is not None and entry.tag is None:
        return folder_source(config, str(encoder_path(entry.model)))
    if entry is not None:
        name = f"{TIMM}{entry.model}.{entry.tag}" if entry.loader == "timm" else f"{entry.model}/{entry.tag}"
    if name.startswith(LOCAL_DIR):
        folder = Path(name.removeprefix(LOCAL_DIR))
        is_timm = (folder / TIMM_CONFIG_FILE).exists() and not (folder / CONFIG_FILE).exists()
        return (timm_folder_source if is_timm else folder_source)(config, str(folder))
    if name.startswith(HF_HUB):
        return _hub_source(config, name.removeprefix(HF_HUB))
    if name.startswith(TIMM):
        return timm_source(config, name.removeprefix(TIMM))
    return tag_source(config, name, ENCODERS)


def _hub_source(config: EncoderConfig, name: str) -> EncoderSource:
    """The model of a repository on the hub, whose description is fetched unless cached; raises ImbvlmError."""
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise ImbvlmError(
            f"encoder.name must be {HF_HUB}OWNER/REPO or {HF_HUB}OWNER/REPO@REVISION, got {config.name!r}. Name a "
            "repository of the hub and a branch, a tag or a commit."
        )
    repository, revision = match[1], match[2] or DEFAULT_REVISION
    # Repositories of open_clip may have a description for timm or transformers, too.
    description = Path(HubFile(repository, (CONFIG_FILE, TIMM_CONFIG_FILE), revision).fetch(config.name))
    is_timm, commit = description.name == TIMM_CONFIG_FILE, description.parent.name
    weights = HubFile(repository, (TIMM_WEIGHTS_FILE,) if is_timm else SAFE_WEIGHTS, commit)
    return (timm_folder_source if is_timm else folder_source)(config, str(description.parent), weights)
