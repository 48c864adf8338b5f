"""Stores of version 0.1, one for each split and number of views, whose shards have numbered rows; they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from imbvlm.base import storage
from imbvlm.base.storage import FileState
from imbvlm.config.encoder_info import OUTPUT_NAMES, OutputName
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.shard_file import is_intact, open_shard
from imbvlm.features.store_layout import STORE_FILE, StoreError, StoreLayout
from imbvlm.features.stored_split import Places

_VERIFIED_FILE = "verified.json"


@dataclass(frozen=True)
class EarlierStore:
    """Shard s of each output has rows [s * rows_per_shard, ...), each as `num_views` consecutive entries."""

    folder: str
    layout: StoreLayout
    num_rows: int
    num_views: int
    rows_per_shard: int

    @staticmethod
    def open(folder: str) -> EarlierStore | None:
        """The store of version 0.1 in a folder; None where there is none. Raises StoreError for a damaged one."""
        path = storage.join(folder, STORE_FILE)
        if not storage.exists(path):
            return None
        try:
            data = storage.read_json(path)
            if "num_rows" not in data:
                return None
            shapes = {output: tuple(shape) for output, shape in data["shapes"].items()}
            layout = StoreLayout(data["digest"], data["precision"], shapes, data.get("int8_tokens", False))
            return EarlierStore(folder, layout, data["num_rows"], data["num_views"], data["rows_per_shard"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} is not a feature store's description ({error}). Delete its folder to compute it anew."
            ) from None

    @property
    def outputs(self) -> tuple[OutputName, ...]:
        """The outputs that have a folder."""
        return tuple(name for name in OUTPUT_NAMES if storage.exists(storage.join(self.folder, name)))

    def num_shards(self, output: OutputName) -> int:
        """Shards of an output."""
        return len(self._present(output))

    def num_bytes(self, output: OutputName) -> int:
        """Bytes of an output's shards."""
        return sum(state.size for state in self._present(output).values())

    def damaged(self, output: OutputName) -> list[str]:
        """The shards that fail a check of every byte."""
        intact = {path.rpartition("/")[2] for path in self.places(output, full=True).paths}
        return [name for shard in self._present(output) if (name := _shard_name(shard)) not in intact]

    def _present(self, output: OutputName) -> dict[int, FileState]:
        """The shards of an output that exist, whole or not."""
        files = storage.file_states(storage.join(self.folder, output))
        num_shards = -(-self.num_rows // self.rows_per_shard)
        return {shard: files[name] for shard in range(num_shards) if (name := _shard_name(shard)) in files}

    def places(self, output: OutputName, *, verify: bool = True, full: bool = False) -> Places:
        """Where the rows x views lie, as far as their shards are intact. `verify` and `full` as for a store's index."""
        shard = np.full(self.num_rows * self.num_views, -1, dtype=np.int32)
        entry = np.zeros_like(shard)
        recorded, paths, reasons = self._verified(output), list[str](), dict[int, str]()
        per_shard = self.rows_per_shard * self.num_views
        for number, state in self._present(output).items():
            first = number * self.rows_per_shard
            if full or (verify and recorded.get(number, (None, {}))[0] != state) or number not in recorded:
                bad = self._bad_rows(output, number, verify=verify)
                if bad is None:
                    continue
            else:
                bad = recorded[number][1]
            part = slice(number * per_shard, min((number + 1) * per_shard, len(shard)))
            shard[part], entry[part] = len(paths), np.arange(part.stop - part.start)
            paths.append(f"{self.folder.rpartition('/')[2]}/{output}/{_shard_name(number)}")
            reasons |= {row: reason for row, reason in bad.items() if first <= row < first + self.rows_per_shard}
        return Places(tuple(paths), shard, entry, reasons)

    def _bad_rows(self, output: OutputName, number: int, *, verify: bool) -> Mapping[int, str] | None:
        """The reasons of a shard's bad rows; None for a damaged shard."""
        first = number * self.rows_per_shard
        try:
            batch = open_shard(storage.join(self.folder, output, _shard_name(number)))
            num_rows = min(self.rows_per_shard, self.num_rows - first)
            if batch.num_rows != num_rows * self.num_views:
                return None
            if verify and not is_intact(batch, self.layout, output, _shard_name(number)):
                return None
            reasons = batch.column("reason").to_pylist()
        except (StoreError, pa.ArrowException, KeyError):
            return None
        return {first + n // self.num_views: reason for n, reason in enumerate(reasons) if reason is not None}

    def _verified(self, output: OutputName) -> dict[int, tuple[FileState, Mapping[int, str]]]:
        """The shards that version 0.1 has verified: their files' state at that time, and their bad rows."""
        path = storage.join(self.folder, output, _VERIFIED_FILE)
        if not storage.exists(path):
            return {}
        try:
            return {
                int(shard): (FileState(*state), {int(row): str(reason) for row, reason in bad.items()})
                for shard, (state, bad) in storage.read_json(path).items()
            }
        except (ValueError, TypeError, AttributeError):
            return {}


def open_store(folder: str) -> FeatureStore | EarlierStore:
    """The store in a folder, of this version or of 0.1; raises StoreError."""
    return EarlierStore.open(folder) or FeatureStore.open(folder)


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.arrow"
