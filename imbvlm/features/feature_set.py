"""The stores of one encoder's outputs that a trial reads, and local copies of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.schema import Tree
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.features.feature_cache import Copies, PinnedCopy
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import TOWER_FILE, StoreError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureSet:
    """Where the stored outputs of one tower lie, a folder per official split; JSON-able, given to trials.

    `encoder` names the tower for trials that run it themselves, by a configuration that holds in any folder.
    """

    manifest: str
    folders: Mapping[str, str]
    outputs: tuple[OutputName, ...]
    info: EncoderInfo
    class_embeddings: str | None = None
    encoder: Tree | None = None
    # Of test-time ensembling, the splits that have it: five crops of each image as views.
    five_crop: Mapping[str, str] = field(default_factory=dict)
    # More views of the training rows of few-shot classes, in their order.
    tail: str | None = None
    # Where each machine keeps its own copies, where trials don't read the folders in place.
    copies: Copies | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        folders = {"folders": dict(self.folders), "five_crop": dict(self.five_crop)}
        copies = None if self.copies is None else self.copies.model_dump()
        return {**asdict(replace(self, copies=None)), **folders, "info": self.info.to_dict(), "copies": copies}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FeatureSet:
        """Back from `to_dict`, also after a way through JSON."""
        return FeatureSet(
            data["manifest"],
            dict(data["folders"]),
            tuple(data["outputs"]),
            EncoderInfo.from_dict(data["info"]),
            data["class_embeddings"],
            data["encoder"],
            dict(data["five_crop"]),
            data["tail"],
            None if data["copies"] is None else Copies.model_validate(data["copies"]),
        )

    def store(self, split: str) -> FeatureStore:
        """The store of an official split; raises StoreError where it was not extracted."""
        if split not in self.folders:
            raise StoreError(f"the {split} split has no stored features; extracted: {', '.join(self.folders)}")
        return FeatureStore.open(self.folders[split], self.outputs, self.copies)

    def five_crops(self, split: str) -> FeatureStore:
        """The store of five crops of each image."""
        return FeatureStore.open(self.five_crop[split], self.outputs, self.copies)

    def tail_store(self) -> FeatureStore | None:
        """The store of more views of few-shot classes, where there is one."""
        return None if self.tail is None else FeatureStore.open(self.tail, self.outputs, self.copies)

    def tower_tensors(self) -> dict[str, Tensor]:
        """The tower's `final_norm.weight`, `final_norm.bias` and `projection`, those that it has."""
        folder = next(iter(self.folders.values()))
        return _load_tensors(storage.join(folder, TOWER_FILE))


def pin_features(
    features: FeatureSet, outputs: Iterable[OutputName], of_test: Iterable[OutputName] = ()
) -> tuple[FeatureSet, list[PinnedCopy]]:
    """What a trial reads on this machine and the copies of all of it, which stay while they live; `of_test` comes on
    top of the test split.

    Without room for all at once a shared file system is read in place; CacheFullError for what lies elsewhere.
    """
    stores = [features.store(split) for split in features.folders]
    stores += [features.five_crops(split) for split in features.five_crop]
    tail = features.tail_store()
    stores += [] if tail is None else [tail]
    wanted = [store.wanted(output) for store in stores if store.copies is not None for output in sorted(set(outputs))]
    if "test" in features.folders:
        test = features.store("test")
        wanted += [test.wanted(output) for output in sorted(set(of_test) - set(outputs)) if test.copies is not None]
    copies = stores[0].copies
    if copies is None or not wanted:
        return features, []
    if not all(storage.is_local(one.source) for one in wanted):
        return features, copies.pin(wanted)
    try:
        copies.check_disk()
        # No trial waits for what it can read all the same.
        return features, copies.pin(wanted, wait_seconds=0.0)
    except storage.StorageError as error:
        # Whatever it is, a full disk of this machine's too: if the folder itself is away, reading says so.
        _log.warning("features are read where they lie, which may be slower: %s", error)
        return replace(features, copies=None), []


def _load_tensors(path: str) -> dict[str, Tensor]:
    try:
        return load_file(storage.local_path(path)) if storage.is_local(path) else load(storage.read_bytes(path))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"can't read {path} ({error}); start again and it is made anew") from None
