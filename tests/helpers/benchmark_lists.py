"""Official lists of a benchmark, written at their sizes without images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def write_lists(
    folder: Path, prefix: str, sizes: Mapping[str, int], class_counts: np.ndarray, path_of: Callable[[str, int], str]
) -> None:
    counts = {"train": class_counts}
    for split in ("val", "test"):
        counts[split] = np.full(len(class_counts), sizes[split] // len(class_counts))
    for split, per_class in counts.items():
        labels = np.repeat(np.arange(len(class_counts)), per_class)
        lines = [f"{path_of(split, label)}/{row:08d}.jpg {label}" for row, label in enumerate(labels)]
        (folder / f"{prefix}_{split}.txt").write_text("\n".join(lines))


def spread(total: int, least: int, most: int, num_classes: int) -> np.ndarray:
    """Counts from `most` to `least` that sum to a total."""
    counts = np.full(num_classes, least)
    counts[0] = most
    rest = total - counts.sum()
    middle = counts[1:-1]
    middle += rest // len(middle)
    middle[: rest % len(middle)] += 1
    return counts
