"""The losses of a trial: each with its options, its function and what training must know of it. LOSSES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from imbvlm.base.registry import Lazy, Registry
from imbvlm.base.schema import Section

Prior = Annotated[
    Literal["sampled", "train"],
    Field(description="sampled: the class counts that class sampling gives; train: those of the training rows"),
]


class LossSection(Section):
    """The options of one loss; `name` is its key in LOSSES.

    Its function takes every option as a keyword, except two that the training loop reads: `prior`, the class counts of
    a loss that corrects for the class prior, and `reweight_from`, after which the function gets weights (C,) as
    `reweight`.
    """

    if TYPE_CHECKING:
        name: str

    def options(self) -> dict[str, Any]:
        """Keyword options of the loss's function."""
        return self.model_dump(exclude={"name", "prior", "reweight_from"})

    def resolve(self, logit_scale: float) -> LossSection:
        """The same loss with its null options set; `logit_scale` is the classifier's factor on cosine similarities."""
        return self

    def simplify(self) -> LossSection:
        """The simplest loss that trains the same."""
        return self


class SmoothedLoss(LossSection):
    """A cross entropy, which also takes targets between classes."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that goes to all classes alike")


class CrossEntropyConfig(SmoothedLoss):
    name: Literal["cross_entropy"] = "cross_entropy"


class FocalConfig(LossSection):
    name: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0, description="exponent of an image's weight 1 - p; 0: cross_entropy")

    def simplify(self) -> LossSection:
        return self if self.gamma else CrossEntropyConfig()


class InverseFrequencyConfig(SmoothedLoss):
    name: Literal["inverse_frequency"] = "inverse_frequency"


class EffectiveNumberConfig(SmoothedLoss):
    name: Literal["effective_number"] = "effective_number"
    beta: float = Field(
        0.9999, ge=0, lt=1, description="a class of n images has weight (1 - beta) / (1 - beta^n); 0: cross_entropy"
    )

    def simplify(self) -> LossSection:
        return self if self.beta else CrossEntropyConfig(label_smoothing=self.label_smoothing)


class GeneralizedReweightConfig(SmoothedLoss):
    name: Literal["generalized_reweight"] = "generalized_reweight"
    exponent: float = Field(
        1.2, ge=0, description="a class of n images has weight n^-exponent; 0: cross_entropy, 1: inverse_frequency"
    )

    def simplify(self) -> LossSection:
        if self.exponent == 0:
            return CrossEntropyConfig(label_smoothing=self.label_smoothing)
        return InverseFrequencyConfig(label_smoothing=self.label_smoothing) if self.exponent == 1 else self


class BalancedSoftmaxConfig(SmoothedLoss):
    name: Literal["balanced_softmax"] = "balanced_softmax"
    prior: Prior = "sampled"


class LogitAdjustmentConfig(SmoothedLoss):
    name: Literal["logit_adjustment"] = "logit_adjustment"
    tau: float = Field(
        1.0, description="factor on the logarithm of the class prior; 0: cross_entropy, 1: balanced_softmax"
    )
    prior: Prior = "sampled"

    def simplify(self) -> LossSection:
        if self.tau == 0:
            return CrossEntropyConfig(label_smoothing=self.label_smoothing)
        is_balanced = self.tau == 1
        return BalancedSoftmaxConfig(label_smoothing=self.label_smoothing, prior=self.prior) if is_balanced else self


class LdamConfig(LossSection):
    name: Literal["ldam"] = "ldam"
    max_margin: float = Field(
        0.5, gt=0, description="margin of the smallest class; others have less, in proportion to n^-1/4 for n images"
    )
    margin_scale: float | None = Field(
        None, gt=0, description="factor on the margins; null: the scale of the classifier's logits"
    )
    reweight_from: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of training after which classes are weighted by effective number; null: never",
    )

    def resolve(self, logit_scale: float) -> LossSection:
        return self.model_copy(update={"margin_scale": logit_scale}) if self.margin_scale is None else self


class LadeConfig(LossSection):
    name: Literal["lade"] = "lade"
    remine_lambda: float = Field(0.1, ge=0, description="strength of the estimate's own regularization")
    weight: float = Field(0.1, ge=0, description="factor on the estimate that is added; 0: balanced_softmax")
    prior: Prior = "sampled"

    def simplify(self) -> LossSection:
        return self if self.weight else BalancedSoftmaxConfig(prior=self.prior)


@dataclass(frozen=True)
class Loss:
    """One loss: its options, its function, and what training must know of it.

    `function(logits (B, C), targets, class_counts (C,), *, workers, **options)` gives a scalar. `needs_all_logits`:
    its sums over workers depend on logits, not on targets alone. `adjustment_tau`: the tau at which logit_adjustment
    is the same loss, so that a pack computes both at once. `is_mappable`: options may be tensors and the function may
    run under `torch.func.vmap`, so that a pack computes the losses of several trials at once.
    """

    config: type[LossSection]
    function: Callable[..., Any]
    summary: str
    paper: str
    needs_all_logits: bool = False
    adjustment_tau: float | None = None
    is_mappable: bool = False

    @property
    def takes_soft_targets(self) -> bool:
        """Whether targets may be shares of the classes (B, C)."""
        return issubclass(self.config, SmoothedLoss)


LOSSES = Registry(
    "loss",
    {
        "cross_entropy": Loss(
            CrossEntropyConfig,
            Lazy("imbvlm.longtail.losses:cross_entropy"),
            summary="Softmax cross entropy, every image alike.",
            paper="Szegedy et al., CVPR 2016 (label smoothing)",
            is_mappable=True,
            adjustment_tau=0.0,
        ),
        "focal": Loss(
            FocalConfig,
            Lazy("imbvlm.longtail.losses:focal"),
            summary="Gives easy examples less weight.",
            paper="Lin et al., ICCV 2017",
            is_mappable=True,
        ),
        "inverse_frequency": Loss(
            InverseFrequencyConfig,
            Lazy("imbvlm.longtail.losses:inverse_frequency"),
            summary="Weights each class by the inverse of its number of images.",
            paper="Wang et al., IJCV 2023",
            is_mappable=True,
        ),
        "effective_number": Loss(
            EffectiveNumberConfig,
            Lazy("imbvlm.longtail.losses:effective_number"),
            summary="Weights each class by the inverse of its effective number of images.",
            paper="Cui et al., CVPR 2019",
            is_mappable=True,
        ),
        "generalized_reweight": Loss(
            GeneralizedReweightConfig,
            Lazy("imbvlm.longtail.losses:generalized_reweight"),
            summary="Weights each class by a power of its number of images.",
            paper="Zhang et al., CVPR 2021",
            is_mappable=True,
        ),
        "balanced_softmax": Loss(
            BalancedSoftmaxConfig,
            Lazy("imbvlm.longtail.losses:balanced_softmax"),
            summary="Adds the logarithm of the class prior to the logits.",
            paper="Ren et al., NeurIPS 2020",
            is_mappable=True,
            adjustment_tau=1.0,
        ),
        "logit_adjustment": Loss(
            LogitAdjustmentConfig,
            Lazy("imbvlm.longtail.losses:logit_adjustment"),
            summary="Adds tau times the logarithm of the class prior to the logits.",
            paper="Menon et al., ICLR 2021",
            is_mappable=True,
        ),
        "ldam": Loss(
            LdamConfig,
            Lazy("imbvlm.longtail.losses:ldam"),
            summary="Demands a larger margin of rarer classes.",
            paper="Cao et al., NeurIPS 2019",
            is_mappable=True,
        ),
        "lade": Loss(
            LadeConfig,
            Lazy("imbvlm.longtail.losses:lade"),
            summary="Adds to balanced_softmax a regularized estimate of the prior in the logits.",
            paper="Hong et al., CVPR 2021",
            is_mappable=True,
            needs_all_logits=True,
        ),
    },
)

if TYPE_CHECKING:
    LossConfig = LossSection
else:
    LossConfig = LOSSES.union(is_own=True)
