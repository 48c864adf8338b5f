"""Made-up data for benchmarks: stored features of any size, images, and towers with random weights."""

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import torch
from made_stores import append, made_contents
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, from_numpy, nn
from towers import write_config

from imbvlm.base.console import Console
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import TOWER_FILE, StoreLayout
from imbvlm.ray_runtime.connection import ray_session
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.jobs import Job, JobSource, RunContext
from imbvlm.sweep.tune.tune_runner import run_jobs
from imbvlm.training.trial_session import TrialSettings

SHARD_BYTES = 64_000_000


def info(width: int, num_tokens: int) -> EncoderInfo:
    """A tower whose tokens and pooled output have this width."""
    return EncoderInfo(
        name="made", kind="vit", image_size=224, num_tokens=num_tokens, token_width=width, pooled_width=width,
        embedding_width=width, has_class_token=True, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
        resize_mode="shortest", logit_scale=20.0, final_norm_eps=1e-6, weights_fingerprint="made",
    )  # fmt: skip


def long_tail(num_rows: int, num_classes: int, imbalance: float = 50.0) -> np.ndarray:
    """Labels (about num_rows,) whose classes fall off exponentially, none empty."""
    shares = imbalance ** (-np.arange(num_classes) / max(1, num_classes - 1))
    counts = np.maximum(1, np.round(num_rows * shares / shares.sum())).astype(np.int64)
    counts[0] += max(0, num_rows - counts.sum())
    return np.repeat(np.arange(num_classes), counts)


def stored_features(
    folder: Path, num_rows: int, *, num_classes: int = 100, width: int = 768, num_tokens: int = 50,
    outputs: tuple[str, ...] = ("pooled",), num_val: int = 256, noise: float = 1.0, scale: float = 1.0,
    int8_tokens: bool = False, num_true: int = 0,
) -> FeatureSet:  # fmt: skip
    """Features around a center of each class, in half precision; `tokens` are that and noise at every place.

    `num_true` rows of the test split tell the truth.
    """
    generator, about = np.random.default_rng(0), info(width, num_tokens)
    centers = generator.normal(size=(num_classes, width)).astype(np.float32)
    labels = {"train": long_tail(num_rows, num_classes), "val": np.arange(num_val) % num_classes}
    if num_true:
        labels["test"] = np.arange(num_true) % num_classes
    folder.mkdir(parents=True, exist_ok=True)
    layout = StoreLayout("made", "float16", about.shapes, int8_tokens)
    store, splits = FeatureStore.create(str(folder / layout.digest), layout), {}
    for split, of_split in labels.items():
        contents = made_contents(split, len(of_split))
        for output in outputs:
            shape = about.shapes[output]
            per_shard = max(1, SHARD_BYTES // (2 * int(np.prod(shape))))
            for start in range(0, len(of_split), per_shard):
                some = slice(start, start + per_shard)
                middle = centers[of_split[some]].reshape(-1, 1, *(1,) * (len(shape) - 1), width)
                values = middle + noise * generator.standard_normal((len(middle), 1, *shape), dtype=np.float32)
                append(store, output, contents[some], scale * values)
        splits[split] = store.write_split(contents, 1, outputs)
    save_file({"final_norm.weight": ones(width), "final_norm.bias": 0 * ones(width)}, f"{store.folder}/{TOWER_FILE}")
    table = pa.table(
        {
            "bytes": [str(number).encode() for number in range(sum(map(len, labels.values())))],
            "label": np.concatenate(list(labels.values())).astype(np.int32),
            "split": [split for split, of_split in labels.items() for _ in of_split],
        }
    )
    manifest = str(folder / "manifest.parquet")
    Manifest.build(table, [f"class {number}" for number in range(num_classes)], "made").write(manifest)
    return FeatureSet(manifest, store.folder, splits, outputs, about)


def ones(width: int) -> Tensor:
    return from_numpy(np.ones(width, dtype=np.float32))


def trial(method: str, **overrides: object) -> TrialConfig:
    """A trial on `stored_features`; dotted keys with a double underscore, such as optim__lr."""
    tree = {"data": {"manifest": "made"}, "encoder": {"name": "made"}, "method": method}
    tree["train"] = {"num_epochs": 4, "batch_size": 128}
    return TrialConfig.from_tree(tree).with_overrides({k.replace("__", "."): v for k, v in overrides.items()})


def run_through(
    folder: Path,
    spec: SweepSpec,
    features: FeatureSet,
    num_trials: int,
    source: Callable[[Budget], JobSource],
    *,
    at_once: int = 1,
    brackets: AshaBrackets | None = None,
    pack_size: Callable[[TrialConfig], int] = lambda config: 1,
) -> tuple[TrialLog, float]:
    """Trials in process under Ray Tune, by default one after another: their log, and seconds without Ray's start."""
    console, budget = Console(io.StringIO()), Budget.open(spec, str(folder), 0.0)
    num_classes = len(Manifest.read(features.manifest).class_names)
    lane = RunContext(spec.resolve(), str(folder), TrialLog(str(folder)), console, at_once, budget, num_classes)

    def settings(job: Job) -> TrialSettings:
        return TrialSettings(job.config, features, spec.objective, num_threads=1, trial_id=job.trial_id)

    with console.redirect_output(folder / "ray.log"), ray_session():
        begin = time.perf_counter()
        run_jobs(lane, source(budget), settings, brackets, "search", num_trials, pack_size)
        write_results_table(lane.log)
        taken = time.perf_counter() - begin
    return lane.log, taken


def training_step(model: nn.Module, inputs: Tensor, precision: torch.dtype) -> Callable[[], None]:
    """A step over a batch, from its forward pass to the optimizer's, which ends when the device has done it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision is torch.bfloat16):
            loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def tower(folder: Path, name: str = "ViT-B-32") -> str:
    """open_clip's architecture with random weights and a small text side, as a local-dir: name."""
    config = open_clip.get_model_config(name)
    config["text_cfg"] = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    config["quick_gelu"] = False
    return write_config(folder, config)


def images(folder: Path, labels: np.ndarray, side: int = 256) -> list[str]:
    """JPEG files, smooth and with noise, colored by class; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, paths = np.random.default_rng(0), []
    colors = np.random.default_rng(1).integers(40, 215, (int(labels.max()) + 1, 3))
    for row, label in enumerate(labels):
        coarse = generator.integers(-40, 40, (8, 8, 3)) + colors[label]
        picture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((side, side), Image.BICUBIC)
        paths.append(str(folder / f"{row:06d}.jpg"))
        picture.save(paths[-1], quality=90)
    return paths


def image_manifest(folder: Path, num_train: int, num_val: int, num_classes: int) -> str:
    """A manifest of such files, with a validation split."""
    labels = np.concatenate([long_tail(num_train, num_classes, 10.0), np.arange(num_val) % num_classes])
    splits = ["train"] * (len(labels) - num_val) + ["val"] * num_val
    table = pa.table({"uri": images(folder / "images", labels), "label": labels.astype(np.int32), "split": splits})
    path = str(folder / "manifest.parquet")
    Manifest.build(table, [f"class {number}" for number in range(num_classes)], "made").write(path)
    return path
