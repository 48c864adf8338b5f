"""Models that train inside the tower, built from a loaded tower. Imports open_clip: only trials on images need it."""

from __future__ import annotations

import torch
from torch import nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.models.adapters import (
    adapter_width,
    add_adapters,
    add_low_rank_updates,
    checkpoint_blocks,
    freeze_unused,
    lr_scales,
    train_all,
    train_biases,
)
from imbvlm.models.encoder_classifier import EncoderClassifier
from imbvlm.models.encoders.open_clip_encoder import Encoder


def load_encoder(encoder: EncoderConfig, evaluation: EvalConfig, info: EncoderInfo, device: torch.device) -> Encoder:
    """The tower that features were described by, on a device; raises ImbvlmError where its weights have changed."""
    # What is drawn for weights that are then loaded leaves the trial's random numbers alone.
    with torch.random.fork_rng(devices=[]):
        loaded = Encoder.from_config(encoder, evaluation, device)
    if loaded.info.weights_fingerprint != info.weights_fingerprint:
        raise ImbvlmError(
            f"the weights of {info.name} are not those that this run began with: they were changed meanwhile, or "
            "differ between machines; start again"
        )
    return loaded


def tower_classifier(
    config: TrialConfig, encoder: Encoder, reads: OutputName, on_features: nn.Module, num_classes: int
) -> EncoderClassifier:
    """The model of a trial on images, with exactly what its method trains left trainable.

    `on_features` maps the output that it reads to logits. Takes over the encoder's tower. Raises ImbvlmError where the
    method doesn't go with the tower.
    """
    model = EncoderClassifier(encoder, reads, on_features)
    tower, name = model.tower, encoder.info.name
    blocks = encoder.rules.blocks(tower)
    if config.adapter is not None:
        width = config.adapter.width or adapter_width(num_classes, len(blocks))
        model.adapters = add_adapters(blocks, width, name)
    elif config.lora is not None:
        add_low_rank_updates(blocks, config.lora.rank, config.lora.alpha, name)
    elif config.method == "bias_tuning":
        train_biases(tower)
    elif config.method == "fine_tuning":
        train_all(tower)
        scales = lr_scales(tower, blocks, require_section(config.fine_tuning).layer_decay, name)
        model.lr_scales = {f"tower.{param}": scale for param, scale in scales.items()}
    size = encoder.info.image_size
    grey = torch.full((1, 3, size, size), 128, dtype=torch.uint8, device=encoder.device)
    freeze_unused(tower, lambda: model.features(grey))
    if config.memory is not None and config.memory.gradient_checkpointing:
        checkpoint_blocks(blocks, name)
    return model
