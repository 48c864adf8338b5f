"""Stored encoder outputs: Arrow IPC shards that appear whole, verify themselves, and are read by memory map."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.storage import FileState
from imbvlm.config.encoder_info import OUTPUT_NAMES, OutputName
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.data.manifest_schema import Rows
from imbvlm.features.feature_cache import CacheRequest, FeatureCache, PinnedCopy
from imbvlm.features.shard_file import (
    MappedShard,
    channel_scales,
    copy_by_row,
    copy_by_shard,
    empty_batch,
    flat_values,
    is_finite,
    is_intact,
    open_shard,
    quantize_int8,
    to_arrow,
)
from imbvlm.features.store_layout import STORE_FILE, VERIFIED_FILE, StoreError, StoreLayout

LEFTOVER_SECONDS = 3600
# A corrupt copy can come from the transfer or the source, so try twice.
FETCH_ATTEMPTS = 2
# Timestamps are coarse: a file modified less than this ago is not recorded as verified.
SETTLED_SECONDS = 3.0
# Long rows, and shards with few rows of a batch, are copied row by row. 256 rows of 1.5 kB from 8, 40 and 200 shards
# take 0.09, 0.11 and 0.15 ms by row and 0.08, 0.21 and 0.68 ms by shard; 256 rows of 75 kB take 1.7 and 3.1 ms.
LONG_ROW_BYTES, FEW_ROWS = 8192, 16


class Quarantined(NamedTuple):
    """A row whose image could not be decoded, and why."""

    row: int
    reason: str


class VerifiedShard(NamedTuple):
    """A shard whose bytes were checked: its file's state at that time, and the reason of each bad row."""

    state: FileState
    bad: Mapping[int, str]


@dataclass(frozen=True)
class FeatureStore:
    """One folder: the outputs of one encoder for one official split, rows x views in manifest order.

    `read` lists the outputs whose bad rows count (None: those that have a folder). A store may hold more outputs, which
    another process may be writing. With `cache` values are read through this machine's cache, as an object store's are
    in any case.
    """

    folder: str
    layout: StoreLayout
    read: tuple[OutputName, ...] | None = None
    cache: FeatureCache | None = None
    # Open memory maps. A map takes address space, not memory.
    _maps: dict[tuple[OutputName, int], MappedShard] = field(default_factory=dict, repr=False, compare=False)
    _pinned: dict[OutputName, PinnedCopy] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def create(folder: str, layout: StoreLayout) -> FeatureStore:
        """Open the store in a folder, or begin it; an existing layout is kept. Raises StoreError."""
        if not storage.exists(storage.join(folder, STORE_FILE)):
            text = json.dumps(asdict(layout), indent=1, sort_keys=True)
            _write_once(storage.join(folder, STORE_FILE), text.encode())
        store = FeatureStore.open(folder)
        if (store.layout.digest, store.layout.num_rows) != (layout.digest, layout.num_rows):
            raise StoreError(
                f"{folder} holds a store of other rows or another encoder. Delete it or choose another folder."
            )
        store._remove_leftovers()
        return store

    @staticmethod
    def open(
        folder: str, outputs: Sequence[OutputName] | None = None, cache: FeatureCache | None = None
    ) -> FeatureStore:
        """Open a store to read `outputs` (None: those that have a folder). Raises StoreError."""
        path = storage.join(folder, STORE_FILE)
        try:
            data = json.loads(storage.read_bytes(path))
            shapes = {output: tuple(shape) for output, shape in data.pop("shapes").items()}
            layout = StoreLayout(**data, shapes=shapes)
        except (storage.StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} is not a feature store's description ({error}). Delete its folder to compute it anew."
            ) from None
        if cache is None and not storage.is_local(folder):
            cache = FeatureCache(FeatureCacheConfig())
        return FeatureStore(folder, layout, None if outputs is None else tuple(outputs), cache)

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return self.layout.num_rows

    @property
    def num_views(self) -> int:
        """Crops of each row."""
        return self.layout.num_views

    @property
    def outputs(self) -> tuple[OutputName, ...]:
        """The outputs that are read."""
        if self.read is not None:
            return self.read
        return tuple(name for name in OUTPUT_NAMES if storage.exists(storage.join(self.folder, name)))

    def shard_path(self, output: OutputName, shard: int) -> str:
        """Path of a shard, whether or not it exists."""
        return storage.join(self.folder, output, _shard_name(shard))

    def present(self, output: OutputName) -> dict[int, FileState]:
        """The shards of an output that exist, whole or not."""
        files = storage.file_states(storage.join(self.folder, output))
        names = {shard: _shard_name(shard) for shard in range(self.layout.num_shards)}
        return {shard: files[name] for shard, name in names.items() if name in files}

    def cache_request(self, output: OutputName) -> CacheRequest:
        """The request to cache an output; raises StoreError where shards are missing."""
        present, source = self.present(output), storage.join(self.folder, output)
        if len(present) < self.layout.num_shards:
            raise StoreError(f"{source} lacks shards. Start again to compute them.")
        shards = {_shard_name(shard): shard for shard in present}
        files = {name: present[shard] for name, shard in shards.items()}
        return CacheRequest(source, files, lambda name, path: self._fetch(output, shards[name], path))

    def missing(self, output: OutputName, *, full: bool = False) -> list[int]:
        """Shards of an output that are absent, damaged or of another store.

        Every byte of a shard is checked once, and again when its size or times change; `full` checks all shards, which
        also finds what a disk has lost since.
        """
        verified, states = self._read_verified(output), self.present(output)

        def verify(shard: int) -> VerifiedShard | None:
            earlier = verified.get(shard)
            if not full and earlier is not None and earlier.state == states[shard]:
                return earlier
            bad = self._verify(output, shard)
            return None if bad is None else VerifiedShard(states[shard], bad)

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            results = dict(zip(states, pool.map(verify, states), strict=True))
        intact = {shard: result for shard, result in results.items() if result is not None}
        self._write_verified(output, verified, intact)
        return [shard for shard in range(self.layout.num_shards) if shard not in intact]

    def mark_verified(self, output: OutputName, written: Mapping[int, int], bad: Mapping[int, str]) -> None:
        """Record shards as verified that this run wrote to an object store, by their sizes in bytes.

        An object store loses no bytes, and nobody has to fetch the shards to check them. The next `missing` checks
        shards on a disk. `bad` has the reasons of bad rows.
        """
        if storage.is_local(self.folder):
            return
        verified, states = self._read_verified(output), self.present(output)
        new = {
            shard: VerifiedShard(state, {row: bad[row] for row in self.layout.rows_of(shard) if row in bad})
            for shard, state in states.items()
            if written.get(shard) == state.size
        }
        self._write_verified(output, verified, {**verified, **new})

    def write(
        self, output: OutputName, shard: int, values: npt.NDArray[np.floating[Any]], reasons: Sequence[str | None]
    ) -> int:
        """Write one shard, values (rows, views, ...) and a reason or None per row; returns its size in bytes.

        Raises StoreError for values that are not finite in the store's precision.
        """
        rows = self.layout.rows_of(shard)
        expected = (len(rows), self.num_views, *self.layout.shapes[output])
        if values.shape != expected or len(reasons) != len(rows):
            raise ValueError(f"shard {shard} of {output} must have shape {expected}, got {values.shape}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values, dtype=self.layout.precision)
        if not is_finite(stored):
            raise StoreError(
                f"{output} must be finite in {self.layout.precision}, and its largest value is "
                f"{np.abs(values).max():.4g}. Set features.precision: float32, or check the encoder's weights."
            )
        scales = None
        if self.layout.stored_as(output) == "int8":
            stored, scales = quantize_int8(stored)
        data = to_arrow(self.layout, output, shard, stored, scales, reasons)
        storage.write_bytes(self.shard_path(output, shard), memoryview(data))
        self._maps.pop((output, shard), None)
        self._pinned.pop(output, None)
        return int(data.size)

    def gather(self, output: OutputName, rows: Rows, views: Rows | None = None, pinned: bool = False) -> Tensor:
        """The outputs (B, ...) of rows (B,) in their views (B,), the first view by default, in the given order.

        The result has the layout's precision, also where int8 is stored. `pinned` puts it into pinned memory, for a
        copy to a GPU that nothing waits for.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_rows:
            raise IndexError(f"rows must be 0 to {self.num_rows - 1}, got {rows.min()} to {rows.max()}")
        entries = rows * self.num_views if views is None else rows * self.num_views + np.asarray(views, dtype=np.int64)
        shape = self.layout.shapes[output]
        gathered = empty_batch((len(rows), int(np.prod(shape))), self.layout.precision, pinned)
        shards, indices = np.divmod(entries, self.layout.rows_per_shard * self.num_views)
        maps = {shard: self.mapped_shard(output, shard) for shard in np.unique(shards).tolist()}
        is_long = gathered.shape[1] * gathered.itemsize >= LONG_ROW_BYTES
        copy = copy_by_row if is_long or len(rows) < FEW_ROWS * len(maps) else copy_by_shard
        copy(maps, shards, indices, gathered)
        return gathered.view(len(rows), *shape)

    @cached_property
    def quarantine(self) -> tuple[Quarantined, ...]:
        """Rows without an image, in order, over the outputs that are read."""
        reasons: dict[int, str] = {}
        for output in self.outputs:
            # An object store's shards would be read whole; on a disk this opens a file and reads little of it.
            verified = {} if storage.is_local(self.folder) else self._read_verified(output)
            for shard in range(self.layout.num_shards):
                if shard in verified:
                    reasons |= verified[shard].bad
                else:
                    reasons |= self._bad_rows(open_shard(self.shard_path(output, shard)), shard)
        return tuple(Quarantined(row, reasons[row]) for row in sorted(reasons))

    @cached_property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Flags (num_rows,) of the rows that have an image."""
        flags = np.ones(self.num_rows, dtype=np.bool_)
        flags[[entry.row for entry in self.quarantine]] = False
        return flags

    def mapped_shard(self, output: OutputName, shard: int) -> MappedShard:
        """A shard's values (rows, views, ...) as on disk, memory-mapped; they must not be written to."""
        key = (output, shard)
        if key not in self._maps:
            batch = open_shard(storage.join(self._readable_folder(output), _shard_name(shard)))
            shape = (len(self.layout.rows_of(shard)), self.num_views, *self.layout.shapes[output])
            self._maps[key] = MappedShard(flat_values(batch, output).reshape(shape), channel_scales(batch))
        return self._maps[key]

    def _read_verified(self, output: OutputName) -> dict[int, VerifiedShard]:
        """The record of verified shards; empty where it is missing or damaged."""
        path = storage.join(self.folder, output, VERIFIED_FILE)
        if not storage.exists(path):
            return {}
        try:
            data = json.loads(storage.read_bytes(path))
            return {
                int(shard): VerifiedShard(FileState(*state), {int(row): str(reason) for row, reason in bad.items()})
                for shard, (state, bad) in data.items()
            }
        except (ValueError, TypeError, AttributeError):
            return {}

    def _write_verified(
        self, output: OutputName, before: Mapping[int, VerifiedShard], intact: Mapping[int, VerifiedShard]
    ) -> None:
        oldest = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        # An object is replaced as a whole, and its store has another clock.
        is_remote = not storage.is_local(self.folder)
        settled = {shard: entry for shard, entry in intact.items() if is_remote or entry.state.is_before(oldest)}
        if settled != before:
            data = json.dumps({str(shard): entry for shard, entry in settled.items()})
            # A read-only store is valid too, and is verified again each time.
            with contextlib.suppress(storage.StorageError):
                storage.write_bytes(storage.join(self.folder, output, VERIFIED_FILE), data.encode())

    def _bad_rows(self, batch: pa.RecordBatch, shard: int) -> dict[int, str]:
        first, reasons = self.layout.rows_of(shard).start, batch.column("reason").to_pylist()
        return {first + n // self.num_views: reason for n, reason in enumerate(reasons) if reason is not None}

    def _remove_leftovers(self) -> None:
        """Delete unfinished files of killed writers; recent ones may belong to a running process."""
        oldest = time.time() - LEFTOVER_SECONDS
        if not storage.is_local(self.folder):
            return
        for path in storage.local_path(self.folder).glob("*/.shard-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _readable_folder(self, output: OutputName) -> str:
        """The folder whose shards can be mapped: the store's own, or the entry in this machine's cache."""
        if self.cache is None:
            return storage.join(self.folder, output)
        if output not in self._pinned:
            (self._pinned[output],) = self.cache.pin([self.cache_request(output)])
        return str(self._pinned[output].folder)

    def _fetch(self, output: OutputName, shard: int, path: Path) -> None:
        """Copy one shard to a path and verify the copy."""
        for _ in range(FETCH_ATTEMPTS):
            storage.download(self.shard_path(output, shard), path)
            if self._verify(output, shard, str(path)) is not None:
                return
        raise StoreError(
            f"{self.shard_path(output, shard)} is damaged at its source. Run `imbvlm features check {self.folder}`: "
            "it records the damage, and the next sweep computes the shard again."
        )

    def _verify(self, output: OutputName, shard: int, path: str | None = None) -> dict[int, str] | None:
        """Check every byte of a shard, in place or at `path`; returns its bad rows, or None for a damaged shard."""
        try:
            batch = open_shard(path or self.shard_path(output, shard))
            return self._bad_rows(batch, shard) if is_intact(batch, self.layout, output, shard) else None
        except (StoreError, pa.ArrowException):
            return None


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.arrow"


def _write_once(uri: str, data: bytes) -> None:
    """Write a file unless another process has written it: all processes must agree on one layout.

    In an object store the last writer wins, with the same content.
    """
    if not storage.is_local(uri):
        storage.write_bytes(uri, data)
        return
    path = storage.local_path(uri)
    temporary = storage.join(str(path.parent), f".{path.name}.{os.getpid()}")
    storage.write_bytes(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        storage.delete(temporary)
