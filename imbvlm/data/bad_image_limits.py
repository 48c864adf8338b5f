"""Limits on the images that can't be used, above which a run stops."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.manifest import Manifest
from imbvlm.data.splits import lost_classes

MAX_NAMED = 5


def bad_image_findings(
    manifest: Manifest, split: str, bad: Mapping[int, str], *, max_images: int | None, max_share: float
) -> list[str]:
    """Sentences about the limits that a split's bad images exceed; `bad` maps row in the split to reason.

    `max_share` is a fraction of the split's images. A class that would lose all training images exceeds any limit.
    """
    if not bad:
        return []
    rows = manifest.split(split)
    number = pluralize(len(bad), "image")
    examples = join_limited([f"{_name(rows, row)} ({bad[row]})" for row in sorted(bad)], MAX_NAMED)
    findings = []
    if max_images is not None and len(bad) > max_images:
        findings.append(f"{number} of {split} can't be used, above data.max_bad_images {max_images:,}: {examples}")
    if len(bad) > max_share * len(rows):
        share = f"{len(bad) / len(rows):.1%} of {len(rows):,}"
        findings.append(
            f"{number} of {split} can't be used, {share}, above data.max_bad_share {max_share:g}: {examples}"
        )
    if split == "train":
        findings += _lost_classes(rows, bad)
    return findings


def _lost_classes(rows: Manifest, bad: Mapping[int, str]) -> list[str]:
    ok = np.ones(len(rows), dtype=bool)
    ok[list(bad)] = False
    counts = np.bincount(rows.labels)
    lost = [f"{rows.class_names[label]!r} ({counts[label]})" for label in lost_classes(rows.labels, ok)]
    return [f"{pluralize(len(lost), 'class')} would lose every training image: {join_limited(lost)}"] if lost else []


def _name(rows: Manifest, row: int) -> str:
    return rows.table.column("uri")[row].as_py() or f"row {row}"
