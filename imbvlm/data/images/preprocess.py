"""The crops that an encoder is given, as a description that is compared and recorded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.images.decoding import Pixels, decode_picture

Box = tuple[float, float, float, float]
_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# The random crops of stored views: share of the area, aspect, and so the shorter side of the smallest one.
CROP_SCALE, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
# Where the crops of test-time ensembling lie, in shares of the way from left to right and from top to bottom.
FIVE_CROPS = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
MIN_CROP = math.sqrt(CROP_SCALE[0] * CROP_RATIO[0])


@dataclass(frozen=True)
class Preprocess:
    """How pixels become a tower's input: the evaluation crop (view 0), or a random crop fixed by (row, view).

    With `expand` the views are five crops of the image at `image_size` + `expand`: the centre and the four corners.
    `resize` is the shorter side before the centre crop, as a multiple of `image_size`. Mean and deviation are applied
    later, on the device: bytes go over the wire. Raises ImbvlmError for a mode or interpolation it doesn't know.
    """

    image_size: int
    resize: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize_mode: Literal["shortest", "squash"] = "shortest"
    # Large JPEGs may be decoded smaller, their shorter side at least this multiple of what is needed: faster, and off
    # by a few grey levels. None: exact.
    jpeg_downscale: float | None = None
    expand: int | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATIONS:
            raise ImbvlmError(f"interpolation must be bicubic or bilinear, and is {self.interpolation!r}")
        if self.resize_mode not in ("shortest", "squash"):
            raise ImbvlmError(f"resize_mode must be shortest or squash, and is {self.resize_mode!r}")
        if self.resize < 1:
            raise ImbvlmError(f"eval.resize must be at least 1, and is {self.resize}")
        if self.jpeg_downscale is not None and self.jpeg_downscale < 1:
            raise ImbvlmError(f"jpeg_downscale must be at least 1, and is {self.jpeg_downscale}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`."""
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return Preprocess(**known)

    def five_crop(self, expand: int) -> Preprocess:
        """The same tower's five crops of an image at `image_size` + `expand`."""
        return replace(self, resize=1.0, expand=expand)

    def fingerprint(self) -> str:
        """Hex digest of the settings and of what they make of a made-up picture here, by this Pillow and this code.

        How files are decoded is not in it: JPEG libraries differ by a grey level.
        """
        values = np.arange(97 * 131 * 3, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(251)
        crop = self.apply(values.astype(np.uint8).reshape(97, 131, 3))
        settings = json.dumps(self.to_dict(), sort_keys=True).encode()
        return hashlib.sha256(settings + crop.tobytes()).hexdigest()

    def decode(self, data: bytes, least_crop: float = 1.0) -> Image.Image:
        """A picture for crops whose shorter side is `least_crop` of the image's or more; raises ImageError."""
        if self.jpeg_downscale is None:
            return decode_picture(data)
        resize = self.resize if self.expand is None else 1 + self.expand / self.image_size
        needed = self.image_size * max(resize, 1 / least_crop)
        return decode_picture(data, least_side=math.ceil(needed * self.jpeg_downscale))

    def apply(
        self, image: Pixels | Image.Image, view: int = 0, row_id: int = 0, *, out: Pixels | None = None
    ) -> Pixels:
        """Pixels (3, S, S) of the evaluation crop, or for view >= 1 another: random and perhaps flipped, or of five.

        They are written into `out` where it is given, such as a place in a batch.
        """
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if self.expand is not None:
            resized = self.resized(picture, self._box(*picture.size, *FIVE_CROPS[view]))
        elif view == 0:
            resized = self.resized(picture, self.centre(*picture.size))
        else:
            rng = np.random.default_rng((row_id, view))
            resized = self.resized(picture, random_crop(rng, *picture.size))
            if rng.random() < 0.5:
                resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return channels_first(resized, out)

    def centre(self, width: int, height: int) -> Box:
        """The part of the image (left, top, right, bottom) that resizing and cropping would leave.

        Resizing this box gives the same pixels as resizing the whole image and cropping, with less work.
        """
        return self._box(width, height, 0.5, 0.5)

    def _box(self, width: int, height: int, across_share: float, down_share: float) -> Box:
        """The crop so far from left to right and from top to bottom: 0.5 in the middle, 1 at the edge."""
        side = self.image_size + self.expand if self.expand is not None else round(self.image_size * self.resize)
        if self.resize_mode == "squash":
            new_width = new_height = side
        elif width <= height:
            new_width, new_height = side, int(side * height / width)
        else:
            new_width, new_height = int(side * width / height), side
        across, down = width / new_width, height / new_height
        left = round((new_width - self.image_size) * across_share)
        top = round((new_height - self.image_size) * down_share)
        right, bottom = (left + self.image_size) * across, (top + self.image_size) * down
        return left * across, top * down, min(right, width), min(bottom, height)

    def resized(self, picture: Image.Image, box: Box) -> Image.Image:
        """A part of a picture at the tower's size, with the tower's interpolation."""
        return picture.resize((self.image_size, self.image_size), _INTERPOLATIONS[self.interpolation], box=box)


def channels_first(picture: Image.Image, out: Pixels | None = None) -> Pixels:
    """Pixels (3, H, W) of an RGB picture, written into `out` where it is given."""
    pixels = np.asarray(picture).transpose(2, 0, 1)
    if out is None:
        return np.ascontiguousarray(pixels)
    out[...] = pixels
    return out


def random_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> Box:
    """A box (left, top, right, bottom) with a share of the area in `scale` and an aspect in `ratio` (Inception)."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return left, top, left + across, top + down
    # Very long images have no such box: the largest centred one with an allowed aspect.
    across = min(width, max(1, round(height * ratio[1])))
    down = min(height, max(1, round(width / ratio[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
