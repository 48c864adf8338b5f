"""`imbvlm features list | prune`: what stores hold and who reads it, and what no manifest refers to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow.parquet as pq

from imbvlm.assets import MANIFESTS
from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.formatting import join_limited, pluralize, size_text
from imbvlm.base.text_tables import table
from imbvlm.cli.features_command import stores_in
from imbvlm.data.files.file_listing import list_tree
from imbvlm.data.manifest import EMBEDDED, METADATA_KEY, Manifest
from imbvlm.features.earlier_store import EarlierStore
from imbvlm.features.entry_index import Keys, entry_keys
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.known_files import recorded_contents
from imbvlm.sweep.records.folder_lease import is_running

# Younger entries may belong to a pass that has not ended, and to a manifest that isn't written yet.
MIN_AGE_SECONDS = 86_400.0


@dataclass(frozen=True)
class ListedStore:
    """A store's content and uses; `last_used` in seconds, None for a store of version 0.1, which doesn't say."""

    folder: str
    encoder: str
    image_size: int | None
    outputs: tuple[str, ...]
    num_images: int
    num_bytes: int
    last_used: float | None
    sweeps: tuple[str, ...]
    format: int

    @staticmethod
    def of(store: FeatureStore | EarlierStore) -> ListedStore:
        """Look at a store; raises StorageError."""
        num_bytes = sum(store.num_bytes(output) for output in store.outputs)
        if isinstance(store, EarlierStore):
            return ListedStore(store.folder, "", None, store.outputs, store.num_rows, num_bytes, None, (), 1)
        indexes = (store.index(output, verify=False) for output in store.outputs)
        keys = [index.keys for index in indexes]
        contents = np.unique(np.concatenate(keys).astype("S16")) if keys else ()
        uses = store.uses()
        return ListedStore(
            folder=store.folder,
            encoder=store.layout.encoder,
            image_size=store.layout.preprocess.get("image_size"),
            outputs=store.outputs,
            num_images=len(contents),
            num_bytes=num_bytes,
            last_used=uses[-1].at if uses else None,
            sweeps=tuple(dict.fromkeys(use.sweep for use in uses if use.sweep is not None)),
            format=2,
        )


def list_stores(folders: Sequence[str]) -> list[ListedStore]:
    """The stores in some folders of stores; raises StoreError where there are none."""
    return [ListedStore.of(store) for folder in folders for store in stores_in(storage.absolute(folder))]


def describe(stores: Sequence[ListedStore]) -> str:
    """A table of stores."""
    header = ("store", "encoder", "px", "outputs", "images", "size", "last used", "by sweeps")
    return table(header, [_cells(store) for store in stores], Console().width)


def to_dicts(stores: Sequence[ListedStore]) -> list[dict[str, object]]:
    """Plain data for JSON."""
    return [asdict(store) for store in stores]


def _cells(store: ListedStore) -> tuple[str, ...]:
    used = "-" if store.last_used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(store.last_used))
    return (
        store.folder,
        store.encoder or "a split, by version 0.1",
        str(store.image_size or "-"),
        ", ".join(store.outputs),
        f"{store.num_images:,}",
        size_text(store.num_bytes),
        used,
        join_limited([sweep.rpartition("/")[2] for sweep in store.sweeps], 3) if store.sweeps else "-",
    )


def prune(root: str, manifests: str, *, delete: bool) -> list[str]:
    """A line for each store: what no manifest below a folder refers to, and is a day old; `delete` removes it.

    Embedded manifests always count. A store that a running sweep has used is left alone, and so are stores of version
    0.1. Raises StorageError, StoreError.
    """
    root = storage.absolute(root)
    tables = [manifest.table for manifest in _manifests_below(storage.absolute(manifests))]
    contents = np.concatenate([np.empty((0, 16), np.uint8), *(recorded_contents(root, rows) for rows in tables)])
    referenced = np.unique(entry_keys(contents, 1)[:, 0].astype("S16"))
    counted = f"{pluralize(len(tables), 'manifest')}, embedded ones among them"
    lines = [f"{counted}, have {pluralize(len(referenced), 'image')} that a store may hold"]
    return lines + [f"{store.folder}: {_prune(store, referenced, delete=delete)}" for store in stores_in(root)]


def _prune(store: FeatureStore | EarlierStore, referenced: Keys, *, delete: bool) -> str:
    if isinstance(store, EarlierStore):
        return "is of version 0.1, which doesn't say of which images; delete the folder once no sweep needs it"
    running = [use.sweep for use in store.uses() if use.sweep is not None and is_running(use.sweep)]
    if running:
        return f"is left alone, because {join_limited(running, 3)} runs"
    oldest = time.time_ns() - int(MIN_AGE_SECONDS * 1e9)
    images, num_bytes = set[bytes](), 0.0
    for output in store.outputs:
        states = storage.file_states(store.output_folder(output))
        index = store.index(output, verify=False)
        names = list(index.shards)
        is_old = np.array([states[name].is_before(oldest) for name in names], dtype=np.bool_)
        unused = ~np.isin(index.keys.astype("S16"), referenced) & (is_old[index.shard] if len(names) else False)
        images.update(index.keys[unused].astype("S16").tolist())
        num_bytes += store.layout.num_bytes(output, int(unused.sum()))
        if delete and unused.any():
            shards = [names[number] for number in np.unique(index.shard[unused])]
            store.remove(output, index.keys[unused], shards)
    if not images:
        return "nothing to prune"
    verb = "pruned" if delete else "to prune with --delete"
    return f"{pluralize(len(images), 'image')}, {size_text(num_bytes)}, {verb}"


def _manifests_below(folder: str) -> Iterator[Manifest]:
    """The manifests below a folder, and the embedded ones; other Parquet files are none."""
    for name in MANIFESTS:
        yield Manifest.read(f"{EMBEDDED}{name}")
    for file in list_tree(folder):
        if file.path.endswith(".parquet"):
            uri = storage.join(folder, file.path)
            filesystem, inner = storage.open_filesystem(uri)
            if METADATA_KEY in (pq.read_schema(inner, filesystem=filesystem).metadata or {}):
                yield Manifest.read(uri)
