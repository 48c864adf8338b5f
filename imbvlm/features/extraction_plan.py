"""Plans an extraction: the outputs that stores lack, their layout and their identity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import ComputeDtype, EncoderInfo, OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.preprocess import FIVE_CROPS, Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import LazyRows
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.image_blocks import ImageBlock
from imbvlm.features.store_layout import STORE_FILE, StoreKey, StoreLayout
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_outputs import gains_from_compile
from imbvlm.ray_runtime.cluster_resources import has_many_machines, ray_gpus

ROWS_PER_SHARD = 512
# Limit, in bytes, for a block of crops and for the largest output of a shard in memory.
SHARD_BYTES = 96_000_000
# Compiling takes a GPU's worker up to a minute, and saves a fifth of a pass or more: it pays after some 200 s of about
# 1e14 operations each, 600,000 images of a ViT-B/16 or 60,000 of a ViT-L/14 at 336 px. Estimated, not measured.
MIN_COMPILED_OPERATIONS = 2e16
# Small data is still cut into a few blocks, so that several workers share it.
MIN_SHARDS = 8


class StorePart(NamedTuple):
    """One store: an official split in `num_views` crops that `preprocess` makes."""

    split: str
    preprocess: Preprocess
    num_views: int


@dataclass(frozen=True)
class PendingPart:
    """A part of an extraction; `missing` maps a shard's number to the outputs to compute."""

    part: StorePart
    store: FeatureStore
    rows: Manifest
    missing: Mapping[int, tuple[OutputName, ...]]

    @property
    def num_images(self) -> int:
        """Crops to compute."""
        return sum(len(self.store.layout.rows_of(shard)) for shard in self.missing) * self.store.num_views

    def num_bytes(self, output: OutputName) -> int:
        """Bytes to write of an output."""
        layout = self.store.layout
        rows = sum(len(layout.rows_of(shard)) for shard, outputs in self.missing.items() if output in outputs)
        return replace(layout, num_rows=rows).num_bytes(output) if rows else 0

    def blocks(self, *, is_strict: bool) -> list[ImageBlock]:
        """The missing shards as blocks for `load_block`; `is_strict` raises an error at a bad image."""
        return [
            ImageBlock(
                folder=self.store.folder,
                shard=shard,
                outputs=outputs,
                split=self.part.split,
                first_row=rows.start,
                num_views=self.store.num_views,
                preprocess=self.part.preprocess,
                is_strict=is_strict,
                rows=LazyRows(self.rows.table, np.arange(rows.start, rows.stop)),
            )
            for shard, outputs in self.missing.items()
            for rows in [self.store.layout.rows_of(shard)]
        ]


def num_views(config: TrialConfig, split: str) -> int:
    """Stored views of each image of a split."""
    return config.features.num_views if split == "train" else 1


def store_parts(
    config: TrialConfig, preprocess: Preprocess, splits: Sequence[str], five_crop: Sequence[str]
) -> list[StorePart]:
    """The stores of an extraction: each split as it is trained or evaluated on, and `five_crop` splits as five crops.

    Five crops are stored only where `eval.tte` asks for them.
    """
    parts = [StorePart(split, preprocess, num_views(config, split)) for split in splits]
    if config.eval.tte == "five_crop":
        crops = preprocess.five_crop(config.eval.expand)
        parts += [StorePart(split, crops, len(FIVE_CROPS)) for split in five_crop]
    return parts


def plan_layout(config: TrialConfig, info: EncoderInfo, views: int, num_rows: int, digest: str) -> StoreLayout:
    """The layout of a store, with shards that fit in SHARD_BYTES."""
    precision = config.features.precision
    largest = max(math.prod(shape) for shape in info.shapes.values()) * np.dtype(precision).itemsize
    bytes_per_row = views * max(largest, 3 * info.image_size**2)
    rows = min(ROWS_PER_SHARD, SHARD_BYTES // bytes_per_row, -(-num_rows // MIN_SHARDS))
    return StoreLayout(digest, num_rows, views, max(1, rows), precision, info.shapes, config.features.int8_tokens)


def resolve_compute_dtype(config: TrialConfig, info: EncoderInfo) -> ComputeDtype:
    """The encoder's compute dtype: `features.computed_in`, or the default where a pass would run.

    The default is bfloat16 on GPUs, and for a ViT on a single machine whose CPU has AMX, where it takes a third of the
    time.
    """
    if config.features.computed_in != "auto":
        return config.features.computed_in
    if num_gpus():
        return "bfloat16"
    # The CPUs of other machines are not known.
    pays = info.kind == "vit" and torch.cpu._is_amx_tile_supported() and not has_many_machines()
    return "bfloat16" if pays else "float32"


def resolve_compile(config: TrialConfig, encoder: Encoder, num_images: int) -> bool:
    """Whether a pass compiles the encoder: `features.compile`, or by default where a GPU gains more than it costs."""
    if config.features.compile != "auto":
        return config.features.compile
    gpus, info = num_gpus(), encoder.info
    if not gpus or not gains_from_compile(encoder.image_tower):
        return False
    num_tokens = info.num_tokens * info.token_pooling**2
    return 2 * info.num_parameters * num_tokens * num_images / gpus >= MIN_COMPILED_OPERATIONS


def num_gpus() -> int:
    """GPUs that a pass would use: the connected cluster's, or else this machine's."""
    of_cluster = ray_gpus()
    return torch.cuda.device_count() if of_cluster is None else of_cluster


def plan_part(
    config: TrialConfig,
    manifest: Manifest,
    root: str,
    outputs: Sequence[OutputName],
    encoder: Encoder,
    part: StorePart,
    *,
    is_dry_run: bool = False,
) -> PendingPart:
    """The missing shards of one store, which is created where there is none.

    A dry run writes nothing, and takes an existing shard for whole. Raises ImbvlmError for a split without rows.
    """
    rows = manifest.split(part.split)
    if not len(rows) and not is_dry_run:
        raise ImbvlmError(
            f"the manifest {config.data.manifest} has no {part.split} rows; it has {', '.join(manifest.splits)}."
        )
    key = StoreKey(
        rows=rows.row_fingerprint(part.split),
        weights=encoder.info.weights_fingerprint,
        preprocess=part.preprocess.to_dict(),
        num_views=part.num_views,
        precision=config.features.precision,
        computed_in=resolve_compute_dtype(config, encoder.info),
        token_pooling=encoder.info.token_pooling,
        int8_tokens=config.features.int8_tokens,
    )
    layout = plan_layout(config, encoder.info, key.num_views, len(rows), key.digest)
    folder = storage.join(root, key.digest)
    if not is_dry_run:
        store = FeatureStore.create(folder, layout)
    elif storage.exists(storage.join(folder, STORE_FILE)):
        store = FeatureStore.open(folder)
    else:
        store = FeatureStore(folder, layout)
    missing: dict[int, tuple[OutputName, ...]] = {}
    for output in outputs:
        absent = set(range(store.layout.num_shards)) - set(store.present(output))
        for shard in absent if is_dry_run else store.missing(output):
            missing[shard] = (*missing.get(shard, ()), output)
    return PendingPart(part, store, rows, dict(sorted(missing.items())))
