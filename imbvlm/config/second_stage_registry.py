"""The second stages of a trial: each with its options, its modules and how its paper trains it. SECOND_STAGES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from imbvlm.base.registry import Lazy, Registry
from imbvlm.base.schema import Section
from imbvlm.config.input_sections import ClassSampling
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.training_sections import LearningRate, WeightDecay


class StageSection(Section):
    """The options of one second stage; `name` is its key in SECOND_STAGES."""

    if TYPE_CHECKING:
        name: str


class TrainedStage(StageSection):
    """A stage with its own length and learning rate: SGD with momentum, no warm-up, half a cosine down."""

    num_epochs: int = Field(10, ge=1, description="epochs after those of the first stage, with its batch size")
    lr: LearningRate
    weight_decay: WeightDecay = 5e-4


class ClassifierRetrainingConfig(TrainedStage):
    name: Literal["classifier_retraining"] = "classifier_retraining"
    # Class-balanced batches repeat the few images of the tail: at 0.1 a fresh classifier memorizes them.
    lr: LearningRate = 0.03


class LearnableWeightScalingConfig(TrainedStage):
    name: Literal["learnable_weight_scaling"] = "learnable_weight_scaling"
    lr: LearningRate = 0.1
    # It learns factors around 1, not weights around 0.
    weight_decay: WeightDecay = 0.0


class TauNormalizationConfig(StageSection):
    name: Literal["tau_normalization"] = "tau_normalization"
    tau: float | None = Field(
        None,
        ge=0,
        le=1,
        description="power of their length by which weights are divided: 0 keeps them, 1 gives them length 1; "
        "null: selected on validation",
    )


class DisAlignConfig(TrainedStage):
    name: Literal["disalign"] = "disalign"
    lr: LearningRate = 0.1
    weight_decay: WeightDecay = 0.0
    exponent: float = Field(1.2, ge=0, description="exponent of the loss generalized_reweight")


class MarcConfig(TrainedStage):
    name: Literal["marc"] = "marc"
    lr: LearningRate = 0.1
    weight_decay: WeightDecay = 0.0
    exponent: float = Field(1.2, ge=0, description="exponent of the loss generalized_reweight")


@dataclass(frozen=True)
class SecondStage:
    """One second stage: its options, and how it changes the frozen first stage's classifier.

    A stage that trains has `build(classifier) -> nn.Module`, `class_sampling` and the name of its `loss`. Another has
    `select(classifier, features (N, D), targets (N,), config) -> (module, metrics)` on validation rows. Validation
    selects the options `selected` where they are null; `select` reports each as the metric `second_stage/OPTION`.
    """

    config: type[StageSection]
    summary: str
    paper: str
    build: Callable[..., Any] | None = None
    class_sampling: ClassSampling | None = None
    loss: str | None = None
    select: Callable[..., Any] | None = None
    selected: tuple[str, ...] = ()
    reads_weight_norms: bool = False


SECOND_STAGES = Registry(
    "second stage",
    {
        "classifier_retraining": SecondStage(
            ClassifierRetrainingConfig,
            summary="Trains a fresh classifier on the frozen decoder (cRT).",
            paper="Kang et al., ICLR 2020",
            build=Lazy("imbvlm.models.second_stage_modules:fresh_classifier"),
            class_sampling="class_balanced",
            loss="cross_entropy",
        ),
        "learnable_weight_scaling": SecondStage(
            LearnableWeightScalingConfig,
            summary="Learns a factor on each class's logit (LWS).",
            paper="Kang et al., ICLR 2020",
            build=Lazy("imbvlm.models.second_stage_modules:LearnableWeightScaling"),
            class_sampling="class_balanced",
            loss="cross_entropy",
        ),
        "tau_normalization": SecondStage(
            TauNormalizationConfig,
            summary="Divides each class's weights by a power of their length, selected on validation; trains nothing.",
            paper="Kang et al., ICLR 2020",
            select=Lazy("imbvlm.models.second_stage_modules:select_tau_normalization"),
            selected=("tau",),
            reads_weight_norms=True,
        ),
        "disalign": SecondStage(
            DisAlignConfig,
            summary="Learns a factor and an offset per class, weighted by a confidence per image.",
            paper="Zhang et al., CVPR 2021",
            build=Lazy("imbvlm.models.second_stage_modules:DisAlign"),
            class_sampling="instance_balanced",
            loss="generalized_reweight",
        ),
        "marc": SecondStage(
            MarcConfig,
            summary="Learns a factor per class, and an offset in units of the length of its weights.",
            paper="Wang et al., ACML 2022",
            build=Lazy("imbvlm.models.second_stage_modules:Marc"),
            class_sampling="instance_balanced",
            loss="generalized_reweight",
            reads_weight_norms=True,
        ),
    },
)

if TYPE_CHECKING:
    SecondStageConfig = StageSection
else:
    SecondStageConfig = SECOND_STAGES.union(is_own=True)


def num_stage_epochs(config: StageSection | None) -> int:
    """Epochs that a second stage adds to a trial: one that only evaluates where nothing trains."""
    if config is None:
        return 0
    return config.num_epochs if isinstance(config, TrainedStage) else 1


def loss_options(config: StageSection, loss: str) -> dict[str, Any]:
    """The options of a second stage that are its loss's, such as `exponent`."""
    return config.model_dump(include=set(LOSSES[loss].config.model_fields) - {"name"})
