"""Published numbers, shown beside a study's own only on the data set and tower that they were published for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imbvlm.config import TrialConfig
from imbvlm.data.datasets import benchmark_of
from imbvlm.data.manifest import Manifest
from imbvlm.errors import ImbvlmError
from imbvlm.schema import flat
from imbvlm.sweep.recipes import LIFT


@dataclass(frozen=True)
class Published:
    """Scores (percent, by metric) on a benchmark of DATASETS, the settings of their recipe, and who published them."""

    dataset: str
    settings: Mapping[str, Any]
    source: str
    scores: Mapping[str, float]

    def is_of(self, config: TrialConfig) -> bool:
        """Whether a configuration has the recipe's settings."""
        known = flat(config.to_tree())
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
