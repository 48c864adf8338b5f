"""Files appear whole or not at all, and what fails names the file and the cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imbvlm.base import storage
from imbvlm.base.errors import StorageError


def test_what_is_written_is_read_and_folders_are_made(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "deep", "er", "file.bin")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.exists(uri)
    assert storage.list_files(storage.join(str(tmp_path), "deep", "er")) == ["file.bin"]


def test_locations_by_path_file_uri_and_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes(f"file://{tmp_path}/a", b"x")
    assert storage.read_bytes("a") == b"x"
    assert storage.absolute("a") == str(tmp_path / "a")
    assert storage.join("s3://bucket/runs/", "one", "two") == "s3://bucket/runs/one/two"
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"
    assert not storage.is_local("s3://bucket/runs")
    with pytest.raises(StorageError, match="s3://bucket/runs must be a path on this machine"):
        storage.local_path("s3://bucket/runs")


NOT_TAKEN = {
    "s3://": r"s3:// names no bucket; it should look like s3://BUCKET/KEY",
    "s3:///runs": r"s3:///runs names no bucket; it should look like s3://BUCKET/KEY",
    "s3:": r"s3: names no bucket; it should look like s3://BUCKET/KEY",
    "s3:bucket/runs": r"s3:bucket/runs is no location; did you mean s3://bucket/runs\?",
    "file:runs": r"file:runs is no location; it should look like file:///runs",
    "s3:/bucket/runs": r"s3:/bucket/runs is no location; did you mean s3://bucket/runs\?",
    "S3://bucket/runs": r"S3://bucket/runs is no location; did you mean s3://bucket/runs\?",
    "gs://bucket/runs": r"gs://bucket/runs: only local paths and s3://BUCKET/\.\.\. are .* give s3://bucket/runs",
    "http://host/a": r"http://host/a: only local paths and s3://BUCKET/\.\.\. are supported; copy it to one",
    "hdfs://host/a": r"hdfs://host/a: only local paths",
    "file:/runs": r"file:/runs is no location; it should look like file:///runs",
    "a\0b": r"null character, which no path can have",
    "data:image/png;base64,iVBOR": r"data:image/png;base64,iVBOR\.\.\. is the content of an image and no location",
}


@pytest.mark.parametrize("uri", NOT_TAKEN)
def test_only_paths_and_buckets_are_taken_and_nothing_is_asked_or_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """`s3://` alone became a local folder `s3:`, and pyarrow asked gs:// without an end."""
    monkeypatch.chdir(tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: storage.join(uri, "a"), lambda: storage.absolute(uri), lambda: storage.read_bytes(uri),
        lambda: storage.write_bytes(uri, b"x"), lambda: storage.exists(uri), lambda: storage.list_files(uri),
        lambda: storage.delete(uri), lambda: storage.free_bytes(uri), lambda: storage.file_states(uri),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StorageError, match=NOT_TAKEN[uri]):
            call()
    assert list(tmp_path.iterdir()) == []


def test_words_before_a_colon_are_folders_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("./s3:/a", "Genus:/a", "12:30/a", "http/a"):
        storage.write_bytes(path, b"x")
        assert storage.read_bytes(path) == b"x"


def test_an_empty_name_is_no_folder_for_output() -> None:
    assert storage.folder_problem("") == "an empty name is no folder; the current folder is `.`"
    assert storage.folder_problem(".") is None
    assert storage.folder_problem("gs://bucket") == storage.location_problem("gs://bucket")


def test_what_is_not_there(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    assert not storage.exists(absent)
    assert storage.list_files(absent) == []
    storage.delete(absent)
    with pytest.raises(StorageError, match="absent is not there"):
        storage.read_bytes(absent)


def test_causes_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"can't read .*tmp|can't read "):
        storage.read_bytes(str(tmp_path))
    for parts in (("below",), ("further", "below")):
        with pytest.raises(StorageError, match=r"can't write .*below: /.*/file is a file and no folder; choose"):
            storage.write_bytes(str(tmp_path.joinpath("file", *parts)), b"y")


def test_files_and_folders_are_removed(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "folder" / "a"), b"x")
    storage.write_bytes(str(tmp_path / "b"), b"x")
    storage.delete(str(tmp_path / "folder"))
    storage.delete(str(tmp_path / "b"))
    assert storage.list_files(str(tmp_path)) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(str(tmp_path / "file"), b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"can't write .*file: .*the disk is full"):
        storage.write_bytes(str(tmp_path / "file"), b"new")
    assert storage.read_bytes(str(tmp_path / "file")) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_no_half_file(tmp_path: Path) -> None:
    """Killed again and again in the middle of writing 4 MB, the file is always one of those that were meant."""
    code = (
        "import itertools, sys\n"
        "from imbvlm.base.storage import write_bytes\n"
        "print('started', flush=True)\n"
        "for n in itertools.count():\n"
        "    write_bytes(sys.argv[1], bytes([n % 256]) * 4_000_000)\n"
    )
    target = tmp_path / "file"
    for pause in (0.02, 0.05, 0.11):
        writer = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not target.exists():
            time.sleep(0.005)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        data = target.read_bytes()
        assert len(data) == 4_000_000
        assert len(set(data)) == 1


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "file"), b"x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
