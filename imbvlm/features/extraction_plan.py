"""Which outputs of which images an extraction still has to compute."""

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
from imbvlm.data.manifest_schema import LazyRows, Rows
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.image_blocks import Block
from imbvlm.features.store_layout import StoreKey, StoreLayout
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.ray_runtime.cluster_resources import has_many_machines, ray_gpus

ROWS_PER_SHARD = 512
# A block of crops, and the largest output of a shard, stay near this size in memory.
SHARD_BYTES = 96_000_000
# Small data is still cut into a few blocks, so that several workers share it.
MIN_SHARDS = 8


class StorePart(NamedTuple):
    """One store: an official split, or its rows of few-shot classes, in so many crops that `preprocess` makes."""

    split: str
    preprocess: Preprocess
    num_views: int
    is_tail: bool = False

    def rows(self, manifest: Manifest) -> Manifest:
        rows = manifest.split(self.split)
        return rows.take(few_shot_rows(rows)) if self.is_tail else rows


@dataclass(frozen=True)
class PendingPart:
    """What a part lacks: shard number -> outputs to compute."""

    part: StorePart
    store: FeatureStore
    rows: Manifest
    missing: Mapping[int, tuple[OutputName, ...]]

    @property
    def num_images(self) -> int:
        return sum(len(self.store.layout.rows_of(shard)) for shard in self.missing) * self.store.num_views

    def num_bytes(self, output: OutputName) -> int:
        layout = self.store.layout
        rows = sum(len(layout.rows_of(shard)) for shard, outputs in self.missing.items() if output in outputs)
        return replace(layout, num_rows=rows).num_bytes(output)


def few_shot_rows(manifest: Manifest) -> Rows:
    """Row numbers of the training images of few-shot classes, in manifest order."""
    rows = manifest.rows_of("train")
    return rows[np.isin(manifest.labels[rows], manifest.class_stats().few_shot)]


def _num_views(config: TrialConfig, split: str) -> int:
    return config.features.num_views if split == "train" else 1


def _parts(
    config: TrialConfig, manifest: Manifest, encoder: Encoder, splits: Sequence[str], five_crop: Sequence[str]
) -> list[StorePart]:
    """What is computed: each split as it is evaluated or trained on, and where they are asked for more views of
    few-shot classes, and some splits as five crops.
    """
    found = [StorePart(split, encoder.preprocess, _num_views(config, split)) for split in splits]
    tail_views = config.features.tail_views
    if tail_views is not None and "train" in splits and len(few_shot_rows(manifest)):
        found.append(StorePart("train", encoder.preprocess, tail_views, is_tail=True))
    if config.eval.tte == "five_crop":
        preprocess = encoder.preprocess.five_crop(config.eval.expand)
        found += [StorePart(split, preprocess, len(FIVE_CROPS)) for split in five_crop]
    return found


def _layout(config: TrialConfig, info: EncoderInfo, views: int, num_rows: int, digest: str) -> StoreLayout:
    precision = config.features.precision
    largest = max(math.prod(shape) for shape in info.shapes.values()) * np.dtype(precision).itemsize
    bytes_per_row = views * max(largest, 3 * info.image_size**2)
    rows = min(ROWS_PER_SHARD, SHARD_BYTES // bytes_per_row, -(-num_rows // MIN_SHARDS))
    return StoreLayout(digest, num_rows, views, max(1, rows), precision, info.shapes, config.features.int8_tokens)


def resolve_compute_dtype(config: TrialConfig, info: EncoderInfo) -> ComputeDtype:
    """What the tower computes in; of itself by where a pass would run: the connected cluster, or else this machine.

    That is bfloat16 on GPUs, and of a ViT on a single machine whose CPU has AMX, where it takes a third of the time.
    """
    if config.features.computed_in != "auto":
        return config.features.computed_in
    if _num_gpus():
        return "bfloat16"
    # What the CPUs of other machines have isn't known.
    pays = info.kind == "vit" and torch.cpu._is_amx_tile_supported() and not has_many_machines()
    return "bfloat16" if pays else "float32"


def _num_gpus() -> int:
    """Of where a pass would run."""
    num_gpus = ray_gpus()
    return torch.cuda.device_count() if num_gpus is None else num_gpus


def _plan_part(
    config: TrialConfig,
    manifest: Manifest,
    root: str,
    outputs: Sequence[OutputName],
    encoder: Encoder,
    part: StorePart,
) -> PendingPart:
    rows = part.rows(manifest)
    if not len(rows):
        raise ImbvlmError(
            f"the manifest {config.data.manifest} has no {part.split} rows; it has {', '.join(manifest.splits)}"
        )
    key = _store_key(config, rows, encoder, part)
    layout = _layout(config, encoder.info, key.num_views, len(rows), key.digest)
    store = FeatureStore.create(storage.join(root, key.digest), layout)
    missing: dict[int, tuple[OutputName, ...]] = {}
    for output in outputs:
        for shard in store.missing(output):
            missing[shard] = (*missing.get(shard, ()), output)
    return PendingPart(part, store, rows, dict(sorted(missing.items())))


def _store_key(config: TrialConfig, rows: Manifest, encoder: Encoder, part: StorePart) -> StoreKey:
    """Of the rows of a part."""
    return StoreKey(
        rows=rows.row_fingerprint(part.split),
        weights=encoder.info.weights_fingerprint,
        preprocess=part.preprocess.to_dict(),
        num_views=part.num_views,
        precision=config.features.precision,
        computed_in=resolve_compute_dtype(config, encoder.info),
        token_pooling=encoder.info.token_pooling,
        int8_tokens=config.features.int8_tokens,
    )


def _blocks(config: TrialConfig, work: PendingPart) -> list[Block]:
    return [
        {
            "folder": work.store.folder,
            "name": f"{work.part.split} images {rows.start} to {rows.stop - 1}",
            "shard": shard,
            "outputs": outputs,
            "split": work.part.split,
            "first_row": rows.start,
            "num_views": work.store.num_views,
            "preprocess": work.part.preprocess.to_dict(),
            "strict": config.data.on_bad_image == "strict",
            "images": LazyRows(work.rows.table, np.arange(rows.start, rows.stop)),
        }
        for shard, outputs in work.missing.items()
        for rows in [work.store.layout.rows_of(shard)]
    ]
