"""Identity and shape of a feature store: key, layout, file names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
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
# Metadata of a StoreKey's field that a later version added: the digest leaves it out at its default.
ADDED_LATER = {"added_later": True}
Precision = Literal["float16", "float32"]
StoredAs = Literal["float16", "float32", "int8"]


class StoreError(ImbvlmError):
    """A feature store that can't be read or written; the sentence names the folder and the cause."""


@dataclass(frozen=True)
class StoreKey:
    """Everything that determines a store's numbers; two stores with the same digest are interchangeable.

    `computed_in` is the encoder's compute dtype, by default another on CPUs than on GPUs. `precision` is that of the
    stored numbers, tokens under `int8_tokens` excepted. `token_pooling` is the encoder's.
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
        values = asdict(self)
        for field in fields(self):
            if ADDED_LATER.items() <= field.metadata.items() and values[field.name] == field.default:
                del values[field.name]
        canonical = json.dumps({"format": FORMAT_VERSION, **values}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StoreLayout:
    """Rows by shard: shard s has rows [s * rows_per_shard, ...), each as `num_views` consecutive entries.

    With `int8_tokens` each shard has a scale of its own for each channel. It depends on the shard's rows alone, so that
    a recomputed shard is identical.
    """

    digest: str
    num_rows: int
    num_views: int
    rows_per_shard: int
    precision: Precision
    shapes: Mapping[OutputName, tuple[int, ...]]
    int8_tokens: bool = False

    def stored_as(self, output: OutputName) -> StoredAs:
        """The dtype of an output on disk."""
        return "int8" if self.int8_tokens and output == "tokens" else self.precision

    @property
    def num_shards(self) -> int:
        """Shards of each output."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """The rows of one shard, numbered within the split."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def num_bytes(self, output: OutputName) -> int:
        """Size of one output's numbers on disk, without Arrow's few kilobytes per shard; 0 if the encoder lacks it."""
        if output not in self.shapes:
            return 0
        numbers = self.num_rows * self.num_views * int(np.prod(self.shapes[output]))
        return numbers * np.dtype(self.stored_as(output)).itemsize
