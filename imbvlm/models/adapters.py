"""What trains inside a tower: adapters, low-rank updates, biases or all of it; and gradient checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from imbvlm.base.errors import ImbvlmError
from imbvlm.models.encoders.encoder_outputs import PRE_NORM_BLOCKS

Blocks = Mapping[str, nn.Module]


class Adapter(nn.Module):
    """scale * up(relu(down(norm(x)))), tokens (B, T, D) to (B, T, D) [Chen et al. 2022, "AdaptFormer"; LIFT].

    It has its own layer norm, a learnable scale from 1, and an up-projection from 0, so that it adds nothing at first.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(tokens)
        self.down = nn.Linear(tokens, width)
        self.up = nn.Linear(width, tokens)
        self.scale = nn.Parameter(torch.ones(1))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor) -> Tensor:
        added: Tensor = self.scale * self.up(torch.relu(self.down(self.norm(tokens))))
        return added


class LowRankUpdate(nn.Module):
    """W + alpha / rank * B A for each of the matrices (R, D) stacked in W (parts * R, D) [Hu et al. 2021, "LoRA"].

    A parametrization of the weight, and not `peft`: its nn.MultiheadAttention takes the update out of the weights by
    subtraction after each forward, which leaves the frozen tower a little different every time.
    """

    def __init__(self, weight: Tensor, parts: int, rank: int, alpha: float) -> None:
        super().__init__()
        rows, width = len(weight) // parts, weight.shape[1]
        bound = 1 / math.sqrt(width)
        self.down = nn.Parameter(torch.empty(parts, rank, width).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(parts, rows, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.up @ self.down).flatten(0, 1)


def adapter_width(num_classes: int, num_blocks: int) -> int:
    """2^max(0, floor(log2(C / 2L))): adapters together have about as many weights as the classifier [LIFT]."""
    return int(2 ** max(0, math.floor(math.log2(num_classes / (2 * num_blocks)))))


def add_adapters(blocks: Blocks, width: int, name: str) -> nn.ModuleList:
    """An adapter beside the MLP of each block; raises ImbvlmError for towers whose blocks aren't known.

    The tower's modules stay as they are: the adapter takes its input where a block's second norm does, and its output
    is added to the MLP's, before LayerScale where the block has one. LIFT's code knows no LayerScale.
    """
    adapters = []
    for block in blocks.values():
        name_of_norm = PRE_NORM_BLOCKS.get(type(block))
        if name_of_norm is None:
            known = ", ".join(sorted({cls.__name__ for cls in PRE_NORM_BLOCKS}))
            raise ImbvlmError(
                f"method adapter needs blocks with an MLP behind a norm, and {name} has {type(block).__name__} (known "
                f"are {known}); choose another tower, or bias_tuning or fine_tuning"
            )
        norm, mlp = block.get_submodule(name_of_norm), block.get_submodule("mlp")
        adapter = Adapter(int(norm.weight.shape[0]), width)  # type: ignore[index]
        _add_beside(norm, mlp, adapter)
        adapters.append(adapter)
    return nn.ModuleList(adapters)


def add_low_rank_updates(blocks: Blocks, rank: int, alpha: float, name: str) -> None:
    """Low-rank updates of query, key, value and output in each block's attention; raises ImbvlmError without one."""
    for block in blocks.values():
        weights = _attention_weights(getattr(block, "attn", None))
        if not weights:
            raise ImbvlmError(
                f"method lora needs blocks with attention, and {name} has {type(block).__name__}; choose another "
                "tower, or bias_tuning or fine_tuning"
            )
        for module, attribute, parts in weights:
            weight = getattr(module, attribute)
            update = LowRankUpdate(weight, parts, rank, alpha).to(weight.device)
            parametrize.register_parametrization(module, attribute, update)


def train_biases(visual: nn.Module) -> None:
    """Let every bias of the tower train, those of its norms too [Zaken et al. 2022, "BitFit"]."""
    for name, param in visual.named_parameters():
        param.requires_grad_(name.endswith("bias"))


def train_all(visual: nn.Module) -> None:
    """Let the whole tower train but its batch norms, whose statistics belong to the images of pre-training."""
    visual.requires_grad_(True)
    for module in visual.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)


def freeze_unused(visual: nn.Module, features: Callable[[], Tensor]) -> None:
    """Freeze what the features of an image don't depend on, such as a projection behind them."""
    params = [param for param in visual.parameters() if param.requires_grad]
    if not params:
        return
    with torch.enable_grad():
        gradients = torch.autograd.grad(features().sum(), params, allow_unused=True)
    for param, gradient in zip(params, gradients, strict=True):
        param.requires_grad_(gradient is not None)


def lr_scales(visual: nn.Module, blocks: Blocks, decay: float, name: str) -> dict[str, float]:
    """Factor on the learning rate of each parameter: 1 behind the last block, `decay` times less with each before.

    What stands before the first block counts as one more. Raises ImbvlmError where the blocks aren't known.
    """
    if decay < 1 and not blocks:
        raise ImbvlmError(
            f"fine_tuning.layer_decay is {decay}, and the blocks of {name} aren't known; set fine_tuning.layer_decay: 1"
        )
    order, depth = {block: number for number, block in enumerate(blocks, start=1)}, 0
    scales = {}
    for param, _ in visual.named_parameters():
        own = next((number for block, number in order.items() if param.startswith(f"{block}.")), None)
        # Modules are registered in the order in which images pass them.
        depth = own or (len(order) + 1 if depth else 0)
        scales[param] = decay ** (len(order) + 1 - depth)
    return scales


def checkpoint_blocks(blocks: Blocks, name: str) -> None:
    """Keep only each block's input for the way back; raises ImbvlmError where the blocks aren't known."""
    if not blocks:
        raise ImbvlmError(f"memory.gradient_checkpointing is true, and the blocks of {name} aren't known; set it false")
    for block in blocks.values():
        module: Any = block
        module.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        # Nothing in a tower draws random numbers: it stays in eval mode.
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    return run


def _add_beside(norm: nn.Module, mlp: nn.Module, adapter: Adapter) -> None:
    """Add adapter(input of `norm`) to the output of `mlp`."""
    held: list[Tensor] = []

    def hold(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        held[:] = arguments[:1]

    def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + adapter(held.pop())

    norm.register_forward_pre_hook(hold)
    mlp.register_forward_hook(add)


def _attention_weights(attention: Any) -> list[tuple[nn.Module, str, int]]:
    """Module, attribute and number of stacked matrices of query, key, value and output."""
    if hasattr(attention, "in_proj_weight"):
        return [(attention, "in_proj_weight", 3), (attention.out_proj, "weight", 1)]
    fused = [(attention.qkv, "weight", 3)] if getattr(attention, "qkv", None) is not None else []
    names = ("q_proj", "k_proj", "v_proj", "proj")
    apart = [getattr(attention, name, None) for name in names]
    return fused + [(module, "weight", 1) for module in apart if module is not None]
