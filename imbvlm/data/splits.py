"""Validation and test splits that are held out from the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imbvlm.base.errors import ImbvlmError, suggest_names
from imbvlm.base.formatting import pluralize
from imbvlm.data.groups import deal_groups
from imbvlm.data.manifest import LabelRows, Manifest, ManifestError
from imbvlm.data.manifest_schema import SPLITS, Rows, seeded, split_codes, split_column, with_column

# Validation images of a class with n training images, from MIN_CLASS_SIZE on: min(MAX_VALIDATION, n // MIN_CLASS_SIZE)
# (docs/protocol.md, Splits, counts, selection).
MIN_CLASS_SIZE = 5
MAX_VALIDATION = 3


def hold_out_test_split(manifest: Manifest, share: float, *, seed: int = 0) -> Manifest:
    """Make `share` of each class's training rows test rows: at least one of two, none of a class's only one.

    `seed` selects the rows. Identical images stay on one side; for files `mark_duplicates` must have compared them.
    Groups stay whole, validation rows as well, and every class keeps a group; the share is met as closely as they
    allow. Counts are those of the remaining training rows. Raises ImbvlmError for a share outside (0, 1), ManifestError
    for a manifest with test rows, or whose groups can't be divided so.
    """
    if not 0 < share < 1:
        raise ImbvlmError(f"the test share must be between 0 and 1, got {share:g}. Give a part of each class's images.")
    num_existing = len(manifest.rows_of("test"))
    if num_existing:
        raise ManifestError(
            manifest.name, [f"it has a test split of {pluralize(num_existing, 'image')}. Leave --test-share out."]
        )
    rows = manifest.label_rows()
    train = rows.rows_of("train")
    if rows.groups is None:
        counts = np.bincount(rows.labels[train], minlength=len(manifest.class_names))
        quota = np.where(counts > 1, np.clip(np.rint(share * counts), 1, counts - 1), 0).astype(np.int64)
        is_test = np.isin(np.arange(len(manifest)), draw_rows(rows, quota, seed))
        note = f"test split: {100 * share:g} % of each class's images, held out with seed {seed}"
        return _with_test(manifest, is_test, note)
    parts = deal_groups(rows.labels[train], rows.groups[train], [share], seed)
    is_test = np.isin(rows.groups, rows.groups[train[parts == 0]])
    if not is_test.any():
        raise ManifestError(
            manifest.name,
            [
                f"no group can be held out as {100 * share:g} % of the images: each is larger, or holds all images of "
                "a class. Give a larger share, or choose the groups by --test-groups."
            ],
        )
    percent = f"{100 * is_test.mean():.0f} % of the images"
    return _with_test(manifest, is_test, f"test split: whole groups with {percent}, held out with seed {seed}")


def hold_out_test_groups(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """Make exactly the rows of these groups the test split; test rows of other groups become training rows.

    Where a single group is left for training, validation has to divide it: the manifest then has no groups, and a note.
    Raises ImbvlmError for a name that is no group, ManifestError where no training rows are left.
    """
    groups = manifest.table.column("group")
    existing = groups.unique().drop_null().to_pylist()
    unknown = [name for name in dict.fromkeys(names) if name not in existing]
    if unknown:
        clauses = "; ".join(suggest_names(unknown, existing))
        raise ImbvlmError(f"--test-groups takes names of groups, and these are none. Correct or remove them: {clauses}")
    is_test = pc.is_in(groups, value_set=pa.array(names, groups.type)).to_numpy()
    number, percent = pluralize(len(set(names)), "group"), f"{100 * is_test.mean():.0f} % of the images"
    if not (~is_test & (split_codes(manifest.table.column("split")) != SPLITS.index("val"))).any():
        raise ManifestError(manifest.name, ["--test-groups leaves no training image. Leave a group out of it."])
    divided = _with_test(manifest, is_test, f"test split: {number} by --test-groups, {percent}")
    remaining = groups.take(pa.array(divided.rows_of("train"))).unique().to_pylist()
    if len(remaining) > 1 or remaining == [None]:
        return divided
    column = pa.nulls(len(divided), groups.type)
    note = f"all training images are of the group {remaining[0]!r}, so that validation divides it"
    return replace(divided, table=with_column(divided.table, "group", column), notes=(*divided.notes, note))


def _with_test(manifest: Manifest, is_test: npt.NDArray[np.bool_], note: str) -> Manifest:
    """The manifest with these rows as its test split, and with its former test rows as training rows."""
    splits = split_codes(manifest.table.column("split"))
    splits[splits == SPLITS.index("test")] = SPLITS.index("train")
    splits[is_test] = SPLITS.index("test")
    return replace(
        manifest,
        table=with_column(manifest.table, "split", split_column(splits)),
        split_counts=None,
        notes=(*manifest.notes, note),
    )


def train_val_rows(manifest: Manifest, seed: int) -> tuple[Rows, Rows]:
    """Manifest row numbers that a trial trains on, and those of its validation: the official split, or held out."""
    train, val = manifest.rows_of("train"), manifest.rows_of("val")
    if len(val):
        return train, val
    held_out = carve_validation(manifest.label_rows(), seed)
    return np.setdiff1d(train, held_out, assume_unique=True), held_out


def carve_validation(rows: LabelRows, seed: int) -> Rows:
    """Manifest row numbers to hold out from training as validation; empty for a manifest with validation rows.

    Of groups, it is whole ones with about 1 / MIN_CLASS_SIZE of the rows.
    """
    train = rows.rows_of("train")
    if len(rows.rows_of("val")):
        return np.empty(0, dtype=np.int64)
    if rows.groups is not None:
        shares = [1 / MIN_CLASS_SIZE] * MIN_CLASS_SIZE
        parts = deal_groups(rows.labels[train], rows.groups[train], shares, seed)
        sizes = np.bincount(parts[parts >= 0], minlength=1)
        return train[parts == np.abs(sizes - len(train) / MIN_CLASS_SIZE).argmin()]
    counts = np.bincount(rows.labels[train], minlength=len(rows.class_names))
    quota = np.where(counts >= MIN_CLASS_SIZE, np.minimum(MAX_VALIDATION, counts // MIN_CLASS_SIZE), 0)
    return draw_rows(rows, quota, seed)


def draw_rows(rows: LabelRows, quota: npt.NDArray[np.int64], seed: int) -> Rows:
    """Manifest row numbers of `quota` (C,) random training images of each class, or fewer.

    Takes all copies of an image or none, and none that several classes share.
    """
    train = rows.rows_of("train")
    labels = rows.labels[train]
    _, group, size = np.unique(rows.copies[train], return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    first = np.concatenate([[0], np.cumsum(size)[:-1]]) if len(size) else np.empty(0, dtype=np.int64)
    grouped_labels = labels[order]
    has_one_class = np.minimum.reduceat(grouped_labels, first) == np.maximum.reduceat(grouped_labels, first)
    group_label = grouped_labels[first]
    # Small groups come first, so that a class of mostly single images never fails to fill its quota.
    ranked = np.lexsort((seeded(seed).random(len(size)), size, group_label))
    ranked = ranked[has_one_class[ranked]]
    total = np.cumsum(size[ranked])
    class_start = np.searchsorted(group_label[ranked], group_label[ranked], side="left")
    size_in_class = total - np.concatenate([[0], total])[class_start]
    is_drawn = np.zeros(len(size), dtype=bool)
    is_drawn[ranked[size_in_class <= quota[group_label[ranked]]]] = True
    return train[np.flatnonzero(is_drawn[group])]


def classes_without_validation(labels: npt.NDArray[np.int64], num_classes: int) -> Rows:
    """Ids of the classes without a row in `labels`, the validation rows: no selection counts them."""
    return np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)


def lost_classes(labels: npt.NDArray[np.int64], ok: npt.NDArray[np.bool_]) -> Rows:
    """Ids of the classes that have rows in `labels` (N,), but none whose image is `ok` (N,)."""
    before = np.bincount(labels)
    return np.flatnonzero((before > 0) & (np.bincount(labels[ok], minlength=len(before)) == 0))
