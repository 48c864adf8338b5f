"""A dataset as one Arrow table, with each image's location, label and official split, and the class names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from imbvlm.assets import manifest_path
from imbvlm.base import s3, storage
from imbvlm.base.errors import ImbvlmError, end_sentence, printable
from imbvlm.base.formatting import join_limited, limited, pluralize, size_text
from imbvlm.data.class_list import class_list_findings
from imbvlm.data.files.file_listing import file_states
from imbvlm.data.manifest_schema import (
    SCHEMA,
    SPLITS,
    Rows,
    absolute_uris,
    conform,
    content_groups,
    is_utf8,
    joined_groups,
    metadata_findings,
    missing_columns,
    name_findings,
    relative_uris,
    row_findings,
    split_codes,
    type_findings,
)
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.taxonomy import Taxonomy

METADATA_KEY = b"imbvlm"
EMBEDDED = "embedded:"
_MAKE_AGAIN = "Make the manifest again with `imbvlm manifest build`."
_ROW_GROUP = 65536
# Limit on a table in memory: a multiple of its file's size, and at least so many bytes. Read in batches of rows.
_MAX_GROWTH, _MIN_LIMIT_BYTES, _BATCH_ROWS = 200, 1_000_000_000, 1024


# Findings of which an error shows the sentences: a wrong file may have one for each of its rows.
_MAX_FINDINGS = 200


class ManifestError(ImbvlmError):
    """All mistakes of a manifest, or of what one is built from (`noun`); `findings` lists them."""

    def __init__(self, source: str, findings: Sequence[str], noun: str = "manifest") -> None:
        self.source, self.findings, self.noun = source, tuple(findings), noun
        heading = "1 thing is" if len(findings) == 1 else f"{len(findings)} things are"
        shown = (f"  {end_sentence(printable(finding))}" for finding in limited(self.findings, _MAX_FINDINGS))
        super().__init__("\n".join([f"{heading} wrong with the {noun} {source}:", *shown]))

    def __reduce__(self) -> tuple[type[ManifestError], tuple[str, tuple[str, ...], str]]:
        return (ManifestError, (self.source, self.findings, self.noun))


@dataclass(frozen=True)
class LabelRows:
    """Labels (N,), official splits and groups of a manifest: all that a trial reads of it.

    Rows with the same number in `copies` are identical images. `groups` are what no split divides, such as cameras,
    joined where they have copies of an image; None where the manifest has no groups.
    """

    labels: npt.NDArray[np.int64]
    split_codes: npt.NDArray[np.int8]
    copies: Rows
    groups: Rows | None
    class_names: tuple[str, ...]
    split_counts: npt.NDArray[np.int64]
    taxonomy: Taxonomy | None = None

    def rows_of(self, split: str) -> Rows:
        """Row numbers of an official split, in manifest order."""
        return np.flatnonzero(self.split_codes == SPLITS.index(split))


@dataclass(frozen=True)
class Manifest:
    """Rows (uri or bytes, label, split, content, group) with class names; rows keep their order everywhere."""

    table: pa.Table
    class_names: tuple[str, ...]
    name: str
    split_counts: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    # Class id in the source -> label, where the source's ids were not 0, 1, 2, ...
    label_map: dict[str, int] | None = None
    # False where the class names are only numbers, so that text methods mean nothing.
    named: bool = True
    # True where labels came as names, so that the class names can't be in another order than the class ids.
    labeled_by_name: bool = False
    warnings: tuple[str, ...] = field(default=(), compare=False)
    taxonomy: Taxonomy | None = None

    @staticmethod
    def build(
        table: pa.Table,
        class_names: Sequence[str],
        name: str,
        *,
        notes: Sequence[str] = (),
        label_map: dict[str, int] | None = None,
        split_counts: Sequence[int] | None = None,
        named: bool = True,
        labeled_by_name: bool = False,
        source: str = "",
    ) -> Manifest:
        """Check a table with columns label, split and uri or bytes; raises ManifestError with every finding."""
        missing = missing_columns(table)
        findings, warnings = name_findings(class_names)
        if not is_utf8(name):
            findings.append(f"its name {name!a} is not UTF-8. Give another by --name.")
        if not missing:
            table = conform(table)
            findings += row_findings(table, len(class_names))
        if split_counts is not None and (len(split_counts) != len(class_names) or min(split_counts, default=0) < 0):
            findings.append(
                f"split_counts has a count of 0 or more for each of {pluralize(len(class_names), 'class')}, and is "
                f"{join_limited([str(count) for count in split_counts])}"
            )
        if not missing and not findings and not labeled_by_name:
            findings += class_list_findings(table, class_names)
        if missing or findings:
            raise ManifestError(source or name, [*missing, *findings])
        counts = None if split_counts is None else tuple(int(count) for count in split_counts)
        return Manifest(
            table, tuple(class_names), name, counts, tuple(notes), label_map, named, labeled_by_name, tuple(warnings)
        )

    @staticmethod
    def read(source: str) -> Manifest:
        """Read `embedded:NAME`, a local path or s3://; relative uris are resolved against its folder.

        Raises ManifestError with every finding, StorageError where the file can't be read.
        """
        path = manifest_location(source)
        table = _read_parquet(path, None)
        metadata = _metadata(table.schema, source)
        manifest = Manifest.build(
            absolute_uris(table.replace_schema_metadata(None), path),
            metadata.class_names,
            metadata.name or source,
            notes=metadata.notes,
            label_map=metadata.label_map,
            split_counts=metadata.split_counts,
            named=metadata.named,
            labeled_by_name=metadata.labeled_by_name,
            source=source,
        )
        return replace(manifest, taxonomy=metadata.tree(source))

    def write(self, path: str) -> None:
        """Write as Parquet, whole or not at all; uris below the file's folder become relative, so both can move."""
        storage.check_name(path)
        metadata = {
            "class_names": self.class_names,
            "name": self.name,
            "split_counts": self.split_counts,
            "notes": self.notes,
            "label_map": self.label_map,
            "named": self.named,
            "labeled_by_name": self.labeled_by_name,
            **({} if self.taxonomy is None else {"taxonomy": self.taxonomy.to_dict()}),
        }
        rows = self.table if self.has_groups else self.table.drop_columns(["group"])
        table = relative_uris(rows, path).replace_schema_metadata(
            {METADATA_KEY: json.dumps(metadata, ensure_ascii=False).encode()}
        )
        sink = pa.BufferOutputStream()
        # Images are compressed, and nearly all uris differ, so that dictionaries for them only take time and memory.
        pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP, use_dictionary=["split", "label"])
        storage.write_bytes(path, sink.getvalue().to_pybytes())

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class ids (N,)."""
        return self.table.column("label").to_numpy().astype(np.int64)

    @cached_property
    def _codes(self) -> npt.NDArray[np.int8]:
        return split_codes(self.table.column("split"))

    def rows_of(self, split: str) -> Rows:
        """Row numbers of an official split, in manifest order."""
        return np.flatnonzero(self._codes == SPLITS.index(split))

    @property
    def has_groups(self) -> bool:
        """Whether rows have groups, which no split divides."""
        return self.table.column("group").null_count < len(self)

    @property
    def splits(self) -> tuple[str, ...]:
        """The official splits that have rows."""
        return tuple(split for split in SPLITS if len(self.rows_of(split)))

    def split(self, split: str) -> Manifest:
        """The rows of an official split, in order; counts stay those of the whole manifest's training rows."""
        return replace(self.take(self.rows_of(split)), split_counts=tuple(self._official_counts().tolist()))

    def take(self, rows: Rows) -> Manifest:
        """These rows, in this order; consecutive rows are not copied."""
        if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            return replace(self, table=self.table.slice(int(rows[0]), len(rows)))
        return replace(self, table=self.table.take(pa.array(rows)))

    def class_stats(self, train: Rows | None = None) -> ClassStats:
        """Training counts per class, by default of all training rows; `train` has the row numbers of those to count."""
        rows = self.rows_of("train") if train is None else train
        counts = np.bincount(self.labels[rows], minlength=len(self.class_names))
        return ClassStats.from_counts(counts, self._official_counts())

    def label_rows(self) -> LabelRows:
        """The part of the manifest that trials read."""
        copies, groups = content_groups(self.table), joined_groups(self.table)
        return LabelRows(
            self.labels, self._codes, copies, groups, self.class_names, self._official_counts(), self.taxonomy
        )

    def row_fingerprint(self, split: str) -> str:
        """Hex digest of a split's images: bytes, or uri with a local file's size and modification time."""
        rows = pa.array(self.rows_of(split))
        table = self.table.select(["uri", "content"]).take(rows)
        # A file's content digest dates from when the manifest was built, so that it does not count.
        embedded = self.table.column("bytes").is_valid().take(rows)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(np.packbits(embedded.to_numpy()).tobytes())
        digest.update(b"".join(table.column("content").filter(embedded).to_pylist()))
        uris = table.column("uri").filter(pc.invert(embedded)).to_pylist()
        digest.update("\0".join(uris).encode("utf-8", "surrogateescape"))
        digest.update(file_states(uris).tobytes())
        return digest.hexdigest()

    def _official_counts(self) -> npt.NDArray[np.int64]:
        if self.split_counts is not None:
            return np.asarray(self.split_counts, dtype=np.int64)
        return np.bincount(self.labels[self.rows_of("train")], minlength=len(self.class_names))


def label_rows(source: str) -> LabelRows:
    """Read only the part of a manifest that trials read; it was checked when the sweep began."""
    path = manifest_location(source)
    table = _read_parquet(path, ["uri", "label", "split", "content", "group"])
    metadata = _metadata(table.schema, source)
    counts = None if metadata.split_counts is None else tuple(metadata.split_counts)
    names, taxonomy = tuple(metadata.class_names), metadata.tree(source)
    return Manifest(table, names, metadata.name or source, counts, taxonomy=taxonomy).label_rows()


# ------------------------------------------------------------------------------------------------ reading


def manifest_location(source: str) -> str:
    """The location of a manifest's file, also of an embedded one; raises ImbvlmError for an unknown one of those."""
    return str(manifest_path(source.removeprefix(EMBEDDED))) if source.startswith(EMBEDDED) else source


def absolute_manifest(source: str) -> str:
    """The location of a manifest for processes with other working directories; embedded ones are the same for all."""
    return source if source.startswith(EMBEDDED) else storage.absolute(source)


def _read_parquet(path: str, columns: list[str] | None) -> pa.Table:
    storage.check_readable(path)
    filesystem, inner = storage.open_filesystem(path)

    def read() -> pa.Table:
        with filesystem.open_input_file(inner) as stream:
            file = pq.ParquetFile(stream)
            present = [name for name in columns or SCHEMA.names if name in file.schema_arrow.names]
            wrong = type_findings(file.schema_arrow, present)
            if wrong:
                raise ManifestError(path, wrong)
            return _read_bounded(file, present, path, max(_MIN_LIMIT_BYTES, _MAX_GROWTH * stream.size()))

    try:
        return s3.retry_denied(path, read)
    except FileNotFoundError:
        where = f" in {os.getcwd()}" if storage.is_local(path) and not os.path.isabs(path) else ""
        raise storage.StorageError(
            f"the manifest {path} is not there{where}; make one with `imbvlm manifest build`"
        ) from None
    except pa.ArrowInvalid as error:
        raise storage.StorageError(
            f"{path} is no manifest, or a damaged one ({error}); make one with `imbvlm manifest build`"
        ) from None
    except OSError as error:
        raise storage.storage_error("read the manifest", path, error) from None


def _read_bounded(file: pq.ParquetFile, columns: list[str] | None, path: str, max_bytes: int) -> pa.Table:
    """The rows, read in batches: a small file can repeat one value over a billion rows."""
    groups, num_bytes = [], 0
    for group in range(file.num_row_groups):
        tables = []
        for batch in file.iter_batches(_BATCH_ROWS, [group], columns):
            plain = {
                name: column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
            tables.append(pa.table(plain))
            num_bytes += tables[-1].nbytes
            if num_bytes > max_bytes:
                size = size_text(max_bytes)
                problem = f"its rows take more than {size} in memory, so it isn't read. Is it a manifest?"
                raise ManifestError(path, [problem])
        # Group by group, so that combining chunks never copies all rows at once.
        groups += [pa.concat_tables(tables).combine_chunks()] if tables else []
    if not groups:
        return file.read(columns=columns)
    table = pa.concat_tables(groups)
    fields = [file.schema_arrow.field(name) for name in table.column_names]
    return table.cast(pa.schema(fields, file.schema_arrow.metadata))


class _Metadata(BaseModel):
    """A manifest's metadata in its Parquet file; files of version 0.1 lack the last two fields."""

    model_config = ConfigDict(strict=True)

    class_names: list[str]
    name: str | None = None
    split_counts: list[int] | None = None
    notes: list[str] = []
    label_map: dict[str, int] | None = None
    named: bool = True
    labeled_by_name: bool = False
    taxonomy: dict[str, list[Any]] | None = None

    def tree(self, source: str) -> Taxonomy | None:
        """The tree over the classes; None without one. Raises ManifestError."""
        try:
            return None if self.taxonomy is None else Taxonomy.from_dict(self.taxonomy, len(self.class_names))
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(source, [f"its taxonomy can't be read ({error}). {_MAKE_AGAIN}"]) from None


def _metadata(schema: pa.Schema, source: str) -> _Metadata:
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise ManifestError(
            source, ["it has no class names, so it is not a manifest yet. Make one with `imbvlm manifest build`."]
        )
    try:
        return _Metadata.model_validate_json(raw)
    except ValidationError as error:
        findings = metadata_findings(error, METADATA_KEY.decode())
        raise ManifestError(source, [f"{finding}. {_MAKE_AGAIN}" for finding in findings]) from None
