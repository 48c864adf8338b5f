"""Manifests from folders with a class each, and from lists of `path label` lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from imbvlm import storage
from imbvlm.data.assembly import IMAGE_SUFFIXES, SPLIT_NAMES, assemble, folders_of
from imbvlm.data.listing import Found, list_tree
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.table import count_of, listed


def from_folders(root: str, name: str, *, class_names: Sequence[str] | None = None) -> Manifest:
    """One folder per class, or `train`, `val` and `test` folders of them; deeper folders belong to their class.

    Classes are numbered in the order of their folders' names, or as `class_names` lists those names. Without split
    folders every image is a training image. Raises ManifestError, StorageError.
    """
    root = storage.absolute(root)
    files = list_tree(root)
    images = [file for file in files if PurePosixPath(file.path).suffix.lower() in IMAGE_SUFFIXES]
    with_splits = _has_split_folders(images)
    depth = 2 if with_splits else 1
    kept = [(file, file.path.split("/")) for file in images if file.path.count("/") >= depth]
    if not kept:
        raise ManifestError(root, [f"no image lies in a folder of a class, such as {root}/CLASS/image.jpg"])
    labels = [parts[depth - 1] for _, parts in kept]
    names = class_names
    if names is None:
        names = sorted({*labels, *_empty_class_folders(root, with_splits)})
    return assemble(
        name,
        labels,
        [parts[0] if with_splits else "train" for _, parts in kept],
        uris=[storage.join(root, file.path) for file, _ in kept],
        class_names=names,
        notes=_left_out(files, images, len(kept)),
        source=root,
    )


def _has_split_folders(images: Sequence[Found]) -> bool:
    tops = {file.path.partition("/")[0].lower() for file in images if "/" in file.path}
    return bool(tops) and tops <= SPLIT_NAMES.keys()


def _empty_class_folders(root: str, with_splits: bool) -> set[str]:
    """Folders without images are classes too, without images; object stores have no empty folders."""
    if not storage.is_local(root):
        return set()
    base = storage.local_path(root)
    parents = [folder for folder in base.iterdir() if folder.is_dir()] if with_splits else [base]
    return {
        folder.name
        for parent in parents
        for folder in parent.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    }


def _left_out(files: Sequence[Found], images: Sequence[Found], num_kept: int) -> list[str]:
    notes = []
    suffixes = sorted({PurePosixPath(file.path).suffix.lower() or "no suffix" for file in set(files) - set(images)})
    if suffixes:
        notes.append(f"{count_of(len(files) - len(images), 'file')} left out by their suffix: {listed(suffixes)}")
    if len(images) > num_kept:
        notes.append(f"{count_of(len(images) - num_kept, 'image')} left out that lie in no class's folder")
    return notes


def from_lists(lists: Mapping[str, str], root: str, name: str, *, class_names: Sequence[str] | None = None) -> Manifest:
    """List files by split, each line a path below `root` and a class id (or a class name after a tab).

    Paths may have spaces. Raises ManifestError with every bad line, StorageError.
    """
    root = storage.absolute(root)
    paths: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    wrong: list[str] = []
    for split, path in lists.items():
        for number, line in enumerate(storage.read_bytes(path).decode("utf-8-sig").splitlines(), start=1):
            if not line.strip():
                continue
            file, label = _parse(line)
            if not file or not label:
                wrong.append(f"{path}:{number}: {line.strip()[:80]!r} is not a path and a label")
                continue
            paths.append(file)
            labels.append(label)
            splits.append(split)
    uris = [path if "://" in path or path.startswith("/") else storage.join(root, path) for path in paths]
    source = ", ".join(lists.values())
    findings = [*wrong[:20], *_and_more(wrong)]
    numbers, folders = None, {}
    if all(label.lstrip("-").isdigit() for label in labels):
        numbers = np.array([int(label) for label in labels], dtype=np.int64)
        train = np.array([SPLIT_NAMES.get(split.lower()) == "train" for split in splits], dtype=bool)
        folders = folders_of([path for path, use in zip(paths, train, strict=True) if use], numbers[train])
    try:
        made = assemble(
            name, labels if numbers is None else numbers, splits, uris=uris, class_names=class_names,
            folder_names=folders, source=source,
        )  # fmt: skip
    except ManifestError as error:
        raise ManifestError(source, [*findings, *error.findings]) from None
    if findings:
        raise ManifestError(source, findings)
    return made


def _parse(line: str) -> tuple[str, str]:
    if "\t" in line:
        path, _, label = line.rpartition("\t")
        return path.strip(), label.strip()
    path, _, label = line.strip().rpartition(" ")
    return path.strip(), label


def _and_more(wrong: Sequence[str], most: int = 20) -> list[str]:
    return [f"and {len(wrong) - most} more lines"] if len(wrong) > most else []
