"""One stage of a trial's training, an epoch at a time: what trains, on which batches, by which loss and rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imbvlm.config.training_sections import OptimConfig, TrainConfig
from imbvlm.longtail.class_sampling import EpochPlan, batches
from imbvlm.longtail.losses import ConfiguredLoss
from imbvlm.longtail.worker_group import WorkerGroup
from imbvlm.models.encoder_classifier import EncoderClassifier
from imbvlm.training.step.batch_source import Batch, Index, to_device
from imbvlm.training.step.distributed import all_reduce_gradients
from imbvlm.training.step.gradient_accumulation import backward_in_micro_batches
from imbvlm.training.step.optimizers import build_optimizer, clip_gradients, lr_at_step, set_lr

# Losses and gradient norms stay on the device for so many steps before they are looked at: each look waits for a GPU.
CHECK_EVERY = 16


@dataclass(frozen=True)
class Span:
    """Where a stage lies in its trial: epochs from `first_epoch` (0-based), optimiser steps from `first_step`."""

    first_epoch: int
    num_epochs: int
    first_step: int
    num_steps: int

    @property
    def end_epoch(self) -> int:
        return self.first_epoch + self.num_epochs

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps


@dataclass(frozen=True)
class StageEpochResult:
    """What an epoch of training gave: steps so far, metrics, each step's loss, and why it failed or None."""

    step: int
    metrics: dict[str, float]
    losses: list[float]
    failure: str | None = None


class _LossRecord:
    """Losses and gradient norms of an epoch's steps, looked at a few steps late."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.failed_at: int | None = None
        self._waiting: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._waiting.append(torch.stack([loss.float(), norm.float()]))
        if len(self._waiting) >= CHECK_EVERY:
            self.look()

    def look(self) -> None:
        """Read what waits; the first step that wasn't finite ends the record."""
        if not self._waiting or self.failed_at is not None:
            return
        for loss, norm in torch.stack(self._waiting).tolist():
            self.losses.append(loss)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.failed_at = len(self.losses) - 1
                break
        self._waiting.clear()


@dataclass
class StageTrainer:
    """A stage as the loop sees it.

    `plan_of` and `losses_of` take an epoch, a loss then a step, all counted over the whole trial from 0; `read` takes
    an epoch's plan, a worker's places in it and the epoch; `words` name the loss, and what to change where numbers run
    away. `mix` makes a step's batch of inputs and labels into mixed inputs and shares of the classes. A worker
    computes its share of a batch in `num_parts`.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optim: OptimConfig
    train: TrainConfig
    span: Span
    steps_per_epoch: int
    plan_of: Callable[[int], EpochPlan]
    read: Callable[[EpochPlan, Sequence[Index], int], Iterator[Batch]]
    losses_of: Callable[[int], Callable[[int], ConfiguredLoss]]
    words: tuple[str, str]
    device: torch.device
    world: WorkerGroup
    autocast: Callable[[], AbstractContextManager[Any]]
    mix: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None
    num_parts: int = 1
    params: dict[str, nn.Parameter] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    _record: _LossRecord = field(init=False)

    def __post_init__(self) -> None:
        self.params = {name: param for name, param in self.model.named_parameters() if param.requires_grad}
        scales = self.model.lr_scales if isinstance(self.model, EncoderClassifier) else {}
        lr_scales = [scales.get(name, 1.0) for name in self.params]
        self.optimizer = build_optimizer(self.optim, self.params.values(), lr_scales)
        self._record = _LossRecord()

    def losses_so_far(self) -> list[float]:
        """The losses of the steps of an epoch that isn't finished, for a run that goes on from here."""
        self._record.look()
        return list(self._record.losses)

    def go_on_from(self, losses: Sequence[float]) -> None:
        """Let the next epoch begin behind the steps that have given these losses."""
        self._record.losses[:] = losses

    def train_epoch(
        self, epoch: int, step: int, after_step: Callable[[int], None] = lambda step: None
    ) -> StageEpochResult:
        """One pass over the epoch plan, or what is left of the stage's steps; `after_step` is told the steps so far."""
        started, plan = time.perf_counter(), self.plan_of(epoch)
        under_way = self.begin_epoch(plan, epoch, step)
        for batch in self.read(plan, under_way.shares, epoch):
            under_way.take(batch)
            if under_way.failed:
                break
            after_step(under_way.step)
        return under_way.end(time.perf_counter() - started)

    def begin_epoch(self, plan: EpochPlan, epoch: int, step: int) -> EpochInProgress:
        """An epoch (0-based) whose batches come from outside; `step` optimiser steps were taken so far."""
        self.model.train()
        return EpochInProgress(self, plan, epoch, step)

    def trained(
        self,
        epoch: int,
        step: int,
        losses: list[float],
        failed: bool,
        sizes: Sequence[int],
        num_new: int,
        seconds: float,
    ) -> StageEpochResult:
        """What an epoch (0-based) gave up to a step of the trial, which broke where it has `failed`.

        `sizes` are the images of each of its steps; `num_new` images took `seconds`.
        """
        if failed:
            what = "gradient" if math.isfinite(losses[-1]) else "loss"
            return StageEpochResult(step, {}, losses, self.failure(what, epoch, step))
        metrics = {
            "train/loss": float(np.average(losses, weights=sizes)),
            "train/lr": self.lr(step - 1),
            "train/images_per_second": num_new / seconds,
            "time/train_seconds": seconds,
        }
        return StageEpochResult(step, metrics, losses)

    def _train_step(self, batch: Batch, loss_function: ConfiguredLoss, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step; the loss of the global batch and the gradient's norm before clipping, both 0-d."""
        inputs, labels = to_device(batch, self.device)
        if self.mix is not None:
            inputs, labels = self.mix(inputs, labels, step)
        set_lr(self.optimizer, self.lr(step))
        self.optimizer.zero_grad(set_to_none=True)
        loss = backward_in_micro_batches(self._logits, loss_function, self.world, inputs, labels, self.num_parts)
        params = list(self.params.values())
        mean_loss = all_reduce_gradients(params, loss, self.world)
        norm = clip_gradients(params, self.train.clip_grad_norm)
        self.optimizer.step()
        return mean_loss, norm

    def _logits(self, inputs: Tensor) -> Tensor:
        with self.autocast():
            return self.forward(inputs)

    def lr(self, step: int) -> float:
        """The learning rate at a step of the trial."""
        return lr_at_step(self.optim, step - self.span.first_step, self.span.num_steps, self.steps_per_epoch)

    def failure(self, what: str, epoch: int, step: int) -> str:
        """What is said of an epoch (0-based) after whose `step`-th step something wasn't finite."""
        loss, mend = self.words
        return (
            f"the {what} wasn't finite in epoch {epoch + 1}, step {step} of {self.span.end_step} (learning rate "
            f"{self.lr(step - 1):.3g}, loss {loss}); {mend}"
        )


class EpochInProgress:
    """One epoch of a course, a batch at a time: `shares` are the places in its plan of those that it is to be given.

    It goes on behind the steps whose losses the course has from before.
    """

    def __init__(self, course: StageTrainer, plan: EpochPlan, epoch: int, step: int) -> None:
        self.step = step
        self._course, self._epoch, self._record = course, epoch, course._record
        size, world, taken = course.train.batch_size, course.world, len(self._record.losses)
        self._first_step, self._taken = step - taken, taken
        shares = batches(plan, size, world.rank, world.world_size)[: course.span.end_step - self._first_step]
        self.shares = shares[taken:]
        self._sizes = [min(size, len(plan.rows) - start * size) for start in range(len(shares))]
        self._loss_at = course.losses_of(epoch)

    @property
    def failed(self) -> bool:
        """Whether a step is known to have given a loss or gradient that isn't finite: it can go no further."""
        return self._record.failed_at is not None

    def take(self, batch: Batch) -> None:
        """One optimiser step on the next batch."""
        self._record.add(*self._course._train_step(batch, self._loss_at(self.step), self.step))
        self.step += 1

    def end(self, seconds: float) -> StageEpochResult:
        """What it gave in so many seconds."""
        course, losses, num_new = self._course, self._record.losses, sum(self._sizes[self._taken :])
        self._record.look()
        course._record = _LossRecord()
        step = self._first_step + len(losses)
        return course.trained(self._epoch, step, losses, self.failed, self._sizes, num_new, seconds)
