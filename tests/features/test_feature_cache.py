"""Local copies of features: fetched once by however many processes, bounded, never removed while in use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_stores import stored_split

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, ImbvlmError, StorageError
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.features.feature_cache import CacheRequest, FeatureCache
from imbvlm.features.store_layout import StoreError, StoreLayout
from imbvlm.features.stored_split import StoredSplit

SIZE = 100_000


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbvlm.features.feature_cache.WAIT_SECONDS", 0.0)


def source_of(folder: Path, name: str, num_bytes: int = SIZE) -> str:
    """A folder of two files of so many bytes in all."""
    place = folder / "sources" / name
    place.mkdir(parents=True)
    for number in range(2):
        (place / f"{number}.bin").write_bytes(os.urandom(num_bytes // 2))
    return str(place)


def wanted(source: str, log: Path | None = None, seconds: float = 0.0) -> CacheRequest:
    def fetch(name: str, path: Path) -> None:
        if log is not None:
            with log.open("a") as stream:
                stream.write(f"{source}/{name}\n")
        storage.download(f"{source}/{name}", path)
        time.sleep(seconds)

    return CacheRequest(source, storage.file_states(source), fetch)


def hold(copies: FeatureCache, source: str, log: Path | None = None, seconds: float = 0.0) -> Any:
    (held,) = copies.pin([wanted(source, log, seconds)])
    return held


def same(held: Any, source: str) -> bool:
    return all((held.folder / path.name).read_bytes() == path.read_bytes() for path in Path(source).iterdir())


def copies_of(tmp_path: Path, max_bytes: int | None = None) -> FeatureCache:
    limit = None if max_bytes is None else max_bytes / 1e9
    return FeatureCache(FeatureCacheConfig(folder=str(tmp_path / "copies"), max_gigabytes=limit))


def num_copies(tmp_path: Path) -> int:
    return len([path for path in (tmp_path / "copies").iterdir() if path.is_dir()])


def test_a_second_asker_reads_what_the_first_has_fetched(tmp_path: Path) -> None:
    source, copies, log = source_of(tmp_path, "a"), copies_of(tmp_path), tmp_path / "log"
    first = hold(copies, source, log)
    assert same(first, source)
    assert hold(copies, source, log).folder == first.folder
    assert len(log.read_text().splitlines()) == 2


def test_what_changed_at_its_source_is_fetched_again_and_old_readers_keep_what_they_have(tmp_path: Path) -> None:
    source, copies, log = source_of(tmp_path, "a"), copies_of(tmp_path), tmp_path / "log"
    held = hold(copies, source, log)
    with (held.folder / "0.bin").open("rb") as reader:
        before = Path(source, "0.bin").read_bytes()
        Path(source, "0.bin").write_bytes(os.urandom(SIZE // 2))
        assert same(hold(copies, source, log), source)
        assert reader.read() == before
    assert len(log.read_text().splitlines()) == 3


def test_a_torn_copy_is_fetched_again(tmp_path: Path) -> None:
    source, copies, log = source_of(tmp_path, "a"), copies_of(tmp_path), tmp_path / "log"
    folder = hold(copies, source, log).folder
    (folder / "0.bin").write_bytes((folder / "0.bin").read_bytes()[:-1])
    (folder / ".1.bin.part").write_bytes(b"half")
    assert same(hold(copies, source, log), source)
    assert sorted(path.name for path in folder.iterdir()) == ["0.bin", "1.bin", "bytes"]


def test_the_longest_unused_goes_first_and_never_one_in_use(tmp_path: Path) -> None:
    sources = {name: source_of(tmp_path, name) for name in "abcd"}
    copies = copies_of(tmp_path, 2 * SIZE + 10)
    in_use = hold(copies, sources["a"])
    unused = hold(copies, sources["b"]).folder
    del unused

    third = hold(copies, sources["c"])
    assert same(in_use, sources["a"])
    assert num_copies(tmp_path) == 2
    with pytest.raises(ImbvlmError, match=r"trials use 0.2 MB of it, and .*/d has 0.1 MB. Set feature_copies"):
        hold(copies, sources["d"])
    # Both are free now, and what was released first has been unused for longer.
    c = third.folder
    del in_use

    del third

    assert same(hold(copies, sources["d"]), sources["d"])
    assert c.exists()
    assert num_copies(tmp_path) == 2


def test_what_a_trial_reads_is_held_whole_or_not_at_all_so_that_no_two_wait_for_each_other(tmp_path: Path) -> None:
    """Room for both towers' training rows, and not for all: the second trial would keep half and wait for the first."""
    both = {tower: [wanted(source_of(tmp_path, f"{tower}-{split}")) for split in ("train", "val")] for tower in "ab"}
    copies = copies_of(tmp_path, 3 * SIZE + 10)
    unused = hold(copies, source_of(tmp_path, "c")).folder
    first = copies.pin(both["a"])
    # What a driver retries: a sentence of ours that is no StorageError ends a trial for good.
    with pytest.raises(StorageError, match=r"trials use 0.2 MB of it, and .*/b-train with 1 more folder has 0.2 MB"):
        copies.pin(both["b"])
    assert num_copies(tmp_path) == 3, "nothing of it is kept"
    assert unused.exists(), "what wouldn't have made the room stays"
    del first
    assert all(map(same, copies.pin(both["b"]), [one.source for one in both["b"]]))


def test_copies_that_are_whole_need_no_room(tmp_path: Path) -> None:
    """Other files on the disk may have taken it since."""
    source = source_of(tmp_path, "a")
    hold(copies_of(tmp_path), source)
    assert same(hold(copies_of(tmp_path, SIZE // 2), source), source)


def test_what_could_never_be_held_is_refused_with_a_fix(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a")
    with pytest.raises(
        ImbvlmError, match=r"0.1 MB, and the feature cache .* may take 50.0 kB of .*max_gigabytes higher"
    ):
        hold(copies_of(tmp_path, SIZE // 2), source)
    assert num_copies(tmp_path) == 0
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImbvlmError, match=r"can't cache features in .*Set feature_copies.folder"):
        hold(FeatureCache(FeatureCacheConfig(folder=str(tmp_path / "file" / "below"))), source)
    with pytest.raises(ConfigError, match="Give a path that begins with"):
        FeatureCacheConfig(folder="copies")


def test_without_a_limit_most_of_the_disk_is_taken_and_no_more(tmp_path: Path) -> None:
    free = storage.free_bytes(str(tmp_path))
    assert free is not None
    assert copies_of(tmp_path).limit_bytes() == pytest.approx(0.8 * free, rel=0.05)
    assert copies_of(tmp_path, 10**18).limit_bytes() == pytest.approx(free, rel=0.05)


def _ask(tmp_path: Path, source: str, wait: float) -> None:
    held = hold(copies_of(tmp_path), source, tmp_path / "log", 0.2)
    assert same(held, source)
    time.sleep(wait)


@pytest.mark.slow
def test_many_processes_at_once_fetch_it_once(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a")
    context = multiprocessing.get_context("fork")
    askers = [context.Process(target=_ask, args=(tmp_path, source, 0)) for _ in range(6)]
    for one in askers:
        one.start()
    for one in askers:
        one.join(30)
    assert [one.exitcode for one in askers] == [0] * 6
    assert len((tmp_path / "log").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_killed_fetcher_leaves_no_half_file_and_no_lock(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a")
    asker = multiprocessing.get_context("fork").Process(target=_ask, args=(tmp_path, source, 60))
    asker.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    os.kill(asker.pid, signal.SIGKILL)
    asker.join()
    held = hold(copies_of(tmp_path), source)
    assert same(held, source)
    assert not list(held.folder.glob(".*"))


@pytest.mark.slow
def test_room_that_is_in_use_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbvlm.features.feature_cache.WAIT_SECONDS", 30.0)
    source, other = source_of(tmp_path, "a"), source_of(tmp_path, "b")
    asker = multiprocessing.get_context("fork").Process(target=_ask, args=(tmp_path, source, 2))
    asker.start()
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "copies").glob("*/*.bin"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert same(hold(copies_of(tmp_path, SIZE + 10), other), other)
    asker.join()
    assert asker.exitcode == 0
    assert num_copies(tmp_path) == 1


@pytest.mark.slow
def test_a_process_that_was_killed_uses_nothing_any_more(tmp_path: Path) -> None:
    source, other = source_of(tmp_path, "a"), source_of(tmp_path, "b")
    asker = multiprocessing.get_context("fork").Process(target=_ask, args=(tmp_path, source, 60))
    asker.start()
    copies = copies_of(tmp_path, SIZE + 10)
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "copies").glob("*/*.bin"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ImbvlmError, match="trials use"):
        hold(copies, other)
    os.kill(asker.pid, signal.SIGKILL)
    asker.join()
    assert same(hold(copies, other), other)
    assert num_copies(tmp_path) == 1


def test_by_itself_a_cluster_copies_a_shared_folder_and_one_machine_does_not() -> None:
    """A node of a cluster would read every epoch over the network."""
    assert FeatureCache(FeatureCacheConfig()).is_needed_for("/shared/features", has_many_machines=True)
    assert not FeatureCache(FeatureCacheConfig()).is_needed_for("/home/me/features", has_many_machines=False)
    assert FeatureCache(FeatureCacheConfig()).is_needed_for("s3://bucket/features", has_many_machines=False)


def test_by_itself_nothing_is_copied_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /tmp is a tmpfs, as on many nodes of Slurm, copies would take the memory that the trial is given."""
    monkeypatch.setattr(os, "major", lambda device: 8)
    copies_of(tmp_path).check_disk()
    monkeypatch.setattr(os, "major", lambda device: 0)
    with pytest.raises(StorageError, match=r"copies on .* is not on a disk of this machine. Set feature_copies.folder"):
        copies_of(tmp_path).check_disk()
    FeatureCache(FeatureCacheConfig(folder=str(tmp_path), of_shared_folders=True)).check_disk()


def test_a_shared_folder_is_copied_where_that_is_asked_for_and_read_in_place_otherwise(tmp_path: Path) -> None:
    layout = StoreLayout("d", "float32", {"pooled": (4,)})
    shared, values = str(tmp_path / "shared"), np.random.default_rng(0).normal(size=(6, 1, 4))
    path = stored_split(shared, layout, {"pooled": values}, per_shard=3)
    copies = FeatureCache(FeatureCacheConfig(folder=str(tmp_path / "copies"), of_shared_folders=True))
    assert copies.is_needed_for(shared, has_many_machines=False)
    assert not FeatureCache(FeatureCacheConfig(of_shared_folders=False)).is_needed_for(shared, has_many_machines=True)
    copied = StoredSplit.open(path, ("pooled",), copies)
    expected = values[:, 0].astype(np.float32)
    assert np.array_equal(copied.gather("pooled", np.arange(6)).numpy(), expected)
    assert num_copies(tmp_path) == 1
    assert copied.quarantine == ()
    # What is damaged is not copied.
    shard = Path(shared) / copied.places["pooled"].paths[1]
    shard.write_bytes(shard.read_bytes().replace(expected[4].tobytes(), expected[5].tobytes()))
    with pytest.raises(StoreError, match="is damaged at its source"):
        StoredSplit.open(path, ("pooled",), copies).gather("pooled", np.arange(6))
