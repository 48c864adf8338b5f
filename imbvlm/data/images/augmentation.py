"""Random changes of training images for methods that read images: crops, flip, color jitter, RandAugment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.data.images.decoding import Pixels
from imbvlm.data.images.preprocess import Box, Preprocess, channels_first, random_crop

CropName = Literal["center", "random_resized", "growing"]
CROPS: tuple[CropName, ...] = get_args(CropName)
# RandAugment's magnitudes run from 0 to 30 [Cubuk et al. 2020].
MAX_MAGNITUDE = 30


@dataclass(frozen=True)
class Augmentation:
    """The random changes of an image in each epoch. Raises ImbvlmError for invalid values.

    `growing` is LIFT+'s crop: a square whose minimum area grows from `crop_scale[0]` to the whole image over training,
    by 1 - sqrt(1 - t^2). `jitter` changes brightness, contrast and saturation by factors from 1 - jitter to 1 + jitter.
    `rand_ops` operations of RandAugment at `rand_magnitude` follow the crop.
    """

    crop: CropName = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    jitter: float = 0.0
    rand_ops: int = 0
    rand_magnitude: int = 9

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ImbvlmError(f"crop {self.crop!r} is not known; {suggest_name(self.crop, CROPS)}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ImbvlmError(
                f"crop_scale must be two fractions, 0 < minimum <= maximum <= 1, got {self.crop_scale}. "
                "Give two such as (0.08, 1.0)."
            )
        if not 0 <= self.jitter < 1:
            raise ImbvlmError(f"jitter must be from 0 to below 1, got {self.jitter}. 0 turns it off.")
        if self.rand_ops < 0 or not 0 <= self.rand_magnitude <= MAX_MAGNITUDE:
            raise ImbvlmError(
                f"rand_ops must be 0 or more and rand_magnitude from 0 to {MAX_MAGNITUDE}, got {self.rand_ops} and "
                f"{self.rand_magnitude}. 0 operations turn it off."
            )

    @property
    def min_crop(self) -> float:
        """The shorter side of the smallest crop, as a fraction of the image's."""
        return 1.0 if self.crop == "center" else math.sqrt(self.crop_scale[0] * min(self.crop_ratio[0], 1.0))

    def apply(
        self,
        image: Pixels | Image.Image,
        preprocess: Preprocess,
        rng: np.random.Generator,
        progress: float,
        *,
        out: Pixels | None = None,
    ) -> Pixels:
        """Pixels (3, S, S) of one image (H, W, 3), into `out` if given; `progress` through training is from 0 to 1."""
        changed = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        changed = preprocess.resized(changed, self._box(changed, preprocess, rng, progress))
        if self.flip and rng.random() < 0.5:
            changed = changed.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            changed = _jitter(changed, self.jitter, rng)
        for _ in range(self.rand_ops):
            operation = _OPERATIONS[int(rng.integers(len(_OPERATIONS)))]
            changed = operation(changed, self.rand_magnitude / MAX_MAGNITUDE, 1.0 if rng.random() < 0.5 else -1.0)
        return channels_first(changed, out)

    def _box(self, image: Image.Image, preprocess: Preprocess, rng: np.random.Generator, progress: float) -> Box:
        if self.crop == "center":
            return preprocess.center(*image.size)
        if self.crop == "random_resized":
            return random_crop(rng, *image.size, self.crop_scale, self.crop_ratio)
        return growing_crop(rng, *image.size, self.crop_scale, progress)


def growing_crop(rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], progress: float) -> Box:
    """A square (left, top, right, bottom) whose minimum fraction of the area grows with progress [LIFT+]."""
    grown = 1 - math.sqrt(max(0.0, 1 - progress**2))
    minimum = scale[0] + grown * (scale[1] - scale[0])
    largest = min(width, height) ** 2 / (width * height)
    area = rng.uniform(min(minimum, largest), min(scale[1], largest)) * width * height
    side = min(width, height, max(1, round(math.sqrt(area))))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return left, top, left + side, top + side


def _jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in rng.permutation(len(enhancers)):
        image = enhancers[index](image).enhance(float(rng.uniform(1 - strength, 1 + strength)))
    return image


Operation = Callable[[Image.Image, float, float], Image.Image]


def _affine(coefficients: Callable[[float, int], tuple[float, ...]]) -> Operation:
    def operate(image: Image.Image, strength: float, sign: float) -> Image.Image:
        matrix = coefficients(sign * strength, image.width)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    return operate


def _enhance(enhancer: Callable[[Image.Image], Any]) -> Operation:
    def operate(image: Image.Image, strength: float, sign: float) -> Image.Image:
        changed: Image.Image = enhancer(image).enhance(1 + sign * strength * 0.9)
        return changed

    return operate


# strength is from 0 to 1; the ranges are RandAugment's as torchvision has them.
_OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength, sign: image,
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageOps.posterize(image, max(1, 8 - round(4 * strength))),
    lambda image, strength, sign: ImageOps.solarize(image, round(255 * (1 - strength))),
    lambda image, strength, sign: image.rotate(30 * sign * strength, Image.Resampling.BILINEAR),
    _affine(lambda amount, side: (1, 0.3 * amount, 0, 0, 1, 0)),
    _affine(lambda amount, side: (1, 0, 0, 0.3 * amount, 1, 0)),
    _affine(lambda amount, side: (1, 0, 150 / 331 * amount * side, 0, 1, 0)),
    _affine(lambda amount, side: (1, 0, 0, 0, 1, 150 / 331 * amount * side)),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
)
