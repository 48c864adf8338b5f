"""Published recipes as draws, for a sweep to try first."""

from __future__ import annotations

from imbvlm.sweep.space import Draw

# LIFT [Shi et al., ICML 2024]: adapters, a cosine classifier started from text, logit-adjusted loss. The width of the
# adapters and the epochs are each data set's own.
LIFT: Draw = {
    "encoder.name": "openai_vit_b16",
    "method": "adapter",
    "classifier.kind": "cosine",
    "classifier.temperature": 0.04,
    "classifier.init": "text",
    "loss.name": "logit_adjustment",
    "loss.tau": 1.0,
    "data.class_sampling": "instance_balanced",
    "optim.lr": 0.01,
    "optim.weight_decay": 5e-4,
    "optim.lr_schedule": "epoch_half_cosine",
    "optim.warmup_fraction": 0.0,
    "optim.nesterov": False,
    "train.clip_grad_norm": None,
}

# LIFT+ [Shi et al. 2025]: twice the rate, half the epochs, and nothing but crops that grow to the whole image.
LIFT_PLUS: Draw = {**LIFT, "optim.lr": 0.02, "augmentation.crop": "growing", "augmentation.flip": False}
