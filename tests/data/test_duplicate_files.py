"""Copies of a file stay on one side of every split that is drawn, and are found without reading all files."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from command_line import run_command

from imbvlm.data import duplicate_files
from imbvlm.data.duplicate_files import duplicate_digests, mark_duplicates
from imbvlm.data.files.object_reader import read_object
from imbvlm.data.manifest import Manifest, label_rows
from imbvlm.data.manifest_check import check_manifest
from imbvlm.data.splits import carve_validation


def build(*arguments: object) -> None:
    assert run_command("manifest", "build", *arguments) == 0


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """Every picture of two classes twice; all files have one size."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            for copy in ("", " (copy)"):
                (tmp_path / "pets" / name / f"{number}{copy}.png").write_bytes(f"{label}{number}".encode() * 5000)
    return tmp_path


def pictures(manifest: Manifest, rows: np.ndarray) -> set[str]:
    uris = manifest.table.column("uri").take(pa.array(rows)).to_pylist()
    return {uri.replace(" (copy)", "") for uri in uris}


def test_copies_stay_on_one_side_of_the_test_split_and_of_carved_validation(twice: Path) -> None:
    path = str(twice / "pets.parquet")
    for seed in range(5):
        build("--folders", twice / "pets", "--test-share", 0.25, "--seed", seed, "-o", path)
        made, rows = Manifest.read(path), label_rows(path)
        test, carved = rows.rows_of("test"), carve_validation(rows, seed)
        rest = np.setdiff1d(rows.rows_of("train"), carved)
        assert np.bincount(rows.labels[test]).tolist() == [4, 4]
        assert np.bincount(rows.labels[carved]).tolist() == [2, 2]
        sides = [pictures(made, side) for side in (test, carved, rest)]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 20
        assert check_manifest(made).ok


def test_a_changed_copy_changes_the_fingerprint_and_is_no_copy_any_more(twice: Path) -> None:
    build("--folders", twice / "pets", "-o", twice / "pets.parquet")
    made = Manifest.read(str(twice / "pets.parquet"))
    before = made.row_fingerprint("train")
    assert "20 images with the same content more than once" in str(check_manifest(made))
    (twice / "pets" / "cat" / "3.png").write_bytes(b"another picture")
    assert made.row_fingerprint("train") != before
    assert "19 images with the same content more than once" in str(check_manifest(made))


def test_a_fingerprint_of_files_does_not_depend_on_whether_copies_were_looked_for(twice: Path) -> None:
    uris = sorted(map(str, (twice / "pets" / "cat").iterdir()))
    made = Manifest.build(pa.table({"uri": uris, "label": [0] * 20, "split": ["train"] * 20}), ["cat"], "pets")
    assert mark_duplicates(made).row_fingerprint("train") == made.row_fingerprint("train")


def test_only_files_that_may_be_copies_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        "alone": b"of its own size",
        "a": b"x" + bytes(9000) + b"one end",
        "b": b"x" + bytes(9000) + b"two end",
        "c": b"y" + bytes(9000) + b"one end",
        "twin of c": b"y" + bytes(9000) + b"one end",
        "empty": b"",
        "empty too": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    reads = []
    monkeypatch.setattr(
        duplicate_files, "read_object", lambda uri: reads.append(len(read_object(uri))) or read_object(uri)
    )
    uris = [*(str(tmp_path / name) for name in contents), str(tmp_path / "gone"), str(tmp_path / "alone")]
    # A part of a larger file is an image too.
    (tmp_path / "shard.tar").write_bytes(b"12345" + contents["c"] + b"678")
    uris.append(f"{tmp_path / 'shard.tar'}#bytes=5+{len(contents['c'])}")
    found = duplicate_digests(uris)
    same = [number for number, digest in enumerate(found) if digest is not None]
    assert [os.path.basename(uris[number])[:9] for number in same] == ["c", "twin of c", "shard.tar"]
    assert len({found[number] for number in same}) == 1
    # The ends of five, and all of the four that share theirs.
    assert sorted(reads) == [4096] * 5 + [9008] * 4


def test_a_store_that_does_not_answer_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    uris = ["s3://bucket/a.png", "s3://bucket/b.png"]
    made = Manifest.build(pa.table({"uri": uris, "label": [0, 0], "split": ["train"] * 2}), ["cat"], "pets")

    def refuse(uris: list[str]) -> None:
        raise duplicate_files.StorageError("nobody answers")

    monkeypatch.setattr(duplicate_files, "file_sizes", refuse)
    assert "may fall on both sides of a split: nobody answers" in mark_duplicates(made).notes[0]


def test_the_check_finds_files_by_the_names_that_readers_try(tmp_path: Path) -> None:
    (tmp_path / "my cats").mkdir()
    for number in range(2):
        (tmp_path / "my cats" / f"{number}.jpg").write_bytes(f"{number}".encode())
    (tmp_path / "100%25.jpg").write_bytes(b"as written")
    rows = "".join(f"{name},cat\n" for name in ("my%20cats/0.jpg", "my cats/1.jpg", "100%25.jpg", "my%20"))
    (tmp_path / "rows.csv").write_text(f"path,label\n{rows}")
    build("--table", tmp_path / "rows.csv", "-o", tmp_path / "pets.parquet")
    made = Manifest.read(str(tmp_path / "pets.parquet"))
    assert [read_object(uri) for uri in made.table.column("uri").to_pylist()[:3]] == [b"0", b"1", b"as written"]
    (missing,) = [found for found in check_manifest(made).findings if "missing" in found.message]
    assert missing.examples == (str(tmp_path / "my%20"),)
    before = made.row_fingerprint("train")
    (tmp_path / "my cats" / "0.jpg").write_bytes(b"another picture")
    assert made.row_fingerprint("train") != before
