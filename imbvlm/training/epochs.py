"""The training loop of one trial: a generator that yields an EpochResult after every epoch, in plain torch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imbvlm.config import TrainConfig, TrialConfig, needed
from imbvlm.errors import ImbvlmError
from imbvlm.features.examples import Examples, TrialData
from imbvlm.losses import BuiltLoss
from imbvlm.metrics import ClassCounters
from imbvlm.models.methods import METHODS, build_model
from imbvlm.sampling import batches, epoch_plan
from imbvlm.training.checkpoint import CheckpointError, TrialState, as_tensor_names
from imbvlm.training.feed import Batch, Index, load_batch, read_ahead, to_device
from imbvlm.training.objective import Objective
from imbvlm.training.optim import build_optimizer, clip_gradients, lr_at, set_lr
from imbvlm.training.world import SINGLE, World, average_gradients, copy_from_first

# Losses and gradient norms stay on the device for so many steps before they are looked at: each look waits for a GPU.
CHECK_EVERY = 16
NUM_FIRST_LOSSES = 8
# Features and logits of an evaluation batch, in bytes of float32.
EVAL_BYTES = 32 * 2**20


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave: `epoch` from 1, `step` optimiser steps so far, fractions and seconds in `metrics`.

    `failure` is a sentence where a loss or gradient wasn't finite; the run ends with that result.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    failure: str | None = None


def build_trial(
    config: TrialConfig, data: TrialData, device: str | torch.device = "cpu", world: World = SINGLE
) -> TrialRun:
    """A trial ready to run: the same configuration and seed give the same numbers whatever ran before it.

    Raises ImbvlmError where the method can't be built on these features.
    """
    return TrialRun(config, data, torch.device(device), world)


class TrialRun:
    """One trial: its model, its optimiser and where it stands."""

    def __init__(self, config: TrialConfig, data: TrialData, device: torch.device, world: World) -> None:
        self.config = config
        self.data = data
        self.device = device
        self.world = world
        self.entry = METHODS[config.method]
        self.epoch = 0
        self.step = 0
        # Largest accuracies so far, and the epochs that first had them.
        self.best: dict[str, float] = {}
        self.best_epoch: dict[str, int] = {}
        self.result: EpochResult | None = None
        self.first_losses: list[float] = []
        seed = 0 if config.train is None else config.train.seed
        with self._threads(), _seeded(seed), _explained_memory(self._sizes()):
            self.model = build_model(config, data, device)
        copy_from_first(self.model, world)
        # A compiled module shares the model's parameters and leaves the names in its state_dict alone.
        compiled = config.train is not None and config.train.compile
        self._forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if compiled else self.model
        self._params = [param for param in self.model.parameters() if param.requires_grad]
        self._optimizer = self._build_optimizer() if self.entry.trains else None
        self.num_epochs, self.num_steps = self._length()

    # ------------------------------------------------------------------------------------------------ training

    def epochs(self) -> Iterator[EpochResult]:
        """Train and evaluate epoch after epoch; a run that was restored at its end yields its last result again."""
        self._agree_on_epoch()
        if self.epoch >= self.num_epochs and self.result is not None:
            yield self.result
            return
        while self.epoch < self.num_epochs:
            with self._threads(), _explained_memory(self._sizes()):
                self.result = self._run_epoch()
            yield self.result
            if self.result.failure is not None:
                return

    def _run_epoch(self) -> EpochResult:
        metrics: dict[str, float] = {}
        if self._optimizer is not None:
            metrics, failure = self._train_epoch(self._optimizer)
            if failure is not None:
                return EpochResult(self.epoch + 1, self.step, {}, failure)
        self.epoch += 1
        metrics |= self._validate()
        if not math.isfinite(metrics.get("val/loss", 0.0)):
            return EpochResult(self.epoch, self.step, {}, self._failure("validation loss", self.step - 1))
        return EpochResult(self.epoch, self.step, metrics)

    def _train_epoch(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, float], str | None]:
        """One pass over the epoch plan, or what num_steps leaves of it; metrics, and why it failed or None."""
        started = time.perf_counter()
        config, train = self.config, self._train_config
        plan = epoch_plan(
            self.data.train.labels,
            len(self.data.class_names),
            config.data.class_sampling,
            train.seed,
            self.epoch,
            self.num_epochs,
            self.data.train.num_views,
        )
        shares = batches(plan, train.batch_size, self.world.rank, self.world.world_size)
        shares = shares[: self.num_steps - self.step]
        sizes = [min(train.batch_size, len(plan.rows) - start * train.batch_size) for start in range(len(shares))]
        loss_at = self._objective().for_epoch(self.epoch)
        record, first_step = _LossRecord(), self.step
        self.model.train()

        def load(share: Index) -> Batch:
            return load_batch(self.data.train, self.entry.reads, plan.rows[share], plan.views[share], self.device)

        for batch in read_ahead(load, shares):
            loss, norm = self._train_step(optimizer, batch, loss_at(self.step))
            record.add(loss, norm)
            self.step += 1
            if record.failed_at is not None:
                break
        record.look()
        if self.epoch == 0:
            self.first_losses = record.losses[:NUM_FIRST_LOSSES]
        if record.failed_at is not None:
            self.step = first_step + record.failed_at + 1
            what = "gradient" if math.isfinite(record.losses[-1]) else "loss"
            return {}, self._failure(what, self.step - 1)
        seconds = time.perf_counter() - started
        return {
            "train/loss": float(np.average(record.losses, weights=sizes)),
            "train/lr": self._lr(self.step - 1),
            "train/images_per_second": sum(sizes) / seconds,
            "time/train_seconds": seconds,
        }, None

    def _train_step(
        self, optimizer: torch.optim.Optimizer, batch: Batch, loss_function: BuiltLoss
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step; the loss of the global batch and the gradient's norm before clipping, both 0-d."""
        features, labels = to_device(batch, self.device)
        set_lr(optimizer, self._lr(self.step))
        optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self._forward(features)
        loss = loss_function(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        mean_loss = average_gradients(self._params, loss, self.world)
        norm = clip_gradients(self._params, self._train_config.clip_grad_norm)
        optimizer.step()
        return mean_loss, norm

    def _failure(self, what: str, step: int) -> str:
        if not self.entry.trains:
            return f"the {what} of {self.config.method} isn't finite; look at the stored features"
        return (
            f"the {what} wasn't finite in epoch {step // self._steps_per_epoch() + 1}, step {step + 1} of "
            f"{self.num_steps} (learning rate {self._lr(step):.3g}, loss {self._objective().name}); lower optim.lr or "
            "raise optim.warmup_fraction"
        )

    # ---------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """Metrics by their plain names over all examples; every worker must call it."""
        return self.counters(examples).compute(self.data.class_stats)

    def logits(self, examples: Examples) -> Tensor:
        """Float32 logits (N, C) of all examples in order, evaluation crops, on the CPU; no other worker is needed."""
        index = np.arange(len(examples.labels))
        parts = [logits.cpu() for logits, _ in self._outputs(examples, index)]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.data.class_names))

    def counters(self, examples: Examples) -> ClassCounters:
        """Per-class counts over the examples, added over workers: each does its strided share."""
        counters = ClassCounters(len(self.data.class_names))
        index = np.arange(self.world.rank, len(examples.labels), self.world.world_size)
        for logits, labels in self._outputs(examples, index):
            counters.update(logits, labels)
        return counters.reduced(self.world)

    def _validate(self) -> dict[str, float]:
        """`val/` metrics and running maxima of the accuracies; empty where nothing is held out (a refit)."""
        if len(self.data.val.labels) == 0:
            return {}
        started = time.perf_counter()
        metrics = self.evaluate(self.data.val)
        for name, value in metrics.items():
            if name.endswith("_accuracy") and value > self.best.get(name, -math.inf):
                self.best[name], self.best_epoch[name] = value, self.epoch
        return {
            **{f"val/{name}": value for name, value in metrics.items()},
            **{f"val/best_{name}": value for name, value in self.best.items()},
            "time/eval_seconds": time.perf_counter() - started,
        }

    def _outputs(self, examples: Examples, index: Index) -> Iterator[tuple[Tensor, Tensor]]:
        """Float32 logits and labels of the examples at `index`, a batch at a time, on the device."""
        info = self.data.info
        numbers = max(math.prod(info.shape(self.entry.reads)), len(self.data.class_names))
        size = min(max(EVAL_BYTES // (4 * numbers), 32), 4096)
        chunks = [index[start : start + size] for start in range(0, len(index), size)]

        def load(chunk: Index) -> Batch:
            return load_batch(examples, self.entry.reads, chunk, None, self.device)

        self.model.eval()
        for batch in read_ahead(load, chunks):
            features, labels = to_device(batch, self.device)
            with self._threads(), _explained_memory(self._sizes()), torch.inference_mode(), self._autocast():
                logits = self._forward(features).float()
            yield logits, labels

    # ---------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> TrialState:
        """All that a run built from the same configuration needs to go on with the same numbers."""
        tensors = as_tensor_names("model/", self.model.state_dict())
        if self._optimizer is not None:
            for name, param in self.model.named_parameters():
                tensors |= as_tensor_names(f"optimizer/{name}/", self._optimizer.state.get(param, {}))
        metrics = {} if self.result is None else self.result.metrics
        scalars = {
            "trial": self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "metrics": metrics,
        }
        return TrialState(tensors, scalars)

    def load_state_dict(self, state: TrialState) -> None:
        """Go on from a state; raises CheckpointError where it is another trial's or lacks something."""
        if state.scalars.get("trial") != self._identity():
            raise CheckpointError("the checkpoint is of a trial with another configuration; choose another folder")
        try:
            self._load_tensors(state)
            self.epoch, self.step = int(state.scalars["epoch"]), int(state.scalars["step"])
            self.best, self.best_epoch = dict(state.scalars["best"]), dict(state.scalars["best_epoch"])
            self.result = EpochResult(self.epoch, self.step, dict(state.scalars["metrics"]))
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint lacks what this trial needs: {error}") from None

    def _load_tensors(self, state: TrialState) -> None:
        prefix = "model/"
        model = {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
        self.model.load_state_dict(model)
        if self._optimizer is None:
            return
        for name, param in self.model.named_parameters():
            start = f"optimizer/{name}/"
            found = {key.removeprefix(start): t for key, t in state.tensors.items() if key.startswith(start)}
            if found:
                # A step count stays where the optimiser keeps it; what has the parameter's shape goes to its device.
                self._optimizer.state[param] = {key: t.to(param.device, copy=True) for key, t in found.items()}

    def _agree_on_epoch(self) -> None:
        """Workers that start at different epochs would wait for each other for ever."""
        epochs = torch.tensor([self.epoch, -self.epoch])
        latest, earliest = self.world.max(epochs).tolist()
        if latest != -earliest:
            raise ImbvlmError(
                f"the trial's workers were restored at different epochs ({-earliest} to {latest}): all of them must "
                "see the same checkpoint, so keep it in shared storage (s3:// or a network file system)"
            )

    def _identity(self) -> str:
        return hashlib.sha256(self.config.key().encode()).hexdigest()[:32]

    # --------------------------------------------------------------------------------------------- small things

    @property
    def _train_config(self) -> TrainConfig:
        return needed(self.config.train)

    def _length(self) -> tuple[int, int]:
        """Epochs and optimiser steps of the whole run; a method without training has one epoch that only evaluates."""
        if not self.entry.trains:
            return 1, 0
        train = self._train_config
        if len(self.data.train.labels) == 0:
            raise ImbvlmError("there is no training image to train on; look at the manifest's train rows")
        per_epoch = self._steps_per_epoch()
        if train.num_steps is not None:
            return math.ceil(train.num_steps / per_epoch), train.num_steps
        num_epochs = train.num_epochs or 1
        return num_epochs, num_epochs * per_epoch

    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train.labels) / self._train_config.batch_size)

    def _objective(self) -> Objective:
        counts = self.data.class_stats.counts
        return Objective(self.config, counts, self.num_epochs, self.num_steps, self.device, self.world)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        assert optim is not None, "TrialConfig gives every method that trains its optim section"
        return build_optimizer(optim, self._params)

    def _lr(self, step: int) -> float:
        optim = self.config.optim
        assert optim is not None, "TrialConfig gives every method that trains its optim section"
        return optim.lr * lr_at(optim, step, self.num_steps)

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = "float32" if self.config.train is None else self.config.train.precision
        wanted = self.device.type == "cuda" if precision == "auto" else precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """train.num_threads while this trial computes, the process's own number again afterwards."""
        wanted = None if self.config.train is None else self.config.train.num_threads
        before = torch.get_num_threads()
        if wanted is None or wanted == before:
            yield
            return
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _sizes(self) -> str:
        batch_size = "" if self.config.train is None else f"train.batch_size {self.config.train.batch_size} over "
        return f"{batch_size}{self.world.world_size} worker(s), {len(self.data.class_names)} classes, on {self.device}"


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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator started from a seed, and given back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _explained_memory(sizes: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        cause = str(error).splitlines()[0]
        raise ImbvlmError(
            f"out of memory with {sizes}: {cause} Lower train.batch_size, or give the trial more workers"
        ) from None
