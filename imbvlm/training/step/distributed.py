"""The workers that train one trial together, as the loop sees them: a rank, and sums over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imbvlm.longtail.worker_group import WorkerGroup


class DistributedWorkerGroup:
    """The workers of torch.distributed's default group, which must be there already; sums go through `device`."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        # NCCL takes tensors on the GPU only, and counters of a worker without rows never got there.
        buffer = value.detach().to(self._device, copy=True).contiguous()
        dist.all_reduce(buffer, operation)
        return buffer.to(value.device)


@torch.no_grad()
def all_reduce_gradients(params: Sequence[nn.Parameter], loss: Tensor, workers: WorkerGroup) -> Tensor:
    """Replace every gradient by its mean over workers; returns the mean of their losses (0-d).

    One flat sum and not DDP: the loss rides along, so that all workers judge the same number; a worker with an
    empty or shorter batch needs no special case; names in state_dict stay; and what trains here is small.
    """
    if workers.world_size == 1:
        return loss.detach()
    gradients = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [loss.detach().float().reshape(1)])
    flat = workers.sum(flat) / workers.world_size
    parts = torch.split(flat, [param.numel() for param in params] + [1])
    for param, gradient, part in zip(params, gradients, parts[:-1], strict=True):
        # In its own memory, which is laid out as the parameter's: fused optimizers count on that.
        param.grad = gradient.copy_(part.view_as(gradient))
    return parts[-1][0]


@torch.no_grad()
def broadcast_state(tensors: Mapping[str, Tensor], workers: WorkerGroup) -> None:
    """Give every worker rank 0's parameters and buffers: workers on unlike machines may round differently."""
    if workers.world_size > 1:
        for value in tensors.values():
            value.copy_(workers.sum(value if workers.rank == 0 else torch.zeros_like(value)))
