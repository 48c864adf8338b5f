"""Feature store: shards appear whole, prove themselves, are found by content, and are read without a copy."""

import gc
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_stores import append, made_contents, stored_split

from imbvlm.base import storage
from imbvlm.cli.app import main
from imbvlm.features.entry_index import EntryIndex, FinishedEntries, entry_keys
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.shard_file import as_tensor, open_shard
from imbvlm.features.store_layout import StoreError, StoreKey, StoreLayout
from imbvlm.features.stored_split import StoredSplit

SHAPES = {"tokens": (3, 4), "pooled": (4,), "image_embedding": (2,)}
LAYOUT = StoreLayout("digest", precision="float16", shapes=SHAPES)
NUM_ROWS, NUM_VIEWS, PER_SHARD = 10, 2, 4
CONTENTS = made_contents("images", NUM_ROWS)


def numbers(output: str = "pooled", layout: StoreLayout = LAYOUT, num_rows: int = NUM_ROWS) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.normal(size=(num_rows, NUM_VIEWS, *layout.shapes[output])).astype(np.float16)


def write_all(root: Path, *outputs: str, layout: StoreLayout = LAYOUT, bad: tuple[int, ...] = ()) -> StoredSplit:
    values = {output: numbers(output, layout) for output in outputs or ("pooled",)}
    return StoredSplit.open(stored_split(root, layout, values, per_shard=PER_SHARD, bad=bad))


def store_of(split: StoredSplit) -> FeatureStore:
    return FeatureStore.open(f"{split.root}/{split.layout.digest}")


def shards(split: StoredSplit, output: str = "pooled") -> list[Path]:
    """In the order of the rows."""
    return [Path(split.root) / path for path in split.places[output].paths]


def lost(store: FeatureStore, output: str = "pooled", **options: bool) -> list[int]:
    """The rows that the store doesn't have, in one of their views at least."""
    positions = store.index(output, **options).find(entry_keys(CONTENTS, NUM_VIEWS))
    return np.flatnonzero((positions < 0).any(axis=1)).tolist()


def flip(path: Path, part: bytes) -> None:
    """Change one bit of one number, in the middle of the values."""
    data = bytearray(path.read_bytes())
    data[data.index(part) + 3] ^= 1
    path.write_bytes(data)


@pytest.fixture(params=["by row", "by shard"])
def copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbvlm.features.stored_split.FEW_ROWS", 16 if request.param == "by row" else 0)


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.usefixtures("copied")
def test_rows_and_views_come_back_in_the_order_asked(tmp_path: Path) -> None:
    split, values = write_all(tmp_path, "tokens"), numbers("tokens")
    rows, views = np.array([9, 0, 4, 3, 9, 4]), np.array([1, 0, 1, 1, 0, 1])
    got = split.gather("tokens", rows, views)
    assert got.dtype == torch.float16
    assert np.array_equal(got.numpy(), values[rows, views])
    assert np.array_equal(split.gather("tokens", rows).numpy(), values[rows, 0])
    assert split.gather("tokens", np.array([], dtype=np.int64)).shape == (0, 3, 4)
    with pytest.raises(IndexError, match="0 to 9"):
        split.gather("tokens", np.array([10]))


@pytest.mark.usefixtures("copied")
def test_a_split_reads_its_rows_wherever_they_lie_and_copies_share_one(tmp_path: Path) -> None:
    write_all(tmp_path)
    store, more = FeatureStore.open(str(tmp_path / "digest")), made_contents("more", 3)
    append(store, "pooled", more, numbers(num_rows=3) + 1)
    rows = [7, 11, 0, 7, 12, 3]
    path = store.write_split(np.concatenate([CONTENTS, more])[rows], 1, ("pooled",))
    expected = np.concatenate([numbers(), numbers(num_rows=3) + 1])[rows, 0]
    assert np.array_equal(StoredSplit.open(path).gather("pooled", np.arange(6)).numpy(), expected)


def test_a_view_is_the_file_and_no_copy(tmp_path: Path) -> None:
    layout = replace(LAYOUT, shapes={**SHAPES, "pooled": (512,)})
    values = numbers(layout=layout, num_rows=20_000)
    split = StoredSplit.open(stored_split(tmp_path, layout, {"pooled": values}, per_shard=20_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = as_tensor(split._mapped_shard("pooled", 0).values)
    (path,) = shards(split)
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    assert any(int(start, 16) <= view.data_ptr() < int(end, 16) for start, end in spans)
    assert torch.equal(view, torch.from_numpy(values).view(40_000, 512))


def test_many_shards_do_not_use_up_file_descriptors(tmp_path: Path) -> None:
    values = numbers(num_rows=400)
    split = StoredSplit.open(stored_split(tmp_path, LAYOUT, {"pooled": values}, per_shard=1))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    split.gather("pooled", np.arange(400))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_damage_met_while_reading_is_a_sentence(tmp_path: Path) -> None:
    split = write_all(tmp_path)
    path = shards(split)[1]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StoreError, match=rf"{path.name}.*Start again"):
        split.gather("pooled", np.array([5]))
    Path(split.path).write_bytes(Path(split.path).read_bytes()[:-1])
    with pytest.raises(StoreError, match="is not the file of a stored split"):
        StoredSplit.open(split.path)


def test_quarantined_rows_keep_their_reason_and_their_place(tmp_path: Path) -> None:
    split = write_all(tmp_path, bad=(0, 7))
    assert split.quarantine == ((0, "truncated"), (7, "truncated"))
    assert np.flatnonzero(~split.ok).tolist() == [0, 7]
    assert len(split.ok) == NUM_ROWS


def test_a_split_that_is_written_again_is_the_same_file_and_needs_no_writing(tmp_path: Path) -> None:
    split = write_all(tmp_path)
    before = os.stat(split.path)
    assert store_of(split).write_split(CONTENTS, NUM_VIEWS, ("pooled",)) == split.path
    assert os.stat(split.path) == before


# ------------------------------------------------------------------------------------------------- verifying


def test_the_index_lacks_absent_damaged_and_foreign_shards_and_a_recorded_one_deletes_them(tmp_path: Path) -> None:
    split = write_all(tmp_path / "a")
    store, (first, second, third) = store_of(split), shards(split)
    assert lost(store) == []
    assert lost(store, "tokens") == list(range(NUM_ROWS))
    other = write_all(tmp_path / "b", layout=replace(LAYOUT, digest="another"))
    flip(first, numbers()[2].tobytes())
    second.write_bytes(second.read_bytes()[:-100])
    third.write_bytes(shards(other)[2].read_bytes())
    assert lost(store) == list(range(NUM_ROWS))
    second.write_bytes(b"")
    third.write_bytes(first.read_bytes())
    assert lost(store) == list(range(NUM_ROWS))
    assert first.exists()
    assert lost(store, record=True) == list(range(NUM_ROWS))
    assert not any(path.exists() for path in (first, second, third))


def test_what_was_verified_is_not_read_again_and_every_change_of_a_file_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = write_all(tmp_path)
    store, read = store_of(split), list[str]()
    # As if an hour had gone by since the shards were written.
    monkeypatch.setattr("imbvlm.features.feature_store.SETTLED_SECONDS", -3600.0)
    monkeypatch.setattr("imbvlm.features.feature_store.open_shard", lambda path: read.append(path) or open_shard(path))
    assert lost(store, record=True) == []
    assert len(read) == 3
    assert lost(store_of(split), record=True) == []
    assert len(read) == 3
    assert lost(store, full=True) == []
    assert len(read) == 6
    paths = shards(split)
    before = paths[0].stat()
    flip(paths[0], numbers()[2].tobytes())
    # Whoever sets a file's date back is seen by the time at which he did so.
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    paths[2].unlink()
    assert lost(store) == list(range(NUM_ROWS))
    for index in (tmp_path / "digest" / "pooled").glob("*.index"):
        index.write_text("half of a", encoding="utf-8")
    assert lost(FeatureStore.open(store.folder)) == list(range(NUM_ROWS))


def test_a_dry_run_reads_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(write_all(tmp_path))
    monkeypatch.setattr("imbvlm.features.feature_store.open_shard", lambda path: pytest.fail(path))
    assert lost(store, verify=False) == []


def test_shards_without_an_index_are_indexed_and_many_indexes_become_one(tmp_path: Path) -> None:
    """As those of a pass that was killed between the two files, and of many short passes."""
    split = write_all(tmp_path, bad=(5,))
    store, folder = store_of(split), tmp_path / "digest" / "pooled"
    assert len(list(folder.glob("*.index"))) == 3
    for index in sorted(folder.glob("*.index"))[:2]:
        index.unlink()
    assert lost(store) == []
    assert lost(store, record=True) == []
    assert len(list(folder.glob("*.index"))) == 1
    assert store.write_split(CONTENTS, NUM_VIEWS, ("pooled",)) == split.path


def test_features_check_finds_what_no_date_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = write_all(tmp_path / "store")
    write_all(tmp_path / "store", "tokens", layout=replace(LAYOUT, digest="other"))
    with pytest.raises(SystemExit) as ended:
        main(["features", "check", str(tmp_path / "store")])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("3 shards") == 2
    path = shards(split)[1]
    path.write_bytes(path.read_bytes().replace(numbers()[5].tobytes(), numbers()[6].tobytes()))
    with pytest.raises(SystemExit) as ended:
        main(["features", "check", str(tmp_path / "store" / "digest")])
    assert ended.value.code == 1
    assert f"1 DAMAGED ({path.name}): the next sweep" in capsys.readouterr().out


def test_a_file_that_changes_within_a_tick_of_its_check_is_checked_again(tmp_path: Path) -> None:
    split = write_all(tmp_path)
    store, path = store_of(split), shards(split)[0]
    assert lost(store, record=True) == []
    times = path.stat()
    flip(path, numbers()[2].tobytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert lost(store) == [0, 1, 2, 3]


def test_no_damaged_byte_is_ever_read_as_a_feature(tmp_path: Path) -> None:
    split = write_all(tmp_path, bad=(5,))
    path, values = shards(split)[1], torch.from_numpy(numbers()[4:8]).view(8, 4)
    good, index = path.read_bytes(), store_of(split).index("pooled")
    for position in range(0, len(good), 3):
        data = bytearray(good)
        data[position] ^= 128
        path.write_bytes(data)
        again = store_of(split).index("pooled")
        if len(again.keys) == len(index.keys):
            # Padding and Arrow's second copy of the schema hold nothing of ours.
            assert torch.equal(as_tensor(StoredSplit.open(split.path)._mapped_shard("pooled", 1).values), values)
            assert again.reasons == index.reasons
            assert np.array_equal(again.keys, index.keys)


# ------------------------------------------------------------------------------------------------- writing


def test_values_beyond_half_precision_name_the_option(tmp_path: Path) -> None:
    values = numbers().astype(np.float32)
    values[1, 0, 0] = 1e6
    with pytest.raises(StoreError, match=r"pooled must be finite .* 1e\+06. Set features.precision: float32"):
        stored_split(tmp_path, LAYOUT, {"pooled": values})
    path = stored_split(tmp_path, replace(LAYOUT, digest="exact", precision="float32"), {"pooled": values})
    assert float(StoredSplit.open(path).gather("pooled", np.array([1]))[0, 0]) == 1e6


def test_a_folder_belongs_to_one_encoder(tmp_path: Path) -> None:
    write_all(tmp_path)
    folder = str(tmp_path / "digest")
    assert FeatureStore.create(folder, LAYOUT).layout == LAYOUT
    with pytest.raises(StoreError, match="another encoder"):
        FeatureStore.create(folder, replace(LAYOUT, digest="another"))
    (tmp_path / "digest" / "store.json").write_text('{"digest": 1}')
    with pytest.raises(StoreError, match="not a feature store's description"):
        FeatureStore.open(folder)


def test_the_key_changes_with_everything_that_changes_the_numbers_and_not_with_the_data() -> None:
    key = StoreKey("weights", {"image_size": 96, "resize": 1.1}, "float16", "float32")
    others = [
        replace(key, weights="other"),
        replace(key, preprocess={"image_size": 96, "resize": 1.2}),
        replace(key, precision="float32"),
        replace(key, computed_in="bfloat16"),
        replace(key, token_pooling=2),
        replace(key, int8_tokens=True),
    ]
    assert len({key.digest, *(other.digest for other in others)}) == 7
    assert replace(key, preprocess={"resize": 1.1, "image_size": 96}).digest == key.digest


def test_shards_are_plain_arrow_files(tmp_path: Path) -> None:
    path = shards(write_all(tmp_path, bad=(5,)))[1]
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches == 1
        batch = reader.get_batch(0)
        assert batch.column("content").to_pylist() == [CONTENTS[row].tobytes() for row in (4, 4, 5, 5, 6, 6, 7, 7)]
        assert batch.column("view").to_pylist() == [0, 1] * 4
        assert batch.column("reason").to_pylist() == [None, None, "truncated", "truncated", None, None, None, None]
        assert np.array_equal(np.array(batch.column("pooled").to_pylist(), np.float16), numbers()[4:8].reshape(8, 4))


@pytest.mark.usefixtures("copied")
def test_bytes_with_a_scale_are_off_by_half_a_scale_at_most(tmp_path: Path) -> None:
    layout = replace(LAYOUT, int8_tokens=True)
    # Channels of very different sizes, one of zeros; the second shard is larger than the first.
    values = numbers("tokens") * np.array([100.0, 1.0, 0.0, 0.001], np.float16)
    values[4:8] *= 8
    split = StoredSplit.open(stored_split(tmp_path, layout, {"tokens": values}, per_shard=PER_SHARD))
    assert lost(store_of(split), "tokens", full=True) == []
    assert as_tensor(split._mapped_shard("tokens", 0).values).dtype == torch.int8
    assert layout.num_bytes("tokens", 20) == values.size == LAYOUT.num_bytes("tokens", 20) // 2
    assert layout.num_bytes("pooled") == LAYOUT.num_bytes("pooled")
    rows, views = np.array([9, 0, 4, 3, 9, 4]), np.array([1, 0, 1, 1, 0, 1])
    got = split.gather("tokens", rows, views)
    assert got.dtype == torch.float16
    for row, found, expected in zip(rows, got.float().numpy(), values[rows, views], strict=True):
        start = row // PER_SHARD * PER_SHARD
        scale = np.abs(values[start : start + PER_SHARD]).max(axis=(0, 1, 2)).astype(np.float32) / 127
        # And half precision's own rounding of the product.
        assert (np.abs(found - expected.astype(np.float32)) <= 0.5 * scale + np.abs(found) / 2048 + 1e-7).all()
        assert (found[:, 2] == 0).all()
    assert split.gather("tokens", np.array([], dtype=np.int64)).shape == (0, 3, 4)


def test_a_shard_of_bytes_proves_its_scale_too_and_comes_out_the_same_again(tmp_path: Path) -> None:
    layout = replace(LAYOUT, int8_tokens=True)
    split = write_all(tmp_path, "tokens", layout=layout)
    store, path = store_of(split), shards(split, "tokens")[1]
    data = path.read_bytes()
    assert append(store, "tokens", CONTENTS[4:8], numbers("tokens")[4:8]) == path.name
    assert path.read_bytes() == data
    scale = np.abs(numbers("tokens")[4:8]).max(axis=(0, 1, 2)).astype(np.float32) / np.float32(127)
    damaged = bytearray(data)
    damaged[data.index(scale.tobytes()) + 2] ^= 1
    path.write_bytes(damaged)
    assert store.damaged("tokens") == [path.name]
    # A shard of half floats is no shard of a store of bytes.
    path.write_bytes(shards(write_all(tmp_path / "plain", "tokens"), "tokens")[1].read_bytes())
    assert store.damaged("tokens") == [path.name]


def test_bytes_are_refused_where_half_precision_would_be(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="must be finite in float16"):
        stored_split(tmp_path, replace(LAYOUT, int8_tokens=True), {"tokens": np.full((4, 2, 3, 4), 1e5, np.float32)})


BIG = StoreLayout("digest", "float16", {"pooled": (4096,)})


def _write_for_ever(root: str, ready: "multiprocessing.synchronize.Event") -> None:
    values = np.random.default_rng(0).normal(size=(400, 1, 4096)).astype(np.float16)
    store = FeatureStore.create(f"{root}/digest", BIG)
    while True:
        append(store, "pooled", made_contents("images", 400), values)
        store.index("pooled", record=True)
        ready.set()


def test_two_writers_and_a_kill_never_leave_half_a_shard(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writers = [context.Process(target=_write_for_ever, args=(str(tmp_path), ready)) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        assert ready.wait(60)
        store = FeatureStore.open(str(tmp_path / "digest"))
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert len(store.index("pooled").keys) == 400
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    assert store.damaged("pooled") == []
    split = StoredSplit.open(store.write_split(made_contents("images", 400), 1, ("pooled",)))
    expected = np.random.default_rng(0).normal(size=(400, 4096)).astype(np.float16)
    assert np.array_equal(split.gather("pooled", np.arange(400)).numpy(), expected)


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    write_all(tmp_path)
    old, new = (tmp_path / "digest" / "pooled" / f".shard.arrow.{name}" for name in ("abc", "def"))
    old.write_bytes(b"half"), new.write_bytes(b"half")
    os.utime(old, (1, 1))
    FeatureStore.create(str(tmp_path / "digest"), LAYOUT)
    assert (old.exists(), new.exists()) == (False, True)


# ------------------------------------------------------------------------------------------------- the index


@pytest.mark.parametrize("limit", [0, 4096], ids=["large", "small"])
def test_a_process_sees_what_others_finish_and_what_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(FinishedEntries, "_MAX_SET", limit)
    store, keys = FeatureStore.create(str(tmp_path / "digest"), LAYOUT), entry_keys(CONTENTS, NUM_VIEWS)
    finished = FinishedEntries(store.output_folder("pooled"))

    def seen() -> list[int]:
        finished.refresh()
        return [row for row in range(NUM_ROWS) if all(key in finished for key in keys[row])]

    assert seen() == []
    names = [append(store, "pooled", CONTENTS[rows], numbers()[rows]) for rows in ([3, 1], [8])]
    assert seen() == [1, 3, 8]
    os.unlink(store.shard_path("pooled", names[0]))
    store.index("pooled", record=True)
    assert seen() == [8]


def test_keys_that_end_in_zeros_are_told_apart() -> None:
    """NumPy's byte strings drop zeros at their end."""
    contents = np.zeros((3, 16), np.uint8)
    contents[1, 15], contents[2, 0] = 1, 1
    keys = entry_keys(contents, 300)
    assert len(np.unique(keys)) == 900
    index = EntryIndex.of_shard("a", storage.FileState(1, 2, 3), keys.reshape(-1), [None] * 900)
    assert np.array_equal(index.entry[index.find(keys)], np.arange(900).reshape(3, 300))


def test_a_million_entries_are_found_in_seconds() -> None:
    contents = np.random.default_rng(0).integers(0, 256, (1_000_000, 16), np.uint8)
    index = EntryIndex.of_shard("a", storage.FileState(1, 2, 3), entry_keys(contents, 1)[:, 0], [None] * len(contents))
    wanted = entry_keys(contents[::-5][:100_000], 1)[:, 0]
    begin = time.perf_counter()
    positions = index.find(wanted)
    assert time.perf_counter() - begin < 2
    assert np.array_equal(index.entry[positions], np.arange(len(contents))[::-5][:100_000])


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: data[:50] + data[51:]])
def test_a_damaged_index_costs_reading_the_shards_and_nothing_else(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    split = write_all(tmp_path)
    for path in (tmp_path / "digest" / "pooled").glob("*.index"):
        path.write_bytes(damage(path.read_bytes()))
    assert lost(store_of(split), record=True) == []
