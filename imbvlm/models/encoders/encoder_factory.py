"""Encoders by their configuration, whatever library implements them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from imbvlm.config.encoder_entries import Loader
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.models.encoders.image_encoder import ImageEncoder
from imbvlm.models.encoders.open_clip_encoder import OpenClipEncoder
from imbvlm.models.encoders.timm_encoder import TimmEncoder

_IMPLEMENTATIONS: Mapping[Loader, type[ImageEncoder]] = {"open_clip": OpenClipEncoder, "timm": TimmEncoder}


def create_encoder(
    config: EncoderConfig, evaluation: EvalConfig, device: str | torch.device = "cpu", *, with_text: bool = True
) -> Encoder:
    """Load the encoder that the configuration names.

    Without `with_text` only the image side of a folder that `Encoder.save` wrote is built.

    Raises ImbvlmError for unknown names (with the nearest), a QuickGELU that contradicts the weights, weights that are
    missing or don't fit, an image size that the encoder doesn't take, and outputs that aren't defined.
    """
    source = resolve_encoder(config)
    return _IMPLEMENTATIONS[source.loader].load(source, config, evaluation, device, with_text=with_text)


def describe_encoder(config: EncoderConfig) -> EncoderInfo:
    """An encoder's facts without its weights, in a fraction of a second; `weights_fingerprint` is empty.

    `logit_scale` is an untrained model's. Raises the ImbvlmErrors of `create_encoder` that don't need weights.
    """
    source = resolve_encoder(config)
    return _IMPLEMENTATIONS[source.loader].describe(source, config)[0]
