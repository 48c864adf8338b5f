"""From what a source says of each image to a manifest: split names, class ids, class names, and what is odd."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
_LARGEST_LABEL = 2**31 - 1

Labels = Sequence[int] | Sequence[str] | npt.NDArray[np.int64]


def assemble(
    name: str,
    labels: Labels,
    splits: Sequence[str],
    *,
    uris: Sequence[str | None] | None = None,
    data: Sequence[bytes | None] | None = None,
    class_names: Sequence[str] | None = None,
    own_names: Sequence[str] | None = None,
    folder_names: Mapping[int, str] | None = None,
    notes: Sequence[str] = (),
    source: str = "",
) -> Manifest:
    """Build a manifest from columns as the source has them.

    `labels` are class ids or class names. Names without `class_names` are numbered in sorted order; ids without them
    are called by `own_names`, which the source itself lists for its ids, by `folder_names`, or by their number; ids
    with gaps and no list are mapped to 0, 1, 2, ... with the map kept. Ids that can't be those of `class_names`, and
    are all among them as they are written, are names. Raises ManifestError with every finding.
    """
    columns = {"uri": uris, "bytes": None if data is None else pa.array(data, pa.large_binary())}
    names_given = class_names if class_names is not None else own_names
    ids, names, label_map, by_name, odd, wrong = _number(labels, names_given, folder_names or {})
    named = names_given is not None or by_name or bool(folder_names)
    table = pa.table(
        {
            **{key: column for key, column in columns.items() if column is not None},
            "label": pa.array(ids, pa.int32()),
            "split": [SPLIT_NAMES.get(split.lower(), split) for split in splits],
        }
    )
    findings: tuple[str, ...] = ()
    try:
        manifest = Manifest.build(
            table,
            names,
            name,
            notes=[*notes, *odd, *_unread_notes(uris or ())],
            label_map=label_map,
            named=named,
            labeled_by_name=by_name,
            source=source or name,
        )
        if class_names is not None:
            wrong += repeated_findings(class_names) if by_name else longer_list_findings(manifest.table, class_names)
    except ManifestError as error:
        findings = error.findings
    if wrong or findings:
        raise ManifestError(source or name, [*wrong, *findings])
    return manifest


def _unread_notes(uris: Sequence[str | None]) -> list[str]:
    if reads_heif():
        return []
    unread = [uri for uri in uris if uri is not None and uri.lower().endswith(HEIF_SUFFIXES)]
    return [f"{pluralize(len(unread), 'image')} in HEIC, such as {unread[0]}: {HEIF_ADVICE}"] if unread else []


def _are_names(labels: Labels) -> bool:
    return len(labels) > 0 and isinstance(labels[0], str)


def _number(
    labels: Labels, class_names: Sequence[str] | None, folder_names: Mapping[int, str]
) -> tuple[npt.NDArray[np.int64], list[str], dict[str, int] | None, bool, list[str], list[str]]:
    """Class ids, class names, the map of the source's ids, whether labels are names, what is odd, what is wrong."""
    if _are_names(labels):
        texts = [str(label) for label in labels]
        names = sorted(set(texts)) if class_names is None else list(class_names)
        number = {text: index for index, text in reversed(list(enumerate(names)))}
        unknown = sorted(set(texts) - number.keys())
        wrong = _mixed(texts) if unknown or class_names is None else []
        if unknown and not wrong:
            wrong = [
                f"{pluralize(len(unknown), 'label')} that {'is' if len(unknown) == 1 else 'are'} not in the class list"
                f": {join_limited([repr(text) for text in unknown])}; {suggest_name(unknown[0], names)}"
            ]
        # A label outside the list has been said by name, and must not be said again by number.
        return np.array([number.get(text, 0) for text in texts], dtype=np.int64), names, None, True, [], wrong
    ids = np.asarray(labels, dtype=np.int64)
    known, numbered = np.unique(ids, return_inverse=True)
    if class_names is not None:
        outside = [label for label in known.tolist() if not 0 <= label < len(class_names)]
        if outside and set(map(str, known.tolist())) <= set(class_names):
            return _number([str(label) for label in ids.tolist()], class_names, folder_names)
        # What is too large for the column can't be said by row.
        large = [str(label) for label in outside if abs(label) > _LARGEST_LABEL]
        bounds = f"0 to {len(class_names) - 1}, the class names"
        wrong = [f"{pluralize(len(large), 'label')} outside {bounds}: {join_limited(large)}"] if large else []
        kept = np.where(np.isin(ids, [int(label) for label in large]), 0, ids)
        return kept, list(class_names), None, False, [], wrong
    gaps = len(known) > 0 and (known[0] != 0 or known[-1] != len(known) - 1)
    names = [folder_names.get(int(label), f"class {label}") for label in known]
    label_map = {str(label): index for index, label in enumerate(known.tolist())} if gaps else None
    odd = [f"class ids {known[0]} to {known[-1]} with gaps were mapped to 0 to {len(known) - 1}"] if gaps else []
    return numbered.astype(np.int64), names, label_map, False, odd, []


def _mixed(labels: Sequence[str]) -> list[str]:
    """Class ids and class names side by side: a slip of the pen would make names of all ids, in another order."""
    ids = {label for label in labels if class_id(label) is not None}
    names = set(labels) - ids
    if not ids or not names:
        return []
    few_ids = sum(label in ids for label in labels) * 2 < len(labels)
    few = [repr(label) for label in sorted(ids if few_ids else names)]
    kinds = ("a class id", "names") if few_ids else ("no class id", "ids")
    return [
        f"{pluralize(len(few), 'label')} {'is' if len(few) == 1 else 'are'} {kinds[0]} where most are {kinds[1]}: "
        f"{join_limited(few)}; mend them, or list every class by --class-names where names are numbers"
    ]


def class_id(label: str) -> int | None:
    """The whole number that a label is; None for a name."""
    return int(label) if re.fullmatch(r"-?\d{1,18}", label) else None


def folders_of(uris: Sequence[str], labels: npt.NDArray[np.int64]) -> dict[int, str]:
    """The folder of each class's images, where every class has one of its own: label -> folder's name."""
    folders: dict[int, str] = {}
    for uri, label in zip(uris, labels.tolist(), strict=True):
        folder = uri.rpartition("/")[0].rpartition("/")[2]
        if not folder or folders.setdefault(label, folder) != folder:
            return {}
    return folders if len(set(folders.values())) == len(folders) else {}


def split_of_file(path: str) -> str | None:
    """The split that a file's name speaks of: `train-00000-of-00002.parquet`, `imagenet-val-000.tar`."""
    words = re.split(r"[^a-z]+", path.rpartition("/")[2].lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def read_lines(path: str) -> list[str]:
    """A text file's lines. Raises ManifestError with the first that isn't UTF-8, StorageError."""
    data = storage.read_bytes(path)
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start)
        line = data.split(b"\n", number + 1)[number][:80].decode("utf-8", "backslashreplace").strip()
        raise ManifestError(path, [f"{path}:{number + 1}: '{line}' is not UTF-8; save the file as UTF-8"]) from None


def read_class_names(path: str) -> list[str]:
    """Class names by line, in the order of their ids; `ID NAME` lines are read by their ids. Raises ManifestError."""
    lines = [line.strip() for line in read_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    numbered = [re.fullmatch(r"(\d+)[\s,:]+(.+)", line) for line in lines]
    if lines and all(numbered):
        pairs = sorted((int(match[1]), match[2].strip()) for match in numbered if match)
        if any(after[0] != before[0] + 1 for before, after in pairwise(pairs)) or pairs[0][0] != 0:
            raise ManifestError(path, ["its numbered class names don't run 0, 1, 2, ..."])
        return [name for _, name in pairs]
    return lines
