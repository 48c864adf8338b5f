"""Loading tasks of an extraction. Imports no torch, so that their processes start fast."""

from __future__ import annotations

from typing import Any

import numpy as np

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.image_stream import read_images
from imbvlm.data.images.preprocess import MIN_CROP, Preprocess

Block = dict[str, Any]


def load_block(block: Block) -> Block:
    """Fetch, decode and crop a block's rows: `images` become (rows x views, 3, S, S), with a reason or None per row.

    Raises ImbvlmError at a bad image of a strict block, StorageError where a store fails.
    """
    preprocess = Preprocess.from_dict(block["preprocess"])
    (uris, contents), views = block["images"].read(), block["num_views"]
    shape = (len(uris), views, 3, preprocess.image_size, preprocess.image_size)
    images = np.zeros(shape, dtype=np.uint8)

    def crop(number: int, data: bytes) -> None:
        image = preprocess.decode(data, MIN_CROP if views > 1 else 1.0)
        for view in range(views):
            preprocess.apply(image, view, block["first_row"] + number, out=images[number, view])

    reasons = read_images(uris, contents, crop)
    bad = next((number for number, reason in enumerate(reasons) if reason is not None), None)
    if block["strict"] and bad is not None:
        name = uris[bad] or f"row {block['first_row'] + bad}"
        raise bad_image_error(block["split"], name, str(reasons[bad]))
    return {**block, "images": images.reshape(-1, *shape[2:]), "reasons": reasons}


def bad_image_error(split: str, name: str, reason: str) -> ImbvlmError:
    """The error of `data.on_bad_image: strict` at the first bad image."""
    return ImbvlmError(
        f"the {split} image {name} can't be used: {reason}. data.on_bad_image is strict; quarantine would leave it "
        "out and list it."
    )
