"""A classifier on images: the tower itself, what a method trains inside it, and what stands on its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from imbvlm.models.encoder_info import EncoderInfo, OutputName

if TYPE_CHECKING:
    from imbvlm.models.encoder import Encoder

TOWER_PREFIX, ON_FEATURES_PREFIX = "tower.", "on_features."


class TowerClassifier(nn.Module):
    """Crops in bytes (B, 3, S, S) -> logits (B, C), through the tower that `encoder` holds.

    The tower always computes as in evaluation: no dropout, and batch norm with the statistics of pre-training. `reads`
    is the output that `on_features` maps to logits; `lr_scales` are factors on the learning rate by parameter.
    """

    scale: Tensor
    shift: Tensor
    token_pool: Tensor | None

    def __init__(self, encoder: Encoder, reads: OutputName, on_features: nn.Module) -> None:
        super().__init__()
        self.tower = encoder.visual
        self.adapters = nn.ModuleList()
        self.on_features = on_features
        self.preprocess, self.lr_scales = encoder.preprocess, dict[str, float]()
        self._rules, self._reads = encoder.rules, reads
        self._channels_last = encoder.info.kind == "convolution"
        scale, shift = encoder.pixel_scale()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        pool = encoder.token_pool if reads == "tokens" else None
        self.register_buffer("token_pool", pool, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of crops in bytes, as `preprocess` makes them."""
        logits: Tensor = self.on_features(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """The tower's output that the classifier reads."""
        if len(images) == 0:
            # Towers can't reshape an empty batch, which a worker may be given.
            return self.features(images.new_zeros((1, *images.shape[1:])))[:0]
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        pixels = torch.addcmul(self.shift, images, self.scale)
        features: Tensor = getattr(self._rules.outputs(self.tower, pixels), self._reads)
        return features.float() if self.token_pool is None else self.token_pool @ features.float()

    def train(self, mode: bool = True) -> TowerClassifier:
        super().train(mode)
        self.tower.eval()
        return self


class ParameterCounts(NamedTuple):
    """Parameters of a model with the image side of its tower, and how many of them train."""

    total: int
    trained: int

    @property
    def share(self) -> float:
        """Trained over total."""
        return self.trained / max(self.total, 1)


def count_parameters(model: nn.Module, info: EncoderInfo) -> ParameterCounts:
    """What a model has and trains; the frozen tower counts where the model reads its stored output, too."""
    own = sum(param.numel() for param in model.parameters())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    return ParameterCounts(own + (0 if isinstance(model, TowerClassifier) else info.num_parameters), trained)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers without what is frozen inside its tower, which the tower's own weights give."""
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    state = model.state_dict()
    return {name: value for name, value in state.items() if name in trained or not _in_tower(model, name)}


def load_own_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model the tensors that `own_tensors` gave; raises RuntimeError where they don't fit."""
    if not isinstance(model, TowerClassifier):
        model.load_state_dict(dict(tensors))
        return
    expected = own_tensors(model)
    if expected.keys() != tensors.keys():
        missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        raise RuntimeError(f"missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}")
    model.load_state_dict(dict(tensors), strict=False)


def _in_tower(model: nn.Module, name: str) -> bool:
    return isinstance(model, TowerClassifier) and name.startswith(TOWER_PREFIX)
