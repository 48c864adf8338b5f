"""Class names against the folders of the images that they name: one rule for manifests that are built and read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.manifest_schema import SPLITS, split_codes

_MOST_SHOWN = 5
# Enough to know a class's folders by: of millions of images all would take seconds.
_ROWS_PER_CLASS = 32


class FolderEvidence(NamedTuple):
    """What folders say of the class list: how many classes lie in a folder of their name, and which in another."""

    num_agreeing: int
    differing: Mapping[int, str]


def plain_name(name: str) -> str:
    """A class name for comparison: lower case, words separated by one space."""
    return " ".join(re.split(r"[\s_\-/,]+", name.strip().lower()))


def class_list_findings(table: pa.Table, class_names: Sequence[str]) -> list[str]:
    """What contradicts a list of class names: training images in folders of other names, or a name given twice.

    A name may stand twice where both classes have images, as in ImageNet. Names that have nothing to do with folders,
    such as WordNet's ids, contradict nothing, and neither do names without images.
    """
    findings = []
    differing = folder_evidence(table, class_names).differing
    if differing:
        shown = [
            f"{label} is {class_names[label]!r} in the class list, and its images lie in {folder!r}"
            for label, folder in differing.items()
        ]
        findings.append(
            f"the class list and the image folders disagree: {_lines(shown)}; list the classes in the "
            "order of their ids, by the names of their folders, or rename the folders"
        )
    places: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        places.setdefault(name, []).append(label)
    present = set(pc.unique(table.column("label")).to_pylist())
    twice = [
        f"{name!r} is {' and '.join(map(str, labels))}, and {bare[0]} has no image"
        for name, labels in places.items()
        if labels[1:] and (bare := [label for label in labels if label not in present])
    ]
    if twice:
        findings.append(f"the class list has a name twice: {_lines(twice)}; list each class once")
    return findings


def longer_list_findings(table: pa.Table, class_names: Sequence[str]) -> list[str]:
    """A list with more names than the labels can need, unless folders show that it names them in order.

    A heading or a line too many shifts all names, and nothing else would show it.
    """
    largest = pc.max(table.column("label")).as_py()
    if largest is None or largest + 1 >= len(class_names) or folder_evidence(table, class_names).num_agreeing:
        return []
    extra = join_limited([repr(name) for name in class_names[largest + 1 :]], _MOST_SHOWN)
    return [
        f"the class list has {pluralize(len(class_names), 'name')}, and the largest class id is {largest}: nothing "
        f"shows that no line is too many, as a heading is, before {extra}; leave out names without images at its end, "
        "or label images by name instead of id"
    ]


def repeated_findings(class_names: Sequence[str]) -> list[str]:
    """Names that a list for labels by name has twice: which of the two is meant can't be known."""
    twice = [repr(name) for name, number in Counter(class_names).items() if number > 1]
    return [f"the class list has a name twice: {join_limited(twice)}; list each class once"] if twice else []


def _lines(findings: Sequence[str]) -> str:
    more = len(findings) - _MOST_SHOWN
    return "; ".join(findings[:_MOST_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def folder_evidence(table: pa.Table, class_names: Sequence[str]) -> FolderEvidence:
    """Judge each class by those folders of its training images that hold no other class's.

    A class agrees where a folder above its images has its name. It differs where these folders have names of other
    classes; and, where most classes lie in folders that are called like classes, where its one folder's name has
    nothing to do with its own.
    """
    names = [plain_name(name) for name in class_names]
    folders = _own_folders(table, len(class_names))
    agreeing = {label for label, paths in folders.items() if any(names[label] in _plain(path) for path in paths)}
    others = set(names) - {names[label] for label in agreeing}
    differing, unlike = {}, {}
    for label in sorted(folders.keys() - agreeing):
        hits = [next((part for part in path if plain_name(part) in others), None) for path in folders[label]]
        if all(hits):
            differing[label] = str(hits[0])
        else:
            top = min(folders[label], key=len)
            is_one = all(path[: len(top)] == top for path in folders[label])
            if is_one and not any(_akin(names[label], part) for part in _plain(top)):
                unlike[label] = top[-1]
    if len(agreeing) + len(differing) >= max(1, len(unlike)):
        differing |= unlike
    return FolderEvidence(len(agreeing), dict(sorted(differing.items())))


def _own_folders(table: pa.Table, num_classes: int) -> dict[int, list[list[str]]]:
    """Folders by class, as their parts below the folder of all training images, where no other class has an image."""
    uris = table.column("uri")
    in_folder = pc.and_(table.column("bytes").is_null(), pc.fill_null(pc.match_substring(uris, "/"), False))
    rows = np.flatnonzero(in_folder.to_numpy() & (split_codes(table.column("split")) == SPLITS.index("train")))
    labels = table.column("label").to_numpy()[rows].astype(np.int64)
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=num_classes)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.sort(order[np.arange(len(order)) - starts < _ROWS_PER_CLASS])
    uris, labels = uris.take(pa.array(rows[chosen])), labels[chosen]
    folders = pc.replace_substring_regex(uris, r"/[^/]*$", "").combine_chunks().dictionary_encode()
    pairs = np.unique(folders.indices.to_numpy().astype(np.int64) * num_classes + labels)
    parts = [folder.split("/") for folder in folders.dictionary.to_pylist()]
    nothing: list[str] = []
    low, high = min(parts, default=nothing), max(parts, default=nothing)
    above = next((level for level, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    num_labels = np.bincount(pairs // num_classes, minlength=len(parts))
    own: dict[int, list[list[str]]] = {}
    for folder, label in zip((pairs // num_classes).tolist(), (pairs % num_classes).tolist(), strict=True):
        if num_labels[folder] == 1 and parts[folder][above:]:
            own.setdefault(label, []).append(parts[folder][above:])
    return own


def _plain(path: Sequence[str]) -> list[str]:
    return [plain_name(part) for part in path]


def _akin(name: str, other: str) -> bool:
    """Whether one is the other with more words, such as `golden retriever` and `00012 golden retriever`."""
    return f" {name} " in f" {other} " or f" {other} " in f" {name} "
