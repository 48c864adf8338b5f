"""Sections of a trial on how it trains: optimizer, length, augmentation, mixing, memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from imbvlm.base.schema import Section
from imbvlm.config.input_sections import Seed


class MixingConfig(Section):
    """Mixes the images of a batch and their labels. With both options set, each batch samples one of them."""

    mixup: float = Field(
        0.0,
        ge=0,
        description="alpha of Beta(alpha, alpha), the distribution of an image's own share in a mean of two; 0: off",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="alpha of Beta(alpha, alpha), the area that stays where a rectangle of another image is pasted in; "
        "0: off",
    )

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self.mixup > 0 or self.cutmix > 0


class FeatureAugmentationConfig(Section):
    """Varies stored features from step to step."""

    mixup: float = Field(0.0, ge=0, description="alpha of mixup of the encoder's outputs and their labels; 0: off")
    transfer: float = Field(
        0.0,
        ge=0,
        le=2,
        description="share of the variation within many-shot classes that images of other classes get; 0: off",
    )

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self.mixup > 0 or self.transfer > 0


# More than the CPUs of any machine. torch dies of SIGSEGV if the system can't start all threads.
MAX_THREADS = 1024


LearningRate = Annotated[float, Field(gt=0, description="highest learning rate of the schedule")]
WeightDecay = Annotated[float, Field(ge=0, description="weight decay of all trained parameters; 0: none")]


class _OptimBase(Section):
    lr: LearningRate
    weight_decay: WeightDecay = 5e-4
    warmup_fraction: float = Field(
        0.0625, ge=0, lt=1, description="share of the steps over which the learning rate rises linearly"
    )
    lr_schedule: Literal["cosine", "half_cosine", "epoch_half_cosine", "constant"] = Field(
        "cosine",
        description="how the rate falls from lr; cosine: rate x cos(pi x cycles x progress); half_cosine: "
        "rate x (1 + cos(pi x progress)) / 2; epoch_half_cosine: the same, updated as each epoch starts, as in LIFT",
    )
    cosine_cycles: float = Field(0.5, gt=0, le=0.5, description="cycles of lr_schedule cosine; the study has 7/16")
    first_epoch_lr: float | None = Field(
        None, gt=0, description="learning rate of the whole first epoch, in place of a warm-up"
    )

    @field_validator("first_epoch_lr")
    @classmethod
    def _one_warmup(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if rate is not None and info.data.get("warmup_fraction"):
            raise ValueError(
                f"optim.first_epoch_lr replaces a warm-up, got {rate} and a warm-up. Set it to null, or set "
                "optim.warmup_fraction to 0."
            )
        return rate

    @field_validator("cosine_cycles")
    @classmethod
    def _only_of_cosine(cls, cycles: float, info: ValidationInfo) -> float:
        schedule = info.data.get("lr_schedule", "cosine")
        if schedule != "cosine" and cycles != 0.5:
            raise ValueError(f"optim.cosine_cycles has no effect with lr_schedule {schedule}, got {cycles}. Remove it.")
        return cycles


class SgdConfig(_OptimBase):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    lr: LearningRate = 0.03
    momentum: float = Field(0.9, ge=0, lt=1, description="share of each update that is carried into the next")
    nesterov: bool = Field(True, description="Nesterov's momentum")


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(_OptimBase):
    """Adam with decoupled weight decay [Loshchilov and Hutter, ICLR 2019]."""

    name: Literal["adamw"] = "adamw"
    lr: LearningRate = 1e-3
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        (0.9, 0.999), description="decay rates of the running means of the gradient and of its square"
    )


OptimConfig = Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")]


class TrainConfig(Section):
    """Length, in either epochs or steps, and how each step computes."""

    num_epochs: int | None = Field(
        None,
        ge=1,
        description="passes over the training images, as class sampling deals them; 10 if num_steps is null too",
    )
    num_steps: int | None = Field(None, ge=1, description="optimizer steps, the study's unit")
    batch_size: int = Field(256, ge=1, description="images per step, over all workers of the trial")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 on GPUs that support it and, for decoders, on such CPUs; else float32",
    )
    clip_grad_norm: float | None = Field(1.0, gt=0, description="limit of the gradient's norm; null: no limit")
    compile: bool = Field(False, description="compile the model with torch.compile")
    num_threads: int | None = Field(
        None, ge=1, le=MAX_THREADS, description="CPU threads, which change rounding; null: the process's own"
    )
    seed: Seed = Field(0, description="seed of the initial weights and of the order of images")

    @field_validator("num_steps")
    @classmethod
    def _one_length(cls, num_steps: int | None, info: ValidationInfo) -> int | None:
        if num_steps is not None and info.data.get("num_epochs") is not None:
            raise ValueError("train must have either num_epochs or num_steps, got both. Remove one.")
        return num_steps


class AugmentationConfig(Section):
    """Varies training images from epoch to epoch."""

    crop: Literal["random_resized", "growing"] = Field(
        "random_resized",
        description="random_resized: crops of any shape; "
        "growing: LIFT+'s square, whose minimum share of the image grows to 1",
    )
    min_scale: float = Field(0.08, gt=0, le=1, description="minimum share of the image's area in a crop")
    flip: bool = Field(True, description="flip half of the crops horizontally")
    color_jitter: float = Field(
        0.0, ge=0, lt=1, description="brightness, contrast and saturation vary by up to this share"
    )
    rand_ops: int = Field(0, ge=0, le=8, description="RandAugment operations after the crop")
    rand_magnitude: int = Field(9, ge=0, le=30, description="magnitude of the RandAugment operations")


class MemoryConfig(Section):
    """Trades time for memory; results change by rounding only."""

    accumulation: int = Field(1, ge=1, description="micro-batches into which a worker splits its share of a batch")
    gradient_checkpointing: bool = Field(False, description="recompute each block's activations in the backward pass")
