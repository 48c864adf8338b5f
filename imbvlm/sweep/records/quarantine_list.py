"""The images that could not be decoded, listed with path, reason, class and shot group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from imbvlm.base import storage
from imbvlm.base.csv_cells import csv_text, read_rows
from imbvlm.base.formatting import pluralize
from imbvlm.data.manifest import Manifest
from imbvlm.features.feature_set import FeatureSet

QUARANTINE_FILE = "quarantine.csv"
COLUMNS = ("split", "row", "path", "reason", "label", "class_name", "shot_group")


def quarantined_rows(manifest: Manifest, features: FeatureSet) -> list[dict[str, str | int]]:
    """One row per left-out image; `row` counts from 0 within its split."""
    stats = manifest.class_stats()
    rows: list[dict[str, str | int]] = []
    for split in features.splits:
        bad = features.store(split).quarantine
        numbers = manifest.rows_of(split)[[entry.row for entry in bad]].tolist() if bad else []
        uris = manifest.table.column("uri")
        for entry, number in zip(bad, numbers, strict=True):
            label = int(manifest.labels[number])
            values = (
                split,
                entry.row,
                uris[number].as_py() or f"embedded image {number}",
                entry.reason,
                label,
                manifest.class_names[label],
                stats.group_of(label),
            )
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_quarantine(folder: str, rows: Iterable[dict[str, str | int]]) -> str:
    """Write quarantine.csv into a sweep's folder and return its location."""
    uri = storage.join(folder, QUARANTINE_FILE)
    storage.write_bytes(uri, csv_text([COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]).encode())
    return uri


def read_quarantine(folder: str) -> tuple[dict[str, str], ...]:
    """The rows of a sweep's quarantine.csv; empty without the file."""
    uri = storage.join(folder, QUARANTINE_FILE)
    if not storage.exists(uri):
        return ()
    header, *rows = read_rows(storage.read_bytes(uri).decode()) or [[]]
    return tuple({**dict.fromkeys(COLUMNS, ""), **dict(zip(header, row, strict=False))} for row in rows)


def describe_quarantine(rows: list[dict[str, str | int]], uri: str) -> str:
    """A sentence with the numbers by shot group, the most common reason and the list's location."""
    groups = ", ".join(
        f"{count} {group.replace('_', '-')}" for group, count in Counter(str(row["shot_group"]) for row in rows).items()
    )
    reason, count = Counter(str(row["reason"]) for row in rows).most_common(1)[0]
    return (
        f"{pluralize(len(rows), 'image')} left out because decoding failed ({groups}); most often ({count}): {reason}. "
        f"List: {uri}"
    )
