"""The baselines of a sweep: for each encoder zero-shot, a plain linear probe, and heads that need no training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imbvlm.base.schema import Tree, flatten
from imbvlm.base.yaml_file import YamlTree
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig, apply_overrides
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

# Methods whose models are made from stored features and trained no further.
HEADS = tuple(name for name, method in METHODS.own.items() if method.learns and not method.trains)
# Zero-shot, the probe, and the heads.
BASELINES_PER_ENCODER = 2 + len(HEADS)
# The probe stops after this many epochs without a better validation score.
PROBE_PATIENCE = 10
PROBE_EPOCHS = 100
# The sections that decide which features a trial reads, and the keys in them that don't.
FEATURE_SECTIONS = ("encoder", "features", "eval", "prompts")
STORE_KEY = "features.store"
OTHER_KEYS = (STORE_KEY, "features.compile")
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
        # Sweeps of 0.1 recorded paths relative to where they ran.
        "encoder": config.encoder.absolute().model_dump(),
        "features": {key: value for key, value in tree["features"].items() if f"features.{key}" not in OTHER_KEYS},
        "eval": tree["eval"],
        "prompts": tree.get("prompts") or {},
    }
    return json.dumps(sections, sort_keys=True)


def pass_key(config: TrialConfig) -> str:
    """Return a key that is equal for configurations that share one pass over an image at prediction.

    A method that trains in the encoder has a pass of its own.
    """
    trained = config.to_tree() if METHODS[config.method].trains_encoder else None
    return json.dumps([config.encoder.model_dump(), config.eval.model_dump(), trained], sort_keys=True)


def _zero_shot(spec: SweepSpec, params: Params) -> TrialConfig:
    tree = apply_overrides(spec.base, params)
    sections = {key: tree[key] for key in ("data", *FEATURE_SECTIONS) if key in tree}
    sections["data"] = {key: value for key, value in sections["data"].items() if key != "class_sampling"}
    return TrialConfig.from_tree(YamlTree({**sections, "method": "zero_shot"}, f"sweep {spec.name}"))


def baselines(sweep: ResolvedSweep) -> dict[str, Baseline]:
    """Return the baselines by their trial ids: the linear probe, zero-shot where there is text, and HEADS.

    A head that the space searches is left out, because its trial would be the same run. Heads come last, so that those
    of sweeps that began without them keep their ids.
    """
    # Imported here because the specification of a sweep starts without torch.
    from imbvlm.models.encoders.encoder_registry import has_text

    configs, own_train = encoder_configs(sweep), sweep.spec.base.get("train", {})
    searched = sweep.space.values_of("method", sweep.spec.base)
    rows, heads = [], []
    for zero_shot, suffix in zip(configs, _suffixes(configs), strict=True):
        if has_text(zero_shot.encoder):
            rows.append(Baseline(f"zero-shot{suffix}", zero_shot, None))
        rows.append(Baseline(f"linear probe{suffix}", probe_config(zero_shot, own_train), PROBE_PATIENCE))
        if zero_shot.features.store:
            heads += [
                Baseline(f"{name.replace('_', ' ')}{suffix}", zero_shot.with_overrides({"method": name}), None)
                for name in HEADS
                if name not in searched
            ]
    return {f"b{number:05d}": baseline for number, baseline in enumerate([*rows, *heads], 1)}


def probe_config(zero_shot: TrialConfig, own_train: Tree) -> TrialConfig:
    """Return the linear probe on the features of `zero_shot`; `own_train` has a sweep's options, all but the length."""
    train = {key: value for key, value in own_train.items() if key not in ("num_epochs", "num_steps")}
    probe = {**zero_shot.to_tree(), **PROBE, "method": "linear_probe", "train": {**train, **PROBE["train"]}}
    return TrialConfig.from_tree(YamlTree(probe, "baseline"))


def encoder_suffix(values: Mapping[str, Any]) -> str:
    """Return the encoder's name and image size, as far as `values` has these keys: ` openai_vit_b16 at 224 px`."""
    name = f" {values['encoder.name']}" if "encoder.name" in values else ""
    if "encoder.image_size" not in values:
        return name
    size = values["encoder.image_size"]
    return f"{name} at {f'{size} px' if size else 'its own size'}"


def _suffixes(configs: list[TrialConfig]) -> list[str]:
    """Return what tells each configuration from the others, such as ` openai_vit_b16 at 128 px`.

    Other keys than the encoder's name and size are named where these two are equal.
    """
    trees = [flatten(json.loads(feature_key(config))) for config in configs]
    differing = [key for key in trees[0] if any(tree[key] != trees[0][key] for tree in trees)]
    suffixes = [encoder_suffix({key: tree[key] for key in differing}) for tree in trees]
    if len(set(suffixes)) == len(suffixes):
        return suffixes
    others = [key for key in differing if key not in ("encoder.name", "encoder.image_size")]
    return [
        f"{suffix} with " + " and ".join(f"{key.split('.')[1].replace('_', ' ')} {tree[key]}" for key in others)
        for suffix, tree in zip(suffixes, trees, strict=True)
    ]
