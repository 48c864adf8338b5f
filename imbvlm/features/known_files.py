"""Files whose content is known: URI, size and time, or an object's ETag, stand for the digest of the bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imbvlm.base import storage
from imbvlm.data.files.file_listing import file_states, file_versions
from imbvlm.data.manifest_schema import Rows
from imbvlm.features.entry_index import DIGEST_BYTES, INDEX_SUFFIX, Digests, binary_rows, read_table, write_table

_FOLDER = "known-files"
_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.large_string()),
        pa.field("size", pa.int64()),
        pa.field("version", pa.int64()),
        pa.field("content", pa.binary(DIGEST_BYTES)),
    ]
)


class RowContents(NamedTuple):
    """Digests (N, 16) of images, which rows' are known (N,), and size and version (N, 2) of the rows' files now."""

    digests: Digests
    is_known: npt.NDArray[np.bool_]
    versions: npt.NDArray[np.int64]


def row_contents(root: str, rows: pa.Table) -> RowContents:
    """The contents of a manifest's rows, as far as they are embedded or their files were read for the stores in `root`.

    Raises StorageError.
    """
    embedded = rows.column("bytes").is_valid().to_numpy()
    digests, is_known = np.zeros((len(rows), DIGEST_BYTES), dtype=np.uint8), embedded.copy()
    digests[embedded] = binary_rows(rows.column("content").filter(pa.array(embedded)), DIGEST_BYTES)
    versions = np.full((len(rows), 2), -1, dtype=np.int64)
    files = np.flatnonzero(~embedded)
    if len(files):
        uris = rows.column("uri").take(pa.array(files))
        versions[files] = _versions(uris.to_pylist())
        table = _records(root)
        places = pc.fill_null(pc.index_in(uris, value_set=table.column("uri")), -1).to_numpy()
        files, places = files[places >= 0], places[places >= 0]
        recorded = np.stack([table.column(name).to_numpy()[places] for name in ("size", "version")], axis=1)
        same = (recorded == versions[files]).all(axis=1)
        digests[files[same]] = binary_rows(table.column("content"), DIGEST_BYTES)[places[same]]
        is_known[files[same]] = True
    return RowContents(digests, is_known, versions)


def recorded_contents(root: str, rows: pa.Table) -> Digests:
    """The contents (K, 16) that the rows of a manifest had when they were last read, wherever their files are now."""
    embedded, table = rows.column("bytes").is_valid(), _records(root)
    files = pc.is_in(table.column("uri"), value_set=rows.column("uri").filter(pc.invert(embedded)))
    parts = (rows.column("content").filter(embedded), table.column("content").filter(files))
    return np.concatenate([binary_rows(part, DIGEST_BYTES) for part in parts])


def _versions(uris: list[str]) -> npt.NDArray[np.int64]:
    try:
        return file_versions(uris)
    except storage.StorageError:
        # Objects may be read without a right to list them; their URIs alone stand for them then.
        return file_states(uris)


def record_files(root: str, uris: pa.ChunkedArray, versions: npt.NDArray[np.int64], digests: Digests) -> None:
    """Record that files had this content in these versions; raises StorageError."""
    content = pa.Array.from_buffers(
        pa.binary(DIGEST_BYTES), len(digests), [None, pa.py_buffer(np.ascontiguousarray(digests))]
    )
    columns = [uris.combine_chunks(), pa.array(versions[:, 0]), pa.array(versions[:, 1]), content]
    write_table(storage.join(root, _FOLDER), pa.table(columns, schema=_SCHEMA))


def merge_records(root: str) -> None:
    """Make one file of many, with the newest record of each URI; those of a read-only store stay."""
    folder = storage.join(root, _FOLDER)
    names = _names(folder)
    if len(names) > 1:
        with suppress(storage.StorageError):
            write_table(folder, _merged(_read(folder, names)))
            for name in names:
                storage.delete(storage.join(folder, name))


def unreadable_digest(uri: str | None, reason: str) -> bytes:
    """What stands for the content of a file that can't be read."""
    return hashlib.blake2b(f"{uri}\0{reason}".encode("utf-8", "surrogateescape"), digest_size=DIGEST_BYTES).digest()


def _records(root: str) -> pa.Table:
    """The newest record of each URI."""
    folder = storage.join(root, _FOLDER)
    return _merged(_read(folder, _names(folder)))


def _names(folder: str) -> list[str]:
    """The records' files, the newest first."""
    return [name for name in reversed(storage.list_files(folder)) if name.endswith(INDEX_SUFFIX)]


def _read(folder: str, names: Sequence[str]) -> list[pa.Table]:
    """The intact tables of these files; a file that another process is merging may be gone."""
    tables = []
    for name in names:
        with suppress(storage.StorageError):
            tables.append(read_table(storage.join(folder, name), _SCHEMA))
    return [table for table in tables if table is not None]


def _merged(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables([_SCHEMA.empty_table(), *tables]).combine_chunks()
    if len(tables) < 2:
        return table
    first: Rows = pc.index_in(table.column("uri"), value_set=table.column("uri")).to_numpy()
    return table.take(pa.array(np.flatnonzero(first == np.arange(len(first))))).combine_chunks()
