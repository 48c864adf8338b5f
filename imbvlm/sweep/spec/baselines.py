"""What every sweep is measured against: zero-shot, and a plain linear softmax probe, once for each tower."""

from __future__ import annotations

import json
from dataclasses import dataclass

from imbvlm.base.schema import Tree
from imbvlm.base.yaml_file import YamlTree
from imbvlm.config.trial_config import TrialConfig, apply_overrides
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

BASELINES_OF_A_TOWER = 2
# The probe trains until validation hasn't improved for so many epochs.
PROBE_PATIENCE = 10
PROBE_EPOCHS = 100
# What decides which features a trial reads; one that runs the tower itself shares those of trials that read its output.
TOWER_SECTIONS = ("encoder", "features", "eval", "prompts")
NOT_OF_TOWER = "features.store"
PROBE: Tree = {
    "classifier": {"kind": "linear"},
    "loss": {"name": "cross_entropy"},
    # A constant rate: the first n epochs are then the same whatever the length, so the refit repeats them.
    "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4, "lr_schedule": "constant", "warmup_fraction": 0.0},
    "train": {"num_epochs": PROBE_EPOCHS},
}


@dataclass(frozen=True)
class Baseline:
    """A baseline's row name, its configuration, and whether it stops when validation stops improving."""

    name: str
    config: TrialConfig
    patience: int | None


def encoder_configs(sweep: ResolvedSweep) -> list[TrialConfig]:
    """The zero-shot trial of every tower and way of reading images that a trial of the space can have, each once.

    Features are extracted by these, too. Raises ConfigError for a continuous range, since each value is a pass over all
    images.
    """
    parameters, spec = sweep.space.parameters, sweep.spec
    keys = [p.key for p in parameters if p.key.split(".")[0] in TOWER_SECTIONS and p.key != NOT_OF_TOWER]
    configs = [_zero_shot(spec, draw) for draw in sweep.space.choices_over(keys, spec.base)]
    # A draw that sets what the base has is the base's tower.
    return list({feature_key(config): config for config in configs}.values())


def feature_key(config: TrialConfig) -> str:
    """Equal for configurations that read the same features."""
    tree = config.to_tree()
    features = {key: value for key, value in tree["features"].items() if f"features.{key}" != NOT_OF_TOWER}
    found = {
        "encoder": tree["encoder"],
        "features": features,
        "eval": tree["eval"],
        "prompts": tree.get("prompts") or {},
    }
    return json.dumps(found, sort_keys=True)


def _zero_shot(spec: SweepSpec, draw: Params) -> TrialConfig:
    tree = apply_overrides(spec.base, draw)
    kept = {key: tree[key] for key in ("data", *TOWER_SECTIONS) if key in tree}
    kept["data"] = {key: value for key, value in kept["data"].items() if key != "class_sampling"}
    return TrialConfig.from_tree(YamlTree({**kept, "method": "zero_shot"}, f"sweep {spec.name}"))


def baselines(sweep: ResolvedSweep) -> list[Baseline]:
    """Zero-shot and linear probe for each tower; their names carry the tower's where there are several."""
    configs, own_train = encoder_configs(sweep), sweep.spec.base.get("train", {})
    found = []
    for zero_shot in configs:
        tower = f" {zero_shot.encoder.name}" if len(configs) > 1 else ""
        train = {key: value for key, value in own_train.items() if key not in ("num_epochs", "num_steps")}
        probe = {**zero_shot.to_tree(), **PROBE, "method": "linear_probe", "train": {**train, **PROBE["train"]}}
        found.append(Baseline(f"zero-shot{tower}", zero_shot, None))
        found.append(
            Baseline(f"linear probe{tower}", TrialConfig.from_tree(YamlTree(probe, "baseline")), PROBE_PATIENCE)
        )
    return found
