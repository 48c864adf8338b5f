"""The network of a blend: runs of encoders, with all heads of a run as few products as they can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbvlm.config.encoder_info import OutputName
from imbvlm.features.store_layout import Precision
from imbvlm.inference.predictor import as_stored, crop_means
from imbvlm.models.classifier import l2_normalize
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_outputs import EncoderOutput


class FeatureForm(NamedTuple):
    """The form of an encoder's output that a head reads: which one, rounded as it was stored, of length 1 or not.

    Heads that read the same form can be one matrix.
    """

    reads: OutputName
    precision: Precision
    is_normalized: bool = False

    def of(self, outputs: EncoderOutput) -> Tensor:
        """The features (B, D), or tokens (B, T, D)."""
        features = as_stored(getattr(outputs, self.reads), self.precision)
        return l2_normalize(features) if self.is_normalized else features

    def check(self) -> None:
        """Raise ValueError for a form that no matrix reads."""
        if self.reads not in ("pooled", "image_embedding") or self.precision not in get_args(Precision):
            raise ValueError(f"a matrix reads pooled or image_embedding, and not {self.reads} in {self.precision}")
        if not isinstance(self.is_normalized, bool):
            raise ValueError("is_normalized must be true or false")


class Head(NamedTuple):
    """A classifier that is no matrix, the form that it reads, and the factor on its logits."""

    classifier: nn.Module
    form: FeatureForm
    scale: float


class FrozenPass(nn.Module):
    """One run of a frozen encoder: bias + sum of weight x over forms + sum of scaled heads.

    `weights` (C, D) belong to the forms of `forms`, in order.
    """

    bias: Tensor

    def __init__(
        self,
        encoder: Encoder,
        bias: Tensor,
        forms: Sequence[FeatureForm],
        weights: Sequence[Tensor],
        heads: Sequence[Head],
    ) -> None:
        super().__init__()
        self.tower, self._encoder = encoder.image_tower, encoder
        self.register_buffer("bias", bias)
        self.forms = tuple(forms)
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)
        self.classifiers = nn.ModuleList(head.classifier for head in heads)
        self.heads = tuple((head.form, head.scale) for head in heads)
        self._distinct_forms = tuple(dict.fromkeys([*forms, *(head.form for head in heads)]))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of crops (B, 3, S, S), or their means over crops (B, V, 3, S, S)."""
        outputs = self._encoder.outputs(images.flatten(0, -4))
        features = {form: form.of(outputs) for form in self._distinct_forms}
        logits = self.bias
        for form, weight in zip(self.forms, self.weights, strict=True):
            logits = logits + F.linear(features[form], weight)
        for (form, scale), classifier in zip(self.heads, self.classifiers, strict=True):
            logits = logits + scale * classifier(features[form]).float()
        return crop_means(logits, images)


class TunedPass(nn.Module):
    """One run of an encoder that a member trained in: bias + the member's scaled logits."""

    bias: Tensor

    def __init__(self, model: nn.Module, bias: Tensor, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale
        self.register_buffer("bias", bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of crops (B, 3, S, S), or their means over crops (B, V, 3, S, S)."""
        logits = self.model(images.flatten(0, -4)).float()
        return crop_means(self.bias + self.scale * logits, images)


class BlendNetwork(nn.Module):
    """The sum of passes; both of its outputs are the blend's logits, whose members are adjusted.

    `inputs` are the numbers of the inputs that the passes take.
    """

    def __init__(self, passes: Sequence[nn.Module], inputs: Sequence[int]) -> None:
        super().__init__()
        self.passes, self.inputs = nn.ModuleList(passes), tuple(inputs)

    def forward(self, *images: Tensor) -> tuple[Tensor, Tensor]:
        runs = zip(self.passes, self.inputs, strict=True)
        logits = torch.stack([run(images[number]) for run, number in runs]).sum(dim=0)
        return logits, logits
