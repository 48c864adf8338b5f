"""`imbvlm features check`: every byte of the stored features, read and compared with its checksum."""

from __future__ import annotations

from collections.abc import Sequence

from imbvlm import storage
from imbvlm.features.extract import size_text
from imbvlm.features.store import STORE_FILE, FeatureStore, StoreError
from imbvlm.models.encoder_info import OutputName


def check(folders: Sequence[str]) -> int:
    """Print a line for each store and output in stores, or folders of stores; 1 where a shard is damaged."""
    num_damaged = 0
    for folder in folders:
        for store in _stores(storage.absolute(folder)):
            for output in store.outputs:
                shards = range(store.layout.num_shards)
                there = [shard for shard in shards if storage.exists(store.shard_path(output, shard))]
                damaged = sorted(set(store.missing(output, full=True)) & set(there))
                num_damaged += len(damaged)
                print(f"{store.folder} {output}: {_words(store, output, len(there), damaged)}")
    return int(num_damaged > 0)


def _stores(folder: str) -> list[FeatureStore]:
    if storage.exists(storage.join(folder, STORE_FILE)):
        return [FeatureStore.open(folder)]
    below = [storage.join(folder, name) for name in storage.list_files(folder)]
    stores = [FeatureStore.open(one) for one in below if storage.exists(storage.join(one, STORE_FILE))]
    if not stores:
        raise StoreError(f"{folder} has no stored features; a sweep keeps them in `features` of its storage folder")
    return stores


def _words(store: FeatureStore, output: OutputName, num_there: int, damaged: list[int]) -> str:
    of = f"{num_there:,} of {store.layout.num_shards:,} shards, {size_text(store.layout.num_bytes(output))} when whole"
    if not damaged:
        return f"{of}; intact"
    names = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
    return f"{of}; {len(damaged):,} DAMAGED ({names}): the next sweep that reads them computes them again"
