"""What a tower worker stores, and that the tower goes on while a block is written; without Ray."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from imbvlm.features.encoder_worker import EncoderWorker
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.image_blocks import LoadedBlock
from imbvlm.features.shard_file import map_shard, open_shard
from imbvlm.features.store_layout import StoreError, StoreLayout

LAYOUT = StoreLayout("digest", "float16", {"pooled": (2,)})


def worker(forward_images: Callable[..., Any]) -> EncoderWorker:
    made = EncoderWorker(SimpleNamespace(device=torch.device("cpu"), forward_images=forward_images))
    made.batch_size = 2
    return made


def block(folder: Path, number: int) -> LoadedBlock:
    """Three images of a split's six, all new, the last of them bad."""
    images, rows = np.full((3, 3, 4, 4), number + 1, np.uint8), 3 * number + np.arange(3)
    contents, views = np.full((3, 16), number, np.uint8), np.zeros(3, np.int64)
    contents[:, 0] = rows
    return LoadedBlock(
        str(folder), 0, ("pooled",), rows, contents, [None, None, "truncated"], images, np.arange(3), views, 3
    )


def stored(folder: Path) -> dict[int, float]:
    """Each image's first number, by its row."""
    index = FeatureStore.open(str(folder)).index("pooled")
    shards = [map_shard(open_shard(str(folder / "pooled" / name)), LAYOUT, "pooled") for name in index.shards]
    places = zip(index.keys, index.shard, index.entry, strict=True)
    return {bytes(key.ljust(18, b"\0"))[0]: float(shards[shard].values[entry, 0]) for key, shard, entry in places}


def mean_pixels(images: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(pooled=images.float().mean(dim=(1, 2, 3))[:, None].repeat(1, 2))


def test_the_next_block_is_computed_while_one_is_written_and_each_is_told_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FeatureStore.create(str(tmp_path), LAYOUT)
    second, append = threading.Event(), FeatureStore.append

    def forward(images: torch.Tensor) -> SimpleNamespace:
        if int(images.max()) == 2:
            second.set()
        return mean_pixels(images)

    def slow(self: Any, output: str, contents: np.ndarray, *more: Any) -> str:
        # The first block's shard waits for the second block's turn in the tower.
        assert second.wait(60)
        if contents[0, 0] == 0:
            raise StoreError("the first can't be written")
        return append(self, output, contents, *more)

    monkeypatch.setattr(FeatureStore, "append", slow)
    tower = worker(forward)
    with ThreadPoolExecutor(2) as pool:
        broken, good = (pool.submit(tower, block(tmp_path, shard)) for shard in (0, 1))
        with pytest.raises(StoreError, match="the first"):
            broken.result()
        summary = good.result()
    assert (summary.rows.tolist(), summary.num_images, summary.bad) == ([3, 4, 5], 3, {5: "truncated"})
    assert [summary.written["pooled"]] == list(FeatureStore.open(str(tmp_path)).index("pooled").shards)
    assert stored(tmp_path) == {3: 2, 4: 2, 5: 0}


@pytest.mark.parametrize("reason", [None, "no C compiler"])
def test_a_compiled_tower_sees_batches_of_one_size(
    tmp_path: Path, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size is compiled anew, which takes longer than what it saves."""
    monkeypatch.setattr("imbvlm.features.encoder_worker.BATCH_ON_CPU", 2)
    FeatureStore.create(str(tmp_path), LAYOUT)
    compiled, seen = [], []

    def forward(images: torch.Tensor) -> SimpleNamespace:
        seen.append(len(images))
        return mean_pixels(images)

    def compile_for(batch_size: int) -> str | None:
        compiled.append(batch_size)
        return reason

    encoder = SimpleNamespace(device=torch.device("cpu"), forward_images=forward, compile=compile_for)
    summary = EncoderWorker(encoder, compile_for=3)(block(tmp_path, 0))
    assert compiled == [2]
    assert seen == ([2, 2] if reason is None else [2, 1])
    assert summary.not_compiled == reason
    assert stored(tmp_path) == {0: 1, 1: 1, 2: 0}


def test_one_block_at_a_time_goes_through_the_tower(tmp_path: Path) -> None:
    FeatureStore.create(str(tmp_path), LAYOUT)
    inside = threading.Lock()

    def forward(images: torch.Tensor) -> SimpleNamespace:
        assert inside.acquire(blocking=False), "two blocks at once would not fit on a GPU"
        threading.Event().wait(0.01)
        inside.release()
        return mean_pixels(images)

    tower = worker(forward)
    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(tower, [block(tmp_path, shard) for shard in (0, 1)]))
    assert [summary.rows[0] for summary in summaries] == [0, 3]
    assert len(stored(tmp_path)) == 6
