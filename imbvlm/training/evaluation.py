"""What a module makes of examples: outputs batch by batch, logits in order, per-class counts over workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imbvlm.features.examples import Examples, Source, TrialData
from imbvlm.metrics import CalibrationBins, ClassCounters, predictions
from imbvlm.training.feed import Batch, Feed, Index, to_device
from imbvlm.training.world import World

Forward = Callable[[Tensor], Tensor]

# Inputs and logits of an evaluation batch, in bytes of float32.
EVAL_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Examination:
    """One look at a split: per-class counts, confidence bins, and every example's predicted class (N,).

    It is -1 for an image that can't be read.
    """

    counters: ClassCounters
    bins: CalibrationBins
    predicted: Tensor


@dataclass(frozen=True)
class Evaluator:
    """Reads a trial's data through a feed; `computing` is the context in which modules run."""

    data: TrialData
    feed: Feed
    device: torch.device
    world: World
    computing: Callable[[], AbstractContextManager[Any]]

    def outputs(
        self, forward: Forward, examples: Source, index: Index, view: int | None = None
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Float32 outputs of the examples at `index`, a batch at a time, on the device; no gradients.

        `view` is a stored view, or None for the evaluation crop.
        """
        numbers = max(self.feed.numbers_per_example, len(self.data.class_names))
        size = min(max(EVAL_BYTES // (4 * numbers), 32), 4096)
        chunks = [index[start : start + size] for start in range(0, len(index), size)]
        for batch in self.feed.evaluate(examples, chunks, view):
            inputs, _ = to_device(batch, self.device)
            with self.computing(), torch.inference_mode():
                output = forward(inputs).float()
            yield output, batch

    def share(self, examples: Source) -> Index:
        """The examples (indices) that fall to this worker: every world_size-th."""
        return np.arange(self.world.rank, len(examples.labels), self.world.world_size)

    def counters(self, forward: Forward, examples: Source) -> ClassCounters:
        """Per-class counts over the examples, added over workers: every worker must call it."""
        counters = ClassCounters(len(self.data.class_names))
        for logits, batch in self.outputs(forward, examples, self.share(examples)):
            counters.update(logits, batch.labels.to(logits.device))
        return counters.reduced(self.world)

    def examine(self, forward: Forward, examples: Source) -> Examination:
        """As `counters`, with what a report shows besides; every worker must call it."""
        counters, bins = ClassCounters(len(self.data.class_names)), CalibrationBins()
        # Each example is one worker's: the sum over workers is its class plus 1, or 0 where its image can't be read.
        found = torch.zeros(len(examples.labels), dtype=torch.int64)
        for logits, batch in self.outputs(forward, examples, self.share(examples)):
            labels = batch.labels.to(logits.device)
            counters.update(logits, labels)
            bins.update(logits, labels)
            found[torch.from_numpy(batch.examples)] = predictions(logits)[0].cpu() + 1
        return Examination(counters.reduced(self.world), bins.reduced(self.world), self.world.sum(found).cpu() - 1)

    def logits(self, forward: Forward, examples: Source) -> Tensor:
        """Float32 logits (N, C) of all examples in order, on the CPU; no other worker is needed.

        Those of an image that can't be read are NaN.
        """
        found = torch.full((len(examples.labels), len(self.data.class_names)), math.nan)
        for logits, batch in self.outputs(forward, examples, np.arange(len(examples.labels))):
            found[torch.from_numpy(batch.examples)] = logits.cpu()
        return found

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
