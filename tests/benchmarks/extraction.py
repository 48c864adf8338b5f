"""Extraction against the bare tower in a loop over tensors that are already in memory."""

import os
from collections.abc import Iterator
from time import perf_counter

import made
import torch
from table import Line, Options, rates, shown

from imbvlm.config import EncoderConfig, EvalConfig, TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extract import ensure_features
from imbvlm.features.tower_pass import BATCH_ON_CPU, BATCH_ON_GPU
from imbvlm.models.encoder import Encoder
from imbvlm.models.encoder_info import ComputedIn


def lines(options: Options) -> Iterator[Line]:
    """The rate between the first block and the last: what a long pass has; and the whole call."""
    architecture, number = ("ViT-L-14", 20_000) if options.large else ("ViT-B-32", 640)
    name = made.tower(options.folder / "tower", architecture)
    manifest = made.image_manifest(options.folder / "data", number, 64, 20)
    num_bare = 4000 if options.large else 192
    bare = bare_rate(EncoderConfig(name=name), options.device, num_bare)
    config = TrialConfig.from_tree({"data": {"manifest": manifest}, "encoder": {"name": name}, "method": "zero_shot"})
    seen: list[tuple[float, int]] = []

    def note(text: str) -> None:
        if " of " in text:
            seen.append((perf_counter(), int(text.split()[1].replace(",", ""))))

    begin = perf_counter()
    outputs = frozenset({"tokens", "pooled", "image_embedding"})
    ensure_features(config, Manifest.read(manifest), str(options.folder / "store"), outputs, ("train",), report=note)
    whole = perf_counter() - begin
    (first, done), (last, total) = seen[0], seen[-1]
    what = f"extraction, {architecture} at 224 px, {total:,} JPEGs of 256 px, all outputs stored"
    yield rates(what, (total - done) / (last - first), bare, "images/s", 0.9)
    yield shown("  the whole call, with Ray's start, the tower's and its check", whole, "s")
    for what, tower in (
        (architecture, EncoderConfig(name=name)),
        ("the package's tower at 96 px", EncoderConfig(name="tinylit_lite0", image_size=96)),
    ):
        halved, full = (bare_rate(tower, options.device, num_bare // 3, kind) for kind in ("bfloat16", "float32"))
        yield rates(f"  the bare tower in bfloat16 beside float32, {what}", halved, full, "images/s")


def bare_rate(tower: EncoderConfig, device: str, number: int, computed_in: ComputedIn | None = None) -> float:
    """Images a second of a tower over tensors in memory, with all cores and the batch size that suits it best.

    Without `computed_in` in what it computes by itself.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    encoder = Encoder.from_config(tower, EvalConfig(), device)
    if computed_in is not None:
        encoder.compute_in(computed_in)
    pixels = torch.randint(0, 255, (number, 3, encoder.info.image_size, encoder.info.image_size), dtype=torch.uint8)
    best = 0.0
    for size in (BATCH_ON_GPU,) if device == "cuda" else (BATCH_ON_CPU, 4 * BATCH_ON_CPU):
        encoder.forward_images(pixels[:size])
        begin = perf_counter()
        for start in range(0, number, size):
            outputs = encoder.forward_images(pixels[start : start + size])
        outputs.pooled.sum().item()
        best = max(best, number / (perf_counter() - begin))
    return best
