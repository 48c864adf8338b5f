"""The workers that train one trial together, as losses and loops see them: a rank, and sums over all."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reducer(Protocol):
    """How several workers agree on sums; every worker must call the same methods in the same order."""

    @property
    def world_size(self) -> int: ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum over workers; losses only give it values that carry no gradient."""

    def max(self, value: Tensor) -> Tensor:
        """The elementwise maximum over workers."""


class _OneWorker:
    world_size = 1

    def sum(self, value: Tensor) -> Tensor:
        return value

    def max(self, value: Tensor) -> Tensor:
        return value


ONE_WORKER: Reducer = _OneWorker()


class World(Protocol):
    """Workers of one trial; also the Reducer that losses need."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum over workers, a new tensor without gradient."""

    def max(self, value: Tensor) -> Tensor:
        """The elementwise maximum over workers, a new tensor without gradient."""


class _SingleProcess:
    rank = 0
    world_size = 1

    def sum(self, value: Tensor) -> Tensor:
        return value

    def max(self, value: Tensor) -> Tensor:
        return value


SINGLE: World = _SingleProcess()
