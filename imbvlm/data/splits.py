"""Validation and test splits that are held out from the training images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.manifest_schema import SPLITS, Rows, with_column


def hold_out_test_split(manifest: Manifest, share: float, *, seed: int = 0) -> Manifest:
    """Make `share` of each class's training rows test rows: at least one of two, none of a class's only one.

    Which is drawn from `seed`; identical images stay on one side, files where `mark_duplicates` has compared them.
    Counts are those of what is left to train on. Raises ImbvlmError for a share outside (0, 1), ManifestError where
    there are test rows already.
    """
    if not 0 < share < 1:
        raise ImbvlmError(f"the test share is a part of each class's images between 0 and 1, and is {share:g}")
    known = len(manifest.rows_of("test"))
    if known:
        raise ManifestError(
            manifest.name, [f"it has a test split of {pluralize(known, 'image')}; leave --test-share out"]
        )
    rows = manifest.label_rows()
    counts = np.bincount(rows.labels[rows.rows_of("train")], minlength=len(manifest.class_names))
    wanted = np.where(counts > 1, np.clip(np.rint(share * counts), 1, counts - 1), 0).astype(np.int64)
    codes = rows.split_codes.copy()
    codes[rows.draw(wanted, seed)] = SPLITS.index("test")
    column = pa.array([SPLITS[code] for code in codes], manifest.table.schema.field("split").type)
    note = f"test split: {100 * share:g} % of each class's images, kept apart with seed {seed}"
    return replace(
        manifest, table=with_column(manifest.table, "split", column), split_counts=None, notes=(*manifest.notes, note)
    )


def carve_validation(manifest: Manifest, seed: int) -> Rows:
    """Manifest rows to take from training as validation (docs/protocol.md); empty where it has validation rows."""
    return manifest.label_rows().carve(seed)


def classes_without_validation(labels: npt.NDArray[np.int64], num_classes: int) -> Rows:
    """Ids of the classes without a row in `labels`, the validation rows: selection can't see them."""
    return np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
