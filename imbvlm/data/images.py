"""From a file's bytes to pixels: fetching, decoding whatever the mode, and the crops that a tower is given."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, JpegImagePlugin, UnidentifiedImageError

from imbvlm.data.fetching import MissingError, read_object
from imbvlm.errors import ImbvlmError

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

# Pillow's own bound for a decompression bomb. Larger JPEGs are decoded at a fraction of their size.
MAX_PIXELS = 178_956_970
# Converted at once, where the way to RGB takes many bytes a pixel.
_STRIP_PIXELS = 1 << 22
# Photos of phones, which Pillow reads with another package.
HEIF_SUFFIXES = (".heic", ".heif")
HEIF_ADVICE = "HEIC is read with the extra heif: pip install 'imbvlm[heif]'"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Formats with a signature in their first bytes; EPS and WMF are left out because Pillow starts other programs for them.
FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "ICO", "PPM", "JPEG2000", "AVIF", "SGI", "PSD", "QOI",
    "HEIF",
)  # fmt: skip
# What Pillow's decoders raise on damaged files, besides OSError.
DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, MemoryError,
    RuntimeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
    ImageCms.PyCMSError, Warning,
)  # fmt: skip
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_BITS_PER_SAMPLE = 258
# The random crops of stored views: share of the area, aspect, and so the shorter side of the smallest one.
CROP_SCALE, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
# Where the crops of test-time ensembling lie, in shares of the way from left to right and from top to bottom.
FIVE_CROPS = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
LEAST_CROP = math.sqrt(CROP_SCALE[0] * CROP_RATIO[0])
_MARKUP = (b"<!doctype html", b"<html", b"<?xml", b"<svg", b"<head", b"<error")
_SIGNATURES: Mapping[str, bytes | tuple[bytes, ...]] = {
    "JPEG": b"\xff\xd8",
    "PNG": b"\x89PNG",
    "GIF": b"GIF8",
    "WebP": b"RIFF",
    "TIFF": (b"II*\0", b"MM\0*"),
}


class ImageError(ImbvlmError):
    """An image that can't be had; `reason` is short, one line, and goes to the list of quarantined rows."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, least_side: int | None = None) -> Pixels:
    """Pixels (H, W, 3) in RGB of an image file, upright, alpha on white, the first frame of several.

    16-bit grey is scaled by 1/257; 32-bit grey too where it fits in 16 bits, else from its own minimum to maximum.
    Float grey is taken as 0..1, 0..255 or 0..65535, the first that holds it, else from its own minimum to maximum; its
    pixels that aren't finite become black. JPEGs above `max_pixels` are decoded at 1/2, 1/4 or 1/8 of their size, and
    with `least_side` every JPEG at the smallest of these whose shorter side isn't below it. Raises ImageError with a
    short reason.
    """
    return np.asarray(decode_picture(data, max_pixels=max_pixels, least_side=least_side))


def picture_pixels(picture: Image.Image) -> Pixels:
    """Pixels (H, W, 3) in RGB of an opened Pillow image, by the rules of `decode`; raises ImageError."""
    try:
        picture.load()
        return np.asarray(_upright(_to_grey_or_rgb(picture), _orientation(picture)))
    except DECODER_ERRORS as error:
        raise ImageError(_reason(error, b"")) from None


def decode_picture(data: bytes, *, max_pixels: int = MAX_PIXELS, least_side: int | None = None) -> Image.Image:
    """The same as `decode` as a Pillow image in mode RGB, which crops are made from without a copy."""
    if not data:
        raise ImageError("empty file")
    try:
        with _open(data, max_pixels, least_side) as image:
            image.load()
            orientation, picture = _orientation(image), _to_grey_or_rgb(image)
            if picture is not image:
                # Its memory is needed for what comes.
                image.close()
            return _upright(picture, orientation)
    except DECODER_ERRORS as error:
        raise ImageError(_reason(error, data)) from None


def decoded_pixels(data: bytes) -> int:
    """How many pixels `decode` will make of an image file, by its header; raises ImageError."""
    try:
        with _open(data, MAX_PIXELS, None) as image:
            return image.width * image.height
    except DECODER_ERRORS as error:
        raise ImageError(_reason(error, data)) from None


def _open(data: bytes, max_pixels: int, least_side: int | None) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        # Pillow refuses before it knows that a JPEG can be read smaller.
        if not data.startswith(b"\xff\xd8"):
            raise
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    width, height = image.size
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        eighths = _eighths(width, height, max_pixels, least_side)
        image.draft(None, (max(1, width * eighths // 8), max(1, height * eighths // 8)))
    if image.width * image.height > max_pixels:
        raise ImageError(f"{width} x {height} pixels is above the limit of {max_pixels:,}")
    if not image.width * image.height:
        raise ImageError("no pixels")
    return image


def _eighths(width: int, height: int, max_pixels: int, least_side: int | None) -> int:
    """Eighths of its size at which a JPEG is decoded: 8, 4, 2 or 1."""
    eighths = 8
    while eighths > 1 and least_side is not None and min(width, height) * (eighths // 2) >= least_side * 8:
        eighths //= 2
    while eighths > 1 and width * height * eighths**2 > max_pixels * 64:
        eighths //= 2
    return eighths


def reads_heif() -> bool:
    """Whether the extra heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    if reads_heif():
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """How an image is turned upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODER_ERRORS:
        # Damaged EXIF says nothing on the pixels.
        return None
    return _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None


def _upright(image: Image.Image, method: Image.Transpose | None) -> Image.Image:
    turned = image if method is None else image.transpose(method)
    return turned if turned.mode == "RGB" else turned.convert("RGB")


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """In strips, since what is made on the way takes several times the image's own memory; grey has a quarter of it."""
    mode, made = image.mode, "RGB"
    if mode.startswith("I") or mode == "F":
        scale, made = _grey_scale(image), "L"

        def convert(strip: Image.Image) -> Image.Image:
            return Image.fromarray(_scaled_grey(strip, *scale))

    elif mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:

        def convert(strip: Image.Image) -> Image.Image:
            return _on_white(strip.convert("RGBA"))

    elif mode == "RGB":
        return image
    else:
        return image.convert("RGB")
    if image.width * image.height <= _STRIP_PIXELS:
        return convert(image)
    whole = Image.new(made, image.size)
    for top, strip in _strips(image):
        whole.paste(convert(strip), (0, top))
    return whole


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Parts of an image from top to bottom, with the row where each begins."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _scaled_grey(image: Image.Image, offset: float, span: float) -> Pixels:
    values = np.asarray(image)
    scaled = (np.where(np.isfinite(values), values, offset).astype(np.float64) - offset) * (255.0 / span)
    grey = np.rint(scaled).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return grey


def _tiff_bits(image: Image.Image) -> int:
    """Bits a sample says it has: cameras and scanners write 12 of 16."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    return int(bits[0]) if isinstance(bits, tuple) and 8 < bits[0] < 16 else 16


def _grey_scale(image: Image.Image) -> tuple[float, float]:
    """What black is, and how much more white is."""
    ranges = []
    for _, strip in _strips(image):
        values = np.asarray(strip)
        values = values[np.isfinite(values)]
        ranges += [(float(values.min()), float(values.max()))] if values.size else []
    if not ranges:
        raise ImageError("no finite pixel")
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    bits = _tiff_bits(image)
    tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (float(2**bits - 1),)
    fitting = [bound for bound in tops if low >= 0 and high <= bound]
    return (0.0, fitting[0]) if fitting else (low, (high - low) or 1.0)


def _reason(error: BaseException, data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith(_MARKUP):
        return f"not an image (starts with {start[:14].decode('ascii', 'replace')}...)"
    text = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"above the limit of {MAX_PIXELS:,} pixels"
    if isinstance(error, EOFError) or "truncated" in text.lower() or "not enough" in text.lower() or _cut_webp(data):
        return "truncated"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and not reads_heif():
        return HEIF_ADVICE
    if isinstance(error, UnidentifiedImageError):
        known = next((name for name, signature in _SIGNATURES.items() if data.startswith(signature)), None)
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data[:12])
        return f"truncated or damaged {known}" if known else f"not an image (starts with {shown}...)"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return f"damaged ({text})"


def _cut_webp(data: bytes) -> bool:
    """Whether a WebP is shorter than it says; its decoder doesn't tell what is wrong."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)


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


def fetch(uri: str | None, data: bytes | None) -> bytes:
    """A row's file: its embedded bytes, or what lies at its local path, file:// or s3://.

    Raises ImageError where the row's own file is missing or refused, StorageError where the store doesn't answer.
    """
    if data is not None:
        return data
    if not uri:
        raise ImageError("neither a uri nor bytes")
    try:
        return read_object(uri)
    except MissingError as error:
        raise ImageError(str(error)) from None
