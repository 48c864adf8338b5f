"""Check of a manifest: what is wrong or odd with its images, names and splits, in one list with a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imbvlm.base import storage
from imbvlm.base.csv_cells import csv_text
from imbvlm.base.errors import printable
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.duplicate_files import duplicate_digests
from imbvlm.data.files.file_listing import file_sizes
from imbvlm.data.groups import summarize_groups
from imbvlm.data.images.decode_budget import DecodeBudget
from imbvlm.data.images.decoding import decode_picture
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import SPLITS, Rows, split_codes
from imbvlm.data.split_power import MAX_THIN, resolve_folds, split_powers, validation_rows
from imbvlm.data.splits import classes_without_validation, lost_classes
from imbvlm.longtail.group_gap import MIN_GROUPS

Severity = Literal["error", "warning", "note"]

_THREADS = 8
MAX_NAMED = 1000
# Half-width of the interval of balanced accuracy from which a split is warned of.
MAX_HALF_WIDTH = 0.1


@dataclass(frozen=True)
class Finding:
    """One finding and the rows or classes that it concerns.

    Errors prevent a useful sweep, warnings lose images, classes or results, notes inform.
    """

    severity: Severity
    message: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = f": {join_limited(self.examples, 5)}" if self.examples else ""
        return f"{self.severity:8} {printable(self.message)}{shown}"


@dataclass(frozen=True)
class CheckReport:
    """Findings, errors first."""

    findings: tuple[Finding, ...]

    def with_findings(self, more: Iterable[Finding]) -> CheckReport:
        """The report with further findings."""
        order = ("error", "warning", "note")
        return CheckReport(tuple(sorted([*self.findings, *more], key=lambda finding: order.index(finding.severity))))

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        counts = Counter(finding.severity for finding in self.findings)
        if counts["error"]:
            return (
                f"not usable as it is: {pluralize(counts['error'], 'error')}, {pluralize(counts['warning'], 'warning')}"
            )
        return f"usable, with {pluralize(counts['warning'], 'warning')}" if counts["warning"] else "good"

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_csv(self) -> str:
        """A line for each row or class that a finding concerns: severity, finding, name."""
        rows = [
            (finding.severity, finding.message, which)
            for finding in self.findings
            for which in finding.examples or ("",)
        ]
        return csv_text([("severity", "finding", "which"), *rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: verdict, whether there is no error, and the findings."""
        return {"verdict": self.verdict, "ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), f"verdict  {self.verdict}"])


def check_manifest(
    manifest: Manifest,
    *,
    decode_all: bool = False,
    split_seed: int = 0,
    truncated: Callable[[Sequence[str]], Sequence[str]] | None = None,
) -> CheckReport:
    """Check files, duplicates, names and splits.

    `decode_all` reads every image; without it only files that may be identical are read. `truncated` returns the class
    names that the text encoder would cut. Raises StorageError.
    """
    findings = [
        *_missing_files(manifest),
        *_same_uri(manifest),
        *_same_content(manifest),
        *_names(manifest, truncated),
        *_groups(manifest),
        *_splits(manifest, split_seed),
        *_power(manifest, split_seed),
        *(_undecodable(manifest) if decode_all else ()),
        *(Finding("note", note) for note in manifest.notes),
    ]
    return CheckReport(()).with_findings(findings)


def _missing_files(manifest: Manifest) -> Iterator[Finding]:
    """Missing files; objects are found by listing, not one by one."""
    uris = manifest.table.column("uri").filter(manifest.table.column("bytes").is_null()).to_pylist()
    missing = [uri for uri, size in zip(uris, file_sizes(uris).tolist(), strict=True) if size < 0]
    if missing:
        yield Finding("error", f"{pluralize(len(missing), 'file')} of {len(manifest):,} missing", tuple(missing))


def _same_uri(manifest: Manifest) -> Iterator[Finding]:
    table = manifest.table.filter(pc.is_null(manifest.table.column("bytes")))
    yield from _repeated(table.column("uri"), table, "path", manifest)


def _same_content(manifest: Manifest) -> Iterator[Finding]:
    """Identical images: local files by their present content, objects by that of when the manifest was built."""
    contents = manifest.table.column("content").to_pylist()
    uris = manifest.table.column("uri").to_pylist()
    is_embedded = manifest.table.column("bytes").is_valid().to_pylist()
    files = [row for row, embedded in enumerate(is_embedded) if not embedded and storage.is_local(uris[row])]
    for row, digest in zip(files, duplicate_digests([uris[row] for row in files]), strict=True):
        contents[row] = digest
    has_digest = pa.array([content is not None for content in contents])
    keys = pa.chunked_array([pa.array(contents, pa.binary())]).filter(has_digest)
    yield from _repeated(keys, manifest.table.filter(has_digest), "content", manifest)


def _repeated(keys: pa.ChunkedArray, table: pa.Table, noun: str, manifest: Manifest) -> Iterator[Finding]:
    """Rows with equal keys: an error in two splits, a warning under two labels or twice in one split."""
    if not len(keys):
        return
    encoded = pc.dictionary_encode(keys.combine_chunks()).indices.to_numpy()
    splits, labels = split_codes(table.column("split")), table.column("label").to_numpy()
    uris = table.column("uri")
    order = np.argsort(encoded, kind="stable")
    first = np.flatnonzero(np.concatenate([[True], np.diff(encoded[order]) > 0]))
    size = np.diff(np.concatenate([first, [len(order)]]))

    def differs(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        ordered = values[order]
        return np.minimum.reduceat(ordered, first) != np.maximum.reduceat(ordered, first)

    in_splits, in_labels = differs(splits), differs(labels)

    def list_names(groups: npt.NDArray[np.bool_]) -> tuple[str, ...]:
        names = []
        for start, num_rows in zip(first[groups][:MAX_NAMED], size[groups][:MAX_NAMED], strict=True):
            rows = order[start : start + num_rows]
            where = "/".join(dict.fromkeys(SPLITS[splits[row]] for row in rows))
            classes = "/".join(dict.fromkeys(manifest.class_names[labels[row]] for row in rows))
            names.append(f"{uris[int(rows[0])].as_py() or f'row {rows[0]}'} ({where}; {classes})")
        return tuple(names)

    groups: list[tuple[Severity, str, npt.NDArray[np.bool_]]] = [
        ("error", f"with the same {noun} in two splits", in_splits),
        ("warning", f"with the same {noun} under two labels", in_labels),
        ("warning", f"with the same {noun} more than once in one split", (size > 1) & ~in_splits & ~in_labels),
    ]
    for severity, message, selected in groups:
        if selected.any():
            yield Finding(severity, f"{pluralize(int(selected.sum()), 'image')} {message}", list_names(selected))


def _names(manifest: Manifest, truncated: Callable[[Sequence[str]], Sequence[str]] | None) -> Iterator[Finding]:
    for warning in manifest.warnings:
        yield Finding("warning", warning)
    if not manifest.named:
        yield Finding("warning", "classes have numbers and no names, so text methods are rejected")
    if truncated is not None and manifest.named:
        long = tuple(truncated(manifest.class_names))
        if long:
            yield Finding("warning", f"{pluralize(len(long), 'name')} too long for the text tower's context", long)
    if manifest.label_map is not None:
        yield Finding("note", "the source's class ids are mapped; the manifest has the map, and so will a model")


def _groups(manifest: Manifest) -> Iterator[Finding]:
    groups = summarize_groups(manifest)
    if groups is None:
        return
    split, single = groups.in_several_splits, groups.single_group_classes
    if split:
        number = pluralize(len(split), "group")
        yield Finding("warning", f"{number} on both sides of a split, which then doesn't score unseen groups", split)
    if groups.joined:
        sets = pluralize(len(groups.joined), "set")
        yield Finding("note", f"{sets} of groups that share an image, each dealt as one group", groups.joined)
    if groups.num_without:
        yield Finding("note", f"{pluralize(groups.num_without, 'image')} without a group, each a group of its own")
    if len(groups.sizes) < MIN_GROUPS:
        what = f"fewer than {MIN_GROUPS} groups ({len(groups.sizes)}), which is too few for the intervals of scores"
        yield Finding("warning", what)
    if max(groups.sizes.values()) == 1:
        yield Finding("warning", "every group has a single image, so that groups keep nothing together")
    if len(single):
        names = tuple(manifest.class_names[label] for label in single)
        what = f"{pluralize(len(single), 'class')} in a single group, which stays in training whole and scores nothing"
        yield Finding("note", what, names)


def _splits(manifest: Manifest, split_seed: int) -> Iterator[Finding]:
    stats, names = manifest.class_stats(), manifest.class_names
    if len(stats.zero_train):
        empty = tuple(names[label] for label in stats.zero_train)
        yield Finding("warning", f"{pluralize(len(empty), 'class')} without training images (zero_train)", empty)
    trained = tuple(names[label] for label in np.flatnonzero(stats.split_counts))
    if len(trained) < 2:
        message = (
            "two or more classes with training images are needed (with --folders DIR the folders in DIR are the "
            f"classes), and there is {len(trained) or 'none'}"
        )
        yield Finding("error", message, trained)
    if "test" in manifest.splits:
        unscored = _absent(manifest, manifest.rows_of("test"))
        if unscored:
            message = (
                f"{pluralize(len(unscored), 'class')} absent from the test split and so from every average over it"
            )
            yield Finding("warning", message, unscored)
    else:
        yield Finding(
            "warning",
            "no test split: a sweep can select, but not score its selection; hold images out for it by --test-share "
            "0.2, in a folder test/ next to train/, or as rows of that split",
        )
    is_official, num_folds = "val" in manifest.splits, resolve_folds(None, manifest, split_seed)
    lost = _absent(manifest, validation_rows(manifest, split_seed, num_folds))
    units = "groups" if manifest.has_groups else "training images"
    if len(lost) == len(names):
        message = (
            f"no class has a validation image, so that nothing can be selected: only classes of 2 or more {units} have "
            "images that a model hasn't seen; give more, or a validation split"
        )
        yield Finding("error", message)
    elif lost:
        held_out = "held out from training (fewer than 5 images)" if num_folds == 1 else "over folds (a single image)"
        if manifest.has_groups:
            held_out = "of unseen groups (a single group, or only in groups that stay in training)"
        kind = "the validation split" if is_official else f"validation {held_out}"
        yield Finding("warning" if is_official else "note", f"{pluralize(len(lost), 'class')} absent from {kind}", lost)


def _power(manifest: Manifest, split_seed: int) -> Iterator[Finding]:
    for split, power in split_powers(manifest, split_seed).items():
        severity: Severity = "warning" if power.half_width > MAX_HALF_WIDTH else "note"
        chooses = f", so that {power.choices()}" if split == "val" else ""
        yield Finding(severity, f"{split} decides {power.intervals()}{chooses}")
        if power.thin:
            names = tuple(manifest.class_names[label] for label in power.thin)
            what = f"{pluralize(len(names), 'class')} of 1 to {MAX_THIN} images in {split}"
            yield Finding("note", f"{what}, which can't tell how good a model is on one of them", names)


def _absent(manifest: Manifest, rows: Rows) -> tuple[str, ...]:
    """Names of the classes without any of these rows."""
    absent = classes_without_validation(manifest.labels[rows], len(manifest.class_names))
    return tuple(manifest.class_names[label] for label in absent)


def _undecodable(manifest: Manifest) -> Iterator[Finding]:
    uris, data = manifest.table.column("uri"), manifest.table.column("bytes")
    stats, splits = manifest.class_stats(), split_codes(manifest.table.column("split"))

    budget = DecodeBudget(_THREADS)
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = list(
            pool.map(
                lambda row: budget.read(uris[row].as_py(), data[row].as_py(), decode_picture), range(len(manifest))
            )
        )
    bad = [(row, text) for row, text in enumerate(reasons) if text is not None]
    if bad:
        shown = tuple(
            f"{uris[row].as_py() or f'row {row}'} ({text}; {SPLITS[splits[row]]}; "
            f"{manifest.class_names[manifest.labels[row]]}, {stats.group_of(int(manifest.labels[row]))})"
            for row, text in bad
        )
        yield Finding("warning", f"{pluralize(len(bad), 'image')} of {len(manifest):,} can't be decoded", shown)
    train = manifest.rows_of("train")
    lost = lost_classes(manifest.labels[train], np.array([reasons[row] is None for row in train], dtype=bool))
    if len(lost):
        names = tuple(manifest.class_names[label] for label in lost)
        yield Finding("error", f"{pluralize(len(lost), 'class')} would lose every training image", names)
