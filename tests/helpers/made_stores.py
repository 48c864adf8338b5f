"""Stored splits of given numbers, without images and an encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from imbvlm.base import storage
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import StoreLayout


def made_contents(name: str, num_rows: int) -> np.ndarray:
    """Digests (N, 16) of pretended images, another for each name and number."""
    digests = (hashlib.blake2b(f"{name} {row}".encode(), digest_size=16).digest() for row in range(num_rows))
    return np.frombuffer(b"".join(digests), np.uint8).reshape(num_rows, 16)


def append(
    store: FeatureStore,
    output: str,
    contents: np.ndarray,
    values: np.ndarray,
    reasons: Sequence[str | None] | None = None,
) -> str:
    """Write one shard of values (N, views, ...)."""
    num_rows, num_views = values.shape[:2]
    return store.append(
        output,
        np.repeat(contents, num_views, axis=0),
        np.tile(np.arange(num_views), num_rows),
        values.reshape(-1, *values.shape[2:]),
        [reason for reason in reasons or [None] * num_rows for _ in range(num_views)],
    )


def stored_split(
    root: Path | str,
    layout: StoreLayout,
    outputs: Mapping[str, np.ndarray],
    *,
    name: str = "images",
    per_shard: int = 100,
    bad: Sequence[int] = (),
) -> str:
    """Write outputs (N, views, ...) of made-up images into a store below `root`; returns the split's file."""
    store = FeatureStore.create(storage.join(str(root), layout.digest), layout)
    num_rows, num_views = next(iter(outputs.values())).shape[:2]
    contents = made_contents(name, num_rows)
    for output, values in outputs.items():
        for start in range(0, num_rows, per_shard):
            some = slice(start, start + per_shard)
            reasons = ["truncated" if row in bad else None for row in range(num_rows)[some]]
            append(store, output, contents[some], values[some], reasons)
    return store.write_split(contents, num_views, tuple(outputs))
