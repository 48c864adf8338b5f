"""Published recipes, which a sweep can try first, and published scores to compare a study with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.schema import flatten
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.sources.benchmarks import benchmark_of
from imbvlm.sweep.spec.search_space import Params

# LIFT [Shi et al., ICML 2024]: adapters, a cosine classifier initialized from text, and the logit-adjusted loss. The
# width of the adapters and the number of epochs depend on the data set.
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

# LIFT+ [Shi et al. 2025]: twice the rate, half the epochs, and crops that grow to the whole image as only augmentation.
LIFT_PLUS: Params = {**LIFT, "optim.lr": 0.02, "augmentation.crop": "growing", "augmentation.flip": False}


@dataclass(frozen=True)
class Published:
    """Published scores in percent by metric, with their benchmark, the settings of their recipe and their source."""

    dataset: str
    settings: Mapping[str, Any]
    source: str
    scores: Mapping[str, float]

    def matches(self, config: TrialConfig) -> bool:
        """Return whether a configuration has the recipe's settings."""
        values = flatten(config.to_tree())
        return all(values.get(key) == value for key, value in self.settings.items())


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
    """Return the published scores of the benchmark at a location; [] for other data or an unreadable manifest."""
    try:
        dataset = benchmark_of(Manifest.read(manifest))
    except ImbvlmError:
        return []
    return [published for published in PUBLISHED if published.dataset == dataset]
