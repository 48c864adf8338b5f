"""Whether two configurations train the same thing, aliases included (docs/protocol.md, Splits, counts, selection)."""

from __future__ import annotations

import hashlib
import json

from imbvlm.base.formatting import join_limited
from imbvlm.base.schema import Tree
from imbvlm.config.loss_registry import LossSection
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep

# Names listed in one sentence.
MAX_NAMES = 5


def canonical_key(config: TrialConfig) -> str:
    """A digest that is equal for configurations that train the same thing."""
    tree = config.to_tree()
    # All trials of a sweep read the same manifest, though its path may be written differently.
    del tree["data"]["manifest"]
    if config.loss is not None:
        tree["loss"] = _simplest_loss(config, config.loss)
    for key, section in (("mixing", config.mixing), ("feature_augmentation", config.feature_augmentation)):
        if section is not None and not section.is_on:
            del tree[key]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def untrained_configurations(sweep: ResolvedSweep) -> list[str]:
    """Sentences about listed configurations without a trial of their own; none where the space isn't a list."""
    space = sweep.space
    if not isinstance(space, ListedSpace):
        return []
    names_by_key: dict[str, list[str]] = {}
    for name, params in space.configurations.items():
        names_by_key.setdefault(canonical_key(sweep.spec.trial(params)), []).append(name)
    sentences = [
        f"{', '.join(others)} {'trains' if len(others) == 1 else 'train'} the same as {first}, and only {first} is run"
        for first, *others in names_by_key.values()
        if others
    ]
    remaining = [first for first, *_ in names_by_key.values()][sweep.num_trials :]
    if remaining:
        fix = f"set num_trials={len(space.configurations)} to run all"
        names = join_limited(remaining, MAX_NAMES)
        sentences.append(f"num_trials is {sweep.num_trials} of {len(names_by_key)} listed: {names} will not run; {fix}")
    return sentences


def _simplest_loss(config: TrialConfig, loss: LossSection) -> Tree:
    """The options of the simplest loss that trains the same, with the class counts of its prior."""
    resolved = loss if config.classifier is None else loss.resolve(config.classifier.logit_scale)
    options = resolved.simplify().model_dump(mode="json")
    if "prior" in options and config.data.class_sampling == "instance_balanced":
        # Instance-balanced sampling gives each class its share of the training rows.
        options["prior"] = "train"
    return options
