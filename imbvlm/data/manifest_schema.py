"""The manifest's Arrow table: columns and types, uris and their folder, identical images, and checks of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import join_limited, pluralize

Rows = npt.NDArray[np.int64]

SPLITS = ("train", "val", "test")
# `content` is the digest of embedded bytes, and of files that were copies of each other when the manifest was built:
# trials keep identical images together without reading them. `group` is what no split divides, such as a camera.
SCHEMA = pa.schema(
    [
        ("uri", pa.large_string()),
        ("bytes", pa.large_binary()),
        ("label", pa.int32()),
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("content", pa.binary(16)),
        ("group", pa.large_string()),
    ]
)
_ABSOLUTE = rf"^(/|~|{storage.SCHEMED})"


def type_problem(kind: pa.DataType) -> str | None:
    """The reason why values of a type are not read from an untrusted file; None for plain types.

    A file chooses its types, and a type that Ray Data registers unpickles each value.
    """
    if isinstance(kind, pa.ExtensionType):
        return f"it is of the type {kind.extension_name}, which may run code when it is read; write plain Arrow types"
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    inner += [kind.value_type] if pa.types.is_dictionary(kind) else []
    return next(filter(None, map(type_problem, inner)), None)


def type_findings(schema: pa.Schema, names: Iterable[str]) -> list[str]:
    """The `type_problem` of each of these columns that has one, as a sentence."""
    problems = {name: type_problem(schema.field(name).type) for name in names}
    return [f"the column {name!r} isn't read: {problem}" for name, problem in problems.items() if problem]


def metadata_findings(error: ValidationError, key: str) -> list[str]:
    """Sentences about the mistakes in a Parquet file's own metadata under a key."""
    mistakes = error.errors(include_url=False, include_input=False)[:5]
    return [
        f"its metadata {'.'.join(filter(None, (key, *map(str, mistake['loc']))))!r} can't be read: {mistake['msg']}"
        for mistake in mistakes
    ]


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded; file names of bytes that are not UTF-8 can't."""
    return text.isascii() or text.encode("utf-8", "replace").decode() == text


def seeded(seed: int) -> np.random.Generator:
    """A generator of random numbers; raises ImbvlmError for a negative seed."""
    if seed < 0:
        raise ImbvlmError(f"a seed must be a whole number from 0 on, got {seed}. Give one such as 0.")
    return np.random.default_rng(seed)


class LazyRows:
    """Rows of a manifest's table whose images are copied only when they are read or pickled.

    Blocks can thus be planned without a copy of all embedded images.
    """

    def __init__(self, table: pa.Table, rows: Rows) -> None:
        self._table, self._rows = table.select(["uri", "bytes"]), rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: Sequence[int] | None = None) -> tuple[list[str | None], list[bytes | None]]:
        """Uris and embedded bytes of the rows, or of those with these numbers among them."""
        rows = self._table.take(pa.array(self._rows if numbers is None else self._rows[list(numbers)]))
        return rows.column("uri").to_pylist(), rows.column("bytes").to_pylist()

    def __reduce__(self) -> tuple[type[LazyRows], tuple[pa.Table, Rows]]:
        return LazyRows, (self._table.take(pa.array(self._rows)), np.arange(len(self._rows)))


def absolute_uris(table: pa.Table, path: str) -> pa.Table:
    """The table with relative uris resolved against the folder of the manifest's file."""
    if "uri" not in table.column_names:
        return table
    folder = storage.absolute(path).rpartition("/")[0]
    uris = table.column("uri").cast(pa.large_string())
    embedded = table.column("bytes").is_valid() if "bytes" in table.column_names else pa.scalar(False)
    keep = pc.or_(pc.fill_null(pc.match_substring_regex(uris, _ABSOLUTE), True), embedded)
    below = pc.replace_substring_regex(uris, r"^\./", "")
    joined = pc.binary_join_element_wise(pa.scalar(folder, pa.large_string()), below, pa.scalar("/", pa.large_string()))
    return with_column(table, "uri", pc.if_else(keep, uris, joined))


def relative_uris(table: pa.Table, path: str) -> pa.Table:
    """The table with uris below the folder of the manifest's file made relative to it."""
    prefix = storage.absolute(path).rpartition("/")[0] + "/"
    uris = table.column("uri")
    below = pc.fill_null(pc.starts_with(uris, prefix), False)
    # A folder's name may begin with ~, which would be read as a user's home.
    rest = pc.replace_substring_regex(pc.utf8_slice_codeunits(uris, len(prefix)), _ABSOLUTE, r"./\1")
    return with_column(table, "uri", pc.if_else(below, rest, uris))


def with_column(table: pa.Table, name: str, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    """The table with other values in a column that it has."""
    return table.set_column(table.column_names.index(name), name, values)


def conform(table: pa.Table) -> pa.Table:
    """The columns of SCHEMA in its types, with the digests of embedded bytes; drops other columns."""
    rows = table.num_rows
    columns = {
        field.name: table.column(field.name) if field.name in table.column_names else pa.nulls(rows, field.type)
        for field in SCHEMA
    }
    if "content" not in table.column_names or columns["content"].null_count > columns["bytes"].null_count:
        columns["content"] = _digests(columns["bytes"])
    split = columns["split"].cast(pa.string())
    columns["split"] = pc.dictionary_encode(split).cast(SCHEMA.field("split").type)
    return pa.table([columns[field.name].cast(field.type) for field in SCHEMA], schema=SCHEMA)


def _digests(data: pa.ChunkedArray | pa.Array) -> pa.Array:
    if data.null_count == len(data):
        return pa.nulls(len(data), pa.binary(16))
    return pa.array([digest_of(value.as_buffer()) if value.is_valid else None for value in data], pa.binary(16))


def digest_of(data: Any) -> bytes:
    """The digest of an image's bytes in the column `content`."""
    return hashlib.blake2b(data, digest_size=16).digest()


def split_codes(split: pa.ChunkedArray) -> npt.NDArray[np.int8]:
    """Index in SPLITS of each row, whatever the order of the column's own dictionary."""
    codes = pc.index_in(split.cast(pa.string()), value_set=pa.array(SPLITS))
    return codes.to_numpy().astype(np.int8)


def split_column(codes: Iterable[int]) -> pa.Array:
    """The column of the splits with these indices in SPLITS."""
    return pa.array([SPLITS[code] for code in codes], SCHEMA.field("split").type)


def content_groups(table: pa.Table) -> Rows:
    """A number per row (N,), equal for rows with the same content digest or, without one, the same uri."""
    uris = _ids(table.column("uri"))
    if "content" not in table.column_names or table.column("content").null_count == table.num_rows:
        return uris
    contents = _ids(table.column("content"))
    has_digest = table.column("content").is_valid().to_numpy()
    return np.where(has_digest, contents, uris + contents.max() + 1)


def has_groups(table: pa.Table) -> bool:
    """Whether any row of a manifest's table has a group."""
    return "group" in table.column_names and table.column("group").null_count < table.num_rows


def joined_groups(table: pa.Table) -> Rows | None:
    """A number per row (N,), equal for rows of one group; groups with copies of an image are joined.

    A row without a group goes with its copies. None where no row has a group.
    """
    if not has_groups(table):
        return None
    named = table.column("group")
    copies, groups = content_groups(table), _ids(named)
    groups = np.where(named.is_valid().to_numpy(), groups, copies + groups.max() + 1)
    while True:
        joined = _lowest(_lowest(groups, copies), groups)
        if np.array_equal(joined, groups):
            return groups
        groups = joined


def _lowest(values: Rows, ids: Rows) -> Rows:
    """The lowest value (N,) among the rows with the same id."""
    lowest = np.full(ids.max(initial=0) + 1, np.iinfo(np.int64).max)
    np.minimum.at(lowest, ids, values)
    return lowest[ids]


def _ids(values: pa.ChunkedArray) -> Rows:
    encoded = pc.dictionary_encode(values.combine_chunks(), null_encoding="encode")
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return encoded.indices.to_numpy().astype(np.int64)


# ------------------------------------------------------------------------------------------------ checking


def missing_columns(table: pa.Table) -> list[str]:
    """Sentences about missing columns, without which the rows can't be checked."""
    columns, findings = table.column_names, []
    for name in ("label", "split"):
        if name not in columns:
            findings.append(f"column {name!r} is missing; it has {', '.join(columns)}")
    if not {"uri", "bytes"} & set(columns):
        findings.append("columns 'uri' and 'bytes' are both missing; a row needs one of them")
    if "label" in columns and not pa.types.is_integer(table.schema.field("label").type):
        findings.append(f"labels must be whole numbers, and are {table.schema.field('label').type}")
    if "group" in columns and not _is_text(table.schema.field("group").type):
        findings.append(f"groups must be text or whole numbers, and are {table.schema.field('group').type}")
    return findings


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
    return any(is_kind(plain) for is_kind in kinds)


def name_findings(class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Errors in the class names, and warnings (duplicates)."""
    empty = [str(index) for index, name in enumerate(class_names) if not name.strip()]
    findings = [] if class_names else ["it has no class names"]
    unencodable = [ascii(name) for name in class_names if not is_utf8(name)]
    if unencodable:
        findings.append(f"{pluralize(len(unencodable), 'class name')} not in UTF-8: {join_limited(unencodable)}")
    if empty:
        findings.append(f"{pluralize(len(empty), 'class')} without a name: {join_limited(empty)}")
    ids: dict[str, list[str]] = {}
    for index, name in enumerate(class_names):
        ids.setdefault(name.strip().casefold(), []).append(str(index))
    twice = [f"{class_names[int(same[0])]!r} ({', '.join(same)})" for name, same in ids.items() if name and same[1:]]
    shared = f"{pluralize(len(twice), 'name')} of several classes, which text methods can't tell apart"
    warning = f"{shared}: {join_limited(twice)}"
    return findings, [warning] if twice else []


def row_findings(table: pa.Table, num_classes: int) -> list[str]:
    """Sentences about wrong rows of a table from `conform`."""
    labels, split, findings = table.column("label"), table.column("split"), []
    if labels.null_count:
        findings.append(f"{_rows(labels.is_null())} without a label")
    outside = pc.fill_null(pc.or_(pc.less(labels, 0), pc.greater_equal(labels, num_classes)), False)
    if pc.any(outside).as_py():
        values = [str(value) for value in pc.unique(labels.filter(outside)).to_pylist()]
        findings.append(
            f"{_rows(outside)} with a label outside 0 to {num_classes - 1}, the class names: {join_limited(values)}"
        )
    names = pc.fill_null(split.cast(pa.string()), "null")
    unknown = pc.invert(pc.is_in(names, value_set=pa.array(SPLITS)))
    if pc.any(unknown).as_py():
        values = [repr(value) for value in pc.unique(names.filter(unknown)).to_pylist()]
        findings.append(f"{_rows(unknown)} with a split that is none of {', '.join(SPLITS)}: {join_limited(values)}")
    if not pc.any(pc.equal(names, "train")).as_py():
        findings.append("no row is a training row (split 'train')")
    without_image = pc.and_(_blank(table.column("uri")), table.column("bytes").is_null())
    if pc.any(without_image).as_py():
        findings.append(f"{_rows(without_image)} with neither a uri nor bytes")
    return [*findings, *_location_findings(table)]


def _location_findings(table: pa.Table) -> list[str]:
    """A sentence about rows with an unsupported URI; the URI of an embedded image is only a name."""
    uris = pc.if_else(table.column("bytes").is_null(), table.column("uri"), pa.scalar(None, pa.large_string()))
    has_scheme = pc.fill_null(pc.match_substring_regex(uris, f"^{storage.SCHEMED}"), False)
    wrong = pc.and_(has_scheme, pc.invert(pc.fill_null(pc.match_substring_regex(uris, f"^{storage.SUPPORTED}"), True)))
    if not pc.any(wrong).as_py():
        return []
    first = storage.location_problem(uris.filter(wrong)[0].as_py())
    return [f"{_rows(wrong)} whose image can't be read: {first}"]


def _blank(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(pc.binary_length(uris), 0), True)


def _rows(mask: pa.ChunkedArray) -> str:
    rows = np.flatnonzero(mask.to_numpy())
    first = ", ".join(str(row) for row in rows[:3])
    shown = f"{'row' if len(rows) == 1 else 'rows'} {first}{', ...' if len(rows) > 3 else ''}"
    return f"{pluralize(len(rows), 'row')} ({shown})"
