"""Methods that train inside an image tower: adapters, low-rank updates, biases or all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.model_sections import AdapterConfig, FineTuningConfig, LoraConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_outputs import PRE_NORM_BLOCKS

Blocks = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Installed:
    """The parts that a method put into an image tower.

    `modules` are those that hooks call and the tower doesn't own. `lr_scales` are factors on the learning rate by the
    tower's parameter names; others have 1.
    """

    modules: nn.ModuleList = field(default_factory=nn.ModuleList)
    lr_scales: Mapping[str, float] = field(default_factory=dict)


def refuse_convolution(config: TrialConfig, info: EncoderInfo) -> list[str]:
    """Reject image towers without a transformer's blocks."""
    if info.kind != "convolution":
        return []
    return [
        f"method {config.method} needs a transformer's blocks, and {info.name} is a convolution tower. Choose method "
        "bias_tuning or fine_tuning, or a ViT as encoder.name."
    ]


def install_adapters(encoder: Encoder, config: TrialConfig, num_classes: int) -> Installed:
    """Train an adapter in every block; raises ImbvlmError where blocks are of an unknown kind."""
    blocks = encoder.blocks()
    width = require_section(config.section(AdapterConfig)).width or adapter_width(num_classes, len(blocks))
    return Installed(add_adapters(blocks, width, encoder.info.name))


def install_low_rank_updates(encoder: Encoder, config: TrialConfig, num_classes: int) -> Installed:
    """Train low-rank updates of attention in every block; raises ImbvlmError where a block has no attention."""
    lora = require_section(config.section(LoraConfig))
    add_low_rank_updates(encoder.blocks(), lora.rank, lora.alpha, encoder.info.name)
    return Installed()


def train_biases(encoder: Encoder, config: TrialConfig, num_classes: int) -> Installed:
    """Train every bias of the image tower, those of its norms too [Zaken et al. 2022, "BitFit"]."""
    for name, param in encoder.image_tower.named_parameters():
        param.requires_grad_(name.endswith("bias"))
    return Installed()


def train_all(encoder: Encoder, config: TrialConfig, num_classes: int) -> Installed:
    """Train the whole image tower except batch norms, whose statistics belong to the images of pre-training.

    Raises ImbvlmError for a layer decay where the encoder's blocks are unknown.
    """
    encoder.image_tower.requires_grad_(True)
    for module in encoder.image_tower.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)
    decay = require_section(config.section(FineTuningConfig)).layer_decay
    return Installed(lr_scales=lr_scales(encoder.image_tower, encoder.blocks(), decay, encoder.info.name))


# ------------------------------------------------------------------------------------------------------- adapters


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


def adapter_width(num_classes: int, num_blocks: int) -> int:
    """2^max(0, floor(log2(C / 2L))): adapters together have about as many weights as the classifier [LIFT]."""
    return int(2 ** max(0, math.floor(math.log2(num_classes / (2 * num_blocks)))))


def add_adapters(blocks: Blocks, width: int, name: str) -> nn.ModuleList:
    """An adapter in parallel to the MLP of each block; raises ImbvlmError where blocks are of an unknown kind.

    The tower's modules stay as they are. The adapter takes the input of a block's second norm, and its output is added
    to the MLP's, before LayerScale where the block has one. LIFT's code has no LayerScale.
    """
    adapters = []
    for block in blocks.values():
        norm_name = PRE_NORM_BLOCKS.get(type(block))
        if norm_name is None:
            valid = ", ".join(sorted({cls.__name__ for cls in PRE_NORM_BLOCKS}))
            raise ImbvlmError(
                f"method adapter needs blocks with an MLP behind a norm ({valid}), and {name} has "
                f"{type(block).__name__}. Choose another encoder, or method bias_tuning or fine_tuning."
            )
        norm, mlp = block.get_submodule(norm_name), block.get_submodule("mlp")
        adapter = Adapter(int(norm.weight.shape[0]), width)  # type: ignore[index]
        _add_to_output(norm, mlp, adapter)
        adapters.append(adapter)
    return nn.ModuleList(adapters)


def _add_to_output(norm: nn.Module, mlp: nn.Module, adapter: Adapter) -> None:
    """Add adapter(input of `norm`) to the output of `mlp`."""
    inputs: list[Tensor] = []

    def remember(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[:] = arguments[:1]

    def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + adapter(inputs.pop())

    norm.register_forward_pre_hook(remember)
    mlp.register_forward_hook(add)


# ----------------------------------------------------------------------------------------------- low-rank updates


class LowRankUpdate(nn.Module):
    """W + alpha / rank * B A for each of the matrices (R, D) stacked in W (parts * R, D) [Hu et al. 2021, "LoRA"].

    A parametrization of the weight replaces `peft`, whose nn.MultiheadAttention subtracts the update from the weights
    after each forward pass: rounding then changes the frozen tower a little every time.
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


def add_low_rank_updates(blocks: Blocks, rank: int, alpha: float, name: str) -> None:
    """Low-rank updates of query, key, value and output in each block's attention; raises ImbvlmError without one."""
    for block in blocks.values():
        weights = _attention_weights(getattr(block, "attn", None))
        if not weights:
            raise ImbvlmError(
                f"method lora needs blocks with attention, and {name} has {type(block).__name__}. Choose another "
                "encoder, or method bias_tuning or fine_tuning."
            )
        for module, attribute, parts in weights:
            weight = getattr(module, attribute)
            update = LowRankUpdate(weight, parts, rank, alpha).to(weight.device)
            parametrize.register_parametrization(module, attribute, update)


def _attention_weights(attention: Any) -> list[tuple[nn.Module, str, int]]:
    """Module, attribute and number of stacked matrices of query, key, value and output."""
    if hasattr(attention, "in_proj_weight"):
        return [(attention, "in_proj_weight", 3), (attention.out_proj, "weight", 1)]
    fused = [(attention.qkv, "weight", 3)] if getattr(attention, "qkv", None) is not None else []
    names = ("q_proj", "k_proj", "v_proj", "proj")
    separate = [getattr(attention, name, None) for name in names]
    return fused + [(module, "weight", 1) for module in separate if module is not None]


# ------------------------------------------------------------------------------------------- all that trains inside


def lr_scales(image_tower: nn.Module, blocks: Blocks, decay: float, name: str) -> dict[str, float]:
    """Factor on the learning rate of each parameter: 1 behind the last block, `decay` times less with each before.

    Everything before the first block counts as one more block. Raises ImbvlmError where the blocks are unknown.
    """
    if decay < 1 and not blocks:
        raise ImbvlmError(
            f"fine_tuning.layer_decay needs known blocks, got {decay} with {name}. Set fine_tuning.layer_decay: 1."
        )
    order, depth = {block: number for number, block in enumerate(blocks, start=1)}, 0
    scales = {}
    for param, _ in image_tower.named_parameters():
        own = next((number for block, number in order.items() if param.startswith(f"{block}.")), None)
        # Modules are registered in the order in which images pass them.
        depth = own or (len(order) + 1 if depth else 0)
        scales[param] = decay ** (len(order) + 1 - depth)
    return scales


def freeze_unused(image_tower: nn.Module, features: Callable[[], Tensor]) -> None:
    """Freeze the parameters that an image's features don't depend on, such as a projection behind them."""
    params = [param for param in image_tower.parameters() if param.requires_grad]
    if not params:
        return
    with torch.enable_grad():
        gradients = torch.autograd.grad(features().sum(), params, allow_unused=True)
    for param, gradient in zip(params, gradients, strict=True):
        param.requires_grad_(gradient is not None)


def checkpoint_blocks(blocks: Blocks, name: str) -> None:
    """Keep only each block's input for the backward pass; raises ImbvlmError where the blocks are unknown."""
    if not blocks:
        raise ImbvlmError(
            f"memory.gradient_checkpointing needs known blocks, and those of {name} are unknown. Set it to false."
        )
    for block in blocks.values():
        module: Any = block
        module.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        # No random state is kept: a tower stays in eval mode and samples nothing.
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    return run
