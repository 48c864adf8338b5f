"""The training loop of one trial in plain torch: yields an EpochResult after every epoch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.method_registry import METHODS
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.second_stage_registry import num_stage_epochs
from imbvlm.config.training_sections import AugmentationConfig
from imbvlm.config.trial_config import TrialConfig, option_metric, require_section, selected_options
from imbvlm.data.image_stream import ImageStream, stream_in_threads
from imbvlm.data.images.augmentation import Augmentation
from imbvlm.data.images.preprocess import CROP_SCALE
from imbvlm.features.trial_data import RowSource, StoredRows, TrialData
from imbvlm.longtail.class_sampling import epoch_plan
from imbvlm.longtail.metrics import ClassCounters
from imbvlm.longtail.worker_group import SINGLE_WORKER, WorkerGroup
from imbvlm.models.classifier import FeatureClassifier
from imbvlm.models.encoder_classifier import EncoderClassifier
from imbvlm.models.model_builder import build_model
from imbvlm.models.model_state import count_parameters, load_own_state_dict, own_state_dict
from imbvlm.training.checkpoint import CheckpointError, TrialState, as_tensor_names
from imbvlm.training.evaluator import EvalResult, Evaluator
from imbvlm.training.second_stage_trainer import FrozenFeatures, SecondStageTrainer, check_can_select
from imbvlm.training.stage_trainer import Span, StageTrainer
from imbvlm.training.step.batch_mixing import BatchMixer, FeatureTransfer
from imbvlm.training.step.batch_source import BatchSource, CachedFeatureSource, ImageSource, Index, StoredFeatureSource
from imbvlm.training.step.compute_context import ComputeContext
from imbvlm.training.step.distributed import broadcast_state
from imbvlm.training.step.loss_schedule import LossSchedule
from imbvlm.training.trial_pack import PackMember, TrialPack
from imbvlm.training.validation_logits import RowLogits

NUM_FIRST_LOSSES = 8
# Separates a second stage's random numbers from its first stage's.
_SECOND_STAGE_STREAM = 0x2D57


@dataclass(frozen=True)
class EpochResult:
    """The result of one epoch: `epoch` from 1, `step` optimizer steps so far, fractions and seconds in `metrics`.

    `failure` is a sentence if a loss or gradient was not finite; the run ends with that result.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    failure: str | None = None


def build_trial(
    config: TrialConfig,
    data: TrialData,
    device: str | torch.device = "cpu",
    workers: WorkerGroup = SINGLE_WORKER,
    stream: ImageStream = stream_in_threads,
) -> TrialRun:
    """Build a trial that is ready to run; its numbers depend on the configuration and the seed alone.

    `stream` reads the images of a trial that reads images. Raises ImbvlmError where the method can't be built on these
    features.
    """
    device, spans = torch.device(device), _spans(config, data)
    check_can_select(config, data)
    is_decoder = METHODS[config.method].reads == "tokens" and not config.reads_images
    computing = ComputeContext(
        config.train, device, workers.world_size, len(data.class_names), is_decoder,
        config.section(DecoderConfig), data.info.num_tokens, data.info.token_width,
    )  # fmt: skip
    with computing.working(), _seeded(_seed_of(config)):
        model = build_model(config, data.model_inputs, device)
    broadcast_state(own_state_dict(model), workers)
    return TrialRun(config, data, device, workers, stream, spans, computing, model)


class TrialRun:
    """One trial: its model, the trainer of its present stage, and its progress.

    With a second stage the epochs after the first stage's have the metrics of the model with the second stage's
    classifier; the best values are the largest over both stages.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: TrialData,
        device: torch.device,
        workers: WorkerGroup,
        stream: ImageStream,
        spans: tuple[Span, Span],
        computing: ComputeContext,
        model: nn.Module,
    ) -> None:
        self.config = config
        self.data = data
        self.device = device
        self.workers = workers
        self.entry = METHODS[config.method]
        self.epoch = 0
        self.step = 0
        # Largest accuracies so far, and the epochs that first had them.
        self.best: dict[str, float] = {}
        self.best_epoch: dict[str, int] = {}
        self.result: EpochResult | None = None
        # Both are of the last epoch; the logits are None where they would take too much memory.
        self.val_logits: RowLogits | None = None
        self.val_counters = ClassCounters(len(data.class_names))
        self.first_losses: list[float] = []
        self._first, self._last = spans
        self._computing, self.model = computing, model
        self.parameters = count_parameters(self.model, data.info)
        self.batch_source = self._build_batch_source(stream)
        # A compiled module shares the model's parameters and leaves the names in its state_dict unchanged.
        is_compiled = config.train is not None and config.train.compile
        self._forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if is_compiled else self.model
        self._evaluator = Evaluator(data, self.batch_source, device, workers, self._computing.evaluating)
        self._trainer = self._build_first_stage() if self.entry.trains else None
        self._second: SecondStageTrainer | None = None
        # Metrics of a second stage's start, which its first epoch reports.
        self._start_metrics: dict[str, float] = {}
        self._member: PackMember | None = None

    @property
    def num_epochs(self) -> int:
        """Epochs of both stages; a method that does not train has one epoch, which only evaluates."""
        return self._last.end_epoch

    def join(self, pack: TrialPack) -> None:
        """Train with the other members of a pack from now on; a run that resumes from a checkpoint trains alone."""
        if self._trainer is not None and self.step == 0:
            batch_source = CachedFeatureSource(self.data.info, self.entry.reads, self.device)
            second = None if self.config.second_stage is None else self._begin_second_stage
            self._member = pack.add(self._trainer, batch_source, second, in_turns=self.entry.packs == "in_turns")
            self._evaluator = replace(self._evaluator, batch_source=self._member.batch_source)

    def leave_pack(self) -> None:
        """Leave the pack, which continues without this run."""
        if self._member is not None:
            self._member.remove()
            self._member = None

    # ------------------------------------------------------------------------------------------------ training

    def epochs(self, after_step: Callable[[], None] = lambda: None) -> Iterator[EpochResult]:
        """Train and evaluate epoch by epoch; a run that was restored at its end yields its last result again.

        `after_step` is called where the run can be saved, also within an epoch.
        """
        self._check_same_start()
        if self.epoch >= self.num_epochs and self.result is not None:
            yield self.result
            return
        while self.epoch < self.num_epochs:
            with self._computing.working():
                self.result = self._run_epoch(after_step)
            yield self.result
            if self.result.failure is not None:
                return

    def _run_epoch(self, after_step: Callable[[], None]) -> EpochResult:
        metrics: dict[str, float] = {}
        if self.epoch == self._first.end_epoch and self._second is None:
            if self._member is None:
                self._begin_second_stage(None)
            else:
                self._member.pack.begin_second_stages()
        if self.epoch == 0:
            metrics |= self._select_options()
        metrics |= self._start_metrics
        self._start_metrics = {}
        if self._second is not None:
            self._second.prepare()
        trainer = self._trainer
        if trainer is not None:
            if self._member is None:
                trained = trainer.train_epoch(self.epoch, self.step, partial(self._stepped, after_step))
            else:
                trained = self._member.train_epoch(self.epoch, self.step)
            self.step = trained.step
            if self.epoch == 0:
                self.first_losses = trained.losses[:NUM_FIRST_LOSSES]
            if trained.failure is not None:
                return EpochResult(self.epoch + 1, self.step, {}, trained.failure)
            metrics |= trained.metrics
        self.epoch += 1
        metrics |= self._validate()
        num_unreadable = self.batch_source.count_unreadable(self.workers)
        if num_unreadable:
            metrics["data/unreadable_images"] = float(num_unreadable)
        if not math.isfinite(metrics.get("val/loss", 0.0)):
            return EpochResult(self.epoch, self.step, {}, self._failure(trainer, "validation loss"))
        return EpochResult(self.epoch, self.step, metrics)

    def _stepped(self, after_step: Callable[[], None], step: int) -> None:
        self.step = step
        # Epochs of a second stage take seconds, and its start is not saved.
        if self._second is None:
            after_step()

    def _failure(self, trainer: StageTrainer | None, noun: str) -> str:
        if trainer is None:
            return f"the {noun} of {self.config.method} isn't finite; check the stored features"
        return trainer.failure(noun, self.epoch - 1, self.step)

    def _build_first_stage(self) -> StageTrainer:
        train, optim = require_section(self.config.train), self.config.optim
        assert optim is not None, "TrialConfig gives every method that trains its optim section"
        losses = LossSchedule(
            self.config,
            self.data.class_stats.counts,
            self._first.num_epochs,
            self._first.num_steps,
            self.device,
            self.workers,
            self.data.info.logit_scale or 1.0,
        )
        return StageTrainer(
            model=self.model,
            forward=self._forward,
            optim=optim,
            train=train,
            span=self._first,
            steps_per_epoch=_steps_per_epoch(self.config, self.data),
            plan_of=partial(
                epoch_plan,
                self.data.train.labels,
                len(self.data.class_names),
                self.config.data.class_sampling,
                train.seed,
                num_epochs=self._first.num_epochs,
                num_views=self.data.train.num_views,
            ),
            read=partial(self.batch_source.train, self.data.train),
            losses_of=losses.at_epoch,
            loss_name=losses.name,
            fix="lower optim.lr or raise optim.warmup_fraction",
            device=self.device,
            workers=self.workers,
            autocast=self._computing.autocast,
            mix=self._mixer(),
            num_parts=1 if self.config.memory is None else self.config.memory.accumulation,
        )

    def _build_batch_source(self, stream: ImageStream) -> BatchSource:
        if not isinstance(self.model, EncoderClassifier):
            return StoredFeatureSource(self.data.info, self.entry.reads, self.device, self._transfer())
        return ImageSource(
            self.model.preprocess,
            _augmentation(self.config.augmentation),
            self._seed,
            self._first.num_epochs,
            stream,
            self.device,
            strict=self.config.data.on_bad_image == "strict",
            expand=self.config.eval.expand,
        )

    def _mixer(self) -> BatchMixer | None:
        """The mixer of the first stage's batches, of images or features."""
        images, features = self.config.mixing, self.config.feature_augmentation
        mixup = (0.0 if images is None else images.mixup) + (0.0 if features is None else features.mixup)
        cutmix = 0.0 if images is None else images.cutmix
        if not mixup and not cutmix:
            return None
        return BatchMixer(mixup, cutmix, len(self.data.class_names), self._seed, self.workers.rank)

    def _transfer(self) -> FeatureTransfer | None:
        section, train = self.config.feature_augmentation, self.data.train
        if section is None or not section.transfer:
            return None
        assert isinstance(train, StoredRows), (
            "TrialConfig lets only trials on stored features have feature augmentation"
        )
        return FeatureTransfer(section.transfer, train, self.data.class_stats, self._seed)

    def _begin_second_stage(self, features: FrozenFeatures | None) -> SecondStageTrainer:
        """Put the second stage's classifier in place after the first stage, and select what its start decides."""
        self._second = self._build_second_stage(features)
        self._start_metrics = self._second.start()
        return self._second

    def _build_second_stage(self, features: FrozenFeatures | None = None) -> SecondStageTrainer:
        """Freeze the decoder and put the second stage's classifier in place, untrained; its trainer trains next."""
        config, model = self.config.second_stage, self.model
        assert config is not None, "without a second stage there is no epoch after the first's"
        assert isinstance(model, FeatureClassifier), "METHODS lets only such methods have a second stage"
        seed = int(np.random.SeedSequence([_SECOND_STAGE_STREAM, self._seed]).generate_state(1)[0])
        with _seeded(seed):
            second = SecondStageTrainer(
                config, require_section(self.config.train), model, self._last, self._evaluator, features
            )
        broadcast_state(model.classifier.state_dict(), self.workers)
        self._forward, self._trainer = model, second.trainer
        return second

    def _select_options(self) -> dict[str, float]:
        """Give a model that nothing trains the options that validation selects; every worker must call it."""
        val, name = self.data.val, self.config.method
        if self.entry.select is None or None not in selected_options(self.config.to_tree()).values():
            return {}
        assert isinstance(val, StoredRows), "TrialConfig lets only trials on stored features have such a method"
        features = self._evaluator.all_views(lambda batch: batch, val, self.data.info.pooled_width)
        targets = torch.from_numpy(val.labels).to(self.device)
        selected = self.entry.select(self.model, features, targets, getattr(self.config, name))
        return {option_metric(f"{name}.{option}"): value for option, value in selected.items()}

    # ---------------------------------------------------------------------------------------------- evaluation

    def counters(self, examples: RowSource) -> ClassCounters:
        """Per-class counts over the examples, summed over workers, each of which evaluates every n-th example."""
        self.model.eval()
        return self._evaluator.counters(self._forward, examples)

    def evaluate_full(
        self,
        examples: RowSource,
        adjust: Callable[[Tensor, Index], Tensor] | None = None,
        views: Sequence[int | None] = (None,),
        *,
        keeps_logits: bool = False,
    ) -> EvalResult:
        """As `counters`, with the further results that reports show; every worker must call it.

        `adjust` gives adjusted logits, which are evaluated too. With several `views` the mean logits of each example
        count. `keeps_logits` keeps those of the model as exported.
        """
        self.model.eval()
        return self._evaluator.evaluate_full(self._forward, examples, adjust, views, keeps_logits=keeps_logits)

    def gathered_logits(self, workers: WorkerGroup) -> Tensor | None:
        """Validation logits (N, C) of the last epoch; None where they would take too much memory.

        Every worker must call it, since each has only its share of them.
        """
        return None if self.val_logits is None else self.val_logits.gathered(workers)

    def _validate(self) -> dict[str, float]:
        """`val/` metrics and running maxima of the accuracies; empty without validation rows (in a refit)."""
        if len(self.data.val.labels) == 0:
            return {}
        started = time.perf_counter()
        shape = len(self.data.val.labels), len(self.data.class_names)
        self.val_logits = RowLogits(*shape) if RowLogits.fits(*shape) else None
        self.model.eval()
        if self._second is None:
            counters = self._evaluator.counters(self._forward, self.data.val, self.val_logits)
        else:
            counters = self._second.validate(self.val_logits)
        self.val_counters = counters
        metrics = counters.compute(self.data.class_stats, has_groups=self.data.val.groups is not None)
        validation = validation_metrics(metrics, self.epoch, self.best, self.best_epoch)
        return {**validation, "time/eval_seconds": time.perf_counter() - started}

    # -------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> TrialState:
        """The state with which a run of the same configuration resumes to the same numbers."""
        tensors = as_tensor_names("model/", own_state_dict(self.model))
        if self._trainer is not None:
            for name, param in self.model.named_parameters():
                tensors |= as_tensor_names(f"optimizer/{name}/", self._trainer.optimizer.state.get(param, {}))
        metrics = {} if self.result is None else self.result.metrics
        scalars = {
            "trial": self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "metrics": metrics,
            "losses": [] if self._trainer is None else self._trainer.losses_so_far(),
        }
        return TrialState(tensors, scalars)

    def load_state_dict(self, state: TrialState) -> None:
        """Resume from a state; raises CheckpointError for another trial's or an incomplete one."""
        if state.scalars.get("trial") != self._identity():
            raise CheckpointError("the checkpoint is of a trial with another configuration")
        try:
            self.epoch, self.step = int(state.scalars["epoch"]), int(state.scalars["step"])
            if self.epoch > self._first.end_epoch:
                self._second = self._build_second_stage()
            self._load_tensors(state)
            if self._trainer is not None:
                self._trainer.resume_from(state.scalars["losses"])
            self.best, self.best_epoch = dict(state.scalars["best"]), dict(state.scalars["best_epoch"])
            self.result = EpochResult(self.epoch, self.step, dict(state.scalars["metrics"]))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint lacks what this trial needs: {error}") from None

    def _load_tensors(self, state: TrialState) -> None:
        prefix = "model/"
        model = {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
        load_own_state_dict(self.model, model)
        if self._trainer is None:
            return
        for name, param in self.model.named_parameters():
            start = f"optimizer/{name}/"
            saved = {key.removeprefix(start): t for key, t in state.tensors.items() if key.startswith(start)}
            if saved:
                self._trainer.optimizer.state[param] = {key: _like(param, tensor) for key, tensor in saved.items()}

    def _check_same_start(self) -> None:
        """Raise ImbvlmError for workers that start at different epochs or steps: they would wait forever."""
        extremes = torch.tensor([self.epoch, -self.epoch, self.step, -self.step])
        latest, earliest, last_step, first_step = self.workers.max(extremes).tolist()
        if latest != -earliest or last_step != -first_step:
            raise ImbvlmError(
                f"the trial's workers were restored at different epochs ({-earliest} to {latest}) or steps "
                f"({-first_step} to {last_step}). All of them must see the same checkpoint: keep it in shared storage "
                "(s3:// or a network file system)."
            )

    def _identity(self) -> str:
        return hashlib.sha256(self.config.key().encode()).hexdigest()[:32]

    # --------------------------------------------------------------------------------------------- small things

    @property
    def _seed(self) -> int:
        return _seed_of(self.config)


def validation_metrics(
    metrics: Mapping[str, float], epoch: int, best: dict[str, float], best_epoch: dict[str, int]
) -> dict[str, float]:
    """`val/` metrics of an epoch, with the running maxima of the accuracies.

    Updates `best`, the largest accuracies so far, and `best_epoch`, the epochs that first had them.
    """
    for name, value in metrics.items():
        if name.endswith("_accuracy") and value > best.get(name, -math.inf):
            best[name], best_epoch[name] = value, epoch
    running = {f"val/best_{name}": value for name, value in best.items()}
    return {f"val/{name}": value for name, value in metrics.items()} | running


def _augmentation(section: AugmentationConfig | None) -> Augmentation:
    """The augmentation; a frozen encoder's fresh crops have the distribution of its stored views, for comparison."""
    if section is None:
        return Augmentation(crop_scale=CROP_SCALE)
    options = section.model_dump(exclude={"min_scale", "color_jitter"})
    return Augmentation(**options, crop_scale=(section.min_scale, 1.0), jitter=section.color_jitter)


def _like(param: Tensor, saved: Tensor) -> Tensor:
    """A saved optimizer tensor in the parameter's memory layout, which fused kernels require."""
    if saved.shape != param.shape:
        return saved.to(param.device, copy=True)
    return torch.empty_like(param.detach(), dtype=saved.dtype).copy_(saved)


def _spans(config: TrialConfig, data: TrialData) -> tuple[Span, Span]:
    """Return the first stage's epochs and steps, and the second stage's after them, which may be none.

    A method without training has one epoch that only evaluates. Raises ImbvlmError without a training image.
    """
    if not METHODS[config.method].trains:
        return Span(0, 1, 0, 0), Span(1, 0, 0, 0)
    train, per_epoch = require_section(config.train), _steps_per_epoch(config, data)
    if per_epoch == 0:
        raise ImbvlmError("there is no training image to train on. `imbvlm manifest show` prints the splits.")
    num_steps = train.num_steps or (train.num_epochs or 1) * per_epoch
    first = Span(0, math.ceil(num_steps / per_epoch), 0, num_steps)
    num_epochs = num_stage_epochs(config.second_stage)
    return first, Span(first.end_epoch, num_epochs, num_steps, num_epochs * per_epoch)


def _steps_per_epoch(config: TrialConfig, data: TrialData) -> int:
    return math.ceil(len(data.train.labels) / require_section(config.train).batch_size)


def _seed_of(config: TrialConfig) -> int:
    return 0 if config.train is None else config.train.seed


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within, torch's CPU generator starts from a seed; its state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
