"""Evaluates a module on rows: outputs by batch, logits in order, per-class counts over workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.features.trial_data import RowSource, StoredRows, TrialData
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.metrics import CalibrationBins, ClassCounters, predictions
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.longtail.taxonomy import Taxonomy, rank_errors
from imbvlm.longtail.worker_group import SINGLE_WORKER, WorkerGroup
from imbvlm.models.classifier import ZeroShotClassifier
from imbvlm.training.step.batch_source import Batch, BatchSource, Index, to_device
from imbvlm.training.validation_logits import RowLogits

Forward = Callable[[Tensor], Tensor]

# Size in bytes of an evaluation batch's inputs and logits in float32.
EVAL_BYTES = 32 * 2**20


@dataclass(frozen=True)
class EvalResult:
    """The evaluation of a split: per-class counts, confidence bins, and every example's predicted class (N,).

    The class is -1 for an unreadable image. `adjusted` is the evaluation of adjusted logits, if any. `logits` (N, C)
    are NaN for an unreadable image; None where they weren't kept. `rank_errors` are those of a taxonomy, if any.
    `has_groups` says that the images are in groups.
    """

    counters: ClassCounters
    bins: CalibrationBins
    predicted: Tensor
    adjusted: EvalResult | None = None
    logits: Tensor | None = None
    rank_errors: dict[str, float] = field(default_factory=dict)
    has_groups: bool = False

    def metrics(self, stats: ClassStats) -> dict[str, float]:
        """Accuracies, loss, macro scores, calibration error, and errors by rank, by their plain names."""
        accuracies = self.counters.compute(stats, has_groups=self.has_groups)
        return accuracies | self.counters.macro_scores() | self.bins.compute() | self.rank_errors

    def with_rank_errors(self, taxonomy: Taxonomy | None, labels: Index) -> EvalResult:
        """The result with its errors by rank of examples with labels (N,); unchanged without a taxonomy."""
        if taxonomy is None:
            return self
        return replace(self, rank_errors=rank_errors(taxonomy, labels, self.predicted.numpy()))


class LogitAdjuster:
    """Adjusts the logits of a split's examples; mixing reads the image embeddings of the same rows in the store."""

    def __init__(
        self, adjustment: PostHocAdjustment, data: TrialData, stored: StoredRows, device: torch.device
    ) -> None:
        self._adjustment, self._counts, self._stored = adjustment, data.class_stats.counts, stored
        self._zero_shot: ZeroShotClassifier | None = None
        if adjustment.alpha:
            if data.class_embeddings is None:
                raise ImbvlmError(
                    "mixing with zero-shot logits needs the class names' text embeddings. Choose an encoder with text."
                )
            self._zero_shot = ZeroShotClassifier(data.class_embeddings, data.info.text_space.logit_scale).to(device)

    def __call__(self, logits: Tensor, examples: Index) -> Tensor:
        """Adjusted logits (B, C) of the examples (B,)."""
        zero_shot = None
        if self._zero_shot is not None:
            embedding = self._stored.batch("image_embedding", examples)
            zero_shot = self._zero_shot(embedding.to(logits.device).float())
        return self._adjustment.apply(logits, self._counts, zero_shot)


class EvalAccumulator:
    """Collects an EvalResult over this worker's examples."""

    def __init__(self, num_rows: int, num_classes: int, *, keeps_logits: bool = False) -> None:
        self._counters, self._bins = ClassCounters(num_classes), CalibrationBins()
        self._logits = RowLogits(num_rows, num_classes) if keeps_logits else None
        # Each example belongs to one worker: the sum over workers is its class plus 1, or 0 for an unreadable image.
        self._predicted = torch.zeros(num_rows, dtype=torch.int64)

    def add(self, logits: Tensor, labels: Tensor, examples: Index) -> None:
        """Add the logits (B, C) and labels (B,) of examples (B,)."""
        labels = labels.to(logits.device)
        self._counters.update(logits, labels)
        self._bins.update(logits, labels)
        self._predicted[torch.from_numpy(examples)] = predictions(logits)[0].cpu() + 1
        if self._logits is not None:
            self._logits.add(examples, logits)

    def result(self, workers: WorkerGroup = SINGLE_WORKER) -> EvalResult:
        """The result over all workers; every worker must call it."""
        counters, bins = self._counters.reduced(workers), self._bins.reduced(workers)
        logits = None if self._logits is None else self._logits.gathered(workers)
        return EvalResult(counters, bins, workers.sum(self._predicted).cpu() - 1, logits=logits)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates modules on a trial's data; `computing` gives the context in which they run."""

    data: TrialData
    batch_source: BatchSource
    device: torch.device
    workers: WorkerGroup
    computing: Callable[[], AbstractContextManager[Any]]

    def outputs(
        self, forward: Forward, examples: RowSource, index: Index, view: int | None = None
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Float32 outputs of the examples at `index`, a batch at a time, on the device; no gradients.

        `view` is a stored view, or None for the evaluation crop.
        """
        num_values = max(self.batch_source.numbers_per_example, len(self.data.class_names))
        size = min(max(EVAL_BYTES // (4 * num_values), 32), 4096)
        chunks = [index[start : start + size] for start in range(0, len(index), size)]
        for batch in self.batch_source.evaluate(examples, chunks, view):
            inputs, _ = to_device(batch, self.device)
            with self.computing(), torch.inference_mode():
                output = forward(inputs).float()
            yield output, batch

    def share(self, examples: RowSource) -> Index:
        """Indices of this worker's examples, every world_size-th."""
        return np.arange(self.workers.rank, len(examples.labels), self.workers.world_size)

    def counters(self, forward: Forward, examples: RowSource, keep: RowLogits | None = None) -> ClassCounters:
        """Per-class counts over the examples, summed over workers; every worker must call it.

        `keep` collects this worker's logits.
        """
        counters = ClassCounters(len(self.data.class_names))
        for logits, batch in self.outputs(forward, examples, self.share(examples)):
            counters.update(logits, batch.labels.to(logits.device))
            if keep is not None:
                keep.add(batch.examples, logits)
        return counters.reduced(self.workers)

    def mean_outputs(
        self, forward: Forward, examples: RowSource, index: Index, views: Sequence[int | None]
    ) -> Iterator[tuple[Tensor, Batch]]:
        """As `outputs`, the mean over several views of each example."""
        streams = [self.outputs(forward, examples, index, view) for view in views]
        # All views of an example come from one image, so that their batches have the same examples.
        for batches in zip(*streams, strict=True):
            yield torch.stack([output for output, _ in batches]).mean(dim=0), batches[0][1]

    def evaluate_full(
        self,
        forward: Forward,
        examples: RowSource,
        adjust: Callable[[Tensor, Index], Tensor] | None = None,
        views: Sequence[int | None] = (None,),
        *,
        keeps_logits: bool = False,
    ) -> EvalResult:
        """As `counters`, with the further results that reports show; every worker must call it.

        `adjust` returns adjusted logits from logits and their examples. With several `views` the mean logits count.
        `keeps_logits` keeps the adjusted ones, or those as trained without `adjust`.
        """
        shape = len(examples.labels), len(self.data.class_names)
        plain = EvalAccumulator(*shape, keeps_logits=keeps_logits and adjust is None)
        adjusted = EvalAccumulator(*shape, keeps_logits=keeps_logits and adjust is not None)
        for logits, batch in self.mean_outputs(forward, examples, self.share(examples), views):
            plain.add(logits, batch.labels, batch.examples)
            if adjust is not None:
                adjusted.add(adjust(logits, batch.examples), batch.labels, batch.examples)
        evaluated = [part.result(self.workers) for part in ([plain] if adjust is None else [plain, adjusted])]
        result, *others = [
            replace(each.with_rank_errors(self.data.taxonomy, examples.labels), has_groups=examples.groups is not None)
            for each in evaluated
        ]
        return replace(result, adjusted=others[0]) if others else result

    def all_views(self, forward: Forward, examples: StoredRows, width: int) -> Tensor:
        """Outputs (N * V, width) of every view of every example, an example's views in consecutive rows.

        They are on the device of every worker; all workers must call it.
        """
        result = torch.zeros(len(examples) * examples.num_views, width, device=self.device)
        share = self.share(examples)
        for view in range(examples.num_views):
            index = torch.from_numpy(share * examples.num_views + view).to(self.device)
            for output, _ in self.outputs(forward, examples, share, view):
                result[index[: len(output)]] = output
                index = index[len(output) :]
        return self.workers.sum(result) if len(result) else result
