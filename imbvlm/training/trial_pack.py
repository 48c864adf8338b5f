"""Trials of one shape trained together over one stream of features: classifiers as one matrix, decoders by turns.

Whatever tells the members apart (loss and its knobs, learning rate, temperature, how weights start) stays each one's
own, and so do its optimiser's state, its evaluation and its checkpoints: a pack only takes the place of its members'
`StageTrainer.train_epoch`.
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
from imbvlm.longtail.class_sampling import batches
from imbvlm.longtail.losses import ConfiguredLoss, stack_losses
from imbvlm.models.classifier import CosineClassifier, FeatureClassifier, LinearClassifier, l2_normalize
from imbvlm.models.decoder import num_parameters
from imbvlm.models.second_stage_modules import LogitTransform
from imbvlm.training.second_stage_trainer import FrozenFeatures, SecondStageTrainer
from imbvlm.training.stage_trainer import StageEpochResult, StageTrainer
from imbvlm.training.step.batch_source import Batch, CachedFeatureSource, to_device

Logits = Callable[[Tensor], Tensor]
BeginSecondStage = Callable[[FrozenFeatures | None], SecondStageTrainer]

# What may differ between members of a pack, below its section.
_OWN = {
    "classifier": ("kind", "temperature", "init"),
    "optim": (
        "lr", "weight_decay", "warmup_fraction", "lr_schedule", "cosine_cycles", "first_epoch_lr",
    ),
}  # fmt: skip


def pack_key(config: TrialConfig) -> str | None:
    """Equal for trials that can be trained together; None for one that can't be with any other."""
    alone = (config.feature_augmentation, config.memory)
    if METHODS[config.method].packs is None or config.reads_images or any(one is not None for one in alone):
        return None
    tree = config.to_tree()
    if tree["train"]["compile"]:
        return None
    del tree["loss"]
    # Second stages begin together too, those of one name and length as a group of their own.
    tree.pop("second_stage", None)
    for section, keys in _OWN.items():
        tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    return json.dumps(tree, sort_keys=True)


def member_bytes(
    config: TrialConfig, token_width: int, pooled_width: int, num_classes: int, num_train: int, num_val: int
) -> int:
    """Bytes that one member adds to a pack: weights with what optimisers keep of them, and its logits.

    `token_width` and `pooled_width` are its tower's. A decoder's activations aren't counted: one of them trains at a
    time.
    """
    width, of_decoder = pooled_width, 0
    decoder = config.section(DecoderConfig)
    if decoder is not None:
        width = decoder.width or token_width
        # Weights, their gradients, two moments.
        of_decoder = 4 * 4 * num_parameters(token_width, decoder)
        if config.second_stage is not None:
            # Its outputs, which the second stage reads.
            of_decoder += 4 * width * (num_train * config.features.num_views + num_val)
    # As above, and directions of a cosine classifier and their gradients.
    weights = 6 * 4 * width * num_classes
    # Logits, their log-softmax, what a loss makes of them, and gradients.
    logits = 6 * 4 * require_section(config.train).batch_size * num_classes
    # Validation logits in half precision: new, best and last.
    return of_decoder + weights + logits + 3 * 2 * num_val * num_classes


class TrialPack:
    """Members that train in lockstep: the first that wants an epoch trains it for all that haven't left."""

    def __init__(self) -> None:
        self.seats: list[PackMember] = []
        self.broken_by: Exception | None = None

    def add(
        self,
        course: StageTrainer,
        feed: CachedFeatureSource,
        begin_second_stage: BeginSecondStage | None,
        *,
        in_turns: bool,
    ) -> PackMember:
        """A place for a course that hasn't begun, of a trial with the others' `pack_key`.

        `begin_second_stage` puts a trial's second stage in place, once its first has ended. `in_turns`: its first stage
        takes its own steps (`Method.packs`).
        """
        seat = PackMember(self, course, self.seats[0].feed if self.seats else feed, begin_second_stage, in_turns)
        self.seats.append(seat)
        return seat

    def begin_second_stages(self) -> None:
        """The first stages have ended, all with the same epoch."""
        features: FrozenFeatures | None = None
        for place, seat in enumerate(self.seats):
            if seat.begin_second_stage is not None:
                second = seat.begin_second_stage(features)
                seat.course, seat.group = second.course, second.pack_key
                if seat.in_turns:
                    # Each reads its own decoder's outputs.
                    seat.group += f" {place}"
                else:
                    features = second.features
                seat.in_turns = False


@dataclass(eq=False)
class PackMember:
    """A member's place: what trains it now, None where nothing does, and the group that it trains with.

    `feed` is what all members evaluate by.
    """

    pack: TrialPack
    course: StageTrainer | None
    feed: CachedFeatureSource
    begin_second_stage: BeginSecondStage | None
    # Whether its present stage takes its own steps, instead of being stacked with those of others.
    in_turns: bool
    group: str = ""
    _trained: StageEpochResult | None = None

    def train_epoch(self, epoch: int, step: int) -> StageEpochResult:
        """What its course's own `train_epoch(epoch, step)` gives, to rounding; raises PackError for all alike."""
        if self._trained is None:
            self._train_group(epoch, step)
        found, self._trained = self._trained, None
        assert found is not None, "it is one of its group"
        return found

    def _train_group(self, epoch: int, step: int) -> None:
        group = {seat: seat.course for seat in self.pack.seats if seat.course and seat.group == self.group}
        train = train_in_turns if self.in_turns or len(group) == 1 else train_stacked
        if self.pack.broken_by is None:
            try:
                for seat, trained in zip(group, train(list(group.values()), epoch, step), strict=True):
                    seat._trained = trained
            except Exception as error:
                if len(group) == 1:
                    raise
                # All have moved on by a part of the epoch, which none can take back.
                self.pack.broken_by = error
        if self.pack.broken_by is not None:
            cause = self.pack.broken_by
            raise PackError(
                f"{len(self.pack.seats)} trials that trained together broke off in epoch {epoch + 1}: "
                f"{type(cause).__name__}: {cause}"
            ) from cause

    def remove(self) -> None:
        """No more epochs of this one."""
        self.pack.seats.remove(self)


def train_in_turns(courses: Sequence[StageTrainer], epoch: int, step: int) -> list[StageEpochResult]:
    """As `train_stacked`, of courses that each take their own step on a batch before the next is read.

    For what has large products of its own, which stacking makes no faster: each batch is read and brought to the device
    once for all, the activations of one course are in memory at a time, and each gives bit for bit what it gives alone.
    """
    started, first = time.perf_counter(), courses[0]
    plan = first.plan_of(epoch)
    under_way = [course.begin_epoch(plan, epoch, step) for course in courses]
    for batch in first.read(plan, under_way[0].shares, epoch):
        going_on = [one for one in under_way if not one.failed]
        if not going_on:
            break
        on_device = Batch(*to_device(batch, first.device), batch.examples)
        for one in going_on:
            one.take(on_device)
    seconds = (time.perf_counter() - started) / len(courses)
    return [one.end(seconds) for one in under_way]


def train_stacked(courses: Sequence[StageTrainer], epoch: int, step: int) -> list[StageEpochResult]:
    """One epoch (0-based) of each course over the batches of the first; their parameters and optimisers move on.

    A member whose loss or gradient isn't finite fails alone: no number of it reaches another.
    """
    started, first = time.perf_counter(), courses[0]
    plan, size = first.plan_of(epoch), first.train.batch_size
    shares = batches(plan, size)[: first.span.end_step - step]
    stacks = _stacks(courses)
    order = [course for stack in stacks for course in stack.courses]
    losses_at = [course.losses_of(epoch) for course in order]
    optimizer = _joint_optimizer(courses)
    seen: list[Tensor] = []
    losses: list[ConfiguredLoss] = []
    for number, batch in enumerate(first.read(plan, shares, epoch), start=step):
        inputs, labels = to_device(batch, first.device)
        now = [loss_at(number) for loss_at in losses_at]
        if now != losses:
            losses, together = now, stack_losses(now, first.device)
        of_members = together(torch.cat([stack.logits(inputs) for stack in stacks], dim=1), labels)
        for stack in stacks:
            stack.clear_gradients()
        of_members.sum().backward()  # type: ignore[no-untyped-call]
        norms = torch.cat([stack.clip(first.train.clip_grad_norm) for stack in stacks])
        for group, course in zip(optimizer.param_groups, courses, strict=True):
            group["lr"] = course.lr(number)
        optimizer.step()
        seen.append(torch.stack([of_members.detach(), norms]))
    for course in courses:
        for param in course.params.values():
            course.optimizer.state[param] = optimizer.state[param]
            param.grad = None
    values = torch.stack(seen).cpu().double().numpy()
    seconds = (time.perf_counter() - started) / len(courses)
    sizes = [min(size, len(plan) - start * size) for start in range(len(shares))]
    results = {
        id(course): _result(course, values[:, 0, place], values[:, 1, place], epoch, step, sizes, seconds)
        for place, course in enumerate(order)
    }
    return [results[id(course)] for course in courses]


@dataclass(frozen=True)
class _Stack:
    """Models of one kind; the members' parameters are views of `params`, each (M, ...).

    `logits` gives (B, M, C) of features (B, D).
    """

    courses: list[StageTrainer]
    params: list[Tensor]
    logits: Logits

    def clear_gradients(self) -> None:
        for param in self.params:
            param.grad = None

    def clip(self, max_norm: float | None) -> Tensor:
        """Gradient norms (M,) before each member's are scaled to at most max_norm; members get theirs."""
        gradients = [param.grad for param in self.params if param.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(one.flatten(1), dim=1) for one in gradients])
        norms = torch.linalg.vector_norm(norms, dim=0)
        if max_norm is not None:
            factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
            for one in gradients:
                one.mul_(factors.view(-1, *(1,) * (one.ndim - 1)))
        for place, course in enumerate(self.courses):
            for param, gradient in zip(course.params.values(), gradients, strict=True):
                param.grad = gradient[place]
        return norms


def _stacks(courses: Sequence[StageTrainer]) -> list[_Stack]:
    """Members by what they compute: linear or cosine, or what a second stage learns on the logits of one of these."""
    kinds: dict[tuple[type[nn.Module], ...], list[StageTrainer]] = {}
    for course in courses:
        model = _trained(course)
        kind = (type(model), type(model.first_stage)) if isinstance(model, LogitTransform) else (type(model),)
        kinds.setdefault(kind, []).append(course)
    return [_stack(members) for members in kinds.values()]


def _stack(courses: list[StageTrainer]) -> _Stack:
    params = [_stacked(each) for each in zip(*(course.params.values() for course in courses), strict=True)]
    models = [_trained(course) for course in courses]
    on_frozen = [one for one in models if isinstance(one, LogitTransform)]
    if on_frozen:
        return _Stack(courses, params, _adjusted(on_frozen, dict(zip(courses[0].params, params, strict=True))))
    return _Stack(courses, params, _classified(models, *params))


def _trained(course: StageTrainer) -> nn.Module:
    """What trains of a model without a decoder: `pack_key` lets only classifiers on stored features in."""
    return course.model.classifier if isinstance(course.model, FeatureClassifier) else course.model


def _classified(classifiers: Sequence[nn.Module], weight: Tensor, bias: Tensor | None = None) -> Logits:
    """Logits of classifiers of one kind with stacked weight (M, C, D), and of linear ones bias (M, C)."""
    number, num_classes, width = weight.shape
    if bias is not None:
        return lambda features: F.linear(features, weight.view(-1, width), bias.view(-1)).view(-1, number, num_classes)
    temperatures = [[one.temperature] for one in classifiers if isinstance(one, CosineClassifier)]
    temperature = torch.tensor(temperatures, device=weight.device)

    def cosine(features: Tensor) -> Tensor:
        flat = F.linear(l2_normalize(features), l2_normalize(weight).view(-1, width))
        return flat.view(-1, number, num_classes) / temperature

    return cosine


def _adjusted(models: Sequence[LogitTransform], params: Mapping[str, Tensor]) -> Logits:
    """Logits of second stages of one kind with stacked parameters: first stages as one product, then each its own."""
    first = [one.first_stage for one in models]
    weights = torch.stack([one.weight.detach() for one in first])
    biases = [one.bias.detach() for one in first if isinstance(one, LinearClassifier)]
    first_logits = _classified(first, weights, *([torch.stack(biases)] if biases else []))
    buffers = {name: torch.stack([one.get_buffer(name) for one in models]) for name, _ in models[0].named_buffers()}

    def one(state: dict[str, Tensor], logits: Tensor, features: Tensor) -> Tensor:
        return functional_call(models[0], state, (features, logits))

    each = vmap(one, in_dims=(0, 1, None), out_dims=1)
    return lambda features: each({**params, **buffers}, first_logits(features), features)


def _stacked(params: Sequence[Tensor]) -> Tensor:
    stack = torch.stack([param.detach() for param in params])
    for place, param in enumerate(params):
        param.data = stack[place]
    return stack.requires_grad_()


def _joint_optimizer(courses: Sequence[StageTrainer]) -> torch.optim.Optimizer:
    """One optimiser whose groups are the members': a step of it is a step of each, with its own rate and decay."""
    groups = []
    for course in courses:
        (group,) = course.optimizer.param_groups
        groups.append(dict(group))
    joint = type(courses[0].optimizer)(groups)  # type: ignore[call-arg]
    for course in courses:
        for param in course.params.values():
            if param in course.optimizer.state:
                joint.state[param] = course.optimizer.state[param]
    return joint


def _result(
    course: StageTrainer,
    losses: np.ndarray,
    norms: np.ndarray,
    epoch: int,
    step: int,
    sizes: Sequence[int],
    seconds: float,
) -> StageEpochResult:
    """A member's part; of the epoch's time it has an equal share."""
    broken = np.flatnonzero(~(np.isfinite(losses) & np.isfinite(norms)))
    found = (losses[: broken[0] + 1] if broken.size else losses).tolist()
    return course.trained(epoch, step + len(found), found, bool(broken.size), sizes, sum(sizes), seconds)
