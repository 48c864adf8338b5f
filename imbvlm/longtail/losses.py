"""Losses: pure functions of logits (B, C), targets (B,) and class counts (C,), and how training calls them.

A loss is a function here and an entry of LOSSES. Each is a sum of w l over a sum of w, so that the same function gives
one process its loss, and each of several workers a share whose average is the exact global loss.

Losses with `label_smoothing` also take targets (B, C): shares of the classes, which sum to 1 in each row. An example
that is half of two classes counts as half an example of each: sum(t w l) / sum(t w) over rows and classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.base.registry import definition
from imbvlm.config.loss_registry import LOSSES
from imbvlm.longtail.class_stats import PRIOR_FLOOR
from imbvlm.longtail.logits import add_log_prior, at_least_float32, floored_counts, log_prior
from imbvlm.longtail.worker_group import SINGLE_WORKER, WorkerGroup

LossOption = float | Tensor


# ---------------------------------------------------------------------------------------------------- losses


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    label_smoothing: LossOption = 0.0,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """-log p_y, p = softmax(z); with smoothing e the target is (1 - e) one-hot + e / C [Szegedy et al. 2016].

    Other losses with `label_smoothing` use this in place of -log p_y, with their own p and weights.
    """
    return _cross_entropy(logits, targets, None, label_smoothing, workers)


def focal(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    gamma: LossOption = 2.0,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """(1 - p_y)^gamma (-log p_y) [Lin et al. 2017, eq. 4].

    log(1 - p_y) is the log-sum-exp over the other classes: the logarithm of 1 minus a rounded p_y is -inf for a
    confident, correct example, and its gradient NaN.
    """
    log_probs = F.log_softmax(at_least_float32(logits), dim=-1)
    others = log_probs.masked_fill(_is_target(log_probs, targets), torch.finfo(log_probs.dtype).min)
    return weighted_mean(
        torch.exp(gamma * torch.logsumexp(others, dim=-1)) * log_losses(log_probs, targets),
        None,
        workers,
    )


def inverse_frequency(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    label_smoothing: LossOption = 0.0,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """sum(w_y CE) / sum(w_y), w_c = N / (C n_c): the study's class-balanced weights [Wang et al. 2023]."""
    counts = floored_counts(class_counts, logits.device)
    return _cross_entropy(logits, targets, counts.mean() / counts, label_smoothing, workers)


def effective_number(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    beta: LossOption = 0.9999,
    label_smoothing: LossOption = 0.0,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """sum(w_y CE) / sum(w_y), w_c = (1 - beta) / (1 - beta^n_c), of mean 1 [Cui et al. 2019]."""
    weights = effective_number_weights(floored_counts(class_counts, logits.device), beta)
    return _cross_entropy(logits, targets, weights, label_smoothing, workers)


def generalized_reweight(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    exponent: LossOption = 1.2,
    label_smoothing: LossOption = 0.0,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """sum(w_y CE) / sum(w_y), w_c = n_c^-exponent, of mean 1 [Zhang et al. 2021, "DisAlign"]."""
    log_weights = -exponent * torch.log(floored_counts(class_counts, logits.device))
    # A softmax is the same weights up to a factor, and can't overflow however large the exponent.
    weights = torch.softmax(log_weights, dim=-1) * logits.shape[-1]
    return _cross_entropy(logits, targets, weights, label_smoothing, workers)


def balanced_softmax(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    label_smoothing: LossOption = 0.0,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """CE(z + log prior) [Ren et al. 2020]."""
    return logit_adjustment(logits, targets, class_counts, tau=1.0, label_smoothing=label_smoothing, workers=workers)


def logit_adjustment(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    tau: LossOption = 1.0,
    label_smoothing: LossOption = 0.0,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """CE(z + tau log prior) [Menon et al. 2021, eq. 10]."""
    return _cross_entropy(add_log_prior(logits, class_counts, tau), targets, None, label_smoothing, workers)


def ldam(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    max_margin: LossOption = 0.5,
    margin_scale: LossOption = 1.0,
    reweight: Tensor | None = None,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """CE(z - margin_scale m_y on the target), m_c = max_margin n_c^-1/4 / max(n^-1/4) [Cao et al. 2019].

    The maximum is over classes with images; a class without any has the largest margin. Only the margin is scaled:
    a cosine classifier (margin_scale = 1 / temperature) has already scaled the logits. `reweight` (C,): class weights
    for deferred re-weighting, such as `effective_number_weights`.
    """
    logits = at_least_float32(logits)
    margins = (max_margin * margin_scale * _margin_shares(class_counts, logits)).to(logits.dtype)
    log_probs = F.log_softmax(torch.where(_is_target(logits, targets), logits - margins, logits), dim=-1)
    weights = None if reweight is None else reweight.to(logits.device)[targets]
    return weighted_mean(log_losses(log_probs, targets), weights, workers)


def lade(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    remine_lambda: LossOption = 0.1,
    weight: LossOption = 0.1,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """CE(z + log prior) + weight * sum_c prior_c (t_c + remine_lambda t_c^2 - mean_c) [Hong et al. 2021].

    mean_c is the mean of z_c over the batch's examples of class c (0 without any). t_c is the logarithm of the mean of
    exp(z_c) / (C prior_c) over the whole batch. This is the regularized Donsker-Varadhan bound as its authors published
    it. Both take the raw logits z, not the adjusted ones.
    """
    logits = at_least_float32(logits)
    estimator = _lade_estimator(
        logits, targets, log_prior(class_counts, logits.device).to(logits.dtype), remine_lambda, workers
    )
    return balanced_softmax(logits, targets, class_counts, workers=workers) + weight * estimator


# -------------------------------------------------------------------------------------------------- building


def default_options(name: str) -> dict[str, Any]:
    """A loss's keyword options with their defaults; raises UnknownEntryError."""
    parameters = inspect.signature(definition(LOSSES[name].function)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "workers"}


_COUNTS = "class_counts"


class ConfiguredLoss:
    """A loss with its class counts and options: (logits (B, C), targets (B,) or soft targets (B, C)) -> scalar.

    Each of several workers gets a share whose average over workers is the exact global loss. The same holds for its
    gradient, however uneven the local batches; a local batch may be empty.
    """

    def __init__(self, name: str, class_counts: Tensor, workers: WorkerGroup, options: Mapping[str, Any]) -> None:
        self.name = name
        self.entry = LOSSES[name]
        self._counts = class_counts
        self._workers = workers
        self._options = dict(options)

    def over(self, workers: WorkerGroup) -> ConfiguredLoss:
        """The same loss with other workers."""
        return ConfiguredLoss(self.name, self._counts, workers, self._options)

    def as_adjustment(self) -> ConfiguredLoss:
        """Logit adjustment where the loss is a case of it, so that more losses are computed at once."""
        if self.entry.adjustment_tau is None:
            return self
        options = {**self._options, "tau": self.entry.adjustment_tau}
        return ConfiguredLoss("logit_adjustment", self._counts, self._workers, options)

    def form(self) -> tuple[Any, ...]:
        """A key that is equal for losses that differ in numbers alone."""
        return self.name, *sorted(self.numbers())

    def numbers(self) -> dict[str, Any]:
        """Class counts and the options that have a value, all of them numbers."""
        return {_COUNTS: self._counts, **{name: value for name, value in self._options.items() if value is not None}}

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Raises ImbvlmError for soft targets where the loss takes classes only."""
        if targets.ndim > 1 and not self.entry.takes_soft_targets:
            raise ImbvlmError(
                f"loss {self.name} needs one class per image, got targets between classes. Choose a loss with "
                "label_smoothing, or leave mixing and feature_augmentation out."
            )
        if self._counts.device != logits.device:
            # Once: a copy to the device in each step would wait for it.
            self._counts = self._counts.to(logits.device)
        loss: Tensor = self.entry.function(logits, targets, self._counts, workers=self._workers, **self._options)
        return loss


def stack_losses(
    losses: Sequence[ConfiguredLoss], device: str | torch.device = "cpu"
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of logits (B, M, C) and shared targets (B,) that gives M losses (M,), on the device of one worker.

    Losses of one name are computed at once, with their options as float64 tensors.
    """
    losses = [loss.as_adjustment() for loss in losses]
    indices_by_form: dict[tuple[Any, ...], list[int]] = {}
    for index, loss in enumerate(losses):
        indices_by_form.setdefault(loss.form(), []).append(index)
    # Tensors go to the device here, once: a copy in each step would wait for it.
    groups = [
        (torch.tensor(indices, device=device), _stack_one_form([losses[index] for index in indices], device))
        for indices in indices_by_form.values()
    ]
    order = torch.argsort(torch.cat([indices for indices, _ in groups]))

    def stacked(logits: Tensor, targets: Tensor) -> Tensor:
        # Contiguous by member: a softmax over a strided axis takes twice as long.
        by_member = logits.transpose(0, 1).contiguous()
        if len(groups) == 1:
            return groups[0][1](by_member, targets)
        return torch.cat([group(by_member[indices], targets) for indices, group in groups])[order]

    return stacked


def _stack_one_form(losses: Sequence[ConfiguredLoss], device: str | torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """`stack_losses` for losses with the same `form`, on logits (M, B, C)."""
    if not losses[0].entry.is_mappable:
        return lambda logits, targets: torch.stack(
            [loss(member_logits, targets) for loss, member_logits in zip(losses, logits, strict=True)]
        ).to(logits.dtype)
    numbers = [loss.numbers() for loss in losses]
    stacks = {
        name: torch.stack([torch.as_tensor(of_loss[name], dtype=torch.float64) for of_loss in numbers]).to(device)
        for name in numbers[0]
    }
    function = definition(losses[0].entry.function)

    def stacked(logits: Tensor, targets: Tensor) -> Tensor:
        def member_loss(member_logits: Tensor, options: dict[str, Tensor]) -> Tensor:
            counts = options.pop(_COUNTS)
            loss: Tensor = function(member_logits, targets, counts, **options)
            return loss

        return torch.func.vmap(member_loss)(logits, stacks).to(logits.dtype)

    return stacked


def build_loss(
    name: str, class_counts: npt.ArrayLike | Tensor, *, workers: WorkerGroup = SINGLE_WORKER, **options: Any
) -> ConfiguredLoss:
    """A loss of LOSSES with its class counts (C,) and options.

    Raises UnknownEntryError for an unknown name, ImbvlmError for an unknown option or counts that are not images.
    """
    valid = default_options(name)
    for option in options:
        if option not in valid:
            raise ImbvlmError(f"loss {name} has no option {option!r}; {suggest_name(option, valid)}")
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise ImbvlmError(
            f"class_counts must be one finite number from 0 up per class, got {class_counts!r}. "
            "Give the training images of each class."
        )
    if bool((counts.frac() > 0).any()) and float(counts.sum()) < 1.001:
        raise ImbvlmError(
            f"class_counts must be images per class, got shares that sum to {float(counts.sum()):g}. "
            "Give the numbers themselves."
        )
    return ConfiguredLoss(name, counts, workers, options)


def effective_number_weights(class_counts: npt.ArrayLike | Tensor, beta: LossOption = 0.9999) -> Tensor:
    """(1 - beta) / (1 - beta^n) per class (C,), scaled to mean 1 [Cui et al. 2019]."""
    counts = torch.as_tensor(class_counts)
    counts = counts if counts.is_floating_point() else counts.double()
    log_beta = torch.log(torch.as_tensor(beta, dtype=counts.dtype, device=counts.device))
    weights = 1 / -torch.expm1(counts.clamp(min=PRIOR_FLOOR) * log_beta)
    return weights / weights.mean()


# ----------------------------------------------------------------------------------------------------- parts


def _margin_shares(class_counts: Tensor, logits: Tensor) -> Tensor:
    """n^-1/4 (C,) over its largest value among the classes with images; 1 for a class without."""
    counts = class_counts.to(floored_counts(class_counts, logits.device))
    smallest = torch.where(counts > 0, counts, torch.inf).min()
    return (counts / smallest).clamp(min=1).pow(-0.25)


def _is_target(logits: Tensor, targets: Tensor) -> Tensor:
    """Mask (B, C) of each row's target. Not a scatter, whose order of additions varies on CUDA."""
    return targets.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)


def log_losses(log_probs: Tensor, targets: Tensor) -> Tensor:
    """-log p_y (B,) of log-probabilities (B, C)."""
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _cross_entropy(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None, label_smoothing: LossOption, workers: WorkerGroup
) -> Tensor:
    """Weighted mean of cross entropies with smoothed targets, given as classes (B,) or as soft targets (B, C)."""
    log_probs = F.log_softmax(at_least_float32(logits), dim=-1)
    if targets.ndim == 1:
        weights = None if class_weights is None else class_weights[targets]
        nll = log_losses(log_probs, targets)
    else:
        shares = targets.to(log_probs.dtype)
        shares = shares if class_weights is None else shares * class_weights.to(log_probs.dtype)
        weights = shares.sum(dim=-1)
        nll = -(shares * log_probs).sum(dim=-1) / weights
    losses = (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(dim=-1)
    return weighted_mean(losses, weights, workers)


def weighted_mean(losses: Tensor, weights: Tensor | None, workers: WorkerGroup) -> Tensor:
    """This worker's share of the global sum(w l) / sum(w), whose average over workers is the whole; 0 without rows."""
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    total = workers.sum(weights.sum().detach()).clamp(min=torch.finfo(losses.dtype).tiny)
    return workers.world_size * (weights * losses).sum() / total


def _lade_estimator(
    logits: Tensor, targets: Tensor, log_priors: Tensor, remine_lambda: LossOption, workers: WorkerGroup
) -> Tensor:
    """This worker's share of LADE's negated, regularized bound, weighted by class prior."""
    prior = log_priors.exp()
    ones = torch.ones_like(targets, dtype=logits.dtype)
    class_sizes = workers.sum(logits.new_zeros(logits.shape[-1]).index_add(0, targets, ones))
    num_examples = class_sizes.sum()
    own_logits = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    own_means = ((prior / class_sizes.clamp(min=1))[targets] * own_logits).sum()
    log_mean = _global_logsumexp(logits, workers) - torch.log(num_examples.clamp(min=1))
    second = log_mean - log_priors - math.log(logits.shape[-1])
    bound = torch.where(num_examples > 0, (prior * (second + remine_lambda * second.square())).sum(), 0)
    # Every worker has the whole bound, with gradient through its own rows alone, which an average would shrink.
    return bound.detach() + workers.world_size * (bound - bound.detach() - own_means)


def _global_logsumexp(logits: Tensor, workers: WorkerGroup) -> Tensor:
    """log sum exp over the rows of all workers (C,), with gradient through this worker's rows only."""
    lowest = torch.finfo(logits.dtype).min
    peak = workers.max(torch.cat([logits.detach(), logits.new_full((1, logits.shape[-1]), lowest)]).amax(dim=0))
    local = torch.exp(logits - peak).sum(dim=0)
    total = workers.sum(local.detach()) + (local - local.detach())
    return peak + torch.log(total.clamp(min=torch.finfo(logits.dtype).tiny))
