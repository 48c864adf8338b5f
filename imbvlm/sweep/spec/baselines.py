"""The baselines of a sweep: zero-shot and a plain linear softmax probe for each encoder."""

from __future__ import annotations

import json
from dataclasses import dataclass

from imbvlm.base.schema import Tree
from imbvlm.base.yaml_file import YamlTree
from imbvlm.config.trial_config import TrialConfig, apply_overrides
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

BASELINES_PER_ENCODER = 2
# The probe stops after this many epochs without a better validation score.
PROBE_PATIENCE = 10
PROBE_EPOCHS = 100
# The sections that decide which features a trial reads, and the one key in them that doesn't.
FEATURE_SECTIONS = ("encoder", "features", "eval", "prompts")
STORE_KEY = "features.store"
PROBE: Tree = {
    "classifier": {"kind": "linear"},
    "loss": {"name": "cross_entropy"},
    # With a constant rate the first epochs don't depend on the number of epochs, so a refit repeats them.
    "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4, "lr_schedule": "constant", "warmup_fraction": 0.0},
    "train": {"num_epochs": PROBE_EPOCHS},
}


@dataclass(frozen=True)
class Baseline:
    """A baseline: its row name, its configuration and its epochs without improvement before it stops."""

    name: str
    config: TrialConfig
    patience: int | None


def encoder_configs(sweep: ResolvedSweep) -> list[TrialConfig]:
    """Return a zero-shot configuration for each encoder and way to read images in the space.

    Features are extracted with these configurations, too. Raises ConfigError for a continuous range: each value needs a
    pass over all images.
    """
    spec, searched = sweep.spec, {parameter.key for parameter in sweep.space.parameters}
    keys = [key for key in searched if key.split(".")[0] in FEATURE_SECTIONS and key != STORE_KEY]
    configs = [_zero_shot(spec, params) for params in sweep.space.choices_over(keys, spec.base)]
    # Sampled values may repeat those of the base.
    return list({feature_key(config): config for config in configs}.values())


def feature_key(config: TrialConfig) -> str:
    """Return a key that is equal for configurations that read the same features."""
    tree = config.to_tree()
    sections = {
        "encoder": tree["encoder"],
        "features": {key: value for key, value in tree["features"].items() if f"features.{key}" != STORE_KEY},
        "eval": tree["eval"],
        "prompts": tree.get("prompts") or {},
    }
    return json.dumps(sections, sort_keys=True)


def _zero_shot(spec: SweepSpec, params: Params) -> TrialConfig:
    tree = apply_overrides(spec.base, params)
    sections = {key: tree[key] for key in ("data", *FEATURE_SECTIONS) if key in tree}
    sections["data"] = {key: value for key, value in sections["data"].items() if key != "class_sampling"}
    return TrialConfig.from_tree(YamlTree({**sections, "method": "zero_shot"}, f"sweep {spec.name}"))


def baselines(sweep: ResolvedSweep) -> list[Baseline]:
    """Return the linear probe for each encoder, and zero-shot where it has text, named by it if there are several."""
    # Imported here because the specification of a sweep starts without torch.
    from imbvlm.models.encoders.encoder_registry import has_text

    configs, own_train = encoder_configs(sweep), sweep.spec.base.get("train", {})
    rows = []
    for zero_shot in configs:
        suffix = f" {zero_shot.encoder.name}" if len(configs) > 1 else ""
        train = {key: value for key, value in own_train.items() if key not in ("num_epochs", "num_steps")}
        probe = {**zero_shot.to_tree(), **PROBE, "method": "linear_probe", "train": {**train, **PROBE["train"]}}
        if has_text(zero_shot.encoder):
            rows.append(Baseline(f"zero-shot{suffix}", zero_shot, None))
        config = TrialConfig.from_tree(YamlTree(probe, "baseline"))
        rows.append(Baseline(f"linear probe{suffix}", config, PROBE_PATIENCE))
    return rows
