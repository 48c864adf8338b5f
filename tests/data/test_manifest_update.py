"""A manifest that is built again after its data has grown: what keeps its split, and what is named."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imbvlm.cli.app import main
from imbvlm.data.manifest import Manifest


def photo(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label, name in enumerate(("dog", "fox")):
        for number in range(10):
            photo(tmp_path / "photos" / name / f"{number}.png", 100 * label + number)
    return tmp_path / "photos"


def build(photos: Path, output: str, *options: object) -> Manifest:
    with pytest.raises(SystemExit) as ended:
        main(["manifest", "build", "--folders", str(photos), "-o", str(photos.parent / output), *map(str, options)])
    assert ended.value.code == 0
    return Manifest.read(str(photos.parent / output))


def splits_of(manifest: Manifest) -> dict[str, str]:
    uris, splits = (manifest.table.column(name).to_pylist() for name in ("uri", "split"))
    return {"/".join(Path(uri).parts[-2:]): split for uri, split in zip(uris, splits, strict=True)}


def test_old_images_keep_their_splits_and_classes_their_numbers_and_differences_are_named(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = build(photos, "old.parquet", "--test-share", "0.3", "--seed", "7")
    before = splits_of(old)
    in_test = next(name for name, split in before.items() if split == "test" and name.startswith("fox"))
    # A copy of a test image, a class that sorts before the others, an image that is gone, and one that is edited.
    shutil.copy(photos / in_test, photos / "fox" / "copy.png")
    for number in range(10):
        photo(photos / "ant" / f"{number}.png", 500 + number)
    (photos / "dog" / "3.png").unlink()
    time.sleep(0.02)
    photo(photos / "dog" / "4.png", 999)
    capsys.readouterr()
    new = build(photos, "new.parquet", "--update", photos.parent / "old.parquet", "--test-share", "0.3")
    printed = capsys.readouterr().out
    after = splits_of(new)
    assert new.class_names == ("dog", "fox", "ant")
    assert {name: after[name] for name in before if name in after} == {
        name: split for name, split in before.items() if name != "dog/3.png"
    }
    assert after["fox/copy.png"] == "test", "or training would see a test image"
    assert sum(split == "test" for name, split in after.items() if name.startswith("ant")) == 3
    labels = dict(zip(splits_of(new), new.labels.tolist(), strict=True))
    assert all(labels[name] == ("dog", "fox", "ant").index(name.split("/")[0]) for name in labels)
    assert "11 images added: " in printed
    assert f"1 image gone: {photos / 'dog' / '3.png'}" in printed
    assert f"1 image changed since: {photos / 'dog' / '4.png'}" in printed
    assert "another label" not in printed


def test_without_a_share_added_images_train_and_nothing_new_is_said_so(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = build(photos, "old.parquet", "--test-share", "0.3")
    os.utime(photos.parent / "old.parquet", ns=(2**62, 2**62))
    assert splits_of(build(photos, "same.parquet", "--update", photos.parent / "old.parquet")) == splits_of(old)
    assert "no image is added, gone or changed" in capsys.readouterr().out
    photo(photos / "fox" / "more.png", 77)
    new = build(photos, "new.parquet", "--update", photos.parent / "old.parquet")
    assert splits_of(new) == {**splits_of(old), "fox/more.png": "train"}


def test_another_label_of_the_same_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        photo(tmp_path / f"{number}.png", number)
    rows = "".join(f"{number}.png,{'fox' if number < 3 else 'dog'},train\n" for number in range(6))
    (tmp_path / "a.csv").write_text("uri,label,split\n" + rows)
    (tmp_path / "b.csv").write_text("uri,label,split\n" + rows.replace("5.png,dog", "5.png,fox"))
    for name, more in (("a", []), ("b", ["--update", str(tmp_path / "a.parquet")])):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    "manifest",
                    "build",
                    "--table",
                    str(tmp_path / f"{name}.csv"),
                    "-o",
                    str(tmp_path / f"{name}.parquet"),
                    *more,
                ]
            )
        assert ended.value.code == 0
    assert f"1 image with another label: {tmp_path / '5.png'}" in capsys.readouterr().out


def test_options_that_make_other_splits_are_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(photos, "old.parquet")
    arguments = ["manifest", "build", "--folders", str(photos), "-o", str(photos.parent / "new.parquet")]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--update", str(photos.parent / "old.parquet"), "--imbalance-factor", "3"])
    assert ended.value.code == 1
    assert "--update keeps the splits of" in capsys.readouterr().err
