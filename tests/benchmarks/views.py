"""Accuracy against the number of stored views, and with a crop of its own for every image in every epoch."""

from collections.abc import Iterator
from dataclasses import replace

import embedded
import numpy as np
from table import Line, Options, shown

from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.class_sampling import EpochPlan
from imbvlm.training.trial_run import TrialRun, build_trial

SEEDS = range(5)
NUM_VIEWS = (1, 2, 4, 8)


def lines(options: Options) -> Iterator[Line]:
    """One store has a view for every epoch; smaller numbers draw from its first ones: crops depend on row and view."""
    most = max(*NUM_VIEWS, embedded.NUM_EPOCHS + 1)
    splits = ("train", "val", "test")
    found = embedded.features(options.folder, most, splits)
    yield shown(
        f"test split after {embedded.NUM_EPOCHS} epochs, cosine classifier, balanced softmax, {len(SEEDS)} seeds", ""
    )
    for num_views in NUM_VIEWS:
        yield _accuracies(f"num_views {num_views}", found, num_views, options)
    yield _accuracies("a fresh crop in each epoch", found, "fresh", options)


def _accuracies(what: str, found: FeatureSet, num_views: int | str, options: Options) -> Line:
    scores = [_score(found, num_views, seed, options) for seed in SEEDS]
    return embedded.accuracies(f"  {what}: balanced and few-shot accuracy", scores)


def _score(found: FeatureSet, num_views: int | str, seed: int, options: Options) -> tuple[float, float]:
    config = embedded.config(train__seed=seed)
    data = TrialData.open(config, found, refit=True)
    train = replace(data.train, num_views=1 if num_views == "fresh" else num_views)
    run = build_trial(config, replace(data, train=train), options.device)
    if num_views == "fresh":
        _draw_fresh(run)
    return embedded.tested(run, found)


def _draw_fresh(run: TrialRun) -> None:
    """View e + 1 in epoch e (from 0): no crop comes twice, and the evaluation crop isn't among them."""
    plan_of = run._trainer.plan_of

    def fresh(epoch: int) -> EpochPlan:
        plan = plan_of(epoch)
        return EpochPlan(plan.rows, np.full_like(plan.views, epoch + 1))

    run._trainer.plan_of = fresh
