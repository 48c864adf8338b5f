"""The golden cases: trials of every method, loss and second stage, one sweep, and the inputs that they read.

Everything here is a file or a command of a user, because other commits of the package are run on it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from towers import CONFIGS, write_config

CLASS_COUNTS = {"train": (104, 24, 9, 4, 2, 0), "val": (4,) * 6, "test": (4,) * 6}
ENCODER, IMAGES, CLASSES, MANIFEST = "encoder", "images.parquet", "classes.txt", "manifest.parquet"
IMAGE_SIDES = (36, 60)
SWEEP, TRIALS = "golden-sweep.yaml", "trials"

_METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "linear_probe": {},
    "class_means": {},
    "discriminant": {},
    "prototype_cache": {"prototype_cache": {"num_prototypes": 4}},
    "decoder": {"decoder": {"depth": 2, "num_heads": 2}},
    "prompt_tuning": {"prompt_tuning": {"num_tokens": 4}, "train": {"num_epochs": 2}},
    "adapter": {"adapter": {"width": 4}},
    "lora": {"lora": {"rank": 2}},
    "bias_tuning": {},
    "fine_tuning": {"fine_tuning": {"layer_decay": 0.8}, "optim": {"name": "sgd", "lr": 0.003}},
}
_LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"label_smoothing": 0.1},
    "focal": {"gamma": 1.5},
    "inverse_frequency": {},
    "effective_number": {"beta": 0.99},
    "generalized_reweight": {"exponent": 0.8},
    "balanced_softmax": {"prior": "train"},
    "logit_adjustment": {"tau": 1.3},
    "ldam": {"reweight_from": 0.5},
    "lade": {"weight": 0.05},
}
_STAGES: dict[str, dict[str, Any]] = {
    "classifier_retraining": {"num_epochs": 2},
    "learnable_weight_scaling": {"num_epochs": 2},
    "tau_normalization": {},
    "disalign": {"num_epochs": 2},
    "marc": {"num_epochs": 2},
}
# Options that take another path through the code, each on the method named first.
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "two views": ("linear_probe", {"features": {"num_views": 2}}),
    "int8 tokens": ("decoder", {"features": {"int8_tokens": True}}),
    "pooled tokens": ("decoder", {"encoder": {"token_pooling": 2}}),
    "identity decoder from text": (
        "decoder",
        {"decoder": {"depth": 1, "num_heads": 2, "init": "identity"}, "classifier": {"kind": "cosine", "init": "text"}},
    ),
    "narrow decoder": ("decoder", {"decoder": {"depth": 1, "num_heads": 2, "width": 16}}),
    "classifier from text": ("linear_probe", {"classifier": {"kind": "cosine", "init": "text"}}),
    "classifier from class means": ("linear_probe", {"classifier": {"kind": "linear", "init": "class_mean"}}),
    "square-root sampling": ("linear_probe", {"data": {"class_sampling": "square_root"}}),
    "class-balanced sampling": ("linear_probe", {"data": {"class_sampling": "class_balanced"}}),
    "progressively balanced sampling": ("linear_probe", {"data": {"class_sampling": "progressively_balanced"}}),
    "AdamW by steps": ("linear_probe", {"optim": {"name": "adamw"}, "train": {"num_epochs": None, "num_steps": 17}}),
    "half cosine": ("linear_probe", {"optim": {"name": "sgd", "lr_schedule": "half_cosine", "warmup_fraction": 0.2}}),
    "mixup of features": ("linear_probe", {"feature_augmentation": {"mixup": 0.4}}),
    "transfer of features": ("linear_probe", {"feature_augmentation": {"transfer": 0.5}}),
    "mixup and CutMix": ("adapter", {"mixing": {"mixup": 0.4, "cutmix": 1.0}}),
    "augmented images": ("adapter", {"augmentation": {"color_jitter": 0.2, "rand_ops": 2}}),
    "accumulation": ("lora", {"memory": {"accumulation": 2, "gradient_checkpointing": True}}),
    "fresh crops": ("decoder", {"features": {"store": False}}),
    "five crops": ("linear_probe", {"eval": {"tte": "five_crop"}}),
    "context for each class": (
        "prompt_tuning", {"prompt_tuning": {"num_tokens": 2, "per_class": True}, "train": {"num_epochs": 2}},
    ),
}  # fmt: skip


def covered() -> dict[str, frozenset[str]]:
    """Names of methods, losses and second stages that have a case."""
    return {"methods": frozenset(_METHODS), "losses": frozenset(_LOSSES), "second_stages": frozenset(_STAGES)}


def trial_configs() -> dict[str, dict[str, Any]]:
    """A trial's configuration by the name of its case."""
    cases = {f"method {method}": _config(method, sections) for method, sections in _METHODS.items()}
    cases |= {
        f"loss {loss}": _config("linear_probe", {"loss": {"name": loss, **options}})
        for loss, options in _LOSSES.items()
    }
    for stage, options in _STAGES.items():
        sections = {"classifier": {"kind": "linear"}, "second_stage": {"name": stage, **options}}
        cases[f"second stage {stage}"] = _config("linear_probe", sections)
        cases[f"second stage {stage} of a decoder"] = _config("decoder", {**_METHODS["decoder"], **sections})
    cases |= {name: _config(method, {**_METHODS[method], **sections}) for name, (method, sections) in _OPTIONS.items()}
    return cases


def _config(method: str, sections: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "data": {"manifest": MANIFEST},
        "encoder": {"name": f"local-dir:{ENCODER}"},
        "features": {"computed_in": "float32"},
        "method": method,
    }
    if method not in ("zero_shot", "class_means", "discriminant", "prototype_cache"):
        tree["train"] = {"num_epochs": 3, "batch_size": 16, "precision": "float32"}
        tree["loss"] = {"name": "balanced_softmax"}
    if sections.get("features", {}).get("store") is False or method in (
        "adapter",
        "lora",
        "bias_tuning",
        "fine_tuning",
    ):
        del tree["features"]["computed_in"]
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if "name" not in values else values
    return {key: value for key, value in tree.items() if value != {}}


def sweep_spec() -> dict[str, Any]:
    """A search of 12 trials over methods, losses and rates, with baselines, more seeds, refits and one test reading."""
    return {
        "name": "golden",
        "base": {
            "data": {"manifest": MANIFEST},
            "encoder": {"name": f"local-dir:{ENCODER}"},
            "features": {"computed_in": "float32"},
            "decoder": {"num_heads": 2},
            "train": {"num_epochs": 6, "batch_size": 16, "precision": "float32"},
        },
        "space": {
            "parameters": {
                "method": {"choice": ["linear_probe", "decoder"]},
                "decoder.depth": {"choice": [1, 2], "when": {"method": "decoder"}},
                "classifier.kind": {"choice": ["linear", "cosine"]},
                "classifier.temperature": {"loguniform": [0.015, 0.08], "when": {"classifier.kind": "cosine"}},
                "loss.name": {"choice": ["cross_entropy", "focal", "balanced_softmax", "logit_adjustment"]},
                "loss.gamma": {"uniform": [0.5, 3.0], "when": {"loss.name": "focal"}},
                "loss.tau": {"uniform": [0.5, 1.5], "when": {"loss.name": "logit_adjustment"}},
                "data.class_sampling": {"choice": ["instance_balanced", "square_root"]},
                "optim.lr": [
                    {"loguniform": [0.02, 0.5], "when": {"method": "linear_probe"}},
                    {"loguniform": [0.01, 0.1], "when": {"method": "decoder"}},
                ],
            }
        },
        "num_trials": 12,
        "searcher": {"name": "tpe", "seed": 0, "num_startup_trials": 4},
        "max_concurrent_trials": 1,
        "confirm_trials": 2,
        "confirm_seeds": [1],
        "confirm_folds": None,
        "refit_seeds": [0, 1],
    }


def write_inputs(folder: Path) -> None:
    """Write the encoder, the images, and every case's YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    write_config(folder / ENCODER, {**CONFIGS["vit"], "text_cfg": text}, half=True)
    write_images(folder / IMAGES)
    (folder / CLASSES).write_text("".join(f"class {label}\n" for label in range(len(CLASS_COUNTS["train"]))))
    (folder / TRIALS).mkdir(exist_ok=True)
    for name, config in trial_configs().items():
        (folder / TRIALS / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / SWEEP).write_text(yaml.safe_dump(sweep_spec(), sort_keys=False))


def write_images(path: Path) -> None:
    """Write a Parquet of small PNGs, one hue for each class, with labels and splits."""
    columns: dict[str, list[Any]] = {"bytes": [], "label": [], "split": []}
    rng = np.random.default_rng(0)
    for split, counts in CLASS_COUNTS.items():
        for label in np.repeat(range(len(counts)), counts):
            columns["bytes"].append(_image(int(label), rng))
            columns["label"].append(int(label))
            columns["split"].append(split)
    pq.write_table(pa.table(columns), path)


def _image(label: int, rng: np.random.Generator) -> bytes:
    height, width = rng.integers(*IMAGE_SIDES, 2)
    color = 255 * (0.5 + 0.4 * np.cos(2 * np.pi * (label / len(CLASS_COUNTS["train"]) + np.arange(3) / 3)))
    pixels = np.clip(color + rng.normal(0, 60, 3) + rng.normal(0, 60, (height, width, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
