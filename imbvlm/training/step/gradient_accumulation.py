"""Gradient accumulation: the gradient of the whole batch's loss with the memory of one part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imbvlm.longtail.losses import ConfiguredLoss
from imbvlm.longtail.worker_group import WorkerGroup


def backward_in_micro_batches(
    forward: Callable[[Tensor], Tensor],
    loss_function: ConfiguredLoss,
    workers: WorkerGroup,
    inputs: Tensor,
    labels: Tensor,
    num_parts: int,
) -> Tensor:
    """Add this worker's gradients of the global loss to the parameters; returns its share of the loss (0-d).

    A weighted mean's denominator depends on labels only: the loss of zero logits records the workers' sums, and each
    part is divided by them. A loss that needs all logits gets them from an extra forward pass without gradients.
    """
    if num_parts == 1 or len(labels) <= 1:
        loss = loss_function(forward(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    parts = list(zip(inputs.tensor_split(num_parts), labels.tensor_split(num_parts), strict=True))
    parts = [(part, part_labels) for part, part_labels in parts if len(part_labels)]
    recorder = _Recorder(workers)
    logits, whole = None, loss_function.over(recorder)
    if loss_function.entry.needs_all_logits:
        with torch.no_grad():
            logits = torch.cat([forward(part) for part, _ in parts])
            value = whole(logits, labels)
    total = torch.zeros((), device=labels.device)
    for part, part_labels in parts:
        part_logits = forward(part)
        if logits is None and not recorder.sums:
            whole(part_logits.new_zeros(len(labels), part_logits.shape[1]), labels)
        loss = loss_function.over(recorder.replayed())(part_logits, part_labels)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    return total if logits is None else value


class _Recorder:
    """Passes sums and maxima on to the workers, and records their results."""

    def __init__(self, workers: WorkerGroup) -> None:
        self._workers, self.rank, self.world_size = workers, workers.rank, workers.world_size
        self.sums: list[Tensor] = []

    def sum(self, value: Tensor) -> Tensor:
        self.sums.append(self._workers.sum(value))
        return self.sums[-1]

    def max(self, value: Tensor) -> Tensor:
        self.sums.append(self._workers.max(value))
        return self.sums[-1]

    def replayed(self) -> WorkerGroup:
        """A worker group that returns the recorded results in their order."""
        return _Replay(self.sums, self.rank, self.world_size)


class _Replay:
    def __init__(self, results: list[Tensor], rank: int, world_size: int) -> None:
        self._results, self.rank, self.world_size = iter(results), rank, world_size

    def sum(self, value: Tensor) -> Tensor:
        return next(self._results)

    def max(self, value: Tensor) -> Tensor:
        return next(self._results)
