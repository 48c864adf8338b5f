"""Identity and shape of a feature store: key, layout, file names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import ComputeDtype, OutputName

# Raise it when the meaning of an output or the layout of a shard changes: old stores are then computed again.
FORMAT_VERSION = 1
STORE_FILE = "store.json"
TOWER_FILE = "tower.safetensors"
PACE_FILE = "pace.json"
VERIFIED_FILE = "verified.json"
Precision = Literal["float16", "float32"]
StoredAs = Literal["float16", "float32", "int8"]


class StoreError(ImbvlmError):
    """A feature store that can't be read or written; the sentence names the folder and the cause."""


@dataclass(frozen=True)
class StoreKey:
    """Everything that determines a store's numbers; two stores with the same digest are interchangeable.

    `computed_in` is what the tower computes in, by itself another on CPUs than on GPUs; `precision` what is kept of it,
    but for tokens where `int8_tokens`. `token_pooling` is the tower's.
    """

    rows: str
    weights: str
    preprocess: Mapping[str, Any]
    num_views: int
    precision: Precision
    computed_in: ComputeDtype
    token_pooling: int = 1
    int8_tokens: bool = False

    @property
    def digest(self) -> str:
        """32 hexadecimal digits, the name of the store's folder."""
        canonical = json.dumps({"format": FORMAT_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StoreLayout:
    """How rows lie in shards: shard s has rows [s * rows_per_shard, ...), each with `num_views` entries in a row.

    With `int8_tokens` a shard's tokens are bytes, times a scale for each channel that is the shard's own: so it hangs
    on the shard's rows alone, and comes out the same when it is computed again.
    """

    digest: str
    num_rows: int
    num_views: int
    rows_per_shard: int
    precision: Precision
    shapes: Mapping[OutputName, tuple[int, ...]]
    int8_tokens: bool = False

    def stored_as(self, output: OutputName) -> StoredAs:
        """What an output's numbers are on disk."""
        return "int8" if self.int8_tokens and output == "tokens" else self.precision

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """The manifest rows in one shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def num_bytes(self, output: OutputName) -> int:
        """Size of one output's numbers on disk, without Arrow's few kilobytes per shard."""
        numbers = self.num_rows * self.num_views * int(np.prod(self.shapes[output]))
        return numbers * np.dtype(self.stored_as(output)).itemsize
