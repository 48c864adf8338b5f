"""Builds a manifest from a source's columns: normalizes split names, class ids and class names, and notes oddities."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imbvlm.base import storage
from imbvlm.base.errors import suggest_name
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.class_list import longer_list_findings, repeated_findings
from imbvlm.data.files.file_listing import HEIF_SUFFIXES
from imbvlm.data.images.decoding import HEIF_ADVICE, reads_heif
from imbvlm.data.manifest import Manifest, ManifestError

SPLIT_NAMES: Mapping[str, str] = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "tst": "test",
}  # fmt: skip
_MAX_LABEL = 2**31 - 1

Labels = Sequence[int] | Sequence[str] | npt.NDArray[np.int64]


def assemble(
    name: str,
    labels: Labels,
    splits: Sequence[str],
    *,
    uris: Sequence[str | None] | None = None,
    data: Sequence[bytes | None] | None = None,
    groups: Sequence[str | None] | None = None,
    class_names: Sequence[str] | None = None,
    own_names: Sequence[str] | None = None,
    folder_names: Mapping[int, str] | None = None,
    notes: Sequence[str] = (),
    source: str = "",
) -> Manifest:
    """Build a manifest from the columns of a source.

    `labels` are class ids or class names. Names without `class_names` are numbered in sorted order. Ids without them
    are named by `own_names`, the source's own list, by `folder_names`, or by their number; ids with gaps and no list
    are mapped to 0, 1, 2, ..., and the manifest keeps the map. Ids outside `class_names` are names if the list has all
    of them. Raises ManifestError with every finding.
    """
    columns = {"uri": uris, "bytes": None if data is None else pa.array(data, pa.large_binary()), "group": groups}
    names_given = class_names if class_names is not None else own_names
    numbered = _number(labels, names_given, folder_names or {})
    is_named = names_given is not None or numbered.are_names or bool(folder_names)
    table = pa.table(
        {
            **{key: column for key, column in columns.items() if column is not None},
            "label": pa.array(numbered.ids, pa.int32()),
            "split": [SPLIT_NAMES.get(split.lower(), split) for split in splits],
        }
    )
    findings = list(numbered.findings)
    try:
        manifest = Manifest.build(
            table,
            numbered.class_names,
            name,
            notes=[*notes, *numbered.notes, *_unread_notes(uris or ())],
            label_map=numbered.label_map,
            named=is_named,
            labeled_by_name=numbered.are_names,
            source=source or name,
        )
    except ManifestError as error:
        raise ManifestError(source or name, [*findings, *error.findings]) from None
    if class_names is not None and numbered.are_names:
        findings += repeated_findings(class_names)
    elif class_names is not None:
        findings += longer_list_findings(manifest.table, class_names)
    if findings:
        raise ManifestError(source or name, findings)
    return manifest


def _unread_notes(uris: Sequence[str | None]) -> list[str]:
    if reads_heif():
        return []
    unread = [uri for uri in uris if uri is not None and uri.lower().endswith(HEIF_SUFFIXES)]
    return [f"{pluralize(len(unread), 'image')} in HEIC, such as {unread[0]}: {HEIF_ADVICE}"] if unread else []


@dataclass(frozen=True)
class _NumberedLabels:
    """Class ids (N,) and their names; `label_map` maps the source's ids, `are_names` tells that labels were names."""

    ids: npt.NDArray[np.int64]
    class_names: list[str]
    label_map: dict[str, int] | None = None
    are_names: bool = False
    notes: Sequence[str] = ()
    findings: Sequence[str] = ()


def _number(labels: Labels, class_names: Sequence[str] | None, folder_names: Mapping[int, str]) -> _NumberedLabels:
    if len(labels) > 0 and isinstance(labels[0], str):
        texts = [str(label) for label in labels]
        names = sorted(set(texts)) if class_names is None else list(class_names)
        number = {text: index for index, text in reversed(list(enumerate(names)))}
        unknown = sorted(set(texts) - number.keys())
        findings = _mixed_findings(texts) if unknown or class_names is None else []
        if unknown and not findings:
            findings = [
                f"{pluralize(len(unknown), 'label')} that {'is' if len(unknown) == 1 else 'are'} not in the class list"
                f": {join_limited([repr(text) for text in unknown])}; {suggest_name(unknown[0], names)}"
            ]
        # An unknown label gets the valid id 0, so that the manifest's own check doesn't report it again.
        numbers = np.array([number.get(text, 0) for text in texts], dtype=np.int64)
        return _NumberedLabels(numbers, names, are_names=True, findings=findings)
    ids = np.asarray(labels, dtype=np.int64)
    distinct, numbers = np.unique(ids, return_inverse=True)
    if class_names is not None:
        outside = [label for label in distinct.tolist() if not 0 <= label < len(class_names)]
        if outside and set(map(str, distinct.tolist())) <= set(class_names):
            return _number([str(label) for label in ids.tolist()], class_names, folder_names)
        # Labels that are too large for the column would fail there without their rows.
        large = [label for label in outside if abs(label) > _MAX_LABEL]
        number_of, bounds = pluralize(len(large), "label"), f"0 to {len(class_names) - 1}, the class names"
        findings = [f"{number_of} outside {bounds}: {join_limited(list(map(str, large)))}"] if large else []
        return _NumberedLabels(np.where(np.isin(ids, large), 0, ids), list(class_names), findings=findings)
    names = [folder_names.get(int(label), f"class {label}") for label in distinct]
    has_gaps = len(distinct) > 0 and (distinct[0] != 0 or distinct[-1] != len(distinct) - 1)
    if not has_gaps:
        return _NumberedLabels(numbers.astype(np.int64), names)
    label_map = {str(label): index for index, label in enumerate(distinct.tolist())}
    note = f"class ids {distinct[0]} to {distinct[-1]} with gaps were mapped to 0 to {len(distinct) - 1}"
    return _NumberedLabels(numbers.astype(np.int64), names, label_map, notes=[note])


def _mixed_findings(labels: Sequence[str]) -> list[str]:
    """A finding for a mix of class ids and names: one typing error would make names of all ids, in another order."""
    ids = {label for label in labels if class_id(label) is not None}
    names = set(labels) - ids
    if not ids or not names:
        return []
    has_few_ids = sum(label in ids for label in labels) * 2 < len(labels)
    few = [repr(label) for label in sorted(ids if has_few_ids else names)]
    kinds = ("a class id", "names") if has_few_ids else ("no class id", "ids")
    return [
        f"{pluralize(len(few), 'label')} {'is' if len(few) == 1 else 'are'} {kinds[0]} where most are {kinds[1]}: "
        f"{join_limited(few)}; fix them, or list every class by --class-names where names are numbers"
    ]


def class_id(label: str) -> int | None:
    """The whole number that a label is; None for a name."""
    return int(label) if re.fullmatch(r"-?\d{1,18}", label) else None


def folders_of(uris: Sequence[str], labels: npt.NDArray[np.int64]) -> dict[int, str]:
    """The name of each class's folder, by label, if every class has a folder of its own."""
    folders: dict[int, str] = {}
    for uri, label in zip(uris, labels.tolist(), strict=True):
        folder = uri.rpartition("/")[0].rpartition("/")[2]
        if not folder or folders.setdefault(label, folder) != folder:
            return {}
    return folders if len(set(folders.values())) == len(folders) else {}


def below_root(uri: str, root: str) -> str:
    """An image's location in a list or table, whose relative paths lie below `root`."""
    return uri if storage.is_uri(uri) or uri.startswith("/") else storage.join(root, uri)


def split_of_file(path: str) -> str | None:
    """The split in a file's name: `train-00000-of-00002.parquet`, `imagenet-val-000.tar`."""
    words = re.split(r"[^a-z]+", path.rpartition("/")[2].lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def read_text(path: str, noun: str = "file") -> bytes:
    """A text file's bytes. Raises ManifestError for UTF-16 and for what is no text, StorageError."""
    data = storage.read_bytes(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        problem = "it is in UTF-16, as Excel's 'Unicode Text' is, or no text; save it as UTF-8 ('CSV UTF-8')"
        raise ManifestError(path, [problem], noun)
    return data


def read_lines(path: str, noun: str = "file") -> list[str]:
    """A text file's lines. Raises ManifestError for a line that isn't UTF-8, StorageError."""
    data = read_text(path, noun)
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start)
        line = data.split(b"\n", number + 1)[number][:80].decode("utf-8", "backslashreplace").strip()
        raise ManifestError(
            path, [f"{path}:{number + 1}: '{line}' is not UTF-8; save the file as UTF-8"], noun
        ) from None


def read_class_names(path: str) -> list[str]:
    """Class names, one a line in the order of their ids, or as `ID NAME` lines in any order. Raises ManifestError."""
    lines = [line.strip() for line in read_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    numbered = [re.fullmatch(r"(\d+)[\s,:]+(.+)", line) for line in lines]
    if lines and all(numbered):
        pairs = sorted((int(match[1]), match[2].strip()) for match in numbered if match)
        if any(after[0] != before[0] + 1 for before, after in pairwise(pairs)) or pairs[0][0] != 0:
            raise ManifestError(
                path, ["its numbered class names don't run 0, 1, 2, ...; number every class once, from 0 on"], "file"
            )
        return [name for _, name in pairs]
    return lines
