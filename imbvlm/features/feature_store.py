"""A store of encoder outputs by image: Arrow shards that appear whole, verify themselves, and are only added to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imbvlm.base import storage
from imbvlm.base.json_file import read_json
from imbvlm.base.storage import FileState
from imbvlm.config.encoder_info import OUTPUT_NAMES, OutputName
from imbvlm.features.entry_index import (
    SHARD_SUFFIX,
    Digests,
    EntryIndex,
    Keys,
    entry_keys,
    keys_of_views,
    read_index,
    write_index,
)
from imbvlm.features.shard_file import (
    is_finite,
    is_intact,
    map_shard,
    open_shard,
    quantize_int8,
    shard_contents,
    shard_keys,
    to_arrow,
)
from imbvlm.features.store_layout import STORE_FILE, StoreError, StoreLayout
from imbvlm.features.stored_split import Places, StoredSplit

LEFTOVER_SECONDS = 3600
# Timestamps are coarse: a file modified less than this ago is not recorded as verified.
SETTLED_SECONDS = 3.0
_USES = "uses"


class StoreUse(NamedTuple):
    """The manifest whose images were read from a store, the sweep's folder if it was one, and the time in seconds."""

    manifest: str
    sweep: str | None
    at: float


@dataclass(frozen=True)
class FeatureStore:
    """One folder: the outputs of one encoder for images of any manifest, in shards of some entries each."""

    folder: str
    layout: StoreLayout

    @staticmethod
    def create(folder: str, layout: StoreLayout) -> FeatureStore:
        """Open the store in a folder, or begin it. Raises StoreError."""
        path = storage.join(folder, STORE_FILE)
        if not storage.exists(path):
            # Several processes write the same: the folder's name is a digest of what matters.
            storage.write_json(path, dict(sorted(asdict(layout).items())))
        store = FeatureStore.open(folder)
        if store.layout.digest != layout.digest:
            raise StoreError(f"{folder} holds a store of another encoder. Delete it or choose another folder.")
        store._remove_leftovers()
        return store

    @staticmethod
    def open(folder: str) -> FeatureStore:
        """Open a store; raises StoreError."""
        path = storage.join(folder, STORE_FILE)
        try:
            data = storage.read_json(path)
            shapes = {output: tuple(shape) for output, shape in data.pop("shapes").items()}
            return FeatureStore(folder, StoreLayout(**data, shapes=shapes))
        except (storage.StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} is not a feature store's description ({error}). Delete its folder to compute it anew."
            ) from None

    @property
    def outputs(self) -> tuple[OutputName, ...]:
        """The outputs that have a folder."""
        return tuple(name for name in OUTPUT_NAMES if storage.exists(self.output_folder(name)))

    def output_folder(self, output: OutputName) -> str:
        """The folder of an output's shards."""
        return storage.join(self.folder, output)

    def shard_path(self, output: OutputName, shard: str) -> str:
        """Path of a shard."""
        return storage.join(self.folder, output, shard)

    def append(
        self,
        output: OutputName,
        contents: Digests,
        views: npt.NDArray[np.integer[Any]],
        values: npt.NDArray[np.floating[Any]],
        reasons: Sequence[str | None],
    ) -> str:
        """Write a shard of values (E, ...) for views (E,) of images (E, 16), and its index; returns its name.

        `reasons` has the reason of each bad image or None. The same entries have the same name, whoever computes them.
        Raises StoreError for values that are not finite in the store's precision.
        """
        expected = (len(contents), *self.layout.shapes[output])
        if values.shape != expected or len(reasons) != len(contents) or len(views) != len(contents):
            raise ValueError(f"{output} of {len(contents)} entries must have shape {expected}, got {values.shape}")
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
        return self._write(output, contents, views, stored, scales, reasons)

    def index(
        self,
        output: OutputName,
        *,
        written: frozenset[str] = frozenset(),
        verify: bool = True,
        full: bool = False,
        record: bool = False,
    ) -> EntryIndex:
        """The entries in intact shards.

        Every byte of a shard is checked once, and again when its size or times change; `full` checks all shards, which
        also finds what a disk has lost since. Shards in `written` are this run's own and not checked, and without
        `verify` only sizes are compared. With `record` the results become one file, and damaged shards are deleted.
        An object store loses no bytes, so that its shards are verified where they are read.
        """
        folder = self.output_folder(output)
        shards, indexes = read_index(folder)
        recorded = EntryIndex.union(indexes.values())
        compares_times = verify and storage.is_local(self.folder)

        def is_same(name: str) -> bool:
            state = recorded.shards.get(name)
            if state is None or full:
                return False
            return state == shards[name] if compares_times and name not in written else state.size == shards[name].size

        same = [name for name in shards if is_same(name)]
        others = sorted(shards.keys() - same)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            results = pool.map(lambda name: self._verified(output, name, shards[name], verify), others)
            verified = [index for index in results if index is not None]
        index = EntryIndex.union([recorded.only(same), *verified])
        if record and (verified or len(indexes) > 1 or recorded.shards.keys() != index.shards.keys()):
            self._record(output, index, list(indexes), shards.keys() - index.shards.keys())
        return index

    def places(self, output: OutputName, keys: Keys, written: frozenset[str] = frozenset()) -> Places:
        """Where the entries with these keys (N, views) lie; `written` as for `index`."""
        index = self.index(output, written=written)
        positions = index.find(keys.reshape(-1))
        has = positions >= 0
        shard, entry = np.full(keys.size, -1, dtype=np.int32), np.zeros(keys.size, dtype=np.int32)
        shard[has], entry[has] = index.shard[positions[has]], index.entry[positions[has]]
        bad = np.flatnonzero(np.isin(keys.reshape(-1), list(index.reasons))) if index.reasons else ()
        reasons = {int(place) // keys.shape[1]: index.reasons[keys.flat[place]] for place in bad}
        folder = self.folder.rpartition("/")[2]
        return Places(tuple(f"{folder}/{output}/{name}" for name in index.shards), shard, entry, reasons)

    def write_split(self, contents: Digests, num_views: int, outputs: Sequence[OutputName]) -> str:
        """Write the file of a split whose images (N, 16) are stored in all views, and return its path."""
        keys = entry_keys(contents, num_views)
        places = {output: self.places(output, keys).compact() for output in outputs}
        return StoredSplit.write(self.folder.rpartition("/")[0], self.layout, len(contents), num_views, places)

    def num_shards(self, output: OutputName) -> int:
        """Shards of an output."""
        return len(read_index(self.output_folder(output))[0])

    def num_bytes(self, output: OutputName) -> int:
        """Bytes of an output's shards."""
        return sum(state.size for state in read_index(self.output_folder(output))[0].values())

    def damaged(self, output: OutputName) -> list[str]:
        """The shards that fail a check of every byte. A record of shards in an object store is made without them."""
        shards, indexes = read_index(self.output_folder(output))
        index = self.index(output, full=True)
        damaged = sorted(shards.keys() - index.shards.keys())
        if damaged and not storage.is_local(self.folder):
            self._record(output, index, list(indexes), frozenset())
        return damaged

    def record_use(self, manifest: str, sweep: str | None) -> None:
        """Record that a manifest's images are read now, by a sweep or not; a read-only store stays as it is."""
        name = hashlib.blake2b(f"{manifest}\0{sweep}".encode(), digest_size=8).hexdigest()
        use = StoreUse(manifest, sweep, time.time())
        with contextlib.suppress(storage.StorageError):
            storage.write_json(storage.join(self.folder, _USES, f"{name}.json"), use._asdict())

    def uses(self) -> list[StoreUse]:
        """The latest use by each manifest and sweep, the oldest first."""
        folder = storage.join(self.folder, _USES)
        uris = (storage.join(folder, name) for name in storage.list_files(folder) if name.endswith(".json"))
        uses = (read_json(uri, lambda data: StoreUse(**data), "Delete it to go on without it.") for uri in uris)
        return sorted(filter(None, uses), key=lambda use: use.at)

    def remove(self, output: OutputName, keys: Keys, shards: Collection[str]) -> None:
        """Remove the entries with these sorted keys from some shards; others of these shards are written anew.

        Quantized entries keep the scales that they have. Raises StorageError.
        """
        for name in shards:
            batch = open_shard(self.shard_path(output, name))
            present = shard_keys(batch)
            rows = np.flatnonzero(~np.isin(present, keys))
            if len(rows):
                values, scales = map_shard(batch, self.layout, output)
                contents, views = shard_contents(batch)[rows], batch.column("view").to_numpy()[rows]
                reasons = batch.column("reason").take(pa.array(rows)).to_pylist()
                self._write(output, contents, views, np.ascontiguousarray(values[rows]), scales, reasons)
            if len(rows) < len(present):
                storage.delete(self.shard_path(output, name))
        self.index(output, record=True)

    def _write(
        self,
        output: OutputName,
        contents: Digests,
        views: npt.NDArray[np.integer[Any]],
        stored: npt.NDArray[Any],
        scales: npt.NDArray[np.float32] | None,
        reasons: Sequence[str | None],
    ) -> str:
        contents = np.ascontiguousarray(contents)
        keys = keys_of_views(contents, views)
        name = hashlib.blake2b(keys.tobytes(), digest_size=12).hexdigest() + SHARD_SUFFIX
        data = to_arrow(self.layout, output, name, contents, views, stored, scales, reasons)
        storage.write_bytes(self.shard_path(output, name), memoryview(data))
        # The next run verifies a local file, whose times aren't these. An object is what was written.
        state = FileState(int(data.size), 0, 0)
        write_index(self.output_folder(output), EntryIndex.of_shard(name, state, keys, reasons))
        return name

    def _verified(self, output: OutputName, name: str, state: FileState, verify: bool) -> EntryIndex | None:
        """The index of one shard; None for a damaged one or another store's."""
        try:
            batch = open_shard(self.shard_path(output, name))
            if verify and not is_intact(batch, self.layout, output, name):
                return None
            return EntryIndex.of_shard(name, state, shard_keys(batch), batch.column("reason").to_pylist())
        except (StoreError, pa.ArrowException, KeyError, ValueError):
            return None

    def _record(
        self, output: OutputName, index: EntryIndex, replaced: Sequence[str], damaged: frozenset[str] | set[str]
    ) -> None:
        """Write the index in place of those that it was made of; a read-only store is verified again each time."""
        oldest = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        is_remote = not storage.is_local(self.folder)
        # An object is replaced as a whole, and its store has another clock.
        shards = {
            name: state if is_remote or state.is_before(oldest) else FileState(state.size, 0, 0)
            for name, state in index.shards.items()
        }
        with contextlib.suppress(storage.StorageError):
            write_index(self.output_folder(output), replace(index, shards=shards))
            for name in replaced:
                storage.delete(storage.join(self.folder, output, name))
            for name in damaged:
                storage.delete(self.shard_path(output, name))

    def _remove_leftovers(self) -> None:
        """Delete unfinished files of killed writers; recent ones may belong to a running process."""
        oldest = time.time() - LEFTOVER_SECONDS
        if not storage.is_local(self.folder):
            return
        for path in storage.local_path(self.folder).glob("*/.*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
