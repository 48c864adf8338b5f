"""A manifest as text: classes, splits, shot groups, bytes, and the curve of counts as a plot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from imbvlm.base import storage
from imbvlm.base.errors import printable
from imbvlm.base.formatting import join_limited, pluralize, size_text
from imbvlm.data.files.byte_ranges import RANGE_MARK, parse_range
from imbvlm.data.files.file_listing import file_sizes
from imbvlm.data.groups import summarize_groups
from imbvlm.data.manifest import Manifest
from imbvlm.data.split_power import resolve_folds, split_powers, validation_rows
from imbvlm.data.splits import classes_without_validation
from imbvlm.longtail.class_stats import ClassStats

_PLOT_WIDTH, _PLOT_HEIGHT = 72, 10
_BLOCKS = " ▁▂▃▄▅▆▇█"


def summary(manifest: Manifest, *, split_seed: int = 0, num_examples: int = 3) -> str:
    """Lines of text; the last ones plot training images per class, sorted, on a log scale."""
    stats = manifest.class_stats()
    lines = [
        f"manifest          {manifest.name}",
        f"classes           {len(manifest.class_names):,}{'' if manifest.named else ' (without names)'}",
        *([] if manifest.taxonomy is None else [f"taxonomy          {manifest.taxonomy.describe()}"]),
        *_split_lines(manifest, split_seed),
        *_power_lines(manifest, split_seed),
        f"imbalance factor  {stats.imbalance_factor:,.1f} ({int(stats.counts.max()):,} to "
        f"{int(stats.counts[stats.counts > 0].min()):,} training images a class)",
        *_shot_group_lines(stats),
        *_group_lines(manifest),
        f"bytes             {_size_text(manifest)}",
        f"largest classes   {_examples(manifest, stats, -1, num_examples)}",
        f"smallest classes  {_examples(manifest, stats, 1, num_examples)}",
        *(f"note              {note}" for note in (*manifest.notes, *manifest.warnings)),
        "",
        *plot_counts(stats.counts),
    ]
    return "\n".join(map(printable, lines))


def summary_dict(manifest: Manifest, *, split_seed: int = 0) -> dict[str, Any]:
    """The same for JSON; bytes are None where a store can't be listed, standard errors at an accuracy of 1/2."""
    stats = manifest.class_stats()
    try:
        size: int | None = num_bytes(manifest)
    except storage.StorageError:
        size = None
    return {
        "name": manifest.name,
        "num_classes": stats.num_classes,
        "images": {split: len(manifest.rows_of(split)) for split in manifest.splits},
        "imbalance_factor": stats.imbalance_factor,
        "classes_by_shot_group": {group: len(labels) for group, labels in stats.shot_groups.items()},
        "class_names": list(manifest.class_names),
        "training_images": stats.counts.tolist(),
        "num_bytes": size,
        "standard_errors": {
            split: {"balanced_accuracy": power.error, "few_shot_accuracy": power.few_shot_error}
            for split, power in split_powers(manifest, split_seed).items()
        },
        "notes": [*manifest.notes, *manifest.warnings],
        **_groups_dict(manifest),
        **({} if manifest.taxonomy is None else {"taxonomy": manifest.taxonomy.to_dict()}),
    }


def _groups_dict(manifest: Manifest) -> dict[str, Any]:
    groups = summarize_groups(manifest)
    if groups is None:
        return {}
    return {
        "groups": {
            "images": groups.sizes,
            "in_several_splits": list(groups.in_several_splits),
            "single_group_classes": [manifest.class_names[label] for label in groups.single_group_classes],
        }
    }


def num_bytes(manifest: Manifest) -> int:
    """Size in bytes of all images: embedded ones, parts of files, files, and objects, whose sizes come from listings.

    A missing file counts 0. Raises StorageError where a store can't be listed.
    """
    embedded = pc.sum(pc.binary_length(manifest.table.column("bytes"))).as_py() or 0
    uris = manifest.table.column("uri").filter(manifest.table.column("bytes").is_null())
    in_parts = pc.match_substring(uris, RANGE_MARK)
    parts = sum(part.num_bytes for uri in uris.filter(in_parts).to_pylist() if (part := parse_range(uri)))
    whole = uris.filter(pc.invert(in_parts)).to_pylist()
    sizes = file_sizes(whole)
    return int(embedded + parts + sizes[sizes > 0].sum())


def _size_text(manifest: Manifest) -> str:
    try:
        return size_text(num_bytes(manifest))
    except storage.StorageError as error:
        return f"not known: {error}"


def _split_lines(manifest: Manifest, split_seed: int) -> list[str]:
    lines = [f"{split:17} {len(manifest.rows_of(split)):,} images" for split in manifest.splits]
    if "val" in manifest.splits:
        return lines
    num_folds = resolve_folds(None, manifest, split_seed)
    scored = validation_rows(manifest, split_seed, num_folds)
    lost = classes_without_validation(manifest.labels[scored], len(manifest.class_names))
    note = f"{'val':17} none; {len(scored):,} training images will be held out (seed {split_seed})"
    if num_folds > 1:
        note = f"{'val':17} none; {num_folds} folds of the training images score trials, on {len(scored):,} images"
    return [*lines, f"{note}, {pluralize(len(lost), 'class')} without any" if len(lost) else note]


def _power_lines(manifest: Manifest, split_seed: int) -> list[str]:
    lines = []
    for split, power in split_powers(manifest, split_seed).items():
        lines.append(f"{f'{split} decides':17} {power.intervals()}")
        if split == "val":
            lines.append(f"{'':17} {power.choices()}")
    return lines


def _group_lines(manifest: Manifest) -> list[str]:
    groups = summarize_groups(manifest)
    if groups is None:
        return []
    sizes = groups.sizes.values()
    lines = [f"{'groups':17} {len(sizes):,} of {min(sizes):,} to {max(sizes):,} images"]
    if groups.in_several_splits:
        number, names = len(groups.in_several_splits), join_limited(groups.in_several_splits, 5)
        lines.append(f"{'':17} {number:,} on both sides of a split: {names}")
    if len(groups.single_group_classes):
        lines.append(f"{'':17} {pluralize(len(groups.single_group_classes), 'class')} in a single group")
    return lines


def _shot_group_lines(stats: ClassStats) -> list[str]:
    groups = stats.shot_groups.items()
    return [f"{group:17} {pluralize(len(labels), 'class')}" for group, labels in groups if len(labels)]


def _examples(manifest: Manifest, stats: ClassStats, direction: int, number: int) -> str:
    order = np.argsort(direction * stats.counts, kind="stable")[:number]
    return ", ".join(f"{manifest.class_names[label]} ({stats.counts[label]:,})" for label in order)


def plot_counts(counts: npt.NDArray[np.int64]) -> list[str]:
    """Counts (C,) from head to tail as lines of block characters; heights on a log scale from 1."""
    ordered = np.sort(counts)[::-1]
    width = min(_PLOT_WIDTH, len(ordered))
    edges = np.linspace(0, len(ordered), width + 1).astype(int)
    means = np.add.reduceat(ordered, edges[:-1]) / np.diff(edges)
    means = means.repeat(max(1, _PLOT_WIDTH // width))
    top = float(np.log1p(ordered.max()))
    levels = np.rint(np.log1p(means) / max(top, 1e-9) * _PLOT_HEIGHT * 8).astype(int)
    lines = []
    for row in range(_PLOT_HEIGHT, 0, -1):
        filled = np.clip(levels - (row - 1) * 8, 0, 8)
        label = f"{round(np.expm1(top * row / _PLOT_HEIGHT)):>9,} "
        lines.append(label + "".join(_BLOCKS[level] for level in filled).rstrip())
    return [*lines, " " * 10 + _axis(len(ordered), len(means))]


def _axis(num_classes: int, width: int) -> str:
    right = f"{num_classes:,} classes"
    return right if len(right) + 2 > width else "1" + right.rjust(width - 1)
