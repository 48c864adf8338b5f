"""A manifest that is built again after its data has grown: old rows keep their splits, and classes their numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.files.file_listing import file_states
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import content_groups, joined_groups, split_codes, split_column, with_column
from imbvlm.data.splits import hold_out_test_split

_MAX_SHOWN = 5


@dataclass(frozen=True)
class ManifestUpdate:
    """The new manifest, and the images that differ from the old one, by name.

    `changed` are files that were modified after the old manifest was written, `relabeled` those with another label.
    """

    manifest: Manifest
    added: tuple[str, ...]
    gone: tuple[str, ...]
    changed: tuple[str, ...]
    relabeled: tuple[str, ...]

    def describe(self) -> str:
        """A line for each kind of difference."""
        kinds = {
            "added": self.added,
            "gone": self.gone,
            "changed since": self.changed,
            "with another label": self.relabeled,
        }
        lines = [
            f"{pluralize(len(names), 'image')} {kind}: {join_limited(names, _MAX_SHOWN)}"
            for kind, names in kinds.items()
            if names
        ]
        return "\n".join(lines or ["no image is added, gone or changed"])


def update_manifest(
    old: Manifest, new: Manifest, *, written_ns: int | None = None, test_share: float | None = None, seed: int = 0
) -> ManifestUpdate:
    """Give the rows of a new manifest the splits and class numbers that an old one has.

    A row is the old one with its uri, or with its content where it is embedded. Copies of an old image, and images of
    an old group, go to that image's split. `test_share` is held out of the other added rows. `written_ns` is the time
    of the old manifest's file. Raises ImbvlmError for a tree whose classes have other numbers now.
    """
    class_names = tuple(dict.fromkeys((*old.class_names, *new.class_names)))
    if new.taxonomy is not None and class_names != new.class_names:
        raise ImbvlmError(
            "--taxonomy must be a CSV file with --update, got columns of a table. Write the tree as a CSV file."
        )
    number_of = {name: number for number, name in enumerate(class_names)}
    numbers = np.array([number_of[name] for name in new.class_names])
    labels = numbers[new.labels].astype(np.int32)
    old_rows, names = {name: row for row, name in enumerate(_row_names(old))}, _row_names(new)
    earlier = np.array([old_rows.get(name, -1) for name in names], dtype=np.int64)
    is_old = earlier >= 0
    splits = split_codes(new.table.column("split"))
    splits[is_old] = split_codes(old.table.column("split"))[earlier[is_old]]
    groups = joined_groups(new.table)
    units = content_groups(new.table) if groups is None else groups
    old_units, first = np.unique(units[is_old], return_index=True)
    places = np.minimum(np.searchsorted(old_units, units), max(len(old_units) - 1, 0))
    has_unit = old_units[places] == units if len(old_units) else np.zeros(len(units), dtype=np.bool_)
    splits[has_unit & ~is_old] = splits[is_old][first][places[has_unit & ~is_old]]
    free = np.flatnonzero(~has_unit)
    table = with_column(new.table, "label", pa.array(labels))
    if test_share is not None and len(free):
        rows = replace(new, table=table, class_names=class_names, split_counts=None).take(free)
        held_out = hold_out_test_split(rows, test_share, seed=seed)
        splits[free] = split_codes(held_out.table.column("split"))
    is_same = class_names == old.class_names
    manifest = replace(
        new,
        table=with_column(table, "split", split_column(splits)),
        class_names=class_names,
        split_counts=None,
        notes=tuple(dict.fromkeys((*old.notes, *new.notes))),
        label_map=None if new.label_map is None else {key: int(numbers[label]) for key, label in new.label_map.items()},
        taxonomy=new.taxonomy or (old.taxonomy if is_same else None),
    )
    has_other_label = is_old & (old.labels[np.maximum(earlier, 0)] != labels)
    return ManifestUpdate(
        manifest,
        added=tuple(names[row] for row in np.flatnonzero(~is_old)),
        gone=tuple(sorted(old_rows.keys() - set(names))),
        changed=_modified_after(names, np.flatnonzero(is_old).tolist(), new, written_ns),
        relabeled=tuple(names[row] for row in np.flatnonzero(has_other_label)),
    )


def modification_time(path: str) -> int | None:
    """The time of a local file in nanoseconds; None for an object or a missing file."""
    modified = int(file_states([path])[0, 1])
    return None if modified < 0 else modified


def _row_names(manifest: Manifest) -> list[str]:
    uris, contents = (manifest.table.column(name).to_pylist() for name in ("uri", "content"))
    embedded = manifest.table.column("bytes").is_valid().to_pylist()
    return [
        f"embedded image {content.hex()}" if has_bytes else uri
        for uri, content, has_bytes in zip(uris, contents, embedded, strict=True)
    ]


def _modified_after(names: list[str], rows: list[int], manifest: Manifest, written_ns: int | None) -> tuple[str, ...]:
    embedded = manifest.table.column("bytes").is_valid().to_pylist()
    files = [names[row] for row in rows if not embedded[row]]
    if written_ns is None:
        return ()
    times = file_states(files)[:, 1]
    return tuple(name for name, modified in zip(files, times.tolist(), strict=True) if modified > written_ns)
