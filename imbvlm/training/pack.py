"""Trials of one shape trained together: classifiers stacked into one matrix, over one stream of features.

Whatever tells the members apart (loss and its knobs, learning rate, temperature, how weights start) stays each one's
own, and so do its optimiser's state, its evaluation and its checkpoints: a pack only takes the place of its members'
`Course.train_epoch`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbvlm.config import TrialConfig
from imbvlm.losses import BuiltLoss, losses_together
from imbvlm.models.classifier import CosineClassifier, LinearClassifier, unit
from imbvlm.models.methods import FeatureClassifier
from imbvlm.sampling import batches
from imbvlm.training.course import Course, TrainedEpoch
from imbvlm.training.feed import RememberedFeed, to_device

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
    if config.method != "linear_probe" or config.reads_images or any(one is not None for one in alone):
        return None
    tree = config.to_tree()
    if tree["train"]["compile"]:
        return None
    del tree["loss"]
    # Each trains its own second stage by itself, from where the pack's epochs end.
    tree.pop("second_stage", None)
    for section, keys in _OWN.items():
        tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    return json.dumps(tree, sort_keys=True)


def member_bytes(width: int, num_classes: int, batch_size: int, num_val: int) -> int:
    """Bytes that one member adds to a pack: weights with what optimisers keep of them, and its logits."""
    # Weights, their gradients, two moments, directions of a cosine classifier and their gradients.
    weights = 6 * 4 * width * num_classes
    # Logits, their log-softmax, what a loss makes of them, and gradients.
    logits = 6 * 4 * batch_size * num_classes
    # Validation logits in half precision: new, best and last.
    return weights + logits + 3 * 2 * num_val * num_classes


class Pack:
    """Members that train in lockstep: the first that wants an epoch trains it for all that haven't left."""

    def __init__(self) -> None:
        self._courses: list[Course] = []
        self._trained: dict[int, TrainedEpoch] = {}
        self._feed: RememberedFeed | None = None

    def join(self, course: Course, feed: RememberedFeed) -> RememberedFeed:
        """A course that hasn't begun, of a trial with the others' `pack_key`; gives what all of them evaluate by."""
        self._courses.append(course)
        if self._feed is None:
            self._feed = feed
        return self._feed

    def leave(self, course: Course) -> None:
        """No more epochs of this one."""
        self._courses = [one for one in self._courses if one is not course]

    def train_epoch(self, course: Course, epoch: int, step: int) -> TrainedEpoch:
        """What `course.train_epoch(epoch, step)` gives, to rounding."""
        if id(course) not in self._trained:
            trained = train_together(self._courses, epoch, step)
            self._trained = {id(one): result for one, result in zip(self._courses, trained, strict=True)}
        return self._trained.pop(id(course))


def train_together(courses: Sequence[Course], epoch: int, step: int) -> list[TrainedEpoch]:
    """One epoch (0-based) of each course over the batches of the first; their parameters and optimisers move on.

    A member whose loss or gradient isn't finite fails alone: no number of it reaches another.
    """
    started, first = time.perf_counter(), courses[0]
    plan, size = first.plan_of(epoch), first.train.batch_size
    shares = batches(plan, size)[: first.span.end_step - step]
    stacks = [stack for kind in (LinearClassifier, CosineClassifier) if (stack := _Stack.of(courses, kind))]
    order = [course for stack in stacks for course in stack.courses]
    losses_at = [course.losses_of(epoch) for course in order]
    optimizer = _joint_optimizer(courses)
    seen: list[Tensor] = []
    losses: list[BuiltLoss] = []
    for number, batch in enumerate(first.read(plan, shares, epoch), start=step):
        inputs, labels = to_device(batch, first.device)
        now = [loss_at(number) for loss_at in losses_at]
        if now != losses:
            losses, together = now, losses_together(now)
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
    """Classifiers of one kind; their parameters are views of `weight` (M, C, D) and `bias` (M, C)."""

    courses: list[Course]
    weight: Tensor
    bias: Tensor | None
    temperature: Tensor | None

    @staticmethod
    def of(courses: Sequence[Course], kind: type[nn.Module]) -> _Stack | None:
        """The members of a kind; None where there are none."""
        members = [course for course in courses if isinstance(_classifier(course), kind)]
        if not members:
            return None
        classifiers = [_classifier(course) for course in members]
        linear = [one for one in classifiers if isinstance(one, LinearClassifier)]
        cosine = [one for one in classifiers if isinstance(one, CosineClassifier)]
        weight = _stacked([*(one.weight for one in linear), *(one.weight for one in cosine)])
        bias = _stacked([one.bias for one in linear]) if linear else None
        temperature = torch.tensor([[one.temperature] for one in cosine], device=weight.device) if cosine else None
        return _Stack(members, weight, bias, temperature)

    def logits(self, features: Tensor) -> Tensor:
        """(B, M, C) of features (B, D)."""
        number, num_classes, width = self.weight.shape
        if self.temperature is not None:
            flat = F.linear(unit(features), unit(self.weight).view(-1, width))
            return flat.view(-1, number, num_classes) / self.temperature
        assert self.bias is not None, "a classifier is linear or cosine"
        return F.linear(features, self.weight.view(-1, width), self.bias.view(-1)).view(-1, number, num_classes)

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def clear_gradients(self) -> None:
        for param in self.parameters():
            param.grad = None

    def clip(self, max_norm: float | None) -> Tensor:
        """Gradient norms (M,) before each member's are scaled to at most max_norm; members get theirs."""
        gradients = [param.grad for param in self.parameters() if param.grad is not None]
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


def _classifier(course: Course) -> LinearClassifier | CosineClassifier:
    model = course.model
    assert isinstance(model, FeatureClassifier), "pack_key lets only classifiers on stored features in"
    assert isinstance(model.classifier, (LinearClassifier, CosineClassifier)), "they end in one of these"
    return model.classifier


def _stacked(params: Sequence[Tensor]) -> Tensor:
    stack = torch.stack([param.detach() for param in params])
    for place, param in enumerate(params):
        param.data = stack[place]
    return stack.requires_grad_()


def _joint_optimizer(courses: Sequence[Course]) -> torch.optim.Optimizer:
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
    course: Course,
    losses: np.ndarray,
    norms: np.ndarray,
    epoch: int,
    step: int,
    sizes: Sequence[int],
    seconds: float,
) -> TrainedEpoch:
    """A member's part; of the epoch's time it has an equal share."""
    broken = np.flatnonzero(~(np.isfinite(losses) & np.isfinite(norms)))
    if broken.size:
        at = int(broken[0])
        what = "gradient" if math.isfinite(losses[at]) else "loss"
        end = step + at + 1
        return TrainedEpoch(end, {}, losses[: at + 1].tolist(), course.failure(what, epoch, end))
    end = step + len(losses)
    metrics = {
        "train/loss": float(np.average(losses, weights=sizes)),
        "train/lr": course.lr(end - 1),
        "train/images_per_second": sum(sizes) / seconds,
        "time/train_seconds": seconds,
    }
    return TrainedEpoch(end, metrics, losses.tolist())
