"""Feature store: shards appear whole, prove themselves, and are read without a copy."""

import gc
import multiprocessing
import os
import signal
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from imbvlm.cli.app import main
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.shard_file import as_tensor, open_shard
from imbvlm.features.store_layout import ADDED_LATER, StoreError, StoreKey, StoreLayout

SHAPES = {"tokens": (3, 4), "pooled": (4,), "image_embedding": (2,)}
LAYOUT = StoreLayout("digest", num_rows=10, num_views=2, rows_per_shard=4, precision="float16", shapes=SHAPES)


def numbers(output: str = "pooled", layout: StoreLayout = LAYOUT) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.normal(size=(layout.num_rows, layout.num_views, *layout.shapes[output])).astype(np.float16)


def write_all(
    folder: Path, output: str = "pooled", layout: StoreLayout = LAYOUT, bad: tuple[int, ...] = ()
) -> FeatureStore:
    store, values = FeatureStore.create(str(folder), layout), numbers(output, layout)
    for shard in range(layout.num_shards):
        rows = layout.rows_of(shard)
        reasons = ["truncated" if row in bad else None for row in rows]
        store.write(output, shard, values[rows.start : rows.stop], reasons)
    return store


@pytest.fixture(params=["by row", "by shard"])
def copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbvlm.features.feature_store.FEW_ROWS", 16 if request.param == "by row" else 0)


@pytest.mark.usefixtures("copied")
def test_rows_and_views_come_back_in_the_order_asked(tmp_path: Path) -> None:
    write_all(tmp_path, "tokens")
    store, values = FeatureStore.open(str(tmp_path)), numbers("tokens")
    rows, views = np.array([9, 0, 4, 3, 9, 4]), np.array([1, 0, 1, 1, 0, 1])
    got = store.gather("tokens", rows, views)
    assert got.dtype == torch.float16
    assert np.array_equal(got.numpy(), values[rows, views])
    assert np.array_equal(store.gather("tokens", rows).numpy(), values[rows, 0])
    assert store.gather("tokens", np.array([], dtype=np.int64)).shape == (0, 3, 4)
    with pytest.raises(IndexError, match="0 to 9"):
        store.gather("tokens", np.array([10]))


def test_a_view_is_the_file_and_no_copy(tmp_path: Path) -> None:
    layout = replace(LAYOUT, num_rows=20_000, rows_per_shard=20_000, shapes={**SHAPES, "pooled": (512,)})
    store = write_all(tmp_path, layout=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = as_tensor(FeatureStore.open(str(tmp_path)).mapped_shard("pooled", 0).values)
    assert view.shape == (20_000, 2, 512)
    path = store.shard_path("pooled", 0)
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(path)]
    assert any(int(start, 16) <= view.data_ptr() < int(end, 16) for start, end in spans)
    assert torch.equal(view, torch.from_numpy(numbers(layout=layout)))


def test_many_shards_do_not_use_up_file_descriptors(tmp_path: Path) -> None:
    layout = replace(LAYOUT, num_rows=400, rows_per_shard=1)
    write_all(tmp_path, layout=layout)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    store = FeatureStore.open(str(tmp_path))
    store.gather("pooled", np.arange(400))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_missing_names_absent_damaged_and_foreign_shards(tmp_path: Path) -> None:
    store = write_all(tmp_path / "a")
    assert store.missing("pooled") == []
    assert store.missing("tokens") == [0, 1, 2]
    other = write_all(tmp_path / "b", layout=replace(LAYOUT, digest="another"))
    first, second, third = (Path(store.shard_path("pooled", shard)) for shard in range(3))
    data = bytearray(first.read_bytes())
    # One bit of one number, in the middle of the values.
    data[data.index(numbers()[2].tobytes()) + 3] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-100])
    third.write_bytes(Path(other.shard_path("pooled", 2)).read_bytes())
    assert store.missing("pooled") == [0, 1, 2]
    second.write_bytes(b"")
    third.write_bytes(first.read_bytes())
    assert store.missing("pooled") == [0, 1, 2]


def test_what_was_verified_is_not_read_again_and_every_change_of_a_file_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_all(tmp_path)
    read: list[str] = []
    # As if an hour had gone by since the shards were written.
    monkeypatch.setattr("imbvlm.features.feature_store.SETTLED_SECONDS", -3600.0)
    monkeypatch.setattr("imbvlm.features.feature_store.open_shard", lambda path: read.append(path) or open_shard(path))
    assert store.missing("pooled") == []
    assert len(read) == 3
    assert FeatureStore.open(str(tmp_path)).missing("pooled") == []
    assert len(read) == 3
    assert store.missing("pooled", full=True) == []
    assert len(read) == 6
    paths = [Path(store.shard_path("pooled", shard)) for shard in range(3)]
    flipped = bytearray(paths[0].read_bytes())
    flipped[flipped.index(numbers()[2].tobytes()) + 3] ^= 1
    before = paths[0].stat()
    paths[0].write_bytes(flipped)
    # Whoever sets a file's date back is seen by the time at which he did so.
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    paths[2].unlink()
    assert store.missing("pooled") == [0, 1, 2]
    (tmp_path / "pooled" / "verified.json").write_text("half of a", encoding="utf-8")
    assert store.missing("pooled") == [0, 1, 2]


def test_features_check_finds_what_no_date_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_all(tmp_path / "store")
    write_all(tmp_path / "other", "tokens")
    with pytest.raises(SystemExit) as ended:
        main(["features", "check", str(tmp_path)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("3 of 3 shards") == 2
    path = Path(store.shard_path("pooled", 1))
    path.write_bytes(path.read_bytes().replace(numbers()[5].tobytes(), numbers()[6].tobytes()))
    with pytest.raises(SystemExit) as ended:
        main(["features", "check", str(tmp_path / "store")])
    assert ended.value.code == 1
    assert "pooled: 3 of 3 shards, 0.2 kB when whole; 1 DAMAGED (1)" in capsys.readouterr().out


def test_a_file_that_changes_within_a_tick_of_its_check_is_checked_again(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    assert store.missing("pooled") == []
    path = Path(store.shard_path("pooled", 0))
    data, times = bytearray(path.read_bytes()), path.stat()
    data[data.index(numbers()[2].tobytes()) + 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.missing("pooled") == [0]


def test_no_damaged_byte_is_ever_read_as_a_feature(tmp_path: Path) -> None:
    store = write_all(tmp_path, bad=(5,))
    path, values = Path(store.shard_path("pooled", 1)), torch.from_numpy(numbers()[4:8])
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        data = bytearray(good)
        data[position] ^= 128
        path.write_bytes(data)
        if store.missing("pooled") == []:
            # Padding and Arrow's second copy of the schema hold nothing of ours.
            again = FeatureStore.open(str(tmp_path))
            assert torch.equal(as_tensor(again.mapped_shard("pooled", 1).values), values)
            assert again.quarantine == ((5, "truncated"),)


def test_damage_met_while_reading_is_a_sentence(tmp_path: Path) -> None:
    store = write_all(tmp_path)
    path = Path(store.shard_path("pooled", 1))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StoreError, match=r"shard-00001\.arrow.*Start again"):
        FeatureStore.open(str(tmp_path)).gather("pooled", np.array([5]))


def test_quarantined_rows_keep_their_reason_and_their_place(tmp_path: Path) -> None:
    write_all(tmp_path, bad=(0, 7))
    store = FeatureStore.open(str(tmp_path))
    assert store.quarantine == ((0, "truncated"), (7, "truncated"))
    assert np.flatnonzero(~store.ok).tolist() == [0, 7]
    assert len(store.ok) == 10


def test_an_output_that_is_being_added_does_not_disturb_readers(tmp_path: Path) -> None:
    store = write_all(tmp_path, bad=(1,))
    store.write("tokens", 0, numbers("tokens")[:4], [None, None, "gone", None])
    assert FeatureStore.open(str(tmp_path), ("pooled",)).quarantine == ((1, "truncated"),)


def test_values_beyond_half_precision_name_the_knob(tmp_path: Path) -> None:
    store, values = FeatureStore.create(str(tmp_path), LAYOUT), numbers().astype(np.float32)
    values[1, 0, 0] = 1e6
    with pytest.raises(StoreError, match=r"pooled must be finite .* 1e\+06. Set features.precision: float32"):
        store.write("pooled", 0, values[:4], [None] * 4)
    exact = FeatureStore.create(str(tmp_path / "float32"), replace(LAYOUT, precision="float32"))
    exact.write("pooled", 0, values[:4], [None] * 4)
    assert float(as_tensor(exact.mapped_shard("pooled", 0).values)[1, 0, 0]) == 1e6


def test_the_first_layout_of_a_folder_stays(tmp_path: Path) -> None:
    write_all(tmp_path)
    assert FeatureStore.create(str(tmp_path), replace(LAYOUT, rows_per_shard=7)).layout == LAYOUT
    with pytest.raises(StoreError, match="other rows or another encoder"):
        FeatureStore.create(str(tmp_path), replace(LAYOUT, digest="another"))
    (tmp_path / "store.json").write_text('{"digest": 1}')
    with pytest.raises(StoreError, match="not a feature store's description"):
        FeatureStore.open(str(tmp_path))


def test_the_key_changes_with_everything_that_changes_the_numbers() -> None:
    key = StoreKey("rows", "weights", {"image_size": 96, "resize": 1.1}, 1, "float16", "float32")
    others = [
        replace(key, rows="other"),
        replace(key, weights="other"),
        replace(key, preprocess={"image_size": 96, "resize": 1.2}),
        replace(key, num_views=2),
        replace(key, precision="float32"),
        replace(key, computed_in="bfloat16"),
        replace(key, token_pooling=2),
        replace(key, int8_tokens=True),
    ]
    assert len({key.digest, *(other.digest for other in others)}) == 9
    assert replace(key, preprocess={"resize": 1.1, "image_size": 96}).digest == key.digest


def test_shards_are_plain_arrow_files(tmp_path: Path) -> None:
    store = write_all(tmp_path, bad=(5,))
    with pa.memory_map(store.shard_path("pooled", 1)) as source:
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches == 1
        batch = reader.get_batch(0)
        assert batch.column("row").to_pylist() == [4, 4, 5, 5, 6, 6, 7, 7]
        assert batch.column("view").to_pylist() == [0, 1] * 4
        assert batch.column("reason").to_pylist() == [None, None, "truncated", "truncated", None, None, None, None]
        assert np.array_equal(np.array(batch.column("pooled").to_pylist(), np.float16), numbers()[4:8].reshape(8, 4))


@pytest.mark.usefixtures("copied")
def test_bytes_with_a_scale_are_off_by_half_a_scale_at_most(tmp_path: Path) -> None:
    layout = replace(LAYOUT, int8_tokens=True)
    # Channels of very different sizes, one of zeros; the second shard is larger than the first.
    values = numbers("tokens") * np.array([100.0, 1.0, 0.0, 0.001], np.float16)
    values[4:8] *= 8
    store = FeatureStore.create(str(tmp_path), layout)
    for shard in range(3):
        rows = layout.rows_of(shard)
        store.write("tokens", shard, values[rows.start : rows.stop], [None] * len(rows))
    opened = FeatureStore.open(str(tmp_path))
    assert opened.missing("tokens") == []
    assert as_tensor(opened.mapped_shard("tokens", 0).values).dtype == torch.int8
    assert layout.num_bytes("tokens") == values.size == LAYOUT.num_bytes("tokens") // 2
    assert layout.num_bytes("pooled") == LAYOUT.num_bytes("pooled")
    rows, views = np.array([9, 0, 4, 3, 9, 4]), np.array([1, 0, 1, 1, 0, 1])
    got = opened.gather("tokens", rows, views)
    assert got.dtype == torch.float16
    for row, found, expected in zip(rows, got.float().numpy(), values[rows, views], strict=True):
        of_shard = layout.rows_of(row // 4)
        scale = np.abs(values[of_shard.start : of_shard.stop]).max(axis=(0, 1, 2)).astype(np.float32) / 127
        # And half precision's own rounding of the product.
        assert (np.abs(found - expected.astype(np.float32)) <= 0.5 * scale + np.abs(found) / 2048 + 1e-7).all()
        assert (found[:, 2] == 0).all()
    assert opened.gather("tokens", np.array([], dtype=np.int64)).shape == (0, 3, 4)


def test_a_shard_of_bytes_proves_its_scale_too_and_comes_out_the_same_again(tmp_path: Path) -> None:
    layout = replace(LAYOUT, int8_tokens=True)
    store = write_all(tmp_path, "tokens", layout)
    path = Path(store.shard_path("tokens", 1))
    data = path.read_bytes()
    store.write("tokens", 1, numbers("tokens")[4:8], [None] * 4)
    assert path.read_bytes() == data
    scale = np.abs(numbers("tokens")[4:8]).max(axis=(0, 1, 2)).astype(np.float32) / np.float32(127)
    damaged = bytearray(data)
    damaged[data.index(scale.tobytes()) + 2] ^= 1
    path.write_bytes(damaged)
    assert store.missing("tokens", full=True) == [1]
    assert write_all(tmp_path / "plain", "tokens").missing("tokens") == []
    # A shard of half floats is no shard of a store of bytes.
    path.write_bytes(Path(write_all(tmp_path / "plain", "tokens").shard_path("tokens", 1)).read_bytes())
    assert store.missing("tokens", full=True) == [1]


def test_bytes_are_refused_where_half_precision_would_be(tmp_path: Path) -> None:
    store = FeatureStore.create(str(tmp_path), replace(LAYOUT, int8_tokens=True))
    with pytest.raises(StoreError, match="must be finite in float16"):
        store.write("tokens", 0, np.full((4, 2, 3, 4), 1e5, np.float32), [None] * 4)


BIG = StoreLayout("digest", 400, 1, 400, "float16", {"pooled": (4096,)})


def _write_for_ever(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    while True:
        store, values = FeatureStore.create(folder, BIG), numbers(layout=BIG)
        store.write("pooled", 0, values, [None] * 400)
        ready.set()


def test_two_writers_and_a_kill_never_leave_half_a_shard(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writers = [context.Process(target=_write_for_ever, args=(str(tmp_path), ready)) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        assert ready.wait(60)
        store = FeatureStore.open(str(tmp_path))
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert store.missing("pooled") == []
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    assert store.missing("pooled") == []
    assert np.array_equal(FeatureStore.open(str(tmp_path)).mapped_shard("pooled", 0).values, numbers(layout=BIG))


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    write_all(tmp_path)
    old, new = tmp_path / "pooled" / ".shard-00000.arrow.abc", tmp_path / "pooled" / ".shard-00000.arrow.def"
    old.write_bytes(b"half"), new.write_bytes(b"half")
    os.utime(old, (1, 1))
    FeatureStore.create(str(tmp_path), LAYOUT)
    assert (old.exists(), new.exists()) == (False, True)


@dataclass(frozen=True)
class LaterKey(StoreKey):
    patches: int = field(default=0, metadata=ADDED_LATER)


def test_a_part_of_the_key_that_was_added_later_counts_only_with_another_value_than_its_default() -> None:
    key = StoreKey("rows", "weights", {"size": 8}, 1, "float16", "float32")
    later = LaterKey("rows", "weights", {"size": 8}, 1, "float16", "float32")
    assert later.digest == key.digest
    assert replace(later, patches=1).digest != key.digest
