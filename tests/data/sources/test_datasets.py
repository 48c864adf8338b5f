"""Every source becomes the same manifest, and what is wrong with it is said in one go."""

import io
import json
import os
import shutil
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_lists import spread, write_lists
from command_line import run_command
from PIL import Image

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.bad_image_limits import bad_image_findings
from imbvlm.data.images.decoding import decode, decode_picture, fetch
from imbvlm.data.imbalance import imbalanced_counts, make_imbalanced
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.manifest_check import CheckReport, check_manifest
from imbvlm.data.manifest_summary import plot_counts, summary
from imbvlm.data.sources.benchmark_registry import BENCHMARKS
from imbvlm.data.sources.benchmarks import build_dataset
from imbvlm.data.sources.folders_and_lists import from_folders, from_lists
from imbvlm.data.sources.inaturalist import from_inaturalist
from imbvlm.data.sources.manifest_builder import read_class_names
from imbvlm.data.sources.table_files import from_table
from imbvlm.data.sources.webdataset import from_shards
from imbvlm.data.splits import carve_validation, hold_out_test_split
from imbvlm.sweep.report.class_plots import class_sizes

TREE = {
    "train/cat/a 1.png": (0, "train"),
    "train/cat/b é.png": (0, "train"),
    "train/dog/deep/c.png": (1, "train"),
    "valid/dog/d.png": (1, "val"),
    "test/owl/e.png": (2, "test"),
}
CLASSES = ["cat", "dog", "owl"]


def picture(number: int, size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (number * 40 % 256, 10, 20)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number, path in enumerate(TREE):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(picture(number))
    return tmp_path


def assert_is_tree(manifest: Manifest, ordered: bool = False) -> None:
    """The rows of TREE, each with the pixels of its number."""
    assert list(manifest.class_names) == CLASSES
    rows = manifest.table.to_pylist()
    colors = [int(decode(fetch(row["uri"], row["bytes"]))[0, 0, 0]) // 40 for row in rows]
    labels = dict(zip(colors, ((row["label"], row["split"]) for row in rows), strict=True))
    assert labels == dict(enumerate(TREE.values()))
    if ordered:
        assert colors == sorted(colors)


# ------------------------------------------------------------------------------------------------ sources


def test_folders_with_splits(tree: Path) -> None:
    (tree / "train" / "cat" / "notes.txt").write_text("no image")
    (tree / "train" / ".hidden.png").write_bytes(picture(9))
    manifest = from_folders(str(tree), "pets")
    assert_is_tree(manifest)
    assert manifest.notes == ("1 file left out by their suffix: .txt",)


def test_folders_without_splits_are_training(tree: Path) -> None:
    manifest = from_folders(str(tree / "train"), "pets")
    assert manifest.class_names == ("cat", "dog")
    assert manifest.splits == ("train",)
    assert len(manifest) == 3


def test_a_folder_without_images_is_a_class_without_images(tree: Path) -> None:
    (tree / "train" / "bat").mkdir()
    manifest = from_folders(str(tree), "pets")
    assert manifest.class_names == ("bat", "cat", "dog", "owl")
    assert manifest.class_stats().zero_train.tolist() == [0, 3]


def test_folders_beside_splits_are_left_out_and_named(tree: Path) -> None:
    for path in ("unlabeled/1.png", "unlabeled/deep/er/2.png", "Meta/0.png", "loose.png"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(picture(9))
    manifest = from_folders(str(tree), "pets")
    assert_is_tree(manifest)
    assert manifest.notes == (
        "3 images left out in folders next to the splits: Meta, unlabeled",
        "1 image left out that lie in no class's folder",
    )
    # Folders without images, too, are classes only in the splits.
    (tree / "docs" / "drafts").mkdir(parents=True)
    assert from_folders(str(tree), "pets").class_names == ("cat", "dog", "owl")


def test_a_folder_that_may_be_a_split_or_a_class_is_asked_about(tmp_path: Path) -> None:
    for path in ("train/steam/1.png", "train/2.png", "car/3.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(picture(9))
    with pytest.raises(ManifestError, match=r"train/ is named like a split .* next to it are car: .* --class-names"):
        from_folders(str(tmp_path), "vehicles")
    assert from_folders(str(tmp_path), "vehicles", class_names=["car", "train"]).labels.tolist() == [0, 1, 1]
    shutil.rmtree(tmp_path / "train" / "steam")
    assert from_folders(str(tmp_path), "vehicles").class_names == ("car", "train")


@pytest.mark.parametrize("above", ["", "train"])
def test_hidden_folders_are_no_classes(tree: Path, above: str) -> None:
    for name in ("__MACOSX", ".git/objects", ".cache/deep"):
        (tree / above / name).mkdir(parents=True)
    (tree / above / "__MACOSX" / "left.png").write_bytes(picture(9))
    assert_is_tree(from_folders(str(tree), "pets"))
    assert from_folders(str(tree / "train"), "pets").class_names == ("cat", "dog")


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_files_whose_names_are_not_utf8_are_left_out_and_named(tree: Path) -> None:
    for name in (b"caf\xe9.png", b"notes.\xe9"):
        (tree / "train" / "cat" / os.fsdecode(name)).write_bytes(picture(9))
    (tree / "train" / os.fsdecode(b"\xe9")).mkdir()
    manifest = from_folders(str(tree), "pets")
    assert_is_tree(manifest)
    assert manifest.notes == (
        f"2 files left out whose path is not UTF-8, such as {tree}/train/cat/caf\\xe9.png; rename what isn't",
    )
    manifest.write(str(tree / "pets.parquet"))
    bad = os.fsdecode(b"\xe9")
    with pytest.raises(ManifestError, match=r"no image lies.*\n.*5 files left out whose path is not UTF-8"):
        from_folders(str((tree / "train").rename(tree / bad)), "pets")


def test_folders_outside_the_class_list_are_named(tree: Path) -> None:
    with pytest.raises(ManifestError, match=r"not in the class list: 'owl'; did you mean 'owls'"):
        from_folders(str(tree), "pets", class_names=["cat", "dog", "owls"])


def test_a_folder_without_classes_says_what_it_should_look_like(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(ManifestError, match=r"CLASS/image\.jpg"):
        from_folders(str(tmp_path), "pets")


def test_a_folder_one_level_too_high_is_asked_about(tmp_path: Path) -> None:
    """It would be a single class, which every model predicts at 100 %."""
    for path in ("up/photos/cat/1.png", "up/photos/dog/deep/2.png", "split/train/photos/cat/3.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(picture(9))
    says = rf"one class, photos, and lie in folders of it \(cat, dog\).* did you mean {tmp_path}/up/photos\?"
    with pytest.raises(ManifestError, match=says):
        from_folders(str(tmp_path / "up"), "up")
    with pytest.raises(ManifestError, match="move them to where photos/ is"):
        from_folders(str(tmp_path / "split"), "split")
    assert from_folders(str(tmp_path / "up/photos"), "pets").class_names == ("cat", "dog")
    # What a class list names is a class.
    assert from_folders(str(tmp_path / "up"), "up", class_names=["photos", "other"]).labels.tolist() == [0, 0]


@pytest.mark.parametrize("separator", [" ", "\t"])
def test_list_files_with_ids_and_paths_with_spaces(tree: Path, separator: str) -> None:
    for split, official in (("train", "train"), ("val", "val"), ("test", "test")):
        lines = [f"{path}{separator}{label}" for path, (label, where) in TREE.items() if where == official]
        (tree / f"{split}.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    lists = {split: str(tree / f"{split}.txt") for split in ("train", "val", "test")}
    assert_is_tree(from_lists(lists, str(tree), "pets", class_names=CLASSES), ordered=True)


def test_bad_lines_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.png 0\nb.png\n\nc.png 1\nd.png\n")
    with pytest.raises(ManifestError) as caught:
        from_lists({"train": str(tmp_path / "train.txt")}, str(tmp_path), "pets")
    assert [finding.partition("train.txt:")[2] for finding in caught.value.findings] == [
        "2: 'b.png' is not a path and a label; write both",
        "5: 'd.png' is not a path and a label; write both",
    ]


@pytest.mark.parametrize("label", ["²", "--1", "1" * 30])
def test_digits_that_are_no_whole_number_are_named_with_their_line(tmp_path: Path, label: str) -> None:
    (tmp_path / "train.txt").write_text(f"a.png 0\nb.png {label}\nc.png 1\n", encoding="utf-8")
    lists = {"train": str(tmp_path / "train.txt")}
    with pytest.raises(ManifestError, match=f"train.txt:2: the label '{label}' is no class id"):
        from_lists(lists, str(tmp_path), "pets")
    assert from_lists(lists, str(tmp_path), "pets", class_names=["0", "1", label]).labels.tolist() == [0, 2, 1]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "train.txt").write_bytes(mark + b"a.png 0\ncaf\xe9.png 1\nb.png 1\n")
    with pytest.raises(ManifestError, match=r"train\.txt:2: 'caf\\xe9\.png 1' is not UTF-8; save"):
        from_lists({"train": str(tmp_path / "train.txt")}, str(tmp_path), "pets")
    with pytest.raises(ManifestError, match=r"train\.txt:2: 'caf\\xe9\.png 1' is not UTF-8; save"):
        read_class_names(str(tmp_path / "train.txt"))


def test_ids_with_gaps_are_mapped_and_the_map_is_kept(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x/a.png 7\nx/b.png 3\ny/c.png 12\nx/d.png 7\n")
    manifest = from_lists({"train": str(tmp_path / "train.txt")}, str(tmp_path), "pets")
    manifest.write(str(tmp_path / "pets.parquet"))
    manifest = Manifest.read(str(tmp_path / "pets.parquet"))
    assert manifest.labels.tolist() == [1, 0, 2, 1]
    assert manifest.label_map == {"3": 0, "7": 1, "12": 2}
    assert manifest.class_names == ("class 3", "class 7", "class 12")
    assert not manifest.named


def test_ids_outside_the_class_list_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 3\n")
    with pytest.raises(ManifestError, match="label outside 0 to 2, the class names: 3"):
        from_lists({"train": str(tmp_path / "train.txt")}, str(tmp_path), "pets", class_names=CLASSES)


@pytest.mark.parametrize("class_names", [None, ["cat", "dog", "owl"]])
def test_a_slip_among_class_ids_makes_no_names_of_them(tmp_path: Path, class_names: list[str] | None) -> None:
    (tmp_path / "train.txt").write_text("a.jpg 0\nb.jpg 1\nc.jpg 2\nd.jpg x1\ne.jpg\n")
    with pytest.raises(ManifestError) as caught:
        from_lists({"train": str(tmp_path / "train.txt")}, str(tmp_path), "pets", class_names=class_names)
    assert caught.value.findings[0].endswith("train.txt:5: 'e.jpg' is not a path and a label; write both")
    assert caught.value.findings[1].startswith("1 label is no class id where most are ids: 'x1'; fix them")
    (tmp_path / "rows.csv").write_text("path,label,split\na.jpg,cat,train\nb.jpg,dog,train\nc.jpg,5,train\n")
    with pytest.raises(ManifestError, match="1 label is a class id where most are names: '5'"):
        from_table([str(tmp_path / "rows.csv")], str(tmp_path), "pets", class_names=class_names)
    listed = from_table([str(tmp_path / "rows.csv")], str(tmp_path), "pets", class_names=["5", "cat", "dog"])
    assert listed.labels.tolist() == [1, 2, 0]


def test_bad_lines_and_labels_outside_are_said_together(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.jpg 0\nb.jpg\nc.jpg 7\n")
    with pytest.raises(ManifestError) as caught:
        from_lists({"train": str(tmp_path / "train.txt")}, str(tmp_path), "pets", class_names=["cat", "dog"])
    assert "'b.jpg' is not a path" in caught.value.findings[0]
    assert "with a label outside 0 to 1, the class names: 7" in caught.value.findings[1]


def listed_pets(
    folder: Path,
    labels: tuple[int, ...] = (0, 0, 1, 1, 2),
    folders: tuple[str, ...] = ("cat", "cat", "dog", "dog/deep", "owl"),
) -> dict[str, str]:
    """A list of images in folders that are called as classes."""
    lines = [
        f"images/{where}/{number}.png {label}"
        for number, (where, label) in enumerate(zip(folders, labels, strict=True))
    ]
    (folder / "train.txt").write_text("\n".join(lines))
    return {"train": str(folder / "train.txt")}


WRONG_LISTS = {
    "order": (["dog", "cat", "owl"], r"0 is 'dog' in the class list, and its images lie in 'cat'; 1 is 'cat' .* 'dog'"),
    "heading": (["name", "cat", "dog", "owl"], r"0 is 'name' in the class list, and its images lie in 'cat'"),
    "twice": (["cat", "dog", "owl", "cat"], r"a name twice: 'cat' is 0 and 3, and 3 has no image"),
    "twice within": (["cat", "dog", "dog"], r"2 is 'dog' in the class list, and its images lie in 'owl'"),
    "misspelt": (["cat", "dgo", "owl"], r"1 is 'dgo' in the class list, and its images lie in 'dog'"),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_a_class_list_that_its_folders_contradict_is_refused(tmp_path: Path, case: str) -> None:
    """Every name would stand for another class, and nothing that trains or scores would notice."""
    names, says = WRONG_LISTS[case]
    lists = listed_pets(tmp_path)
    with pytest.raises(ManifestError, match=says):
        from_lists(lists, str(tmp_path), "pets", class_names=names)
    rows = [line.rpartition(" ")[::2] for line in (tmp_path / "train.txt").read_text().splitlines()]
    (tmp_path / "rows.csv").write_text("\n".join(["path,label", *map(",".join, rows)]))
    with pytest.raises(ManifestError, match=says):
        from_table([str(tmp_path / "rows.csv")], str(tmp_path), "pets", class_names=names)
    # A manifest that another version or another hand has made, as `run`, `train` and `check` read it.
    good = from_lists(lists, str(tmp_path), "pets", class_names=CLASSES)
    metadata = {"imbvlm": json.dumps({"class_names": names})}
    pq.write_table(good.table.replace_schema_metadata(metadata), tmp_path / "pets.parquet")
    with pytest.raises(ManifestError, match=says):
        Manifest.read(str(tmp_path / "pets.parquet"))


@pytest.mark.parametrize(
    "names",
    [
        CLASSES,
        [*CLASSES, "newt", "yak"],  # Classes without images, in their order.
        ["Cat", "dog (animal)", "owl"],
        ["felis catus", "canis lupus", "strix"],  # Folders are called otherwise, as by WordNet's ids.
    ],
)
def test_a_class_list_that_folders_do_not_contradict_is_taken(tmp_path: Path, names: list[str]) -> None:
    lists = listed_pets(tmp_path)
    made = from_lists(lists, str(tmp_path), "pets", class_names=names)
    made.write(str(tmp_path / "pets.parquet"))
    assert list(Manifest.read(str(tmp_path / "pets.parquet")).class_names) == names
    assert not made.notes


def test_folders_that_hold_several_classes_say_nothing_of_their_names(tmp_path: Path) -> None:
    """Labels that somebody has corrected, and the folders of cameras."""
    lists = listed_pets(tmp_path, (0, 1, 1, 1, 2, 0), ("cat", "cat", "dog", "cat", "owl", "dog"))
    assert from_lists(lists, str(tmp_path), "pets", class_names=["cat", "dog", "owl"]).class_names == tuple(CLASSES)
    assert from_lists(lists, str(tmp_path), "pets", class_names=["dog", "cat", "owl"]).class_names[0] == "dog"


def test_labels_that_are_names_may_differ_from_their_folders(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("path,label\nx/cat/1.png,cat\nx/dog/2.png,dog\nx/lion/3.png,wild\n")
    made = from_table([str(tmp_path / "rows.csv")], str(tmp_path), "pets")
    made.write(str(tmp_path / "pets.parquet"))
    assert Manifest.read(str(tmp_path / "pets.parquet")).class_names == ("cat", "dog", "wild")


def test_a_list_longer_than_the_ids_needs_folders_that_show_its_order(tmp_path: Path) -> None:
    lists = listed_pets(tmp_path, folders=("all",) * 5)
    says = r"has 4 names, and the largest class id is 2: .* before 'owl'; leave out names .* or label images by name"
    with pytest.raises(ManifestError, match=says):
        from_lists(lists, str(tmp_path), "pets", class_names=["name", *CLASSES])
    assert len(from_lists(lists, str(tmp_path), "pets", class_names=CLASSES)) == 5
    # The hub's own names are those of all of its files.
    assert from_table(hub_files(tmp_path)[:1], "", "pets").class_names == tuple(CLASSES)


def test_a_name_twice_in_a_list_for_folders_is_refused(tree: Path) -> None:
    with pytest.raises(ManifestError, match="the class list has a name twice: 'dog'; list each class once"):
        from_folders(str(tree), "pets", class_names=["cat", "dog", "dog", "owl"])


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes by name")
def test_links_to_nothing_pipes_and_loops_are_named(tree: Path) -> None:
    images, others = (
        ("train/cat/gone.png", "train/cat/itself.png", "train/dog/pipe.png"),
        ("loop", "train/cat/up", "train/newt"),
    )
    for path, target in zip(
        [*images[:2], *others], ["nowhere.png", "itself.png", ".", "..", "/nowhere/newt"], strict=True
    ):
        (tree / path).symlink_to(target)
    os.mkfifo(tree / images[2])
    manifest = from_folders(str(tree), "pets")
    what = "a broken link, a link to a folder above it, a pipe or a device"
    assert manifest.notes == (
        f"3 images that can't be read, each {what}: {', '.join(images)}",
        f"3 names left out, each {what}: {', '.join(others)}",
    )
    assert list(manifest.class_names) == CLASSES
    assert len(manifest) == len(TREE) + 3
    (missing,) = [finding for finding in check_manifest(manifest).findings if "missing" in finding.message]
    assert missing.examples == tuple(str(tree / path) for path in images)
    (tree / "rows.csv").symlink_to("nowhere.csv")
    with pytest.raises(ImbvlmError, match=r"1 name that can't be read, .*: rows\.csv\. Remove or repair"):
        run("build", "--table", tree, "-o", "x.parquet")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("as_names", [True, False])
def test_tables(tree: Path, suffix: str, as_names: bool) -> None:
    rows = [
        {"image_path": path, "category": CLASSES[label] if as_names else label, "split": split}
        for path, (label, split) in TREE.items()
    ]
    path = tree / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        mark = "," if suffix == "csv" else "\t"
        lines = [mark.join(rows[0])] + [mark.join(str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
    names = None if as_names else CLASSES
    assert_is_tree(from_table([str(path)], str(tree), "pets", class_names=names), ordered=True)


def test_tables_with_columns_of_other_names(tree: Path) -> None:
    rows = [{"where": path, "what": CLASSES[label], "fold": split} for path, (label, split) in TREE.items()]
    (tree / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    columns = {"uri": "where", "label": "what", "split": "fold"}
    assert_is_tree(from_table([str(tree / "rows.jsonl")], str(tree), "pets", columns=columns))
    with pytest.raises(ManifestError) as caught:
        from_table([str(tree / "rows.jsonl")], str(tree), "pets", columns={"uri": "wher"})
    assert "there is no column 'wher' for uri; did you mean 'where'?" in caught.value.findings[0]
    assert "no column is named like a label" in caught.value.findings[1]


def hub_files(folder: Path) -> list[Any]:
    """Parquet as the Hugging Face hub serves it: a struct of bytes and path, names in the metadata, splits by file."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
    paths = []
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        chosen = [(number, label) for number, (label, where) in enumerate(TREE.values()) if where == split]
        images = pa.array([{"bytes": picture(number), "path": f"{number}.png"} for number, _ in chosen], kind)
        table = pa.table({"image": images, "label": pa.array([label for _, label in chosen], pa.int64())})
        paths.append(str(folder / f"{name}-00000-of-00001.parquet"))
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), paths[-1])
    return paths


def test_parquet_of_the_hub_with_embedded_images(tmp_path: Path) -> None:
    assert_is_tree(from_table(hub_files(tmp_path), "", "pets"), ordered=True)


def test_many_embedded_images_go_to_pack_files_that_move_with_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imbvlm.data.sources.table_files.MAX_EMBEDDED_BYTES", 150)
    (tmp_path / "one").mkdir()
    made = from_table(hub_files(tmp_path), "", "pets", pack_prefix=str(tmp_path / "one" / "pets.images"))
    assert made.table.column("bytes").null_count == len(TREE)
    made.write(str(tmp_path / "one" / "pets.parquet"))
    (tmp_path / "one").rename(tmp_path / "two")
    manifest = Manifest.read(str(tmp_path / "two" / "pets.parquet"))
    assert_is_tree(manifest, ordered=True)
    assert check_manifest(manifest).ok
    before = manifest.row_fingerprint("train")
    with open(tmp_path / "two" / "pets.images-00000.pack", "ab") as stream:
        stream.write(b"more")
    assert manifest.row_fingerprint("train") != before


def test_tar_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    paths = []
    for split in ("train", "val", "test"):
        paths.append(str(tmp_path / f"pets-{split}-0000.tar"))
        with tarfile.open(paths[-1], "w") as archive:
            for number, (label, where) in enumerate(TREE.values()):
                if where == split:
                    members = {"png": picture(number), "json": json.dumps({"label": CLASSES[label]}).encode()}
                    for extension, content in members.items():
                        add_member(archive, f"some folder/{number:05d}.{extension}", content)
    manifest = from_shards(paths, "pets")
    assert_is_tree(manifest, ordered=True)
    assert manifest.notes == ()


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_what_a_shard_loses_is_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, label in (("img.1", b"0"), ("img.2", b"0"), ("a", b"0"), ("a", b"1"), ("b", b"\xef\xbb\xbf0")):
            add_member(archive, f"x/{key}.png", picture(int(label[-1:])))
            add_member(archive, f"x/{key}.cls", label)
            add_member(archive, f"x/._{key}.png", b"of macOS")
        add_member(archive, "x/a.txt", b"a caption")
        add_member(archive, "README", b"of all")
    manifest = from_shards([str(tmp_path / "a.tar")], "pets")
    assert manifest.labels.tolist() == [1, 0]
    assert decode(fetch(manifest.table.column("uri")[0].as_py(), None))[0, 0, 0] == 40
    assert manifest.notes == (
        "2 images left out, such as x/img.1.png: in WebDataset a name's extension begins at its "
        "first dot; rename them without a dot in the key",
        "4 members left out by their extension: no extension, .1.cls, .2.cls, .txt",
        "1 image left out for a later one of the same key in its shard, such as x/a",
    )
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        add_member(archive, "img.1.png", picture(0))
    with pytest.raises(
        ManifestError,
        match=r"no image is in it, such as KEY\.jpg; name shards with images\.\n  1 image left out.* img\.1\.png",
    ):
        from_shards([str(tmp_path / "b.tar")], "pets")


def test_links_in_a_shard_and_labels_without_an_image_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_member(archive, "a.png", picture(0))
        for key in "abc":
            add_member(archive, f"{key}.cls", b"0")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    first, second = from_shards([str(tmp_path / "a.tar")], "pets").notes
    assert first.startswith("1 member left out, each a link, a pipe or a device, such as b.png: tar writes a file")
    assert second == "2 labels left out without an image of the same key, such as b"


def test_compressed_or_unlabeled_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_member(archive, "x.png", b"abc")
    with pytest.raises(ManifestError, match=r"neither a \.cls nor a \.json"):
        from_shards([str(tmp_path / "a.tar")], "pets")
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ManifestError, match="uncompressed tar"):
        from_shards([str(tmp_path / "b.tar")], "pets")
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        add_member(archive, "x.png", b"abc")
        add_member(archive, "x.cls", b"caf\xe9")
    with pytest.raises(ManifestError, match=r"c\.tar:\n  x\.cls has 'caf\\xe9', which is not UTF-8; write labels"):
        from_shards([str(tmp_path / "c.tar")], "pets")
    # Other text beside a label may be anything, and a superscript is a name.
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        for name, content in (("x.png", b"abc"), ("x.cls", "²".encode()), ("x.json", b"caf\xe9")):
            add_member(archive, name, content)
    assert from_shards([str(tmp_path / "d.tar")], "pets").class_names == ("²",)


CSV_FAULTS = {
    b'path,label\na.jpg,cat\nb.jpg,"dog\nc.jpg,dog\n': "begins in line 3 .*unexpected end of data.*must end with one",
    b'path,label,caption\na.jpg,cat,"two\nb.jpg,dog,x\nc.jpg,owl,y\n': "begins in line 2 .*unexpected end of data",
    b'path,label\na.jpg,"cat\nb.jpg,dog\nc.jpg,"owl\n': "begins in line 2 .*expected after",
    b'path,label\na.jpg,"cat\nb.jpg,dog\nc.jpg,owl"\n': r"1 cell of 'label' with a line break: .*is a quote not closed",
}


@pytest.mark.parametrize("content", CSV_FAULTS)
def test_a_quote_that_takes_rows_is_said(tmp_path: Path, content: Any) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=CSV_FAULTS[content]):
        from_table([str(tmp_path / "rows.csv")], "", "pets")


def test_quotes_and_line_ends_that_may_be_are_read(tmp_path: Path) -> None:
    rows = b'path,label,caption\na.jpg,5" pipe,"two\nlines, ""of"" them"\nb.jpg,dog,"x"\n'
    for content in (rows, rows.replace(b"\n", b"\r\n"), rows.replace(b"\n", b"\r")):
        (tmp_path / "rows.csv").write_bytes(content)
        manifest = from_table([str(tmp_path / "rows.csv")], "/", "pets")
        assert manifest.class_names == ('5" pipe', "dog")
        assert manifest.table.column("uri").to_pylist() == ["/a.jpg", "/b.jpg"]


@pytest.mark.parametrize("before", [b"", b"]" * 200_000, b'{"path": "]]]", "label": "\\"[["}\n'])
@pytest.mark.parametrize("line_end", [b"", b"\n"])
def test_json_lines_nested_too_deep_are_refused(tmp_path: Path, before: bytes, line_end: bytes) -> None:
    """pyarrow's parser would end the process."""
    deep = (b"[" + line_end) * 100_000 + b"]" * 100_000
    (tmp_path / "rows.jsonl").write_bytes(before + b'{"path": "a.jpg", "label": ' + deep + b"}\n")
    with pytest.raises(ManifestError, match="nested more than 100 levels deep"):
        from_table([str(tmp_path / "rows.jsonl")], "", "pets")


def test_brackets_within_texts_are_no_levels(tmp_path: Path) -> None:
    name = "[" * 500 + '"{'
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"path": "a", "label": x}) + "\n" for x in (name, "b")))
    assert from_table([str(tmp_path / "rows.jsonl")], "", "pets").class_names == (name, "b")


@pytest.mark.parametrize(
    "metadata",
    ["nope", "[]", '{"info": 3}', '{"info": {"features": {"label": 3}}}', "[" * 200_000, b"\xff",
     '{"info": {"features": {"label": {"names": [1, 2]}}}}', '{"info": {"features": {"label": {"names": "ab"}}}}'],
)  # fmt: skip
def test_metadata_that_is_not_the_hubs_is_said_and_not_read_beside_a_class_list(
    tmp_path: Path, metadata: str | bytes
) -> None:
    table = pa.table({"path": ["a", "b"], "label": [0, 1]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ManifestError, match=r"its metadata 'huggingface.* can't be read: .* --class-names"):
        from_table([str(tmp_path / "rows.parquet")], "", "pets")
    assert len(from_table([str(tmp_path / "rows.parquet")], "", "pets", class_names=["x", "y"])) == 2


def test_a_shard_cut_within_a_header_is_refused_and_one_without_its_end_is_noted(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for key in "ab":
            add_member(archive, f"{key}.cls", b"0")
            add_member(archive, f"{key}.png", picture(0))
    whole = stream.getvalue()
    path = tmp_path / "a.tar"
    # Each member has 512 bytes of header and 512 of content.
    path.write_bytes(whole[: 2048 + 100])
    with pytest.raises(ManifestError, match=r"truncated header at byte 2,048, .* it may be cut short"):
        from_shards([str(path)], "pets")
    path.write_bytes(whole[:2048] + b"x" * 512 + whole[2048 + 512 :])
    with pytest.raises(ManifestError, match=r"bad checksum at byte 2,048|invalid header at byte 2,048"):
        from_shards([str(path)], "pets")
    path.write_bytes(whole[:2048])
    assert from_shards([str(path)], "pets").notes == (f"1 shard without tar's end mark, and perhaps cut short: {path}",)
    path.write_bytes(whole)
    assert from_shards([str(path)], "pets").notes == ()


def test_photos_in_heic_are_rows_and_name_the_extra_that_reads_them(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "train/cat/photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    monkeypatch.setattr("imbvlm.data.sources.manifest_builder.reads_heif", lambda: False)
    monkeypatch.setattr("imbvlm.data.images.decoding.reads_heif", lambda: False)
    manifest = from_folders(str(tree), "pets")
    advice = "HEIC is read with the extra heif: pip install 'imbvlm[heif]'"
    assert manifest.notes == (f"1 image in HEIC, such as {tree}/train/cat/photo.HEIC: {advice}",)
    assert f"photo.HEIC ({advice}; train; cat" in str(check_manifest(manifest, decode_all=True))


# ------------------------------------------------------------------------------------------------ iNaturalist

TAXA = [
    {
        "id": 0,
        "name": "Felis catus",
        "common_name": "Cat",
        "genus": "Felis",
        "family": "Felidae",
        "kingdom": "Animalia",
    },
    {"id": 1, "name": "Felis chaus", "common_name": "", "genus": "Felis", "family": "Felidae", "kingdom": "Animalia"},
    {"id": 2, "name": "Bellis perennis", "genus": "Bellis", "family": "Asteraceae", "kingdom": "Plantae"},
]


def annotations(path: Path, categories: list[dict[str, Any]], labels: list[int]) -> str:
    images = [{"id": 100 + n, "file_name": f"train_val/x/{n}.jpg"} for n in range(len(labels))]
    notes = [{"id": n, "image_id": 100 + n, "category_id": label} for n, label in enumerate(labels)]
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": categories}))
    return str(path)


def test_inaturalist_names_come_from_categories_and_are_lacking_without(tmp_path: Path) -> None:
    hidden = [{"id": n, "name": str(n), "supercategory": "Life"} for n in range(3)]
    files = {
        "train": annotations(tmp_path / "train2018.json", hidden, [0, 0, 2, 1]),
        "test": annotations(tmp_path / "val2018.json", hidden, [1]),
    }
    bare = from_inaturalist(files, str(tmp_path), "inat")
    assert not bare.named
    assert "text methods are rejected" in str(check_manifest(bare))
    (tmp_path / "categories.json").write_text(json.dumps(TAXA))
    manifest = from_inaturalist(files, str(tmp_path), "inat", categories=str(tmp_path / "categories.json"))
    assert manifest.named
    assert manifest.class_names == ("Felis catus", "Felis chaus", "Bellis perennis")
    assert manifest.labels.tolist() == [0, 0, 2, 1, 1]
    assert manifest.splits == ("train", "test")
    assert manifest.table.column("uri")[2].as_py() == str(tmp_path / "train_val" / "x" / "2.jpg")


def test_inaturalist_common_names_and_higher_ranks(tmp_path: Path) -> None:
    files = {"train": annotations(tmp_path / "train.json", TAXA, [0, 1, 2])}
    assert from_inaturalist(files, "", "inat", names="common").class_names == ("Cat", "Felis chaus", "Bellis perennis")
    genus = from_inaturalist(files, "", "inat", rank="genus")
    assert genus.class_names == ("Bellis", "Felis")
    assert genus.labels.tolist() == [1, 1, 0]
    assert genus.label_map == {"0": 1, "1": 1, "2": 0}
    with pytest.raises(ManifestError, match="3 categories have no order"):
        from_inaturalist(files, "", "inat", rank="order")


IMAGES, NOTES = [{"id": 1, "file_name": "1.jpg"}], [{"image_id": 1, "category_id": 0}]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], "it should be an object with images and annotations"),
        (None, "it should be an object"),
        ({"images": IMAGES, "annotations": NOTES}, "no file has categories"),
        ({"categories": 7}, "'categories' should be a list"),
        ({"categories": [7]}, r"categories\[0\].id should be a whole number, and is the entry 7"),
        ({"categories": [{"id": 1.5}]}, r"categories\[0\].id should be a whole number, and is 1.5"),
        ({"categories": [{"id": 0}, {"id": "0"}]}, "1 category id given twice: 0"),
        ({"categories": TAXA}, "'images' should be a list"),
        ({"categories": TAXA, "images": [{"id": 1}]}, r"images\[0\].file_name should be a path in UTF-8, and is None"),
        ({"categories": TAXA, "images": [{"id": [], "file_name": "x"}]}, r"images\[0\].id should be a number or"),
        ({"categories": TAXA, "images": [{"id": 1, "file_name": "\ud800"}]}, "file_name should be a path in UTF-8"),
        ({"categories": TAXA, "images": IMAGES, "annotations": {}}, "'annotations' should be a list"),
        ({"categories": TAXA, "images": IMAGES, "annotations": [{"image_id": 1}]}, r"annotations\[0\].category_id"),
        ({"categories": TAXA, "images": IMAGES}, "1 images have no annotation"),
    ],
)
def test_inaturalist_of_another_shape_is_named(tmp_path: Path, content: Any, match: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=match):
        from_inaturalist({"train": str(path)}, "", "inat")


def test_inaturalist_nested_without_end_or_with_annotations_of_no_image(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ManifestError, match="nested too deeply"):
        from_inaturalist({"train": str(path)}, "", "inat")
    content = {"categories": TAXA, "images": IMAGES, "annotations": [*NOTES, {"image_id": 9, "category_id": 1}]}
    path.write_text(json.dumps(content))
    assert "1 annotation of" in str(from_inaturalist({"train": str(path)}, "", "inat").notes)


# ------------------------------------------------------------------------------------------------ benchmarks


def test_imagenet_lt_by_its_official_lists(tmp_path: Path) -> None:
    sizes = BENCHMARKS["imagenet_lt"].sizes
    counts = spread(sizes["train"], 5, 1280, 1000)
    write_lists(tmp_path, "ImageNet_LT", sizes, counts, lambda split, label: f"{split}/n{label:08d}")
    manifest = build_dataset("imagenet_lt", str(tmp_path))
    assert manifest.class_names[0] == "tench"
    assert "missile" in manifest.warnings[0]
    assert "sunglasses" in manifest.warnings[0]
    assert {split: len(manifest.rows_of(split)) for split in sizes} == dict(sizes)
    assert any("image-net.org" in note for note in manifest.notes)


def test_places_lt_takes_its_names_with_spaces_from_its_folders(tmp_path: Path) -> None:
    sizes = BENCHMARKS["places_lt"].sizes
    counts = spread(sizes["train"], 5, 4980, 365)
    write_lists(tmp_path, "Places_LT", sizes, counts, lambda split, label: f"train/airport_terminal-{label:03d}")
    manifest = build_dataset("places_lt", str(tmp_path))
    assert manifest.class_names[7] == "airport terminal 007"
    assert manifest.named


def test_wrong_sizes_are_said_with_the_right_ones(tmp_path: Path) -> None:
    sizes = {"train": 62_500, "val": 7_300, "test": 36_500}
    counts = spread(62_400, 6, 4980, 365)
    write_lists(tmp_path, "Places_LT", sizes, counts, lambda split, label: f"train/{label}")
    with pytest.raises(ManifestError) as caught:
        build_dataset("places_lt", str(tmp_path))
    assert caught.value.findings == (
        "train has 62,400 images, and the official list has 62,500; use the official lists as they are",
        "classes have 6 to 4,980 training images, and the official list has 5 to 4,980; "
        "use the official lists as they are",
    )


@pytest.mark.parametrize("name", sorted(name for name, benchmark in BENCHMARKS.items() if benchmark.files))
def test_missing_files_are_all_named_with_where_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError) as caught:
        build_dataset(name, str(tmp_path))
    text = str(caught.value)
    assert all(file in text for file in BENCHMARKS[name].files)
    assert "http" in text


def test_the_embedded_benchmark_needs_no_files() -> None:
    assert len(build_dataset("fashion_mnist_lt", "")) == 4980


# ------------------------------------------------------------------------------------------------ tails


def balanced(num_classes: int = 10, per_class: int = 200) -> Manifest:
    labels = np.repeat(np.arange(num_classes), per_class)
    uris = [f"s3://bucket/{row}.jpg" for row in range(len(labels) + num_classes)]
    table = pa.table(
        {
            "uri": uris,
            "label": np.concatenate([labels, np.arange(num_classes)]),
            "split": ["train"] * len(labels) + ["test"] * num_classes,
        }
    )
    return Manifest.build(table, [f"c{label}" for label in range(num_classes)], "balanced")


@pytest.mark.parametrize("shape", ["exponential", "pareto"])
def test_a_tail_has_the_imbalance_factor_and_leaves_other_splits(shape: str) -> None:
    made = balanced()
    manifest = make_imbalanced(made, 50, shape=shape, seed=1)
    stats = manifest.class_stats()
    assert stats.imbalance_factor == 50
    assert sorted(stats.counts)[::-1] == imbalanced_counts(10, 200, 50, shape).tolist()
    assert stats.counts.tolist() == stats.split_counts.tolist()
    assert len(manifest.rows_of("test")) == 10
    assert manifest.table.equals(make_imbalanced(made, 50, shape=shape, seed=1).table)
    assert not manifest.table.equals(make_imbalanced(made, 50, shape=shape, seed=2).table)


def test_the_user_says_which_classes_are_the_tail() -> None:
    order = [f"c{label}" for label in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    stats = make_imbalanced(balanced(), 100, class_order=order).class_stats()
    assert np.argsort(-stats.counts).tolist() == [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    with pytest.raises(ManifestError, match=r"'c10' is no class"):
        make_imbalanced(balanced(), 100, class_order=[*order[:-1], "c10"])


def test_a_tail_that_cannot_be_is_refused() -> None:
    with pytest.raises(ImbvlmError, match="so give 400 at most"):
        make_imbalanced(balanced(), 1000)
    with pytest.raises(ImbvlmError, match=r"must be 1 or more, got 0\.5"):
        make_imbalanced(balanced(), 0.5)
    with pytest.raises(ManifestError, match="training images, and its rank in the tail needs"):
        make_imbalanced(Manifest.read("embedded:fashion_mnist_lt"), 2)


# ------------------------------------------------------------------------------------------------ show and check


def test_the_summary_names_counts_groups_splits_and_draws_the_curve() -> None:
    text = summary(Manifest.read("embedded:emoji_lt"))
    for part in (
        "classes           68",
        "2,306 images",
        "25.7 (154 to 6",
        "many_shot         3 classes",
        "person role (154)",
    ):
        assert part in text
    assert "none; 5 folds of the training images score trials, on 2,277 images" in text
    few = Manifest.build(
        pa.table({"bytes": [bytes([row]) for row in range(10)], "label": [0] * 9 + [1], "split": ["train"] * 10}),
        ["many", "rare"],
        "two",
    )
    assert summary(few).splitlines()[3].endswith("on 9 images, 1 class without any")
    assert "█" in text


@pytest.mark.parametrize("counts", [[5], [1000, 10], list(range(1, 1001)), [0, 0, 7]])
def test_plots_hold_any_counts(counts: list[int]) -> None:
    lines = plot_counts(np.array(counts))
    assert len(lines) == 11
    assert max(len(line) for line in lines) <= 84
    root = ElementTree.fromstring(class_sizes(np.array(counts), "a <name>").svg(alone=True))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <name>" in texts
    assert f"classes from head to tail ({len(counts):,}); training images, log scale" in texts


def test_the_check_names_everything_at_once(tree: Path) -> None:
    (tree / "train/cat/twin.png").write_bytes((tree / "test/owl/e.png").read_bytes())
    (tree / "train/dog/page.png").write_text("<html>not found</html>")
    (tree / "train/dog/deep/c.png").write_bytes(b"")
    made = from_folders(str(tree), "pets")
    (tree / "valid/dog/d.png").unlink()
    report = check_manifest(made, decode_all=True, truncated=lambda names: [name for name in names if name == "owl"])
    text = str(report)
    assert not report.ok
    for part in (
        "error    1 file of 7 missing",
        "valid/dog/d.png",
        "error    1 image with the same content in two splits",
        "error    1 class would lose every training image: dog",
        "warning  3 images of 7 can't be decoded",
        "page.png (not an image (starts with <html>not foun...); train; dog, few_shot)",
        "warning  1 name too long for the text tower's context: owl",
        "warning  1 class without training images (zero_train): owl",
        "warning  2 classes absent from the validation split: cat, owl",
        "warning  2 classes absent from the test split and so from every average over it: cat, dog",
        "verdict  not usable as it is: 3 errors, 8 warnings",
    ):
        assert part in text


def test_a_check_decodes_no_more_at_once_than_one_image_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight photos of 170 megapixels took 10 GB."""
    for number in range(8):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[number % 2] / f"{number}.png").write_bytes(picture(number, (300, 100 + number)))
    (tmp_path / "a" / "large.png").write_bytes(picture(1, (300, 400)))
    at_once, most, lock = [0], [0], threading.Lock()

    def decode_and_count(data: bytes) -> Image.Image:
        image = decode_picture(data)
        with lock:
            at_once[0] += image.width * image.height
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= image.width * image.height
        return image

    monkeypatch.setattr("imbvlm.data.manifest_check.decode_picture", decode_and_count)
    monkeypatch.setattr("imbvlm.data.images.decode_budget.MAX_PIXELS", 70_000)
    report = check_manifest(from_folders(str(tmp_path), "made"), decode_all=True)
    assert "can't be decoded" not in str(report)
    # The large one, which alone is above the limit.
    assert most[0] == 120_000
    (tmp_path / "a" / "large.png").unlink()
    most[0] = 0
    check_manifest(from_folders(str(tmp_path), "made"), decode_all=True)
    assert 60_000 < most[0] <= 70_000


def test_a_share_of_each_class_is_kept_apart_as_the_test_split(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(5), [40, 11, 3, 2, 1])
    # Three copies of one image, which stay together.
    content = [b"copy" if row < 3 else f"{row}".encode() for row in range(len(labels))]
    made = Manifest.build(
        pa.table({"bytes": content, "label": labels, "split": ["train"] * len(labels)}), list("abcde"), "made"
    )
    manifest = hold_out_test_split(made, 0.2, seed=1)
    assert np.bincount(manifest.labels[manifest.rows_of("test")], minlength=5).tolist() == [8, 2, 1, 1, 0]
    assert manifest.class_stats().split_counts.tolist() == [32, 9, 2, 1, 1]
    assert len(set(np.array([row in manifest.rows_of("test") for row in range(3)]))) == 1
    assert not manifest.table.equals(hold_out_test_split(made, 0.2, seed=2).table)
    manifest.write(str(tmp_path / "made.parquet"))
    read = Manifest.read(str(tmp_path / "made.parquet"))
    assert read.rows_of("test").tolist() == manifest.rows_of("test").tolist()
    assert "20 % of each class's images" in read.notes[0]
    with pytest.raises(ManifestError, match="it has a test split of 12 images"):
        hold_out_test_split(manifest, 0.2)
    with pytest.raises(ImbvlmError, match=r"between 0 and 1, got 20"):
        hold_out_test_split(made, 20)


def test_a_missing_test_split_is_a_warning_that_says_how_to_give_one(tree: Path) -> None:
    shutil.rmtree(tree / "test")
    report = check_manifest(from_folders(str(tree), "pets"))
    (finding,) = [finding for finding in report.findings if "no test split" in finding.message]
    assert finding.severity == "warning"
    assert "folder test/ next to train/" in finding.message
    (tree / "test" / "owl").mkdir(parents=True)
    picture = next((tree / "train").rglob("*.png"))
    (tree / "test" / "owl" / "x.png").write_bytes(picture.read_bytes())
    assert "no test split" not in str(check_manifest(from_folders(str(tree), "pets")))


def test_data_that_no_sweep_could_use_is_not_usable() -> None:
    def checked(counts: list[int], splits: tuple[str, ...] = ("train",)) -> CheckReport:
        labels = np.tile(np.repeat(np.arange(len(counts)), counts), len(splits))
        each = [split for split in splits for _ in range(sum(counts))]
        table = pa.table({"bytes": [f"{n}".encode() for n in range(len(labels))], "label": labels, "split": each})
        return check_manifest(Manifest.build(table, [f"c{n}" for n in range(len(counts))], "made"))

    few = checked([1, 1, 1])
    assert not few.ok
    assert "error    no class has a validation image" in str(few)
    assert "absent from validation" not in str(few)
    assert checked([1, 1, 1], ("train", "val")).ok
    single = checked([90, 0])
    assert not single.ok
    assert "error    two or more classes with training images are needed" in str(single)
    assert "and there is 1: c0" in str(single)
    assert checked([90, 5]).ok


def test_a_good_manifest_is_good() -> None:
    report = check_manifest(Manifest.read("embedded:fashion_mnist_lt"), decode_all=True)
    assert report.verdict == "good", str(report)


# ------------------------------------------------------------------------------------------------ commands


def run(which: str, *arguments: object) -> int:
    return run_command("manifest", which, *arguments)


def test_build_show_and_check_by_command(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    assert run("build", "--folders", ".", "--name", "pets", "-o", "out/pets.parquet") == 0
    assert "imbvlm manifest check out/pets.parquet" in capsys.readouterr().out
    assert_is_tree(Manifest.read("out/pets.parquet"))
    assert run("show", "out/pets.parquet", "--plot", "curve.svg") == 0
    assert "imbalance factor  2.0 (2 to 1" in capsys.readouterr().out
    assert "<svg" in (tree / "curve.svg").read_text()
    assert run("check", "out/pets.parquet") == 0
    assert "verdict  usable" in capsys.readouterr().out
    for path in (tree / "train").rglob("*.png"):
        path.unlink()
    assert run("check", "out/pets.parquet", "-o", "findings.csv") == 1
    assert "error    3 files of 5 missing" in capsys.readouterr().out
    rows = [line for line in (tree / "findings.csv").read_text().splitlines() if line.startswith("error,3 files of 5")]
    assert [row.rpartition("/")[2] for row in rows] == ["a 1.png", "b é.png", "c.png"]


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_names_that_are_not_utf8_are_said_where_they_are_named(tree: Path) -> None:
    bad = os.fsdecode(b"caf\xe9")
    sources = [("--table", f"{bad}.csv"), ("--list", f"train={bad}.txt"), ("--webdataset", f"{bad}.tar")]
    for words in (*sources, ("--folders", tree, "--class-names", bad), ("--folders", tree, "-o", f"{bad}.parquet")):
        with pytest.raises(ImbvlmError, match=r"caf\\xe9.* has a name that isn't UTF-8; rename it"):
            run("build", "-o", "x.parquet", *words)
    with pytest.raises(ImbvlmError, match=r"its name 'caf\\udce9' is not UTF-8"):
        run("build", "-o", "x.parquet", "--folders", tree, "--name", bad)
    for which in ("show", "check"):
        with pytest.raises(ImbvlmError, match=r"caf\\xe9\.parquet has a name"):
            run(which, f"{bad}.parquet")


@pytest.mark.parametrize("words", [("--test-share", "0.5"), ("--imbalance-factor", "2")])
def test_a_seed_below_zero_is_refused(tree: Path, words: tuple[str, str]) -> None:
    with pytest.raises(ImbvlmError, match="a seed must be a whole number from 0 on, got -1"):
        run("build", "--folders", tree / "train", *words, "--seed", "-1", "-o", tree / "x.parquet")


def test_build_options_that_cannot_be_are_said(tree: Path) -> None:
    with pytest.raises(ImbvlmError, match=r"--list must be train=.* or test=.*, got 'a.txt'"):
        run("build", "--list", "a.txt", "-o", "x.parquet")
    with pytest.raises(ImbvlmError, match="has no"):
        run("build", "--webdataset", tree, "-o", "x.parquet")
    for words in (("--class-order", "nope"), ("--tail-shape", "pareto")):
        with pytest.raises(ImbvlmError, match=f"{words[0]} needs --imbalance-factor"):
            run("build", "--folders", tree, *words, "-o", "x.parquet")


# ------------------------------------------------------------------------------------------------ limits of loss


def limits(bad: list[int], max_images: int | None = None, max_share: float = 0.5, split: str = "train") -> list[str]:
    bad = dict.fromkeys(bad, "truncated")
    return bad_image_findings(balanced(4, 5), split, bad, max_images=max_images, max_share=max_share)


def test_few_bad_images_are_within_the_limits() -> None:
    assert limits([0, 1, 2, 3, 5, 10, 15]) == []
    assert limits([]) == []


def test_limits_by_count_by_share_and_by_class_are_said_with_names() -> None:
    by_count, by_share, by_class = limits([0, 1, 2, 3, 4, 7], max_images=5, max_share=0.25)
    assert by_count.startswith(
        "6 images of train can't be used, above data.max_bad_images 5: s3://bucket/0.jpg (truncated)"
    )
    assert by_share.startswith("6 images of train can't be used, 30.0% of 20, above data.max_bad_share 0.25")
    assert by_class == "1 class would lose every training image: 'c0' (5)"
    assert limits([0, 1], split="test") == []
    assert len(limits([0, 1, 2], split="test")) == 1


def test_a_limit_says_how_many_more_images_are_bad() -> None:
    (by_count,) = limits([0, 1, 2, 5, 6, 7, 10, 11, 12], max_images=3)
    assert by_count.endswith("s3://bucket/6.jpg (truncated) and 4 more")


@pytest.mark.slow
def test_inat2018_by_its_official_annotations(tmp_path: Path) -> None:
    """All of it in size: its official validation set is the test split, and validation is carved from training."""
    sizes, hidden = (
        BENCHMARKS["inat2018"].sizes,
        [{"id": n, "name": str(n), "supercategory": "Life"} for n in range(8142)],
    )
    counts = {"train": spread(sizes["train"], 2, 1000, 8142), "test": np.full(8142, 3)}
    for split, file in (("train", "train2018.json"), ("test", "val2018.json")):
        annotations(tmp_path / file, hidden, np.repeat(np.arange(8142), counts[split]).tolist())
    named = [{"id": n, "name": f"Genus species{n}", "supercategory": "Life"} for n in range(8142)]
    (tmp_path / "categories.json").write_text(json.dumps(named))
    manifest = build_dataset("inat2018", str(tmp_path))
    assert {split: len(manifest.rows_of(split)) for split in sizes} == dict(sizes)
    assert manifest.splits == ("train", "test")
    assert (manifest.class_names[8141], manifest.named) == ("Genus species8141", True)
    val_rows = carve_validation(manifest.label_rows(), 0)
    assert len(val_rows) > 3 * 8000
    assert set(val_rows) <= set(manifest.rows_of("train"))
