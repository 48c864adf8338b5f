"""Images a second: this project's Ray Data paths against torch's DataLoader, on the same files in the same run.

2,000 JPEGs of 500 x 500 to 224 x 224, as many loading processes on both sides. Each side is started before it is timed,
but for the extraction pass, whose start counts. Then the same files from an S3 server with 5 ms more per request, and
memory of 2,000 against 20,000 images.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image
from s3_server import BUCKET, delayed, program, serve
from table import in_turn, limited, rates, shown
from torch.utils.data import DataLoader

from imbvlm.data.image_stream import ImageBatch, StreamPlan, load_batch
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.ray_runtime.image_pipeline import map_images, stream_blocks

NUM_IMAGES, SIDE, BATCH = 2000, 224, 128
REPEATS = 3
# The pass over the same files this often, so that it lasts longer than its worker takes to start.
PASSES = 5
DELAY_SECONDS = 0.005


class Files(torch.utils.data.Dataset):
    """As people write it: open, convert, resize, to a tensor; or with the JPEG decoder's own downscaling."""

    def __init__(self, paths: list[str], draft: bool) -> None:
        self.paths, self.draft = paths, draft

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            if self.draft:
                image.draft("RGB", (SIDE, SIDE))
            picture = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class Sink:
    """A tower that takes no time."""

    def __call__(self, batch: ImageBatch) -> tuple[int, int]:
        """The number of images, and a sum of their pixels."""
        return len(batch.images), int(batch.images[:, :, 0, 0].sum())


def make_files(folder: Path, number: int) -> list[Any]:
    rng = np.random.default_rng(0)
    paths = []
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).resize((500, 500), Image.BICUBIC)
        noisy = np.clip(np.asarray(coarse).astype(int) + rng.integers(-12, 12, (500, 500, 3)), 0, 255)
        paths.append(folder / f"{index:06d}.jpg")
        Image.fromarray(noisy.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def manifest_of(uris: list[str]) -> Manifest:
    labels = np.zeros(len(uris), dtype=np.int32)
    return Manifest.build(pa.table({"uri": uris, "label": labels, "split": ["train"] * len(uris)}), ["one"], "bench")


def stream_plan(num_images: int, jpeg_downscale: int) -> StreamPlan:
    batches = [np.arange(start, min(start + BATCH, num_images)) for start in range(0, num_images, BATCH)]
    preprocess = Preprocess(SIDE, 1.0, "bilinear", resize_mode="squash", jpeg_downscale=jpeg_downscale)
    return StreamPlan(np.arange(num_images), batches, preprocess, None, seed=0, epoch=0)


def loader_of(paths: list[str], num_processes: int, draft: bool) -> DataLoader:
    return torch.utils.data.DataLoader(
        Files(paths, draft), batch_size=BATCH, num_workers=num_processes, persistent_workers=True
    )


def streamed(manifest: Manifest, num_processes: int, jpeg_downscale: int) -> Iterator[int]:
    blocks = stream_plan(len(manifest), jpeg_downscale).blocks(manifest)
    for batch in stream_blocks(blocks, load_batch, images_per_block=BATCH, num_tasks=num_processes):
        yield len(batch.images)


def extracted(manifest: Manifest, jpeg_downscale: int) -> Iterator[int]:
    """With its start; as on a machine with a GPU the worker holds a CPU of its own, and tasks load on the others."""
    blocks = stream_plan(len(manifest), jpeg_downscale).blocks(manifest) * PASSES
    for number, _ in map_images(
        blocks, load_batch, Sink, (), images_per_block=BATCH, num_encoder_workers=1, notify=print
    ):
        yield number


def rates_of(sides: dict[str, Callable[..., Any]], num_images: int) -> dict[str, float]:
    """Images a second of each side, its best pass, the sides by turns; a first one isn't counted but of extraction."""

    def whole(side: str) -> None:
        assert sum(sides[side]()) == counts[side]

    counts = {side: num_images * (PASSES if side.startswith("extraction") else 1) for side in sides}
    for side in sides:
        if counts[side] == num_images:
            whole(side)
    best = in_turn({side: partial(whole, side) for side in sides}, REPEATS)
    return {side: counts[side] / best[side] for side in sides}


def lines(options: Namespace) -> Iterator[str]:
    torch.set_num_threads(1)
    num_processes = len(os.sched_getaffinity(0))
    paths = make_files(options.folder, NUM_IMAGES)
    yield from against_loader(paths, num_processes)
    yield from memory(paths, num_processes)
    if program() is not None:
        yield from from_s3(paths, max(1, num_processes // 2))


def against_loader(paths: list[str], num_processes: int) -> Iterator[str]:
    manifest = manifest_of([str(path) for path in paths])
    plain, small = (loader_of(paths, num_processes, draft) for draft in (False, True))
    with cluster(num_processes + 1):
        found = rates_of(
            {
                "plain": lambda: map(len, plain),
                "small": lambda: map(len, small),
                "stream, downscaled": lambda: streamed(manifest, num_processes, 1.0),
                "stream": lambda: streamed(manifest, num_processes, None),
                "extraction, downscaled": lambda: extracted(manifest, 1.0),
                "extraction": lambda: extracted(manifest, None),
            },
            len(manifest),
        )
    against = "DataLoader as people write it"
    yield rates(f"streamed, JPEGs downscaled; {against}", found["stream, downscaled"], found["plain"], "images/s", 1.0)
    yield rates(
        f"extraction pass, JPEGs downscaled; {against}",
        found["extraction, downscaled"],
        found["plain"],
        "images/s",
        1.0,
    )
    yield rates(f"streamed, decoded in full; {against}", found["stream"], found["plain"], "images/s")
    yield rates(f"extraction pass, decoded in full; {against}", found["extraction"], found["plain"], "images/s")
    both = "DataLoader, downscaled on both sides"
    yield rates(f"streamed; {both}", found["stream, downscaled"], found["small"], "images/s")
    yield rates(f"extraction pass; {both}", found["extraction, downscaled"], found["small"], "images/s")


def memory(paths: list[str], num_processes: int) -> Iterator[str]:
    with cluster(num_processes):
        few = [str(path) for path in paths]
        peaks = [peak_memory(manifest_of(few * times), num_processes) for times in (1, 10)]
    yield shown("peak memory of a stream of 2,000 images", peaks[0], "GB")
    yield limited("peak memory of a stream of 20,000 images over that of 2,000", peaks[1] / peaks[0], "x", 1.15)


def from_s3(paths: list[str], num_tasks: int) -> Iterator[str]:
    """Half of the cores load, on both sides, and the server has the other half: it stands on this machine."""
    local = manifest_of([str(path) for path in paths])
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        os.environ.update(server.settings())
        import boto3

        client = boto3.client("s3")
        for path in paths:
            client.upload_file(str(path), BUCKET, path.name)
        with delayed(server, DELAY_SECONDS) as endpoint:
            os.environ.update(server.settings(endpoint))
            remote = manifest_of([f"s3://{BUCKET}/{path.name}" for path in paths])
            with cluster(num_tasks + 1):
                found = rates_of(
                    {
                        "disk": lambda: streamed(local, num_tasks, None),
                        "S3": lambda: streamed(remote, num_tasks, None),
                    },
                    len(local),
                )
    what = "streamed from S3 with 5 ms more per request; from disk"
    yield rates(what, found["S3"], found["disk"], "images/s", 0.8)


def peak_memory(manifest: Manifest, num_processes: int) -> float:
    """Largest memory of this process and Ray's, shared pages counted once, while an epoch streams; in GB."""
    peak = 0.0
    for number, _ in enumerate(streamed(manifest, num_processes, None)):
        if number % 4 == 0:
            peak = max(peak, memory_of_tree())
    return peak


def memory_of_tree() -> float:
    children, sizes = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                rollup = (entry / "smaps_rollup").read_text()
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
            sizes[int(entry.name)] = int(rollup.partition("\nPss:")[2].split()[0])
    total, pending = 0, [os.getpid()]
    while pending:
        process = pending.pop()
        total += sizes.get(process, 0)
        pending += children.get(process, [])
    return total / 1e6


@contextmanager
def cluster(num_cpus: int) -> Iterator[None]:
    # Ray's workers step back behind everything else; a DataLoader's don't.
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=num_cpus, _system_config={"worker_niceness": 0}, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
