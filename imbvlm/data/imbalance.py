"""Long-tailed subsets of a balanced data set: how many training images each class keeps, and which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.manifest_schema import seeded

SHAPES = ("exponential", "pareto")


def imbalanced_counts(
    num_classes: int, largest: int, imbalance_factor: float, shape: str = "exponential"
) -> npt.NDArray[np.int64]:
    """Images per class from head to tail (C,): `largest` down to `largest / imbalance_factor`.

    exponential: largest x factor^(-i / (C - 1)) [Cao et al. 2019]. pareto: largest x (i + 1)^-p, with p such that the
    last class has largest / factor. Raises ImbvlmError for a factor below 1, an unknown shape, or an empty last class.
    """
    if imbalance_factor < 1:
        raise ImbvlmError(
            "the imbalance factor, largest over smallest class, must be 1 or more, got "
            f"{imbalance_factor}. Give one such as 100."
        )
    if shape not in SHAPES:
        raise ImbvlmError(f"--tail-shape must be one of two, got {shape!r}; {suggest_name(shape, SHAPES)}")
    if largest / imbalance_factor < 0.5:
        raise ImbvlmError(
            f"an imbalance factor of {imbalance_factor:g} leaves the last class without images. The largest class has "
            f"{largest:,}, so give {2 * largest:,} at most."
        )
    rank = np.arange(num_classes)
    if shape == "exponential":
        shares = imbalance_factor ** (-rank / max(1, num_classes - 1))
    else:
        shares = (rank + 1.0) ** (-np.log(imbalance_factor) / np.log(max(2, num_classes)))
    return np.maximum(1, np.rint(largest * shares)).astype(np.int64)


def make_imbalanced(
    manifest: Manifest,
    imbalance_factor: float,
    *,
    shape: str = "exponential",
    class_order: Sequence[str] | None = None,
    seed: int = 0,
) -> Manifest:
    """Keep a long-tailed subset of the training rows; validation and test rows stay.

    Classes go from head to tail in `class_order`, by default in random order. `seed` selects the order and the rows.
    Raises ManifestError where a class has too few images for its rank, or the order has other classes.
    """
    names = manifest.class_names
    rng = seeded(seed)
    order = rng.permutation(len(names)) if class_order is None else _order(names, class_order)
    rows = manifest.rows_of("train")
    labels = manifest.labels[rows]
    available = np.bincount(labels, minlength=len(names))
    wanted = np.empty(len(names), dtype=np.int64)
    wanted[order] = imbalanced_counts(len(names), int(available.max()), imbalance_factor, shape)
    too_small = np.flatnonzero(available < wanted)
    if len(too_small):
        problems = [
            f"{names[label]!r} has {available[label]} training images, and its rank in the tail needs {wanted[label]}; "
            "put it later in --class-order, or lower --imbalance-factor"
            for label in too_small
        ]
        raise ManifestError(manifest.name, problems)
    ranked = np.lexsort((rng.random(len(rows)), labels))
    starts = np.concatenate([[0], np.cumsum(available)[:-1]])
    position = np.empty(len(rows), dtype=np.int64)
    position[ranked] = np.arange(len(rows)) - starts[labels[ranked]]
    dropped = rows[position >= wanted[labels]]
    retained = np.setdiff1d(np.arange(len(manifest)), dropped, assume_unique=True)
    note = f"made long-tailed: imbalance factor {imbalance_factor:g}, {shape}, seed {seed}"
    return replace(manifest.take(retained), split_counts=tuple(wanted.tolist()), notes=(*manifest.notes, note))


def _order(names: Sequence[str], class_order: Sequence[str]) -> npt.NDArray[np.int64]:
    if sorted(names) != sorted(class_order) or len(set(names)) != len(names):
        missing = sorted(set(names) - set(class_order))
        unknown = sorted(set(class_order) - set(names))
        raise ManifestError(
            "the class order",
            [
                *(f"{name!r} is not in it; add it" for name in missing[:10]),
                *(f"{name!r} is no class; {suggest_name(name, names)}" for name in unknown[:10]),
            ]
            or ["it must name each class once, and class names must differ"],
        )
    number = {name: label for label, name in enumerate(names)}
    return np.array([number[name] for name in class_order])
