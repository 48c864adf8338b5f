"""Heads that nothing trains on the emoji, with classes centered by their parent and without.

Test images are read and nothing is selected: each head has its default options, and each change its paired interval.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from choice import head_config
from table import Line, Options
from tiny_images import extraction_in_this_process

from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.claims import paired_difference
from imbvlm.longtail.taxonomy import LCA_HEIGHT, rank_errors
from imbvlm.models.model_builder import build_model

TREE = Path(__file__).parents[2] / "sweeps" / "emoji_tree.csv"
VENDORS = ("--group-from", "/(google|twitter)-", "--test-groups")
SPLITS = {"own split": (), "to twitter": (*VENDORS, "twitter"), "to google": (*VENDORS, "google")}
# Heads by name: method, the key that centers, options.
HEADS = {
    "zero-shot": ("zero_shot", "prompts__center_by_parent", {}),
    "class means": ("class_means", "class_means__center_by_parent", {}),
    **{
        f"prototype cache, sharpness {sharpness}": (
            "prototype_cache", "prototype_cache__center_by_parent", {"prototype_cache__sharpness": sharpness}
        )
        for sharpness in (5.5, 20.0)
    },
}  # fmt: skip


def lines(options: Options) -> Iterator[Line]:
    for split, flags in SPLITS.items():
        path = options.folder / "emoji.parquet"
        build = ("manifest", "build", "--dataset", "emoji_lt", *flags, "--taxonomy", str(TREE), "-o", str(path))
        subprocess.run([sys.executable, "-m", "imbvlm", *build], check=True, stdout=subprocess.DEVNULL)
        for head, (method, key, own) in HEADS.items():
            asked = {"data__manifest": str(path), "encoder__image_size": 128, **own}
            plain, centered = (
                predictions(head_config(method, **asked, **{key: value}), options.folder) for value in (False, True)
            )
            yield compared(f"{split}, {head}", Manifest.read(str(path)), centered, plain)


def predictions(config: TrialConfig, folder: Path) -> np.ndarray:
    """Classes (N,) of the test images."""
    manifest, reads = Manifest.read(config.data.manifest), METHODS[config.method].reads
    with extraction_in_this_process():
        features: FeatureSet = ensure_features(
            config, manifest, str(folder / "features"), frozenset({"pooled", "image_embedding"}), ("train", "test"),
            text=True, report=lambda line: None,
        )  # fmt: skip
    data = TrialData.open(config, features, refit=True)
    model = build_model(config, data.model_inputs, torch.device("cpu"))
    stored = features.store("test").gather(reads, np.arange(len(manifest.rows_of("test"))))
    with torch.no_grad():
        return model(stored.float()).argmax(dim=1).numpy()


def compared(what: str, manifest: Manifest, ours: np.ndarray, theirs: np.ndarray) -> Line:
    """The difference in balanced accuracy with its interval, then that accuracy and the mean height of both sides."""
    labels = manifest.labels[manifest.rows_of("test")]
    assert manifest.taxonomy is not None
    difference = paired_difference(ours == labels, theirs == labels, labels)
    shown = []
    for predicted in (ours, theirs):
        errors = rank_errors(manifest.taxonomy, labels, predicted)
        shown.append(f"{100 * (1 - errors['rank_error/subgroup']):.1f}, {errors[LCA_HEIGHT]:.3f}")
    interval = f"{100 * difference.difference:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    return Line(f"{what}: {interval}", *shown)
