"""Builds manifests from tables: CSV, TSV, JSON lines and Parquet, also with embedded images as on Hugging Face."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from imbvlm.base import storage
from imbvlm.base.csv_cells import ESCAPED
from imbvlm.base.errors import suggest_name
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.files.byte_ranges import ContainerWriter
from imbvlm.data.manifest import METADATA_KEY, Manifest, ManifestError
from imbvlm.data.manifest_schema import has_groups, metadata_findings, type_findings
from imbvlm.data.sources.manifest_builder import assemble, below_root, folders_of, read_text, split_of_file
from imbvlm.data.sources.taxonomy_files import taxonomy_of_rows

# Usual names of each column, the most likely first; groups are read only where they are asked for.
COLUMNS: Mapping[str, Sequence[str]] = {
    "uri": ("uri", "path", "image_path", "file_path", "filepath", "file_name", "filename", "file", "image", "img"),
    "label": ("label", "labels", "class_id", "category_id", "class", "category", "target", "class_name", "fine_label"),
    "split": ("split", "set", "subset", "partition"),
    "bytes": ("bytes", "image_bytes", "image", "img", "jpg", "png"),
}  # fmt: skip
# Total size of images that stay inside the manifest. More go to pack files next to it, so that memory stays flat.
MAX_EMBEDDED_BYTES = 128_000_000
# Rows and bytes of a Parquet file in memory at a time; a row group may have all of its images.
_BATCH_ROWS, _READ_BYTES = 256, 1 << 22
# Nesting of lists and objects in a JSON value.
_MAX_LEVELS = 100
_STRING = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"')
# All bytes but brackets and the first letter of null.
_NO_MARKS = bytes(set(range(256)) - set(b"[]{}n"))
# Digits of a 64-bit number with its sign.
_MAX_DIGITS = 20


def from_table(
    paths: Sequence[str],
    root: str,
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
    pack_prefix: str | None = None,
    taxonomy: Sequence[str] = (),
) -> Manifest:
    """Build a manifest from one or several tables; relative paths in them are below `root`.

    `columns` names the table's columns for uri, label, split and bytes if they don't have their usual names, and the
    column of groups if there is one. Without a split column the split is in the files' names; the default is training.
    Embedded images stay in the manifest while they are small, and else go to pack files `<pack_prefix>-00000.pack`.
    `taxonomy` names the columns with the ancestors of classes, the highest rank first, and may end with that of the
    label. Raises ManifestError.
    """
    root = storage.absolute(root)
    pack = ContainerWriter(pack_prefix, MAX_EMBEDDED_BYTES)
    rows = _Rows(name, pack, reads_names=class_names is None, ranks=taxonomy)
    for path in paths:
        for table in _batches(path):
            rows.add(table, path, columns or {})
    rows.pack.close()
    names = class_names if class_names is not None else rows.class_names
    source = ", ".join(paths)
    labels = _label_values(rows.labels, names, source)
    uris = [None if uri is None else below_root(uri, root) for uri in rows.uris]
    has_ids = bool(labels) and isinstance(labels[0], int)
    folders = folders_of([uri or "" for uri in rows.uris], np.array(labels, np.int64)) if has_ids else {}
    manifest = assemble(
        name,
        labels,
        rows.splits,
        uris=rows.pack.located(uris),
        data=rows.pack.embedded,
        groups=rows.groups,
        class_names=class_names,
        own_names=rows.class_names,
        folder_names=folders,
        notes=rows.notes,
        source=source,
    )
    if not taxonomy:
        return manifest
    ranks = taxonomy if rows.class_rank else [*taxonomy, "class"]
    return replace(
        manifest, taxonomy=taxonomy_of_rows(ranks, rows.lineages, manifest.labels, manifest.class_names, source)
    )


class _Rows:
    """Columns collected from the tables of a source."""

    def __init__(self, name: str, pack: ContainerWriter, *, reads_names: bool, ranks: Sequence[str] = ()) -> None:
        self.name, self.pack, self.reads_names, self.ranks = name, pack, reads_names, ranks
        self.uris: list[str | None] = []
        # In the types of each part of a table: only all of them show whether labels are ids or names.
        self.labels: list[pa.ChunkedArray] = []
        self.splits: list[str] = []
        self.groups: list[str | None] | None = None
        self.notes: list[str] = []
        # Those of the tables' own metadata, by table and joined.
        self.names_by_path: dict[str, list[str] | None] = {}
        self.class_names: list[str] | None = None
        # The ancestors of each row's class; the last rank is that of the classes if its column has the labels.
        self.lineages: list[tuple[str, ...]] = []
        self.class_rank = False

    def add(self, table: pa.Table, path: str, selected: Mapping[str, str]) -> None:
        names = _find_columns(table, path, selected, self.ranks)
        if self.reads_names and path not in self.names_by_path:
            self._join_names(path, _stored_class_names(table.schema, names["label"], path))
        problems = _empty_findings(table, [names[kind] for kind in ("label", "split") if kind in names])
        if path.lower().endswith((".csv", ".tsv")):
            texts = [names[kind] for kind in ("uri", "label", "split", "group") if kind in names]
            problems += _line_break_findings(table, texts)
        if problems:
            raise ManifestError(path, problems, "table")
        labels = table.column(names["label"])
        are_ids = pa.types.is_integer(labels.type)
        self.labels.append(self._joined_ids(labels, path) if are_ids else _texts(table, names["label"], path))
        if "split" in names:
            self.splits += _texts(table, names["split"], path).to_pylist()
        else:
            self._split_by_file(path, table.num_rows)
        if "group" in names:
            self.groups = [*(self.groups or ()), *_texts(table, names["group"], path).to_pylist()]
        elif METADATA_KEY in (table.schema.metadata or {}) and has_groups(table):
            self._note(f"the groups of {path} are not read; --group-by group keeps them")
        self._add_lineages(table, path, names["label"])
        uris, data = _images(table, names, path)
        self.uris += uris
        self.pack.add(data if data is not None else [None] * table.num_rows)

    def _join_names(self, path: str, names: list[str] | None) -> None:
        self.names_by_path[path] = names
        if names is not None:
            self.class_names = list(dict.fromkeys([*self.class_names, *names])) if self.class_names else names

    def _joined_ids(self, ids: pa.ChunkedArray, path: str) -> pa.ChunkedArray:
        """Ids by the joined names: two manifests number their classes each in its own way; -1 for no class of them."""
        own = self.names_by_path.get(path)
        if not own or self.class_names is None or own == self.class_names[: len(own)]:
            return ids
        joined = {label: self.class_names.index(name) for label, name in enumerate(own)}
        return pa.chunked_array([[joined.get(label, -1) for label in ids.to_pylist()]], pa.int64())

    def _add_lineages(self, table: pa.Table, path: str, label: str) -> None:
        self.class_rank = bool(self.ranks) and self.ranks[-1] == label
        above = self.ranks[:-1] if self.class_rank else self.ranks
        columns = [pc.fill_null(_texts(table, rank, path), "").to_pylist() for rank in above]
        self.lineages += zip(*columns, strict=True) if columns else [()] * table.num_rows

    def _split_by_file(self, path: str, num_rows: int) -> None:
        split = split_of_file(path)
        if split is None:
            self._note("no split column and no split in the files' names: every row is a training row")
        self.splits += [split or "train"] * num_rows

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _find_columns(table: pa.Table, path: str, selected: Mapping[str, str], ranks: Sequence[str]) -> dict[str, str]:
    """The table's name of each column in COLUMNS, as far as it has it; raises ManifestError, also without a rank's."""
    present, problems = table.column_names, []
    fields = dict(zip(present, table.schema, strict=True))
    names = {}
    for kind, column in selected.items():
        if column in present:
            names[kind] = column
        else:
            problems.append(f"there is no column {column!r} for {kind}; {suggest_name(column, present)}")
    problems += [
        f"there is no column {rank!r} for --taxonomy; {suggest_name(rank, present)}"
        for rank in ranks
        if rank not in present
    ]
    lower = {name.lower(): name for name in reversed(present)}
    for kind, candidates in COLUMNS.items():
        usable = [lower[name] for name in candidates if name in lower and _fits(kind, fields[lower[name]].type)]
        if kind not in selected and usable:
            names[kind] = usable[0]
    if "label" not in names and "label" not in selected:
        problems.append(_no_column("a label", "label", present))
    if not {"uri", "bytes"} & names.keys() and not {"uri", "bytes"} & selected.keys():
        problems.append(_no_column("an image", "uri", present))
    read = {*names.values(), *(rank for rank in ranks if rank in present)}
    repeated = sorted(name for name in read if present.count(name) > 1)
    problems += [f"{present.count(name)} columns are called {name!r}; rename all but one" for name in repeated]
    problems += type_findings(table.schema, read - set(repeated))
    if problems:
        raise ManifestError(path, problems, "table")
    return names


def _fits(kind: str, dtype: pa.DataType) -> bool:
    if kind == "bytes":
        return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_struct(dtype))
    if kind == "uri":
        return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))
    return True


def _no_column(what: str, kind: str, present: Sequence[str]) -> str:
    names = ", ".join(COLUMNS[kind][:4])
    return f"no column is named like {what} ({names}, ...); it has {present}; name it by --column {kind}=NAME"


def _empty_findings(table: pa.Table, columns: Sequence[str]) -> list[str]:
    empty = {name: table.column(name).null_count for name in columns}
    return [
        f"{pluralize(number, 'row')} without {name!r}; fill it in, or remove {'it' if number == 1 else 'them'}"
        for name, number in empty.items()
        if number
    ]


def _line_break_findings(table: pa.Table, columns: Sequence[str]) -> list[str]:
    """Findings for CSV cells of several lines: a quote that closes in a later row joins all rows between.

    A line break at a cell's start may come from our own tables, which escape it.
    """
    findings = []
    for name in columns:
        cells = table.column(name).cast(pa.string())
        broken = cells.filter(pc.match_substring_regex(cells, r"(?s).[\r\n]")).to_pylist()
        if broken:
            shown = join_limited([repr(cell[:60]) for cell in broken], 3)
            findings.append(
                f"{pluralize(len(broken), 'cell')} of {name!r} with a line break: {shown}; is a quote not closed?"
            )
    return findings


def _texts(table: pa.Table, name: str, path: str) -> pa.ChunkedArray:
    """A column as text, without a value where a number is NaN; raises ManifestError for a column of nested values."""
    column = table.column(name)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        problem = f"the column {name!r} must be text or whole numbers, and is of the type {column.type}"
        raise ManifestError(path, [f"{problem}; choose another one"], "table") from None


def _label_values(
    columns: Sequence[pa.ChunkedArray], class_names: Sequence[str] | None, source: str
) -> list[int] | list[str]:
    """Class ids where all labels are whole numbers, else class names.

    Texts with leading zeros, such as 007, are names where the class names have all of them. Raises ManifestError for
    labels that are neither.
    """
    texts = [str(label) for column in columns for label in column.to_pylist()]
    distinct = set(texts)
    are_integers = all(pa.types.is_integer(column.type) for column in columns)
    if not are_integers and not all(re.fullmatch("[0-9]+", text) for text in distinct):
        return texts
    plain = {text: text.lstrip("0") or "0" for text in distinct}
    large = [text for text, number in plain.items() if len(number) > _MAX_DIGITS or int(number) >= 1 << 63]
    if class_names is not None and (large or distinct != set(plain.values())) and distinct <= set(class_names):
        return texts
    ambiguous = sorted(number for number, num_texts in Counter(plain.values()).items() if num_texts > 1)
    problems = []
    if ambiguous:
        problems.append(f"labels that are one number are written in several ways: {join_limited(ambiguous)}")
    if large:
        problems.append(f"{pluralize(len(large), 'label')} too large for a class id: {join_limited(sorted(large))}")
    if problems:
        fix = "list every class by --class-names where names are numbers"
        raise ManifestError(source, [f"{problem}; {fix}" for problem in problems], "table")
    return [int(text) for text in texts]


def _images(table: pa.Table, names: Mapping[str, str], path: str) -> tuple[list[str | None], list[bytes | None] | None]:
    """Uris and embedded bytes of the rows, which may be one column of structs."""
    uris: list[str | None] = [None] * table.num_rows
    if "uri" in names:
        uris = _texts(table, names["uri"], path).to_pylist()
    if "bytes" not in names:
        return uris, None
    column = table.column(names["bytes"])
    if pa.types.is_struct(column.type):
        if "uri" not in names and column.type.get_field_index("path") >= 0:
            uris = pc.struct_field(column, "path").to_pylist()
        column = pc.struct_field(column, "bytes")
    return uris, column.to_pylist()


class _Feature(BaseModel):
    names: list[str] | None = None


class _Info(BaseModel):
    features: dict[str, Any] = {}


class _HubMetadata(BaseModel):
    info: _Info = _Info()


class _OwnMetadata(BaseModel):
    class_names: list[str]


def _stored_class_names(schema: pa.Schema, label: str, path: str) -> list[str] | None:
    """Class names in a Parquet file's own metadata, those of a manifest or of Hugging Face; raises ManifestError."""
    metadata = schema.metadata or {}
    key = next((key for key in (METADATA_KEY, b"huggingface") if metadata.get(key)), None)
    if key is None:
        return None
    try:
        if key == METADATA_KEY:
            return _OwnMetadata.model_validate_json(metadata[key]).class_names
        features = _HubMetadata.model_validate_json(metadata[key]).info.features
        return _Feature.model_validate(features.get(label, {})).names or None
    except ValidationError as error:
        fix = "list the classes by --class-names to skip it"
        findings = metadata_findings(error, key.decode())
        raise ManifestError(path, [f"{finding}; {fix}" for finding in findings], "table") from None


def _batches(path: str) -> Iterator[pa.Table]:
    """The table in parts of bounded memory."""
    suffix = path.rpartition(".")[2].lower()
    readers: Mapping[str, Callable[[str], Iterable[pa.Table]]] = {
        "csv": _read_csv, "tsv": _read_csv, "jsonl": _read_json, "ndjson": _read_json, "json": _read_json,
        "parquet": _read_parquet,
    }  # fmt: skip
    if suffix not in readers:
        raise ManifestError(
            path, [f"tables are .csv, .tsv, .jsonl or .parquet; {suggest_name(suffix, readers)}"], "table"
        )
    try:
        yield from readers[suffix](path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        fix = "name it by its format, or write all values of a column as texts or all as numbers"
        raise ManifestError(path, [f"it can't be read as {suffix}: {error}; {fix}"], "table") from None


def _read_csv(path: str) -> list[pa.Table]:
    data = _read_utf8(path)
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    _check_quotes(data, delimiter, path)
    end = re.search(rb"[\r\n]", data)
    first = data[: end.start() if end else len(data)].decode("utf-8-sig")
    header = next(csv.reader(io.StringIO(first), delimiter=delimiter), [])
    # All cells are read as text: a path or a label must not lose its zeros or become a date, and may be NA.
    options = pa_csv.ConvertOptions(
        column_types={name.strip(): pa.string() for name in header}, strings_can_be_null=True, null_values=[""]
    )
    parsing = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    table = pa_csv.read_csv(pa.BufferReader(data), parse_options=parsing, convert_options=options)
    return [pa.table([_unescape(column) for column in table.columns], table.column_names)]


def _unescape(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A CSV column without the leading apostrophes that our own tables have before formulas."""
    return pc.replace_substring_regex(column, ESCAPED, r"\1") if pa.types.is_string(column.type) else column


def _check_quotes(data: bytes, delimiter: str, path: str) -> None:
    """Raise ManifestError for an unclosed quote: pyarrow would read the rest of the file as one cell."""
    if b'"' not in data:
        return
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
    reader, line = csv.reader(text, delimiter=delimiter, strict=True), 1
    try:
        for _ in reader:
            line = reader.line_num + 1
    except csv.Error as error:
        rule = "a cell that begins with a quote must end with one, and a quote within it is written twice"
        if "field limit" in str(error):
            rule = "remove the column with such long cells, or write the table as Parquet"
        raise ManifestError(
            path, [f"the row that begins in line {line} can't be read ({error}): {rule}"], "table"
        ) from None


def _read_json(path: str) -> list[pa.Table]:
    data = _read_utf8(path)
    # pyarrow's parser recurses at each level without a limit, and would crash the process. A block of rows that begins
    # with null crashes it, too.
    marks = np.frombuffer(_STRING.sub(b"", data).translate(None, _NO_MARKS), np.uint8)
    steps = np.where(np.isin(marks, list(b"[{")), 1, np.where(marks == ord("n"), 0, -1))
    levels_at = np.concatenate([[0], np.cumsum(steps)])
    levels = (levels_at - np.minimum.accumulate(levels_at))[1:]
    if levels.max(initial=0) > _MAX_LEVELS:
        raise ManifestError(
            path, [f"a value in it is nested more than {_MAX_LEVELS} levels deep; write plain values"], "table"
        )
    if (levels[marks == ord("n")] == 0).any():
        raise ManifestError(
            path, ['a row in it is null; every row is an object, such as {"path": ..., "label": ...}'], "table"
        )
    return [pa_json.read_json(pa.BufferReader(data))]


def _read_utf8(path: str) -> bytes:
    data = read_text(path, "table")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"line {line} is not in UTF-8, and may be in Latin-1 or Windows-1252; save the file as UTF-8"
        raise ManifestError(path, [problem], "table") from None
    return data


def _read_parquet(path: str) -> Iterator[pa.Table]:
    storage.check_readable(path)
    filesystem, inner = storage.open_filesystem(path)
    try:
        with filesystem.open_input_file(inner) as stream:
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BYTES)
            for batch in file.iter_batches(_BATCH_ROWS):
                yield pa.Table.from_batches([batch])
    except OSError as error:
        raise storage.storage_error("read", path, error) from None
