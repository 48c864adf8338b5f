"""Checks class names against the folders of their images, for manifests that are built and read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imbvlm.base.formatting import join_limited, limited, pluralize
from imbvlm.data.manifest_schema import SPLITS, split_codes

_MAX_SHOWN = 5
# Images of a class whose folders are compared: those of millions of images would take seconds.
_ROWS_PER_CLASS = 32


class FolderEvidence(NamedTuple):
    """Number of classes in folders of their name, and the folder of each class that lies in another one."""

    num_agreeing: int
    differing: Mapping[int, str]


def plain_name(name: str) -> str:
    """A class name for comparison: lower case, words separated by one space."""
    return " ".join(re.split(r"[\s_\-/,]+", name.strip().lower()))


def class_list_findings(table: pa.Table, class_names: Sequence[str]) -> list[str]:
    """Contradictions of a list of class names: training images in folders of other names, or a name given twice.

    Two classes with images may share a name, as in ImageNet. Names unrelated to folders, such as for WordNet's ids, and
    names without images contradict nothing.
    """
    findings = []
    differing = folder_evidence(table, class_names).differing
    if differing:
        shown = [
            f"{label} is {class_names[label]!r} in the class list, and its images lie in {folder!r}"
            for label, folder in differing.items()
        ]
        findings.append(
            f"the class list and the image folders disagree: {_join_lines(shown)}; list the classes in the "
            "order of their ids, by the names of their folders, or rename the folders"
        )
    labels_of: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        labels_of.setdefault(name, []).append(label)
    present = set(pc.unique(table.column("label")).to_pylist())
    repeated = [
        f"{name!r} is {' and '.join(map(str, labels))}, and {empty[0]} has no image"
        for name, labels in labels_of.items()
        if labels[1:] and (empty := [label for label in labels if label not in present])
    ]
    if repeated:
        findings.append(f"the class list has a name twice: {_join_lines(repeated)}; list each class once")
    return findings


def longer_list_findings(table: pa.Table, class_names: Sequence[str]) -> list[str]:
    """A finding for a list with more names than labels, unless folders show that its order is right.

    A heading or an extra line shifts all names, which nothing else would show.
    """
    largest = pc.max(table.column("label")).as_py()
    if largest is None or largest + 1 >= len(class_names) or folder_evidence(table, class_names).num_agreeing:
        return []
    extra = join_limited([repr(name) for name in class_names[largest + 1 :]], _MAX_SHOWN)
    return [
        f"the class list has {pluralize(len(class_names), 'name')}, and the largest class id is {largest}: nothing "
        f"shows that no line is too many, as a heading is, before {extra}; leave out names without images at its end, "
        "or label images by name instead of id"
    ]


def repeated_findings(class_names: Sequence[str]) -> list[str]:
    """A finding for names that appear twice in a list for labels by name, which are ambiguous."""
    repeated = [repr(name) for name, number in Counter(class_names).items() if number > 1]
    return [f"the class list has a name twice: {join_limited(repeated)}; list each class once"] if repeated else []


def _join_lines(findings: Sequence[str]) -> str:
    return "; ".join(limited(findings, _MAX_SHOWN))


def folder_evidence(table: pa.Table, class_names: Sequence[str]) -> FolderEvidence:
    """Compare each class with those folders of its training images that hold no other class.

    A class agrees if a folder above its images has its name. It differs if these folders have the names of other
    classes. If most classes lie in folders with names of classes, it also differs if its only folder's name is
    unrelated to its own.
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
            has_one_folder = all(path[: len(top)] == top for path in folders[label])
            if has_one_folder and not any(_is_related(names[label], part) for part in _plain(top)):
                unlike[label] = top[-1]
    if len(agreeing) + len(differing) >= max(1, len(unlike)):
        differing |= unlike
    return FolderEvidence(len(agreeing), dict(sorted(differing.items())))


def _own_folders(table: pa.Table, num_classes: int) -> dict[int, list[list[str]]]:
    """Folders that hold images of one class only, by class, as their parts below the folder of all training images."""
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


def _is_related(name: str, other: str) -> bool:
    """Whether a name contains the other as words, such as `golden retriever` and `00012 golden retriever`."""
    return f" {name} " in f" {other} " or f" {other} " in f" {name} "
