"""The stored rows of a split as a trial reads them: where each view of each row lies, and this machine's copies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.storage import FileState
from imbvlm.config.encoder_info import OutputName
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.data.manifest_schema import Rows
from imbvlm.features.feature_cache import CacheRequest, FeatureCache, PinnedCopy
from imbvlm.features.shard_file import (
    MappedShard,
    copy_by_row,
    copy_by_shard,
    empty_batch,
    is_intact,
    map_shard,
    open_shard,
)
from imbvlm.features.store_layout import StoreError, StoreLayout

# A corrupt copy can come from the transfer or the source, so try twice.
FETCH_ATTEMPTS = 2
# Long rows, and shards with few rows of a batch, are copied row by row. 256 rows of 1.5 kB from 8, 40 and 200 shards
# take 0.09, 0.11 and 0.15 ms by row and 0.08, 0.21 and 0.68 ms by shard; 256 rows of 75 kB take 1.7 and 3.1 ms.
LONG_ROW_BYTES, FEW_ROWS = 8192, 16
SPLITS_FOLDER, SPLIT_SUFFIX = "splits", ".split"
_HEADER = "header"


class Quarantined(NamedTuple):
    """A row whose image could not be decoded, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Places:
    """Where the views of a split's rows lie: shard (N x views,), an index into `paths`, and entry (N x views,) in it.

    The shard is -1 where no shard has the view. `paths` are relative to the folder of all stores. `reasons` has the
    rows without an image.
    """

    paths: tuple[str, ...]
    shard: npt.NDArray[np.int32]
    entry: npt.NDArray[np.int32]
    reasons: Mapping[int, str] = field(default_factory=dict)

    def or_else(self, other: Places) -> Places:
        """These places, and the other's where these have none."""
        has = self.shard >= 0
        shard = np.where(has, self.shard, np.where(other.shard >= 0, other.shard + np.int32(len(self.paths)), -1))
        entry = np.where(has, self.entry, other.entry)
        reasons = {**other.reasons, **self.reasons}
        return Places((*self.paths, *other.paths), shard.astype(np.int32), entry, reasons).compact()

    def compact(self) -> Places:
        """The same places with the paths that they need, in the order in which rows need them."""
        used, first = np.unique(self.shard, return_index=True)
        used = used[np.argsort(first)]
        used = used[used >= 0]
        numbers = np.full(len(self.paths) + 1, -1, dtype=np.int32)
        numbers[used] = np.arange(len(used))
        return replace(self, paths=tuple(self.paths[number] for number in used), shard=numbers[self.shard])


class _CopiedRows(NamedTuple):
    """The rows in a machine's copy of a split: each shard's entries (K,), sorted, and each row's place among them."""

    entries: Mapping[str, Rows]
    place: Rows


@dataclass(frozen=True)
class StoredSplit:
    """The outputs of a split's rows x views, in manifest order. With `cache` they are read from this machine's copy.

    `read` lists the outputs whose bad rows count.
    """

    path: str
    layout: StoreLayout
    num_rows: int
    num_views: int
    places: Mapping[OutputName, Places]
    read: tuple[OutputName, ...]
    cache: FeatureCache | None = None
    # Open memory maps. A map takes address space, not memory.
    _maps: dict[tuple[OutputName, int], MappedShard] = field(default_factory=dict, repr=False, compare=False)
    _pinned: dict[OutputName, PinnedCopy] = field(default_factory=dict, repr=False, compare=False)
    _copied: dict[OutputName, _CopiedRows] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def open(path: str, outputs: Sequence[OutputName] | None = None, cache: FeatureCache | None = None) -> StoredSplit:
        """Open a split's file to read `outputs` (None: all that it has). Raises StoreError."""
        try:
            tensors = load(storage.read_bytes(path))
            header = json.loads(tensors[_HEADER].tobytes())
            shapes = {output: tuple(shape) for output, shape in header["layout"].pop("shapes").items()}
            layout = StoreLayout(**header["layout"], shapes=shapes)
            places = {
                output: Places(
                    tuple(paths),
                    tensors[f"{output}/shard"],
                    tensors[f"{output}/entry"],
                    {int(row): str(reason) for row, reason in reasons.items()},
                )
                for output, (paths, reasons) in header["places"].items()
            }
            num_rows, num_views = int(header["num_rows"]), int(header["num_views"])
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, storage.StorageError) as error:
            raise StoreError(f"{path} is not the file of a stored split ({error}). Start again to write it.") from None
        if cache is None and not storage.is_local(path):
            cache = FeatureCache(FeatureCacheConfig())
        read = tuple(places) if outputs is None else tuple(output for output in outputs if output in places)
        return StoredSplit(path, layout, num_rows, num_views, places, read, cache)

    @staticmethod
    def write(
        root: str, layout: StoreLayout, num_rows: int, num_views: int, places: Mapping[OutputName, Places]
    ) -> str:
        """Write a split's file below the folder of all stores, and return its path; raises StorageError.

        The same places have the same name. A file that stands there already is not written again, so that a read-only
        store serves the splits that it has served before.
        """
        header = {
            "layout": asdict(layout),
            "num_rows": num_rows,
            "num_views": num_views,
            "places": {output: (each.paths, each.reasons) for output, each in places.items()},
        }
        tensors: dict[str, npt.NDArray[Any]] = {
            _HEADER: np.frombuffer(json.dumps(header, sort_keys=True).encode(), dtype=np.uint8)
        }
        for output, each in places.items():
            tensors |= {f"{output}/shard": each.shard, f"{output}/entry": each.entry}
        data = save(tensors)
        name = hashlib.blake2b(data, digest_size=12).hexdigest() + SPLIT_SUFFIX
        path = storage.join(root, SPLITS_FOLDER, name)
        if not storage.exists(path):
            storage.write_bytes(path, data)
        return path

    @property
    def root(self) -> str:
        """The folder of all stores."""
        return self.path.rsplit("/", 2)[0]

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
        places = self.places[output]
        shards = places.shard[entries]
        indices: npt.NDArray[Any] = (
            places.entry[entries] if self.cache is None else self._copied_rows(output).place[entries]
        )
        maps = {shard: self._mapped_shard(output, shard) for shard in np.unique(shards).tolist()}
        is_long = gathered.shape[1] * gathered.itemsize >= LONG_ROW_BYTES
        copy = copy_by_row if is_long or len(rows) < FEW_ROWS * len(maps) else copy_by_shard
        copy(maps, shards, indices, gathered)
        return gathered.view(len(rows), *shape)

    @cached_property
    def quarantine(self) -> tuple[Quarantined, ...]:
        """Rows without an image, in order, over the outputs that are read."""
        reasons = {row: reason for output in self.read for row, reason in self.places[output].reasons.items()}
        return tuple(Quarantined(row, reasons[row]) for row in sorted(reasons))

    @cached_property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Flags (num_rows,) of the rows that have an image."""
        flags = np.ones(self.num_rows, dtype=np.bool_)
        flags[[entry.row for entry in self.quarantine]] = False
        return flags

    def _mapped_shard(self, output: OutputName, shard: int) -> MappedShard:
        key = (output, shard)
        if key not in self._maps:
            path = self.places[output].paths[shard]
            self._maps[key] = (
                map_shard(open_shard(storage.join(self.root, path)), self.layout, output)
                if self.cache is None
                else self._map_copy(output, path)
            )
        return self._maps[key]

    # ------------------------------------------------------------------------------------ this machine's copy

    def cache_request(self, output: OutputName) -> CacheRequest:
        """The request to copy an output's rows; raises StoreError where shards are missing.

        A copy has a file for each shard, with the values of the split's rows alone, and for int8 the scales after them.
        """
        paths, entries = self.places[output].paths, self._copied_rows(output).entries
        folders = {path.rpartition("/")[0] for path in paths}
        present = {
            f"{folder}/{name}": state
            for folder in folders
            for name, state in storage.file_states(storage.join(self.root, folder)).items()
        }
        if any(path not in present for path in paths):
            raise StoreError(f"{self.root} lacks shards of {output}. Start again to compute them.")
        by_name = {_copy_name(path): path for path in paths}
        files = {
            name: FileState(self._copy_bytes(output, len(entries[path])), present[path].modified, 0)
            for name, path in by_name.items()
        }
        return CacheRequest(f"{self.path}:{output}", files, lambda name, to: self._fetch(output, by_name[name], to))

    def _copied_rows(self, output: OutputName) -> _CopiedRows:
        if output not in self._copied:
            places = self.places[output]
            pairs = places.shard.astype(np.int64) << 32 | places.entry
            unique, inverse = np.unique(pairs, return_inverse=True)
            starts = np.searchsorted(unique, np.arange(len(places.paths) + 1) << 32)
            entries = {
                path: unique[starts[number] : starts[number + 1]] & 0xFFFFFFFF
                for number, path in enumerate(places.paths)
            }
            self._copied[output] = _CopiedRows(entries, inverse - starts[places.shard])
        return self._copied[output]

    def _copy_bytes(self, output: OutputName, num_entries: int) -> int:
        is_scaled = self.layout.stored_as(output) == "int8"
        return self.layout.num_bytes(output, num_entries) + 4 * self.layout.shapes[output][-1] * is_scaled

    def _map_copy(self, output: OutputName, path: str) -> MappedShard:
        if output not in self._pinned:
            assert self.cache is not None
            (self._pinned[output],) = self.cache.pin([self.cache_request(output)])
        shape = (len(self._copied_rows(output).entries[path]), *self.layout.shapes[output])
        data = np.memmap(self._pinned[output].folder / _copy_name(path), mode="r")
        num_bytes = self.layout.num_bytes(output, shape[0])
        values = data[:num_bytes].view(self.layout.stored_as(output)).reshape(shape)
        scales = np.asarray(data[num_bytes:].view(np.float32)) if len(data) > num_bytes else None
        return MappedShard(np.asarray(values), scales)

    def _fetch(self, output: OutputName, path: str, to: Path) -> None:
        """Copy the split's rows of one shard, all of whose bytes are verified, to a local path."""
        source = storage.join(self.root, path)
        folder, _, name = path.split("/")
        layout = replace(self.layout, digest=folder)
        for _ in range(FETCH_ATTEMPTS):
            try:
                batch = open_shard(source)
                if is_intact(batch, layout, output, name):
                    values, scales = map_shard(batch, layout, output)
                    rows = values[self._copied_rows(output).entries[path]]
                    data = rows.tobytes() + (b"" if scales is None else scales.tobytes())
                    storage.write_bytes(str(to), data)
                    return
            except (StoreError, pa.ArrowException):
                continue
        store = storage.join(self.root, folder)
        raise StoreError(
            f"{source} is damaged at its source. Run `imbvlm features check {store}`: it records the damage, and the "
            "next sweep computes the shard's images again."
        )


def _copy_name(path: str) -> str:
    return path.replace("/", "-")
