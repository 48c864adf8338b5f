"""The power of a split to decide, computed from its counts before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from imbvlm.base.formatting import Z95, pluralize
from imbvlm.data.manifest import Manifest
from imbvlm.data.splits import train_val_rows
from imbvlm.longtail.class_stats import ClassStats

# Numbers of choices for which the optimism is shown: of a small sweep and a large one.
NUM_CHOICES = (30, 200)
# A class of so few images can have a handful of accuracies.
MAX_THIN = 3


@dataclass(frozen=True)
class SplitPower:
    """Standard errors of a split's balanced and few-shot accuracy at an accuracy of 1/2, where they are largest.

    `few_shot_error` is None where no few-shot class has images. `thin` are the classes of 1 to MAX_THIN images.
    """

    num_scored: int
    num_classes: int
    error: float
    few_shot_error: float | None
    thin: tuple[int, ...]

    @property
    def half_width(self) -> float:
        """Half-width of a 95 % interval of balanced accuracy."""
        return Z95 * self.error

    def optimism(self, num_choices: int) -> float:
        """How much too good the best of so many equally good configurations looks, on average, if all err apart.

        The expected largest of as many normal errors [Blom 1958].
        """
        return self.error * NormalDist().inv_cdf((num_choices - 0.375) / (num_choices + 0.25))

    def intervals(self) -> str:
        """A sentence on the limits of accuracies over the split."""
        few = "" if self.few_shot_error is None else f", few-shot to ± {100 * Z95 * self.few_shot_error:.1f}"
        classes = f"{self.num_scored:,} of {pluralize(self.num_classes, 'class')}"
        return f"balanced accuracy over {classes} to ± {100 * self.half_width:.1f} points{few} (95 %, at worst)"

    def choices(self) -> str:
        """A sentence on the limits of a choice by the split."""
        small, large = (f"{100 * self.optimism(number):.1f}" for number in NUM_CHOICES)
        return (
            f"the best of {NUM_CHOICES[0]} equally good configurations looks up to {small} points better than it is, "
            f"of {NUM_CHOICES[1]} up to {large}"
        )


def split_powers(manifest: Manifest, split_seed: int) -> dict[str, SplitPower]:
    """The power of validation, official or held out from training, and of test, where they have images."""
    stats = manifest.class_stats()
    rows = {"val": train_val_rows(manifest, split_seed)[1], "test": manifest.rows_of("test")}
    return {split: split_power(manifest.labels[rows[split]], stats) for split in rows if len(rows[split])}


def split_power(labels: npt.NDArray[np.int64], stats: ClassStats) -> SplitPower:
    """The power of a split with labels (N,), N > 0."""
    counts = np.bincount(labels, minlength=stats.num_classes)
    few = counts[stats.shot_groups["few_shot"]]
    return SplitPower(
        num_scored=int((counts > 0).sum()),
        num_classes=stats.num_classes,
        error=_standard_error(counts),
        few_shot_error=_standard_error(few) if few.any() else None,
        thin=tuple(np.flatnonzero((counts > 0) & (counts <= MAX_THIN)).tolist()),
    )


def _standard_error(counts: npt.NDArray[np.int64]) -> float:
    present = counts[counts > 0]
    return float(np.sqrt((0.25 / present).sum()) / len(present))
