"""The crops of an image that an encoder reads, as a description that is compared and recorded."""

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
# Random crops of stored views: fraction of the area, aspect ratio, and the shorter side of the smallest crop.
CROP_SCALE, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
MIN_CROP = math.sqrt(CROP_SCALE[0] * CROP_RATIO[0])
# Positions of the crops of test-time ensembling, as fractions of the way from left to right and from top to bottom.
FIVE_CROPS = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


@dataclass(frozen=True)
class Preprocess:
    """Makes an encoder's input of an image: the evaluation crop (view 0), or a random crop fixed by (row, view).

    With `expand` the views are five crops of the image at `image_size` + `expand`: the center and the four corners.
    `resize` is the shorter side before the center crop, as a multiple of `image_size`. `jpeg_downscale` lets large
    JPEGs be decoded at a fraction of their size, their shorter side at least this multiple of what the crop needs:
    faster, but pixel values change by a few gray levels. The device normalizes by `mean` and `std`, so that pixels
    travel as bytes. Raises ImbvlmError for an unknown mode or interpolation.
    """

    image_size: int
    resize: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize_mode: Literal["shortest", "squash"] = "shortest"
    jpeg_downscale: float | None = None
    expand: int | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATIONS:
            raise ImbvlmError(
                f"interpolation must be bicubic or bilinear, got {self.interpolation!r}. "
                "Take the one that the encoder was trained with."
            )
        if self.resize_mode not in ("shortest", "squash"):
            raise ImbvlmError(
                f"resize_mode must be shortest or squash, got {self.resize_mode!r}. "
                "Take the one that the encoder was trained with."
            )
        if self.resize < 1:
            raise ImbvlmError(f"eval.resize must be at least 1, got {self.resize}. Leave it out for the default.")
        if self.jpeg_downscale is not None and self.jpeg_downscale < 1:
            raise ImbvlmError(f"jpeg_downscale must be at least 1, got {self.jpeg_downscale}. Leave it out for none.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, in which a tuple becomes a list."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`."""
        fields: dict[str, Any] = {key: tuple(value) if type(value) is list else value for key, value in data.items()}
        return Preprocess(**fields)

    def five_crop(self, expand: int) -> Preprocess:
        """The preprocessing for five crops of an image at `image_size` + `expand`."""
        return replace(self, resize=1.0, expand=expand)

    def fingerprint(self) -> str:
        """Hex digest of the settings and of the crop of a synthetic image by this code and this version of Pillow.

        It leaves out the decoding of files: JPEG libraries differ by a gray level.
        """
        values = np.arange(97 * 131 * 3, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(251)
        crop = self.apply(values.astype(np.uint8).reshape(97, 131, 3))
        settings = json.dumps(self.to_dict(), sort_keys=True).encode()
        return hashlib.sha256(settings + crop.tobytes()).hexdigest()

    @property
    def num_crops(self) -> int:
        """Number of an image's evaluation crops: five with `expand`, else one."""
        return 1 if self.expand is None else len(FIVE_CROPS)

    def min_side(self, min_crop: float = 1.0) -> int | None:
        """The shorter side that decoding must leave an image, for crops whose own is at least `min_crop` of it.

        None where images are decoded at their own size.
        """
        if self.jpeg_downscale is None:
            return None
        resize = self.resize if self.expand is None else 1 + self.expand / self.image_size
        return math.ceil(self.image_size * max(resize, 1 / min_crop) * self.jpeg_downscale)

    def decode(self, data: bytes, min_crop: float = 1.0) -> Image.Image:
        """Decode an image for crops whose shorter side is at least `min_crop` of its own; raises ImageError."""
        return decode_picture(data, min_side=self.min_side(min_crop))

    def apply(
        self, image: Pixels | Image.Image, view: int = 0, row_id: int = 0, *, out: Pixels | None = None
    ) -> Pixels:
        """Pixels (3, S, S) of the evaluation crop, or of another `view`: a random crop that may be flipped, or of five.

        They are written into `out`, such as a part of a batch, if it is given.
        """
        whole = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if self.expand is not None:
            resized = self.resized(whole, self._box(*whole.size, *FIVE_CROPS[view]))
        elif view == 0:
            resized = self.resized(whole, self.center(*whole.size))
        else:
            rng = np.random.default_rng((row_id, view))
            resized = self.resized(whole, random_crop(rng, *whole.size))
            if rng.random() < 0.5:
                resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return channels_first(resized, out)

    def center(self, width: int, height: int) -> Box:
        """The box (left, top, right, bottom) of the image that resizing and a center crop would leave.

        Resizing this box gives the same pixels as resizing the whole image and cropping, with less work.
        """
        return self._box(width, height, 0.5, 0.5)

    def _box(self, width: int, height: int, x: float, y: float) -> Box:
        """The box of a crop at a position from left to right and from top to bottom: 0.5 is the middle, 1 the edge."""
        side = self.image_size + self.expand if self.expand is not None else round(self.image_size * self.resize)
        if self.resize_mode == "squash":
            new_width = new_height = side
        elif width <= height:
            new_width, new_height = side, int(side * height / width)
        else:
            new_width, new_height = int(side * width / height), side
        across, down = width / new_width, height / new_height
        left = round((new_width - self.image_size) * x)
        top = round((new_height - self.image_size) * y)
        right, bottom = (left + self.image_size) * across, (top + self.image_size) * down
        return left * across, top * down, min(right, width), min(bottom, height)

    def resized(self, image: Image.Image, box: Box) -> Image.Image:
        """A box of an image at the encoder's size, with its interpolation."""
        return image.resize((self.image_size, self.image_size), _INTERPOLATIONS[self.interpolation], box=box)


def channels_first(image: Image.Image, out: Pixels | None = None) -> Pixels:
    """Pixels (3, H, W) of an RGB image, written into `out` if it is given."""
    pixels = np.asarray(image).transpose(2, 0, 1)
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
    """A random box (left, top, right, bottom) with its fraction of the area in `scale` and its aspect in `ratio`.

    This is the crop of Inception [Szegedy et al. 2015], as torchvision has it.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return left, top, left + across, top + down
    # Very long images have no such box; they get the largest centered one with an allowed aspect.
    across = min(width, max(1, round(height * ratio[1])))
    down = min(height, max(1, round(width / ratio[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
