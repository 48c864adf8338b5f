"""Mixup and CutMix of a batch, and feature transfer from many-shot classes.

Random numbers depend on the seed and the step or epoch alone, so that a resumed trial repeats them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import OutputName
from imbvlm.features.trial_data import StoredRows
from imbvlm.longtail.class_sampling import Rows
from imbvlm.longtail.class_stats import ClassStats

# Separate these random numbers from others of the same seed.
_MIXING_STREAM, _TRANSFER_STREAM = 0x31C5, 0x7A2F


class BatchMixer:
    """Mixes a batch with itself in another order: mixup [Zhang et al. 2018] or CutMix [Yun et al. 2019].

    mixup: share x_i + (1 - share) x_j, of images, or of an encoder's outputs as in manifold mixup [Verma et al. 2019].
    CutMix: a rectangle of (1 - share) of x_i's area is x_j's. The target is share y_i + (1 - share) y_j, with a share
    for each batch from Beta(alpha, alpha). An alpha of 0 switches its kind off; with both, each batch has a random one.
    All workers have the same share, and each mixes its own part of the batch.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int, rank: int = 0) -> None:
        self._kinds = [(is_cut, alpha) for is_cut, alpha in ((False, mixup), (True, cutmix)) if alpha > 0]
        self._num_classes, self._seed, self._rank = num_classes, seed, rank

    def __call__(self, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixed inputs (B, ...) and class weights (B, C) from inputs (B, ...) and labels (B,)."""
        rng = np.random.default_rng([_MIXING_STREAM, self._seed, step])
        is_cut, alpha = self._kinds[int(rng.integers(len(self._kinds)))]
        share = float(rng.beta(alpha, alpha))
        order = np.random.default_rng([_MIXING_STREAM, self._seed, step, self._rank]).permutation(len(labels))
        others = torch.from_numpy(order).to(labels.device)
        if is_cut:
            mixed, share = cutmix(inputs, inputs[others], share, rng)
        else:
            mixed = torch.lerp(inputs[others].float(), inputs.float(), share)
        classes = torch.arange(self._num_classes, device=labels.device)
        own, other = (targets[:, None] == classes for targets in (labels, labels[others]))
        return mixed, share * own.float() + (1 - share) * other.float()


def cutmix(images: Tensor, others: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Images (B, C, H, W) with one rectangle of the others, and the fraction of the images that remains.

    The rectangle has a random center and sides of sqrt(1 - share) of the image's; it is clipped to the image.
    """
    height, width = images.shape[-2:]
    across, down = (round(side * float(np.sqrt(1 - share))) for side in (width, height))
    left, top = int(rng.integers(width)) - across // 2, int(rng.integers(height)) - down // 2
    columns = slice(max(left, 0), min(left + across, width))
    rows = slice(max(top, 0), min(top + down, height))
    mixed = images.clone()
    mixed[..., rows, columns] = others[..., rows, columns]
    area = max(rows.stop - rows.start, 0) * max(columns.stop - columns.start, 0)
    return mixed, 1 - area / (height * width)


class FeatureTransfer:
    """x + strength (a - b) / sqrt(2): medium- and few-shot classes borrow the variation of many-shot classes.

    a and b are the stored outputs of two images of one many-shot class, so that the difference has mean 0 and, at
    strength 1, the covariance within that class. This is the idea of feature transfer [Yin et al. 2019] without its
    projection. Raises ImbvlmError without a many-shot class.
    """

    def __init__(self, strength: float, examples: StoredRows, stats: ClassStats, seed: int) -> None:
        self._strength, self._examples, self._seed = strength, examples, seed
        counts = np.bincount(examples.labels, minlength=stats.num_classes)
        gives = np.isin(np.arange(stats.num_classes), stats.many_shot) & (counts > 1)
        if not gives.any():
            raise ImbvlmError(
                "feature_augmentation.transfer borrows the variation within classes of more than 100 training images, "
                f"and the largest here has {int(counts.max(initial=0))}. Set feature_augmentation.transfer: 0."
            )
        self._receives = ~np.isin(np.arange(stats.num_classes), stats.many_shot)
        by_class = np.argsort(examples.labels, kind="stable")
        self._givers = by_class[gives[examples.labels[by_class]]]
        labels = examples.labels[self._givers]
        # For each giver the first index of its class among the givers, and the size of the class.
        self._starts = np.searchsorted(labels, labels)
        self._sizes = counts[labels]
        self._sampled: tuple[int, Rows, Rows] | None = None

    def add_to(self, inputs: Tensor, output: OutputName, examples: Rows, positions: Rows, epoch: int) -> None:
        """Change inputs (B, ...) in place: outputs of examples (B,) at their positions (B,) in an epoch's plan."""
        chosen = np.flatnonzero(self._receives[self._examples.labels[examples]])
        if not chosen.size:
            return
        pairs, views = self._pairs(epoch)
        first, second = (
            self._examples.batch(output, pairs[which, positions[chosen]], views[which, positions[chosen]]).float()
            for which in (0, 1)
        )
        added = self._strength / np.sqrt(2) * (first - second)
        index = torch.from_numpy(chosen)
        inputs[index] = (inputs[index].float() + added).to(inputs.dtype)

    def _pairs(self, epoch: int) -> tuple[Rows, Rows]:
        """Two examples of one class (2, N) for each position of an epoch, and a view of each (2, N)."""
        if self._sampled is None or self._sampled[0] != epoch:
            rng = np.random.default_rng([_TRANSFER_STREAM, self._seed, epoch])
            size = len(self._examples)
            first = rng.integers(len(self._givers), size=size)
            # Another example of its class: a random number of steps further, cyclically.
            step = 1 + np.floor(rng.random(size) * (self._sizes[first] - 1)).astype(np.int64)
            start = self._starts[first]
            second = start + (first - start + step) % self._sizes[first]
            views = rng.integers(self._examples.num_views, size=(2, size))
            self._sampled = (epoch, np.stack([self._givers[first], self._givers[second]]), views)
        return self._sampled[1], self._sampled[2]
