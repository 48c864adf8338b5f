"""Linear, cosine and zero-shot classifiers on features (B, D), with logits (B, C) in float32 at least."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.model_sections import CosineClassifierConfig, LinearClassifierConfig

# A shorter vector counts as zero and gets no gradient, which would grow as 1 / length.
MIN_NORM = 1e-6


class AffineMap(NamedTuple):
    """Logits W x + b: weight (C, D) and bias (C,) in float64; with `is_normalized` x is a feature of length 1."""

    weight: Tensor
    bias: Tensor
    is_normalized: bool

    def scaled(self, scale: float | Tensor) -> AffineMap:
        """The map to logits times a number or a factor for each class (C,)."""
        factor = torch.as_tensor(scale, dtype=torch.float64, device=self.bias.device)
        return self._replace(weight=factor.view(-1, 1) * self.weight, bias=factor * self.bias)


@runtime_checkable
class AffineHead(Protocol):
    """A classifier whose logits may be an affine map of the feature, or of its direction."""

    def affine(self) -> AffineMap | None:
        """The classifier as a map; None where its logits are none."""


def affine_map(model: nn.Module) -> AffineMap | None:
    """A classifier's logits as an affine map of its input; None where they are none."""
    return model.affine() if isinstance(model, AffineHead) else None


class LinearClassifier(nn.Module):
    """W x + b; weight (C, D), bias (C,)."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        layer = nn.Linear(in_features, num_classes)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, features: Tensor) -> Tensor:
        with autocast_disabled(features):
            return F.linear(features.to(self.weight.dtype), self.weight, self.bias)

    def affine(self) -> AffineMap:
        return AffineMap(self.weight.detach().double(), self.bias.detach().double(), is_normalized=False)


class CosineClassifier(nn.Module):
    """cos(w_c, x) / temperature; weight (C, D), no bias. A zero vector has similarity 0 with everything."""

    def __init__(self, in_features: int, num_classes: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(l2_normalize(torch.randn(num_classes, in_features)))

    def forward(self, features: Tensor) -> Tensor:
        with autocast_disabled(features):
            return F.linear(l2_normalize(features.to(self.weight.dtype)), l2_normalize(self.weight)) / self.temperature

    def affine(self) -> AffineMap:
        weight = l2_normalize(self.weight.detach().double()) / self.temperature
        return AffineMap(weight, weight.new_zeros(len(weight)), is_normalized=True)


def build_classifier(
    config: LinearClassifierConfig | CosineClassifierConfig,
    in_features: int,
    num_classes: int,
    *,
    init_weight: Tensor | None = None,
) -> LinearClassifier | CosineClassifier:
    """The configured classifier, started from `init_weight` (C, D), with a bias of 0, or at random without it.

    A zero row of `init_weight` (the mean of a class without images) starts at random, because it has no direction.
    Raises ImbvlmError for an `init_weight` of another shape.
    """
    if isinstance(config, CosineClassifierConfig):
        classifier: LinearClassifier | CosineClassifier = CosineClassifier(in_features, num_classes, config.temperature)
    else:
        classifier = LinearClassifier(in_features, num_classes)
    if init_weight is not None:
        _start_from(classifier, init_weight, config.init)
    return classifier


def l2_normalize(vectors: Tensor) -> Tensor:
    """Vectors (..., D) of length 1; a zero vector stays zero and has gradient 0."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * torch.where(norms > MIN_NORM, 1 / norms.clamp(min=MIN_NORM), 0)


def _start_from(classifier: LinearClassifier | CosineClassifier, init_weight: Tensor, source: str) -> None:
    if init_weight.shape != classifier.weight.shape:
        raise ImbvlmError(
            f"classifier.init: {source} needs weights of the classifier's shape {tuple(classifier.weight.shape)}, got "
            f"{tuple(init_weight.shape)}. Give it the features that the weights were made from."
        )
    with torch.no_grad():
        weight = init_weight.to(classifier.weight)
        has_direction = torch.linalg.vector_norm(weight, dim=-1, keepdim=True) > MIN_NORM
        classifier.weight.copy_(torch.where(has_direction, weight, classifier.weight))
        if isinstance(classifier, LinearClassifier):
            classifier.bias.zero_()


def autocast_disabled(features: Tensor) -> torch.autocast:
    """A context without autocast: neighboring bfloat16 logits of a cosine classifier at 1 / 0.04 are 0.125 apart."""
    return torch.autocast(features.device.type, enabled=False)


class FeatureClassifier(nn.Module):
    """A classifier behind a decoder, or behind an identity: (B, ...) to (B, C)."""

    def __init__(self, decoder: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.classifier = classifier

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of tokens (B, T, D) or pooled features (B, P)."""
        logits: Tensor = self.classifier(self.decoder(features))
        return logits

    def affine(self) -> AffineMap | None:
        return affine_map(self.classifier) if isinstance(self.decoder, nn.Identity) else None


class ZeroShotClassifier(nn.Module):
    """Scaled cosine similarity of image and text embeddings, nothing trained [Radford 2021, "CLIP"]."""

    class_embeddings: Tensor
    logit_scale: Tensor

    def __init__(self, class_embeddings: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.register_buffer("class_embeddings", class_embeddings.float())
        self.register_buffer("logit_scale", torch.tensor(logit_scale))

    def forward(self, image_embedding: Tensor) -> Tensor:
        """Logits (B, C) of image embeddings (B, E)."""
        return self.logit_scale * F.normalize(image_embedding, dim=-1) @ self.class_embeddings.T

    def affine(self) -> AffineMap:
        weight = self.logit_scale.double() * self.class_embeddings.double()
        return AffineMap(weight, weight.new_zeros(len(weight)), is_normalized=True)
