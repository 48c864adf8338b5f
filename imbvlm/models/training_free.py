"""Classifiers computed from the stored features of all training images, by methods that train nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.method_registry import METHODS
from imbvlm.config.model_sections import ClassMeansConfig, DiscriminantConfig, PrototypeCacheConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.longtail.post_hoc_adjustment import balanced_log_likelihood, best_temperature
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.classifier import AffineMap, CosineClassifier, FeatureClassifier, autocast_disabled, l2_normalize
from imbvlm.models.classifier_init import centered_by_parent, class_means
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.model_inputs import ModelInputs, StoredFeatures

# Number of images whose features are in memory at once.
CHUNK_SIZE = 4096
# Candidates of the discriminant's shrinkage. Below the first a covariance of few images is close to singular.
SHRINKAGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
# Elements of the logits by which a shrinkage is selected; of more validation rows evenly spaced ones are taken.
MAX_LOGITS = 2**25
# Images of a class from which its prototypes are made: evenly spaced rows of a larger class.
MAX_CLASS_ROWS = 4096
NUM_ITERATIONS = 10


# ---------------------------------------------------------------------------------------------------- class means


def build_class_means(
    config: TrialConfig, inputs: ModelInputs, encoder: Encoder | None, device: torch.device
) -> nn.Module:
    """A cosine classifier on class means [Wang et al. 2019, "SimpleShot"]; a class without images has cosine 0."""
    model = restore_class_means(config, inputs.info, len(inputs.class_names), {})
    width, reads = inputs.info.pooled_width, METHODS[config.method].reads
    means = class_means(nn.Identity(), _stored(inputs), reads, len(inputs.class_names), width, device)
    if require_section(config.section(ClassMeansConfig)).center_by_parent:
        means = centered_by_parent(means, inputs.taxonomy, "class_means.center_by_parent")
    model.classifier.load_state_dict({"weight": means})
    return model


def restore_class_means(
    config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]
) -> FeatureClassifier:
    """A cosine classifier of the exported shape."""
    temperature = require_section(config.section(ClassMeansConfig)).temperature
    classifier = CosineClassifier(info.pooled_width, num_classes, temperature)
    return FeatureClassifier(nn.Identity(), classifier).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- discriminant


@dataclass(frozen=True)
class ClassStatistics:
    """Class means (C, D) around their center (D,), and eigenvalues (D,) and eigenvectors (D, D) of the covariance."""

    means: Tensor
    center: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    @cached_property
    def _rotated(self) -> Tensor:
        return self.means @ self.eigenvectors

    def weights(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) of the discriminant with the covariance (1 - s) S + s tr(S) / D."""
        spread = (1 - shrinkage) * self.eigenvalues + shrinkage * self.eigenvalues.mean()
        spread = spread.clamp(min=torch.finfo(torch.float32).tiny)
        weight = self._rotated / spread @ self.eigenvectors.T
        bias = -(weight * (self.means / 2 + self.center)).sum(dim=1)
        return weight.float(), bias.float()


class Discriminant(nn.Module):
    """Linear discriminant analysis on normalized features: logits are log-likelihood ratios to the mean class.

    `statistics` is None in a restored model, which has its weights.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, num_classes: int, statistics: ClassStatistics | None = None) -> None:
        super().__init__()
        self.statistics = statistics
        self.register_buffer("weight", torch.zeros(num_classes, width))
        self.register_buffer("bias", torch.zeros(num_classes))

    def set_options(self, shrinkage: float, temperature: float) -> None:
        """Take the weights of a shrinkage, divided by a temperature."""
        assert self.statistics is not None, "a restored model has its weights"
        weight, bias = self.statistics.weights(shrinkage)
        self.weight.copy_(weight / temperature)
        self.bias.copy_(bias / temperature)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D)."""
        with autocast_disabled(features):
            return F.linear(l2_normalize(features.float()), self.weight, self.bias)

    def affine(self) -> AffineMap:
        return AffineMap(self.weight.double(), self.bias.double(), is_normalized=True)


def build_discriminant(
    config: TrialConfig, inputs: ModelInputs, encoder: Encoder | None, device: torch.device
) -> nn.Module:
    """A discriminant of the configured options, of 1 where they are selected later [Wang et al. 2024]."""
    width, num_classes = inputs.info.pooled_width, len(inputs.class_names)
    model = Discriminant(width, num_classes, class_statistics(config, _stored(inputs), num_classes, width, device))
    section = require_section(config.section(DiscriminantConfig))
    model.set_options(1.0 if section.shrinkage is None else section.shrinkage, section.temperature or 1.0)
    return model


def restore_discriminant(
    config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A discriminant of the exported shapes."""
    return Discriminant(info.pooled_width, num_classes)


@torch.no_grad()
def class_statistics(
    config: TrialConfig, train: StoredFeatures, num_classes: int, width: int, device: torch.device
) -> ClassStatistics:
    """Statistics of the normalized evaluation crops of all training images, in float64 on the CPU.

    A class without images has the mean of all classes. Memory grows with C D and D^2, not with the images.
    """
    sums, scatter = torch.zeros(num_classes, width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    counts = torch.from_numpy(np.bincount(train.labels, minlength=num_classes)).double()
    for labels, features in _directions(config, train, np.arange(len(train.labels)), device):
        scatter += (features.T @ features).to("cpu", torch.float64)
        sums.index_add_(0, labels, features.to("cpu", torch.float64))
    is_seen = counts > 0
    means = sums / counts.clamp(min=1)[:, None]
    center = means[is_seen].mean(dim=0)
    scatter -= (means * counts[:, None]).T @ means
    num_free = max(int(counts.sum()) - int(is_seen.sum()), 1)
    eigenvalues, eigenvectors = torch.linalg.eigh(scatter / num_free)
    return ClassStatistics(
        torch.where(is_seen[:, None], means - center, 0.0), center, eigenvalues.clamp(min=0), eigenvectors
    )


@torch.no_grad()
def select_discriminant(
    model: Discriminant, features: Tensor, targets: Tensor, config: DiscriminantConfig
) -> dict[str, float]:
    """Give a discriminant the shrinkage and temperature with the highest balanced log-likelihood on validation.

    features (N, D), targets (N,). Each shrinkage has a temperature of its own. Configured options stay. Returns both by
    name.
    """
    step = math.ceil(len(targets) * len(model.bias) / MAX_LOGITS)
    features, targets = features[::step], targets[::step]
    best, best_likelihood = {"shrinkage": 1.0, "temperature": 1.0}, -math.inf
    for shrinkage in SHRINKAGES if config.shrinkage is None else (config.shrinkage,):
        model.set_options(shrinkage, 1.0)
        logits = model(features)
        temperature = config.temperature or best_temperature(logits, targets, best["temperature"])
        likelihood = balanced_log_likelihood(logits / temperature, targets)
        if likelihood > best_likelihood:
            best, best_likelihood = {"shrinkage": shrinkage, "temperature": temperature}, likelihood
    model.set_options(**best)
    return best


# ------------------------------------------------------------------------------------------------- prototype cache


class PrototypeCache(nn.Module):
    """scale mean_k exp(-sharpness (1 - cos(x, p_ck))) over a class's prototypes p_ck [Zhang et al. 2022].

    The mean in place of Tip-Adapter's sum balances classes. `prototypes` (K, C, D) and their `shares` (K, C), 1 over a
    class's number of prototypes, or 0 where it has fewer than K.
    """

    prototypes: Tensor
    shares: Tensor

    def __init__(self, prototypes: Tensor, shares: Tensor, sharpness: float, scale: float) -> None:
        super().__init__()
        self.sharpness, self.scale = sharpness, scale
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("shares", shares)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D)."""
        with autocast_disabled(features):
            directions = l2_normalize(features.float())
            # One product for each k needs memory for (B, C) alone.
            # `len` would fix the size of batches in an ONNX graph.
            logits = directions.new_zeros(directions.shape[0], self.shares.shape[1])
            for prototypes, share in zip(self.prototypes, self.shares, strict=True):
                logits = logits + share * torch.exp(self.sharpness * (F.linear(directions, prototypes) - 1))
            return self.scale * logits


def build_prototype_cache(
    config: TrialConfig, inputs: ModelInputs, encoder: Encoder | None, device: torch.device
) -> nn.Module:
    """A cache of each class's prototypes: its images' features, or centers of them in a larger class."""
    section, train = require_section(config.section(PrototypeCacheConfig)), _stored(inputs)
    num_classes = len(inputs.class_names)
    by_class = np.argsort(train.labels, kind="stable")
    ends = np.cumsum(np.bincount(train.labels, minlength=num_classes))
    num_slots = int(min(section.num_prototypes, max(np.diff(ends, prepend=0), default=0)))
    prototypes = torch.zeros(num_slots, num_classes, inputs.info.pooled_width)
    shares = torch.zeros(num_slots, num_classes)
    for label, rows in enumerate(np.split(by_class, ends[:-1])):
        if len(rows):
            spaced = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_CLASS_ROWS)).round().astype(np.int64)]
            features = torch.cat([part for _, part in _directions(config, train, spaced, device)])
            centers = cluster_centers(features, num_slots).cpu()
            prototypes[: len(centers), label] = centers
            shares[: len(centers), label] = 1 / len(centers)
    if section.center_by_parent:
        prototypes = centered_prototypes(prototypes, shares, inputs.taxonomy)
    return PrototypeCache(prototypes, shares, section.sharpness, section.scale)


def restore_prototype_cache(
    config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A cache of the exported shapes."""
    section = require_section(config.section(PrototypeCacheConfig))
    num_slots = len(tensors["shares"]) if "shares" in tensors else section.num_prototypes
    prototypes = torch.zeros(num_slots, num_classes, info.pooled_width)
    return PrototypeCache(prototypes, torch.zeros(num_slots, num_classes), section.sharpness, section.scale)


def centered_prototypes(prototypes: Tensor, shares: Tensor, taxonomy: Taxonomy | None) -> Tensor:
    """Prototypes (K, C, D) of length 1, moved so that each class's mean has the direction of `centered_by_parent`.

    Those of a class move together, and their mean keeps its length until they are normalized. `shares` (K, C) as of
    PrototypeCache. Raises ImbvlmError without a taxonomy.
    """
    means = (shares[:, :, None] * prototypes).sum(dim=0)
    directions = centered_by_parent(l2_normalize(means), taxonomy, "prototype_cache.center_by_parent")
    moves = torch.linalg.vector_norm(means, dim=1, keepdim=True) * directions - means
    return l2_normalize(prototypes + moves) * (shares > 0)[:, :, None]


@torch.no_grad()
def cluster_centers(directions: Tensor, num_centers: int) -> Tensor:
    """At most `num_centers` centers (K, D) of directions (N, D), by spherical k-means from evenly spaced rows.

    Without random numbers. Few directions are their own centers.
    """
    if len(directions) <= num_centers:
        return directions
    start = torch.linspace(0, len(directions) - 1, num_centers, device=directions.device).round().long()
    centers = directions[start]
    for _ in range(NUM_ITERATIONS):
        nearest = F.one_hot((directions @ centers.T).argmax(dim=1), num_centers).to(directions.dtype)
        # A center without directions stays where it is.
        centers = torch.where(nearest.any(dim=0)[:, None], l2_normalize(nearest.T @ directions), centers)
    return centers


def _directions(
    config: TrialConfig, train: StoredFeatures, rows: npt.NDArray[np.int64], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels (B,) on the CPU and normalized features (B, D) on the device, a chunk at a time."""
    for start in range(0, len(rows), CHUNK_SIZE):
        part = rows[start : start + CHUNK_SIZE]
        features = train.batch(METHODS[config.method].reads, part).to(device).float()
        yield torch.from_numpy(train.labels[part]), l2_normalize(features)


def _stored(inputs: ModelInputs) -> StoredFeatures:
    if inputs.stored is None:
        raise ImbvlmError(
            "a method that trains nothing needs stored features of the training images, got none. "
            "Set features.store: true."
        )
    return inputs.stored
