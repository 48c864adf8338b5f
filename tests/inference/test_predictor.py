"""An exported model classifies whatever form an image has, and refuses to where it would see images otherwise."""

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_model import CLASS_NAMES, write_model_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

import imbvlm
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.inference import predictor
from imbvlm.models.encoders.encoder_factory import create_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def test_every_form_of_an_image_gives_the_same_prediction(folder: Path, tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "a b.png"
    path.write_bytes(encoded(image))
    forms = [path, str(path), f"file://{path}", path.read_bytes(), image, np.asarray(image)]
    model = imbvlm.load(folder, "cpu")
    # Each in a call of its own: a row's place in a batch may decide its last bits.
    first, *others = [prediction for form in forms for prediction in model.predict([form], top=3)]
    assert first.source == str(path)
    assert set(first.class_names) == set(CLASS_NAMES)
    assert sum(first.probabilities) == pytest.approx(1)
    assert list(first.probabilities) == sorted(first.probabilities, reverse=True)
    for other in others:
        assert (other.class_names, other.probabilities) == (first.class_names, first.probabilities)


def test_one_image_in_any_form_is_one_image(folder: Path, tmp_path: Path) -> None:
    """Text, bytes and arrays are iterables: a path would be as many images as it has letters."""
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(picture()))
    model = imbvlm.load(folder, "cpu")
    (expected,) = model.predict([path])
    encoded_forms = (path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes()))
    for form in (path, str(path), *encoded_forms, picture(), np.asarray(picture())):
        for predictions in (model.predict(form), list(model.predict_stream(form))):
            assert [prediction.probabilities for prediction in predictions] == [expected.probabilities]
    assert len(model.predict(np.stack([np.asarray(picture())] * 3))) == 3
    (gray,) = model.predict(np.zeros((4, 4), np.uint8))
    assert "H x W x 3" in str(gray.error)


def test_what_is_no_image_and_limits_that_are_none_are_sentences(folder: Path) -> None:
    model = imbvlm.load(folder, "cpu")
    with pytest.raises(ImbvlmError, match=r"predict takes an image or several: a path, .* It got NoneType"):
        model.predict(None)
    (prediction,) = model.predict([7])
    assert str(prediction.error).endswith("and this is int")
    for top in (0, -1, 1.5, "3", True):
        with pytest.raises(ImbvlmError, match="must be a whole number from 1 up, got"):
            model.predict([], top=top)
        with pytest.raises(ImbvlmError, match="must be a whole number from 1 up, got"):
            model.predict_stream([], top=top)
    assert len(model.predict(picture(), top=np.int64(99))[0].labels) == len(CLASS_NAMES)


def test_a_model_of_averaged_tokens_averages_them_again(tmp_path: Path) -> None:
    network = imbvlm.load(write_model_folder(tmp_path, method="decoder", token_pooling=2), "cpu").network
    crops = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = create_encoder(EncoderConfig(name=f"local-dir:{tmp_path / 'tower'}"), EvalConfig()).outputs(crops)
        front, grid = whole.tokens[:, :1], whole.tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        averaged = torch.cat([front, functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)], dim=1)
        expected = network.classifier(averaged.half().float())
        torch.testing.assert_close(network(crops)[0], expected, atol=1e-3, rtol=1e-3)
        assert (network(crops)[0] - network.classifier(whole.tokens)).abs().max() > 0.01


def test_pillow_images_are_turned_upright_and_put_on_white_as_files_are(folder: Path) -> None:
    turned = picture()
    exif = turned.getexif()
    exif[274] = 6
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=exif)
    clear = picture(mode="RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (50, 1))))
    model = imbvlm.load(folder, "cpu")
    for data in (stream.getvalue(), encoded(clear), encoded(picture(mode="L"))):
        (from_file,), (from_picture,) = model.predict([data]), model.predict([Image.open(io.BytesIO(data))])
        assert from_file.probabilities == from_picture.probabilities


def test_what_cannot_be_read_is_a_row_with_its_reason_and_the_rest_is_classified(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(encoded(picture())[:60])
    (tmp_path / "page.jpg").write_text("<!doctype html><title>404</title>")
    good = tmp_path / "good.png"
    good.write_bytes(encoded(picture(1)))
    model = imbvlm.load(folder, "cpu")
    images = [tmp_path / "cut.png", good, tmp_path / "gone.png", tmp_path / "page.jpg", np.zeros((4, 4), np.uint8)]
    predictions = model.predict([*images, b""])
    assert [prediction.class_names == () for prediction in predictions] == [True, False, True, True, True, True]
    assert [prediction.error for prediction in predictions[2:4]] == [
        "file not found",
        "not an image (starts with <!doctype html...)",
    ]
    assert "truncated" in predictions[0].error
    assert "H x W x 3" in predictions[4].error
    assert predictions[1].probabilities == model.predict([good])[0].probabilities


def test_a_model_whose_preprocessing_cannot_be_reproduced_is_refused(folder: Path, tmp_path: Path) -> None:
    description = json.loads((folder / "config.json").read_text())

    def edited(**changes: Any) -> Path:
        for file in folder.rglob("*"):
            if file.is_file():
                place = tmp_path / "edited" / file.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.read_bytes())
        (tmp_path / "edited" / "config.json").write_text(json.dumps({**description, **changes}))
        return tmp_path / "edited"

    imbvlm.load(edited())
    with pytest.raises(
        ImbvlmError, match=r"images are resized differently here \(Pillow .* \(Pillow 9\.9\).*pillow==9\.9"
    ):
        imbvlm.load(edited(preprocess_fingerprint="0" * 64, pillow="9.9"))
    with pytest.raises(ImbvlmError, match="prepares images differently than"):
        imbvlm.load(edited(preprocess={**description["preprocess"], "interpolation": "bicubic"}))
    with pytest.raises(ImbvlmError, match="has format 1, and this version reads 2"):
        imbvlm.load(edited(format=1))
    with pytest.raises(ImbvlmError, match="is not the one that the classifier was trained on"):
        imbvlm.load(edited(encoder={**description["encoder"], "weights_fingerprint": "0"}))
    with pytest.raises(ImbvlmError, match=r"has no config\.json, so it is no exported model"):
        imbvlm.load(tmp_path)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A model's folder to damage."""
    return shutil.copytree(folder, tmp_path / "model")


def weights_with(folder: Path, name: str, key: str, value: float) -> None:
    tensors = load_file(folder / name)
    tensors[key].view(-1)[0] = value
    save_file(tensors, folder / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": math.nan}, "temperature above 0, got"),
        ({"temperature": 0}, "temperature above 0, got"),
        ({"tau": math.inf}, "must be finite"),
        ({"class_counts": [90, 9]}, "class_counts has 2 numbers from 0 up, and there are 3 classes"),
        ({"class_counts": [90, 9, -1]}, "class_counts has 3 numbers from 0 up"),
        ({"class_counts": [90, 9, 1.5]}, "is not a model's description"),
        ({"tau": "much"}, "is not a model's description"),
    ],
)
def test_an_adjustment_without_meaning_is_refused(copied: Path, change: Any, words: str) -> None:
    description = json.loads((copied / "config.json").read_text())
    description["post_hoc"] |= change
    (copied / "config.json").write_text(json.dumps(description))
    with pytest.raises(ImbvlmError, match=words):
        imbvlm.load(copied, "cpu")


def test_weights_that_are_not_what_was_exported_are_refused(copied: Path) -> None:
    """A flipped bit changes predictions a little, and nothing shows it."""
    for name, key in (("model.safetensors", "classifier.weight"), ("zero_shot.safetensors", "class_embeddings")):
        whole = (copied / name).read_bytes()
        weights_with(copied, name, key, 0.25)
        with pytest.raises(ImbvlmError, match=f"{name} is damaged: its content isn't what was exported"):
            imbvlm.load(copied, "cpu")
        (copied / name).write_bytes(whole)
    imbvlm.load(copied, "cpu")


def test_a_file_of_weights_that_no_model_has_is_refused_before_it_is_read(copied: Path) -> None:
    with (copied / "model.safetensors").open("r+b") as stream:
        stream.truncate(10**12)
    with pytest.raises(ImbvlmError, match=r"model.safetensors: it has 1,000\.0 GB, and at most 16\.0 GB are read"):
        imbvlm.load(copied, "cpu")


def test_weights_that_are_no_numbers_are_refused_and_an_export_without_digests_is_not(copied: Path) -> None:
    description = json.loads((copied / "config.json").read_text())
    # As version 0.1 wrote it.
    del description["digests"]
    (copied / "config.json").write_text(json.dumps(description))
    imbvlm.load(copied, "cpu")
    for value in (math.nan, math.inf):
        weights_with(copied, "model.safetensors", "classifier.weight", value)
        with pytest.raises(ImbvlmError, match=r"has numbers that aren't finite in classifier\.weight"):
            imbvlm.load(copied, "cpu")


def test_an_export_of_several_models_asks_which_one(tmp_path: Path) -> None:
    """What `export --top 2` writes; to a person who predicts with it, it is an export."""
    for name in ("1-t00005/model", "2-t00003/model", "3-notes"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ("notes.txt" if name == "3-notes" else "config.json")).write_text("{}")
    several = f"{tmp_path}/1-t00005, {tmp_path}/2-t00003"
    with pytest.raises(ImbvlmError, match=f"{tmp_path} has several exported models. Name one of {several}\\.$"):
        imbvlm.load(tmp_path)


def test_the_fingerprint_sees_settings_and_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Preprocess(32)
    assert plain.fingerprint() == Preprocess(32).fingerprint()
    others = [Preprocess(48), Preprocess(32, resize=8 / 7), Preprocess(32, interpolation="bilinear"),
              Preprocess(32, mean=(0.5, 0.5, 0.5))]  # fmt: skip
    assert len({preprocess.fingerprint() for preprocess in [plain, *others]}) == 5
    before = plain.fingerprint()
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, *given, **named: resize(self, *given, **named).point(lambda value: value ^ 1),
    )
    assert plain.fingerprint() != before


def test_inputs_of_a_file_share_a_decoded_image_where_they_need_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode, sides = predictor.decode_picture, list[int | None]()

    def counted(data: bytes, *, min_side: int | None = None) -> Image.Image:
        sides.append(min_side)
        return decode(data, min_side=min_side)

    monkeypatch.setattr(predictor, "decode_picture", counted)
    data = encoded(picture().resize((400, 300)), "JPEG")
    exact, reduced = (Preprocess(32), Preprocess(48).five_crop(8)), (Preprocess(32, jpeg_downscale=1.0),)
    for inputs, expected in ((exact, [None]), ((*exact, *reduced), [None, 32])):
        sides.clear()
        crops = predictor.crops_of_file(inputs, data)
        assert sorted(sides, key=str, reverse=True) == expected
        for preprocess, part in zip(inputs, crops, strict=True):
            image = preprocess.decode(data)
            assert (part == np.stack([preprocess.apply(image, view) for view in range(preprocess.num_crops)])).all()
    assert [part.shape for part in crops] == [(1, 3, 32, 32), (5, 3, 48, 48), (1, 3, 32, 32)]


def test_classifying_needs_no_ray(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(picture()))
    code = (
        "import sys, imbvlm; assert 'torch' not in sys.modules; "
        f"print(imbvlm.load({str(folder)!r}).predict([{str(tmp_path / 'photo.png')!r}])[0].class_names); "
        "print([name for name in ('ray', 'pandas', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert CLASS_NAMES[0] in names


def test_batches_do_not_change_what_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = imbvlm.load(folder, "cpu")
    images = [np.asarray(picture(seed)) for seed in range(7)]
    whole = model.predict(images)
    monkeypatch.setattr("imbvlm.inference.predictor.BATCH_SIZE", 3)
    parts = model.predict(images)
    assert (
        [prediction.source for prediction in parts]
        == [prediction.source for prediction in whole]
        == [f"image {number}" for number in range(7)]
    )
    for prediction, other in zip(whole, parts, strict=True):
        assert prediction.labels == other.labels
        torch.testing.assert_close(prediction.probabilities, other.probabilities)


def test_an_exported_model_names_no_path_of_the_machine_it_was_made_on(folder: Path, tmp_path: Path) -> None:
    text = (folder / "config.json").read_text()
    assert str(folder.parent.parent) not in text
    assert json.loads(text)["encoder"]["name"] == "local-dir:tower"
