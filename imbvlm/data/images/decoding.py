"""From a file's bytes to pixels: fetching, and decoding of all formats and modes."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, JpegImagePlugin, UnidentifiedImageError

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.files.object_reader import MissingError, read_object

Pixels = npt.NDArray[np.uint8]

# Pillow's own bound for a decompression bomb. Larger JPEGs are decoded at a fraction of their size.
MAX_PIXELS = 178_956_970
# Pixels converted at a time, where the conversion to RGB takes many bytes a pixel.
_STRIP_PIXELS = 1 << 22
HEIF_ADVICE = "HEIC is read with the extra heif: pip install 'imbvlm[heif]'"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Formats with a signature in their first bytes; EPS and WMF are left out because Pillow starts other programs for them.
FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "ICO", "PPM", "JPEG2000", "AVIF", "SGI", "PSD", "QOI",
    "HEIF",
)  # fmt: skip
# Errors of Pillow's decoders for damaged files.
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
_BITS_PER_SAMPLE = 258
_MARKUP = (b"<!doctype html", b"<html", b"<?xml", b"<svg", b"<head", b"<error")
_SIGNATURES: Mapping[str, bytes | tuple[bytes, ...]] = {
    "JPEG": b"\xff\xd8",
    "PNG": b"\x89PNG",
    "GIF": b"GIF8",
    "WebP": b"RIFF",
    "TIFF": (b"II*\0", b"MM\0*"),
}


class ImageError(ImbvlmError):
    """An image that can't be read; the list of quarantined rows shows its `reason`, one short line."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> Pixels:
    """Pixels (H, W, 3) in RGB of an image file: upright, alpha on white, the first frame of several.

    16-bit gray is scaled by 1/257. 32-bit gray is too where it fits in 16 bits, else from its own minimum to maximum.
    Float gray has the first of the ranges 0..1, 0..255 and 0..65535 that holds it, else its own; pixels that are not
    finite become black. JPEGs above `max_pixels` are decoded at 1/2, 1/4 or 1/8 of their size. With `min_side` every
    JPEG is decoded at the smallest of these sizes whose shorter side isn't below it. Raises ImageError.
    """
    return np.asarray(decode_picture(data, max_pixels=max_pixels, min_side=min_side))


def picture_pixels(image: Image.Image) -> Pixels:
    """Pixels (H, W, 3) in RGB of an opened Pillow image, by the rules of `decode`; raises ImageError."""
    try:
        image.load()
        return np.asarray(_upright(_to_gray_or_rgb(image), _orientation(image)))
    except DECODER_ERRORS as error:
        raise ImageError(_reason(error, b"")) from None


def decode_picture(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> Image.Image:
    """As `decode`, a Pillow image in mode RGB, from which crops are made without a copy."""
    if not data:
        raise ImageError("empty file")
    try:
        with _open(data, max_pixels, min_side) as image:
            image.load()
            orientation, converted = _orientation(image), _to_gray_or_rgb(image)
            if converted is not image:
                # Frees its memory for the next conversion.
                image.close()
            return _upright(converted, orientation)
    except DECODER_ERRORS as error:
        raise ImageError(_reason(error, data)) from None


def decoded_pixels(data: bytes) -> int:
    """Number of pixels that `decode` gives for an image file, by its header; raises ImageError."""
    try:
        with _open(data, MAX_PIXELS, None) as image:
            return image.width * image.height
    except DECODER_ERRORS as error:
        raise ImageError(_reason(error, data)) from None


def exif_fields(data: bytes) -> dict[int, Any]:
    """An image file's EXIF fields by their numbers (`PIL.ExifTags.Base`); none where they can't be read."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            exif = image.getexif()
            return {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
    except DECODER_ERRORS:
        return {}


def _open(data: bytes, max_pixels: int, min_side: int | None) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        # Pillow rejects a JPEG before it can be asked for a smaller size.
        if not data.startswith(b"\xff\xd8"):
            raise
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    width, height = image.size
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        eighths = _eighths(width, height, max_pixels, min_side)
        image.draft(None, (max(1, width * eighths // 8), max(1, height * eighths // 8)))
    if image.width * image.height > max_pixels:
        raise ImageError(f"{width} x {height} pixels is above the limit of {max_pixels:,}")
    if not image.width * image.height:
        raise ImageError("no pixels")
    return image


def _eighths(width: int, height: int, max_pixels: int, min_side: int | None) -> int:
    """Eighths of its size at which a JPEG is decoded: 8, 4, 2 or 1."""
    eighths = 8
    while eighths > 1 and min_side is not None and min(width, height) * (eighths // 2) >= min_side * 8:
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
    """The operation that turns an image upright, by its EXIF data."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODER_ERRORS:
        # The pixels of an image with damaged EXIF data may be sound.
        return None
    return _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None


def _upright(image: Image.Image, method: Image.Transpose | None) -> Image.Image:
    turned = image if method is None else image.transpose(method)
    return turned if turned.mode == "RGB" else turned.convert("RGB")


def _to_gray_or_rgb(image: Image.Image) -> Image.Image:
    """Convert an image in strips: intermediate results take several times its memory. Gray takes a quarter of RGB's."""
    mode, new_mode = image.mode, "RGB"
    if mode.startswith("I") or mode == "F":
        scale, new_mode = _gray_scale(image), "L"

        def convert(strip: Image.Image) -> Image.Image:
            return Image.fromarray(_scaled_gray(strip, *scale))

    elif mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:

        def convert(strip: Image.Image) -> Image.Image:
            return _on_white(strip.convert("RGBA"))

    elif mode == "RGB":
        return image
    else:
        return image.convert("RGB")
    if image.width * image.height <= _STRIP_PIXELS:
        return convert(image)
    whole = Image.new(new_mode, image.size)
    for top, strip in _strips(image):
        whole.paste(convert(strip), (0, top))
    return whole


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Strips of an image from top to bottom, each with its first row."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _scaled_gray(image: Image.Image, offset: float, span: float) -> Pixels:
    values = np.asarray(image)
    scaled = (np.where(np.isfinite(values), values, offset).astype(np.float64) - offset) * (255.0 / span)
    gray = np.rint(scaled).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray = np.where(values == transparent, np.uint8(255), gray)
    return gray


def _tiff_bits(image: Image.Image) -> int:
    """Used bits of a sample: cameras and scanners use 12 of 16."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    return int(bits[0]) if isinstance(bits, tuple) and 8 < bits[0] < 16 else 16


def _gray_scale(image: Image.Image) -> tuple[float, float]:
    """The value of black, and the difference from black to white."""
    ranges = []
    for _, strip in _strips(image):
        values = np.asarray(strip)
        values = values[np.isfinite(values)]
        ranges += [(float(values.min()), float(values.max()))] if values.size else []
    if not ranges:
        raise ImageError("no finite pixel")
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    bits = _tiff_bits(image)
    maxima = (1.0, 255.0, 65535.0) if image.mode == "F" else (float(2**bits - 1),)
    fitting = [maximum for maximum in maxima if low >= 0 and high <= maximum]
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
        kind = next((name for name, signature in _SIGNATURES.items() if data.startswith(signature)), None)
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data[:12])
        return f"truncated or damaged {kind}" if kind else f"not an image (starts with {shown}...)"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return f"damaged ({text})"


def _cut_webp(data: bytes) -> bool:
    """Whether a WebP is shorter than its header says; its decoder gives no reason."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)


def fetch(uri: str | None, data: bytes | None) -> bytes:
    """A row's file: its embedded bytes, or the content at its local path, file:// or s3:// URI.

    Raises ImageError where the file is missing or access is denied, StorageError where the store doesn't answer.
    """
    if data is not None:
        return data
    if not uri:
        raise ImageError("neither a uri nor bytes")
    try:
        return read_object(uri)
    except MissingError as error:
        raise ImageError(str(error)) from None
