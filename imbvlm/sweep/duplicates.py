"""When two configurations train the same thing (PROTOCOL, "Duplicates"): aliases of losses are folded into one."""

from __future__ import annotations

import json

from imbvlm.config import Tree, TrialConfig
from imbvlm.training.objective import loss_knobs


def canonical_key(config: TrialConfig) -> str:
    """Equal for configurations that train the same thing."""
    tree = config.to_tree()
    if config.loss is not None:
        tree["loss"] = _folded(config, tree["loss"])
    for key, section in (("mixing", config.mixing), ("feature_augmentation", config.feature_augmentation)):
        if section is not None and not section.is_on:
            del tree[key]
    return json.dumps(tree, sort_keys=True)


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
