"""Sections of a trial that say what it reads: data, encoder, features, evaluation, prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from imbvlm.base.schema import Section

# Seeds go to torch and numpy alike.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MAX_IMAGE_SIZE = 2048

ClassSampling = Literal["instance_balanced", "square_root", "class_balanced", "progressively_balanced"]


class DataConfig(Section):
    """Which images, which rows of them are validation, and how an epoch draws from them."""

    manifest: str = Field(description="path or s3:// URI of a manifest, or embedded:NAME")
    split_seed: Seed = Field(0, description="of the validation rows carved from training, where the data has none")
    class_sampling: ClassSampling = Field("instance_balanced", description="how often an epoch draws each class")
    on_bad_image: Literal["quarantine", "strict"] = Field(
        "quarantine",
        description="quarantine: leave out and list files that can't be decoded; strict: stop at the first",
    )
    max_bad_images: int | None = Field(
        None, ge=0, description="more in a split stop the run before training; null: only the share counts"
    )
    max_bad_share: float = Field(0.5, ge=0, le=1, description="a larger share of a split stops the run, too")


class EncoderConfig(Section):
    """The frozen image tower: a name of ENCODERS, open_clip's model/tag, or local-dir:PATH."""

    name: str
    image_size: int | None = Field(None, ge=8, le=MAX_IMAGE_SIZE, description="pixels a side; null: the tower's own")
    weights: str | None = Field(None, description="path of a weights file to load instead of the tag's download")
    quick_gelu: bool | None = Field(
        None, description="what local weights were trained with; null: what their own config says"
    )
    token_pooling: Literal[1, 2] = Field(
        1, description="2: each 2 x 2 neighbouring tokens become their mean, the class token stays; a quarter to store"
    )


class FeaturesConfig(Section):
    """How the tower's outputs are kept."""

    store: bool = Field(
        True,
        description="compute the frozen tower's output once and read it in every trial; false: run the tower on fresh "
        "crops in every epoch",
    )
    num_views: int = Field(
        1, ge=1, le=64, description="stored crops per training image; the first is the evaluation crop"
    )
    tail_views: int | None = Field(
        None,
        ge=2,
        le=64,
        description="stored crops of a few-shot class's training image, more than num_views; null: as many as others",
    )
    precision: Literal["float16", "float32"] = "float16"
    int8_tokens: bool = Field(
        False, description="tokens are stored as bytes with a scale per channel and shard; half of float16's size"
    )
    computed_in: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="what the tower computes in; auto: bfloat16 on GPUs, and of a ViT on a single machine whose CPU "
        "has AMX, where it is 3 times as fast; else float32",
    )

    @field_validator("computed_in")
    @classmethod
    def _only_of_stored(cls, computed_in: str, info: ValidationInfo) -> str:
        if computed_in != "auto" and not info.data.get("store", True):
            raise ValueError(
                f"features.computed_in {computed_in} is of stored features; set features.store: true, or "
                "features.computed_in: auto (train.precision is what trials compute in that read images)"
            )
        return computed_in

    @field_validator("tail_views")
    @classmethod
    def _more_than_others(cls, tail_views: int | None, info: ValidationInfo) -> int | None:
        num_views = info.data.get("num_views", 1)
        if tail_views is not None and tail_views <= num_views:
            raise ValueError(
                f"features.tail_views must be more than features.num_views, which is {num_views}, and is {tail_views}; "
                "raise it, or set it to null"
            )
        return tail_views


class EvalConfig(Section):
    """How an image becomes a tower's input when it isn't augmented."""

    resize: float = Field(
        8 / 7, ge=1, le=2, description="shorter side before the centre crop, as a multiple of the crop"
    )
    interpolation: Literal["bicubic", "bilinear"] | None = Field(None, description="null: the tower's own")
    jpeg_downscale: float | None = Field(
        None,
        ge=1,
        le=8,
        description="large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, if that leaves this multiple of the "
        "side that is needed: faster, and off by a few grey levels; null: exact",
    )
    tte: Literal["none", "five_crop"] = Field(
        "none",
        description="five_crop: test images are also scored by the mean logits of five crops, centre and corners, "
        "which costs five times a pass, and an exported model predicts by them",
    )
    expand: int = Field(
        24, ge=0, le=512, description="pixels that an image's shorter side is larger than one of the five crops"
    )

    @field_validator("expand")
    @classmethod
    def _only_of_five_crops(cls, expand: int, info: ValidationInfo) -> int:
        if expand != 24 and info.data.get("tte") == "none":
            raise ValueError("eval.expand has no effect with eval.tte none; set eval.tte: five_crop, or take it out")
        return expand


class PromptsConfig(Section):
    """Sentences that turn a class name into text features; several are averaged."""

    templates: Literal["plain", "imagenet"] | Annotated[tuple[str, ...], Field(strict=False)] = Field(
        "plain", description="plain: 'a photo of a {}.'; imagenet: open_clip's 80; or your own, each with one {}"
    )

    @field_validator("templates")
    @classmethod
    def _each_has_one_place(cls, templates: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if templates == ():
            raise ValueError("prompts.templates is an empty list; give at least one sentence with {}")
        wrong = [one for one in templates if one.count("{}") != 1] if isinstance(templates, tuple) else []
        if wrong:
            raise ValueError(f"template {wrong[0]!r} must have exactly one {{}} for the class name")
        return templates
