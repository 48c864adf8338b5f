"""Validation logits that a trial leaves for what is chosen after training: those of its best epoch and of its last."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from imbvlm.base import storage
from imbvlm.features.trial_data import RowSource
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.worker_group import WorkerGroup

# Of one epoch's logits in half precision; a trial with more of them keeps none.
MAX_BYTES = 512 * 2**20
# A trial that learns in every epoch doesn't write in every epoch.
WRITE_SECONDS = 30.0
_LOWEST = torch.finfo(torch.float16).min


class EpochValLogits:
    """One epoch's validation logits (N, C) as they are computed, in half precision and relative to each row's largest.

    So what decides between classes is exact, however large a cosine classifier's logits are; no softmax, adjustment or
    mixture hangs on what is taken from a whole row.
    """

    def __init__(self, num_rows: int, num_classes: int) -> None:
        self._values = torch.zeros(num_rows, num_classes, dtype=torch.float16)
        self._seen = torch.zeros(num_rows, dtype=torch.int64)

    @staticmethod
    def fits(num_rows: int, num_classes: int) -> bool:
        """Whether so many logits are kept at all."""
        return 0 < 2 * num_rows * num_classes <= MAX_BYTES

    def add(self, rows: npt.NDArray[np.int64], logits: Tensor) -> None:
        """The logits (B, C) of some rows (B,)."""
        index = torch.from_numpy(rows)
        relative = logits.float() - logits.float().amax(dim=1, keepdim=True)
        self._values[index] = relative.clamp(min=_LOWEST).to("cpu", torch.float16)
        self._seen[index] = 1

    def gathered(self, world: WorkerGroup) -> Tensor:
        """All rows' logits (N, C); NaN for those that no worker has seen. Every worker must call it."""
        values, seen = self._values, self._seen
        if world.world_size > 1:
            values, seen = world.sum(values.float()).half(), world.sum(seen)
        values[seen == 0] = torch.nan
        return values


@dataclass(frozen=True)
class SavedValLogits:
    """What a trial left: logits (N, C) of its last epoch, if it came to its end, and of its best, in half precision.

    `targets` (N,) are the rows' classes, `class_counts` and `split_counts` (C,) those of training.
    """

    epochs: Mapping[str, int]
    logits: Mapping[str, Tensor]
    targets: Tensor
    stats: ClassStats

    def best(self) -> Tensor | None:
        """Of the best epoch by the objective."""
        return self.logits.get("best")

    def last(self) -> Tensor | None:
        """Of the last epoch; None for a trial that was stopped."""
        if self.epochs.get("last") is not None and self.epochs["last"] == self.epochs.get("best"):
            return self.best()
        return self.logits.get("last")


def read_logits(uri: str) -> SavedValLogits | None:
    """What a trial left at a location; None where there is nothing whole."""
    if not storage.exists(uri):
        return None
    try:
        tensors = load_safetensors(storage.read_bytes(uri))
    except SafetensorError:
        return None
    counts = [tensors.pop(name).numpy() for name in ("class_counts", "split_counts")]
    targets, (best, last) = tensors.pop("targets").long(), tensors.pop("epochs").tolist()
    epochs = {name: epoch for name, epoch in (("best", best), ("last", last)) if epoch > 0}
    return SavedValLogits(epochs, tensors, targets, ClassStats.from_counts(*counts))


def file_bytes(num_rows: int, num_classes: int) -> int:
    """The most that one trial leaves of so many rows and classes: two epochs' logits, and what they are of."""
    if not EpochValLogits.fits(num_rows, num_classes):
        return 0
    return 4 * num_rows * num_classes + 4 * num_rows + 16 * num_classes


class ValLogitsWriter:
    """Writes a trial's validation logits: a new best one at most so often, everything when the trial ends.

    What an earlier run of the same trial has left goes on to count.
    """

    def __init__(
        self, uri: str, val: RowSource, stats: ClassStats, before: SavedValLogits | None, seconds: float
    ) -> None:
        self._uri, self._seconds = uri, seconds
        self._fixed = {
            "targets": torch.from_numpy(val.labels.astype(np.int32)),
            # Copies: the two can be one array, which safetensors refuses.
            "class_counts": torch.tensor(stats.counts),
            "split_counts": torch.tensor(stats.split_counts),
        }
        self._epochs = {} if before is None else dict(before.epochs)
        self._logits = {} if before is None else dict(before.logits)
        self._written_at, self._is_dirty = -seconds, False

    @staticmethod
    def open(uri: str, val: RowSource, stats: ClassStats, seconds: float = WRITE_SECONDS) -> ValLogitsWriter:
        """Go on with what an earlier run of the trial has left, and write at most every `seconds`."""
        return ValLogitsWriter(uri, val, stats, read_logits(uri), seconds)

    def keep(self, epoch: int, logits: Tensor, *, is_best: bool, is_last: bool) -> None:
        """Take an epoch's logits (N, C)."""
        for name, wanted in (("best", is_best), ("last", is_last)):
            if wanted:
                self._epochs[name], self._logits[name], self._is_dirty = epoch, logits, True
        if is_last or time.monotonic() - self._written_at >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write what hasn't been written yet."""
        if not self._is_dirty:
            return
        same = self._epochs.get("last") == self._epochs.get("best")
        kept = {name: value for name, value in self._logits.items() if not (name == "last" and same)}
        epochs = torch.tensor([self._epochs.get("best", 0), self._epochs.get("last", 0)])
        storage.write_bytes(self._uri, save_safetensors({**kept, **self._fixed, "epochs": epochs}))
        self._written_at, self._is_dirty = time.monotonic(), False
