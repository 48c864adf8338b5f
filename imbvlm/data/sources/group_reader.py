"""Gives each image its group: from a column, out of its path by a regular expression, or from its EXIF data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from typing import Any

import pyarrow as pa
from PIL import ExifTags

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.base.formatting import pluralize
from imbvlm.data.images.decoding import ImageError, exif_fields, fetch
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import SCHEMA, with_column

_EXIF = "exif:"
_NO_FIELD = "Their EXIF data lack it or can't be read: take groups from the paths or a table."
_NO_GROUP = "Give another column or expression."
# How tables write that there is no value.
_NO_VALUES = frozenset(("nan", "none", "null", "na", "n/a"))
_THREADS = 16


def _serial(fields: Mapping[int, Any]) -> str:
    return str(fields.get(ExifTags.Base.BodySerialNumber, "")).strip("\0 ")


def _day(fields: Mapping[int, Any]) -> str:
    match = re.match(r"(\d{4}):(\d\d):(\d\d)", str(fields.get(ExifTags.Base.DateTimeOriginal, "")))
    try:
        return date(*map(int, match.groups())).isoformat() if match else ""
    except ValueError:
        # Cameras without a clock write zeros.
        return ""


EXIF_FIELDS: Mapping[str, Callable[[Mapping[int, Any]], str]] = {"serial": _serial, "day": _day}


def with_groups(manifest: Manifest, names: Sequence[str | None], option: str, fix: str = _NO_GROUP) -> Manifest:
    """The manifest with a group for each row; a blank name is none, and the row then is a group of its own.

    `option` is what the user wrote, and `fix` what to do where no row has a group. Raises ImbvlmError for that, and
    where all have the same.
    """
    groups = [name.strip() or None if name else None for name in names]
    num_images = Counter(group for group in groups if group is not None)
    if not num_images:
        uri = next(filter(None, manifest.table.column("uri").to_pylist()), "without a path")
        raise ImbvlmError(
            f"{option} must name the groups of images, and names none of {pluralize(len(groups), 'image')}, such as "
            f"{uri}. {fix}"
        )
    if len(num_images) == 1:
        raise ImbvlmError(
            f"{option} must name two or more groups, and names only {next(iter(num_images))!r}. Give a column or "
            "expression that tells groups apart."
        )
    num_without = len(groups) - num_images.total()
    rest = f"; {pluralize(num_without, 'image')} without one, each a group of its own" if num_without else ""
    notes = [f"{len(num_images):,} groups that no split divides, by {option}{rest}"]
    if max(num_images.values()) == 1:
        notes.append(
            "each group has a single image, so that groups keep nothing together: look at what tells them apart"
        )
    notes += [
        f"{pluralize(num_images[name], 'image')} of the group {name!r}; leave the cell empty if it means no group"
        for name in sorted(num_images)
        if name.lower() in _NO_VALUES
    ]
    column = pa.array(groups, SCHEMA.field("group").type)
    return replace(manifest, table=with_column(manifest.table, "group", column), notes=(*manifest.notes, *notes))


def with_groups_from(manifest: Manifest, source: str, root: str) -> Manifest:
    """The manifest with the group of each row by `exif:serial`, `exif:day`, or a regular expression.

    The expression is searched in the paths below `root`, and what its parentheses capture, joined by slashes, is the
    group's name. Raises ImbvlmError for a wrong source and as `with_groups`, StorageError where a store doesn't answer.
    """
    option = f"--group-from {source}"
    if source.startswith(_EXIF):
        return with_groups(manifest, _from_exif(manifest, source.removeprefix(_EXIF)), option, _NO_FIELD)
    return with_groups(manifest, _from_paths(manifest, source, root), option)


def _from_paths(manifest: Manifest, source: str, root: str) -> list[str | None]:
    try:
        pattern = re.compile(source)
    except (re.error, OverflowError, RecursionError) as error:
        raise ImbvlmError(
            f"--group-from must be a regular expression, got {source[:200]!r} ({error}). "
            "Write one such as '(cam[0-9]+)/'."
        ) from None
    if not pattern.groups:
        raise ImbvlmError(
            f"--group-from must have parentheses around the group's name, got {source!r}. Write one such as "
            "'(cam[0-9]+)/'."
        )
    folder = f"{storage.absolute(root).rstrip('/')}/"
    matches = [pattern.search((uri or "").removeprefix(folder)) for uri in manifest.table.column("uri").to_pylist()]
    return [match and "/".join(filter(None, match.groups())) for match in matches]


def _from_exif(manifest: Manifest, field: str) -> list[str | None]:
    if field not in EXIF_FIELDS:
        raise ImbvlmError(
            f"--group-from reads {' or '.join(_EXIF + name for name in EXIF_FIELDS)}, got '{_EXIF}{field}'; "
            f"{suggest_name(field, EXIF_FIELDS)}"
        )
    uris, data = manifest.table.column("uri"), manifest.table.column("bytes")

    def read(row: int) -> str:
        try:
            return EXIF_FIELDS[field](exif_fields(fetch(uris[row].as_py(), data[row].as_py())))
        except ImageError:
            return ""

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, range(len(manifest))))
