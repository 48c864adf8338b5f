"""Batches on their way to the device: the next ones are gathered while one is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imbvlm.features.examples import Examples
from imbvlm.models.encoder_info import OutputName

Index = npt.NDArray[np.int64]

# Batches gathered ahead of the one in use.
READ_AHEAD = 2


class Batch(NamedTuple):
    """Features (B, ...) as stored, and labels (B,)."""

    features: Tensor
    labels: Tensor


def load_batch(
    examples: Examples, output: OutputName, index: Index, views: Index | None, device: torch.device
) -> Batch:
    """Gather a batch in main memory; pinned where it goes on to a GPU, so that the copy doesn't wait."""
    features = examples.batch(output, index, views)
    labels = torch.from_numpy(examples.labels[index])
    if device.type == "cuda":
        return Batch(features.pin_memory(), labels.pin_memory())
    return Batch(features, labels)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch as stored (half precision travels), and widen it to float32 where it arrived."""
    features = batch.features.to(device, non_blocking=True)
    return Batch(features.float(), batch.labels.to(device, non_blocking=True))


def read_ahead(load: Callable[[Index], Batch], batches: Sequence[Index]) -> Iterator[Batch]:
    """load(batch) for each of the batches in order, some of them ahead in a thread.

    At most READ_AHEAD + 1 loaded batches exist at once; an error in `load` is raised here, in its turn; closing the
    generator ends the thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        pending: deque[Future[Batch]] = deque()
        for batch in batches:
            pending.append(pool.submit(load, batch))
            if len(pending) > READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
