"""Accuracy by what a cosine classifier starts from: random weights, the names of its classes, its class means."""

from collections.abc import Iterator
from typing import get_args

import embedded
from table import Line, Options, shown

from imbvlm.config.model_sections import CosineClassifierConfig
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.training.trial_run import build_trial

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
    scores = []
    for seed in SEEDS:
        config = embedded.config(train__seed=seed, train__num_epochs=num_epochs, classifier__init=start)
        run = build_trial(config, TrialData.open(config, found, refit=True), options.device)
        scores.append(embedded.tested(run, found))
    return embedded.accuracies(f"  {num_epochs} epochs from {start}: balanced and few-shot accuracy", scores)
