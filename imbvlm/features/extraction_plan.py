"""Plans an extraction: the outputs that stores lack, their layout and their identity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import ComputeDtype, EncoderInfo, OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.preprocess import FIVE_CROPS, Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import LazyRows
from imbvlm.features.earlier_store import EarlierStore
from imbvlm.features.entry_index import Digests, entry_keys
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.image_blocks import ImageBlock
from imbvlm.features.known_files import RowContents, row_contents
from imbvlm.features.store_layout import STORE_FILE, StoreError, StoreKey, StoreLayout
from imbvlm.features.stored_split import Places
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_outputs import gains_from_compile
from imbvlm.ray_runtime.cluster_resources import has_many_machines, ray_gpus

ROWS_PER_SHARD = 512
# Limit, in bytes, for a block of crops and for the largest output of a shard in memory.
SHARD_BYTES = 96_000_000
# Compiling takes a GPU's worker up to a minute, and saves a fifth of a pass or more: it pays after some 200 s of about
# 1e14 operations each, 600,000 images of a ViT-B/16 or 60,000 of a ViT-L/14 at 336 px. Estimated, not measured.
MIN_COMPILED_OPERATIONS = 2e16
# Hexadecimal digits of the folders of version 0.1.
EARLIER_DIGITS = 32
# Small data is still cut into a few blocks, so that several workers share it.
MIN_SHARDS = 8


class StorePart(NamedTuple):
    """One store: an official split in `num_views` crops that `preprocess` makes."""

    split: str
    preprocess: Preprocess
    num_views: int


@dataclass(frozen=True)
class PendingPart:
    """A part of an extraction; `missing` (N, views) has a bit for each of `outputs` that a crop lacks.

    `contents` are those of the rows. `earlier` has where version 0.1 has stored them, by output.
    """

    part: StorePart
    store: FeatureStore
    rows: Manifest
    outputs: tuple[OutputName, ...]
    contents: RowContents
    missing: npt.NDArray[np.uint8]
    earlier: Mapping[OutputName, Places]

    @property
    def num_images(self) -> int:
        """Crops to compute, which may be fewer: files of unknown content may be copies."""
        return int(np.count_nonzero(self.missing))

    @property
    def num_known(self) -> int:
        """Crops that are stored."""
        return self.missing.size - self.num_images

    def num_bytes(self, output: OutputName) -> int:
        """Bytes to write of an output."""
        if output not in self.outputs:
            return 0
        missing = int(np.count_nonzero(self.missing & (1 << self.outputs.index(output))))
        return self.store.layout.num_bytes(output, missing)

    def blocks(self, number: int, *, is_strict: bool) -> list[ImageBlock]:
        """The missing crops as blocks for `load_block`; `is_strict` raises an error at a bad image."""
        size = rows_per_shard(self.store.layout, self.part, len(self.rows))
        lacking = np.bitwise_or.reduce(self.missing, axis=1)
        blocks = []
        # Rows that lack the same outputs share blocks.
        for bits in np.unique(lacking[lacking > 0]).tolist():
            rows = np.flatnonzero(lacking == bits)
            outputs = tuple(output for bit, output in enumerate(self.outputs) if bits >> bit & 1)
            for start in range(0, len(rows), size):
                in_block = rows[start : start + size]
                blocks.append(
                    ImageBlock(
                        folder=self.store.folder,
                        part=number,
                        outputs=outputs,
                        split=self.part.split,
                        rows=in_block,
                        views=self.missing[in_block] > 0,
                        contents=self.contents.digests[in_block],
                        is_known=self.contents.is_known[in_block],
                        preprocess=self.part.preprocess,
                        is_strict=is_strict,
                        images=LazyRows(self.rows.table, in_block),
                    )
                )
        return blocks

    def places(self, contents: Digests, written: Mapping[OutputName, frozenset[str]]) -> dict[OutputName, Places]:
        """Where each view of each row lies; `written` names the shards of this run. Raises StoreError."""
        keys, result = entry_keys(contents, self.part.num_views), {}
        for output in self.outputs:
            places = self.store.places(output, keys, written.get(output, frozenset()))
            if output in self.earlier:
                places = self.earlier[output].or_else(places)
            if (places.shard < 0).any():
                raise StoreError(
                    f"{self.store.output_folder(output)} lost images of the {self.part.split} split while they were "
                    "computed. Start again to compute them."
                )
            result[output] = places.compact()
        return result


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


def plan_layout(
    config: TrialConfig, info: EncoderInfo, digest: str, preprocess: Preprocess | None = None
) -> StoreLayout:
    """The layout of a store."""
    features = config.features
    crop = {} if preprocess is None else preprocess.to_dict()
    return StoreLayout(digest, features.precision, info.shapes, features.int8_tokens, info.name, crop)


def rows_per_shard(layout: StoreLayout, part: StorePart, num_rows: int) -> int:
    """Rows whose crops make one shard, which fits in SHARD_BYTES."""
    largest = max(math.prod(shape) for shape in layout.shapes.values()) * np.dtype(layout.precision).itemsize
    bytes_per_row = part.num_views * max(largest, 3 * part.preprocess.image_size**2)
    return max(1, min(ROWS_PER_SHARD, SHARD_BYTES // bytes_per_row, -(-num_rows // MIN_SHARDS)))


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
    """The crops of a split that a store lacks, which is created where there is none.

    A dry run writes nothing, and takes an existing shard for whole. Raises ImbvlmError for a split without rows.
    """
    rows = manifest.split(part.split)
    if not len(rows) and not is_dry_run:
        raise ImbvlmError(
            f"the manifest {config.data.manifest} has no {part.split} rows; it has {', '.join(manifest.splits)}. Name "
            "one of these."
        )
    key = StoreKey(
        weights=encoder.info.weights_fingerprint,
        preprocess=part.preprocess.to_dict(),
        precision=config.features.precision,
        computed_in=resolve_compute_dtype(config, encoder.info),
        token_pooling=encoder.info.token_pooling,
        int8_tokens=config.features.int8_tokens,
    )
    layout = plan_layout(config, encoder.info, key.digest, part.preprocess)
    folder = storage.join(root, key.digest)
    is_new = not storage.exists(storage.join(folder, STORE_FILE))
    if not is_dry_run:
        store = FeatureStore.create(folder, layout)
    else:
        store = FeatureStore(folder, layout) if is_new else FeatureStore.open(folder)
    contents = row_contents(root, rows.table)
    keys, earlier_store = entry_keys(contents.digests, part.num_views), _earlier_store(root, key, rows, part)
    missing, earlier = np.zeros(keys.shape, dtype=np.uint8), dict[OutputName, Places]()
    for bit, output in enumerate(outputs):
        index = store.index(output, verify=not is_dry_run, record=not is_dry_run)
        lacks = (index.find(keys) < 0) | ~contents.is_known[:, None]
        if earlier_store is not None:
            earlier[output] = earlier_store.places(output, verify=not is_dry_run)
            lacks &= earlier[output].shard.reshape(keys.shape) < 0
        missing |= lacks.astype(np.uint8) << bit
    return PendingPart(part, store, rows, tuple(outputs), contents, missing, earlier)


def _earlier_store(root: str, key: StoreKey, rows: Manifest, part: StorePart) -> EarlierStore | None:
    """The store of version 0.1 for this split; its fingerprint takes time and is computed where such stores are."""
    if not any(len(name) == EARLIER_DIGITS for name in storage.list_files(root)):
        return None
    digest = key.split_digest(rows.row_fingerprint(part.split), part.num_views)
    return EarlierStore.open(storage.join(root, digest))
