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
from imbvlm.features.store_layout import StoreError, StoreLayout

LAYOUT = StoreLayout("digest", 6, 1, 3, "float16", {"pooled": (2,)})


def worker(forward_images: Callable[..., Any]) -> EncoderWorker:
    made = EncoderWorker(SimpleNamespace(device=torch.device("cpu"), forward_images=forward_images))
    made.batch_size = 2
    return made


def block(folder: Path, shard: int) -> LoadedBlock:
    images = np.full((3, 3, 4, 4), shard + 1, np.uint8)
    return LoadedBlock(str(folder), shard, ("pooled",), images, [None, None, "truncated"])


def mean_pixels(images: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(pooled=images.float().mean(dim=(1, 2, 3))[:, None].repeat(1, 2))


def test_the_next_block_is_computed_while_one_is_written_and_each_is_told_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FeatureStore.create(str(tmp_path), LAYOUT)
    second, write = threading.Event(), FeatureStore.write

    def forward(images: torch.Tensor) -> SimpleNamespace:
        if int(images.max()) == 2:
            second.set()
        return mean_pixels(images)

    def slow(self: Any, output: str, shard: int, values: np.ndarray, reasons: list[str | None]) -> int:
        # The first block's shard waits for the second block's turn in the tower.
        assert second.wait(60)
        if shard == 0:
            raise StoreError("the first can't be written")
        return write(self, output, shard, values, reasons)

    monkeypatch.setattr(FeatureStore, "write", slow)
    tower = worker(forward)
    with ThreadPoolExecutor(2) as pool:
        broken, good = (pool.submit(tower, block(tmp_path, shard)) for shard in (0, 1))
        with pytest.raises(StoreError, match="the first"):
            broken.result()
        summary = good.result()
    assert (summary.shard, summary.num_images, summary.bad) == (1, 3, {5: "truncated"})
    store = FeatureStore.open(str(tmp_path))
    assert store.missing("pooled") == [0]
    assert summary.written == {"pooled": store.present("pooled")[1].size}
    assert store.mapped_shard("pooled", 1).values.flatten().tolist() == [2, 2, 2, 2, 0, 0]


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
    store = FeatureStore.open(str(tmp_path))
    assert store.mapped_shard("pooled", 0).values.flatten().tolist() == [1, 1, 1, 1, 0, 0]


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
    assert [summary.shard for summary in summaries] == [0, 1]
    assert FeatureStore.open(str(tmp_path)).missing("pooled") == []
