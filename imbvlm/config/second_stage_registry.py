"""The second stages of a trial: what is put on its finished, frozen first stage, each with its knobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from imbvlm.base.schema import Section


class _TrainedStage(Section):
    """A stage of its own length and rate: SGD with momentum, no warm-up, half a cosine down."""

    num_epochs: int = Field(10, ge=1, description="after the first stage's; of the first stage's batch size")
    lr: float = Field(gt=0)
    weight_decay: float = Field(5e-4, ge=0)


class ClassifierRetrainingConfig(_TrainedStage):
    name: Literal["classifier_retraining"] = "classifier_retraining"
    # Class-balanced batches repeat the tail's few images: at 0.1 a fresh classifier learns them by heart.
    lr: float = Field(0.03, gt=0)


class LearnableWeightScalingConfig(_TrainedStage):
    name: Literal["learnable_weight_scaling"] = "learnable_weight_scaling"
    lr: float = Field(0.1, gt=0)
    # What is learned are factors around 1, not weights around 0.
    weight_decay: float = Field(0.0, ge=0)


class TauNormalizationConfig(Section):
    name: Literal["tau_normalization"] = "tau_normalization"
    tau: float | None = Field(
        None, ge=0, le=1, description="0 leaves the weights, 1 makes them units; null: chosen on validation"
    )


class DisAlignConfig(_TrainedStage):
    name: Literal["disalign"] = "disalign"
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    exponent: float = Field(1.2, ge=0, description="of generalized_reweight")


class MarcConfig(_TrainedStage):
    name: Literal["marc"] = "marc"
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    exponent: float = Field(1.2, ge=0, description="of generalized_reweight")


# Every stage of SECOND_STAGES has its knobs here; a contract test keeps the two in step.
SecondStageConfig = Annotated[
    ClassifierRetrainingConfig | LearnableWeightScalingConfig | TauNormalizationConfig | DisAlignConfig | MarcConfig,
    Field(discriminator="name"),
]

# They use the lengths of the classifier's weights, and a cosine classifier's mean nothing.
READ_NORMS = frozenset({"tau_normalization", "marc"})


def num_stage_epochs(config: Section | None) -> int:
    """Epochs that a second stage adds to a trial; choosing tau is one that only evaluates."""
    if config is None:
        return 0
    return config.num_epochs if isinstance(config, _TrainedStage) else 1
