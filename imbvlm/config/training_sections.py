"""Sections of a trial that say how it trains: optimizer, length, augmentation, mixing, memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from imbvlm.base.schema import Section
from imbvlm.config.input_sections import Seed


class MixingConfig(Section):
    """Images of a batch mixed with others of it, and their labels likewise; with both, each batch draws one of them."""

    mixup: float = Field(
        0.0,
        ge=0,
        description="alpha of Beta(alpha, alpha), from which a batch draws its share of the own image; 0: off",
    )
    cutmix: float = Field(0.0, ge=0, description="the same for a rectangle of another image pasted in; 0: off")

    @property
    def is_on(self) -> bool:
        """Whether anything is mixed at all."""
        return self.mixup > 0 or self.cutmix > 0


class FeatureAugmentationConfig(Section):
    """Stored features that vary from step to step."""

    mixup: float = Field(0.0, ge=0, description="alpha of mixup of the tower's outputs and their labels; 0: off")
    transfer: float = Field(
        0.0,
        ge=0,
        le=2,
        description="how much of the variation within many-shot classes is added to images of all others; 0: off",
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is changed at all."""
        return self.mixup > 0 or self.transfer > 0


# Above the CPUs of any machine. torch ends by SIGSEGV where the system can't start as many threads as it is told.
MAX_THREADS = 1024


class _OptimBase(Section):
    lr: float = Field(gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    warmup_fraction: float = Field(
        0.0625, ge=0, lt=1, description="share of the steps over which the rate rises linearly"
    )
    lr_schedule: Literal["cosine", "half_cosine", "epoch_half_cosine", "constant"] = Field(
        "cosine",
        description="cosine: rate x cos(pi x cycles x progress); half_cosine: rate x (1 + cos(pi x progress)) / 2; "
        "epoch_half_cosine: the same, changed at the start of an epoch only, as LIFT does",
    )
    cosine_cycles: float = Field(0.5, gt=0, le=0.5, description="cycles of lr_schedule cosine; 7/16 is the study's")
    first_epoch_lr: float | None = Field(
        None, gt=0, description="rate of the whole first epoch in place of a warm-up; the schedule follows"
    )

    @field_validator("first_epoch_lr")
    @classmethod
    def _one_warmup(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if rate is not None and info.data.get("warmup_fraction"):
            raise ValueError(
                "optim.first_epoch_lr stands in place of a warm-up; set it to null, or optim.warmup_fraction to 0"
            )
        return rate

    @field_validator("cosine_cycles")
    @classmethod
    def _only_of_cosine(cls, cycles: float, info: ValidationInfo) -> float:
        schedule = info.data.get("lr_schedule", "cosine")
        if schedule != "cosine" and cycles != 0.5:
            raise ValueError(f"optim.cosine_cycles has no effect with lr_schedule {schedule}; take it out")
        return cycles


class SgdConfig(_OptimBase):
    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.03, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(_OptimBase):
    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)


OptimConfig = Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")]


class TrainConfig(Section):
    """How long and how large: exactly one of num_epochs and num_steps."""

    num_epochs: int | None = Field(
        None, ge=1, description="passes over the epoch plan; 10 where num_steps is not given either"
    )
    num_steps: int | None = Field(None, ge=1, description="optimiser steps, as the study counts")
    batch_size: int = Field(256, ge=1, description="global: over all workers of the trial")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 on GPUs that have it and, for decoders, on CPUs that have it; else float32",
    )
    clip_grad_norm: float | None = Field(1.0, gt=0)
    compile: bool = Field(False, description="run the model through torch.compile")
    num_threads: int | None = Field(
        None, ge=1, le=MAX_THREADS, description="CPU threads; null: the process's own. Numbers depend on it"
    )
    seed: Seed = Field(0, description="of initial weights and of the epoch plan")

    @field_validator("num_steps")
    @classmethod
    def _one_length(cls, num_steps: int | None, info: ValidationInfo) -> int | None:
        if num_steps is not None and info.data.get("num_epochs") is not None:
            raise ValueError("train.num_epochs and train.num_steps are both given; keep exactly one")
        return num_steps


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
