"""What each method and each loss costs, as rows of the tables in docs/guides/choosing.md.

    python tests/benchmarks/bench_methods.py [NAME ...]

A ViT-S/32 of random weights at 224 px, 100 classes, an epoch of 1,000 images in batches of 128, on one CPU core in
float32. Seconds are the core's own, so that other programs on the machine change little. Memory is what a trial adds
to its process. Losses: one forward and backward pass over logits (256, 8142). With names only those, or `losses`.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import open_clip
import pyarrow as pa
import torch
from PIL import Image
from towers import write_config

from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.longtail.losses import build_loss
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_builder import build_model
from imbvlm.models.model_state import count_parameters
from imbvlm.sweep.plan.speed_benchmark import encoder_speed, make_up_data, trial_speed

NUM_CLASSES, NUM_IMAGES, BATCH_SIZE = 100, 1000, 128
LOGITS = (256, 8142)
CPU = torch.device("cpu")


def manifest(folder: Path) -> str:
    """Photos of noise, 256 px, a few of each class."""
    rng, contents = np.random.default_rng(0), []
    for _ in range(16):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(stream, "JPEG")
        contents.append(stream.getvalue())
    number = np.arange(2 * NUM_CLASSES)
    table = pa.table(
        {
            "bytes": [contents[n % len(contents)] for n in number],
            "label": (number % NUM_CLASSES).astype(np.int32),
            "split": ["train" if n < NUM_CLASSES else "val" for n in number],
        }
    )
    path = str(folder / "manifest.parquet")
    Manifest.build(table, [f"thing number {n}" for n in range(NUM_CLASSES)], "noise").write(path)
    return path


def methods(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """A row for each method: trained parameters, memory, seconds of an epoch and of 1,000 images' evaluation."""
    data = {"manifest": manifest(folder)}
    encoder = {"name": write_config(folder / "tower", {"quick_gelu": False, **open_clip.get_model_config("ViT-S-32")})}
    config = TrialConfig.from_tree({"data": data, "encoder": encoder, "method": "zero_shot"})
    info = create_encoder(config.encoder, config.eval).info
    seconds = 1000 * encoder_speed(config, CPU).encoder_seconds
    yield f"the tower ({info.num_parameters:,} parameters) over 1,000 images, for all stored features: {seconds:.0f} s"
    yield "| method | trained parameters | memory | seconds of an epoch | of evaluating 1,000 images |"
    for name in names:
        entry = METHODS[name]
        tree = {"data": data, "encoder": encoder, "method": name}
        if entry.trains:
            tree["train"] = {"batch_size": BATCH_SIZE, "precision": "float32"}
        config = TrialConfig.from_tree(tree)
        with tempfile.TemporaryDirectory() as made:
            counts = count_parameters(build_model(config, make_up_data(config, Path(made)).model_inputs, CPU), info)
        speed = trial_speed(0, config, CPU)
        train, evaluate = NUM_IMAGES * speed.seconds_per_train_image, 1000 * speed.eval_seconds
        yield (
            f"| `{name}` | {counts.trained:,} | {speed.host_bytes / 2**20:,.0f} MiB | {train:,.3g} s | "
            f"{evaluate:,.3g} s |"
        )


def losses() -> Iterator[str]:
    """A row for each loss: milliseconds of one pass forward and back."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LOGITS, generator=generator, requires_grad=True)
    targets = torch.randint(LOGITS[1], LOGITS[:1], generator=generator)
    counts = 1000 / torch.arange(1, LOGITS[1] + 1)
    yield "| loss | ms |"
    for name in LOSSES:
        loss = build_loss(name, counts.ceil())
        times = []
        for _ in range(7):
            started = time.process_time()
            loss(logits, targets).backward()
            times.append(time.process_time() - started)
        yield f"| `{name}` | {1000 * sorted(times)[3]:.0f} |"


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1:] or [*METHODS, "losses"]
    names = [name for name in METHODS if name in asked]
    with (
        tempfile.TemporaryDirectory(prefix="imbvlm-bench-") as folder,
        mock.patch("time.perf_counter", time.process_time),
    ):
        for line in methods(Path(folder), names) if names else ():
            print(line, flush=True)
    for line in losses() if "losses" in asked else ():
        print(line, flush=True)


if __name__ == "__main__":
    main()
