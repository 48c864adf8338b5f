"""Which entry of which shard has a crop of an image, by the image's content: small files that only grow in number."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imbvlm.base import storage
from imbvlm.base.storage import FileState
from imbvlm.data.manifest_schema import Rows

SHARD_SUFFIX, INDEX_SUFFIX = ".arrow", ".index"
DIGEST_BYTES = 16
_KEY_BYTES = DIGEST_BYTES + 2
_READ_THREADS = 16
# Another process may replace the files between a listing and their reading.
_READ_ATTEMPTS = 5
_SCHEMA = pa.schema(
    [("key", pa.binary(_KEY_BYTES)), ("shard", pa.int32()), ("entry", pa.int32()), ("reason", pa.string())]
)
_SHARDS = b"imbvlm.shards"

Digests = npt.NDArray[np.uint8]
# Content and view of an image, as bytes that sort.
Keys = npt.NDArray[np.bytes_]


def entry_keys(contents: Digests, num_views: int) -> Keys:
    """The keys (N, views) of all views of images with these contents (N, 16)."""
    views = np.tile(np.arange(num_views), len(contents))
    return keys_of_views(np.repeat(contents, num_views, axis=0), views).reshape(len(contents), num_views)


def keys_of_views(contents: Digests, views: npt.NDArray[np.integer[Any]]) -> Keys:
    """The keys (E,) of views (E,) of images with these contents (E, 16)."""
    parts = np.empty((len(contents), _KEY_BYTES), dtype=np.uint8)
    parts[:, :DIGEST_BYTES] = contents
    parts[:, DIGEST_BYTES:] = views.astype(">u2").view(np.uint8).reshape(-1, 2)
    return parts.view(f"S{_KEY_BYTES}")[:, 0]


@dataclass(frozen=True)
class EntryIndex:
    """Sorted keys (E,) of entries with their shard (E,), an index into `shards`, and their place in it (E,).

    `shards` maps a shard's name to its file's state when it was written or verified. `reasons` has bad images by key.
    """

    shards: Mapping[str, FileState] = field(default_factory=dict)
    keys: Keys = field(default_factory=lambda: np.empty(0, dtype=f"S{_KEY_BYTES}"))
    shard: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    entry: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    reasons: Mapping[bytes, str] = field(default_factory=dict)

    @staticmethod
    def of_shard(name: str, state: FileState, keys: Keys, reasons: Sequence[str | None]) -> EntryIndex:
        """The index of one shard, whose entries have these keys in this order, and a reason where an image is bad."""
        order = np.argsort(keys, kind="stable")
        bad = {key: reason for key, reason in zip(keys.tolist(), reasons, strict=True) if reason is not None}
        return EntryIndex({name: state}, keys[order], np.zeros(len(keys), np.int32), order.astype(np.int32), bad)

    @staticmethod
    def union(parts: Iterable[EntryIndex]) -> EntryIndex:
        """All entries of the parts; the first part that has a shard counts for it."""
        shards: dict[str, FileState] = {}
        arrays: list[tuple[Keys, npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
        reasons: dict[bytes, str] = {}
        for whole in parts:
            part = whole.only(name for name in whole.shards if name not in shards)
            arrays.append((part.keys, part.shard + np.int32(len(shards)), part.entry))
            shards |= part.shards
            reasons |= part.reasons
        if len(arrays) < 2:
            return EntryIndex(shards, *arrays[0], reasons) if arrays else EntryIndex()
        keys, shard, entry = (np.concatenate(columns) for columns in zip(*arrays, strict=True))
        order = np.argsort(keys, kind="stable")
        return EntryIndex(shards, keys[order], shard[order], entry[order], reasons)

    def only(self, names: Iterable[str]) -> EntryIndex:
        """The entries of these shards."""
        selected = set(names)
        if selected >= self.shards.keys():
            return self
        mask = np.array([name in selected for name in self.shards], dtype=np.bool_)
        rows = mask[self.shard] if len(mask) else np.zeros(0, dtype=np.bool_)
        numbers = (np.cumsum(mask) - 1).astype(np.int32)
        shards = {name: state for name, state in self.shards.items() if name in selected}
        return EntryIndex(shards, self.keys[rows], numbers[self.shard[rows]], self.entry[rows], self.reasons)

    def find(self, keys: Keys) -> Rows:
        """The position in this index of each key (M,), -1 where there is none."""
        if not len(self.keys):
            return np.full(keys.shape, -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


# ------------------------------------------------------------------------------------------------- files


def write_index(folder: str, index: EntryIndex) -> None:
    """Write an index as a file of its own, whole or not at all; raises StorageError."""
    columns = [
        pa.Array.from_buffers(
            pa.binary(_KEY_BYTES), len(index.keys), [None, pa.py_buffer(np.ascontiguousarray(index.keys))]
        ),
        pa.array(index.shard),
        pa.array(index.entry),
        pa.array(
            [index.reasons.get(key) for key in index.keys.tolist()] if index.reasons else [None] * len(index.keys),
            pa.string(),
        ),
    ]
    table = pa.table(columns, schema=_SCHEMA)
    table = table.replace_schema_metadata({_SHARDS: json.dumps(index.shards).encode()})
    write_table(folder, table)


def write_table(folder: str, table: pa.Table) -> None:
    """Write a table as a file with a name of its own, which sorts by time."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{INDEX_SUFFIX}"
    storage.write_bytes(storage.join(folder, name), sink.getvalue().to_pybytes())


def read_table(uri: str, schema: pa.Schema) -> pa.Table | None:
    """A table with these columns; None for a damaged file or another's."""
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri)))
        # A file chooses its types, and reading one that runs code is what this test prevents.
        return file.read().combine_chunks() if file.schema_arrow.equals(schema) else None
    except (OSError, ValueError, pa.ArrowException):
        return None


def binary_rows(column: pa.ChunkedArray, width: int) -> Digests:
    """The bytes (N, width) of a column of fixed-size binary values without nulls, copied only from several chunks."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width).reshape(-1, width)
        for chunk in column.chunks
        if len(chunk)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, width), np.uint8), *parts])


def read_index(folder: str) -> tuple[dict[str, FileState], dict[str, EntryIndex]]:
    """The shards in a folder with their files' states, and the indexes by their file's name, the newest first.

    A damaged index is empty. Raises StorageError.
    """
    for attempt in range(_READ_ATTEMPTS):
        files = storage.file_states(folder)
        names = sorted((name for name in files if name.endswith(INDEX_SUFFIX)), reverse=True)
        try:
            with ThreadPoolExecutor(_READ_THREADS) as pool:
                indexes = list(pool.map(lambda name: _read_index(storage.join(folder, name)), names))
            break
        except storage.StorageError:
            if attempt + 1 == _READ_ATTEMPTS or set(names) <= storage.file_states(folder).keys():
                raise
    shards = {name: state for name, state in files.items() if name.endswith(SHARD_SUFFIX)}
    return shards, dict(zip(names, indexes, strict=True))


@lru_cache(maxsize=4096)
def _read_index(uri: str) -> EntryIndex:
    """A file is never changed, so that a process reads it once."""
    table = read_table(uri, _SCHEMA)
    if table is None:
        return EntryIndex()
    try:
        shards = {str(name): FileState(*state) for name, state in json.loads(table.schema.metadata[_SHARDS]).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return EntryIndex()
    keys = binary_rows(table.column("key"), _KEY_BYTES).view(f"S{_KEY_BYTES}")[:, 0]
    shard, entry = (table.column(name).to_numpy().astype(np.int32) for name in ("shard", "entry"))
    is_sorted = bool((keys[1:] >= keys[:-1]).all())
    if not is_sorted or shard.min(initial=0) < 0 or shard.max(initial=-1) >= len(shards):
        return EntryIndex()
    reasons = table.column("reason")
    bad = np.flatnonzero(reasons.is_valid().to_numpy())
    return EntryIndex(shards, keys, shard, entry, {keys[row]: reasons[int(row)].as_py() for row in bad})


# --------------------------------------------------------------------------------------------- while others append


class FinishedEntries:
    """The entries of an output that some process has finished, for one that is about to compute entries."""

    # Larger indexes are searched in place: Python's objects would take five times their memory.
    _MAX_SET = 4096

    def __init__(self, folder: str) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._names: set[str] = set()
        self._few: set[bytes] = set()
        self._many: list[Keys] = []

    def refresh(self) -> None:
        """Read what was finished since the last call."""
        with self._lock:
            shards, indexes = read_index(self._folder)
            if not self._names <= indexes.keys():
                # Indexes were merged, perhaps without a damaged shard.
                self._names, self._few, self._many = set(), set(), []
            for name in indexes.keys() - self._names:
                keys = indexes[name].only(shards).keys
                if len(keys) > self._MAX_SET:
                    self._many.append(keys)
                else:
                    self._few.update(keys.tolist())
            self._names = set(indexes)

    def __contains__(self, key: np.bytes_) -> bool:
        if bytes(key) in self._few:
            return True
        places = ((keys, int(np.searchsorted(keys, key))) for keys in self._many)
        return any(place < len(keys) and keys[place] == key for keys, place in places)


@lru_cache(maxsize=64)
def finished_entries(folder: str) -> FinishedEntries:
    """This process's view of an output's folder."""
    return FinishedEntries(folder)
