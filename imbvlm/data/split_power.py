"""The power of a split to decide, computed from its counts before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from imbvlm.base.formatting import Z95, pluralize
from imbvlm.data.folds import deal_folds
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import Rows, joined_groups
from imbvlm.data.splits import train_val_rows
from imbvlm.longtail.class_stats import ClassStats

# Numbers of choices for which the optimism is shown: of a small sweep and a large one.
NUM_CHOICES = (30, 200)
# Larger standard errors of held-out validation, of balanced and of few-shot accuracy, call for folds.
MAX_ERROR, MAX_FEW_SHOT_ERROR = 0.01, 0.02
# Folds where they are called for.
NUM_FOLDS = 5
# A class of so few images can have a handful of accuracies.
MAX_THIN = 3


@dataclass(frozen=True)
class SplitPower:
    """Standard errors of a split's balanced and few-shot accuracy at an accuracy of 1/2, where they are largest.

    Where the manifest has groups, images of one group are taken to be right or wrong together. `few_shot_error` is None
    where no few-shot class has images. `thin` are the classes of 1 to MAX_THIN images.
    """

    num_scored: int
    num_classes: int
    error: float
    few_shot_error: float | None
    thin: tuple[int, ...]
    has_groups: bool = False

    @property
    def half_width(self) -> float:
        """Half-width of a 95 % interval of balanced accuracy."""
        return Z95 * self.error

    @property
    def calls_for_folds(self) -> bool:
        """Whether a choice by the split is mostly chance (docs/protocol.md, Splits, counts, selection)."""
        return self.error > MAX_ERROR or (self.few_shot_error or 0.0) > MAX_FEW_SHOT_ERROR

    def optimism(self, num_choices: int) -> float:
        """How much too good the best of so many equally good configurations looks, on average, if all err apart.

        The expected largest of as many normal errors [Blom 1958].
        """
        return self.error * NormalDist().inv_cdf((num_choices - 0.375) / (num_choices + 0.25))

    def intervals(self) -> str:
        """A sentence on the limits of accuracies over the split."""
        few = "" if self.few_shot_error is None else f", few-shot to ± {100 * Z95 * self.few_shot_error:.1f}"
        together = ", where images of a group are right or wrong together" if self.has_groups else ""
        classes = f"{self.num_scored:,} of {pluralize(self.num_classes, 'class')}"
        return (
            f"balanced accuracy over {classes} to ± {100 * self.half_width:.1f} points{few} (95 %, at worst{together})"
        )

    def choices(self) -> str:
        """A sentence on the limits of a choice by the split."""
        small, large = (f"{100 * self.optimism(number):.1f}" for number in NUM_CHOICES)
        return (
            f"the best of {NUM_CHOICES[0]} equally good configurations looks up to {small} points better than it is, "
            f"of {NUM_CHOICES[1]} up to {large}"
        )


def resolve_folds(num_folds: int | None, manifest: Manifest, split_seed: int) -> int:
    """The folds that score trials on stored features; 1 where official or held-out validation images do.

    None stands for NUM_FOLDS where images held out from training would decide too little, or have groups: rows of a
    few groups decide less than their number says. There are no more folds than groups.
    """
    if len(manifest.rows_of("val")):
        return 1
    groups = joined_groups(manifest.table)
    if groups is not None:
        num_groups = len(np.unique(groups[manifest.rows_of("train")]))
        return min(NUM_FOLDS if num_folds is None else num_folds, max(1, num_groups))
    if num_folds is not None:
        return num_folds
    held_out = manifest.labels[train_val_rows(manifest, split_seed)[1]]
    is_enough = len(held_out) > 0 and not split_power(held_out, manifest.class_stats()).calls_for_folds
    return 1 if is_enough else NUM_FOLDS


def resolve_confirm_folds(num_folds: int, manifest: Manifest, split_seed: int) -> int:
    """The folds that score the best trials again where an official validation split decides too little; 1 if none."""
    official = manifest.labels[manifest.rows_of("val")]
    groups = joined_groups(manifest.table)
    own = None if groups is None else groups[manifest.rows_of("val")]
    if not len(official) or not split_power(official, manifest.class_stats(), own).calls_for_folds:
        return 1
    folds = deal_folds(manifest.label_rows(), num_folds, split_seed).folds
    if manifest.has_groups:
        return max(1, len(folds))
    return num_folds if folds else 1


def validation_rows(manifest: Manifest, split_seed: int, num_folds: int) -> Rows:
    """Manifest row numbers that score trials on stored features: the official split, held-out rows, or all folds'."""
    if num_folds == 1:
        return train_val_rows(manifest, split_seed)[1]
    return deal_folds(manifest.label_rows(), num_folds, split_seed).val_rows


def split_powers(manifest: Manifest, split_seed: int) -> dict[str, SplitPower]:
    """The power of validation, official, held out from training or over folds, and of test, where they have images."""
    stats = manifest.class_stats()
    num_folds = resolve_folds(None, manifest, split_seed)
    rows = {"val": validation_rows(manifest, split_seed, num_folds), "test": manifest.rows_of("test")}
    groups = joined_groups(manifest.table)
    return {
        split: split_power(manifest.labels[own], stats, None if groups is None else groups[own])
        for split, own in rows.items()
        if len(own)
    }


def split_power(labels: Rows, stats: ClassStats, groups: Rows | None = None) -> SplitPower:
    """The power of a split with labels (N,), N > 0, and maybe groups (N,)."""
    counts = np.bincount(labels, minlength=stats.num_classes)
    is_few = np.isin(labels, stats.shot_groups["few_shot"])
    return SplitPower(
        num_scored=int((counts > 0).sum()),
        num_classes=stats.num_classes,
        error=_standard_error(labels, groups),
        few_shot_error=_standard_error(labels[is_few], None if groups is None else groups[is_few])
        if is_few.any()
        else None,
        thin=tuple(np.flatnonzero((counts > 0) & (counts <= MAX_THIN)).tolist()),
        has_groups=groups is not None,
    )


def _standard_error(labels: Rows, groups: Rows | None) -> float:
    counts = np.bincount(labels)
    present = counts[counts > 0]
    if groups is None:
        return float(np.sqrt((0.25 / present).sum()) / len(present))
    weights = np.bincount(np.unique(groups, return_inverse=True)[1], 1 / counts[labels])
    return float(np.sqrt(0.25 * (weights**2).sum()) / len(present))
