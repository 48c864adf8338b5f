"""Sections of a trial on its inputs: data, encoder, features, evaluation, prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from imbvlm.base.schema import ADDED_LATER, Section

# The range that both torch and numpy take.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MAX_IMAGE_SIZE = 2048

ClassSampling = Literal["instance_balanced", "square_root", "class_balanced", "progressively_balanced"]


class DataConfig(Section):
    """The images, the rows held out for validation, and how an epoch samples the others."""

    manifest: str = Field(description="path or s3:// URI of a manifest, or embedded:NAME")
    split_seed: Seed = Field(
        0, description="seed of the validation rows held out from training, where the data has none"
    )
    class_sampling: ClassSampling = Field("instance_balanced", description="how often an epoch shows each class")
    on_bad_image: Literal["quarantine", "strict"] = Field(
        "quarantine",
        description="quarantine: leave out and list files that can't be decoded; strict: stop at the first one",
    )
    max_bad_images: int | None = Field(
        None,
        ge=0,
        description="images of a split that can't be decoded, above which the run stops before training; "
        "null: no such limit",
    )
    max_bad_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a split's images that can't be decoded, above which the run stops before training",
    )


# Prefixes of encoder.name: a local folder, an image-only model of timm, and a repository of the Hugging Face hub.
LOCAL_DIR, TIMM, HF_HUB = "local-dir:", "timm:", "hf-hub:"


def absolute_path(path: str) -> str:
    """A path that holds in any working directory; `~` is the home folder."""
    return os.path.abspath(os.path.expanduser(path))


def absolute_encoder_name(name: str) -> str:
    """An encoder's name with an absolute path if it is a local folder's."""
    return LOCAL_DIR + absolute_path(name.removeprefix(LOCAL_DIR)) if name.startswith(LOCAL_DIR) else name


class EncoderConfig(Section):
    """The pretrained encoder.

    A name of ENCODERS, an open_clip MODEL/TAG, timm:NAME, hf-hub:OWNER/REPO[@REVISION], or local-dir:PATH.
    """

    name: str = Field(
        description="a short name such as openai_vit_b16, open_clip's MODEL/TAG, timm:NAME, "
        "hf-hub:OWNER/REPO[@REVISION], or local-dir:PATH"
    )
    image_size: int | None = Field(None, ge=8, le=MAX_IMAGE_SIZE, description="pixels a side; null: the encoder's own")
    weights: str | None = Field(None, description="path of a weights file that replaces the tag's download")
    quick_gelu: bool | None = Field(
        None, description="whether local weights were trained with QuickGELU; null: as their own config says"
    )
    token_pooling: Literal[1, 2] = Field(
        1, description="2: 2 x 2 neighboring tokens become their mean, a quarter to store; the class token stays"
    )

    def absolute(self) -> EncoderConfig:
        """The same encoder for a process with another working directory."""
        weights = None if self.weights is None else absolute_path(self.weights)
        return self.model_copy(update={"name": absolute_encoder_name(self.name), "weights": weights})


class FeaturesConfig(Section):
    """How the encoder's outputs are stored."""

    retired_keys: ClassVar[Mapping[str, str | None]] = {
        "tail_views": "is no longer an option: few-shot classes have as many views as others. Set "
        "features.num_views for all classes, or resume this sweep with version 0.1",
    }

    store: bool = Field(
        True,
        description="compute the frozen encoder's output once and read it in every trial; false: run the encoder on "
        "fresh crops in every epoch",
    )
    num_views: int = Field(
        1, ge=1, le=64, description="stored crops per training image; the first is the evaluation crop"
    )
    precision: Literal["float16", "float32"] = Field("float16", description="precision of stored outputs")
    int8_tokens: bool = Field(
        False, description="store tokens as bytes with a scale per channel and shard, half of float16's size"
    )
    computed_in: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="the encoder's compute dtype; auto: bfloat16 on GPUs, and for a ViT on a single machine whose CPU "
        "has AMX, where it is 3 times as fast; else float32",
    )

    compile: Annotated[bool | Literal["auto"], ADDED_LATER] = Field(
        "auto",
        description="compile the encoder with torch.compile before a pass; auto: on GPUs, for timm's transformers "
        "(SigLIP, PE, DINOv3) in passes that save more time than compiling takes",
    )

    @field_validator("computed_in", "compile")
    @classmethod
    def _only_of_stored(cls, value: bool | str, info: ValidationInfo) -> bool | str:
        if value != "auto" and not info.data.get("store", True):
            key, of_images = f"features.{info.field_name}", "compile" if info.field_name == "compile" else "precision"
            raise ValueError(
                f"{key} applies to stored features alone, got {value} with features.store false. "
                f"Set features.store: true, or {key}: auto. train.{of_images} applies to trials on images."
            )
        return value


class FeatureCacheConfig(Section):
    """Where each machine caches stored features, and how much of its disk the cache may take."""

    folder: str | None = Field(None, description="on each machine's own disk; null: imbvlm-features-UID in /tmp")
    max_gigabytes: float | None = Field(None, gt=0, description="limit on each machine; null: 80 % of that disk")
    of_shared_folders: bool | Literal["auto"] = Field(
        "auto",
        description="cache a file system that machines share, too; auto: only with several machines, on those with a "
        "disk for it. Object stores are always cached",
    )

    @field_validator("folder")
    @classmethod
    def _is_the_same_everywhere(cls, folder: str | None) -> str | None:
        if folder is not None and not folder.startswith(("/", "~")):
            raise ValueError(
                f"folder must be a path on each machine, got {folder!r}. Give a path that begins with / or ~."
            )
        return folder


class EvalConfig(Section):
    """How an image becomes the encoder's input without augmentation."""

    resize: float = Field(
        8 / 7, ge=1, le=2, description="shorter side before the center crop, as a multiple of the crop"
    )
    interpolation: Literal["bicubic", "bilinear"] | None = Field(
        None, description="filter that resizes images; null: the encoder's own"
    )
    jpeg_downscale: float | None = Field(
        None,
        ge=1,
        le=8,
        description="decodes large JPEGs at 1/2, 1/4 or 1/8 of their size if that leaves this multiple of the needed "
        "side: faster, and pixel values change by a few gray levels; null: exact",
    )
    tte: Literal["none", "five_crop"] = Field(
        "none",
        description="five_crop: also score test images by the mean logits of five crops, center and corners, at the "
        "cost of five passes; an exported model predicts with them",
    )
    expand: int = Field(
        24, ge=0, le=512, description="pixels by which an image's shorter side exceeds each of the five crops"
    )

    @field_validator("expand")
    @classmethod
    def _only_of_five_crops(cls, expand: int, info: ValidationInfo) -> int:
        if expand != 24 and info.data.get("tte") == "none":
            raise ValueError(f"eval.expand has no effect with eval.tte none, got {expand}. Set eval.tte: five_crop.")
        return expand


class PromptsConfig(Section):
    """Sentences whose averaged text features stand for a class."""

    templates: Literal["plain", "imagenet"] | Annotated[tuple[str, ...], Field(strict=False)] = Field(
        "plain", description="plain: 'a photo of a {}.'; imagenet: open_clip's 80; or your own, each with one {}"
    )
    texts: Annotated[str | None, ADDED_LATER] = Field(
        None,
        description="JSON file of sentences for classes, {class name: [sentences]} as CuPL's, in place of templates; "
        "other classes keep the templates",
    )
    add_templates: Annotated[bool, ADDED_LATER] = Field(
        False, description="average a class's texts together with the templates' sentences"
    )

    center_by_parent: Annotated[bool, ADDED_LATER] = Field(
        False,
        description="center class names' text features by those of their parent in the manifest's tree, rank by rank",
    )

    @field_validator("templates")
    @classmethod
    def _each_has_one_place(cls, templates: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if templates == ():
            raise ValueError("prompts.templates must have a sentence, got an empty list. Give one with {}.")
        wrong = [text for text in templates if text.count("{}") != 1] if isinstance(templates, tuple) else []
        if wrong:
            raise ValueError(f"a template must have exactly one {{}}, for the class name, got {wrong[0]!r}.")
        return templates

    @field_validator("add_templates")
    @classmethod
    def _adds_to_texts(cls, add_templates: bool, info: ValidationInfo) -> bool:
        if add_templates and info.data.get("texts") is None:
            raise ValueError("prompts.add_templates has no effect without prompts.texts, got true. Set prompts.texts.")
        return add_templates
