"""Published numbers, shown beside a study's own only on the data set and tower that they were published for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from imbvlm.config import TrialConfig
from imbvlm.data.datasets import benchmark_of
from imbvlm.data.manifest import Manifest
from imbvlm.errors import ImbvlmError


@dataclass(frozen=True)
class Published:
    """Scores (percent, by metric) of a method with a tower on a benchmark of DATASETS, and who published them."""

    dataset: str
    encoder: str
    method: str
    source: str
    scores: Mapping[str, float]

    def is_of(self, config: TrialConfig) -> bool:
        """Whether a configuration is of the same method and tower."""
        return config.encoder.name == self.encoder and config.method == self.method


_LIFT = "published, five crops [LIFT, Shi et al. 2024]"

PUBLISHED = tuple(
    Published(dataset, encoder, "adapter", _LIFT, {"top1_accuracy": overall})
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
