"""A small long-tailed problem of real images and a debug-size tower, for tests of what trains inside towers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
from PIL import Image
from towers import write_tower

from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig, needs_text
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.model_builder import stored_outputs

CLASS_COUNTS = (30, 12, 6, 3, 0)
PER_CLASS = 3
COLORS = ((220, 40, 40), (40, 200, 60), (50, 60, 210), (210, 200, 40), (120, 120, 120))


def encoded_image(label: int, seed: int) -> bytes:
    """A PNG in its class's color, with noise and a size of its own."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(36, 60, 2)
    pixels = np.clip(np.array(COLORS[label]) + rng.normal(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image_manifest(
    folder: Path, *, files: bool = False, bad: tuple[int, ...] = (), taxonomy: Taxonomy | None = None
) -> str:
    """Write a manifest, its images embedded or as files; `bad` rows have something else in their place."""
    labels = np.concatenate(
        [np.repeat(range(5), CLASS_COUNTS), np.repeat(range(5), PER_CLASS), np.repeat(range(5), PER_CLASS)]
    )
    splits = ["train"] * sum(CLASS_COUNTS) + ["val"] * 5 * PER_CLASS + ["test"] * 5 * PER_CLASS
    contents = [b"<html>" if row in bad else encoded_image(label, row) for row, label in enumerate(labels)]
    columns = {"label": labels.astype(np.int32), "split": splits}
    folder.mkdir(parents=True, exist_ok=True)
    if files:
        for row, content in enumerate(contents):
            (folder / f"{row}.png").write_bytes(content)
        columns["uri"] = [str(folder / f"{row}.png") for row in range(len(labels))]
    else:
        columns["bytes"] = contents
    path = folder / "manifest.parquet"
    manifest = Manifest.build(pa.table(columns), [f"class {label}" for label in range(5)], "tiny images")
    replace(manifest, taxonomy=taxonomy).write(str(path))
    return str(path)


class TinyImages:
    """A manifest, a tower of one of the kinds in towers.CONFIGS, and what was stored of it so far, in a folder."""

    def __init__(self, folder: Path, kind: str = "vit", **manifest: object) -> None:
        self.folder = Path(folder)
        self.tower = write_tower(self.folder / kind, kind)
        self.manifest = image_manifest(self.folder / "images", **manifest)

    def config(self, method: str, **overrides: object) -> TrialConfig:
        """A configuration on these images; dotted keys with a double underscore, such as optim__lr."""
        tree = {"data": {"manifest": self.manifest}, "encoder": {"name": self.tower}, "method": method}
        if METHODS[method].trains:
            tree["train"] = {"num_epochs": 3, "batch_size": 16, "precision": "float32"}
            tree["loss"] = {"name": "cross_entropy"}
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        if dotted.get("features.store", True):
            # As models predict, whatever the processor.
            tree["features"] = {"computed_in": "float32"}
        return TrialConfig.from_tree(tree).with_overrides(dotted)

    def features(self, config: TrialConfig, splits: tuple[str, ...] = ("train", "val", "test")) -> FeatureSet:
        """What the driver prepares for a trial."""
        manifest, root = Manifest.read(self.manifest), str(self.folder / "features")
        text, outputs = needs_text(config), stored_outputs(config)
        with extraction_in_this_process():
            return ensure_features(
                config, manifest, root, outputs, splits, report=lambda line: None, text=text, five_crop=splits[1:]
            )

    def data(self, config: TrialConfig) -> TrialData:
        """What a trial opens."""
        return TrialData.open(config, self.features(config))


@contextmanager
def extraction_in_this_process() -> Iterator[None]:
    """The extraction pass without Ray, which takes longer to start than these images take, also on a busy machine."""
    with mock.patch.multiple("imbvlm.features.extraction", owns_machine=lambda: True, SECONDS_HERE=600.0):
        yield
