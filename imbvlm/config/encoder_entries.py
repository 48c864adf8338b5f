"""ENCODERS, the encoders with a short name: license, pretraining, and the benchmarks that it has seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imbvlm.base.errors import StorageError
from imbvlm.base.registry import Registry
from imbvlm.config.input_sections import HF_HUB, LOCAL_DIR, TIMM

Loader = Literal["open_clip", "timm"]
# Licenses as timm's tables and the model cards name them.
NON_COMMERCIAL = {"apple-amlr", "cc-by-nc-4.0"}
# Descriptions in folders that `Encoder.save` writes, with the key of their origin.
DESCRIPTIONS, ORIGIN_KEY = ("open_clip_config.json", "config.json"), "origin"
_IMAGENET = "ImageNet"
# timm's tags for training on ImageNet, or on a set that has its images.
_IMAGENET_TAG = re.compile(r"in(1k|12k|21k|22k)|lvd(142m|1689m)|imagenet")


@dataclass(frozen=True)
class EncoderEntry:
    """An encoder with a short name: its library, and there an architecture and the tag of its weights.

    Where `tag` is None, `model` names a repository of the hub behind HF_HUB, a folder behind LOCAL_DIR, or one of the
    package. `seen` has the part of the pretraining that contains images of a benchmark, by the benchmark.
    """

    model: str
    tag: str | None
    summary: str
    loader: Loader = "open_clip"
    license: str = ""
    pretraining: str = ""
    image_size: int | None = None
    seen: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The whole name that the short one stands for."""
        if self.tag is None:
            return self.model
        return f"{TIMM}{self.model}.{self.tag}" if self.loader == "timm" else f"{self.model}/{self.tag}"

    @property
    def is_non_commercial(self) -> bool:
        """Whether the license forbids commercial use."""
        return self.license in NON_COMMERCIAL

    @property
    def license_text(self) -> str:
        """The license, marked where it forbids commercial use; empty where it isn't known."""
        return f"{self.license} (non-commercial)" if self.is_non_commercial else self.license


def _openai(model: str, text: str, size: int = 224) -> EncoderEntry:
    return EncoderEntry(model, "openai", text, license="mit", pretraining="OpenAI's image-text pairs", image_size=size)


def _open_clip(
    model: str, tag: str, summary: str, license_id: str, pretraining: str, image_size: int = 224
) -> EncoderEntry:
    return EncoderEntry(model, tag, summary, "open_clip", license_id, pretraining, image_size)


def _siglip(model: str, summary: str, image_size: int = 224) -> EncoderEntry:
    return _open_clip(model, "webli", f"{summary}, no class token", "apache-2.0", "WebLI", image_size)


def _dino(model: str, tag: str, summary: str, license_id: str, size: int) -> EncoderEntry:
    data = f"{tag[:3].upper()}-{tag[3:].upper()}"
    seen = {"imagenet_lt": f"{data}, which has {_IMAGENET}'s training images"}
    return EncoderEntry(model, tag, summary, "timm", license_id, data, size, seen)


ENCODERS = Registry(
    "encoder",
    {
        "openai_rn50": _openai("RN50", "CLIP's ResNet-50, of the study"),
        "openai_rn101": _openai("RN101", "CLIP's ResNet-101, of the study"),
        "openai_vit_b32": _openai("ViT-B-32", "CLIP's ViT-B/32, of the study"),
        "openai_vit_b16": _openai("ViT-B-16", "CLIP's ViT-B/16, of the study"),
        "openai_vit_l14": _openai("ViT-L-14", "CLIP's ViT-L/14, of the study"),
        "openai_vit_l14_336": _openai("ViT-L-14-336", "CLIP's ViT-L/14 at 336 px", 336),
        "laion400m_vit_b16": _open_clip("ViT-B-16", "laion400m_e32", "ViT-B/16, of the study", "mit", "LAION-400M"),
        "laion400m_vit_l14": _open_clip("ViT-L-14", "laion400m_e32", "ViT-L/14, of the study", "mit", "LAION-400M"),
        "laion2b_vit_b16": _open_clip("ViT-B-16", "laion2b_s34b_b88k", "ViT-B/16, of the study", "mit", "LAION-2B"),
        "laion2b_vit_l14": _open_clip("ViT-L-14", "laion2b_s32b_b82k", "ViT-L/14, of the study", "mit", "LAION-2B"),
        "dfn2b_vit_b16": _open_clip("ViT-B-16", "dfn2b", "DFN's ViT-B/16", "apple-amlr", "DFN-2B"),
        "dfn2b_vit_l14": _open_clip("ViT-L-14", "dfn2b", "DFN's ViT-L/14", "apple-amlr", "DFN-2B"),
        "dfn5b_vit_h14": _open_clip("ViT-H-14", "dfn5b", "DFN's ViT-H/14", "apple-amlr", "DFN-5B"),
        "siglip_vit_b16": _siglip("ViT-B-16-SigLIP", "SigLIP's ViT-B/16"),
        "siglip_vit_l16_256": _siglip("ViT-L-16-SigLIP-256", "SigLIP's ViT-L/16", 256),
        "siglip2_vit_b16": _siglip("ViT-B-16-SigLIP2", "SigLIP 2's ViT-B/16"),
        "siglip2_vit_l16_256": _siglip("ViT-L-16-SigLIP2-256", "SigLIP 2's ViT-L/16", 256),
        "siglip2_vit_so400m": _siglip("ViT-SO400M-14-SigLIP2", "SigLIP 2's ViT-SO400M/14"),
        "pe_core_b16": _open_clip(
            "PE-Core-B-16", "meta", "Perception Encoder's ViT-B/16", "apache-2.0", "Meta's image-text pairs"
        ),
        "pe_core_l14_336": _open_clip(
            "PE-Core-L-14-336", "meta", "Perception Encoder's ViT-L/14", "apache-2.0", "Meta's image-text pairs", 336
        ),
        "metaclip_vit_b16": _open_clip(
            "ViT-B-16", "metaclip_fullcc", "MetaCLIP's ViT-B/16", "cc-by-nc-4.0", "MetaCLIP's 2.5 B pairs"
        ),
        "metaclip_vit_l14": _open_clip(
            "ViT-L-14", "metaclip_fullcc", "MetaCLIP's ViT-L/14", "cc-by-nc-4.0", "MetaCLIP's 2.5 B pairs"
        ),
        "mobileclip2_s2": _open_clip(
            "MobileCLIP2-S2", "dfndr2b", "MobileCLIP 2's FastViT, small", "apple-amlr", "DFNDR-2B", 256
        ),
        "mobileclip2_b": _open_clip("MobileCLIP2-B", "dfndr2b", "MobileCLIP 2's ViT-B/16", "apple-amlr", "DFNDR-2B"),
        "bioclip": EncoderEntry(
            f"{HF_HUB}imageomics/bioclip", None, "BioCLIP's ViT-B/16 for organisms", "open_clip", "mit",
            "TreeOfLife-10M", 224, {"inat2018": "TreeOfLife-10M, which has iNaturalist's images of 2021"},
        ),
        "bioclip2": EncoderEntry(
            f"{HF_HUB}imageomics/bioclip-2", None, "BioCLIP 2's ViT-L/14 for organisms", "open_clip", "mit",
            "TreeOfLife-200M", 224, {"inat2018": "TreeOfLife-200M, which has citizen science images as iNaturalist's"},
        ),
        "tinylit_lite0": EncoderEntry(
            "tinylit-lite0", None, "small, comes with the package: EfficientNet-Lite0", "open_clip", "apache-2.0",
            _IMAGENET, 128, {"imagenet_lt": _IMAGENET, "emoji_lt": "these pictures with their names"},
        ),
        "dinov2_vit_s14": _dino(
            "vit_small_patch14_dinov2", "lvd142m", "DINOv2's ViT-S/14, image-only", "apache-2.0", 518
        ),
        "dinov2_vit_b14": _dino(
            "vit_base_patch14_dinov2", "lvd142m", "DINOv2's ViT-B/14, image-only", "apache-2.0", 518
        ),
        "dinov3_vit_b16": _dino(
            "vit_base_patch16_dinov3", "lvd1689m", "DINOv3's ViT-B/16, image-only", "dinov3-license", 256
        ),
        "dinov3_vit_l16": _dino(
            "vit_large_patch16_dinov3", "lvd1689m", "DINOv3's ViT-L/16, image-only", "dinov3-license", 256
        ),
    },
)  # fmt: skip


def find_entry(name: str) -> EncoderEntry | None:
    """The entry of an encoder by any of its names, a revision or a fetched folder too; None where nothing is known."""
    if name.startswith(LOCAL_DIR):
        origin = _origin(Path(name.removeprefix(LOCAL_DIR)))
        return None if origin is None or origin.startswith(LOCAL_DIR) else find_entry(origin)
    whole = name.partition("@")[0] if name.startswith(HF_HUB) else name
    entry = ENCODERS.get(name) or next((entry for entry in ENCODERS.values() if entry.name == whole), None)
    model, _, tag = name.removeprefix(TIMM).partition(".")
    if entry is None and name.startswith(TIMM) and _IMAGENET_TAG.search(tag):
        data = f"{tag}, which has {_IMAGENET}'s training images"
        return EncoderEntry(model, tag, "", "timm", pretraining=tag, seen={"imagenet_lt": data})
    return entry


def published_name(name: str) -> str:
    """An encoder's name on a machine without plug-ins: the whole one where a plug-in has given it a short one."""
    entry = ENCODERS.get(name)
    return name if entry is None or name in ENCODERS.own else entry.name


def score_notes(names: Iterable[str], benchmark: str) -> list[str]:
    """Sentences that belong beside scores: encoders that have seen the data, and those not for commercial use."""
    notes = []
    for name in dict.fromkeys(names):
        entry = find_entry(name)
        if entry is not None and benchmark in entry.seen:
            notes.append(
                f"{name} was pretrained on {entry.seen[benchmark]}: its scores on {benchmark} are too high to compare."
            )
        if entry is not None and entry.is_non_commercial:
            notes.append(f"{name} is licensed for non-commercial use only ({entry.license}).")
    return notes


@dataclass(frozen=True)
class EncoderTerms:
    """Licenses of some encoders, as far as they are known, and the notes that belong beside their scores."""

    license: str
    notes: list[str]


def encoder_terms(names: Iterable[str], benchmark: str) -> EncoderTerms:
    """The terms of the encoders of these names, with scores on a benchmark."""
    names = list(dict.fromkeys(names))
    licenses = (entry.license for name in names if (entry := find_entry(name)) is not None)
    return EncoderTerms(", ".join(dict.fromkeys(filter(None, licenses))), score_notes(names, benchmark))


def _origin(folder: Path) -> str | None:
    # Imported here because it brings pyarrow, which configurations start without.
    from imbvlm.base import storage

    for name in DESCRIPTIONS:
        with suppress(StorageError, ValueError, LookupError, TypeError):
            origin = storage.read_json(str(folder / name))[ORIGIN_KEY]["name"]
            if isinstance(origin, str):
                return origin
    return None
