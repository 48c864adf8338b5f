"""The loss sections of a trial: each loss of LOSSES with its knobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from imbvlm.base.schema import Section

PriorCounts = Literal["sampled", "train"]


class SmoothedLoss(Section):
    """A loss that is a cross entropy, and so takes targets between classes."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that all classes have alike")


class CrossEntropyConfig(SmoothedLoss):
    name: Literal["cross_entropy"] = "cross_entropy"


class FocalConfig(Section):
    name: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0)


class InverseFrequencyConfig(SmoothedLoss):
    name: Literal["inverse_frequency"] = "inverse_frequency"


class EffectiveNumberConfig(SmoothedLoss):
    name: Literal["effective_number"] = "effective_number"
    beta: float = Field(0.9999, ge=0, lt=1)


class GeneralizedReweightConfig(SmoothedLoss):
    name: Literal["generalized_reweight"] = "generalized_reweight"
    exponent: float = Field(1.2, ge=0)


class BalancedSoftmaxConfig(SmoothedLoss):
    name: Literal["balanced_softmax"] = "balanced_softmax"
    prior: PriorCounts = Field(
        "sampled", description="sampled: the counts that class sampling really gives; train: the rows'"
    )


class LogitAdjustmentConfig(SmoothedLoss):
    name: Literal["logit_adjustment"] = "logit_adjustment"
    tau: float = 1.0
    prior: PriorCounts = "sampled"


class LdamConfig(Section):
    name: Literal["ldam"] = "ldam"
    max_margin: float = Field(0.5, gt=0)
    margin_scale: float | None = Field(None, gt=0, description="null: as the logits are scaled")
    reweight_from: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of training after which classes are weighted by effective number; null: never",
    )


class LadeConfig(Section):
    name: Literal["lade"] = "lade"
    remine_lambda: float = Field(0.1, ge=0)
    weight: float = Field(0.1, ge=0)
    prior: PriorCounts = "sampled"


# Every loss of LOSSES has its knobs here; a contract test keeps the two in step.
LossConfig = Annotated[
    CrossEntropyConfig
    | FocalConfig
    | InverseFrequencyConfig
    | EffectiveNumberConfig
    | GeneralizedReweightConfig
    | BalancedSoftmaxConfig
    | LogitAdjustmentConfig
    | LdamConfig
    | LadeConfig,
    Field(discriminator="name"),
]
