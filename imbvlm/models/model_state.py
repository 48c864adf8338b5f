"""A model's own tensors without those of the frozen encoder, and its parameter counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.models.encoder_classifier import TOWER_PREFIX, EncoderClassifier


class ParameterCounts(NamedTuple):
    """Number of parameters of a model with its image tower, and of those that train."""

    total: int
    trained: int

    @property
    def share(self) -> float:
        """Trained parameters over all."""
        return self.trained / max(self.total, 1)


def count_parameters(model: nn.Module, info: EncoderInfo) -> ParameterCounts:
    """Count a model's parameters, and those of the frozen image tower even if the model reads its stored output."""
    own = sum(param.numel() for param in model.parameters())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    return ParameterCounts(own + (0 if isinstance(model, EncoderClassifier) else info.num_parameters), trained)


def own_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers except those that are frozen inside its image tower."""
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    state = model.state_dict()
    return {name: value for name, value in state.items() if name in trained or not _in_tower(model, name)}


def load_own_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of `own_state_dict`; raises RuntimeError where they don't fit."""
    if not isinstance(model, EncoderClassifier):
        model.load_state_dict(dict(tensors))
        return
    expected = own_state_dict(model)
    if expected.keys() != tensors.keys():
        missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        raise RuntimeError(f"missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}")
    model.load_state_dict(dict(tensors), strict=False)


def _in_tower(model: nn.Module, name: str) -> bool:
    return isinstance(model, EncoderClassifier) and name.startswith(TOWER_PREFIX)
