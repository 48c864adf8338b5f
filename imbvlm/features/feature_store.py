"""Stored tower outputs: Arrow IPC shards that appear whole, prove themselves, and are read by memory map."""

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
from imbvlm.features.feature_cache import DEFAULT_COPIES, CacheRequest, Copies, PinnedCopy
from imbvlm.features.shard_file import (
    Rows,
    _checksum,
    _copy_by_row,
    _copy_by_shard,
    _empty,
    _flat,
    _is_finite,
    _Mapped,
    _metadata,
    _open_shard,
    _scale,
    _schema,
    _to_arrow,
    as_tensor,
    quantize_int8,
)
from imbvlm.features.store_layout import STORE_FILE, VERIFIED_FILE, StoreError, StoreLayout

LEFTOVER_SECONDS = 3600
# A damaged copy is the way's fault or the source's.
FETCH_ATTEMPTS = 2
# A file that changes twice within its file system's tick keeps its times: so young a one isn't taken for verified.
SETTLED_SECONDS = 3.0
# Rows so long, or of shards with so few of them in a batch, are copied one by one: for 256 of 1.5 kB from 8, 40 and 200
# shards that takes 0.09, 0.11 and 0.15 ms beside 0.08, 0.21 and 0.68; for 256 of 75 kB 1.7 ms beside 3.1.
LONG_ROW_BYTES, FEW_ROWS = 8192, 16


class Quarantined(NamedTuple):
    """A row whose image could not be decoded, and why."""

    row: int
    reason: str


class VerifiedShard(NamedTuple):
    """What is known of a shard since its bytes were last checked: its file then, and why which of its rows are bad."""

    state: FileState
    bad: Mapping[int, str]


@dataclass(frozen=True)
class FeatureStore:
    """One folder: the outputs of one tower for one official split, rows x views in manifest order.

    `read` lists the outputs whose bad rows count (None: those that have a folder); a store may hold more, also
    half-finished ones that another process is writing. With `copies` values are read from this machine's copy, as they
    are from an object store in any case.
    """

    folder: str
    layout: StoreLayout
    read: tuple[OutputName, ...] | None = None
    copies: Copies | None = None
    # Memory maps opened so far; a map costs address space, not memory.
    _maps: dict[tuple[OutputName, int], _Mapped] = field(default_factory=dict, repr=False, compare=False)
    _held: dict[OutputName, PinnedCopy] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def create(folder: str, layout: StoreLayout) -> FeatureStore:
        """The store in a folder, begun where there is none; its layout on disk wins. Raises StoreError."""
        if not storage.exists(storage.join(folder, STORE_FILE)):
            text = json.dumps(asdict(layout), indent=1, sort_keys=True)
            _write_once(storage.join(folder, STORE_FILE), text.encode())
        store = FeatureStore.open(folder)
        if (store.layout.digest, store.layout.num_rows) != (layout.digest, layout.num_rows):
            raise StoreError(f"{folder} holds a store of other rows or another tower; delete it or choose another root")
        store._remove_leftovers()
        return store

    @staticmethod
    def open(folder: str, outputs: Sequence[OutputName] | None = None, copies: Copies | None = None) -> FeatureStore:
        """Open a store to read `outputs` (None: those that have a folder). Raises StoreError."""
        path = storage.join(folder, STORE_FILE)
        try:
            data = json.loads(storage.read_bytes(path))
            shapes = {output: tuple(shape) for output, shape in data.pop("shapes").items()}
            layout = StoreLayout(**data, shapes=shapes)
        except (storage.StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is not a feature store's description ({error})") from None
        if copies is None and not storage.is_local(folder):
            copies = DEFAULT_COPIES
        return FeatureStore(folder, layout, None if outputs is None else tuple(outputs), copies)

    @property
    def num_rows(self) -> int:
        return self.layout.num_rows

    @property
    def num_views(self) -> int:
        return self.layout.num_views

    @property
    def outputs(self) -> tuple[OutputName, ...]:
        if self.read is not None:
            return self.read
        return tuple(name for name in OUTPUT_NAMES if storage.exists(storage.join(self.folder, name)))

    def shard_path(self, output: OutputName, shard: int) -> str:
        """Where a shard lies or would lie."""
        return storage.join(self.folder, output, _shard_name(shard))

    def present(self, output: OutputName) -> dict[int, FileState]:
        """The shards of an output that are there, whole or not."""
        found = storage.file_states(storage.join(self.folder, output))
        names = {shard: _shard_name(shard) for shard in range(self.layout.num_shards)}
        return {shard: found[name] for shard, name in names.items() if name in found}

    def wanted(self, output: OutputName) -> CacheRequest:
        """What a copy of an output is made of; raises StoreError where shards are lacking."""
        present, source = self.present(output), storage.join(self.folder, output)
        if len(present) < self.layout.num_shards:
            raise StoreError(f"{source} lacks shards; start again and they are computed")
        files = {_shard_name(shard): state for shard, state in present.items()}
        shards = {_shard_name(shard): shard for shard in present}
        return CacheRequest(source, files, lambda name, path: self._fetch(output, shards[name], path))

    def missing(self, output: OutputName, *, full: bool = False) -> list[int]:
        """Shards of an output that are absent, damaged or foreign.

        Every byte of a shard is read and checksummed once; while its size and times stay what they were then, it counts
        as intact. `full` reads them all again: what a disk has lost since shows in no date.
        """
        proofs, states = self._proofs(output), self.present(output)

        def prove(shard: int) -> VerifiedShard | None:
            known = proofs.get(shard)
            if not full and known is not None and known.state == states[shard]:
                return known
            bad = self._check(output, shard)
            return None if bad is None else VerifiedShard(states[shard], bad)

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = dict(zip(states, pool.map(prove, states), strict=True))
        intact = {shard: proof for shard, proof in found.items() if proof is not None}
        self._keep_proofs(output, proofs, intact)
        return [shard for shard in range(self.layout.num_shards) if shard not in intact]

    def mark_verified(self, output: OutputName, written: Mapping[int, int], bad: Mapping[int, str]) -> None:
        """Take shards for intact that were just written, with so many bytes, to an object store, which loses none.

        So nobody has to fetch all of them only to see that. On a disk they are read once, by the next `missing`.
        """
        if storage.is_local(self.folder):
            return
        proofs, states = self._proofs(output), self.present(output)
        fresh = {
            shard: VerifiedShard(state, {row: bad[row] for row in self.layout.rows_of(shard) if row in bad})
            for shard, state in states.items()
            if written.get(shard) == state.size
        }
        self._keep_proofs(output, proofs, {**proofs, **fresh})

    def write(
        self, output: OutputName, shard: int, values: npt.NDArray[np.floating[Any]], reasons: Sequence[str | None]
    ) -> int:
        """Write one shard, values (rows, views, ...) and a reason or None per row; returns its bytes.

        Raises StoreError for values that are not finite in the store's precision.
        """
        rows = self.layout.rows_of(shard)
        expected = (len(rows), self.num_views, *self.layout.shapes[output])
        if values.shape != expected or len(reasons) != len(rows):
            raise ValueError(f"shard {shard} of {output} has shape {expected}, and was given {values.shape}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values, dtype=self.layout.precision)
        if not _is_finite(stored):
            raise StoreError(
                f"{output} has values that are not finite in {self.layout.precision} (largest "
                f"{np.abs(values).max():.4g}); set features.precision: float32, or look at the tower's weights"
            )
        scale = None
        if self.layout.stored_as(output) == "int8":
            stored, scale = quantize_int8(stored)
        data = _to_arrow(self.layout, output, shard, stored, scale, reasons)
        storage.write_bytes(self.shard_path(output, shard), memoryview(data))
        self._maps.pop((output, shard), None)
        self._held.pop(output, None)
        return int(data.size)

    def view(self, output: OutputName, shard: int) -> Tensor:
        """A shard's values (rows, views, ...) as on disk, without a copy: memory that must not be written to."""
        return as_tensor(self._mapped(output, shard).values)

    def gather(self, output: OutputName, rows: Rows, views: Rows | None = None, pinned: bool = False) -> Tensor:
        """The outputs (B, ...) of rows (B,) and their views (B,), the first view by default, in the order asked.

        In the layout's precision, also where they are bytes on disk; `pinned` for a copy to a GPU that nothing waits
        for.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_rows:
            raise IndexError(f"rows must be 0 to {self.num_rows - 1}, and span {rows.min()} to {rows.max()}")
        entries = rows * self.num_views if views is None else rows * self.num_views + np.asarray(views, dtype=np.int64)
        shape = self.layout.shapes[output]
        gathered = _empty((len(rows), int(np.prod(shape))), self.layout.precision, pinned)
        shards, places = np.divmod(entries, self.layout.rows_per_shard * self.num_views)
        maps = {shard: self._mapped(output, shard) for shard in np.unique(shards).tolist()}
        is_long = gathered.shape[1] * gathered.itemsize >= LONG_ROW_BYTES
        copy = _copy_by_row if is_long or len(rows) < FEW_ROWS * len(maps) else _copy_by_shard
        copy(maps, shards, places, gathered)
        return gathered.view(len(rows), *shape)

    @cached_property
    def quarantine(self) -> tuple[Quarantined, ...]:
        """Rows without an image, in order, over the outputs that are read."""
        found: dict[int, str] = {}
        for output in self.outputs:
            # From afar only what is new is read whole; a file on a disk is opened, and little of it read.
            proofs = {} if storage.is_local(self.folder) else self._proofs(output)
            for shard in range(self.layout.num_shards):
                known = proofs.get(shard)
                found |= (
                    self._bad_rows(_open_shard(self.shard_path(output, shard)), shard) if known is None else known.bad
                )
        return tuple(Quarantined(row, found[row]) for row in sorted(found))

    @cached_property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Which rows (num_rows,) have an image."""
        flags = np.ones(self.num_rows, dtype=np.bool_)
        flags[[entry.row for entry in self.quarantine]] = False
        return flags

    def _proofs(self, output: OutputName) -> dict[int, VerifiedShard]:
        """What each shard was when its bytes were last checked; empty where that isn't known."""
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

    def _keep_proofs(
        self, output: OutputName, before: Mapping[int, VerifiedShard], intact: Mapping[int, VerifiedShard]
    ) -> None:
        oldest = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        # An object is replaced as a whole, and its store's clock is another one.
        is_remote = not storage.is_local(self.folder)
        settled = {shard: proof for shard, proof in intact.items() if is_remote or proof.state.is_before(oldest)}
        if settled != before:
            data = json.dumps({str(shard): proof for shard, proof in settled.items()})
            # A store that may only be read is as good; it is checked anew each time.
            with contextlib.suppress(storage.StorageError):
                storage.write_bytes(storage.join(self.folder, output, VERIFIED_FILE), data.encode())

    def _bad_rows(self, batch: pa.RecordBatch, shard: int) -> dict[int, str]:
        first, reasons = self.layout.rows_of(shard).start, batch.column("reason").to_pylist()
        return {first + n // self.num_views: reason for n, reason in enumerate(reasons) if reason is not None}

    def _remove_leftovers(self) -> None:
        """Delete unfinished files of writers that were killed; young ones may be another process's work."""
        oldest = time.time() - LEFTOVER_SECONDS
        if not storage.is_local(self.folder):
            return
        for path in storage.local_path(self.folder).glob("*/.shard-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _mapped(self, output: OutputName, shard: int) -> _Mapped:
        key = (output, shard)
        if key not in self._maps:
            batch = _open_shard(storage.join(self._readable_folder(output), _shard_name(shard)))
            shape = (len(self.layout.rows_of(shard)), self.num_views, *self.layout.shapes[output])
            self._maps[key] = _Mapped(_flat(batch, output).reshape(shape), _scale(batch))
        return self._maps[key]

    def _readable_folder(self, output: OutputName) -> str:
        """Where an output's shards can be mapped: in place, or in this machine's copy, made where it is missing."""
        if self.copies is None:
            return storage.join(self.folder, output)
        if output not in self._held:
            (self._held[output],) = self.copies.pin([self.wanted(output)])
        return str(self._held[output].folder)

    def _fetch(self, output: OutputName, shard: int, path: Path) -> None:
        """Bring one shard to a path, and prove it there."""
        for _ in range(FETCH_ATTEMPTS):
            storage.download(self.shard_path(output, shard), path)
            if self._check(output, shard, str(path)) is not None:
                return
        raise StoreError(
            f"{self.shard_path(output, shard)} is damaged where it lies; `imbvlm features check {self.folder}` makes "
            "sure of that, and then the next sweep computes it anew"
        )

    def _check(self, output: OutputName, shard: int, path: str | None = None) -> dict[int, str] | None:
        """Read and compare every byte of a shard, where it lies or at `path`: its bad rows, or None for a bad shard."""
        try:
            batch = _open_shard(path or self.shard_path(output, shard))
            if not batch.schema.equals(_schema(output, self.layout)):
                return None
            batch.validate(full=True)
        except (StoreError, pa.ArrowException):
            return None
        if batch.num_rows != len(self.layout.rows_of(shard)) * self.num_views:
            return None
        expected = _metadata(self.layout.digest, output, shard, _checksum(batch, output))
        return self._bad_rows(batch, shard) if batch.schema.metadata == expected else None


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.arrow"


def _write_once(uri: str, data: bytes) -> None:
    """Write a file unless another process has just done so: all must agree on one layout.

    In an object store the last one wins; what is written there again is the same.
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
