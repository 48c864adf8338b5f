"""Builds manifests from folders with a class each, and from lists of `path label` lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from imbvlm.base import storage
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.files.file_listing import IMAGE_SUFFIXES, ListedFile, is_hidden, list_tree, printable_path
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.sources.manifest_builder import SPLIT_NAMES, assemble, below_root, class_id, folders_of, read_lines

# Bad lines of a list that an error shows.
MAX_LINES = 20


def from_folders(root: str, name: str, *, class_names: Sequence[str] | None = None) -> Manifest:
    """Build a manifest from a folder per class, or from `train`, `val` and `test` folders of them.

    Deeper folders belong to their class. Classes are numbered in the order of their folders' names, or as `class_names`
    lists those names. Without split folders every image is a training image. Other folders next to split folders are
    left out, with a note. Raises ManifestError, StorageError.
    """
    root = storage.absolute(root)
    listed = list_tree(root)
    # A manifest's paths are UTF-8.
    unreadable = [file for file in listed if not _is_text(f"{root}/{file.path}")]
    files = sorted(set(listed) - set(unreadable)) if unreadable else listed
    images = [file for file in files if PurePosixPath(file.path).suffix.lower() in IMAGE_SUFFIXES]
    paths = [file.path.split("/") for file in images]
    splits, others = _top_folders(root, paths, class_names)
    depth = 2 if splits else 1
    selected = [parts for parts in paths if len(parts) > depth and parts[0] not in others]
    broken = [file.path for file in files if file.num_bytes < 0]
    notes = [
        *_unreadable(root, unreadable),
        *_broken(broken, {file.path for file in images}),
        *_left_out([file for file in files if file.num_bytes >= 0], images),
        *_outside(paths, len(selected), others),
    ]
    if not selected:
        raise ManifestError(
            root,
            [
                f"no image lies in a folder of a class, such as {root}/CLASS/image.jpg; "
                "name the folder above those of the classes",
                *notes,
            ],
        )
    labels = [parts[depth - 1] for parts in selected]
    if class_names is None and all(len(parts) > depth + 1 for parts in selected) and len(set(labels)) == 1:
        raise ManifestError(root, [_one_level_too_high(root, labels[0], selected, depth), *notes])
    names = class_names
    if names is None:
        names = sorted({*labels, *_empty_class_folders(root, set(broken), with_splits=bool(splits))})
    return assemble(
        name,
        labels,
        [parts[0] if splits else "train" for parts in selected],
        uris=[storage.join(root, *parts) for parts in selected],
        class_names=names,
        notes=notes,
        source=root,
    )


def _one_level_too_high(root: str, label: str, paths: Sequence[Sequence[str]], depth: int) -> str:
    deeper = join_limited(sorted({parts[depth] for parts in paths}))
    fix = f"did you mean {storage.join(root, label)}?" if depth == 1 else f"move them to where {label}/ is"
    return f"all images are of one class, {label}, and lie in folders of it ({deeper}); if those are the classes, {fix}"


def _top_folders(
    root: str, paths: Sequence[Sequence[str]], class_names: Sequence[str] | None
) -> tuple[set[str], set[str]]:
    """Top folders with images that are splits, and further ones that are neither splits nor classes.

    Both are empty where the top folders are the classes. Raises ManifestError where that is ambiguous.
    """
    tops = {parts[0] for parts in paths if len(parts) > 1}
    named = {top for top in tops if top.lower() in SPLIT_NAMES}
    others = tops - named
    if not others:
        return named, set()
    # A class may be called train; it has images then, not folders. With two names of splits, other folders (unlabeled/,
    # Meta/) are no classes. A single such name may be a class with folders of its own.
    with_folders = {parts[0] for parts in paths if len(parts) > 2} & named
    if not with_folders or tops <= set(class_names or ()):
        return set(), set()
    if "train" in map(_split_of, with_folders) and len(set(map(_split_of, named))) > 1:
        return named, others
    raise ManifestError(
        root,
        [
            f"{min(with_folders)}/ is named like a split and has folders, and next to it are "
            f"{join_limited(sorted(others))}: if it is a split, put train/ and test/ (or val/) next to each other, or "
            "nothing else next to it; if it is a class, list every class by --class-names"
        ],
    )


def _split_of(folder: str) -> str:
    return SPLIT_NAMES[folder.lower()]


def _is_text(path: str) -> bool:
    return printable_path(path) == path


def _empty_class_folders(root: str, broken: set[str], *, with_splits: bool) -> set[str]:
    """Names of folders without images, which are classes too; object stores have no empty folders."""
    if not storage.is_local(root):
        return set()
    base = storage.local_path(root)
    parents = [folder for folder in base.iterdir() if folder.name.lower() in SPLIT_NAMES] if with_splits else [base]
    folders = [folder for parent in parents if parent.is_dir() for folder in parent.iterdir() if folder.is_dir()]
    return {
        folder.name
        for folder in folders
        if not is_hidden(folder.name) and _is_text(folder.name) and str(folder.relative_to(base)) not in broken
    }


def _unreadable(root: str, files: Sequence[ListedFile]) -> list[str]:
    if not files:
        return []
    example = printable_path(f"{root}/{files[0].path}")
    return [f"{pluralize(len(files), 'file')} left out whose path is not UTF-8, such as {example}; rename what isn't"]


def _broken(broken: Sequence[str], images: set[str]) -> list[str]:
    """Notes about broken links and the like; those with an image's suffix stay rows, which a check finds missing."""
    rows = [path for path in broken if path in images]
    others = [path for path in broken if path not in images]
    kinds = "a broken link, a link to a folder above it, a pipe or a device"
    notes = [f"{pluralize(len(rows), 'image')} that can't be read, each {kinds}: {join_limited(rows)}"] if rows else []
    return notes + (
        [f"{pluralize(len(others), 'name')} left out, each {kinds}: {join_limited(others)}"] if others else []
    )


def _left_out(files: Sequence[ListedFile], images: Sequence[ListedFile]) -> list[str]:
    left_out = set(files) - set(images)
    suffixes = sorted({PurePosixPath(file.path).suffix.lower() or "no suffix" for file in left_out})
    number = pluralize(len(left_out), "file")
    return [f"{number} left out by their suffix: {join_limited(suffixes)}"] if suffixes else []


def _outside(paths: Sequence[Sequence[str]], num_selected: int, others: set[str]) -> list[str]:
    num_in_others = sum(len(parts) > 1 and parts[0] in others for parts in paths)
    num_loose = len(paths) - num_selected - num_in_others
    notes = []
    if num_in_others:
        number = pluralize(num_in_others, "image")
        notes.append(f"{number} left out in folders next to the splits: {join_limited(sorted(others))}")
    if num_loose:
        notes.append(f"{pluralize(num_loose, 'image')} left out that lie in no class's folder")
    return notes


def from_lists(lists: Mapping[str, str], root: str, name: str, *, class_names: Sequence[str] | None = None) -> Manifest:
    """Build a manifest from list files by split; each line has a path below `root` and a class id, or a tab and a name.

    Paths may have spaces. Raises ManifestError with every bad line, StorageError.
    """
    root = storage.absolute(root)
    paths: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    problems: list[str] = []
    for split, path in lists.items():
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            file, label = _parse(line)
            if not file or not label:
                problems.append(f"{path}:{number}: {line.strip()[:80]!r} is not a path and a label; write both")
                continue
            # A name of digits alone must be in the class list.
            if label.lstrip("-").isdigit() and class_id(label) is None and label not in (class_names or ()):
                problems.append(f"{path}:{number}: the label {label[:80]!r} is no class id; write a number from 0 on")
                continue
            paths.append(file)
            labels.append(label)
            splits.append(split)
    uris = [below_root(path, root) for path in paths]
    source = ", ".join(lists.values())
    more = len(problems) - MAX_LINES
    findings = problems[:MAX_LINES] + ([f"and {more} more lines"] if more > 0 else [])
    numbers, folders = None, {}
    ids = [number for number in map(class_id, labels) if number is not None]
    if len(ids) == len(labels):
        numbers = np.array(ids, dtype=np.int64)
        train = np.array([SPLIT_NAMES.get(split.lower()) == "train" for split in splits], dtype=bool)
        folders = folders_of([path for path, use in zip(paths, train, strict=True) if use], numbers[train])
    try:
        manifest = assemble(
            name, labels if numbers is None else numbers, splits, uris=uris, class_names=class_names,
            folder_names=folders, source=source,
        )  # fmt: skip
    except ManifestError as error:
        raise ManifestError(source, [*findings, *error.findings]) from None
    if findings:
        raise ManifestError(source, findings)
    return manifest


def _parse(line: str) -> tuple[str, str]:
    if "\t" in line:
        path, _, label = line.rpartition("\t")
        return path.strip(), label.strip()
    path, _, label = line.strip().rpartition(" ")
    return path.strip(), label
