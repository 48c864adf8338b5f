"""Training and evaluation crops of images, made anew each time they are read. Imports no torch and no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageEnhance

from imbvlm.data.images import ImageError, Pixels, Preprocess, decode, fetch, random_crop
from imbvlm.data.manifest import Manifest
from imbvlm.data.table import Rows

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class Augmentation:
    """How a training crop differs from the evaluation crop."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    jitter: float = 0.0

    def apply(self, image: Pixels, preprocess: Preprocess, rng: np.random.Generator) -> Pixels:
        """Pixels (3, S, S) of a random resized crop in the tower's interpolation; every draw comes from `rng`."""
        picture = Image.fromarray(image)
        box = random_crop(rng, *picture.size, scale=self.crop_scale)
        size = (preprocess.image_size, preprocess.image_size)
        picture = picture.resize(size, Image.Resampling[preprocess.interpolation.upper()], box=box)
        if self.flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            for number in rng.permutation(len(_ENHANCERS)):
                picture = _ENHANCERS[number](picture).enhance(float(rng.uniform(1 - self.jitter, 1 + self.jitter)))
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


class ImageBatch(NamedTuple):
    """Images (B, 3, S, S) in the plan's order; `ok` (B,) is False where an image couldn't be had, and it is black."""

    images: Pixels
    rows: Rows
    ok: npt.NDArray[np.bool_]
    reasons: tuple[str | None, ...]


@dataclass(frozen=True)
class StreamPlan:
    """One worker's share of an epoch: manifest rows (N,) by position in the epoch, and its batches of positions.

    Random changes of an image come from (seed, epoch, position), so they don't depend on how many workers there are.
    `augmentation` None gives the evaluation crop.
    """

    rows: Rows
    batches: Sequence[Rows]
    preprocess: Preprocess
    augmentation: Augmentation | None
    seed: int
    epoch: int
    progress: float = 0.0

    def blocks(self, manifest: Manifest) -> list[dict[str, Any]]:
        """What `load_batch` takes, for each batch."""
        uris, data = manifest.table.column("uri"), manifest.table.column("bytes")
        blocks = []
        for positions in self.batches:
            chosen = pa.array(self.rows[positions])
            described = {"uri": uris.take(chosen).to_pylist(), "bytes": data.take(chosen).to_pylist()}
            blocks.append({**described, "plan": self, "positions": positions, "rows": self.rows[positions]})
        return blocks


def load_batch(block: dict[str, Any]) -> dict[str, Any]:
    """Fetch, decode and change one batch's images; a bad one is black, with its reason. Raises StorageError."""
    plan: StreamPlan = block["plan"]
    side = plan.preprocess.image_size
    images = np.zeros((len(block["uri"]), 3, side, side), dtype=np.uint8)
    reasons: list[str | None] = []
    for number, position in enumerate(block["positions"].tolist()):
        try:
            pixels = decode(fetch(block["uri"][number], block["bytes"][number]))
        except ImageError as error:
            reasons.append(error.reason)
            continue
        reasons.append(None)
        if plan.augmentation is None:
            images[number] = plan.preprocess.apply(pixels)
        else:
            rng = np.random.default_rng((plan.seed, plan.epoch, position))
            images[number] = plan.augmentation.apply(pixels, plan.preprocess, rng)
    ok = np.array([reason is None for reason in reasons], dtype=bool)
    return {"images": images, "rows": block["rows"], "ok": ok, "reasons": tuple(reasons)}
