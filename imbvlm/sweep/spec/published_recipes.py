"""Published recipes for a sweep to try first, and published numbers beside a study's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.schema import flatten
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.sources.benchmark_registry import benchmark_of
from imbvlm.sweep.spec.search_space import Params

# LIFT [Shi et al., ICML 2024]: adapters, a cosine classifier started from text, logit-adjusted loss. The width of the
# adapters and the epochs are each data set's own.
LIFT: Params = {
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
LIFT_PLUS: Params = {**LIFT, "optim.lr": 0.02, "augmentation.crop": "growing", "augmentation.flip": False}


@dataclass(frozen=True)
class Published:
    """Scores (percent, by metric) on one of BENCHMARKS, the settings of their recipe, and who published them."""

    dataset: str
    settings: Mapping[str, Any]
    source: str
    scores: Mapping[str, float]

    def is_of(self, config: TrialConfig) -> bool:
        """Whether a configuration has the recipe's settings."""
        known = flatten(config.to_tree())
        return all(known.get(key) == value for key, value in self.settings.items())


_LIFT = "published, five crops [LIFT, Shi et al. 2024]"

PUBLISHED = tuple(
    Published(dataset, {**LIFT, "encoder.name": encoder}, _LIFT, {"top1_accuracy": overall})
    for dataset, encoder, overall in (
        ("imagenet_lt", "openai_vit_b16", 78.3),
        ("imagenet_lt", "openai_vit_l14", 82.9),
        ("places_lt", "openai_vit_b16", 52.2),
        ("places_lt", "openai_vit_l14", 53.7),
        ("inat2018", "openai_vit_l14", 85.2),
    )
)


def published_scores(manifest: str) -> list[Published]:
    """What was published for the benchmark at a location; [] for other data, or where there is none to read."""
    try:
        dataset = benchmark_of(Manifest.read(manifest))
    except ImbvlmError:
        return []
    return [one for one in PUBLISHED if one.dataset == dataset]
