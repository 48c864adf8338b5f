"""`imbvlm features extract | check`: encoder outputs are computed without a sweep, and verified byte by byte."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from imbvlm.base import storage
from imbvlm.base.formatting import join_limited, pluralize, size_text
from imbvlm.config.encoder_info import OUTPUT_NAMES, OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.earlier_store import EarlierStore, open_store
from imbvlm.features.extraction import Report, ensure_features
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import STORE_FILE, StoreError
from imbvlm.features.store_sizes import pending_images, store_bytes
from imbvlm.models.encoders.encoder_factory import describe_encoder


@dataclass(frozen=True)
class Extraction:
    """The result of an extraction, or with `seconds` None its plan; `num_images` counts each view of an image."""

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
    notice: str = ""
    num_known: int = 0
    num_computed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.encoder} at {self.image_size} px, eval.resize {self.resize:.4g}: {', '.join(self.outputs)} of "
            f"{', '.join(self.splits)}, {size_text(self.total_bytes)}"
        ]
        stored = f"{self.num_known:,} images known, " if self.num_known else ""
        if not self.num_images:
            lines.append("everything is stored already")
        elif self.seconds is None:
            free = "" if self.free_bytes is None else f"; {size_text(self.free_bytes)} free"
            size = size_text(self.num_bytes)
            lines.append(f"{stored}to compute: {self.num_images:,} images (views counted), {size}{free}")
        else:
            copies = self.num_images - self.num_computed
            same = f"{copies:,} were known by their content, " if copies else ""
            size = size_text(self.num_bytes * self.num_computed / self.num_images)
            lines.append(
                f"{stored}{same}computed {self.num_computed:,} images (views counted), {size}, in "
                f"{self.seconds:,.1f} s: {self.num_images / self.seconds:,.1f} a second"
            )
        lines += [self.notice] if self.notice else []
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
    """Compute the missing outputs of an encoder over all splits of the manifest; raises ImbvlmError."""
    root = storage.absolute(root)
    info = describe_encoder(config.encoder)
    total = sum(store_bytes(config, info, manifest, outputs, manifest.splits).values())
    pending = pending_images(config, manifest, root, outputs, manifest.splits)
    folders, seconds, notice, num_computed = {}, None, "", 0
    if not dry_run:
        started = time.monotonic()
        features = ensure_features(config, manifest, root, outputs, manifest.splits, report=report)
        folders, seconds = dict.fromkeys(features.splits, features.folder), time.monotonic() - started
        notice, num_computed = features.notice, features.num_computed
    ordered = tuple(name for name in OUTPUT_NAMES if name in outputs)
    free = storage.free_bytes(root)
    return Extraction(
        config.encoder.name,
        info.image_size,
        config.eval.resize,
        manifest.splits,
        ordered,
        folders,
        total,
        pending.num_images,
        pending.num_bytes,
        free,
        seconds,
        notice,
        pending.num_known,
        num_computed,
    )


def check(folders: Sequence[str]) -> int:
    """Print a line for each output of stores, or of folders of stores; returns 1 if a shard is damaged."""
    num_damaged = 0
    for folder in folders:
        for store in stores_in(storage.absolute(folder)):
            for output in store.outputs:
                damaged = store.damaged(output)
                num_damaged += len(damaged)
                text = f"{pluralize(store.num_shards(output), 'shard')}, {size_text(store.num_bytes(output))}"
                print(f"{store.folder} {output}: {text}; {_describe(damaged)}")
    return int(num_damaged > 0)


def stores_in(folder: str) -> list[FeatureStore | EarlierStore]:
    """The store in a folder, or the stores in its folders; raises StoreError where there are none."""
    if storage.exists(storage.join(folder, STORE_FILE)):
        return [open_store(folder)]
    folders = [storage.join(folder, name) for name in storage.list_files(folder)]
    stores = [open_store(path) for path in folders if storage.exists(storage.join(path, STORE_FILE))]
    if not stores:
        raise StoreError(
            f"{folder} has no stored features. "
            "Name the folder `features` in a sweep's storage folder, such as runs/features."
        )
    return stores


def _describe(damaged: Sequence[str]) -> str:
    if not damaged:
        return "intact"
    return (
        f"{len(damaged):,} DAMAGED ({join_limited(damaged, 5)}): the next sweep that reads them computes their images "
        "again"
    )
