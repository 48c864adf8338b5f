"""Trains trials of one shape together over one stream of features: classifiers as one matrix, decoders in turns.

Members may differ in loss, learning rate, temperature and initial weights. Each keeps its own optimizer state,
evaluation and checkpoints: a pack only replaces its members' `StageTrainer.train_epoch`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from imbvlm.base.errors import PackError
from imbvlm.config.method_registry import METHODS
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.longtail.losses import ConfiguredLoss, stack_losses
from imbvlm.models.classifier import CosineClassifier, FeatureClassifier, LinearClassifier, l2_normalize
from imbvlm.models.decoder import num_parameters
from imbvlm.models.second_stage_modules import LogitTransform
from imbvlm.training.second_stage_trainer import FrozenFeatures, SecondStageTrainer
from imbvlm.training.stage_trainer import StageEpochResult, StageTrainer
from imbvlm.training.step.batch_source import Batch, CachedFeatureSource, to_device

Logits = Callable[[Tensor], Tensor]
BeginSecondStage = Callable[[FrozenFeatures | None], SecondStageTrainer]

# Options in which members of a pack may differ, by section.
_OWN_OPTIONS = {
    "classifier": ("kind", "temperature", "init"),
    "optim": (
        "lr", "weight_decay", "warmup_fraction", "lr_schedule", "cosine_cycles", "first_epoch_lr",
    ),
}  # fmt: skip


def pack_key(config: TrialConfig) -> str | None:
    """Equal for trials that can train together; None for a trial that can only train alone."""
    if METHODS[config.method].packs is None or config.reads_images:
        return None
    if config.feature_augmentation is not None or config.memory is not None:
        return None
    tree = config.to_tree()
    if tree["train"]["compile"]:
        return None
    del tree["loss"]
    # Second stages begin together; those of one name and length form a group.
    tree.pop("second_stage", None)
    for section, keys in _OWN_OPTIONS.items():
        tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    return json.dumps(tree, sort_keys=True)


def member_bytes(
    config: TrialConfig, token_width: int, pooled_width: int, num_classes: int, num_train: int, num_val: int
) -> int:
    """Bytes that one member adds to a pack: weights with their optimizer state, and logits.

    `token_width` and `pooled_width` are its encoder's. A decoder's activations don't count: one trains at a time.
    """
    width, of_decoder = pooled_width, 0
    decoder = config.section(DecoderConfig)
    if decoder is not None:
        width = decoder.width or token_width
        # Weights, their gradients, two moments.
        of_decoder = 4 * 4 * num_parameters(token_width, decoder)
        if config.second_stage is not None:
            # The decoder's outputs, which the second stage reads.
            of_decoder += 4 * width * (num_train * config.features.num_views + num_val)
    # As above, and a cosine classifier's directions with their gradients.
    weights = 6 * 4 * width * num_classes
    # Logits, their log-softmax, a loss's intermediate results, and gradients.
    logits = 6 * 4 * require_section(config.train).batch_size * num_classes
    # Validation logits in half precision: new, best and last.
    return of_decoder + weights + logits + 3 * 2 * num_val * num_classes


class TrialPack:
    """Members that train in lockstep: the first that needs an epoch trains it for all members."""

    def __init__(self) -> None:
        self.members: list[PackMember] = []
        self.broken_by: Exception | None = None
        self._folds: dict[int, TrialPack] = {}

    def of_fold(self, number: int) -> TrialPack:
        """The pack in which the members' runs of one fold train together."""
        return self._folds.setdefault(number, TrialPack())

    def add(
        self,
        trainer: StageTrainer,
        batch_source: CachedFeatureSource,
        begin_second_stage: BeginSecondStage | None,
        *,
        in_turns: bool,
    ) -> PackMember:
        """Add a trainer that hasn't begun, of a trial with the other members' `pack_key`.

        `begin_second_stage` puts a trial's second stage in place after its first. With `in_turns` its first stage takes
        its own steps (`Method.packs`).
        """
        shared = self.members[0].batch_source if self.members else batch_source
        member = PackMember(self, trainer, shared, begin_second_stage, in_turns)
        self.members.append(member)
        return member

    def begin_second_stages(self) -> None:
        """Begin the members' second stages; their first stages end with the same epoch."""
        features: FrozenFeatures | None = None
        for index, member in enumerate(self.members):
            if member.begin_second_stage is not None:
                second = member.begin_second_stage(features)
                member.trainer, member.group = second.trainer, second.pack_key
                if member.in_turns:
                    # Each reads its own decoder's outputs.
                    member.group += f" {index}"
                else:
                    features = second.features
                member.in_turns = False


@dataclass(eq=False)
class PackMember:
    """A member: the trainer of its present stage, None where nothing trains, and the group that it trains with.

    All members evaluate with the same `batch_source`. With `in_turns` the present stage takes its own steps in place of
    being stacked.
    """

    pack: TrialPack
    trainer: StageTrainer | None
    batch_source: CachedFeatureSource
    begin_second_stage: BeginSecondStage | None
    in_turns: bool
    group: str = ""
    _trained: StageEpochResult | None = None

    def train_epoch(self, epoch: int, step: int) -> StageEpochResult:
        """The result of its trainer's own `train_epoch(epoch, step)`, to rounding; raises PackError in all members."""
        if self._trained is None:
            self._train_group(epoch, step)
        result, self._trained = self._trained, None
        assert result is not None, "a member belongs to its group"
        return result

    def _train_group(self, epoch: int, step: int) -> None:
        group = {
            member: member.trainer for member in self.pack.members if member.trainer and member.group == self.group
        }
        train = train_in_turns if self.in_turns or len(group) == 1 else train_stacked
        if self.pack.broken_by is None:
            try:
                for member, trained in zip(group, train(list(group.values()), epoch, step), strict=True):
                    member._trained = trained
            except Exception as error:
                if len(group) == 1:
                    raise
                # All members have trained a part of the epoch, which can't be undone.
                self.pack.broken_by = error
        if self.pack.broken_by is not None:
            cause = self.pack.broken_by
            raise PackError(
                f"{len(self.pack.members)} trials that trained together stopped in epoch {epoch + 1}: "
                f"{type(cause).__name__}: {cause}"
            ) from cause

    def remove(self) -> None:
        """Remove this member from the pack."""
        self.pack.members.remove(self)


def train_in_turns(trainers: Sequence[StageTrainer], epoch: int, step: int) -> list[StageEpochResult]:
    """As `train_stacked`, for trainers that each take their own step on a batch before the next is read.

    Stacking does not speed up models with large matrix products. Each batch is read and copied to the device once, the
    activations of one trainer are in memory at a time, and each result is bitwise that of training alone.
    """
    started, first = time.perf_counter(), trainers[0]
    plan = first.plan_of(epoch)
    epochs = [trainer.begin_epoch(plan, epoch, step) for trainer in trainers]
    for batch in first.read(plan, epochs[0].shares, epoch):
        continuing = [in_progress for in_progress in epochs if not in_progress.failed]
        if not continuing:
            break
        on_device = Batch(*to_device(batch, first.device), batch.examples)
        for in_progress in continuing:
            in_progress.take(on_device)
    seconds = (time.perf_counter() - started) / len(trainers)
    return [in_progress.end(seconds) for in_progress in epochs]


def train_stacked(trainers: Sequence[StageTrainer], epoch: int, step: int) -> list[StageEpochResult]:
    """Train one epoch (0-based) of each trainer over the batches of the first, with stacked parameters.

    A member whose loss or gradient is not finite fails alone, since its numbers reach no other member.
    """
    started, first = time.perf_counter(), trainers[0]
    plan = first.plan_of(epoch)
    shares, sizes = first.split_epoch(plan, step)
    stacks = _stacks(trainers)
    order = [trainer for stack in stacks for trainer in stack.trainers]
    losses_at = [trainer.losses_of(epoch) for trainer in order]
    optimizer = _joint_optimizer(trainers)
    records: list[Tensor] = []
    losses: list[ConfiguredLoss] = []
    for number, batch in enumerate(first.read(plan, shares, epoch), start=step):
        inputs, labels = to_device(batch, first.device)
        current = [loss_at(number) for loss_at in losses_at]
        if current != losses:
            losses, stacked_loss = current, stack_losses(current, first.device)
        member_losses = stacked_loss(torch.cat([stack.logits(inputs) for stack in stacks], dim=1), labels)
        for stack in stacks:
            stack.clear_gradients()
        member_losses.sum().backward()  # type: ignore[no-untyped-call]
        norms = torch.cat([stack.clip(first.train.clip_grad_norm) for stack in stacks])
        for group, trainer in zip(optimizer.param_groups, trainers, strict=True):
            group["lr"] = trainer.lr(number)
        optimizer.step()
        records.append(torch.stack([member_losses.detach(), norms]))
    for trainer in trainers:
        for param in trainer.params.values():
            trainer.optimizer.state[param] = optimizer.state[param]
            param.grad = None
    values = torch.stack(records).cpu().double().numpy()
    seconds = (time.perf_counter() - started) / len(trainers)
    results = {
        id(trainer): _result(trainer, values[:, 0, index], values[:, 1, index], epoch, step, sizes, seconds)
        for index, trainer in enumerate(order)
    }
    return [results[id(trainer)] for trainer in trainers]


@dataclass(frozen=True)
class _Stack:
    """Models of one kind; the members' parameters are views of `params`, each (M, ...).

    `logits` maps features (B, D) to logits (B, M, C).
    """

    trainers: list[StageTrainer]
    params: list[Tensor]
    logits: Logits

    def clear_gradients(self) -> None:
        for param in self.params:
            param.grad = None

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale each member's gradients to at most max_norm and assign them; returns the norms (M,) before."""
        gradients = [param.grad for param in self.params if param.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])
        norms = torch.linalg.vector_norm(norms, dim=0)
        if max_norm is not None:
            factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factors.view(-1, *(1,) * (gradient.ndim - 1)))
        for index, trainer in enumerate(self.trainers):
            for param, gradient in zip(trainer.params.values(), gradients, strict=True):
                param.grad = gradient[index]
        return norms


def _stacks(trainers: Sequence[StageTrainer]) -> list[_Stack]:
    """Members by the kind of their model: linear or cosine, or a second stage on the logits of one of these."""
    kinds: dict[tuple[type[nn.Module], ...], list[StageTrainer]] = {}
    for trainer in trainers:
        model = _trained_module(trainer)
        kind = (type(model), type(model.first_stage)) if isinstance(model, LogitTransform) else (type(model),)
        kinds.setdefault(kind, []).append(trainer)
    return [_stack(members) for members in kinds.values()]


def _stack(trainers: list[StageTrainer]) -> _Stack:
    params = [_stack_params(each) for each in zip(*(trainer.params.values() for trainer in trainers), strict=True)]
    models = [_trained_module(trainer) for trainer in trainers]
    transforms = [model for model in models if isinstance(model, LogitTransform)]
    if transforms:
        logits = _transform_logits(transforms, dict(zip(trainers[0].params, params, strict=True)))
    else:
        logits = _classifier_logits(models, *params)
    return _Stack(trainers, params, logits)


def _trained_module(trainer: StageTrainer) -> nn.Module:
    """The trained module of a model without a decoder: `pack_key` admits only classifiers on stored features."""
    return trainer.model.classifier if isinstance(trainer.model, FeatureClassifier) else trainer.model


def _classifier_logits(classifiers: Sequence[nn.Module], weight: Tensor, bias: Tensor | None = None) -> Logits:
    """Logits of classifiers of one kind with stacked weight (M, C, D), and bias (M, C) if they are linear."""
    number, num_classes, width = weight.shape
    if bias is not None:
        return lambda features: F.linear(features, weight.view(-1, width), bias.view(-1)).view(-1, number, num_classes)
    temperatures = [[module.temperature] for module in classifiers if isinstance(module, CosineClassifier)]
    temperature = torch.tensor(temperatures, device=weight.device)

    def cosine(features: Tensor) -> Tensor:
        flat = F.linear(l2_normalize(features), l2_normalize(weight).view(-1, width))
        return flat.view(-1, number, num_classes) / temperature

    return cosine


def _transform_logits(models: Sequence[LogitTransform], params: Mapping[str, Tensor]) -> Logits:
    """Logits of second stages of one kind with stacked parameters: first stages as one product, then each transform."""
    first = [model.first_stage for model in models]
    weights = torch.stack([stage.weight.detach() for stage in first])
    biases = [stage.bias.detach() for stage in first if isinstance(stage, LinearClassifier)]
    first_logits = _classifier_logits(first, weights, *([torch.stack(biases)] if biases else []))
    buffers = {name: torch.stack([model.get_buffer(name) for model in models]) for name, _ in models[0].named_buffers()}

    def transform(state: dict[str, Tensor], logits: Tensor, features: Tensor) -> Tensor:
        return functional_call(models[0], state, (features, logits))

    transform_all = vmap(transform, in_dims=(0, 1, None), out_dims=1)
    return lambda features: transform_all({**params, **buffers}, first_logits(features), features)


def _stack_params(params: Sequence[Tensor]) -> Tensor:
    """Stack parameters, which become views of the stack."""
    stack = torch.stack([param.detach() for param in params])
    for index, param in enumerate(params):
        param.data = stack[index]
    return stack.requires_grad_()


def _joint_optimizer(trainers: Sequence[StageTrainer]) -> torch.optim.Optimizer:
    """One optimizer with a group for each member: its step is a step of each, with their own rates and decays."""
    groups = []
    for trainer in trainers:
        (group,) = trainer.optimizer.param_groups
        groups.append(dict(group))
    joint = type(trainers[0].optimizer)(groups)  # type: ignore[call-arg]
    for trainer in trainers:
        for param in trainer.params.values():
            if param in trainer.optimizer.state:
                joint.state[param] = trainer.optimizer.state[param]
    return joint


def _result(
    trainer: StageTrainer,
    losses: np.ndarray,
    norms: np.ndarray,
    epoch: int,
    step: int,
    sizes: Sequence[int],
    seconds: float,
) -> StageEpochResult:
    """A member's result, with an equal share of the epoch's time."""
    broken = np.flatnonzero(~(np.isfinite(losses) & np.isfinite(norms)))
    valid = (losses[: broken[0] + 1] if broken.size else losses).tolist()
    return trainer.epoch_result(epoch, step + len(valid), valid, bool(broken.size), sizes, sum(sizes), seconds)
