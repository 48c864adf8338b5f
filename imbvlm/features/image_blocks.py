"""Loading tasks of an extraction. Imports no torch, so that their processes start fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import OutputName
from imbvlm.data.image_stream import read_images
from imbvlm.data.images.decoding import Pixels
from imbvlm.data.images.preprocess import MIN_CROP, Preprocess
from imbvlm.data.manifest_schema import LazyRows


@dataclass(frozen=True)
class ImageBlock:
    """One shard of a store to compute: rows of a split from `first_row` on, each in `num_views` crops.

    With `is_strict` a bad image is an error.
    """

    folder: str
    shard: int
    outputs: tuple[OutputName, ...]
    split: str
    first_row: int
    num_views: int
    preprocess: Preprocess
    is_strict: bool
    rows: LazyRows

    def describe(self) -> str:
        """Name the block's images."""
        return f"{self.split} images {self.first_row} to {self.first_row + len(self.rows) - 1}"


@dataclass(frozen=True)
class LoadedBlock:
    """The crops of a block, (rows x views, 3, S, S), with a reason for each row whose image is bad."""

    folder: str
    shard: int
    outputs: tuple[OutputName, ...]
    images: Pixels
    reasons: Sequence[str | None]


@dataclass(frozen=True)
class BlockSummary:
    """A stored block: bytes of each output's shard, and the reasons of rows without an image.

    `not_compiled` is the reason why the worker could not compile its encoder as it should.
    """

    folder: str
    shard: int
    num_images: int
    written: Mapping[OutputName, int]
    bad: Mapping[int, str]
    not_compiled: str | None = None


def load_block(block: ImageBlock) -> LoadedBlock:
    """Fetch, decode and crop a block's rows.

    Raises ImbvlmError at a bad image of a strict block, StorageError where a store fails.
    """
    preprocess, views = block.preprocess, block.num_views
    uris, contents = block.rows.read()
    shape = (len(uris), views, 3, preprocess.image_size, preprocess.image_size)
    images = np.zeros(shape, dtype=np.uint8)

    def crop(number: int, data: bytes) -> None:
        image = preprocess.decode(data, MIN_CROP if views > 1 else 1.0)
        for view in range(views):
            preprocess.apply(image, view, block.first_row + number, out=images[number, view])

    reasons = read_images(uris, contents, crop)
    bad = next((number for number, reason in enumerate(reasons) if reason is not None), None)
    if block.is_strict and bad is not None:
        name = uris[bad] or f"row {block.first_row + bad}"
        raise bad_image_error(block.split, name, str(reasons[bad]))
    return LoadedBlock(block.folder, block.shard, block.outputs, images.reshape(-1, *shape[2:]), reasons)


def bad_image_error(split: str, name: str, reason: str) -> ImbvlmError:
    """The error of `data.on_bad_image: strict` at the first bad image."""
    return ImbvlmError(
        f"the {split} image {name} can't be used: {reason}. data.on_bad_image is strict; quarantine would leave it "
        "out and list it."
    )
