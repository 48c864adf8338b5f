"""Scores of rows that a model has not trained on, from which thresholds of decisions are learned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.post_hoc_adjustment import CHUNK_SIZE

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoredRows:
    """Labels (N,), predicted classes (N,), their probabilities (N,), and the probability of each row's label (N,).

    `mean_probabilities` (C,) are those of each class over all rows. `stats` are those of training.
    """

    labels: Ids
    predicted: Ids
    confidence: Floats
    label_probability: Floats
    mean_probabilities: Floats
    stats: ClassStats

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_right(self) -> npt.NDArray[np.bool_]:
        """Which rows (N,) are predicted rightly."""
        return self.predicted == self.labels

    @property
    def counts(self) -> Ids:
        """Rows of each class (C,)."""
        return np.bincount(self.labels, minlength=self.stats.num_classes)

    @staticmethod
    def from_logits(logits: Tensor, labels: Tensor, stats: ClassStats) -> ScoredRows:
        """The scores of logits (N, C) and labels (N,), without rows of no probabilities, which are unreadable images.

        Probabilities are rounded to float32, as predictions are.
        """
        parts, total = [torch.empty(4, 0, dtype=torch.float64)], torch.zeros(stats.num_classes, dtype=torch.float64)
        for rows, own in zip(torch.split(logits, CHUNK_SIZE), torch.split(labels, CHUNK_SIZE), strict=True):
            probabilities = rows.double().softmax(dim=1).float().double()
            is_read = ~probabilities.isnan().any(dim=1)
            probabilities, own = probabilities[is_read], own[is_read, None]
            best = probabilities.max(dim=1)
            given = probabilities.gather(1, own)
            parts.append(torch.stack([own[:, 0].double(), best.indices.double(), best.values, given[:, 0]]))
            total += probabilities.sum(dim=0)
        given, predicted, confidence, probability = torch.cat(parts, dim=1).numpy()
        mean = total.numpy() / max(1, len(given))
        return ScoredRows(given.astype(np.int64), predicted.astype(np.int64), confidence, probability, mean, stats)

    def subset(self, keep: npt.NDArray[np.bool_]) -> ScoredRows:
        """The rows that a mask (N,) keeps, with the mean probabilities of all."""
        return replace(
            self,
            labels=self.labels[keep],
            predicted=self.predicted[keep],
            confidence=self.confidence[keep],
            label_probability=self.label_probability[keep],
        )

    def comes_as(self, shares: Floats) -> bool:
        """Whether classes with these shares (C,) come as those of the rows do."""
        return bool(np.allclose(shares / shares.sum(), self.counts / max(1, len(self)), rtol=1e-9, atol=1e-12))

    def at_prevalence(self, shares: Floats, *, seed: int = 0) -> ScoredRows:
        """A sample of the rows whose classes come by these shares (C,): a row stays by its class's share over its own.

        It is as a sample of such images where the rows' shares are those of the images that they stand for. Classes
        without rows stay without. Raises ImbvlmError where no class with a share has rows.
        """
        counts = self.counts
        weights = np.where(counts > 0, shares, 0) / np.maximum(counts, 1)
        if not weights.any():
            raise ImbvlmError("none of the classes of this prevalence has a validation image. Give another one.")
        stays = np.random.default_rng(seed).random(len(self)) < (weights / weights.max())[self.labels]
        return self.subset(stays)
