"""Second stages: what is put on a finished, frozen first stage to serve the tail. SECOND_STAGES.

Each takes the first stage's classifier and maps stored decoder outputs, features (B, D), to logits (B, C).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import ClassSampling
from imbvlm.longtail.post_hoc_adjustment import ValueSelection, balanced_accuracy, select_best
from imbvlm.models.classifier import MIN_NORM, CosineClassifier, LinearClassifier, autocast_disabled

Classifier = LinearClassifier | CosineClassifier

# tau-normalization's list [Kang et al. 2020: tau in (0, 1)].
NORM_TAUS = tuple(round(0.05 * step, 10) for step in range(21))
_CONFIDENCE_SCALE = 0.1


class LogitTransform(nn.Module):
    """What changes the logits of a first stage's classifier, of which it has a frozen copy."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.first_stage = copy.deepcopy(classifier).requires_grad_(False)

    def forward(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """New logits (B, C); `logits` are the first stage's where they are known."""
        return self.adjust(self.first_stage(features) if logits is None else logits, features)

    def adjust(self, logits: Tensor, features: Tensor) -> Tensor:
        """New logits (B, C) from the first stage's, stored or just computed, and its features (B, D)."""
        raise NotImplementedError


class LearnableWeightScaling(LogitTransform):
    """s_c z_c, s (C,) learned, from 1 [Kang et al. 2020, "LWS"]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__(classifier)
        self.scale = nn.Parameter(torch.ones(len(classifier.weight)))

    def adjust(self, logits: Tensor, features: Tensor) -> Tensor:
        return self.scale * logits


class DisAlign(LogitTransform):
    """(1 + sigma(x) s) z + sigma(x) b, sigma(x) = sigmoid(v . x + c) [Zhang et al. 2021, "DisAlign"].

    s (C,) starts from 1, b (C,) from 0, and v as torch's own times 0.1, so that sigma is near 1/2 for every image.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__(classifier)
        num_classes, width = classifier.weight.shape
        self.scale = nn.Parameter(torch.ones(num_classes))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.confidence = nn.Linear(width, 1)
        with torch.no_grad():
            self.confidence.weight.mul_(_CONFIDENCE_SCALE)

    def adjust(self, logits: Tensor, features: Tensor) -> Tensor:
        with autocast_disabled(features):
            confidence = torch.sigmoid(self.confidence(features.to(self.confidence.weight.dtype)))
        return (1 + confidence * self.scale) * logits + confidence * self.bias


class Marc(LogitTransform):
    """a z + b ||w||, a (C,) from 1, b (C,) from 0, w the first stage's weights [Wang et al. 2022, "MARC"]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__(classifier)
        self.scale = nn.Parameter(torch.ones(len(classifier.weight)))
        self.bias = nn.Parameter(torch.zeros(len(classifier.weight)))
        self.register_buffer("norms", torch.linalg.vector_norm(classifier.weight.detach(), dim=1))
        self.norms: Tensor

    def adjust(self, logits: Tensor, features: Tensor) -> Tensor:
        return self.scale * logits + self.bias * self.norms


def fresh_classifier(classifier: Classifier) -> Classifier:
    """A fresh classifier of the same kind and shape, at random [Kang et al. 2020, "cRT"]."""
    num_classes, width = classifier.weight.shape
    if isinstance(classifier, CosineClassifier):
        return CosineClassifier(width, num_classes, classifier.temperature)
    return LinearClassifier(width, num_classes)


def tau_normalized(classifier: LinearClassifier, tau: float) -> LinearClassifier:
    """w_c / ||w_c||^tau, without bias; nothing is learned [Kang et al. 2020]."""
    result = copy.deepcopy(classifier).requires_grad_(False)
    result.weight.mul_(_norm_powers(classifier, tau)[:, None])
    result.bias.zero_()
    return result


def choose_tau_normalization(classifier: LinearClassifier, features: Tensor, targets: Tensor) -> ValueSelection:
    """tau of `tau_normalized` by balanced accuracy on validation features (N, D), targets (N,). Raises ImbvlmError.

    Of equals the smallest, which changes least.
    """
    if len(targets) == 0:
        raise ImbvlmError("tau_normalization chooses tau on validation rows, and there are none")
    with torch.no_grad(), autocast_disabled(features):
        logits = F.linear(features.to(classifier.weight.dtype), classifier.weight)

        def score(tau: float) -> float:
            powers = _norm_powers(classifier, tau)
            return balanced_accuracy(targets, len(powers), lambda rows: logits[rows] * powers)

        return select_best(NORM_TAUS, score, neutral=0.0)


@dataclass(frozen=True)
class SecondStage:
    """One second stage: what is built on the first stage's classifier, and how its paper trains it.

    `class_sampling` and `loss` are null where nothing trains.
    """

    build: Callable[[Classifier], nn.Module] | None
    class_sampling: ClassSampling | None
    loss: str | None
    summary: str
    paper: str


SECOND_STAGES: Mapping[str, SecondStage] = {
    "classifier_retraining": SecondStage(
        build=fresh_classifier,
        class_sampling="class_balanced",
        loss="cross_entropy",
        summary="Trains a fresh classifier on the frozen decoder (cRT).",
        paper="Kang et al., ICLR 2020",
    ),
    "learnable_weight_scaling": SecondStage(
        build=LearnableWeightScaling,
        class_sampling="class_balanced",
        loss="cross_entropy",
        summary="Learns a factor on each class's logit (LWS).",
        paper="Kang et al., ICLR 2020",
    ),
    "tau_normalization": SecondStage(
        build=None,
        class_sampling=None,
        loss=None,
        summary="Divides each class's weights by a power of their length, chosen on validation; nothing is trained.",
        paper="Kang et al., ICLR 2020",
    ),
    "disalign": SecondStage(
        build=DisAlign,
        class_sampling="instance_balanced",
        loss="generalized_reweight",
        summary="Learns a factor and an offset per class, weighted by a confidence per image.",
        paper="Zhang et al., CVPR 2021",
    ),
    "marc": SecondStage(
        build=Marc,
        class_sampling="instance_balanced",
        loss="generalized_reweight",
        summary="Learns a factor, and an offset in lengths of its weights, per class.",
        paper="Wang et al., ACML 2022",
    ),
}


def stage_module(name: str, classifier: Classifier) -> nn.Module:
    """What a second stage puts in the place of the first stage's classifier, before it has learned anything."""
    build = SECOND_STAGES[name].build
    return copy.deepcopy(classifier) if build is None else build(classifier)


def _norm_powers(classifier: LinearClassifier, tau: float) -> Tensor:
    """||w_c||^-tau (C,)."""
    return torch.linalg.vector_norm(classifier.weight.detach(), dim=1).clamp(min=MIN_NORM).pow(-tau)
