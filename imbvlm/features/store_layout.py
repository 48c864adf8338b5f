"""Identity and shape of a feature store: key, layout, file names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import ComputeDtype, OutputName

# Raise it when the meaning of an output or the layout of a shard changes: old stores are then computed again. Stores of
# version 0.1 have format 1, a folder for each split, and are read.
FORMAT_VERSION = 2
STORE_FILE = "store.json"
TOWER_FILE = "tower.safetensors"
PACE_FILE = "pace.json"
Precision = Literal["float16", "float32"]
StoredAs = Literal["float16", "float32", "int8"]


class StoreError(ImbvlmError):
    """A feature store that can't be read or written; the sentence names the folder and the cause."""


@dataclass(frozen=True)
class StoreKey:
    """Everything but an image's content and view that determines its numbers; equal digests are interchangeable.

    `computed_in` is the encoder's compute dtype, by default another on CPUs than on GPUs. `precision` is that of the
    stored numbers, tokens under `int8_tokens` excepted. `token_pooling` is the encoder's.
    """

    weights: str
    preprocess: Mapping[str, Any]
    precision: Precision
    computed_in: ComputeDtype
    token_pooling: int = 1
    int8_tokens: bool = False

    @property
    def digest(self) -> str:
        """24 hexadecimal digits, the name of the store's folder; stores of version 0.1 have 32."""
        return _digest(format=FORMAT_VERSION, **asdict(self))[:24]

    def split_digest(self, rows: str, num_views: int) -> str:
        """The name of the folder in which version 0.1 stored a split, by its fingerprint and views."""
        return _digest(format=1, rows=rows, num_views=num_views, **asdict(self))


def _digest(**values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StoreLayout:
    """The shape of a store's entries, which are outputs of one crop of one image each.

    With `int8_tokens` each shard has a scale of its own for each channel. `encoder` and `preprocess` say for people
    what is stored.
    """

    digest: str
    precision: Precision
    shapes: Mapping[OutputName, tuple[int, ...]]
    int8_tokens: bool = False
    encoder: str = ""
    preprocess: Mapping[str, Any] = field(default_factory=dict)

    def stored_as(self, output: OutputName) -> StoredAs:
        """The dtype of an output on disk."""
        return "int8" if self.int8_tokens and output == "tokens" else self.precision

    def num_bytes(self, output: OutputName, num_entries: int = 1) -> int:
        """Size of one output's numbers on disk, without Arrow's few kilobytes per shard; 0 if the encoder lacks it."""
        if output not in self.shapes:
            return 0
        return num_entries * int(np.prod(self.shapes[output])) * np.dtype(self.stored_as(output)).itemsize
