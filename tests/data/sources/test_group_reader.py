"""The group of an image: from a column, its path or its EXIF data, and every wrong way to say it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run_command
from PIL import ExifTags, Image

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.manifest import Manifest


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, each of three cameras, below a folder whose own name looks like a camera's."""
    folder = tmp_path / "cam9"
    for number in range(12):
        path = (
            folder / "photos" / ("ant", "bee")[number % 2] / f"cam{number % 3}-2024-05-0{number % 4 + 1}-{number}.jpg"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        fields = exif.get_ifd(ExifTags.IFD.Exif)
        fields[ExifTags.Base.BodySerialNumber] = f"SN{number % 3}\0"
        fields[ExifTags.Base.DateTimeOriginal] = f"2024:05:0{number % 4 + 1} 10:00:00"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path, exif=exif)
    return folder / "photos"


def groups(path: Path) -> list[str | None]:
    return Manifest.read(str(path)).table.column("group").to_pylist()


def build(photos: Path, *options: object) -> Path:
    path = photos.parent / "photos.parquet"
    assert run_command("manifest", "build", "--folders", photos, *options, "-o", path) == 0
    return path


def test_paths_give_groups_by_what_parentheses_capture(photos: Path) -> None:
    assert set(groups(build(photos, "--group-from", r"(cam\d)"))) == {"cam0", "cam1", "cam2"}
    path = build(photos, "--group-from", r"(cam\d)-(.{10})", "--test-groups", "cam0/2024-05-01", "cam1/2024-05-02")
    assert len(set(groups(path))) == 12
    assert len(Manifest.read(str(path)).rows_of("test")) == 2


def test_groups_that_keep_nothing_together_and_lost_values_are_noted(photos: Path, tmp_path: Path) -> None:
    notes = str(Manifest.read(str(build(photos, "--group-from", r"-(\d+)\.jpg"))).notes)
    assert "each group has a single image, so that groups keep nothing together" in notes
    rows = [f"{number}.jpg,ant,{('nan', 'a', 'N/A')[number % 3]}" for number in range(6)]
    (tmp_path / "t.csv").write_text("path,label,site\n" + "\n".join(rows) + "\n")
    options = ("--group-by", "site", "-o", tmp_path / "t.parquet")
    assert run_command("manifest", "build", "--table", tmp_path / "t.csv", *options) == 0
    notes = str(Manifest.read(str(tmp_path / "t.parquet")).notes)
    assert "2 images of the group 'N/A'; leave the cell empty if it means no group" in notes
    assert "2 images of the group 'nan'" in notes
    columns = {"path": ["a.jpg", "b.jpg", "c.jpg"], "label": ["ant"] * 3, "site": [1.5, 2.5, float("nan")]}
    pq.write_table(pa.table(columns), tmp_path / "f.parquet")
    assert run_command("manifest", "build", "--table", tmp_path / "f.parquet", *options) == 0
    assert groups(tmp_path / "t.parquet") == ["1.5", "2.5", None], "a number that is missing is no group"


def test_exif_data_gives_the_camera_or_the_day(photos: Path) -> None:
    (photos / "ant" / "damaged.jpg").write_bytes(b"no image")
    path = build(photos, "--group-from", "exif:serial")
    assert set(groups(path)) == {"SN0", "SN1", "SN2", None}
    assert "3 groups that no split divides, by --group-from exif:serial; 1 image without one" in str(
        Manifest.read(str(path)).notes
    )
    with Image.open(photos / "ant" / "cam0-2024-05-01-0.jpg") as image:
        exif = image.getexif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:13:45 10:00:00"
        Image.new("RGB", (4, 4)).save(photos / "ant" / "no-such-day.jpg", exif=exif)
    assert set(groups(build(photos, "--group-from", "exif:day"))) == {f"2024-05-0{day}" for day in range(1, 5)} | {None}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--group-from", r"cam\d"], r"must have parentheses around the group's name, got 'cam\\\\d'\. Write"),
        (["--group-from", "(cam"], r"must be a regular expression, got '\(cam' \(missing \), .*\)\. Write"),
        (["--group-from", "(" * 9000], r"must be a regular expression, got '\(+' \(.*\)\. Write"),
        (["--group-from", "(x{99999999999999})"], r"must be a regular expression, got .* too large\)\. Write"),
        (["--group-from", "(dog)"], r"names none of 12 images, such as .*ant.*\. Give another column or expression\."),
        (["--group-from", "(x?)"], r"names none of 12 images"),
        (["--group-from", "(cam9)"], r"names none of 12 images"),
        (["--group-from", "(cam)"], r"must name two or more groups, and names only 'cam'\. Give"),
        (
            ["--group-from", r"(cam\d)", "--test-groups", "cam1", "cam5", "CAM0"],
            r"remove them: 'cam5': did you mean 'cam\d'\?; 'CAM0': did you mean 'cam0'\?",
        ),
        (["--group-from", "exif:serail"], r"reads exif:serial or exif:day, got 'exif:serail'; did you mean 'serial'\?"),
        (["--group-by", "camera"], r"--group-by must be a column of --table .* Use --group-from"),
        (["--group-by", "a", "--group-from", "(b)"], r"Only one of --group-by and --group-from"),
        (["--test-groups", "cam1"], r"--test-groups needs --group-by or --group-from"),
        (
            ["--group-from", r"(cam\d)", "--test-groups", "cam5"],
            r"takes names of groups, .* Correct or remove them: 'cam5': did you mean",
        ),
        (["--group-from", r"(cam\d)", "--test-groups", "cam1", "--test-share", "0.2"], r"Only one of --test-share"),
    ],
)
def test_a_wrong_group_is_one_sentence(photos: Path, options: list[str], sentence: str) -> None:
    with pytest.raises(ImbvlmError, match=sentence) as caught:
        build(photos, *options)
    assert "\n" not in str(caught.value)


def test_a_column_of_tables_gives_groups(tmp_path: Path) -> None:
    rows = ["path,label,site"] + [f"{number}.jpg,ant,{('', ' 7 ', '8')[number % 3]}" for number in range(6)]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"path": "b.jpg", "label": "bee", "site": 7}) + "\n")
    path, tables = tmp_path / "m.parquet", ["--table", tmp_path / "a.csv", tmp_path / "b.jsonl"]
    assert run_command("manifest", "build", *tables, "--group-by", "site", "-o", path) == 0
    assert groups(path) == [None, "7", "8", None, "7", "8", "7"]
    with pytest.raises(ImbvlmError, match="there is no column 'sight' for group; did you mean 'site'"):
        run_command("manifest", "build", *tables, "--group-by", "sight", "-o", path)


def test_groups_of_a_manifest_that_are_not_asked_for_are_named(photos: Path, tmp_path: Path) -> None:
    source, out = build(photos, "--group-from", r"(cam\d)"), tmp_path / "again.parquet"
    assert run_command("manifest", "build", "--table", source, "-o", out) == 0
    assert f"the groups of {source} are not read; --group-by group keeps them" in Manifest.read(str(out)).notes
    assert run_command("manifest", "build", "--table", source, "--group-by", "group", "-o", out) == 0
    assert groups(out) == groups(source)
    assert "are not read" not in str(Manifest.read(str(out)).notes)


def test_a_field_of_annotated_images_gives_groups(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg", "location": number % 2} for number in range(4)]
    content = {
        "images": [*images, {"id": 4, "file_name": "4.jpg"}, {"id": 5, "file_name": "5.jpg", "location": "\ud800"}],
        "annotations": [{"image_id": number, "category_id": 0} for number in range(6)],
        "categories": [{"id": 0, "name": "ant"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    source, path = ["--inaturalist", f"train={tmp_path}/train.json"], tmp_path / "m.parquet"
    assert run_command("manifest", "build", *source, "--group-by", "location", "-o", path) == 0
    assert groups(path) == ["0", "1", "0", "1", None, "?"]
    with pytest.raises(ImbvlmError, match="its images have no field 'locaton' for groups; did you mean 'location'"):
        run_command("manifest", "build", *source, "--group-by", "locaton", "-o", path)


def test_photos_without_exif_data_and_columns_of_mixed_values_say_what_to_do(tmp_path: Path) -> None:
    for number, garbage in enumerate((b"", b"II*\0\xff\xff\xff\xff", b"no exif")):
        path = tmp_path / "photos" / "ant" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        data, segment = path.read_bytes(), b"Exif\0\0" + garbage
        path.write_bytes(data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:])
    with pytest.raises(ImbvlmError, match=r"names none of 3 images, .* Their EXIF data lack it or can't be read: take"):
        run_command("manifest", "build", "--folders", tmp_path / "photos", "--group-from", "exif:day", "-o",
                    tmp_path / "m.parquet")  # fmt: skip
    rows = [json.dumps({"path": f"{site}.jpg", "label": "ant", "site": site}) for site in (1, "a")]
    (tmp_path / "t.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(ImbvlmError, match="write all values of a column as texts or all as numbers"):
        run_command("manifest", "build", "--table", tmp_path / "t.jsonl", "--group-by", "site", "-o",
                    tmp_path / "m.parquet")  # fmt: skip
