"""Rows of a manifest as a stream of images: which rows, in which order, and how each image is changed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from imbvlm.base import storage
from imbvlm.data.images.augmentation import Augmentation
from imbvlm.data.images.decode_budget import DecodeBudget
from imbvlm.data.images.decoding import ImageError, Pixels
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import LazyRows, Rows

_REMOTE_THREADS = 16


class ImageBatch(NamedTuple):
    """Images (B, 3, S, S) in the plan's order; `ok` (B,) is False where an image couldn't be had, and it is black."""

    images: Pixels
    rows: Rows
    ok: npt.NDArray[np.bool_]
    reasons: tuple[str | None, ...]


@dataclass(frozen=True)
class StreamPlan:
    """One worker's share of an epoch: manifest rows (N,) by position in the epoch, and its batches of positions.

    Random changes of an image come from (seed, epoch, position), so they don't depend on how many workers there are.
    `progress` through training is from 0 to 1. `augmentation` None gives the evaluation crop.
    """

    rows: Rows
    batches: Sequence[Rows]
    preprocess: Preprocess
    augmentation: Augmentation | None
    seed: int
    epoch: int
    progress: float = 0.0
    # Of the preprocessing's crops, where there is no augmentation.
    view: int = 0

    def blocks(self, manifest: Manifest) -> list[dict[str, Any]]:
        """What `load_batch` takes, for each batch; to go on in the middle of an epoch leave out the batches before."""
        common = {
            "preprocess": self.preprocess.to_dict(),
            "augmentation": None if self.augmentation is None else self.augmentation.to_dict(),
            "seed": self.seed,
            "epoch": self.epoch,
            "progress": self.progress,
            "view": self.view,
        }
        return [
            {
                **common,
                "positions": np.asarray(positions, dtype=np.int64),
                "rows": self.rows[positions],
                "images": LazyRows(manifest.table, self.rows[positions]),
            }
            for positions in self.batches
        ]


def map_rows(load: Callable[[int], str | None], uris: Sequence[str | None]) -> list[str | None]:
    """Call `load` for each row's number: one after another for local files, which are read faster than decoded, and
    side by side for objects elsewhere, which are waited for."""
    if all(uri is None or storage.is_local(uri) for uri in uris):
        return [load(number) for number in range(len(uris))]
    with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
        return list(pool.map(load, range(len(uris))))


def load_batch(block: dict[str, Any], budget: DecodeBudget | None = None) -> dict[str, Any]:
    """Fetch, decode and change one batch's images; a bad one is black, with its reason. Raises StorageError.

    Batches that are loaded side by side share a `budget`.
    """
    shared = DecodeBudget(_REMOTE_THREADS) if budget is None else budget
    preprocess = Preprocess.from_dict(block["preprocess"])
    augmentation = None if block["augmentation"] is None else Augmentation.from_dict(block["augmentation"])
    (uris, contents), positions = block["images"].read(), block["positions"]
    side = preprocess.image_size
    least_crop = 1.0 if augmentation is None else augmentation.least_crop
    images = np.zeros((len(uris), 3, side, side), dtype=np.uint8)

    def load(number: int) -> str | None:
        try:
            with shared.fetched(uris[number], contents[number]) as data:
                change(preprocess.decode(data, least_crop), number)
        except ImageError as error:
            return error.reason
        return None

    def change(picture: Image.Image, number: int) -> None:
        if augmentation is None:
            preprocess.apply(picture, block["view"], out=images[number])
        else:
            rng = np.random.default_rng((block["seed"], block["epoch"], int(positions[number])))
            augmentation.apply(picture, preprocess, rng, block["progress"], out=images[number])

    reasons = tuple(map_rows(load, uris))
    ok = np.array([reason is None for reason in reasons], dtype=bool)
    return {"images": images, "rows": block["rows"], "ok": ok, "reasons": reasons}


# Batches read ahead of the one in use.
READ_AHEAD = 2
MAX_THREADS = 16

# The batches of a plan in their order, of rows of the manifest at a location.
ImageStream = Callable[[str, StreamPlan], Iterator[ImageBatch]]


@dataclass(frozen=True)
class ImageRows:
    """Images with labels (N,); `rows` (N,) count in their official split, as in its store, `places` in the manifest."""

    manifest: str
    rows: Rows
    places: Rows
    labels: Rows
    num_views: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def views(self) -> int:
        """How many crops there are of each."""
        return self.num_views


@lru_cache(maxsize=2)
def cached_manifest(location: str) -> Manifest:
    """A manifest, read once by a process."""
    return Manifest.read(location)


def stream_in_threads(location: str, plan: StreamPlan) -> Iterator[ImageBatch]:
    """A plan's batches through threads of this process, some ahead of the one in use; errors come in their turn."""
    manifest = cached_manifest(location)
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    budget = DecodeBudget(num_threads)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="read-images") as pool:
        waiting: deque[list[Future[dict[str, Any]]]] = deque()
        try:
            for positions in plan.batches:
                parts = replace(plan, batches=_parts(positions, num_threads)).blocks(manifest)
                waiting.append([pool.submit(load_batch, part, budget) for part in parts])
                if len(waiting) > READ_AHEAD:
                    yield _joined(waiting.popleft())
            while waiting:
                yield _joined(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _parts(positions: Rows, count: int) -> Sequence[Rows]:
    return [part for part in np.array_split(positions, count) if len(part)] or [positions]


def _joined(futures: Sequence[Future[dict[str, Any]]]) -> ImageBatch:
    parts = [future.result() for future in futures]
    images, rows, ok = (np.concatenate([part[key] for part in parts]) for key in ("images", "rows", "ok"))
    return ImageBatch(images, rows, ok, tuple(reason for part in parts for reason in part["reasons"]))
