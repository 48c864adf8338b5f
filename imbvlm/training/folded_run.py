"""A trial that is scored over folds: a run for each fold, which sees all training rows but those that score it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from imbvlm.config.trial_config import TrialConfig, option_metric, selected_options
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.metrics import ClassCounters
from imbvlm.longtail.worker_group import WorkerGroup
from imbvlm.training.checkpoint import CheckpointError, TrialState
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_run import EpochResult, TrialRun, validation_metrics


class FoldedRun:
    """Runs of one configuration, one for each fold, whose epochs go side by side.

    Its `val/` metrics are of all folds' rows together, its seconds are sums. An option that validation selects is the
    median over the folds, and any other metric the mean. Official validation rows, which no fold trains on, are scored
    by all runs after the last epoch.
    """

    def __init__(self, runs: Sequence[TrialRun]) -> None:
        self.runs = tuple(runs)
        self.epoch = 0
        # Largest accuracies so far, and the epochs that first had them.
        self.best: dict[str, float] = {}
        self.best_epoch: dict[str, int] = {}
        self.result: EpochResult | None = None

    @property
    def config(self) -> TrialConfig:
        """The configuration of all runs."""
        return self.runs[0].config

    @property
    def data(self) -> tuple[TrialData, ...]:
        """The data of each fold."""
        return tuple(run.data for run in self.runs)

    @property
    def num_epochs(self) -> int:
        """Epochs of the longest run: with `train.num_steps` a smaller fold has more of them."""
        return max(run.num_epochs for run in self.runs)

    @property
    def val_counters(self) -> ClassCounters:
        """Counts of all folds' validation rows in the last epoch."""
        total = ClassCounters(len(self.runs[0].data.class_names))
        for run in self.runs:
            total.add(run.val_counters)
        return total

    def join(self, pack: TrialPack) -> None:
        """Train with the other members of a pack from now on, each fold with the same fold of theirs."""
        for number, run in enumerate(self.runs):
            run.join(pack.of_fold(number))

    def leave_pack(self) -> None:
        """Leave the pack, which continues without these runs."""
        for run in self.runs:
            run.leave_pack()

    def epochs(self, after_step: Callable[[], None]) -> Iterator[EpochResult]:
        """Train and evaluate all runs epoch by epoch; a trial that was restored at its end yields its last result.

        It can be saved between epochs only, so that `after_step` is not called.
        """
        if self.epoch >= self.num_epochs and self.result is not None:
            yield self.result
            return
        epochs = [run.epochs() for run in self.runs]
        while self.epoch < self.num_epochs:
            results = [
                result
                for run, results_of in zip(self.runs, epochs, strict=True)
                if run.epoch < run.num_epochs and (result := next(results_of, None)) is not None
            ]
            self.result = self._joined(results)
            self.epoch += 1
            yield self.result
            if self.result.failure is not None:
                return

    def gathered_logits(self, workers: WorkerGroup) -> Tensor | None:
        """Validation logits (N, C) of the last epoch, fold after fold; None where they would take too much memory.

        Official rows follow with the mean of all runs' logits; with them there is None before the end. Every worker
        must call it.
        """
        official = self.runs[0].data.official
        if official is not None and self.epoch < self.num_epochs:
            return None
        logits = [run.gathered_logits(workers) for run in self.runs]
        if official is not None:
            scored = [run.evaluate_full(official, keeps_logits=True).logits for run in self.runs]
            logits.append(torch.stack([of_run.float() for of_run in scored if of_run is not None]).mean(dim=0).half())
        return torch.cat([of_fold for of_fold in logits if of_fold is not None]) if None not in logits else None

    def _joined(self, results: Sequence[EpochResult]) -> EpochResult:
        epoch, step = self.epoch + 1, max(run.step for run in self.runs)
        failure = next((result.failure for result in results if result.failure is not None), None)
        if failure is not None:
            return EpochResult(epoch, step, {}, failure)
        options = {option_metric(option) for option in selected_options(self.config.to_tree())}
        metrics = {
            name: _join(name, [result.metrics[name] for result in results if name in result.metrics], options)
            for name in dict.fromkeys(name for result in results for name in result.metrics)
            if not name.startswith("val/")
        }
        return EpochResult(epoch, step, metrics | self._validation(epoch))

    def _validation(self, epoch: int) -> dict[str, float]:
        """`val/` metrics of all folds' rows, and the running maxima of the accuracies."""
        # The shot groups of all folds are those of the official counts.
        data = self.runs[0].data
        metrics = self.val_counters.compute(data.class_stats, has_groups=data.val.groups is not None)
        return validation_metrics(metrics, epoch, self.best, self.best_epoch)

    def state_dict(self) -> TrialState:
        """The state with which a trial of the same configuration and folds resumes to the same numbers."""
        states = [run.state_dict() for run in self.runs]
        tensors = {
            f"fold{number}/{name}": tensor
            for number, state in enumerate(states)
            for name, tensor in state.tensors.items()
        }
        scalars = {
            "folds": [state.scalars for state in states],
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "metrics": {} if self.result is None else self.result.metrics,
        }
        return TrialState(tensors, scalars)

    def load_state_dict(self, state: TrialState) -> None:
        """Resume from a state; raises CheckpointError for another trial's or an incomplete one."""
        folds: Sequence[Mapping[str, object]] = state.scalars.get("folds", ())
        if len(folds) != len(self.runs):
            raise CheckpointError(f"the checkpoint is of a trial with {len(folds)} folds, and not {len(self.runs)}")
        for number, (run, scalars) in enumerate(zip(self.runs, folds, strict=True)):
            prefix = f"fold{number}/"
            tensors = {
                name.removeprefix(prefix): tensor for name, tensor in state.tensors.items() if name.startswith(prefix)
            }
            run.load_state_dict(TrialState(tensors, dict(scalars)))
        self.epoch = int(state.scalars["epoch"])
        self.best, self.best_epoch = dict(state.scalars["best"]), dict(state.scalars["best_epoch"])
        self.result = EpochResult(self.epoch, max(run.step for run in self.runs), dict(state.scalars["metrics"]))


def _join(name: str, values: Sequence[float], options: set[str]) -> float:
    if name in options:
        return statistics.median(values)
    return math.fsum(values) if name.startswith("time/") else statistics.fmean(values)
