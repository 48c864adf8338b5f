"""The pass that fills the feature store: what is missing, whether the disk can hold it, and how far it is."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import safetensors.torch
import torch

from imbvlm.base import interrupts, storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import OUTPUT_NAMES, EncoderInfo, OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.bad_image_limits import bad_image_findings
from imbvlm.data.manifest import Manifest, absolute_manifest
from imbvlm.features.class_embeddings import ensure_class_embeddings
from imbvlm.features.encoder_worker import BATCH_ON_CPU, EncoderWorker, make_encoder_worker
from imbvlm.features.extraction_plan import PendingPart, _blocks, _num_gpus, _parts, _plan_part, resolve_compute_dtype
from imbvlm.features.feature_cache import DEFAULT_COPIES, Copies
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.image_blocks import Block, bad_image_error, load_block
from imbvlm.features.store_layout import PACE_FILE, TOWER_FILE
from imbvlm.features.store_sizes import _check_copies, _check_disk
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.encoders.encoder_registry import absolute_encoder
from imbvlm.ray_runtime.cluster_resources import has_many_machines
from imbvlm.ray_runtime.connection import existing_cluster, owns_machine, ray_session
from imbvlm.ray_runtime.image_pipeline import map_images

Report = Callable[[str], None]
# Few CPUs: a worker each. Many: a worker per this many, since each holds the whole tower.
THREADS_PER_WORKER = 4
# What this process computes in so long needs no workers: they take about as long until each has its tower.
SECONDS_HERE = 10.0
# Each holds a block.
LOADING_THREADS = 8


@existing_cluster()
def ensure_features(
    config: TrialConfig,
    manifest: Manifest,
    root: str,
    outputs: frozenset[OutputName],
    splits: tuple[str, ...],
    *,
    report: Report,
    text: bool = False,
    five_crop: tuple[str, ...] = (),
    copies: Copies = DEFAULT_COPIES,
    check_tower: Callable[[EncoderInfo], None] = lambda info: None,
) -> FeatureSet:
    """The stored outputs of the configuration's tower for some official splits, computed where they are missing.

    Those of `five_crop` are stored as five crops too, where `eval.tte` asks for them. `check_tower` may refuse the
    tower before anything is computed.

    With `features.store: false` nothing is stored but text features, which come with `text` or image_embedding. Shards
    that are complete stay, damaged ones are made again; what this process can compute within seconds, on a machine that
    it has to itself, needs no Ray. Trials read from `copies` what lies in an object store or is shared by several
    machines. Raises ImbvlmError where the tower can't be had, a disk is too small, or `data.on_bad_image: strict` meets
    a bad image.
    """
    root = storage.absolute(root)
    ordered = tuple(output for output in OUTPUT_NAMES if output in outputs and config.features.store)
    encoder = create_encoder(config.encoder, config.eval)
    check_tower(encoder.info)
    works = [
        _plan_part(config, manifest, root, ordered, encoder, part)
        for part in _parts(config, manifest, encoder, splits, five_crop)
    ]
    _check_disk([config], root, works)
    if not storage.is_local(root):
        _check_copies(copies, root, ordered, works)
    for work in works:
        _write_tower(work.store.folder, encoder)
    embeddings = None
    if text or "image_embedding" in outputs:
        # Before the long part, so that a text tower that can't be had is known at once.
        embeddings = ensure_class_embeddings(config, manifest.class_names, root, encoder, report)
    if any(work.missing for work in works):
        encoder.check()
        _fill(config, works, encoder, report)
    whole = [work for work in works if not work.part.is_tail]
    for work in whole:
        _check_quarantine(config, work, ordered, report)
    folders, crops = (
        {work.part.split: work.store.folder for work in whole if (work.part.preprocess.expand is not None) == is_five}
        for is_five in (False, True)
    )
    tail = next((work.store.folder for work in works if work.part.is_tail), None)
    location = absolute_manifest(config.data.manifest)
    tower = absolute_encoder(config.encoder).model_dump(mode="json")
    kept = copies if copies.needed_for(root, many_machines=has_many_machines()) else None
    return FeatureSet(location, folders, ordered, encoder.info, embeddings, tower, crops, tail, kept)


# -------------------------------------------------------------------------------------------------- filling


def _fill(config: TrialConfig, works: Sequence[PendingPart], encoder: Encoder, report: Report) -> None:
    progress = _Progress(sum(work.num_images for work in works), report)
    progress.begin()
    # Taken from its front by whoever computes them.
    blocks = deque(block for work in works for block in _blocks(config, work))
    by_folder = {work.store.folder: work for work in works}
    bad: dict[str, dict[int, str]] = {folder: {} for folder in by_folder}
    # Bytes of each shard that was written.
    written: dict[tuple[str, OutputName], dict[int, int]] = {}
    here = _by_itself(encoder, blocks) if _fits_here(config, encoder, progress.num_images) else ()
    for summary in chain(here, _by_workers(config, works, encoder, blocks, progress)):
        progress.add(summary["num_images"])
        interrupts.check()
        folder = summary["folder"]
        for output, num_bytes in summary["written"].items():
            written.setdefault((folder, output), {})[summary["shard"]] = num_bytes
        if summary["bad"]:
            # Wrong folders or keys shouldn't cost the whole pass.
            bad[folder].update(summary["bad"])
            _check_limits(config, by_folder[folder], bad[folder])
    if progress.seconds_per_image is not None:
        pace = json.dumps({"seconds_per_image": progress.seconds_per_image})
        for work in works:
            storage.write_bytes(storage.join(work.store.folder, PACE_FILE), pace.encode())
    for (folder, output), shards in written.items():
        by_folder[folder].store.mark_verified(output, shards, bad[folder])


def _fits_here(config: TrialConfig, encoder: Encoder, num_images: int) -> bool:
    """Whether this process would have computed so many images about as soon as workers have started; `encoder` is made
    ready for that.
    """
    if _num_gpus() or not owns_machine():
        return False
    encoder.compute_in(resolve_compute_dtype(config, encoder.info))
    size = encoder.info.image_size
    images, taken = torch.zeros(BATCH_ON_CPU, 3, size, size, dtype=torch.uint8), list[float]()
    # The first time prepares kernels, which is long beside a small tower.
    while len(taken) < 2 and sum(taken) < 1:
        started = time.monotonic()
        encoder.forward_images(images)
        taken.append(time.monotonic() - started)
    return min(taken) * num_images / BATCH_ON_CPU <= SECONDS_HERE


def _by_itself(encoder: Encoder, blocks: deque[Block]) -> Iterator[Block]:
    """Blocks are loaded by threads; where that takes far longer than the tower, what is left is the workers'."""
    worker, loads = EncoderWorker(encoder), deque[Future[Block]]()
    num_threads, deadline = min(LOADING_THREADS, os.cpu_count() or 1), time.monotonic() + 2 * SECONDS_HERE
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            while blocks and len(loads) <= num_threads and time.monotonic() < deadline:
                loads.append(pool.submit(load_block, blocks.popleft()))
            if not loads:
                return
            yield worker(loads.popleft().result())


def _by_workers(
    config: TrialConfig, works: Sequence[PendingPart], encoder: Encoder, blocks: Sequence[Block], progress: _Progress
) -> Iterator[Block]:
    if not blocks:
        return
    planned, is_chosen = resolve_compute_dtype(config, encoder.info), config.features.computed_in != "auto"
    with ray_session() as cluster:
        gpus = int(cluster.max_gpus) if is_chosen or planned == "bfloat16" else 0
        if planned == "bfloat16" and resolve_compute_dtype(config, encoder.info) == "float32":
            raise ImbvlmError(
                "this machine has a GPU and its Ray cluster has none, so that features would differ; let Ray use the "
                "GPU, hide it with CUDA_VISIBLE_DEVICES=, or set features.computed_in"
            )
        threads = 1 if cluster.num_cpus <= THREADS_PER_WORKER else THREADS_PER_WORKER
        progress.num_workers = min(gpus or max(1, int(cluster.num_cpus) // threads), len(blocks))
        tower = (absolute_encoder(config.encoder), config.eval, encoder.info.weights_fingerprint)
        yield from map_images(
            blocks,
            load_block,
            make_encoder_worker,
            (*tower, planned, threads, bool(gpus)),
            images_per_block=max(work.store.layout.rows_per_shard * work.store.num_views for work in works),
            num_workers=progress.num_workers,
            cpus_per_worker=1 if gpus else threads,
            gpus_per_worker=1 if gpus else 0,
            # One block is written while the GPU computes the next; a CPU would do both no sooner, in more memory.
            calls_per_worker=2 if gpus else 1,
            waits=progress.wait,
        )


def seconds_per_image(folder: str) -> float | None:
    """What an image took of a whole cluster's time when a store was filled last; None where that isn't known."""
    uri = storage.join(folder, PACE_FILE)
    return float(json.loads(storage.read_bytes(uri))["seconds_per_image"]) if storage.exists(uri) else None


class _Progress:
    """Tells how far a pass is, how fast, and how long it still takes; workers' start isn't counted in the speed."""

    def __init__(self, num_images: int, report: Report) -> None:
        self.num_images, self.done, self.report = num_images, 0, report
        # Until each worker has done a block nothing is counted: as the first one comes the others' are nearly done.
        self.num_workers, self._num_blocks = 1, 0
        self.first: tuple[int, float] | None = None
        # Of the whole cluster's time, workers' start aside; None before two blocks have come.
        self.seconds_per_image: float | None = None
        self._telling = threading.Lock()

    def begin(self) -> None:
        self._tell(f"features: {self.num_images:,} images to compute")

    def add(self, num_images: int) -> None:
        self.done += num_images
        self._num_blocks += 1
        if self._num_blocks == self.num_workers:
            self.first = (self.done, time.monotonic())
        text = f"features: {self.done:,} of {self.num_images:,} images"
        seconds = 0.0 if self.first is None else time.monotonic() - self.first[1]
        if self.first is not None and seconds > 0 and self.done > self.first[0]:
            self.seconds_per_image = seconds / (self.done - self.first[0])
            left = (self.num_images - self.done) * self.seconds_per_image
            text += f", {1 / self.seconds_per_image:,.0f} a second, {left:,.0f} s left"
        self._tell(text)

    def wait(self, why: str) -> None:
        """Nothing goes on, for this reason; another thread may tell it."""
        self._tell(
            f"features: {self.done:,} of {self.num_images:,} images, {why}; what was computed is kept, so it can "
            "be ended and started again for what there is"
        )

    def _tell(self, text: str) -> None:
        with self._telling:
            self.report(text)


# ------------------------------------------------------------------------------------------------ afterwards


def _write_tower(folder: str, encoder: Encoder) -> None:
    """The tower's tensors that trials start from, beside its outputs; small, and so made again each time it differs."""
    norm, projection = encoder.final_norm(), encoder.projection()
    tensors = {} if norm is None else {"final_norm.weight": norm.weight, "final_norm.bias": norm.bias}
    if projection is not None:
        tensors["projection"] = projection
    data = safetensors.torch.save({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()})
    path = storage.join(folder, TOWER_FILE)
    if not storage.exists(path) or storage.read_bytes(path) != data:
        storage.write_bytes(path, data)


def _check_quarantine(config: TrialConfig, work: PendingPart, outputs: Sequence[OutputName], report: Report) -> None:
    """Say how many images are left out; a store filled under `quarantine` isn't good enough for `strict`."""
    bad = FeatureStore.open(work.store.folder, outputs).quarantine
    if not bad:
        return
    uri = work.rows.table.column("uri")[bad[0].row].as_py()
    name = uri or f"row {bad[0].row}"
    if config.data.on_bad_image == "strict":
        raise bad_image_error(work.part.split, name, bad[0].reason)
    _check_limits(config, work, {entry.row: entry.reason for entry in bad})
    what = f"{len(bad):,} of {work.store.num_rows:,} {work.part.split} images"
    report(f"{what} {'is' if len(bad) == 1 else 'are'} left out, such as {name}: {bad[0].reason}")


def _check_limits(config: TrialConfig, work: PendingPart, bad: Mapping[int, str]) -> None:
    """Stop before training where more images of a split are bad than the configuration allows; `bad`: row -> reason."""
    limits = config.data.max_bad_images, config.data.max_bad_share
    findings = bad_image_findings(work.rows, work.part.split, bad, max_images=limits[0], max_share=limits[1])
    if findings:
        mend = "mend the files or take their rows out; `imbvlm manifest check MANIFEST --decode -o FILE` names them all"
        raise ImbvlmError("\n  ".join(["too many images can't be used:", *findings, mend]))
