"""Sections of a trial on what it trains: decoder, classifier, parts of the encoder, prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from imbvlm.base.schema import ADDED_LATER, Section


class AdapterConfig(Section):
    """AdaptFormer: a narrow branch parallel to the MLP of every block."""

    width: int | None = Field(
        None, ge=1, description="width of the branch; null: LIFT's 2^max(0, floor(log2(classes / (2 blocks))))"
    )


class LoraConfig(Section):
    """Low-rank updates of query, key, value and output in the attention of every block."""

    rank: int = Field(8, ge=1, description="rank of each update")
    alpha: float = Field(16.0, gt=0, description="scales the update by alpha / rank")


class FineTuningConfig(Section):
    """The whole image tower trains."""

    layer_decay: float = Field(
        0.75, gt=0, le=1, description="factor on the learning rate from each block to the one before it; 1: one rate"
    )


class PromptTuningConfig(Section):
    """Learned context around the class names [CoOp]."""

    num_tokens: int | None = Field(
        None,
        ge=0,
        description="learned vectors; null: as many as init_words has, else 16 or a quarter of a shorter context",
    )
    position: Literal["end", "middle", "front"] = Field("end", description="position of the class name among them")
    per_class: bool = Field(False, description="learn separate context for each class")
    init_words: str | None = Field(
        None, description="words whose embeddings initialize the first vectors; null: random"
    )
    chunk_size: int = Field(256, ge=1, description="classes encoded at once; a smaller chunk needs less memory")


class DecoderConfig(Section):
    """The study's transformer decoder over all tokens."""

    depth: int = Field(3, ge=0, le=32, description="number of blocks; 0 keeps the (normalized) class token")
    num_heads: int = Field(4, ge=1, description="attention heads of each block, which must divide its width")
    mlp_ratio: float = Field(0.5, gt=0, description="hidden width of each block's MLP, as a multiple of its width")
    width: int | None = Field(None, ge=1, description="narrower width after a linear projection; null: the encoder's")
    input_norm: Literal["layer_norm", "none"] = Field(
        "layer_norm", description="normalization of the tokens; layer_norm: initialized from the encoder's final norm"
    )
    init: Literal["random", "identity"] = Field(
        "random", description="initial weights of the blocks; identity: they add nothing at first"
    )

    @field_validator("width")
    @classmethod
    def _heads_divide_it(cls, width: int | None, info: ValidationInfo) -> int | None:
        num_heads = info.data.get("num_heads")
        if width is not None and num_heads is not None and width % num_heads:
            raise ValueError(f"decoder.width must be a multiple of decoder.num_heads ({num_heads}), got {width}.")
        return width

    @field_validator("init")
    @classmethod
    def _identity_keeps_the_width(cls, init: str, info: ValidationInfo) -> str:
        if init == "identity" and info.data.get("width") is not None:
            raise ValueError("decoder.init: identity needs the encoder's width. Set decoder.width: null.")
        return init


class ClassMeansConfig(Section):
    """Cosine similarity to class means."""

    temperature: float = Field(0.04, gt=0, description="divides cosine similarities")
    center_by_parent: Annotated[bool, ADDED_LATER] = Field(
        False, description="center class means by those of their parent in the manifest's tree, rank by rank"
    )


class DiscriminantConfig(Section):
    """Linear discriminant analysis with one covariance for all classes."""

    shrinkage: float | None = Field(
        None,
        ge=0,
        le=1,
        description="0 keeps the covariance of the images, 1 makes it a multiple of the identity; null: selected on "
        "validation",
    )
    temperature: float | None = Field(
        None, gt=0, description="divides the log-likelihood ratios, which are too sure; null: fitted on validation"
    )


class PrototypeCacheConfig(Section):
    """Affinities to the prototypes of each class."""

    num_prototypes: int = Field(16, ge=1, le=16, description="limit of prototypes of a class")
    sharpness: float = Field(
        5.5, gt=0, description="how fast affinity falls with distance; larger: only the nearest prototypes count"
    )
    scale: float = Field(20.0, gt=0, description="factor on affinities, which are between 0 and 1")
    center_by_parent: Annotated[bool, ADDED_LATER] = Field(
        False, description="move each class's prototypes so that their mean is centered by its parent, rank by rank"
    )


ClassifierInit = Annotated[
    Literal["random", "text", "class_mean"],
    Field(
        description="initial weights: random, the class names' text embeddings, or the mean features of each class's "
        "training images"
    ),
]


class LinearClassifierConfig(Section):
    """Weights and bias."""

    kind: Literal["linear"] = "linear"
    init: ClassifierInit = "random"

    @property
    def logit_scale(self) -> float:
        """Factor on the logits that margins follow."""
        return 1.0


class CosineClassifierConfig(Section):
    """Cosine similarity divided by a temperature."""

    kind: Literal["cosine"] = "cosine"
    temperature: float = Field(0.04, gt=0, description="divides cosine similarities; 0.04 is LIFT's scale of 25")
    init: ClassifierInit = "random"

    @property
    def logit_scale(self) -> float:
        """Factor on cosine similarities."""
        return 1 / self.temperature


ClassifierConfig = Annotated[LinearClassifierConfig | CosineClassifierConfig, Field(discriminator="kind")]
