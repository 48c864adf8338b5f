"""A small long-tailed problem with stored features of a pretend tower, for tests of what reads features."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from made_stores import stored_split
from safetensors.torch import save_file

from imbvlm.config.encoder_info import OUTPUT_NAMES, EncoderInfo
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.store_layout import TOWER_FILE, StoreLayout
from imbvlm.features.trial_data import TrialData

CLASS_COUNTS = (120, 60, 30, 12, 5, 0)
VAL_PER_CLASS = 8
WIDTH, EMBEDDING_WIDTH, NUM_TOKENS = 16, 12, 5
NUM_VIEWS = 2


def tiny_info(has_class_token: bool = True) -> EncoderInfo:
    """A tower whose pooled output is its normed class token, as a ViT's is."""
    return EncoderInfo(
        name="tiny",
        kind="vit",
        image_size=32,
        num_tokens=NUM_TOKENS,
        token_width=WIDTH,
        pooled_width=WIDTH,
        embedding_width=EMBEDDING_WIDTH,
        has_class_token=has_class_token,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        resize_mode="shortest",
        logit_scale=20.0,
        final_norm_eps=1e-6,
        weights_fingerprint="tiny",
    )


def tiny_features(folder: str | Path, class_counts: tuple[int, ...] = CLASS_COUNTS, seed: int = 0) -> FeatureSet:
    """Stored features of separable classes; class embeddings point where their class's images do."""
    generator = np.random.default_rng(seed)
    num_classes = len(class_counts)
    centers = generator.normal(size=(num_classes, WIDTH))
    projection = generator.normal(size=(WIDTH, EMBEDDING_WIDTH))
    norm_weight, norm_bias = 1 + 0.2 * generator.normal(size=WIDTH), np.full(WIDTH, 0.1)
    tower = {"final_norm.weight": norm_weight, "final_norm.bias": norm_bias, "projection": projection}
    labels = {
        "train": np.repeat(np.arange(num_classes), class_counts),
        "val": np.repeat(np.arange(num_classes), VAL_PER_CLASS),
        "test": np.repeat(np.arange(num_classes), VAL_PER_CLASS),
    }
    splits, info = {}, tiny_info()
    layout = StoreLayout("store", "float16", {name: info.shapes[name] for name in OUTPUT_NAMES})
    for split in labels:
        noise = generator.normal(size=(len(labels[split]), NUM_VIEWS, NUM_TOKENS, WIDTH))
        tokens = centers[labels[split]][:, None, None] + noise
        first = tokens[:, :, 0] - tokens[:, :, 0].mean(axis=-1, keepdims=True)
        pooled = first / np.sqrt(first.var(axis=-1, keepdims=True) + 1e-6) * norm_weight + norm_bias
        outputs = {"tokens": tokens, "pooled": pooled, "image_embedding": pooled @ projection}
        outputs = {name: values.astype(np.float32) for name, values in outputs.items()}
        splits[split] = stored_split(Path(folder), layout, outputs, name=split)
    _write_tensors(Path(folder) / layout.digest / TOWER_FILE, tower)
    text = centers @ projection
    text_file = Path(folder) / "text.safetensors"
    _write_tensors(text_file, {"class_embeddings": text / np.linalg.norm(text, axis=-1, keepdims=True)})
    manifest = str(Path(folder) / "manifest.parquet")
    _manifest(labels, num_classes).write(manifest)
    return FeatureSet(manifest, str(Path(folder) / layout.digest), splits, OUTPUT_NAMES, info, str(text_file))


@functools.cache
def tiny_tower() -> tuple[str, str]:
    """A real tower whose text side fits the stored image embeddings: its name, and its weights' fingerprint."""
    from towers import CONFIGS, write_config

    from imbvlm.models.encoders.encoder_factory import create_encoder

    folder = Path(tempfile.mkdtemp(prefix="imbvlm-tiny-tower-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = write_config(folder, {**CONFIGS["vit"], "embed_dim": EMBEDDING_WIDTH})
    return name, create_encoder(EncoderConfig(name=name), EvalConfig()).info.weights_fingerprint


def tiny_data(
    folder: str | Path, class_counts: tuple[int, ...] = CLASS_COUNTS, seed: int = 0, *, text_tower: bool = False
) -> TrialData:
    """What a trial reads of tiny_features; with a `text_tower` the methods that need one can be built too."""
    data = TrialData.open(tiny_config("linear_probe"), tiny_features(folder, class_counts, seed))
    return with_text_tower(data) if text_tower else data


def with_text_tower(data: TrialData) -> TrialData:
    """The same data as of tiny_tower."""
    name, fingerprint = tiny_tower()
    info = dataclasses.replace(data.info, weights_fingerprint=fingerprint)
    return dataclasses.replace(data, info=info, encoder=EncoderConfig(name=name))


def tiny_config(method: str, **overrides: object) -> TrialConfig:
    """A configuration for tiny_data; dotted keys with a double underscore, such as optim__lr."""
    encoder = tiny_tower()[0] if method == "prompt_tuning" else "tiny"
    tree = {"data": {"manifest": "tiny"}, "encoder": {"name": encoder}, "method": method}
    if METHODS[method].trains:
        # The default precision of a decoder depends on the processor.
        tree["train"] = {"num_epochs": 3, "batch_size": 32, "precision": "float32"}
        tree["loss"] = {"name": "cross_entropy"}
    return TrialConfig.from_tree(tree).with_overrides(
        {key.replace("__", "."): value for key, value in overrides.items()}
    )


def _manifest(labels: dict[str, np.ndarray], num_classes: int) -> Manifest:
    splits = [split for split in labels for _ in labels[split]]
    table = pa.table(
        {
            "bytes": [f"image {number}".encode() for number in range(len(splits))],
            "label": np.concatenate(list(labels.values())).astype(np.int32),
            "split": splits,
        }
    )
    return Manifest.build(table, [f"class {number}" for number in range(num_classes)], "tiny")


def _write_tensors(path: Path, values: dict[str, np.ndarray]) -> None:
    save_file({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}, path)
