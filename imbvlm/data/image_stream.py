"""Rows of a manifest as a stream of images: which rows, in which order, and how each image is changed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imbvlm.base import storage
from imbvlm.data.images.augmentation import Augmentation
from imbvlm.data.images.decode_budget import DecodeBudget
from imbvlm.data.images.decoding import Pixels
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import LazyRows, Rows

_REMOTE_THREADS = 16
# Batches read ahead of the current one.
READ_AHEAD = 2
MAX_THREADS = 16


class ImageBatch(NamedTuple):
    """Images (B, 3, S, S) in the plan's order; `ok` (B,) is False for a bad image, which is black."""

    images: Pixels
    rows: Rows
    ok: npt.NDArray[np.bool_]
    reasons: tuple[str | None, ...]


@dataclass(frozen=True)
class StreamPlan:
    """One worker's part of an epoch: manifest rows (N,) by position in the epoch, and its batches of positions.

    Random changes of an image come from (seed, epoch, position), so they don't depend on the number of workers.
    `progress` through training is from 0 to 1. Without `augmentation` an image becomes its evaluation crop `view`.
    """

    rows: Rows
    batches: Sequence[Rows]
    preprocess: Preprocess
    augmentation: Augmentation | None
    seed: int
    epoch: int
    progress: float = 0.0
    view: int = 0

    def blocks(self, manifest: Manifest) -> list[StreamBlock]:
        """The batches as blocks for `load_batch`; without the first ones a stream resumes within an epoch."""
        common = replace(self, rows=self.rows[:0], batches=())
        return [
            StreamBlock(
                positions=np.asarray(positions, dtype=np.int64),
                rows=self.rows[positions],
                images=LazyRows(manifest.table, self.rows[positions]),
                plan=common,
            )
            for positions in self.batches
        ]


@dataclass(frozen=True)
class StreamBlock:
    """One batch of a plan: positions (B,) in the epoch, rows (B,) of the manifest, and where their images are.

    `plan` has how they are read, without its own rows and batches.
    """

    positions: Rows
    rows: Rows
    images: LazyRows
    plan: StreamPlan


def map_rows(load: Callable[[int], str | None], uris: Sequence[str | None]) -> list[str | None]:
    """Call `load` with each row's number: in turn for local files, in parallel for objects.

    Reading a local file takes less time than decoding it, so that threads would gain nothing.
    """
    if all(uri is None or storage.is_local(uri) for uri in uris):
        return [load(number) for number in range(len(uris))]
    with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
        return list(pool.map(load, range(len(uris))))


def read_images(
    uris: Sequence[str | None],
    contents: Sequence[bytes | None],
    use: Callable[[int, bytes], object],
    budget: DecodeBudget | None = None,
) -> list[str | None]:
    """Fetch the files of rows for `use(number, content)`, which decodes them; returns the reason of each bad image.

    `contents` has the bytes of embedded images. Calls in parallel threads share a `budget`. Raises StorageError.
    """
    shared = DecodeBudget() if budget is None else budget
    return map_rows(lambda n: shared.read(uris[n], contents[n], lambda content: use(n, content)), uris)


def load_batch(block: StreamBlock, budget: DecodeBudget | None = None) -> ImageBatch:
    """Fetch, decode and change one batch's images; a bad one is black, with its reason. Raises StorageError.

    Batches that are loaded in parallel share a `budget`.
    """
    plan, preprocess, augmentation = block.plan, block.plan.preprocess, block.plan.augmentation
    uris, contents = block.images.read()
    side = preprocess.image_size
    min_crop = 1.0 if augmentation is None else augmentation.min_crop
    images = np.zeros((len(uris), 3, side, side), dtype=np.uint8)

    def change(number: int, data: bytes) -> None:
        image = preprocess.decode(data, min_crop)
        if augmentation is None:
            preprocess.apply(image, plan.view, out=images[number])
        else:
            rng = np.random.default_rng((plan.seed, plan.epoch, int(block.positions[number])))
            augmentation.apply(image, preprocess, rng, plan.progress, out=images[number])

    reasons = tuple(read_images(uris, contents, change, budget or DecodeBudget(_REMOTE_THREADS)))
    ok = np.array([reason is None for reason in reasons], dtype=bool)
    return ImageBatch(images, block.rows, ok, reasons)


# A plan's batches in order, of rows of the manifest at a location.
ImageStream = Callable[[str, StreamPlan], Iterator[ImageBatch]]


@dataclass(frozen=True)
class ImageRows:
    """Images with labels (N,), each in `num_views` crops, and with `groups` (N,) where the manifest has some.

    `rows` (N,) count within the official split, as in its store; `manifest_rows` (N,) within the manifest.
    """

    manifest: str
    rows: Rows
    manifest_rows: Rows
    labels: Rows
    num_views: int = 1
    groups: Rows | None = None

    def __len__(self) -> int:
        return len(self.rows)


@lru_cache(maxsize=2)
def cached_manifest(location: str) -> Manifest:
    """A manifest, read once by a process."""
    return Manifest.read(location)


def stream_in_threads(location: str, plan: StreamPlan) -> Iterator[ImageBatch]:
    """A plan's batches through threads of this process, some read ahead; errors are raised in their turn."""
    manifest = cached_manifest(location)
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    budget = DecodeBudget(num_threads)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="read-images") as pool:
        pending = deque[list[Future[ImageBatch]]]()
        try:
            for positions in plan.batches:
                parts = [part for part in np.array_split(positions, num_threads) if len(part)] or [positions]
                blocks = replace(plan, batches=parts).blocks(manifest)
                pending.append([pool.submit(load_batch, block, budget) for block in blocks])
                if len(pending) > READ_AHEAD:
                    yield _join(pending.popleft())
            while pending:
                yield _join(pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _join(futures: Sequence[Future[ImageBatch]]) -> ImageBatch:
    images, rows, ok, reasons = zip(*(future.result() for future in futures), strict=True)
    return ImageBatch(np.concatenate(images), np.concatenate(rows), np.concatenate(ok), tuple(chain(*reasons)))
