"""Groups of images that no split divides, such as those of a camera: how they are dealt, and facts about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import SPLITS, Rows, joined_groups, seeded, split_codes


def deal_groups(labels: Rows, groups: Rows, shares: Sequence[float], seed: int) -> Rows:
    """The part (N,) of each row, whole groups together; -1 for groups that go to none.

    Each part gets about its share of every class and of all rows. No part gets all rows of a class, so that a model of
    the others knows every class; a group that no part may have goes to none. Large groups are dealt first, among those
    of similar size at random.
    """
    if not len(labels):
        return np.empty(0, dtype=np.int64)
    _, unit = np.unique(groups, return_inverse=True)
    num_units, num_classes = int(unit.max()) + 1, int(labels.max()) + 1
    pairs, counts = np.unique(unit * num_classes + labels, return_counts=True)
    pair_unit, pair_label = np.divmod(pairs, num_classes)
    # The last column is of all rows.
    totals = np.append(np.bincount(labels, minlength=num_classes), len(labels)).astype(np.float64)
    start = np.searchsorted(pair_unit, np.arange(num_units + 1))
    weight = np.bincount(pair_unit, counts / totals[pair_label])
    order = np.lexsort((seeded(seed).random(num_units), -np.floor(np.log2(weight))))
    targets = np.array([*shares, max(0.0, 1 - sum(shares))])[:, None]
    dealt = np.zeros((len(targets), num_classes + 1))
    parts = np.empty(num_units, dtype=np.int64)
    for index in order:
        own = slice(start[index], start[index + 1])
        columns = np.append(pair_label[own], num_classes)
        number = np.append(counts[own], counts[own].sum())
        total, present = totals[columns], dealt[:, columns]
        # The growth of the squared distance from each class's target, as chi-square weighs it.
        growth = (2 * (present - targets * total) * number + number**2) / total**2
        cost = growth.sum(1) / np.maximum(targets[:, 0], 1e-9)
        cost[:-1][(present + number >= total)[:-1].any(1)] = np.inf
        parts[index] = cost.argmin()
        dealt[parts[index], columns] += number
    return np.where(parts == len(shares), -1, parts)[unit]


@dataclass(frozen=True)
class GroupSummary:
    """Facts about a manifest's groups: images by name, and what splits, copies and classes make of them.

    `in_several_splits` and `joined` are ready for a text. `single_group_classes` are the ids of the classes whose
    training images are all of one group.
    """

    sizes: dict[str, int]
    num_without: int
    in_several_splits: tuple[str, ...]
    joined: tuple[str, ...]
    single_group_classes: Rows


def summarize_groups(manifest: Manifest) -> GroupSummary | None:
    """Facts about a manifest's groups; None where it has none."""
    groups = joined_groups(manifest.table)
    if groups is None:
        return None
    column = manifest.table.column("group")
    named = np.flatnonzero(column.is_valid().to_numpy())
    names, code, sizes = np.unique(column.drop_null().to_numpy(), return_inverse=True, return_counts=True)
    splits = split_codes(manifest.table.column("split"))
    train = manifest.rows_of("train")
    in_class = np.unique(np.stack([manifest.labels[train], groups[train]]), axis=1)[0]
    return GroupSummary(
        sizes=dict(zip(names.tolist(), sizes.tolist(), strict=True)),
        num_without=len(manifest) - len(named),
        in_several_splits=tuple(
            f"{names[members[0]]} ({'/'.join(SPLITS[split] for split in present)})"
            for members, present in _several(code, splits[named])
        ),
        joined=tuple(" + ".join(names[members]) for _, members in _several(groups[named], code)),
        single_group_classes=np.flatnonzero(np.bincount(in_class, minlength=len(manifest.class_names)) == 1),
    )


def _several(keys: npt.NDArray[np.integer], values: npt.NDArray[np.integer]) -> list[tuple[Rows, Rows]]:
    """The key, as often as it has values, and the values of each key that has two or more of them."""
    pairs = np.unique(np.stack([keys, values]), axis=1)
    _, first, number = np.unique(pairs[0], return_index=True, return_counts=True)
    parts = np.split(pairs, first[1:], axis=1)
    return [(part[0], part[1]) for part, size in zip(parts, number, strict=True) if size > 1]
