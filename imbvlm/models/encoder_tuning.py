"""Load an encoder for a trial, and put the trial's model on it."""

from __future__ import annotations

import torch
from torch import nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.models.adapters import checkpoint_blocks, freeze_unused
from imbvlm.models.encoder_classifier import TOWER_PREFIX, EncoderClassifier
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder


def load_encoder(config: TrialConfig, info: EncoderInfo, device: torch.device) -> Encoder:
    """The encoder that features were described by, on a device; raises ImbvlmError where its weights have changed."""
    # Loading overwrites initial weights, whose sampling must not shift the trial's random numbers.
    with torch.random.fork_rng(devices=[]):
        encoder = create_encoder(config.encoder, config.eval, device)
    if encoder.info.weights_fingerprint != info.weights_fingerprint:
        raise ImbvlmError(
            f"the weights of {info.name} are not those that this run began with. They have changed since, or differ "
            "between machines. Start again."
        )
    return encoder


def put_on_encoder(
    config: TrialConfig, encoder: Encoder, on_features: nn.Module, num_classes: int
) -> EncoderClassifier:
    """The model of a trial on images, with exactly the parameters trainable that its method trains.

    `on_features` maps the output that the method reads to logits. Takes over the encoder's image tower. Raises
    ImbvlmError where the method can't train inside it.
    """
    method = METHODS[config.method]
    model = EncoderClassifier(encoder, method.reads, on_features)
    if method.install is not None:
        installed = method.install(encoder, config, num_classes)
        model.adapters = installed.modules
        model.lr_scales = {f"{TOWER_PREFIX}{name}": scale for name, scale in installed.lr_scales.items()}
    size = encoder.info.image_size
    gray = torch.full((1, 3, size, size), 128, dtype=torch.uint8, device=encoder.device)
    freeze_unused(model.tower, lambda: model.features(gray))
    if config.memory is not None and config.memory.gradient_checkpointing:
        checkpoint_blocks(encoder.blocks(), encoder.info.name)
    return model
