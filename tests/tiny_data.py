"""A small long-tailed problem with stored features of a pretend tower, for tests of what reads features."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from imbvlm.class_stats import ClassStats
from imbvlm.config import TrialConfig
from imbvlm.features.examples import Examples, TrialData
from imbvlm.features.store import FeatureStore, StoreLayout
from imbvlm.models.encoder_info import OUTPUT_NAMES, EncoderInfo

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


def tiny_data(folder: str | Path, class_counts: tuple[int, ...] = CLASS_COUNTS, seed: int = 0) -> TrialData:
    """Features of separable classes; class embeddings point where their class's images do."""
    generator = np.random.default_rng(seed)
    num_classes = len(class_counts)
    centres = generator.normal(size=(num_classes, WIDTH))
    norm = {"final_norm.weight": 1 + 0.2 * generator.normal(size=WIDTH), "final_norm.bias": np.full(WIDTH, 0.1)}
    projection = generator.normal(size=(WIDTH, EMBEDDING_WIDTH))
    tower = {name: torch.tensor(value, dtype=torch.float32) for name, value in norm.items()}
    tower["projection"] = torch.tensor(projection, dtype=torch.float32)

    def examples(split: str, labels: np.ndarray) -> Examples:
        tokens = centres[labels][:, None, None] + generator.normal(size=(len(labels), NUM_VIEWS, NUM_TOKENS, WIDTH))
        pooled = torch.nn.functional.layer_norm(
            torch.tensor(tokens[:, :, 0], dtype=torch.float32),
            (WIDTH,),
            tower["final_norm.weight"],
            tower["final_norm.bias"],
            1e-6,
        ).numpy()
        outputs = {"tokens": tokens, "pooled": pooled, "image_embedding": pooled @ projection}
        return Examples(_store(Path(folder) / split, outputs), np.arange(len(labels)), labels, NUM_VIEWS)

    train = examples("train", np.repeat(np.arange(num_classes), class_counts))
    val = examples("val", np.repeat(np.arange(num_classes), VAL_PER_CLASS))
    text = torch.tensor(centres @ projection, dtype=torch.float32)
    return TrialData(
        class_names=tuple(f"class {number}" for number in range(num_classes)),
        class_stats=ClassStats.from_counts(class_counts),
        train=train,
        val=dataclasses.replace(val, num_views=1),
        info=tiny_info(),
        tower=tower,
        class_embeddings=torch.nn.functional.normalize(text, dim=-1),
    )


def tiny_config(method: str, **overrides: object) -> TrialConfig:
    """A configuration for tiny_data; dotted keys with a double underscore, such as optim__lr."""
    tree = {"data": {"manifest": "tiny"}, "encoder": {"name": "tiny"}, "method": method}
    if method != "zero_shot":
        tree["train"] = {"num_epochs": 3, "batch_size": 32}
        tree["loss"] = {"name": "cross_entropy"}
    return TrialConfig.from_tree(tree).with_overrides(
        {key.replace("__", "."): value for key, value in overrides.items()}
    )


def _store(folder: Path, outputs: dict[str, np.ndarray]) -> FeatureStore:
    num_rows = len(outputs["tokens"])
    shapes = {name: outputs[name].shape[2:] for name in OUTPUT_NAMES}
    layout = StoreLayout(folder.name, num_rows, NUM_VIEWS, 100, "float16", shapes)
    store = FeatureStore.create(str(folder), layout)
    for name in OUTPUT_NAMES:
        for shard in range(layout.num_shards):
            rows = layout.rows_of(shard)
            store.write(name, shard, outputs[name][rows.start : rows.stop].astype(np.float32), [None] * len(rows))
    return FeatureStore.open(str(folder))
