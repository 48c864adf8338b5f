"""Sections of the methods that train inside the tower: what is put into it, how its images vary, what saves memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from imbvlm.schema import Section


class AdapterConfig(Section):
    """AdaptFormer: a narrow branch beside the MLP of every block."""

    width: int | None = Field(
        None, ge=1, description="of the branch; null: 2^max(0, floor(log2(classes / (2 blocks)))), as LIFT has it"
    )


class LoraConfig(Section):
    """Low-rank updates of query, key, value and output in the attention of every block."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")


class FineTuningConfig(Section):
    """The whole image tower trains."""

    layer_decay: float = Field(
        0.75, gt=0, le=1, description="factor on the learning rate from each block to the one before it; 1: all alike"
    )


class AugmentationConfig(Section):
    """How training images vary from epoch to epoch."""

    crop: Literal["random_resized", "growing"] = Field(
        "random_resized",
        description="growing: LIFT+'s square, whose smallest share of the image grows to all of it over training",
    )
    min_scale: float = Field(0.08, gt=0, le=1, description="smallest share of the image's area that a crop has")
    flip: bool = Field(True, description="left and right are exchanged in every second crop")
    color_jitter: float = Field(
        0.0, ge=0, lt=1, description="brightness, contrast and saturation vary by this share up and down"
    )
    rand_ops: int = Field(0, ge=0, le=8, description="operations of RandAugment after the crop")
    rand_magnitude: int = Field(9, ge=0, le=30, description="of RandAugment's operations")


class MemoryConfig(Section):
    """What trades time for memory; numbers stay the same up to rounding."""

    accumulation: int = Field(
        1, ge=1, description="parts in which a worker computes its share of a batch, one after another"
    )
    gradient_checkpointing: bool = Field(False, description="compute each block's inside again on the way back")
