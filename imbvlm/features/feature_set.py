"""One encoder's outputs of each split that a trial reads, and their entries in this machine's cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from imbvlm.base import storage
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.input_sections import EncoderConfig, FeatureCacheConfig
from imbvlm.features.feature_cache import FeatureCache, PinnedCopy
from imbvlm.features.store_layout import TOWER_FILE, StoreError
from imbvlm.features.stored_split import StoredSplit

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureSet:
    """One encoder's stored outputs: its store's folder, and a file for each official split; plain data for trials.

    `encoder` is the configuration of the encoder, valid in any working directory, for trials that run it themselves.
    `five_crop` has the files of the splits that are stored as five crops. Without `cache` trials read in place.
    `notice` is a sentence for the user about the pass that has just stored them; empty without one. `num_computed` are
    the crops that it computed.
    """

    manifest: str
    folder: str
    splits: Mapping[str, str]
    outputs: tuple[OutputName, ...]
    info: EncoderInfo
    class_embeddings: str | None = None
    encoder: EncoderConfig | None = None
    five_crop: Mapping[str, str] = field(default_factory=dict)
    cache: FeatureCacheConfig | None = None
    notice: str = field(default="", compare=False)
    num_computed: int = field(default=0, compare=False)

    def store(self, split: str) -> StoredSplit:
        """The stored rows of an official split; raises StoreError where it was not extracted."""
        if split not in self.splits:
            raise StoreError(
                f"the {split} split has no stored features; extracted: {', '.join(self.splits)}. Name one of these, or "
                "extract it, too."
            )
        return self._open(self.splits[split])

    def five_crops(self, split: str) -> StoredSplit:
        """The stored rows of a split as five crops of each image."""
        return self._open(self.five_crop[split])

    def _open(self, path: str) -> StoredSplit:
        return StoredSplit.open(path, self.outputs, None if self.cache is None else FeatureCache(self.cache))

    def encoder_tensors(self) -> dict[str, Tensor]:
        """The encoder's `final_norm.weight`, `final_norm.bias` and `projection`, as far as it has them."""
        return load_tensors(storage.join(self.folder, TOWER_FILE))


def pin_features(
    features: FeatureSet, outputs: Iterable[OutputName], of_test: Iterable[OutputName] = ()
) -> tuple[FeatureSet, list[PinnedCopy]]:
    """Pin local copies of everything the trial reads; they stay until the returned objects are dropped.

    `of_test` are further outputs of the test split. Without space for all copies the returned set reads a shared file
    system in place. Raises CacheFullError for an object store.
    """
    stores = [features.store(split) for split in features.splits]
    stores += [features.five_crops(split) for split in features.five_crop]
    requests = [
        store.cache_request(output) for store in stores if store.cache is not None for output in sorted(set(outputs))
    ]
    if "test" in features.splits:
        test = features.store("test")
        more = sorted(set(of_test) - set(outputs))
        requests += [test.cache_request(output) for output in more if test.cache is not None]
    cache = stores[0].cache
    if cache is None or not requests:
        return features, []
    if not storage.is_local(features.folder):
        return features, cache.pin(requests)
    try:
        cache.check_disk()
        # A trial doesn't wait for copies of what it can read in place.
        return features, cache.pin(requests, wait_seconds=0.0)
    except storage.StorageError as error:
        # The cause may be this machine's disk. If the source itself is away, reading it says so.
        _log.warning("features are read in place, which may be slower: %s", error)
        return replace(features, cache=None), []


def load_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises StoreError."""
    try:
        return load_file(storage.local_path(path)) if storage.is_local(path) else load(storage.read_bytes(path))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"can't read {path} ({error}). Start again to write it anew.") from None
