"""Metrics from counters that add up over batches and workers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.logits import at_least_float32
from imbvlm.longtail.worker_group import WorkerGroup

NUM_CALIBRATION_BINS = 15


class ClassCounters:
    """Rows, correct rows and predictions of each class (C,), and the summed cross entropy."""

    def __init__(self, num_classes: int) -> None:
        self.correct = torch.zeros(num_classes, dtype=torch.int64)
        self.total = torch.zeros(num_classes, dtype=torch.int64)
        self.predicted = torch.zeros(num_classes, dtype=torch.int64)
        self.nll = torch.zeros((), dtype=torch.float64)

    @property
    def num_classes(self) -> int:
        return len(self.total)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch of logits (B, C) and targets (B,).

        The lowest of the classes with the largest logit is the prediction. A row with a NaN is wrong, predicts no class
        and makes the loss NaN.
        """
        self._to(logits.device)
        classes, valid = predictions(logits)
        # index_add_ rather than bincount or a mask of rows, whose sizes the host would have to wait for.
        self.total.index_add_(0, targets, torch.ones_like(targets))
        self.predicted.index_add_(0, classes, valid.long())
        self.correct.index_add_(0, targets, (valid & (classes == targets)).long())
        losses = F.cross_entropy(at_least_float32(logits), targets, reduction="none")
        self.nll += losses.sum(dtype=torch.float64)

    def add(self, other: ClassCounters) -> None:
        """Add the counts of other rows."""
        self._to(other.total.device)
        self.correct, self.total = self.correct + other.correct, self.total + other.total
        self.predicted, self.nll = self.predicted + other.predicted, self.nll + other.nll

    def reduced(self, workers: WorkerGroup) -> ClassCounters:
        """The sum over workers; every worker must call it."""
        result = ClassCounters(self.num_classes)
        result.correct, result.total, result.predicted = workers.sum(
            torch.stack([self.correct, self.total, self.predicted])
        ).unbind()
        result.nll = workers.sum(self.nll.clone())
        return result

    def per_class_accuracy(self) -> npt.NDArray[np.float64]:
        """Share of correct rows per class (C,); NaN for a class without rows."""
        return per_class_accuracy(self.correct.cpu().numpy(), self.total.cpu().numpy())

    def compute(self, stats: ClassStats, *, has_groups: bool = False) -> dict[str, float]:
        """Accuracies (fractions, macro within a shot group) and the mean loss.

        A shot group without rows is absent, and so is the standard error of images in groups, which takes rows as
        independent. {} without any row.
        """
        accuracy = self.per_class_accuracy()
        num_rows = int(self.total.sum())
        if num_rows == 0:
            return {}
        metrics = {
            "loss": float(self.nll) / num_rows,
            "top1_accuracy": int(self.correct.sum()) / num_rows,
            "balanced_accuracy": float(np.nanmean(accuracy)),
        }
        if not has_groups:
            error = balanced_standard_error(self.correct.cpu().numpy(), self.total.cpu().numpy())
            metrics["balanced_standard_error"] = error
        return metrics | shot_group_accuracies(accuracy, stats)

    def macro_scores(self) -> dict[str, float]:
        """Macro precision, recall and F1; {} without any row."""
        return macro_scores(self.correct.cpu().numpy(), self.predicted.cpu().numpy(), self.total.cpu().numpy())

    def _to(self, device: torch.device) -> None:
        """Move the counters to the logits' device: a copy to the host for each batch would wait for the device."""
        if self.total.device != device:
            self.correct, self.total = self.correct.to(device), self.total.to(device)
            self.predicted, self.nll = self.predicted.to(device), self.nll.to(device)


class CalibrationBins:
    """Rows, correct rows and summed confidence per bin of equal width over (0, 1] [Guo et al. 2017, eq. 3]."""

    def __init__(self, num_bins: int = NUM_CALIBRATION_BINS) -> None:
        self.counts = torch.zeros((3, num_bins), dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch of logits (B, C) and targets (B,); a row with a NaN is wrong with confidence 1."""
        classes, valid = predictions(logits)
        probs = F.softmax(at_least_float32(logits), dim=-1).amax(dim=-1)
        confidence = torch.where(valid, probs, 1).double()
        num_bins = self.counts.shape[1]
        bins = (torch.ceil(confidence * num_bins).long() - 1).clamp(0, num_bins - 1)
        right = (valid & (classes == targets)).double()
        rows = torch.stack([torch.ones_like(right), right, confidence])
        self.counts = self.counts.to(logits.device).index_add(1, bins, rows)

    def reduced(self, workers: WorkerGroup) -> CalibrationBins:
        """The sum over workers; every worker must call it."""
        result = CalibrationBins(self.counts.shape[1])
        result.counts = workers.sum(self.counts)
        return result

    def compute(self) -> dict[str, float]:
        """{"expected_calibration_error": sum over bins of share x |accuracy - mean confidence|}; {} without any row."""
        rows, right, confidence = self.counts
        if float(rows.sum()) == 0:
            return {}
        return {"expected_calibration_error": float((right - confidence).abs().sum() / rows.sum())}


def balanced_standard_error(
    correct: npt.NDArray[np.int64 | np.float64], total: npt.NDArray[np.int64], *, ddof: int = 0
) -> float:
    """Standard error of the macro accuracy over classes with rows: sqrt(sum p (1 - p) / n) / C.

    p is (correct + 1) / (rows + 2) [Agresti and Coull 1998]: a class with three correct rows of three isn't certain.
    n is the rows less `ddof`, at least 1.
    """
    n = total[total > 0].astype(np.float64)
    p = (correct[total > 0] + 1) / (n + 2)
    return float(np.sqrt((p * (1 - p) / np.maximum(n - ddof, 1)).sum()) / len(n))


def per_class_accuracy(correct: npt.ArrayLike, total: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """correct / total per class (C,); NaN for a class without rows."""
    right, rows = np.asarray(correct, dtype=np.float64), np.asarray(total, dtype=np.float64)
    return np.divide(right, rows, out=np.full(len(rows), np.nan), where=rows > 0)


def shot_group_accuracies(accuracy: npt.NDArray[np.float64], stats: ClassStats) -> dict[str, float]:
    """Mean of the per-class accuracies (C,; NaN: no rows) per shot group; a group without rows is absent."""
    groups = {group: accuracy[labels] for group, labels in stats.shot_groups.items()}
    return {f"{group}_accuracy": float(np.nanmean(of)) for group, of in groups.items() if not np.isnan(of).all()}


def macro_scores(correct: npt.ArrayLike, predicted: npt.ArrayLike, total: npt.ArrayLike) -> dict[str, float]:
    """Macro precision, recall and F1 over the classes with rows, from counts per class (C,).

    A class that is never predicted has precision 0. {} without any row.
    """
    right, guessed, rows = (np.asarray(values, dtype=np.float64) for values in (correct, predicted, total))
    present = rows > 0
    if not present.any():
        return {}
    right, guessed, rows = right[present], guessed[present], rows[present]
    return {
        "macro_precision": float(np.mean(right / np.maximum(guessed, 1))),
        "macro_recall": float(np.mean(right / rows)),
        "macro_f1": float(np.mean(2 * right / (guessed + rows))),
    }


def predictions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted classes (B,) of logits (B, C), the lowest of equals, and which rows (B,) have no NaN."""
    largest, classes = logits.max(dim=-1)
    return classes, ~largest.isnan()
