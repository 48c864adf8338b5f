"""A package with a loss, a method, an encoder and a sampler of a user's own, written from docs/extend."""

from pathlib import Path

FILES = {
    "__init__.py": """
from .encoders import ENCODERS
from .heads import METHODS
from .losses import LOSSES
from .samplers import SAMPLERS
""",
    "losses.py": '''
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from imbvlm.config.loss_registry import Loss, LossSection
from imbvlm.longtail.losses import weighted_mean
from imbvlm.longtail.worker_group import SINGLE_WORKER


class GceConfig(LossSection):
    name: Literal["gce"] = "gce"
    q: float = Field(0.7, gt=0, le=1)


def gce(logits, targets, class_counts, *, q=0.7, workers=SINGLE_WORKER):
    """(1 - p_y^q) / q [Zhang and Sabuncu 2018]."""
    shares = F.softmax(logits.float(), dim=-1).gather(1, targets[:, None])[:, 0]
    return weighted_mean((1 - shares**q) / q, None, workers)


LOSSES = {"gce": Loss(GceConfig, gce, summary="Between cross entropy and mean absolute error.", paper="NeurIPS 2018")}
''',
    "heads.py": '''
from pydantic import Field
from torch import nn

from imbvlm.base.schema import Section
from imbvlm.config.method_registry import Method
from imbvlm.models.model_builder import build_behind, restore_behind


class GatedPoolConfig(Section):
    temperature: float = Field(1.0, gt=0)


class GatedPool(nn.Module):
    """A mean of tokens (B, T, D), weighted by what they score: (B, D)."""

    def __init__(self, width, temperature):
        super().__init__()
        self.score, self.temperature = nn.Linear(width, 1), temperature

    def forward(self, tokens):
        return ((self.score(tokens) / self.temperature).softmax(dim=1) * tokens).sum(dim=1)


def make_pool(config, info):
    return GatedPool(info.token_width, config.gated_pool.temperature)


def build(config, inputs, encoder, device):
    return build_behind(make_pool(config, inputs.info), inputs.info.token_width, config, inputs, device)


def restore(config, info, num_classes, tensors):
    return restore_behind(make_pool(config, info), info.token_width, config, num_classes)


METHODS = {
    "gated_pool": Method(
        name="gated_pool",
        summary="Trains a classifier on a weighted mean of tokens.",
        paper="nobody's, 2026",
        reads="tokens",
        section=GatedPoolConfig,
        build=build,
        restore=restore,
    ),
}
''',
    "encoders.py": """
from imbvlm.config.encoder_entries import EncoderEntry

ENCODERS = {
    "my_tower": EncoderEntry(
        "local-dir:TOWER", None, "ours", license="cc-by-nc-4.0", pretraining="our photos", image_size=32,
        seen={"fashion_mnist_lt": "the same shirts"},
    ),
}
""",
    "samplers.py": '''
from typing import Literal

import optuna
from pydantic import Field

from imbvlm.sweep.spec.sampler_registry import Sampler, SamplerSection


class RoundRobinConfig(SamplerSection):
    name: Literal["round_robin"] = "round_robin"
    first: int = Field(0, ge=0)


class RoundRobin(optuna.samplers.BaseSampler):
    """Gives every trial the next value of every choice."""

    def __init__(self, first):
        self.first = first

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, name, distribution):
        return distribution.choices[(self.first + trial.number) % len(distribution.choices)]


def build(config, seed, constraints_func):
    return RoundRobin(config.first)


SAMPLERS = {
    "round_robin": Sampler(RoundRobinConfig, "values in turn", build, independent=True, continuous=False),
}
''',
}


def write_own_plugin(folder: Path, tower: Path) -> Path:
    """Write the package, whose encoder is the tower in a folder; returns the package's folder."""
    package = folder / "own"
    package.mkdir(parents=True)
    for name, code in FILES.items():
        (package / name).write_text(code.lstrip().replace("TOWER", str(tower)), encoding="utf-8")
    return package
