"""Optimizers, their learning rate at each step, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from imbvlm.config.training_sections import AdamWConfig, OptimConfig

# Key of a parameter group's factor on the learning rate.
LR_SCALE = "lr_scale"


def build_optimizer(
    config: OptimConfig, params: Iterable[nn.Parameter], lr_scales: Sequence[float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the parameters that train, with weight decay on all of them, as in LIFT.

    `lr_scales` are factors on the learning rate, one per parameter; `set_lr` sets the rate before each step. Raises
    ValueError without a trained parameter, since METHODS says which methods train.
    """
    params = list(params)
    scaled: dict[float, list[nn.Parameter]] = {}
    for param, scale in zip(params, lr_scales or [1.0] * len(params), strict=True):
        if param.requires_grad:
            scaled.setdefault(scale, []).append(param)
    if not scaled:
        raise ValueError("no parameter trains, so there is nothing to optimize")
    groups = [{"params": members, LR_SCALE: scale} for scale, members in scaled.items()]
    if isinstance(config, AdamWConfig):
        first, second = config.betas
        return torch.optim.AdamW(groups, betas=(first, second), weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        groups,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )


def lr_factor(config: OptimConfig, step: int, num_steps: int, steps_per_epoch: int = 1) -> float:
    """The factor on the learning rate at a step (0-based) of num_steps: linear warm-up, then the schedule.

    No step has a rate of 0: the first warm-up step has 1 / warm-up steps, and the schedule's progress stays below 1.
    `cosine` is cos(pi cycles progress), `half_cosine` is (1 + cos(pi progress)) / 2, and `epoch_half_cosine` is the
    latter at the epoch's first step, as in LIFT's code.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step must be from 0 to {num_steps - 1}, got {step}")
    warmup_steps = round(config.warmup_fraction * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.lr_schedule == "epoch_half_cosine":
        step = max(step - step % steps_per_epoch, warmup_steps)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    if config.lr_schedule == "constant":
        return 1.0
    if config.lr_schedule in ("half_cosine", "epoch_half_cosine"):
        return (1 + math.cos(math.pi * progress)) / 2
    return math.cos(math.pi * config.cosine_cycles * progress)


def lr_at_step(config: OptimConfig, step: int, num_steps: int, steps_per_epoch: int) -> float:
    """The learning rate at a step (0-based), by `lr_factor`, after a first epoch at `first_epoch_lr` if it is set."""
    if config.first_epoch_lr is None:
        return config.lr * lr_factor(config, step, num_steps, steps_per_epoch)
    if step < steps_per_epoch:
        return config.first_epoch_lr
    return config.lr * lr_factor(config, step - steps_per_epoch, num_steps - steps_per_epoch, steps_per_epoch)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_SCALE]


def clip_gradients(params: list[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale all gradients so that their total norm is at most max_norm; returns the norm before (0-d).

    With None no gradient is scaled; the norm still shows a gradient that is not finite.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    norm = get_total_norm(gradients)
    if max_norm is not None:
        clip_grads_with_norm_(params, max_norm, norm)
    return norm
