"""Rows of a manifest as images to train on or to evaluate, and their way into memory in this process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from imbvlm.data.decode_budget import DecodeBudget
from imbvlm.data.manifest import Manifest
from imbvlm.data.streaming import ImageBatch, StreamPlan, load_batch
from imbvlm.data.table import Rows

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
def opened_manifest(location: str) -> Manifest:
    """A manifest, read once by a process."""
    return Manifest.read(location)


def stream_in_threads(location: str, plan: StreamPlan) -> Iterator[ImageBatch]:
    """A plan's batches through threads of this process, some ahead of the one in use; errors come in their turn."""
    manifest = opened_manifest(location)
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
