"""Tables as spreadsheets and other programs write them are read, or refused by a sentence that says the fix."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imbvlm.base import storage
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.sources.table_files import from_table


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Any]:
    def build(content: Any, suffix: str = "csv", **options: Any) -> Manifest:
        path = tmp_path / f"rows.{suffix}"
        if isinstance(content, pa.Table):
            path = tmp_path / "rows.parquet"
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return from_table([str(path)], str(tmp_path), "pets", **options)

    return build


def labeled(labels: Any) -> pa.Table:
    return pa.table({"path": [f"{row}.jpg" for row in range(len(labels))], "label": labels})


def classes(manifest: Manifest) -> list[str]:
    return [manifest.class_names[label] for label in manifest.labels]


def test_empty_cells_are_counted(read: Callable[..., Any]) -> None:
    with pytest.raises(ManifestError) as caught:
        read("path,label,split\na.jpg,cat,\nb.jpg,,train\nc.jpg,cat,\n")
    assert caught.value.findings == (
        "1 row without 'label'; fill it in, or remove it",
        "2 rows without 'split'; fill it in, or remove them",
    )


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ("path\tlabel\na.jpg\tcat\n".encode("utf-16"), r"rows\.tsv.*\n.*UTF-16.*save it as UTF-8"),
        ("path\tlabel\tespèce\na.jpg\tcat\tx\n".encode("latin-1"), "line 1 is not in UTF-8.*save the file as UTF-8"),
        ("path\tlabel\na.jpg\tcat\nb.jpg\tbête\n".encode("latin-1"), "line 3 is not in UTF-8.*save the file as UTF-8"),
    ],
)
def test_a_file_that_is_not_utf8_is_refused_with_a_fix(read: Callable[..., Any], content: bytes, finding: str) -> None:
    with pytest.raises(ManifestError, match=finding):
        read(content, "tsv")


@pytest.mark.parametrize("order", [1, -1])
def test_labels_are_ids_or_names_by_all_rows_whatever_comes_first(read: Callable[..., Any], order: int) -> None:
    # More rows of each than are read at once.
    labels = (["208"] * 300 + ["C3"] * 300)[::order]
    assert classes(read(labeled(labels), class_names=["C3", "208"])) == labels
    with pytest.raises(ManifestError, match=r"'(208|C3)'; .*list every class by --class-names"):
        read(labeled(labels))


def test_names_that_differ_by_zeros_are_two_classes(read: Callable[..., Any]) -> None:
    names = ["007", "cat", *map(str, range(8))]
    labels = ["007"] * 300 + ["7"] * 300
    assert classes(read(labeled(labels), class_names=names)) == labels
    for class_names in (None, ["cat", "dog"]):
        with pytest.raises(ManifestError, match="one number are written in several ways: 7; list every class"):
            read(labeled(labels), class_names=class_names)
    # Zeros alone make no names of ids.
    assert classes(read(labeled(["01", "00"]), class_names=["cat", "dog"])) == ["dog", "cat"]


def test_class_names_that_are_numbers(read: Callable[..., Any]) -> None:
    names = ["101", "205"]
    assert classes(read("path,label\na.jpg,205\nb.jpg,101\n", class_names=names)) == ["205", "101"]
    assert classes(read(labeled([205, 101]), class_names=names)) == ["205", "101"]
    # Ids stay ids where they all can be.
    assert classes(read(labeled(["0", "1"]), class_names=["1", "0"])) == ["1", "0"]
    with pytest.raises(ManifestError, match="label outside 0 to 1, the class names: 101, 300"):
        read(labeled([101, 300]), class_names=names)


def test_labels_of_many_digits(read: Callable[..., Any]) -> None:
    long = "12345678901234567890"
    assert classes(read(f"path,label\na.jpg,{long}\n", class_names=["cat", long])) == [long]
    for labels in ([long], pa.array([int(long)], pa.uint64())):
        with pytest.raises(ManifestError, match=f"1 label too large for a class id: {long}; list every class"):
            read(labeled(labels))
    with pytest.raises(ManifestError, match="1 label outside 0 to 0, the class names: 5000000000"):
        read(labeled([5_000_000_000]), class_names=["cat"])
    assert read(labeled([5_000_000_000, -(2**63)])).label_map == {str(-(2**63)): 0, "5000000000": 1}


def test_columns_of_one_name_are_named(read: Callable[..., Any]) -> None:
    with pytest.raises(ManifestError, match="2 columns are called 'label'; rename all but one"):
        read("path,label,label\na.jpg,cat,dog\n")
    assert len(read("path,label,note,note\na.jpg,cat,x,y\n")) == 1


@pytest.mark.parametrize("column", ["label", "split", "path"])
def test_a_column_of_lists_is_refused_by_its_type(read: Callable[..., Any], column: str) -> None:
    table = pa.table({"path": ["a.jpg"], "label": [0], "split": ["train"]} | {column: [["train"]]})
    with pytest.raises(
        ManifestError, match=f"'{column}' must be text or whole numbers, and is of the type list<.*string>"
    ):
        read(table, columns={"uri": "path"})


def test_a_class_may_be_called_na(read: Callable[..., Any]) -> None:
    labels = ["NA", "null", "nan", "N/A", "None"]
    rows = "".join(f"{row}.jpg,{label}\n" for row, label in enumerate(labels))
    assert classes(read(f"path,label\n{rows}")) == labels


def test_a_row_that_is_null_is_named_where_pyarrow_would_end_the_process(tmp_path: Path) -> None:
    row = '{"path": "a.jpg", "label": "cat", "more": [null, "null"], "note": null}\n'
    for number, text in enumerate(("null\n" + row, row * 20_000 + "null\n", "null", row + " null\n" + row)):
        path = tmp_path / f"train{number}.jsonl"
        path.write_text(text)
        with pytest.raises(ManifestError, match="a row in it is null; every row is an object"):
            from_table([str(path)], "", "x")
    path.write_text(row)
    assert len(from_table([str(path)], "", "x")) == 1


def test_a_cell_above_pythons_limit_isnt_called_a_mistake_in_its_quotes(read: Callable[..., Any]) -> None:
    long = "x" * 140_000
    with pytest.raises(ManifestError, match=r"field limit .*remove the column with such long cells, or write"):
        read(f'path,label,note\na.jpg,cat,"{long}"\n')


@pytest.mark.parametrize("read_pipe", [lambda path: from_table([path], "", "x"), Manifest.read, storage.read_bytes])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, read_pipe: Callable[..., Any]) -> None:
    path = tmp_path / "train.parquet"
    os.mkfifo(path)
    with pytest.raises(storage.StorageError, match="it is a pipe or a device; name a file"):
        read_pipe(str(path))


def test_manifests_that_number_their_classes_otherwise_are_joined_by_name(tmp_path: Path) -> None:
    """As for photos that come later: each manifest has ids of its own."""
    rows = {
        "first": "path,label,split\na.jpg,cat,train\nb.jpg,dog,train\nc.jpg,dog,test\n",
        "later": "path,label,split\nd.jpg,bird,train\ne.jpg,dog,train\n",
    }
    paths = []
    for name, text in rows.items():
        (tmp_path / f"{name}.csv").write_text(text)
        paths.append(str(tmp_path / f"{name}.parquet"))
        from_table([str(tmp_path / f"{name}.csv")], "/", name).write(paths[-1])
    joined = from_table(paths, "/", "pets")
    assert joined.class_names == ("cat", "dog", "bird")
    assert classes(joined) == ["cat", "dog", "dog", "bird", "dog"]
    assert joined.table.column("split").to_pylist() == ["train", "train", "test", "train", "train"]
    assert classes(from_table(paths[::-1], "/", "pets")) == ["bird", "dog", "cat", "dog", "dog"]
