"""When two configurations train the same thing (docs/protocol.md, Splits, counts, selection): aliases become one."""

from __future__ import annotations

import json

from imbvlm.base.formatting import join_limited
from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep
from imbvlm.training.step.loss_schedule import loss_knobs

# So many names stand in a sentence.
NUM_NAMED = 5


def canonical_key(config: TrialConfig) -> str:
    """Equal for configurations that train the same thing."""
    tree = config.to_tree()
    # A sweep has one, whose path may have been written otherwise before.
    del tree["data"]["manifest"]
    if config.loss is not None:
        tree["loss"] = _folded(config, tree["loss"])
    for key, section in (("mixing", config.mixing), ("feature_augmentation", config.feature_augmentation)):
        if section is not None and not section.is_on:
            del tree[key]
    return json.dumps(tree, sort_keys=True)


def untrained_configurations(sweep: ResolvedSweep) -> list[str]:
    """Sentences on listed configurations that have no trial of their own; none where the space isn't a list."""
    space = sweep.space
    if not isinstance(space, ListedSpace):
        return []
    names: dict[str, list[str]] = {}
    for name, draw in space.configurations.items():
        names.setdefault(canonical_key(sweep.spec.trial(draw)), []).append(name)
    found = [
        f"{', '.join(others)} {'trains' if len(others) == 1 else 'train'} the same as {first}, and only {first} is run"
        for first, *others in names.values()
        if others
    ]
    left = [first for first, *_ in names.values()][sweep.num_trials :]
    if left:
        mend = f"set num_trials={len(space.configurations)} to run all"
        which = join_limited(left, NUM_NAMED)
        found.append(f"num_trials is {sweep.num_trials} of {len(names)} listed: {which} will not run; {mend}")
    return found


def _folded(config: TrialConfig, loss: Tree) -> Tree:
    if "prior" in loss and config.data.class_sampling == "instance_balanced":
        # Sampling then gives the classes as often as training has them.
        loss = {**loss, "prior": "train"}
    smoothing = {"label_smoothing": loss.get("label_smoothing", 0.0)}
    match loss:
        case {"name": "logit_adjustment", "tau": 0} | {"name": "generalized_reweight", "exponent": 0}:
            return {"name": "cross_entropy", **smoothing}
        case {"name": "focal", "gamma": 0} | {"name": "effective_number", "beta": 0}:
            return {"name": "cross_entropy", **smoothing}
        case {"name": "logit_adjustment", "tau": 1, "prior": prior} | {"name": "lade", "weight": 0, "prior": prior}:
            return {"name": "balanced_softmax", "prior": prior, **smoothing}
        case {"name": "generalized_reweight", "exponent": 1}:
            return {"name": "inverse_frequency", **smoothing}
        case {"name": "ldam", "margin_scale": None} if config.classifier is not None:
            return {**loss, "margin_scale": loss_knobs(config)["margin_scale"]}
    return loss
