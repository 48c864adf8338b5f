"""What a module makes of stored examples: outputs batch by batch, logits in order, per-class counts over workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imbvlm.features.examples import Examples, TrialData
from imbvlm.metrics import CalibrationBins, ClassCounters, predictions
from imbvlm.models.encoder_info import OutputName
from imbvlm.training.feed import Batch, Index, load_batch, read_ahead, to_device
from imbvlm.training.world import World

Forward = Callable[[Tensor], Tensor]

# Features and logits of an evaluation batch, in bytes of float32.
EVAL_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Examination:
    """One look at a split: per-class counts, confidence bins, and the predicted class of every example (N,)."""

    counters: ClassCounters
    bins: CalibrationBins
    predicted: Tensor


@dataclass(frozen=True)
class Evaluator:
    """Reads one output of a trial's data; `computing` is the context in which modules run."""

    data: TrialData
    reads: OutputName
    device: torch.device
    world: World
    computing: Callable[[], AbstractContextManager[Any]]

    def outputs(
        self, forward: Forward, examples: Examples, index: Index, view: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Float32 outputs and labels of the examples at `index`, a batch at a time, on the device; no gradients."""
        numbers = max(math.prod(self.data.info.shape(self.reads)), len(self.data.class_names))
        size = min(max(EVAL_BYTES // (4 * numbers), 32), 4096)
        chunks = [index[start : start + size] for start in range(0, len(index), size)]

        def load(chunk: Index) -> Batch:
            return load_batch(examples, self.reads, chunk, np.full_like(chunk, view), self.device)

        for batch in read_ahead(load, chunks):
            features, labels = to_device(batch, self.device)
            with self.computing(), torch.inference_mode():
                output = forward(features).float()
            yield output, labels

    def share(self, examples: Examples) -> Index:
        """The examples (indices) that fall to this worker: every world_size-th."""
        return np.arange(self.world.rank, len(examples.labels), self.world.world_size)

    def counters(self, forward: Forward, examples: Examples) -> ClassCounters:
        """Per-class counts over the examples, added over workers: every worker must call it."""
        counters = ClassCounters(len(self.data.class_names))
        for logits, labels in self.outputs(forward, examples, self.share(examples)):
            counters.update(logits, labels)
        return counters.reduced(self.world)

    def examine(self, forward: Forward, examples: Examples) -> Examination:
        """As `counters`, with what a report shows besides; every worker must call it."""
        counters, bins = ClassCounters(len(self.data.class_names)), CalibrationBins()
        predicted, share = torch.zeros(len(examples.labels), dtype=torch.int64), self.share(examples)
        for logits, labels in self.outputs(forward, examples, share):
            counters.update(logits, labels)
            bins.update(logits, labels)
            predicted[share[: len(labels)]] = predictions(logits)[0].cpu()
            share = share[len(labels) :]
        return Examination(counters.reduced(self.world), bins.reduced(self.world), self.world.sum(predicted).cpu())

    def logits(self, forward: Forward, examples: Examples) -> Tensor:
        """Float32 logits (N, C) of all examples in order, on the CPU; no other worker is needed."""
        parts = [logits.cpu() for logits, _ in self.outputs(forward, examples, np.arange(len(examples.labels)))]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.data.class_names))

    def all_views(self, forward: Forward, examples: Examples, width: int) -> Tensor:
        """Outputs (N, V, width) of every view of every example, on the device of every worker; all must call it."""
        found = torch.zeros(len(examples.labels), examples.num_views, width, device=self.device)
        share = self.share(examples)
        for view in range(examples.num_views):
            rows = torch.from_numpy(share).to(self.device)
            for output, _ in self.outputs(forward, examples, share, view):
                found[rows[: len(output)], view] = output
                rows = rows[len(output) :]
        return self.world.sum(found) if len(found) else found
