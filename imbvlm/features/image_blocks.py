"""What the loading tasks of the extraction pass do. Imports no torch, so that they start fast."""

from __future__ import annotations

from typing import Any

import numpy as np

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.image_stream import map_rows
from imbvlm.data.images.decode_budget import DecodeBudget
from imbvlm.data.images.decoding import ImageError
from imbvlm.data.images.preprocess import MIN_CROP, Preprocess

Block = dict[str, Any]


def load_block(block: Block) -> Block:
    """Fetch, decode and crop a block's rows: `images` become (rows x views, 3, S, S), with a reason or None per row.

    Raises ImbvlmError for an image that can't be had where the block is strict, StorageError where a store fails.
    """
    preprocess = Preprocess.from_dict(block["preprocess"])
    (uris, contents), views = block["images"].read(), block["num_views"]
    shape = (len(uris), views, 3, preprocess.image_size, preprocess.image_size)
    images = np.zeros(shape, dtype=np.uint8)

    budget = DecodeBudget()

    def load_row(number: int) -> str | None:
        try:
            with budget.fetched(uris[number], contents[number]) as data:
                picture = preprocess.decode(data, MIN_CROP if views > 1 else 1.0)
                for view in range(views):
                    preprocess.apply(picture, view, block["first_row"] + number, out=images[number, view])
        except ImageError as error:
            return error.reason
        return None

    reasons = map_rows(load_row, uris)
    bad = next((number for number, reason in enumerate(reasons) if reason is not None), None)
    if block["strict"] and bad is not None:
        name = uris[bad] or f"row {block['first_row'] + bad}"
        raise bad_image_error(block["split"], name, str(reasons[bad]))
    return {**block, "images": images.reshape(-1, *shape[2:]), "reasons": reasons}


def bad_image_error(split: str, name: str, reason: str) -> ImbvlmError:
    """What `data.on_bad_image: strict` says of the first bad image."""
    return ImbvlmError(
        f"the {split} image {name} can't be used: {reason}; data.on_bad_image is strict, and quarantine would leave it "
        "out and list it"
    )
