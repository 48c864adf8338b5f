"""`imbvlm features extract | check`: towers' outputs computed without a sweep; every byte of them read and compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from imbvlm.base import storage
from imbvlm.base.formatting import size_text
from imbvlm.config.encoder_info import OUTPUT_NAMES, OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import Report, ensure_features
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import STORE_FILE, StoreError
from imbvlm.features.store_sizes import pending_images, store_bytes
from imbvlm.models.encoders.open_clip_encoder import describe_encoder


@dataclass(frozen=True)
class Extraction:
    """What a pass has done or would do: `num_images` counts crops, one a view; `seconds` is None where none was run."""

    encoder: str
    image_size: int
    resize: float
    splits: tuple[str, ...]
    outputs: tuple[OutputName, ...]
    folders: dict[str, str]
    total_bytes: int
    num_images: int
    num_bytes: int
    free_bytes: int | None
    seconds: float | None

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.encoder} at {self.image_size} px, eval.resize {self.resize:.4g}: {', '.join(self.outputs)} of "
            f"{', '.join(self.splits)}, {size_text(self.total_bytes)}"
        ]
        if not self.num_images:
            lines.append("all of it is there already")
        elif self.seconds is None:
            free = "" if self.free_bytes is None else f"; {size_text(self.free_bytes)} free"
            lines.append(f"to compute: {self.num_images:,} images (views counted), {size_text(self.num_bytes)}{free}")
        else:
            speed = self.num_images / self.seconds
            lines.append(
                f"computed {self.num_images:,} images (views counted), {size_text(self.num_bytes)}, in "
                f"{self.seconds:,.1f} s: {speed:,.1f} a second"
            )
        return "\n".join([*lines, *(f"  {split:<6} {folder}" for split, folder in self.folders.items())])


def extract(
    config: TrialConfig,
    manifest: Manifest,
    root: str,
    outputs: frozenset[OutputName],
    *,
    report: Report,
    dry_run: bool,
) -> Extraction:
    """Compute what is missing of a tower's outputs over all splits of the manifest; raises ImbvlmError."""
    root = storage.absolute(root)
    total = sum(store_bytes(config, manifest, outputs, manifest.splits).values())
    num_images, num_bytes = pending_images(config, manifest, root, outputs, manifest.splits)
    folders, seconds = {}, None
    if not dry_run:
        started = time.monotonic()
        found = ensure_features(config, manifest, root, outputs, manifest.splits, report=report)
        folders, seconds = dict(found.folders), time.monotonic() - started
    ordered = tuple(name for name in OUTPUT_NAMES if name in outputs)
    free = storage.free_bytes(root)
    return Extraction(
        config.encoder.name,
        describe_encoder(config.encoder).image_size,
        config.eval.resize,
        manifest.splits,
        ordered,
        folders,
        total,
        num_images,
        num_bytes,
        free,
        seconds,
    )


def check(folders: Sequence[str]) -> int:
    """Print a line for each store and output in stores, or folders of stores; 1 where a shard is damaged."""
    num_damaged = 0
    for folder in folders:
        for store in _stores(storage.absolute(folder)):
            for output in store.outputs:
                there = store.present(output)
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
