"""The workers that train one trial together: a rank, and sums over all of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class WorkerGroup(Protocol):
    """Workers that agree on sums. All must call the same methods in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, value: Tensor) -> Tensor:
        """The elementwise sum over workers, without gradient."""

    def max(self, value: Tensor) -> Tensor:
        """The elementwise maximum over workers, without gradient."""


class _SingleWorker:
    rank = 0
    world_size = 1

    def sum(self, value: Tensor) -> Tensor:
        return value

    def max(self, value: Tensor) -> Tensor:
        return value


SINGLE_WORKER: WorkerGroup = _SingleWorker()
