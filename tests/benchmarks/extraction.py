"""Extraction against the bare tower in a loop over tensors that are already in memory."""

import os
from collections.abc import Iterator
from time import perf_counter
from typing import Any
from unittest.mock import patch

import made
import torch
from table import Line, Options, number, rates, shown

from imbvlm.config.encoder_info import ComputeDtype
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features import extraction, extraction_plan
from imbvlm.features.encoder_worker import BATCH_ON_CPU, BATCH_ON_GPU
from imbvlm.features.image_blocks import BlockSummary
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.ray_runtime.image_pipeline import map_images


def lines(options: Options) -> Iterator[Line]:
    """The rate once all of Ray's workers are at work, as in a long pass; and the whole call."""
    # Blocks of 64, which are whole batches, as long passes have.
    architecture, num_images = ("ViT-L-14", 20_000) if options.large else ("ViT-B-32", 512)
    name = made.tower(options.folder / "tower", architecture)
    tower = EncoderConfig(name=name)
    manifest = made.image_manifest(options.folder / "data", num_images, 64, 20)
    num_bare = 2000 if options.large else 96
    config = TrialConfig.from_tree({"data": {"manifest": manifest}, "encoder": {"name": name}, "method": "zero_shot"})
    kind = extraction_plan.resolve_compute_dtype(config, describe_encoder(tower))
    # The machine may get slower or faster meanwhile: what is bare is measured before and behind.
    before = bare_rate(tower, options.device, num_bare, kind)
    rate, whole = _extract(config, str(options.folder / "store"))
    behind = bare_rate(tower, options.device, num_bare, kind)
    what = f"extraction, {architecture} at 224 px, {num_images:,} JPEGs of 256 px, all outputs, both in {kind}"
    yield rates(what, rate, (before + behind) / 2, "images/s", 0.9)
    yield shown("  the bare tower before and behind", f"{number(before)}, {number(behind)} images/s")
    yield shown("  the whole call, with Ray's start, the tower's and its check", whole, "s")
    for what, one in (
        (architecture, tower),
        ("the package's tower at 96 px", EncoderConfig(name="tinylit_lite0", image_size=96)),
    ):
        halved, full = (bare_rate(one, options.device, num_bare // 2, kind) for kind in ("bfloat16", "float32"))
        yield rates(f"  the bare tower in bfloat16 beside float32, {what}", halved, full, "images/s")


def _extract(config: TrialConfig, root: str) -> tuple[float, float]:
    """Images a second, and seconds of the whole call."""
    done: list[tuple[float, int]] = []
    workers = []

    def watched(*arguments: Any, num_encoder_workers: int, **named: Any) -> Iterator[BlockSummary]:
        workers.append(num_encoder_workers)
        for summary in map_images(*arguments, num_encoder_workers=num_encoder_workers, **named):
            done.append((perf_counter(), summary.num_images))
            yield summary

    outputs = frozenset({"tokens", "pooled", "image_embedding"})
    begin = perf_counter()
    with patch.object(extraction, "map_images", watched), patch.object(extraction, "SECONDS_HERE", 0.0):
        extraction.ensure_features(
            config, Manifest.read(config.data.manifest), root, outputs, ("train",), report=lambda line: None
        )
    return steady_rate(done, *workers), perf_counter() - begin


def steady_rate(done: list[tuple[float, int]], num_encoder_workers: int) -> float:
    """Images a second by blocks' ends and sizes, from each worker's first block on.

    When the first block of all is done, those of other workers nearly are as well: they would count as made in no time.
    """
    counted = done[num_encoder_workers:]
    return sum(size for _, size in counted) / (counted[-1][0] - done[num_encoder_workers - 1][0])


def bare_rate(tower: EncoderConfig, device: str, num_images: int, computed_in: ComputeDtype) -> float:
    """Images a second of a tower over tensors in memory, with all cores and the batch size that suits it best."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    encoder = create_encoder(tower, EvalConfig(), device).compute_in(computed_in)
    pixels = torch.randint(0, 255, (num_images, 3, encoder.info.image_size, encoder.info.image_size), dtype=torch.uint8)
    best = 0.0
    for size in (BATCH_ON_GPU,) if device == "cuda" else (BATCH_ON_CPU, 4 * BATCH_ON_CPU):
        encoder.forward_images(pixels[:size])
        begin = perf_counter()
        for start in range(0, num_images, size):
            outputs = encoder.forward_images(pixels[start : start + size])
        outputs.pooled.sum().item()
        best = max(best, num_images / (perf_counter() - begin))
    return best
