"""Records the tables of the section `quality`.

    PYTHONPATH=tests/helpers:. python tests/benchmarks/record_curves.py [--fashion FOLDER] [--icons FOLDER] [TABLE ...]

Fashion-MNIST is that of Debian's package dataset-fashion-mnist, unpacked (`dpkg-deb -x`); `/` where it is installed.
Images of the shipped test split are left out by their content. Icons are drawn by `tests/tools/draw_icons.py`. The
package's encoder embeds both at 64 px. The other tables are of made features. One core records all in about an hour.
"""

import argparse
import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import torch
from curves import FOLDER, FRACTIONS, METHODS, Table, balanced_accuracy, make_spec
from made_stores import append, made_contents
from PIL import Image
from safetensors.torch import save_file
from tiny_images import extraction_in_this_process

from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import TOWER_FILE, StoreLayout
from imbvlm.features.trial_data import StoredRows, TrialData
from imbvlm.longtail.metrics import predictions
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.stratification import RandomTrial
from imbvlm.training.trial_pack import TrialPack, pack_key
from imbvlm.training.trial_run import TrialRun, build_trial
from tests.tools.build_datasets import FASHION_FOLDER, encode_png, read_idx

NUM_POOL, NUM_TRUE, PACK_SIZE = 1500, 5000, 64
NUM_CONFIGS: Mapping[str, int] = {"linear_probe": 480, "decoder": 32}
MADE_WIDTH, NUM_TOKENS = 64, 5
Array = np.ndarray
# The images of a class, each read or encoded when it is drawn.
Images = Sequence[Callable[[], bytes]]


@dataclass(frozen=True)
class Plan:
    """A table to record: training images of the largest and of the smallest class, and how made features are.

    Made features have `noise` around `modes` centers a class, and `offset` times a vector that all of them share.
    """

    family: str
    space: str
    num_classes: int
    most: int
    least: int
    noise: float = 0.0
    modes: int = 1
    offset: float = 0.0

    def counts(self, seed: int) -> Array:
        """Training images of each class (C,)."""
        falling = np.rint(np.geomspace(self.most, self.least, self.num_classes)).astype(int)
        return np.random.default_rng(seed).permutation(falling)


PLANS = {
    "fashion-0": Plan("fashion", "quickstart", 10, 500, 5),
    "fashion-1": Plan("fashion", "quickstart", 10, 300, 20),
    "fashion-2": Plan("fashion", "quickstart", 10, 400, 3),
    "made10-0": Plan("made10", "quickstart", 10, 500, 5, 1.4),
    "made10-1": Plan("made10", "quickstart", 16, 200, 8, 2.0),
    "made10-2": Plan("made10", "quickstart", 30, 120, 3, 1.4),
    "made100-0": Plan("made100", "imagenet_lt", 60, 60, 2, 1.2),
    "made100-1": Plan("made100", "imagenet_lt", 100, 40, 2, 1.0),
    "made100-2": Plan("made100", "imagenet_lt", 150, 30, 1, 1.0),
    "made1000-0": Plan("made1000", "imagenet_lt", 300, 15, 1, 0.8),
    "made1000-1": Plan("made1000", "imagenet_lt", 600, 6, 1, 0.7),
    "made1000-2": Plan("made1000", "imagenet_lt", 1000, 4, 1, 0.6),
    "modes10-0": Plan("modes10", "quickstart", 10, 400, 4, 1.0, 4, 2.0),
    "modes10-1": Plan("modes10", "quickstart", 20, 200, 5, 1.0, 3, 4.0),
    "modes10-2": Plan("modes10", "quickstart", 30, 150, 10, 0.8, 6, 1.0),
    "modes100-0": Plan("modes100", "imagenet_lt", 50, 80, 4, 0.9, 3, 2.0),
    "modes100-1": Plan("modes100", "imagenet_lt", 120, 50, 2, 0.8, 2, 4.0),
    "modes100-2": Plan("modes100", "imagenet_lt", 250, 20, 2, 0.6, 2, 1.0),
    "icons-0": Plan("icons", "imagenet_lt", 60, 60, 2),
    "icons-1": Plan("icons", "imagenet_lt", 100, 60, 1),
    "icons-2": Plan("icons", "imagenet_lt", 140, 60, 4),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ features


def even_labels(num_rows: int, num_classes: int) -> Array:
    return np.arange(num_rows) % num_classes


def split_labels(plan: Plan, seed: int) -> dict[str, Array]:
    """Labels by split; the rows of `test` are the pool and then those that tell the truth."""
    num_true = -(-NUM_TRUE // plan.num_classes) * plan.num_classes
    test = np.concatenate([even_labels(NUM_POOL, plan.num_classes), even_labels(num_true, plan.num_classes)])
    train = np.repeat(np.arange(plan.num_classes), plan.counts(seed))
    return {"train": train, "val": even_labels(plan.num_classes, plan.num_classes), "test": test}


def fashion_images(source: Path, without: Sequence[str] = ("test",)) -> list[Images]:
    """Fashion-MNIST's images by class, none of these shipped splits."""
    folder_of = source / FASHION_FOLDER
    images, classes = (
        np.concatenate([read_idx(folder_of / f"{part}-{kind}-ubyte.gz") for part in ("train", "t10k")])
        for kind in ("images-idx3", "labels-idx1")
    )
    shipped = Manifest.read("embedded:fashion_mnist_lt")
    rows = np.concatenate([shipped.rows_of(split) for split in without])
    contents = shipped.table.column("bytes").take(pa.array(rows)).to_pylist()
    excluded = {np.asarray(Image.open(io.BytesIO(content))).tobytes() for content in contents}
    usable = np.array([image.tobytes() not in excluded for image in images])
    return [
        [partial(encode_png, images[row]) for row in np.flatnonzero(usable & (classes == label))] for label in range(10)
    ]


def icon_images(source: Path, num_classes: int) -> list[Images]:
    """Icons by class, those of the most images."""
    classes = sorted(source.iterdir(), key=lambda folder: (-len(list(folder.iterdir())), folder.name))
    return [[path.read_bytes for path in sorted(folder.iterdir())] for folder in classes[:num_classes]]


def image_features(plan: Plan, seed: int, images: Sequence[Images], folder: Path) -> FeatureSet:
    """Outputs of the package's encoder for images, each used once."""
    rng = np.random.default_rng(seed)
    left = [list(rng.permutation(np.array(of_class, dtype=object))) for of_class in images]
    rows = [
        (left[label].pop()(), int(label), split)
        for split, labels in split_labels(plan, seed).items()
        for label in labels
    ]
    columns = {
        "bytes": [content for content, _, _ in rows],
        "label": np.array([label for _, label, _ in rows], dtype=np.int32),
        "split": [split for _, _, split in rows],
    }
    manifest = Manifest.build(pa.table(columns), [f"class {label}" for label in range(plan.num_classes)], plan.family)
    manifest.write(str(folder / "manifest.parquet"))
    config = to_table(made.trial("decoder"), str(folder / "manifest.parquet"), plan)
    with extraction_in_this_process():
        return ensure_features(
            config,
            manifest,
            str(folder),
            frozenset({"tokens", "pooled"}),
            ("train", "val", "test"),
            report=lambda line: None,
        )


def made_features(plan: Plan, seed: int, folder: Path) -> FeatureSet:
    """Class centers in groups of ten; leading axes are wider; one of four patches tells more than the pooled output."""
    rng, info = np.random.default_rng(seed), made.info(MADE_WIDTH, NUM_TOKENS)
    spectrum = (1 + np.arange(MADE_WIDTH)) ** -0.4
    groups = rng.normal(size=(plan.num_classes // 10 + 1, MADE_WIDTH))
    own = rng.normal(size=(plan.modes, plan.num_classes, MADE_WIDTH))
    centers = 0.7 * groups[np.arange(plan.num_classes) // 10] + 0.7 * own
    spread = np.exp(0.25 * rng.normal(size=plan.num_classes))
    shared = plan.offset * rng.normal(size=MADE_WIDTH) if plan.offset else 0.0
    labels = split_labels(plan, seed)
    layout = StoreLayout("made", "float16", info.shapes)
    store, splits = FeatureStore.create(str(folder / layout.digest), layout), {}
    for split, of_split in labels.items():
        size = (len(of_split), NUM_TOKENS, MADE_WIDTH)
        noise = plan.noise * spread[of_split, None, None] * rng.normal(size=size)
        shares = np.zeros(size[:2])
        shares[:, 0] = 1.0
        shares[np.arange(len(of_split)), rng.integers(1, NUM_TOKENS, len(of_split))] = 1.3
        # Tables of a single mode were recorded without this draw.
        mode = rng.integers(plan.modes, size=len(of_split)) if plan.modes > 1 else np.zeros(len(of_split), dtype=int)
        values = shares[..., None] * centers[mode, of_split][:, None] + 1.5 * noise + shared
        tokens = (values * spectrum).astype(np.float32)[:, None]
        contents = made_contents(split, len(of_split))
        append(store, "tokens", contents, tokens)
        append(store, "pooled", contents, tokens[:, :, 0])
        splits[split] = store.write_split(contents, 1, ("tokens", "pooled"))
    norm = {"final_norm.weight": made.ones(MADE_WIDTH), "final_norm.bias": 0 * made.ones(MADE_WIDTH)}
    save_file(norm, f"{store.folder}/{TOWER_FILE}")
    columns = {
        "bytes": [str(row).encode() for row in range(sum(map(len, labels.values())))],
        "label": np.concatenate(list(labels.values())).astype(np.int32),
        "split": [split for split, of_split in labels.items() for _ in of_split],
    }
    manifest = str(folder / "manifest.parquet")
    Manifest.build(pa.table(columns), [f"class {label}" for label in range(plan.num_classes)], "made").write(manifest)
    return FeatureSet(manifest, store.folder, splits, ("tokens", "pooled"), info)


def to_table(config: TrialConfig, manifest: str, plan: Plan) -> TrialConfig:
    """A configuration with the table's manifest and encoder."""
    keys: dict[str, object] = {"data.manifest": manifest}
    if not plan.noise:
        keys |= {"encoder.name": "tinylit_lite0", "encoder.image_size": 64}
    return config.with_overrides(keys)


# ------------------------------------------------------------------------------------------------ curves


def design(name: str, space: str, numbers: Mapping[str, int]) -> list[Params]:
    """Random configurations of a space, so many of each method; other ones for each table's name."""
    spec, rng = make_spec(space, {"name": "random"}), random.Random(name)
    parameters = spec.read_space()
    return [
        parameters.sample(RandomTrial(rng, {"method": method}), spec.base)
        for method in METHODS
        for _ in range(numbers[method])
    ]


def record(plan: Plan, features: FeatureSet, params: Sequence[Params]) -> Table:
    """Train every configuration and evaluate it at its points."""
    spec = make_spec(plan.space, {"name": "random"})
    configs = [to_table(spec.trial(each), features.manifest, plan) for each in params]
    lengths = np.array([build_length(config) for config in configs])
    epochs = np.ceil(np.outer(lengths, FRACTIONS) - 1e-9).astype(int)
    test = stored_rows(configs[0], features, "test")
    right = np.zeros((*epochs.shape, len(test.labels)), dtype=bool)
    seconds = np.zeros(len(configs))
    for indices in packs_of(configs):
        begin = time.process_time()
        runs = [build_trial(configs[index], TrialData.open(configs[index], features), "cpu") for index in indices]
        inputs = test.batch(runs[0].entry.reads, np.arange(len(test.labels))).float()
        pack = TrialPack()
        for run in runs:
            run.join(pack)
        for index, epoch, run in lockstep(indices, runs):
            points = np.flatnonzero(epochs[index] == epoch)
            if len(points):
                right[index, points] = predict(run, inputs) == test.labels
        seconds[indices] = (time.process_time() - begin) / (len(indices) * lengths[indices[0]])
    pool, true = np.arange(NUM_POOL), np.arange(NUM_POOL, len(test.labels))
    truth = balanced_accuracy(right[..., true], test.labels[true])
    return Table(plan.family, plan.space, tuple(params), epochs, test.labels[pool], right[..., pool], truth, seconds)


def stored_rows(config: TrialConfig, features: FeatureSet, split: str) -> StoredRows:
    """The rows of a split that a method on stored features reads."""
    rows = TrialData.open_split(config, features, split)
    assert isinstance(rows, StoredRows), "no method of the tables reads images"
    return rows


def build_length(config: TrialConfig) -> int:
    assert config.train is not None, "every method of the tables trains"
    assert config.train.num_epochs is not None, "the tables' lengths are epochs"
    return config.train.num_epochs


def packs_of(configs: Sequence[TrialConfig]) -> Iterator[list[int]]:
    """Indices of the configurations that train together."""
    packs: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        packs.setdefault(str(pack_key(config)), []).append(index)
    for indices in packs.values():
        for start in range(0, len(indices), PACK_SIZE):
            yield indices[start : start + PACK_SIZE]


def lockstep(indices: Sequence[int], runs: Sequence[TrialRun]) -> Iterator[tuple[int, int, TrialRun]]:
    """Each member after each epoch; a diverged one ends early and has no further row right."""
    generators = {index: (run, run.epochs()) for index, run in zip(indices, runs, strict=True)}
    while generators:
        for index, (run, results) in list(generators.items()):
            result = next(results, None)
            if result is None or result.failure is not None:
                del generators[index]
            else:
                yield index, result.epoch, run


def predict(run: TrialRun, inputs: torch.Tensor) -> Array:
    with torch.inference_mode():
        return torch.cat([predictions(run.model(part))[0] for part in inputs.split(1024)]).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(PLANS))
    parser.add_argument("--fashion", type=Path, default=Path("/"), metavar="FOLDER", help="the unpacked Debian package")
    parser.add_argument("--icons", type=Path, metavar="FOLDER", help="the drawn icons, a folder for each class")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--share", type=float, default=1.0, help="of the configurations, for a trial of this script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = {method: max(2, int(arguments.share * number)) for method, number in NUM_CONFIGS.items()}
    for seed, (name, plan) in enumerate(PLANS.items()):
        if arguments.tables and name not in arguments.tables:
            continue
        begin = time.process_time()
        with tempfile.TemporaryDirectory(prefix="imbvlm-record-") as folder:
            if plan.noise:
                features = made_features(plan, seed, Path(folder))
            elif plan.family == "icons":
                if arguments.icons is None:
                    parser.error(f"{name} needs --icons")
                features = image_features(plan, seed, icon_images(arguments.icons, plan.num_classes), Path(folder))
            else:
                features = image_features(plan, seed, fashion_images(arguments.fashion), Path(folder))
            extracted = time.process_time() - begin
            table = record(plan, features, design(name, plan.space, numbers))
        path = arguments.output / f"{name}.npz.xz"
        table.write(path)
        probes = np.array([each["method"] == "linear_probe" for each in table.params])
        last = table.truth[:, -1]
        best = [last[of_method].max() for of_method in (probes, ~probes)]
        print(
            f"{name}: {len(last)} configurations, {path.stat().st_size / 1e3:.0f} kB, "
            f"{time.process_time() - begin:.0f} s of CPU ({extracted:.0f} for features; an epoch "
            f"{table.seconds[probes].mean():.3f} and {table.seconds[~probes].mean():.3f}), best probe and decoder "
            f"{best[0]:.3f} and {best[1]:.3f}, median {np.median(last):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
