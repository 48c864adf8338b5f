"""Which sections of a trial each method reads, and what they say where a file doesn't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from imbvlm.base.schema import Tree

MethodName = Literal[
    "zero_shot", "prompt_tuning", "linear_probe", "decoder", "adapter", "lora", "bias_tuning", "fine_tuning"
]

# Which optional sections each method reads; a section that it doesn't read is refused in its file.
TRAINING_SECTIONS = frozenset({"classifier", "loss", "optim", "train", "mixing"})
# Those that may read stored features.
STORED_SECTIONS = TRAINING_SECTIONS | {"prompts", "feature_augmentation"}
# Those that train inside the tower read images, which only they vary at will.
IMAGE_SECTIONS = TRAINING_SECTIONS | {"prompts", "augmentation", "memory"}
METHOD_SECTIONS: Mapping[str, frozenset[str]] = {
    "zero_shot": frozenset({"prompts"}),
    "prompt_tuning": STORED_SECTIONS - {"classifier"} | {"prompt_tuning"},
    "linear_probe": STORED_SECTIONS | {"second_stage"},
    "decoder": STORED_SECTIONS | {"decoder", "second_stage"},
    "adapter": IMAGE_SECTIONS | {"adapter"},
    "lora": IMAGE_SECTIONS | {"lora"},
    "bias_tuning": IMAGE_SECTIONS,
    "fine_tuning": IMAGE_SECTIONS | {"fine_tuning"},
}
OPTIONAL_SECTIONS = frozenset().union(*METHOD_SECTIONS.values())

DEFAULT_SECTIONS: Mapping[str, Tree] = {
    "prompts": {},
    "prompt_tuning": {},
    "decoder": {},
    "adapter": {},
    "lora": {},
    "fine_tuning": {},
    "augmentation": {},
    "memory": {},
    "classifier": {"kind": "cosine"},
    "loss": {"name": "balanced_softmax"},
    "optim": {"name": "sgd"},
    "train": {"num_epochs": 10},
}

# What a method's paper sets otherwise.
METHOD_DEFAULTS: Mapping[str, Mapping[str, Tree]] = {
    "prompt_tuning": {
        "optim": {
            "name": "sgd",
            "lr": 0.002,
            "nesterov": False,
            "lr_schedule": "half_cosine",
            "warmup_fraction": 0.0,
            "first_epoch_lr": 1e-5,
        },
        "train": {"num_epochs": 50},
    },
}
