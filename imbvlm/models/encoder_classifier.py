"""A classifier on images: an image tower, the modules that a method installs in it, and a model on its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imbvlm.config.encoder_info import OutputName
from imbvlm.models.encoders.encoder import Encoder

TOWER_PREFIX, ON_FEATURES_PREFIX = "tower.", "on_features."


class EncoderClassifier(nn.Module):
    """Crops in bytes (B, 3, S, S) to logits (B, C), through the image tower of `encoder`.

    The tower always computes as in evaluation: no dropout, and batch norm with the statistics of pre-training. `reads`
    is the output that `on_features` maps to logits. `lr_scales` are factors on the learning rate by parameter.
    """

    scale: Tensor
    shift: Tensor
    token_pool: Tensor | None

    def __init__(self, encoder: Encoder, reads: OutputName, on_features: nn.Module) -> None:
        super().__init__()
        self.tower = encoder.image_tower
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
        """The tower's output that `on_features` reads."""
        # `len` would fix the size of batches in an ONNX graph.
        if images.shape[0] == 0:
            # A worker's share of a batch may be empty, which towers can't reshape.
            return self.features(images.new_zeros((1, *images.shape[1:])))[:0]
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        pixels = torch.addcmul(self.shift, images, self.scale)
        features: Tensor = getattr(self._rules.outputs(self.tower, pixels), self._reads)
        return features.float() if self.token_pool is None else self.token_pool @ features.float()

    def train(self, mode: bool = True) -> EncoderClassifier:
        super().train(mode)
        self.tower.eval()
        return self
