"""Images a second: this project's Ray Data paths against torch's DataLoader, on the same files in the same run.

    python tests/benchmarks/bench_images.py [--num-images 2000] [--s3] [--memory]

Each side is started once, and timed over whole passes after that. A ratio above 1 means that ours is faster.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image
from ray import cloudpickle

sys.path.insert(0, str(Path(__file__).parents[1]))
from s3_server import BUCKET, delayed, serve

from imbvlm.data.images import Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.data.pipeline import map_images, stream_blocks
from imbvlm.data.streaming import StreamPlan, load_batch

SIDE, BATCH = 224, 128
REPEATS = 3


class Files(torch.utils.data.Dataset):
    """As people write it: open, convert, resize, to a tensor; or with the JPEG decoder's own downscaling."""

    def __init__(self, paths, draft):
        self.paths, self.draft = paths, draft

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            if self.draft:
                image.draft("RGB", (SIDE, SIDE))
            picture = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Sink:
    """A tower that takes no time."""

    def __call__(self, block):
        return {"num_images": len(block["images"]), "sum": int(block["images"][:, :, 0, 0].sum())}


def make_files(folder, number):
    rng = np.random.default_rng(0)
    paths = []
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).resize((500, 500), Image.BICUBIC)
        noisy = np.clip(np.asarray(coarse).astype(int) + rng.integers(-12, 12, (500, 500, 3)), 0, 255)
        paths.append(folder / f"{index:06d}.jpg")
        Image.fromarray(noisy.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def manifest_of(uris):
    labels = np.zeros(len(uris), dtype=np.int32)
    return Manifest.build(pa.table({"uri": uris, "label": labels, "split": ["train"] * len(uris)}), ["one"], "bench")


def stream_plan(num_images, jpeg_downscale):
    batches = [np.arange(start, min(start + BATCH, num_images)) for start in range(0, num_images, BATCH)]
    preprocess = Preprocess(SIDE, 1.0, "bilinear", resize_mode="squash", jpeg_downscale=jpeg_downscale)
    return StreamPlan(np.arange(num_images), batches, preprocess, None, seed=0, epoch=0)


def rate(passes, num_images):
    """Best of some passes after a first one that isn't counted."""
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        assert passes() == num_images
        times.append(time.perf_counter() - begin)
    return num_images / min(times[1:])


def loader_rate(paths, num_processes, draft):
    loader = torch.utils.data.DataLoader(
        Files(paths, draft), batch_size=BATCH, num_workers=num_processes, persistent_workers=True
    )
    return rate(lambda: sum(len(batch) for batch in loader), len(paths))


def stream_rate(manifest, num_processes, jpeg_downscale):
    blocks = stream_plan(len(manifest), jpeg_downscale).blocks(manifest)
    return rate(
        lambda: sum(len(block["images"]) for block in stream_blocks(blocks, load_batch, num_tasks=num_processes)),
        len(manifest),
    )


def pass_rate(manifest, num_processes, jpeg_downscale):
    blocks = stream_plan(len(manifest), jpeg_downscale).blocks(manifest)

    def run():
        found = map_images(blocks, load_batch, Sink, (), num_workers=1, cpus_per_worker=0.01)
        return sum(summary["num_images"] for summary in found)

    return rate(run, len(manifest))


def show(name, found, base):
    print(f"{name:58} {found:8,.0f} images/s  ratio {found / base:5.2f}", flush=True)


def against_loader(paths, num_processes):
    """Decoded in full and with the JPEG decoder's own downscaling, each on both sides."""
    manifest = manifest_of([str(path) for path in paths])
    plain = loader_rate(paths, num_processes, False)
    small = loader_rate(paths, num_processes, True)
    show("torch DataLoader, as people write it", plain, plain)
    show("torch DataLoader, with downscaling", small, plain)
    for words, downscale, base in (("in full", None, plain), ("with downscaling", 1.0, plain)):
        show(f"streamed into training, decoded {words}", stream_rate(manifest, num_processes, downscale), base)
        show(f"extraction pass, decoded {words}", pass_rate(manifest, num_processes, downscale), base)
    show("streamed, with downscaling, against the same", stream_rate(manifest, num_processes, 1.0), small)


def against_local(paths, num_processes, delay_seconds=0.005):
    """The same files from an S3 server on this machine with more latency per request."""
    local = manifest_of([str(path) for path in paths])
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        os.environ.update(server.settings())
        import boto3

        client = boto3.client("s3")
        for path in paths:
            client.upload_file(str(path), BUCKET, path.name)
        with delayed(server, delay_seconds) as endpoint:
            os.environ.update(server.settings(endpoint))
            remote = manifest_of([f"s3://{BUCKET}/{path.name}" for path in paths])
            with cluster(num_processes):
                base = stream_rate(local, num_processes, None)
                show("streamed from disk", base, base)
                found = stream_rate(remote, num_processes, None)
                show(f"streamed from S3, {1000 * delay_seconds:g} ms more per request", found, base)


def peak_memory(manifest, num_processes):
    """Largest memory of this process and Ray's, shared pages counted once, while an epoch streams; in GB."""
    blocks, peak = stream_plan(len(manifest), None).blocks(manifest), 0.0
    for number, _ in enumerate(stream_blocks(blocks, load_batch, num_tasks=num_processes)):
        if number % 4 == 0:
            peak = max(peak, memory_of_tree())
    return peak


def memory_of_tree():
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
def cluster(num_cpus):
    ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--s3", action="store_true", help="also from an S3 server with 5 ms more per request")
    parser.add_argument("--memory", action="store_true", help="also peak memory of 2,000 against 20,000 images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_processes = len(os.sched_getaffinity(0))
    print(f"{options.num_images:,} JPEGs of 500 x 500 to {SIDE} x {SIDE}, {num_processes} processes")
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), options.num_images)
        with cluster(num_processes):
            against_loader(paths, num_processes)
            if options.memory:
                few = [str(path) for path in paths]
                for uris in (few, few * 10):
                    print(f"{len(uris):,} images: peak memory {peak_memory(manifest_of(uris), num_processes):.2f} GB")
        if options.s3:
            against_local(paths, num_processes)


if __name__ == "__main__":
    main()
