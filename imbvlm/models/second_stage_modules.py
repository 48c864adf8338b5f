"""Modules of the second stages, which replace the classifier of a trained, frozen first stage.

Each takes the first stage's classifier and maps stored decoder outputs, features (B, D), to logits (B, C).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.second_stage_registry import SECOND_STAGES, StageSection, TauNormalizationConfig
from imbvlm.longtail.post_hoc_adjustment import ValueSelection, balanced_accuracy, select_best
from imbvlm.models.classifier import MIN_NORM, AffineMap, CosineClassifier, LinearClassifier, autocast_disabled

Classifier = LinearClassifier | CosineClassifier

# Candidates of tau_normalization [Kang et al. 2020: tau in (0, 1)].
NORM_TAUS = tuple(round(0.05 * step, 10) for step in range(21))
_CONFIDENCE_SCALE = 0.1


class LogitTransform(nn.Module):
    """Changes the logits of a first stage's classifier, of which it has a frozen copy."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.first_stage = copy.deepcopy(classifier).requires_grad_(False)

    def forward(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """New logits (B, C) of features (B, D); `logits` are the first stage's, computed here where None."""
        return self.adjust(self.first_stage(features) if logits is None else logits, features)

    def adjust(self, logits: Tensor, features: Tensor) -> Tensor:
        """New logits (B, C) from the first stage's, stored or just computed, and its features (B, D)."""
        raise NotImplementedError


class LearnableWeightScaling(LogitTransform):
    """s_c z_c; s (C,) is learned and starts from 1 [Kang et al. 2020, "LWS"]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__(classifier)
        self.scale = nn.Parameter(torch.ones(len(classifier.weight)))

    def adjust(self, logits: Tensor, features: Tensor) -> Tensor:
        return self.scale * logits

    def affine(self) -> AffineMap:
        return self.first_stage.affine().scaled(self.scale.detach())


class DisAlign(LogitTransform):
    """(1 + sigma(x) s) z + sigma(x) b, sigma(x) = sigmoid(v . x + c) [Zhang et al. 2021, "DisAlign"].

    s (C,) starts from 1, b (C,) from 0, and v from torch's default times 0.1, so that sigma is near 1/2 for every
    image.
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
    """a z + b ||w||; a (C,) starts from 1, b (C,) from 0, w is the first stage's weight [Wang et al. 2022, "MARC"]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__(classifier)
        self.scale = nn.Parameter(torch.ones(len(classifier.weight)))
        self.bias = nn.Parameter(torch.zeros(len(classifier.weight)))
        self.register_buffer("norms", torch.linalg.vector_norm(classifier.weight.detach(), dim=1))
        self.norms: Tensor

    def adjust(self, logits: Tensor, features: Tensor) -> Tensor:
        return self.scale * logits + self.bias * self.norms

    def affine(self) -> AffineMap:
        scaled = self.first_stage.affine().scaled(self.scale.detach())
        return scaled._replace(bias=scaled.bias + (self.bias.detach().double() * self.norms))


def fresh_classifier(classifier: Classifier) -> Classifier:
    """A randomly initialized classifier of the same kind and shape [Kang et al. 2020, "cRT"]."""
    num_classes, width = classifier.weight.shape
    if isinstance(classifier, CosineClassifier):
        return CosineClassifier(width, num_classes, classifier.temperature)
    return LinearClassifier(width, num_classes)


def tau_normalized(classifier: LinearClassifier, tau: float) -> LinearClassifier:
    """w_c / ||w_c||^tau, without bias, untrained [Kang et al. 2020]."""
    result = copy.deepcopy(classifier).requires_grad_(False)
    result.weight.mul_(_norm_powers(classifier, tau)[:, None])
    result.bias.zero_()
    return result


def select_tau_normalization(
    classifier: LinearClassifier, features: Tensor, targets: Tensor, config: TauNormalizationConfig
) -> tuple[nn.Module, dict[str, float]]:
    """`tau_normalized` with the configured tau, or with the best on validation [Kang et al. 2020]; its tau as a metric.

    features (N, D), targets (N,). Raises ImbvlmError.
    """
    tau = best_tau(classifier, features, targets).value if config.tau is None else config.tau
    return tau_normalized(classifier, tau), {"second_stage/tau": tau}


def best_tau(classifier: LinearClassifier, features: Tensor, targets: Tensor) -> ValueSelection:
    """tau of `tau_normalized` by balanced accuracy on validation features (N, D), targets (N,). Raises ImbvlmError.

    The smallest of equals, which changes least.
    """
    if len(targets) == 0:
        raise ImbvlmError("tau_normalization selects tau on validation rows, and there are none; set second_stage.tau.")
    with torch.no_grad(), autocast_disabled(features):
        logits = F.linear(features.to(classifier.weight.dtype), classifier.weight)

        def score(tau: float) -> float:
            powers = _norm_powers(classifier, tau)
            return balanced_accuracy(targets, len(powers), lambda rows: logits[rows] * powers)

        return select_best(NORM_TAUS, score, neutral=0.0)


def stage_module(config: StageSection, classifier: Classifier) -> nn.Module:
    """The untrained module of a second stage that replaces the first stage's classifier."""
    build = SECOND_STAGES[config.name].build
    module: nn.Module = copy.deepcopy(classifier) if build is None else build(classifier)
    return module


def _norm_powers(classifier: LinearClassifier, tau: float) -> Tensor:
    """||w_c||^-tau (C,)."""
    return torch.linalg.vector_norm(classifier.weight.detach(), dim=1).clamp(min=MIN_NORM).pow(-tau)
