"""Accuracy by what a cosine classifier starts from: random weights, the names of its classes, its class means."""

from collections.abc import Iterator
from typing import get_args

import embedded
import numpy as np
from table import Line, Options, shown

from imbvlm.config import CosineClassifierConfig
from imbvlm.features.examples import FeatureSet, TrialData
from imbvlm.training.epochs import build_trial

SEEDS = range(5)
EPOCHS = (1, 3, 12)
STARTS = get_args(CosineClassifierConfig.model_fields["init"].annotation)


def lines(options: Options) -> Iterator[Line]:
    found = embedded.features(options.folder, splits=("train", "val", "test"), text=True)
    yield shown(f"test split, linear probe, cosine classifier, balanced softmax, {len(SEEDS)} seeds", "")
    for num_epochs in EPOCHS:
        for start in STARTS:
            yield _accuracies(found, num_epochs, start, options)


def _accuracies(found: FeatureSet, num_epochs: int, start: str, options: Options) -> Line:
    scores = np.array([_score(found, num_epochs, start, seed, options) for seed in SEEDS]) * 100
    (balanced, few), (spread, few_spread) = scores.mean(axis=0), scores.std(axis=0, ddof=1)
    return shown(
        f"  {num_epochs} epochs from {start}: balanced and few-shot accuracy",
        f"{balanced:.2f} ± {spread:.2f}, {few:.2f} ± {few_spread:.2f}",
    )


def _score(found: FeatureSet, num_epochs: int, start: str, seed: int, options: Options) -> tuple[float, float]:
    config = embedded.config(train__seed=seed, train__num_epochs=num_epochs, classifier__init=start)
    run = build_trial(config, TrialData.open(config, found, refit=True), options.device)
    for _ in run.epochs():
        pass
    metrics = run.evaluate(TrialData.open_split(config, found, "test"))
    return metrics["balanced_accuracy"], metrics["few_shot_accuracy"]
