"""The embedded data and tower, extracted in this process: Fashion-MNIST with a long tail at 64 px."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from table import Line, shown
from tiny_images import extraction_in_this_process

from imbvlm.config.encoder_info import OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.training.trial_run import TrialRun

MANIFEST = "embedded:fashion_mnist_lt"
NUM_EPOCHS = 12


def config(method: str = "linear_probe", **overrides: object) -> TrialConfig:
    """The quickstart's settings; dotted keys with a double underscore, such as optim__lr."""
    tree = {
        "data": {"manifest": MANIFEST}, "encoder": {"name": "tinylit_lite0", "image_size": 64}, "method": method,
        "eval": {"resize": 1.0}, "train": {"num_epochs": NUM_EPOCHS, "batch_size": 128},
        "loss": {"name": "balanced_softmax"}, "classifier": {"kind": "cosine", "temperature": 0.05},
        "optim": {"name": "sgd", "lr": 0.05},
    }  # fmt: skip
    return TrialConfig.from_tree(tree).with_overrides({k.replace("__", "."): v for k, v in overrides.items()})


def features(
    folder: Path,
    num_views: int = 1,
    splits: tuple[str, ...] = ("train", "val"),
    text: bool = False,
    outputs: frozenset[OutputName] = frozenset({"pooled"}),
) -> FeatureSet:
    """Outputs of these splits, of training so many views; class names' texts."""
    manifest = Manifest.read(MANIFEST)
    present = tuple(split for split in splits if split in manifest.splits)
    wanted = config(features__num_views=num_views)
    with extraction_in_this_process():
        return ensure_features(wanted, manifest, str(folder), outputs, present, text=text, report=lambda line: None)


def tested(run: TrialRun, found: FeatureSet) -> tuple[float, float]:
    """Balanced and few-shot accuracy on the test split once all epochs are run."""
    for _ in run.epochs():
        pass
    metrics = run.counters(TrialData.open_split(run.config, found, "test")).compute(run.data.class_stats)
    return metrics["balanced_accuracy"], metrics["few_shot_accuracy"]


def accuracies(what: str, scores: Sequence[tuple[float, float]]) -> Line:
    """Mean and standard deviation over seeds of what `tested` gives, in percent."""
    percent = np.array(scores) * 100
    (balanced, few), (spread, few_spread) = percent.mean(axis=0), percent.std(axis=0, ddof=1)
    return shown(what, f"{balanced:.2f} ± {spread:.2f}, {few:.2f} ± {few_spread:.2f}")
