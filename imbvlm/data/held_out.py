"""A test split for data that has none: a share of each class's training images is kept apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.table import SPLITS, count_of, with_column
from imbvlm.errors import ImbvlmError


def with_test_split(manifest: Manifest, share: float, *, seed: int = 0) -> Manifest:
    """Make `share` of each class's training rows test rows: at least one of two, none of a class's only one.

    Which is drawn from `seed`; identical images stay on one side, files where `with_copies` has compared them. Counts
    are those of what is left to train on. Raises ImbvlmError for a share outside (0, 1), ManifestError where there are
    test rows already.
    """
    if not 0 < share < 1:
        raise ImbvlmError(f"the test share is a part of each class's images between 0 and 1, and is {share:g}")
    known = len(manifest.rows_of("test"))
    if known:
        raise ManifestError(
            manifest.name, [f"it has a test split of {count_of(known, 'image')}; leave --test-share out"]
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
