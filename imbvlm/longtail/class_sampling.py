"""Class sampling: the rows of an epoch in their order, from seed and epoch alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.config.input_sections import ClassSampling

Rows = npt.NDArray[np.int64]
Expected = npt.NDArray[np.float64]

# p_j is proportional to n_j^q over the classes with rows [Kang et al. 2020].
_EXPONENTS = {"instance_balanced": 1.0, "square_root": 0.5, "class_balanced": 0.0}
# Separates these random numbers from others with the same seed.
_STREAM = 0x5A3D
# Remainders closer than this are equal up to rounding.
_TIE = 1e-9


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: rows (N,) of the training split in order, and the stored view (N,) of each."""

    rows: Rows
    views: Rows

    def __len__(self) -> int:
        return len(self.rows)


def sampled_counts(class_counts: npt.ArrayLike, class_sampling: ClassSampling, epoch: int, num_epochs: int) -> Expected:
    """Expected rows per class (C,) of an epoch (0-based), as many in total as `class_counts`. Raises ImbvlmError.

    progressively_balanced moves from instance- to class-balanced over the epochs [Kang et al. 2020].
    """
    if class_sampling not in get_args(ClassSampling):
        raise ImbvlmError(
            f"{class_sampling!r} is no class sampling; {suggest_name(class_sampling, get_args(ClassSampling))}"
        )
    if not 0 <= epoch < num_epochs:
        raise ImbvlmError(
            f"epoch must be from 0 to num_epochs - 1, got {epoch} of {num_epochs}. Raise num_epochs, or lower epoch."
        )
    counts = np.asarray(class_counts, dtype=np.float64)
    if class_sampling != "progressively_balanced":
        return _expected(counts, _EXPONENTS[class_sampling])
    progress = epoch / (num_epochs - 1) if num_epochs > 1 else 0.0
    return (1 - progress) * counts + progress * _expected(counts, 0.0)


def epoch_plan(
    labels: npt.ArrayLike,
    num_classes: int,
    class_sampling: ClassSampling,
    seed: int,
    epoch: int,
    num_epochs: int,
    num_views: int = 1,
) -> EpochPlan:
    """The rows of one epoch (0-based), as many as labels (N,), each class with its exact share. Raises ImbvlmError.

    Each row comes in one of its `num_views` views.

    Shares are rounded to whole rows by largest remainder. Within a class, no row comes twice before every other came
    once. The same (seed, epoch) gives the same plan; different ones give independent plans.
    """
    labels = _check_labels(labels, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    expected = sampled_counts(counts, class_sampling, epoch, num_epochs)
    rng = np.random.default_rng([_STREAM, epoch, seed])
    quotas = _whole_quotas(expected, len(labels), rng)
    rows = rng.permutation(_sample_rows(labels, counts, quotas, rng))
    return EpochPlan(rows, rng.integers(0, num_views, size=len(rows), dtype=np.int64))


def batches(plan: EpochPlan, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Rows]:
    """One worker's positions in the plan for each global batch: every world_size-th from the rank-th on.

    The global batches don't depend on the number of workers. All workers get equally many arrays; the last may be
    shorter, or empty. Use them as plan.rows[positions], plan.views[positions]. Raises ImbvlmError.
    """
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ImbvlmError(
            f"batch_size must be 1 or more and rank from 0 to world_size - 1, got {batch_size}, "
            f"{rank} of {world_size}. Give numbers in these ranges."
        )
    positions = np.arange(len(plan), dtype=np.int64)
    return [positions[start : start + batch_size][rank::world_size] for start in range(0, len(plan), batch_size)]


def _expected(counts: Expected, exponent: float) -> Expected:
    weights = np.where(counts > 0, np.power(np.maximum(counts, 1), exponent), 0.0)
    return counts.sum() * weights / max(weights.sum(), 1.0)


def _check_labels(labels: npt.ArrayLike, num_classes: int) -> Rows:
    array = np.asarray(labels)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ImbvlmError(
            f"labels must be whole numbers, one per row, got {array.dtype} of shape {array.shape}. "
            "Give a flat array of integers."
        )
    outside = array[(array < 0) | (array >= num_classes)]
    if outside.size:
        raise ImbvlmError(
            f"labels must be from 0 to {num_classes - 1}, got {outside[0]}. Raise num_classes, or correct the labels."
        )
    return array.astype(np.int64)


def _whole_quotas(expected: Expected, total: int, rng: np.random.Generator) -> Rows:
    """Whole numbers (C,) that sum to `total`, by largest remainder; ties are broken at random."""
    quotas = np.floor(expected + _TIE).astype(np.int64)
    remainders = np.round((expected - quotas) / _TIE)
    order = np.lexsort((rng.random(len(expected)), -remainders))
    quotas[order[: total - quotas.sum()]] += 1
    return quotas


def _sample_rows(labels: Rows, counts: Rows, quotas: Rows, rng: np.random.Generator) -> Rows:
    """Each class's quota of rows, grouped by class: all its rows in whole cycles, then distinct random ones."""
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    own_labels = labels[by_class]
    index_in_class = np.arange(len(labels)) - (np.cumsum(counts) - counts)[own_labels]
    cycles, rest = np.divmod(quotas, np.maximum(counts, 1))
    return np.repeat(by_class, cycles[own_labels] + (index_in_class < rest[own_labels])).astype(np.int64)
