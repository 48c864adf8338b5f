"""Manifests: everything wrong at once, rows that move with their folder, and a carve that selection can trust."""

import hashlib
import os
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError, StorageError
from imbvlm.data.manifest import Manifest, ManifestError, label_rows
from imbvlm.data.splits import carve_validation, classes_without_validation, train_val_rows

NAMES = ("cat", "dog", "owl")


def table(
    labels: np.ndarray | Sequence[int] = (0, 0, 1, 2),
    splits: Sequence[str] = ("train", "train", "train", "test"),
    **columns: Any,
) -> pa.Table:
    columns = columns or {"uri": [f"img/{row}.jpg" for row in range(len(labels))]}
    return pa.table({**columns, "label": pa.array(labels, pa.int64()), "split": list(splits)})


def manifest(counts: Sequence[int], **columns: Any) -> Manifest:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [f"class {label}" for label in range(len(counts))]
    return Manifest.build(table(labels, ["train"] * len(labels), **columns), names, "made")


def test_embedded_manifests_are_read_by_name() -> None:
    manifest = Manifest.read("embedded:fashion_mnist_lt")
    assert [len(manifest.rows_of(split)) for split in ("train", "val", "test")] == [2480, 500, 2000]
    assert manifest.class_stats().counts.tolist() == [1000, 215, 359, 77, 28, 46, 10, 599, 129, 17]
    assert manifest.class_names[0] == "t-shirt"
    assert manifest.class_names[9] == "ankle boot"
    assert len(Manifest.read("embedded:emoji_lt").class_names) == 68
    with pytest.raises(ImbvlmError, match="did you mean 'fashion_mnist_lt'"):
        Manifest.read("embedded:fashion_mnist")


def test_embedded_images_are_those_of_the_original_files() -> None:
    data = Manifest.read("embedded:fashion_mnist_lt").table.column("bytes").to_pylist()
    # Of the pixels, in row order: the bytes of a PNG depend on who compressed it.
    from imbvlm.data.images.decoding import decode

    digest = hashlib.sha256(b"".join(decode(png)[:, :, 0].tobytes() for png in data)).hexdigest()
    assert digest == "f3abcc5d50f253305fc5bc791305d845f5aa6fb1fc817157b46c26013fcc33e5"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = Manifest.build(table(), NAMES, "pets", notes=["made by hand"], label_map={"7": 0, "9": 1, "12": 2})
    made.write(str(tmp_path / "pets.parquet"))
    manifest = Manifest.read(str(tmp_path / "pets.parquet"))
    assert manifest.class_names == NAMES
    assert (manifest.name, manifest.notes, manifest.label_map) == (made.name, made.notes, made.label_map)
    assert manifest.labels.tolist() == [0, 0, 1, 2]
    assert manifest.splits == ("train", "test")
    assert manifest.rows_of("test").tolist() == [3]
    assert len(manifest.split("train")) == 3


def test_uris_are_relative_to_the_manifest_and_move_with_it(tmp_path: Path) -> None:
    uris = ["img/a.jpg", "/elsewhere/b.jpg", "s3://bucket/c d.jpg", str(tmp_path / "one" / "img" / "e é.jpg")]
    made = Manifest.build(table(uri=uris), NAMES, "pets")
    (tmp_path / "one").mkdir()
    made.write(str(tmp_path / "one" / "pets.parquet"))
    (tmp_path / "one").rename(tmp_path / "two")
    absolute = Manifest.read(str(tmp_path / "two" / "pets.parquet")).table.column("uri").to_pylist()
    two = str(tmp_path / "two")
    assert absolute == [f"{two}/img/a.jpg", "/elsewhere/b.jpg", "s3://bucket/c d.jpg", f"{two}/img/e é.jpg"]


@pytest.mark.parametrize("name", ["~misc/0.jpg", "~", "a/~b/c.jpg", "./x.jpg"])
def test_a_folder_called_like_a_home_is_found_beside_its_manifest(tmp_path: Path, name: str) -> None:
    uri = os.path.normpath(tmp_path / name)
    Manifest.build(table([0], ["train"], uri=[uri]), NAMES, "pets").write(str(tmp_path / "pets.parquet"))
    kept = pq.read_table(tmp_path / "pets.parquet").column("uri")[0].as_py()
    assert kept.startswith("./~") == name.startswith("~")
    assert Manifest.read(str(tmp_path / "pets.parquet")).table.column("uri").to_pylist() == [uri]


def test_everything_wrong_with_the_rows_is_said_in_one_error() -> None:
    bad = pa.table(
        {
            "uri": ["a.jpg", None, "", "d.jpg", "e.jpg"],
            "bytes": pa.array([None, b"x", None, None, None], pa.binary()),
            "label": pa.array([0, None, 1, 3, -1], pa.int32()),
            "split": ["test", "test", "test", "validation", None],
        }
    )
    with pytest.raises(ManifestError) as caught:
        Manifest.build(bad, ["cat", " ", "owl"], "pets")
    assert caught.value.findings == (
        "1 class without a name: 1",
        "1 row (row 1) without a label",
        "2 rows (rows 3, 4) with a label outside 0 to 2, the class names: 3, -1",
        "2 rows (rows 3, 4) with a split that is none of train, val, test: 'validation', 'null'",
        "no row is a training row (split 'train')",
        "1 row (row 2) with neither a uri nor bytes",
    )
    assert "6 things are wrong with the manifest pets" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).findings == caught.value.findings


@pytest.mark.parametrize(
    ("columns", "finding"),
    [
        ({"uri": ["a"], "split": ["train"]}, "column 'label' is missing; it has uri, split"),
        ({"uri": ["a"], "label": [0]}, "column 'split' is missing; it has uri, label"),
        ({"label": [0], "split": ["train"]}, "columns 'uri' and 'bytes' are both missing"),
        ({"uri": ["a"], "label": ["cat"], "split": ["train"]}, "labels must be whole numbers, and are string"),
    ],
)
def test_missing_columns_are_named(columns: dict[str, list[str | int]], finding: str) -> None:
    with pytest.raises(ManifestError, match=finding):
        Manifest.build(pa.table(columns), NAMES, "pets")


def test_a_parquet_file_that_is_no_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "plain.parquet")
    with pytest.raises(ManifestError, match="imbvlm manifest build"):
        Manifest.read(str(tmp_path / "plain.parquet"))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(StorageError, match=r"text\.parquet"):
        Manifest.read(str(tmp_path / "text.parquet"))
    with pytest.raises(StorageError, match="is not there"):
        Manifest.read(str(tmp_path / "none.parquet"))


def test_class_names_that_repeat_are_a_warning_with_the_tied_classes() -> None:
    manifest = Manifest.build(table(), ["missile", "sunglasses", "Missile"], "imagenet")
    assert manifest.warnings == ("1 name of several classes, which text methods can't tell apart: 'missile' (0, 2)",)


def test_classes_without_training_images_are_kept() -> None:
    stats = Manifest.build(table(), NAMES, "pets").class_stats()
    assert stats.counts.tolist() == [2, 1, 0]
    assert stats.zero_train.tolist() == [2]


# ------------------------------------------------------------------------------------------------ carving


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any), st.integers(0, 5))
def test_carving_takes_what_the_protocol_says(counts: Sequence[int], seed: int) -> None:
    made = manifest(counts)
    val_rows = carve_validation(made.label_rows(), seed)
    wanted = [min(3, n // 5) if n >= 5 else 0 for n in counts]
    assert np.bincount(made.labels[val_rows], minlength=len(counts)).tolist() == wanted
    assert (np.diff(val_rows) > 0).all()
    stats = made.class_stats(train_val_rows(made, seed)[0])
    assert stats.split_counts.tolist() == counts
    assert stats.counts.tolist() == [n - w for n, w in zip(counts, wanted, strict=True)]
    lost = classes_without_validation(made.labels[val_rows], len(counts)).tolist()
    assert lost == [label for label, n in enumerate(counts) if n < 5]


def test_a_trial_trains_on_all_rows_but_those_held_out() -> None:
    official = Manifest.read("embedded:fashion_mnist_lt")
    for made in (official, manifest([50, 20, 7])):
        train, val = train_val_rows(made, 3)
        held_out = carve_validation(made.label_rows(), 3)
        assert train.tolist() == [row for row in made.rows_of("train").tolist() if row not in held_out.tolist()]
        assert val.tolist() == (made.rows_of("val") if made is official else held_out).tolist()


def test_carving_depends_on_the_seed_and_on_nothing_else() -> None:
    made = manifest([50, 20, 7])
    assert carve_validation(made.label_rows(), 3).tolist() == carve_validation(made.label_rows(), 3).tolist()
    assert carve_validation(made.label_rows(), 3).tolist() != carve_validation(made.label_rows(), 4).tolist()
    # Every row has its chance.
    taken = np.bincount(
        np.concatenate([carve_validation(made.label_rows(), seed) for seed in range(300)]), minlength=77
    )
    assert taken[:50].min() > 3
    assert taken[70:].min() > 15


def test_nothing_is_carved_where_validation_rows_are_official() -> None:
    assert carve_validation(Manifest.read("embedded:fashion_mnist_lt").label_rows(), 0).tolist() == []


def test_identical_images_stay_on_one_side() -> None:
    contents = [b"same"] * 6 + [b"pair", b"pair", b"a", b"b", b"c", b"d", b"e", b"f", b"shared", b"shared"]
    labels = [0] * 15 + [1]
    made = Manifest.build(table(labels, ["train"] * 16, bytes=pa.array(contents)), ["a", "b"], "twins")
    for seed in range(50):
        val_rows = set(carve_validation(made.label_rows(), seed).tolist())
        assert len(val_rows) == 3
        assert {contents[row] for row in val_rows}.isdisjoint(
            {contents[row] for row in range(16) if row not in val_rows}
        )
        assert not val_rows & {14, 15}


def test_a_class_of_copies_of_one_image_is_not_selectable() -> None:
    made = manifest([20, 20], bytes=pa.array([b"one"] * 20 + [bytes([row]) for row in range(20)]))
    val_rows = carve_validation(made.label_rows(), 0)
    assert classes_without_validation(made.labels[val_rows], 2).tolist() == [0]


def test_trials_carve_the_same_rows_without_reading_images(tmp_path: Path) -> None:
    made = manifest([30, 12, 5], bytes=pa.array([bytes([row % 40]) for row in range(47)]))
    made.write(str(tmp_path / "m.parquet"))
    rows = label_rows(str(tmp_path / "m.parquet"))
    assert rows.labels.tolist() == made.labels.tolist()
    assert rows.class_names == made.class_names
    assert carve_validation(rows, 7).tolist() == carve_validation(made.label_rows(), 7).tolist()


# ------------------------------------------------------------------------------------------------ fingerprints


def test_a_fingerprint_follows_bytes_and_order_and_splits() -> None:
    made = manifest([2, 2], bytes=pa.array([b"a", b"b", b"c", b"d"]))
    other = manifest([2, 2], bytes=pa.array([b"a", b"b", b"c", b"D"]))
    assert made.row_fingerprint("train") == made.split("train").row_fingerprint("train")
    assert made.row_fingerprint("train") != other.row_fingerprint("train")
    assert made.take(np.array([1, 0, 2, 3])).row_fingerprint("train") != made.row_fingerprint("train")
    assert made.row_fingerprint("test") == other.row_fingerprint("test")


def test_a_fingerprint_follows_a_local_files_size_and_time_but_not_labels(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"content")
    uris = [str(tmp_path / "a"), str(tmp_path / "b"), "s3://bucket/c", str(tmp_path / "missing")]
    made = manifest([4], uri=uris)
    before = made.row_fingerprint("train")
    assert manifest([1, 3], uri=uris).row_fingerprint("train") == before
    os.utime(tmp_path / "a", ns=(1, 1))
    touched = made.row_fingerprint("train")
    assert touched != before
    (tmp_path / "missing").write_bytes(b"")
    assert made.row_fingerprint("train") != touched


def test_a_million_rows_take_seconds(tmp_path: Path) -> None:
    num_rows = 1_000_000
    labels = np.arange(num_rows) % 8142
    uris = pc_format(labels)
    begin = time.perf_counter()
    made = Manifest.build(table(labels, ["train"] * num_rows, uri=uris), [f"c{n}" for n in range(8142)], "big")
    made.write(str(tmp_path / "big.parquet"))
    manifest = Manifest.read(str(tmp_path / "big.parquet"))
    val_rows = carve_validation(label_rows(str(tmp_path / "big.parquet")), 0)
    manifest.class_stats(train_val_rows(manifest, 0)[0])
    assert time.perf_counter() - begin < 20
    assert len(val_rows) == 3 * 8142


def pc_format(labels: Any) -> Any:
    import pyarrow.compute as pc

    names = pa.array(np.arange(len(labels))).cast(pa.string())
    return pc.binary_join_element_wise("s3://bucket/images", names, "/")


@pytest.mark.parametrize("uri", ["http://host/a.jpg", "gs://bucket/a.jpg", "s3:///a.jpg", "s3:/bucket/a.jpg"])
def test_images_that_lie_where_nothing_is_read_are_refused_by_row(tmp_path: Path, uri: str) -> None:
    uris = ["img/0.jpg", uri, "s3://bucket/2.jpg", f"file://{tmp_path}/3.jpg"]
    where = (
        "names no bucket"
        if uri.startswith("s3:///")
        else "did you mean s3://bucket/a.jpg"
        if "s3" in uri
        else "only local"
    )
    with pytest.raises(ManifestError, match=rf"1 row \(row 1\) whose image can't be read: {uri}.*{where}"):
        Manifest.build(table(uri=uris), NAMES, "pets")
    # A row that embeds its image may keep any uri as a name.
    made = Manifest.build(table(uri=uris, bytes=[None, b"x", None, None]), NAMES, "pets")
    made.write(str(tmp_path / "pets.parquet"))
    assert Manifest.read(str(tmp_path / "pets.parquet")).table.column("uri")[1].as_py() == uri


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (b"nope", "'imbvlm' can't be read: Invalid JSON"),
        (b"[" * 200_000, "'imbvlm' can't be read: Invalid JSON"),
        (b"\xff", "'imbvlm' can't be read: Invalid JSON"),
        (b"[]", "'imbvlm' can't be read: Input should be an object"),
        (b"{}", r"'imbvlm\.class_names' can't be read: Field required"),
        (b'{"class_names": "abc"}', r"'imbvlm\.class_names' can't be read"),
        (b'{"class_names": [1, 2, 3]}', r"'imbvlm\.class_names\.0' can't be read: Input should be a valid string"),
        (b'{"class_names": ["a", "b", "c"], "notes": 7}', r"'imbvlm\.notes' can't be read"),
        (b'{"class_names": ["a", "b", "c"], "split_counts": [1, "x", 2]}', r"'imbvlm\.split_counts\.1' can't be read"),
        (b'{"class_names": ["a", "b", "c"], "split_counts": [1]}', "split_counts has a count .* 3 classes, and is 1"),
        (b'{"class_names": ["a", "b", "c"], "label_map": [1]}', r"'imbvlm\.label_map' can't be read"),
    ],
)
def test_metadata_that_is_not_a_manifests_is_said(tmp_path: Path, metadata: bytes, says: str) -> None:
    pq.write_table(table().replace_schema_metadata({"imbvlm": metadata}), tmp_path / "pets.parquet")
    with pytest.raises(ManifestError, match=says):
        Manifest.read(str(tmp_path / "pets.parquet"))
