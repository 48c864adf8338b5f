"""Trains one stage of a trial, an epoch at a time."""

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

# Steps whose losses and gradient norms stay on the device before they are read, since reading waits for the GPU.
CHECK_EVERY = 16


@dataclass(frozen=True)
class Span:
    """The epochs of a stage from `first_epoch` (0-based), and its optimizer steps from `first_step`."""

    first_epoch: int
    num_epochs: int
    first_step: int
    num_steps: int

    @property
    def end_epoch(self) -> int:
        """The epoch after the last."""
        return self.first_epoch + self.num_epochs

    @property
    def end_step(self) -> int:
        """The step after the last."""
        return self.first_step + self.num_steps


@dataclass(frozen=True)
class StageEpochResult:
    """The result of an epoch of training: steps so far, metrics, each step's loss, and the reason of a failure."""

    step: int
    metrics: dict[str, float]
    losses: list[float]
    failure: str | None = None


class _LossRecord:
    """Losses and gradient norms of an epoch's steps, read a few steps late."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.has_failed = False
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._unread.append(torch.stack([loss.float(), norm.float()]))
        if len(self._unread) >= CHECK_EVERY:
            self.read()

    def read(self) -> None:
        """Read the pending values; the first step that is not finite ends the record."""
        if not self._unread or self.has_failed:
            return
        for loss, norm in torch.stack(self._unread).tolist():
            self.losses.append(loss)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.has_failed = True
                break
        self._unread.clear()


@dataclass
class StageTrainer:
    """The model, data, loss and optimizer of a stage.

    Epochs and steps are counted over the whole trial from 0. `plan_of` takes an epoch, `losses_of` an epoch and then a
    step; `read` takes an epoch's plan, a worker's positions in it, and the epoch. `loss_name` and `fix` appear in the
    sentence about numbers that are not finite. `mix` makes mixed inputs and class weights of a step's inputs and
    labels. A worker computes its share of a batch in `num_parts`.
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
    loss_name: str
    fix: str
    device: torch.device
    workers: WorkerGroup
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
        """The losses of an unfinished epoch's steps, for a checkpoint."""
        self._record.read()
        return list(self._record.losses)

    def resume_from(self, losses: Sequence[float]) -> None:
        """Let the next epoch continue after the steps with these losses."""
        self._record.losses[:] = losses

    def train_epoch(
        self, epoch: int, step: int, after_step: Callable[[int], None] = lambda step: None
    ) -> StageEpochResult:
        """Train one pass over the epoch plan, or the stage's remaining steps; `after_step` gets the steps so far."""
        started, plan = time.perf_counter(), self.plan_of(epoch)
        in_progress = self.begin_epoch(plan, epoch, step)
        for batch in self.read(plan, in_progress.shares, epoch):
            in_progress.take(batch)
            if in_progress.failed:
                break
            after_step(in_progress.step)
        return in_progress.end(time.perf_counter() - started)

    def begin_epoch(self, plan: EpochPlan, epoch: int, step: int) -> EpochInProgress:
        """Begin an epoch (0-based) whose batches the caller passes; `step` optimizer steps were taken so far."""
        self.model.train()
        return EpochInProgress(self, plan, epoch, step)

    def split_epoch(self, plan: EpochPlan, first_step: int) -> tuple[list[Index], list[int]]:
        """This worker's positions in an epoch's plan for each step, and the number of images of each step.

        The epoch begins after `first_step` steps of the trial and ends with the stage at the latest.
        """
        size = self.train.batch_size
        shares = batches(plan, size, self.workers.rank, self.workers.world_size)[: self.span.end_step - first_step]
        return shares, [min(size, len(plan) - index * size) for index in range(len(shares))]

    def epoch_result(
        self,
        epoch: int,
        step: int,
        losses: list[float],
        failed: bool,
        sizes: Sequence[int],
        num_new: int,
        seconds: float,
    ) -> StageEpochResult:
        """The result of an epoch (0-based) up to a step of the trial, at which it may have `failed`.

        `sizes` are the numbers of images of its steps; `num_new` images took `seconds`.
        """
        if failed:
            noun = "gradient" if math.isfinite(losses[-1]) else "loss"
            return StageEpochResult(step, {}, losses, self.failure(noun, epoch, step))
        metrics = {
            "train/loss": float(np.average(losses, weights=sizes)),
            "train/lr": self.lr(step - 1),
            "train/images_per_second": num_new / seconds,
            "time/train_seconds": seconds,
        }
        return StageEpochResult(step, metrics, losses)

    def _train_step(self, batch: Batch, loss_function: ConfiguredLoss, step: int) -> tuple[Tensor, Tensor]:
        """Take an optimizer step; returns the global batch's loss and the gradient norm before clipping, both 0-d."""
        inputs, labels = to_device(batch, self.device)
        if self.mix is not None:
            inputs, labels = self.mix(inputs, labels, step)
        set_lr(self.optimizer, self.lr(step))
        self.optimizer.zero_grad(set_to_none=True)
        loss = backward_in_micro_batches(self._logits, loss_function, self.workers, inputs, labels, self.num_parts)
        params = list(self.params.values())
        mean_loss = all_reduce_gradients(params, loss, self.workers)
        norm = clip_gradients(params, self.train.clip_grad_norm)
        self.optimizer.step()
        return mean_loss, norm

    def _logits(self, inputs: Tensor) -> Tensor:
        with self.autocast():
            return self.forward(inputs)

    def lr(self, step: int) -> float:
        """The learning rate at a step of the trial."""
        return lr_at_step(self.optim, step - self.span.first_step, self.span.num_steps, self.steps_per_epoch)

    def failure(self, noun: str, epoch: int, step: int) -> str:
        """The sentence about an epoch (0-based) in which a number, such as the loss, was not finite after `step`."""
        return (
            f"the {noun} wasn't finite in epoch {epoch + 1}, step {step} of {self.span.end_step} (learning rate "
            f"{self.lr(step - 1):.3g}, loss {self.loss_name}); {self.fix}"
        )


class EpochInProgress:
    """One epoch of a trainer, a batch at a time; `shares` are the plan's positions of the batches that it expects.

    It continues after the steps whose losses the trainer has from a checkpoint.
    """

    def __init__(self, trainer: StageTrainer, plan: EpochPlan, epoch: int, step: int) -> None:
        self.step = step
        self._trainer, self._epoch, self._record = trainer, epoch, trainer._record
        self._num_taken = len(self._record.losses)
        self._first_step = step - self._num_taken
        shares, self._sizes = trainer.split_epoch(plan, self._first_step)
        self.shares = shares[self._num_taken :]
        self._loss_at = trainer.losses_of(epoch)

    @property
    def failed(self) -> bool:
        """Whether a step's loss or gradient is known not to be finite, so that the epoch can't continue."""
        return self._record.has_failed

    def take(self, batch: Batch) -> None:
        """Take an optimizer step on the next batch."""
        self._record.add(*self._trainer._train_step(batch, self._loss_at(self.step), self.step))
        self.step += 1

    def end(self, seconds: float) -> StageEpochResult:
        """The result after so many seconds."""
        trainer, losses, num_new = self._trainer, self._record.losses, sum(self._sizes[self._num_taken :])
        self._record.read()
        trainer._record = _LossRecord()
        step = self._first_step + len(losses)
        return trainer.epoch_result(self._epoch, step, losses, self.failed, self._sizes, num_new, seconds)
