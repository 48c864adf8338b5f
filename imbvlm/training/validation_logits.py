"""Validation logits of a trial's best and last epoch, for selections after training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from imbvlm.base import storage
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.logits import floored_counts
from imbvlm.longtail.worker_group import WorkerGroup

# Limit on one epoch's logits in half precision; a trial with more saves none.
MAX_BYTES = 512 * 2**20
# Pause between writes of a trial that improves in every epoch.
WRITE_SECONDS = 30.0
# The file of a refit's logits of official validation rows, in its folder.
VAL_LOGITS_FILE = "val_logits.safetensors"
_LOWEST = torch.finfo(torch.float16).min


class RowLogits:
    """Collects logits (N, C) of a split's rows in half precision, relative to each row's largest.

    Differences between likely classes are thus exact, however large a cosine classifier's logits are. No softmax,
    adjustment or mixture depends on a constant that is subtracted from a whole row.
    """

    def __init__(self, num_rows: int, num_classes: int) -> None:
        self._values = torch.zeros(num_rows, num_classes, dtype=torch.float16)
        self._seen = torch.zeros(num_rows, dtype=torch.int64)

    @staticmethod
    def fits(num_rows: int, num_classes: int) -> bool:
        """Whether the logits are within MAX_BYTES."""
        return 0 < 2 * num_rows * num_classes <= MAX_BYTES

    def add(self, rows: npt.NDArray[np.int64], logits: Tensor) -> None:
        """Add the logits (B, C) of rows (B,)."""
        index = torch.from_numpy(rows)
        relative = logits.float() - logits.float().amax(dim=1, keepdim=True)
        self._values[index] = relative.clamp(min=_LOWEST).to("cpu", torch.float16)
        self._seen[index] = 1

    def gathered(self, workers: WorkerGroup) -> Tensor:
        """All rows' logits (N, C), NaN for rows that no worker has added. Every worker must call it."""
        values, seen = self._values, self._seen
        if workers.world_size > 1:
            values, seen = workers.sum(values.float()).half(), workers.sum(seen)
        values[seen == 0] = torch.nan
        return values


@dataclass(frozen=True)
class SavedValLogits:
    """A trial's saved logits (N, C) in half precision: of its best epoch, and of its last if it was completed.

    `targets` (N,) are the rows' classes, and `folds` (N,) the folds that scored them, all 0 without folds. `stats` has
    the class counts of each fold's training. Official rows, which the models of all K folds have scored, are part K.
    `groups` (N,) are the rows' groups, None where the manifest has none.
    """

    epochs: Mapping[str, int]
    logits: Mapping[str, Tensor]
    targets: Tensor
    folds: Tensor
    stats: tuple[ClassStats, ...]
    groups: Tensor | None = None

    def class_counts(self, rows: Tensor) -> Tensor:
        """The class counts with which the selected `rows` were trained: of all, (C,), or with folds of each, (N, C).

        Those of official rows are geometric means over the folds: the mean of logits, each adjusted with its own
        counts, is the mean logit adjusted with these.
        """
        counts = torch.stack([floored_counts(stats.counts, torch.device("cpu")) for stats in self.stats])
        if len(self.stats) == 1:
            return counts[0]
        return torch.cat([counts, counts.log().mean(dim=0, keepdim=True).exp()])[self.folds[rows]]

    def best(self) -> Tensor | None:
        """Logits of the best epoch by the objective."""
        return self.logits.get("best")

    def last(self) -> Tensor | None:
        """Logits of the last epoch; None for a trial that was stopped."""
        if self.epochs.get("last") is not None and self.epochs["last"] == self.epochs.get("best"):
            return self.best()
        return self.logits.get("last")


def read_logits(uri: str) -> SavedValLogits | None:
    """A trial's saved logits; None where there is no intact file."""
    if not storage.exists(uri):
        return None
    try:
        tensors = load_safetensors(storage.read_bytes(uri))
    except SafetensorError:
        return None
    class_counts, split_counts = tensors.pop("class_counts"), tensors.pop("split_counts").numpy()
    targets, (best, last) = tensors.pop("targets").long(), tensors.pop("epochs").tolist()
    folds, groups = tensors.pop("folds", torch.zeros_like(targets)).long(), tensors.pop("groups", None)
    epochs = {name: epoch for name, epoch in (("best", best), ("last", last)) if epoch > 0}
    by_fold = class_counts.view(-1, len(split_counts)).numpy()
    stats = tuple(ClassStats.from_counts(counts, split_counts) for counts in by_fold)
    return SavedValLogits(epochs, tensors, targets, folds, stats, groups)


def file_bytes(num_rows: int, num_classes: int, num_folds: int = 1, *, has_groups: bool = False) -> int:
    """Limit on the size of one trial's file: two epochs' logits, targets, groups, folds and counts."""
    if not RowLogits.fits(num_rows, num_classes):
        return 0
    of_rows = (4 if num_folds == 1 else 8) + (8 if has_groups else 0)
    return 4 * num_rows * num_classes + of_rows * num_rows + 8 * (1 + num_folds) * num_classes


class ValLogitsWriter:
    """Writes a trial's validation logits: a new best at most every `seconds`, everything when the trial ends.

    The file of an earlier run of the same trial counts as its start.
    """

    def __init__(self, uri: str, data: Sequence[TrialData], before: SavedValLogits | None, seconds: float) -> None:
        self._uri, self._seconds = uri, seconds
        scored = [fold.val for fold in data] + ([] if data[0].official is None else [data[0].official])
        labels = [rows.labels.astype(np.int32) for rows in scored]
        counts = [fold.class_stats.counts for fold in data]
        self._fixed = {
            "targets": torch.from_numpy(np.concatenate(labels)),
            # Copied, since both may be the same array, which safetensors rejects.
            "class_counts": torch.tensor(counts[0] if len(data) == 1 else np.stack(counts)),
            "split_counts": torch.tensor(data[0].class_stats.split_counts),
        }
        groups = [rows.groups for rows in scored if rows.groups is not None]
        if groups:
            self._fixed["groups"] = torch.from_numpy(np.concatenate(groups))
        if len(data) > 1:
            self._fixed["folds"] = torch.arange(len(labels), dtype=torch.int32).repeat_interleave(
                torch.tensor([len(of_part) for of_part in labels])
            )
        self._epochs = {} if before is None else dict(before.epochs)
        self._logits = {} if before is None else dict(before.logits)
        self._written_at, self._is_dirty = -seconds, False

    @staticmethod
    def open(uri: str, data: Sequence[TrialData], seconds: float = WRITE_SECONDS) -> ValLogitsWriter:
        """Go on with what an earlier run of the trial has left, and write at most every `seconds`.

        `data` is the trial's, or that of each of its folds.
        """
        return ValLogitsWriter(uri, data, read_logits(uri), seconds)

    def keep(self, epoch: int, logits: Tensor, *, is_best: bool, is_last: bool) -> None:
        """Keep an epoch's logits (N, C) as the best, the last, or both."""
        for name, is_kept in (("best", is_best), ("last", is_last)):
            if is_kept:
                self._epochs[name], self._logits[name], self._is_dirty = epoch, logits, True
        if is_last or time.monotonic() - self._written_at >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write the logits that are not written yet."""
        if not self._is_dirty:
            return
        is_same = self._epochs.get("last") == self._epochs.get("best")
        logits = {name: value for name, value in self._logits.items() if not (name == "last" and is_same)}
        epochs = torch.tensor([self._epochs.get("best", 0), self._epochs.get("last", 0)])
        storage.write_bytes(self._uri, save_safetensors({**logits, **self._fixed, "epochs": epochs}))
        self._written_at, self._is_dirty = time.monotonic(), False
