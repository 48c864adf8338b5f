"""Decoding whatever the file: the right pixels or a short reason; and crops that equal open_clip's own."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.images.decoding import ImageError, decode, fetch
from imbvlm.data.images.preprocess import Preprocess


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    if format == "QOI":
        return encode_qoi(image)
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def encode_qoi(image: Image.Image) -> bytes:
    """An RGB image as QOI, which Pillow 11 reads and doesn't write: a chunk with all three colors for each pixel."""
    head = b"qoif" + struct.pack(">IIBB", *image.size, 3, 0)
    pixels = np.asarray(image).reshape(-1, 3)
    return head + b"".join(b"\xfe" + pixel.tobytes() for pixel in pixels) + bytes(7) + b"\1"


def photo(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth colors, so that lossy formats stay close."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (x + y) / 2], axis=2) * 220 + 20
    return Image.fromarray(pixels.astype(np.uint8))


PHOTO = photo()
PIXELS = np.asarray(PHOTO).astype(int)
GRAY = np.asarray(PHOTO.convert("L")).astype(int)


def off_by(pixels: np.ndarray, wanted: np.ndarray) -> int:
    return np.abs(pixels.astype(int) - wanted).max()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM", "QOI", "WEBP", "JPEG", "JPEG2000", "GIF"])
def test_color_images_keep_their_colors(format: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})
    pixels = decode(encode(PHOTO, format, **options))
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8
    assert off_by(pixels, PIXELS) <= {"JPEG": 6, "GIF": 40}.get(format, 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_gray_is_the_same_in_all_channels(format: str) -> None:
    pixels = decode(encode(PHOTO.convert("L"), format, **({"quality": 98} if format == "JPEG" else {})))
    assert off_by(pixels, GRAY[:, :, None]) <= 3


def test_one_bit_is_black_and_white() -> None:
    pixels = decode(encode(PHOTO.convert("1"), "PNG"))
    assert set(np.unique(pixels)) == {0, 255}


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_and_not_clipped(format: str) -> None:
    ramp = np.linspace(0, 65535, 2400).round().astype(np.uint16).reshape(40, 60)
    pixels = decode(encode(Image.fromarray(ramp), format))
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert off_by(pixels, (ramp / 257)[:, :, None]) <= 0.51


def test_16_bit_big_endian_and_32_bit_gray_follow_the_same_scale() -> None:
    ramp = np.linspace(0, 65535, 2400).round().astype(np.uint16).reshape(40, 60)
    big = Image.frombytes("I;16B", (60, 40), ramp.astype(">u2").tobytes())
    wide = Image.fromarray(ramp.astype(np.int32))
    for image in (big, wide):
        assert off_by(decode(encode(image, "TIFF")), (ramp / 257)[:, :, None]) <= 0.51


def test_32_bit_gray_beyond_16_bits_spans_its_own_range() -> None:
    values = np.linspace(-100_000, 3_000_000, 2400).astype(np.int32).reshape(40, 60)
    pixels = decode(encode(Image.fromarray(values), "TIFF"))
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_12_bit_pgm_is_scaled_from_its_own_maximum() -> None:
    values = np.linspace(0, 4095, 24).round().astype(">u2")
    pixels = decode(b"P5 6 4 4095\n" + values.tobytes())
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_tiff_is_scaled_by_the_first_range_that_holds_it(top: float) -> None:
    values = np.linspace(0, top, 2400, dtype=np.float32).reshape(40, 60)
    assert off_by(decode(encode(Image.fromarray(values), "TIFF")), (values / top * 255)[:, :, None]) <= 0.51


def test_float_tiff_outside_every_range_spans_its_own() -> None:
    values = np.linspace(-3, 900, 2400, dtype=np.float32).reshape(40, 60)
    pixels = decode(encode(Image.fromarray(values), "TIFF"))
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


def test_float_pixels_that_are_not_finite_are_black_and_an_image_of_them_is_refused() -> None:
    values = np.full((4, 4), 0.5, dtype=np.float32)
    values[0, 0], values[1, 1] = np.nan, np.inf
    pixels = decode(encode(Image.fromarray(values), "TIFF"))
    assert pixels[0, 0, 0] == pixels[1, 1, 0] == 0
    assert pixels[2, 2, 0] == 128
    with pytest.raises(ImageError, match="no finite pixel"):
        decode(encode(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_has_the_colors_of_its_inks_also_inverted_as_adobe_writes_it(format: str) -> None:
    pixels = decode(encode(PHOTO.convert("CMYK"), format, **({"quality": 98} if format == "JPEG" else {})))
    assert off_by(pixels, PIXELS) <= 8


def test_lab_is_brought_to_rgb() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(PHOTO, srgb, lab, outputMode="LAB")
    assert np.abs(decode(encode(image, "TIFF")).astype(int) - PIXELS).mean() < 2


def half_clear(mode: str) -> Image.Image:
    image = PHOTO.convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(60) < 30, 0, 255).astype(np.uint8)[None].repeat(40, 0)))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_transparent_parts_are_white_and_opaque_ones_unchanged(mode: str, format: str) -> None:
    pixels = decode(encode(half_clear(mode), format, **({"lossless": True} if format == "WEBP" else {})))
    assert (pixels[:, :30] == 255).all()
    assert off_by(pixels[:, 30:], (GRAY[:, 30:, None] if mode == "LA" else PIXELS[:, 30:])) <= 1


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    pixels = decode(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))
    assert off_by(pixels, np.full((2, 2, 3), 127)) <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_color_or_palette_entry_is_white(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (0, 0, 0)).convert(mode)
    clear = {"P": image.getpixel((0, 0)), "L": 0, "RGB": (0, 0, 0), "1": 0}[mode]
    assert (decode(encode(image, "PNG", transparency=clear)) == 255).all()


def test_a_transparent_16_bit_gray_is_white() -> None:
    image = Image.fromarray(np.array([[0, 300], [65535, 300]], dtype=np.uint16))
    pixels = decode(encode(image, "PNG", transparency=300))[:, :, 0]
    assert pixels.tolist() == [[0, 255], [255, 255]]


def test_a_palette_with_alpha_of_its_own() -> None:
    image = PHOTO.quantize(8)
    pixels = decode(encode(image, "PNG", transparency=bytes([0] * 8)))
    assert (pixels == 255).all()


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = PHOTO if back is None else PHOTO.transpose(Image.Transpose(back))
    if orientation == 6:
        stored = PHOTO.transpose(Image.Transpose.ROTATE_90)
    if orientation == 8:
        stored = PHOTO.transpose(Image.Transpose.ROTATE_270)
    options = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}.get(format, {})
    pixels = decode(encode(stored, format, exif=exif, **options))
    assert pixels.shape == (40, 60, 3)
    assert off_by(pixels, PIXELS) <= 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12"])
def test_damaged_exif_does_not_lose_the_image(exif: bytes) -> None:
    assert decode(encode(PHOTO, "JPEG", exif=b"Exif\0\0" + exif)).shape == (40, 60, 3)


def test_a_gif_cut_in_its_palette_is_not_called_something_else() -> None:
    with pytest.raises(ImageError, match="truncated or damaged GIF"):
        decode(encode(PHOTO, "GIF")[:100])


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_taken(format: str) -> None:
    first, second = Image.new("RGB", (8, 6), (250, 0, 0)), Image.new("RGB", (8, 6), (0, 0, 250))
    pixels = decode(encode(first, format, save_all=True, append_images=[second]))
    assert off_by(pixels, np.asarray(first).astype(int)) <= 6


def test_one_pixel() -> None:
    assert decode(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image (starts with <!doctype html...)"),
        (b"\n <html><head>", "not an image (starts with <html><head>...)"),
        (b"plain text", "not an image (starts with plain text...)"),
        (b"\x00\x01\x02", "not an image (starts with ......)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image (starts with %!PS-Adobe-3...)"),
    ],
)
def test_what_is_not_an_image_says_how_it_starts(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_say_so(format: str, share: float) -> None:
    rng = np.random.default_rng(0)
    data = encode(Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)), format)
    with pytest.raises(ImageError, match=r"^truncated$"):
        decode(data[: int(len(data) * share)])


def test_an_image_above_the_limit_is_refused_with_the_limit() -> None:
    with pytest.raises(ImageError, match="100 x 100 pixels is above the limit of 9,999"):
        decode(encode(Image.new("RGB", (100, 100)), "PNG"), max_pixels=9_999)


def test_a_jpeg_above_the_limit_is_decoded_smaller() -> None:
    pixels = decode(encode(photo(400, 300), "JPEG", quality=95), max_pixels=20_000)
    assert pixels.shape == (75, 100, 3)
    assert off_by(pixels, np.asarray(photo(400, 300).reduce(4)).astype(int)) <= 8


@pytest.mark.slow
@pytest.mark.parametrize(("format", "options"), [("JPEG", {}), ("PNG", {"compress_level": 1})])
def test_240_megapixels_are_decoded_where_the_codec_can_shrink_them(format: str, options: dict[str, int]) -> None:
    data = encode(Image.new("RGB", (16_000, 15_000), (200, 30, 30)), format, **options)
    if format == "JPEG":
        assert decode(data).shape == (7_500, 8_000, 3)
    else:
        with pytest.raises(ImageError, match="above the limit of 178,956,970 pixels"):
            decode(data)


def test_pillows_settings_are_left_alone() -> None:
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    with pytest.raises(ImageError):
        decode(encode(PHOTO, "JPEG")[:-300])
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before == (False, 89_478_485)


SAMPLES = [
    encode(PHOTO, "JPEG"),
    encode(PHOTO, "JPEG", progressive=True),
    encode(PHOTO.convert("CMYK"), "JPEG"),
    encode(PHOTO, "PNG"),
    encode(PHOTO.quantize(16), "PNG"),
    encode(PHOTO, "GIF"),
    encode(PHOTO, "WEBP"),
    encode(PHOTO, "TIFF"),
    encode(PHOTO, "TIFF", compression="tiff_lzw"),
    encode(PHOTO.convert("F"), "TIFF"),
    encode(PHOTO, "BMP"),
    encode(PHOTO, "JPEG2000"),
    encode(PHOTO, "QOI"),
    encode(PHOTO, "PPM"),
    encode(PHOTO, "ICO", sizes=[(16, 16)]),
    encode(half_clear("RGBA"), "PNG"),
]


def assert_decodes_or_says_why(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = decode(data, max_pixels=1_000_000)
        except ImageError as error:
            pixels, reason = None, error.reason
    if pixels is None:
        assert 0 < len(reason) < 160
        assert "\n" not in reason
    else:
        assert pixels.dtype == np.uint8
        assert (pixels.ndim, pixels.shape[2]) == (3, 3)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_image_error(data: bytes) -> None:
    assert_decodes_or_says_why(data)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_files_raise_nothing_but_image_error(sample: bytes, draw: st.DataObject) -> None:
    data = bytearray(sample)
    for _ in range(draw.draw(st.integers(1, 6))):
        position = draw.draw(st.integers(0, len(data) - 1) | st.integers(0, min(80, len(data) - 1)))
        data[position] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(1, len(data)))
    assert_decodes_or_says_why(bytes(data) if cut % 2 else bytes(data[:cut]))


# ------------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (333, 500), (500, 375), (224, 224), (1, 1), (7, 900), (96, 97)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_evaluation_crop_equals_open_clips_own_transform(
    size: tuple[int, int], interpolation: str, resize_mode: str
) -> None:
    from open_clip import image_transform

    image = photo(*size)
    transform = image_transform(
        96, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=resize_mode
    )
    wanted = (transform(image) * 255).round().numpy()
    pixels = Preprocess(96, 1.0, interpolation, resize_mode=resize_mode).apply(np.asarray(image), view=0, row_id=3)
    assert pixels.shape == (3, 96, 96)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert off_by(pixels, wanted) <= 1


def test_resizing_before_the_crop_keeps_the_middle() -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize

    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (375, 500, 3), dtype=np.uint8))
    wanted = np.asarray(Compose([Resize(256), CenterCrop(224)])(image)).transpose(2, 0, 1).astype(int)
    assert off_by(Preprocess(224, 8 / 7, "bilinear").apply(np.asarray(image), 0, 0), wanted) <= 1


def test_random_crops_depend_on_row_and_view_alone() -> None:
    pixels = np.asarray(photo(120, 90))
    preprocess = Preprocess(32)
    crops = [preprocess.apply(pixels, view, row) for row in range(3) for view in range(4)]
    again = [preprocess.apply(pixels, view, row) for row in range(3) for view in range(4)]
    assert all((first == two).all() for first, two in zip(crops, again, strict=True))
    assert (crops[0] == crops[4]).all()
    different = {crop.tobytes() for index, crop in enumerate(crops) if index % 4}
    assert len(different) == 9


def test_random_crops_show_at_least_half_of_the_image_and_flip_half_of_the_time() -> None:
    ramp = np.linspace(0, 255, 200).astype(np.uint8)[None, :, None].repeat(200, 0).repeat(3, 2)
    crops = np.stack([Preprocess(32).apply(ramp, 1, row) for row in range(300)]).astype(int)
    spans = np.abs(crops[:, 0, 16, -1] - crops[:, 0, 16, 0])
    flipped = crops[:, 0, 16, 0] > crops[:, 0, 16, -1]
    assert spans.min() > 255 * 0.55
    assert 0.4 < flipped.mean() < 0.6


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_every_shape_has_random_crops(size: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    assert Preprocess(16).apply(pixels, 1, 0).shape == (3, 16, 16)


def test_preprocess_goes_through_json() -> None:
    import json

    preprocess = Preprocess(96, 8 / 7, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash")
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    "options", [{"interpolation": "lanczos"}, {"resize_mode": "longest"}, {"resize": 0.5}], ids=lambda value: str(value)
)
def test_what_a_crop_cannot_be_is_refused(options: dict[str, str | float]) -> None:
    with pytest.raises(ImbvlmError, match=str(next(iter(options.values())))):
        Preprocess(96, **options)


# ------------------------------------------------------------------------------------------------ fetching


@pytest.mark.parametrize("name", ["a b.jpg", "é 猫.jpg", "100%.jpg", "a%20b.jpg", "#1?.jpg"])
def test_files_are_found_by_their_names_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    assert fetch(str(tmp_path / name), None) == b"content"
    assert fetch(f"file://{tmp_path / name}", None) == b"content"


def test_percent_encoded_names_are_decoded_where_no_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "a b é.jpg").write_bytes(b"content")
    assert fetch(f"file://{tmp_path}/a%20b%20%C3%A9.jpg", None) == b"content"


def test_embedded_bytes_come_before_the_name() -> None:
    assert fetch("somewhere.png", b"content") == b"content"


def test_a_file_that_cannot_be_had_says_why(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^file not found$"):
        fetch(str(tmp_path / "none.jpg"), None)
    with pytest.raises(ImageError, match=r"^a folder, not a file$"):
        fetch(str(tmp_path), None)
    with pytest.raises(ImageError, match=r"^not a file name$"):
        fetch(str(tmp_path / "a\0b.jpg"), None)
    with pytest.raises(ImageError, match="neither"):
        fetch(None, None)


# ------------------------------------------------------------------------------------------------ smaller decoding


@pytest.mark.parametrize(("min_side", "shape"), [(301, (300, 400)), (150, (150, 200)), (60, (75, 100)), (10, (38, 50))])
def test_jpegs_are_decoded_smaller_but_never_below_what_is_needed(min_side: int, shape: tuple[int, int]) -> None:
    pixels = decode(encode(photo(400, 300), "JPEG", quality=95), min_side=min_side)
    assert pixels.shape == (*shape, 3)


def test_other_formats_are_not_decoded_smaller() -> None:
    assert decode(encode(photo(400, 300), "PNG"), min_side=10).shape == (300, 400, 3)


def test_the_faster_crop_is_within_a_few_gray_levels_of_the_exact_one() -> None:
    data = encode(photo(1200, 900), "JPEG", quality=90)
    exact, fast = Preprocess(96, 8 / 7), Preprocess(96, 8 / 7, jpeg_downscale=2.0)
    assert fast.decode(data).size == (300, 225)
    assert off_by(fast.apply(fast.decode(data)), exact.apply(exact.decode(data)).astype(int)) <= 4
    assert fast.decode(data, min_crop=0.5).size == (600, 450)


@pytest.mark.parametrize("kind", ["RGBA", "P", "I;16", "F", "LA"])
def test_an_image_converted_in_strips_is_that_converted_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if kind == "F":
        values = rng.normal(size=(40, 60)).astype(np.float32)
        values[3, 4] = np.nan
        data = encode(Image.fromarray(values), "TIFF")
    elif kind == "I;16":
        data = encode(Image.fromarray(rng.integers(0, 65536, (40, 60)).astype(np.uint16)), "PNG", transparency=7)
    elif kind == "P":
        data = encode(PHOTO.convert("P"), "PNG", transparency=bytes(range(256)))
    else:
        data = encode(half_clear(kind), "PNG")
    whole = decode(data)
    monkeypatch.setattr("imbvlm.data.images.decoding._STRIP_PIXELS", 7 * whole.shape[1])
    assert np.array_equal(decode(data), whole)


def test_photos_in_heic_are_read_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    heif.from_pillow(PHOTO).save(stream, quality=-1)
    assert off_by(decode(stream.getvalue()), PIXELS) < 20
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(PHOTO).save(stream, quality=-1, exif=exif.tobytes())
    assert decode(stream.getvalue()).shape[:2] in ((60, 40), (40, 60))
