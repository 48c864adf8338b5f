"""Loading tasks of an extraction. Imports no torch, so that their processes start fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import OutputName
from imbvlm.data.image_stream import read_images
from imbvlm.data.images.decoding import Pixels
from imbvlm.data.images.preprocess import MIN_CROP, Preprocess
from imbvlm.data.manifest_schema import LazyRows, Rows, digest_of
from imbvlm.features.entry_index import Digests, entry_keys, finished_entries
from imbvlm.features.known_files import unreadable_digest


@dataclass(frozen=True)
class ImageBlock:
    """Images to compute: rows (R,) of a split, and the views (R, V) of each that the store lacked at the start.

    `part` is the number of the split's part of the pass. Contents (R, 16) are known for the rows in `is_known` (R,).
    With `is_strict` a bad image is an error.
    """

    folder: str
    part: int
    outputs: tuple[OutputName, ...]
    split: str
    rows: Rows
    views: npt.NDArray[np.bool_]
    contents: Digests
    is_known: npt.NDArray[np.bool_]
    preprocess: Preprocess
    is_strict: bool
    images: LazyRows

    @property
    def num_images(self) -> int:
        """Crops that the store lacked at the start."""
        return int(self.views.sum())

    def describe(self) -> str:
        """Name the block's images."""
        return f"{self.split} images {self.rows[0]} to {self.rows[-1]}"


@dataclass(frozen=True)
class LoadedBlock:
    """The crops (E, 3, S, S) of a block that nobody has finished, as views (E,) of its rows (E,), numbered within it.

    `reasons` has the reason for each of the block's rows whose image is bad, `contents` (R, 16) what was read.
    """

    folder: str
    part: int
    outputs: tuple[OutputName, ...]
    rows: Rows
    contents: Digests
    reasons: Sequence[str | None]
    images: Pixels
    entry_rows: Rows
    entry_views: Rows
    num_images: int


@dataclass(frozen=True)
class BlockSummary:
    """A stored block: contents (R, 16) of its rows (R,) of the split, and the reasons of rows without an image.

    `num_images` are the crops that the store lacked at the start, `num_computed` those that were computed; `written`
    names each output's shard. `not_compiled` is the reason why the worker could not compile its encoder as it should.
    """

    part: int
    rows: Rows
    contents: Digests
    num_images: int
    num_computed: int
    written: Mapping[OutputName, str]
    bad: Mapping[int, str]
    not_compiled: str | None = None


def load_block(block: ImageBlock) -> LoadedBlock:
    """Fetch, decode and crop a block's images that no process has finished meanwhile.

    Copies within the block are cropped once. Raises ImbvlmError at a bad image of a strict block, StorageError where a
    store fails.
    """
    preprocess, num_views = block.preprocess, block.views.shape[1]
    finished = [finished_entries(storage.join(block.folder, output)) for output in block.outputs]
    for entries in finished:
        entries.refresh()
    contents, reasons = block.contents.copy(), list[str | None]([None] * len(block.rows))
    computed, taken = np.zeros_like(block.views), set[bytes]()

    def take(row: int) -> Sequence[int]:
        """The views of a row that are to be computed, once its content is known."""
        views = []
        for view, key in enumerate(entry_keys(contents[row : row + 1], num_views)[0]):
            if block.views[row, view] and key not in taken and not all(key in entries for entries in finished):
                taken.add(key)
                views.append(view)
        computed[row, views] = True
        return views

    # Files of unknown content are read, to see whether the store has it.
    taken_views = {row: take(row) for row in np.flatnonzero(block.is_known).tolist()}
    to_read = [row for row in range(len(block.rows)) if not block.is_known[row] or taken_views[row]]
    images = np.zeros((*block.views.shape, 3, preprocess.image_size, preprocess.image_size), dtype=np.uint8)
    uris, data = block.images.read(to_read)

    def crop(number: int, content: bytes) -> None:
        row = to_read[number]
        if row not in taken_views:
            contents[row] = np.frombuffer(digest_of(content), dtype=np.uint8)
            taken_views[row] = take(row)
        image_number = int.from_bytes(contents[row].tobytes())
        decoded = {}
        for view in taken_views[row]:
            min_crop = 1.0 if view == 0 or preprocess.expand is not None else MIN_CROP
            side = preprocess.min_side(min_crop)
            if side not in decoded:
                decoded[side] = preprocess.decode(content, min_crop)
            preprocess.apply(decoded[side], view, image_number, out=images[row, view])

    for number, reason in enumerate(read_images(uris, data, crop)):
        row = to_read[number]
        reasons[row] = reason
        if reason is not None and block.is_strict:
            raise bad_image_error(block.split, uris[number] or f"row {block.rows[row]}", reason)
        if row not in taken_views:
            contents[row] = np.frombuffer(unreadable_digest(uris[number], str(reason)), dtype=np.uint8)
            take(row)
    entry_rows, entry_views = np.nonzero(computed)
    pixels = images.reshape(-1, *images.shape[2:]) if computed.all() else images[computed]
    return LoadedBlock(
        block.folder,
        block.part,
        block.outputs,
        block.rows,
        contents,
        reasons,
        pixels,
        entry_rows,
        entry_views,
        block.num_images,
    )


def bad_image_error(split: str, name: str, reason: str) -> ImbvlmError:
    """The error of `data.on_bad_image: strict` at the first bad image."""
    return ImbvlmError(
        f"the {split} image {name} can't be used: {reason}. data.on_bad_image is strict. Set it to quarantine to "
        "leave such images out and list them."
    )
