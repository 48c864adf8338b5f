"""Extraction: fills the feature stores with the outputs that they lack, and reports its progress."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from typing import NamedTuple

import pyarrow as pa
import safetensors.torch
import torch

from imbvlm.base import interrupts, storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.json_file import read_json
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.bad_image_limits import bad_image_findings
from imbvlm.data.manifest import Manifest, absolute_manifest
from imbvlm.features.class_embeddings import ensure_class_embeddings
from imbvlm.features.encoder_worker import BATCH_ON_CPU, EncoderWorker, make_encoder_worker
from imbvlm.features.entry_index import Digests
from imbvlm.features.extraction_plan import (
    PendingPart,
    num_gpus,
    plan_part,
    resolve_compile,
    resolve_compute_dtype,
    store_parts,
)
from imbvlm.features.feature_cache import FeatureCache
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.image_blocks import BlockSummary, ImageBlock, LoadedBlock, bad_image_error, load_block
from imbvlm.features.known_files import merge_records, record_files
from imbvlm.features.store_layout import PACE_FILE, TOWER_FILE
from imbvlm.features.store_sizes import check_cache_size, check_parts_fit, outputs_to_store
from imbvlm.features.stored_split import Places, StoredSplit
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.ray_runtime.cluster_resources import has_many_machines
from imbvlm.ray_runtime.connection import existing_cluster, owns_machine, ray_session

Report = Callable[[str], None]
# With few CPUs each has a worker. With many a worker has this many threads, since each holds the whole encoder.
THREADS_PER_WORKER = 4
# This process computes a pass of this length itself: workers take about as long to load the encoder.
SECONDS_HERE = 10.0
# Each loading thread holds a block in memory.
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
    cache: FeatureCacheConfig | None = None,
    check_encoder: Callable[[EncoderInfo], None] = lambda info: None,
    sweep: str | None = None,
) -> FeatureSet:
    """The stored outputs of the configuration's encoder for some official splits; computes the missing ones.

    Splits in `five_crop` are also stored as five crops where `eval.tte` asks for them. `check_encoder` may reject the
    encoder before anything is computed. With `features.store: false` only class embeddings are stored; they come with
    `text` or image_embedding. Known images stay, those of damaged shards are computed again. Trials read through the
    cache what lies in an object store or is shared by several machines.

    `sweep` is the folder of the sweep that reads them, for a list of stores and their uses.

    A pass that takes this process seconds, on a machine of its own, starts no Ray. Raises ImbvlmError where the encoder
    can't be loaded, a disk is too small, or `data.on_bad_image: strict` meets a bad image.
    """
    root = storage.absolute(root)
    encoder = create_encoder(config.encoder, config.eval)
    stored = tuple(outputs_to_store(config, encoder.info, outputs))
    check_encoder(encoder.info)
    merge_records(root)
    parts = [
        plan_part(config, manifest, root, stored, encoder, part)
        for part in store_parts(config, encoder.preprocess, splits, five_crop)
    ]
    check_parts_fit([config], root, parts)
    if not storage.is_local(root):
        check_cache_size(cache, root, stored, parts)
    location = absolute_manifest(config.data.manifest)
    for store in {part.store.folder: part.store for part in parts}.values():
        _write_encoder_tensors(store.folder, encoder)
        store.record_use(location, sweep)
    embeddings = None
    if text or (encoder.info.has_text and "image_embedding" in outputs):
        # The text encoder runs before the long pass, so that it fails early where it can't be loaded.
        embeddings = ensure_class_embeddings(config, manifest.class_names, root, encoder, report, manifest.taxonomy)
    filled = _Filled([part.contents.digests.copy() for part in parts])
    if any(part.num_images for part in parts):
        encoder.check()
        filled = _fill(config, parts, root, encoder, report)
    paths, crops = dict[str, str](), dict[str, str]()
    for part, digests in zip(parts, filled.contents, strict=True):
        places = part.places(digests, filled.written.get(part.store.folder, {}))
        _check_quarantine(config, part, places, report)
        of_kind = paths if part.part.preprocess.expand is None else crops
        of_kind[part.part.split] = StoredSplit.write(
            root, part.store.layout, len(part.rows), part.part.num_views, places
        )
    cache = cache or FeatureCacheConfig()
    is_cached = FeatureCache(cache).is_needed_for(root, has_many_machines=has_many_machines())
    return FeatureSet(
        manifest=location,
        folder=parts[0].store.folder,
        splits=paths,
        outputs=stored,
        info=encoder.info,
        class_embeddings=embeddings,
        encoder=config.encoder.absolute(),
        five_crop=crops,
        cache=cache if is_cached else None,
        notice=filled.notice,
        num_computed=filled.num_computed,
    )


# -------------------------------------------------------------------------------------------------- filling


class _Filled(NamedTuple):
    """The results of a pass: each part's contents (N, 16), and by store and output the names of written shards.

    `notice` is a sentence for the user where the encoder was to be compiled and wasn't. `num_computed` are crops.
    """

    contents: Sequence[Digests]
    written: Mapping[str, Mapping[OutputName, frozenset[str]]] = {}
    notice: str = ""
    num_computed: int = 0


def _fill(config: TrialConfig, parts: Sequence[PendingPart], root: str, encoder: Encoder, report: Report) -> _Filled:
    """Compute the missing crops."""
    progress = _Progress(sum(part.num_images for part in parts), sum(part.num_known for part in parts), report)
    progress.begin()
    is_strict = config.data.on_bad_image == "strict"
    # This process takes blocks from the front; the workers compute the rest.
    blocks = deque(block for n, part in enumerate(parts) for block in part.blocks(n, is_strict=is_strict))
    bad: list[dict[int, str]] = [{} for _ in parts]
    contents = [part.contents.digests.copy() for part in parts]
    written: dict[str, dict[OutputName, frozenset[str]]] = {part.store.folder: {} for part in parts}
    fits = _fits_here(config, encoder, progress.num_images)
    images_per_block = max(block.num_images for block in blocks)
    compile_for = images_per_block if resolve_compile(config, encoder, progress.num_images) else 0
    local = compute_here(encoder, blocks, max_seconds=2 * SECONDS_HERE, compile_for=compile_for) if fits else ()
    remote = _compute_in_workers(config, encoder, blocks, progress, images_per_block, compile_for)
    # Closed here: closing it ends Ray, and raises KeyboardInterrupt after a signal, which a destructor would print.
    with closing(remote):
        for summary in chain(local, remote):
            part, rows = parts[summary.part], summary.rows
            if summary.not_compiled is not None:
                progress.notice = (
                    f"the encoder {encoder.info.name} computes without torch.compile: {summary.not_compiled}"
                )
            progress.add(summary.num_images, summary.num_computed)
            interrupts.check()
            contents[summary.part][rows] = summary.contents
            for output, name in summary.written.items():
                of_store = written[part.store.folder]
                of_store[output] = of_store.get(output, frozenset()) | {name}
            is_new = ~part.contents.is_known[rows]
            if is_new.any():
                uris = part.rows.table.column("uri").take(pa.array(rows[is_new]))
                record_files(root, uris, part.contents.versions[rows[is_new]], summary.contents[is_new])
            if summary.bad:
                # Wrong folders or keys must not cost the whole pass.
                bad[summary.part].update(summary.bad)
                _check_limits(config, part, bad[summary.part])
    # Files that turn out to be copies are faster.
    if progress.seconds_per_image is not None and progress.num_computed == progress.done:
        for folder in written:
            storage.write_json(storage.join(folder, PACE_FILE), {"seconds_per_image": progress.seconds_per_image})
    return _Filled(contents, written, progress.notice, progress.num_computed)


def _fits_here(config: TrialConfig, encoder: Encoder, num_images: int) -> bool:
    """Whether this process would compute the images before workers have started; sets the encoder's compute dtype."""
    if num_gpus() or not owns_machine():
        return False
    encoder.compute_in(resolve_compute_dtype(config, encoder.info))
    size = encoder.info.image_size
    images, durations = torch.zeros(BATCH_ON_CPU, 3, size, size, dtype=torch.uint8), list[float]()
    # The first run prepares kernels, which takes longer than running a small encoder.
    while len(durations) < 2 and sum(durations) < 1:
        started = time.monotonic()
        encoder.forward_images(images)
        durations.append(time.monotonic() - started)
    return min(durations) * num_images / BATCH_ON_CPU <= SECONDS_HERE


def compute_here(
    encoder: Encoder, blocks: deque[ImageBlock], *, max_seconds: float, compile_for: int = 0
) -> Iterator[BlockSummary]:
    """Summaries of the blocks that this process computes, which it takes from the deque's front and threads load.

    After `max_seconds`, as where loading takes far longer than the encoder, the remaining blocks stay in the deque.
    """
    worker, loads = EncoderWorker(encoder, compile_for=compile_for), deque[Future[LoadedBlock]]()
    num_threads, deadline = min(LOADING_THREADS, os.cpu_count() or 1), time.monotonic() + max_seconds
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            while blocks and len(loads) <= num_threads and time.monotonic() < deadline:
                loads.append(pool.submit(load_block, blocks.popleft()))
            if not loads:
                return
            yield worker(loads.popleft().result())


def _compute_in_workers(
    config: TrialConfig,
    encoder: Encoder,
    blocks: Sequence[ImageBlock],
    progress: _Progress,
    images_per_block: int,
    compile_for: int,
) -> Generator[BlockSummary, None, None]:
    if not blocks:
        return
    # It loads Ray Data, a second of which a plan and stored features need nothing.
    from imbvlm.ray_runtime.image_pipeline import map_images

    dtype, is_chosen = resolve_compute_dtype(config, encoder.info), config.features.computed_in != "auto"
    with ray_session() as cluster:
        gpus = int(cluster.max_gpus) if is_chosen or dtype == "bfloat16" else 0
        if dtype == "bfloat16" and resolve_compute_dtype(config, encoder.info) == "float32":
            raise ImbvlmError(
                "this machine has a GPU and its Ray cluster has none, so that features would differ. Let Ray use the "
                "GPU, hide it with CUDA_VISIBLE_DEVICES=, or set features.computed_in."
            )
        threads = 1 if cluster.num_cpus <= THREADS_PER_WORKER else THREADS_PER_WORKER
        progress.num_encoder_workers = min(gpus or max(1, int(cluster.num_cpus) // threads), len(blocks))
        loaded = (config.encoder.absolute(), config.eval, encoder.info.weights_fingerprint)
        yield from map_images(
            blocks,
            load_block,
            make_encoder_worker,
            (*loaded, dtype, threads, bool(gpus), compile_for),
            images_per_block=images_per_block,
            num_encoder_workers=progress.num_encoder_workers,
            cpus_per_worker=1 if gpus else threads,
            gpus_per_worker=1 if gpus else 0,
            # One block is written while the GPU computes the next. On a CPU this saves no time and takes more memory.
            calls_per_worker=2 if gpus else 1,
            notify=progress.wait,
            name=ImageBlock.describe,
        )


def seconds_per_image(folder: str) -> float | None:
    """Seconds of the whole cluster for an image when the store was last filled; None where that is not recorded."""
    uri = storage.join(folder, PACE_FILE)
    return read_json(uri, lambda data: float(data["seconds_per_image"]), "Delete it to go on without it.")


class _Progress:
    """Reports the images done, the speed and the remaining time; the workers' start does not count for the speed."""

    def __init__(self, num_images: int, num_known: int, report: Report) -> None:
        self.num_images, self.num_known, self.done, self.report = num_images, num_known, 0, report
        # Timing begins once each worker has had time for a block: when the first ends, the others have nearly ended.
        self.num_encoder_workers, self._num_blocks = 1, 0
        self._timed_from: tuple[int, float] | None = None
        # Seconds of the whole cluster; None before two blocks have ended.
        self.seconds_per_image: float | None = None
        self.num_computed = 0
        # Ends each line, so that a long pass shows it while it runs.
        self.notice = ""
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Report the number of images."""
        stored = f"{self.num_known:,} images known, " if self.num_known else ""
        self._print(f"features: {stored}{self.num_images:,} images to compute")

    def add(self, num_images: int, num_computed: int) -> None:
        """Count a block's images, and those of them that were not known after all."""
        self.done += num_images
        self.num_computed += num_computed
        self._num_blocks += 1
        now = time.monotonic()
        if self._num_blocks == self.num_encoder_workers:
            self._timed_from = (self.done, now)
        text = f"features: {self.done:,} of {self.num_images:,} images"
        done_before, started = self._timed_from or (self.done, now)
        if now > started and self.done > done_before:
            self.seconds_per_image = (now - started) / (self.done - done_before)
            remaining = (self.num_images - self.done) * self.seconds_per_image
            text += f", {1 / self.seconds_per_image:,.0f} a second, {remaining:,.0f} s left"
        copies = self.done - self.num_computed
        self._print(text + (f"; {copies:,} were known by their content" if copies else ""))

    def wait(self, reason: str) -> None:
        """Report why nothing goes on, from any thread."""
        self._print(
            f"features: {self.done:,} of {self.num_images:,} images, {reason}; what was computed is kept, so it can "
            "be ended and started again with the present machines"
        )

    def _print(self, text: str) -> None:
        with self._lock:
            self.report("; ".join(filter(None, (text, self.notice))))


# ------------------------------------------------------------------------------------------------ afterwards


def _write_encoder_tensors(folder: str, encoder: Encoder) -> None:
    """Write the encoder's tensors that trials start from; they are small, and rewritten where they differ."""
    norm, projection = encoder.final_norm(), encoder.projection()
    tensors = {} if norm is None else {"final_norm.weight": norm.weight, "final_norm.bias": norm.bias}
    if projection is not None:
        tensors["projection"] = projection
    data = safetensors.torch.save({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()})
    path = storage.join(folder, TOWER_FILE)
    if not storage.exists(path) or storage.read_bytes(path) != data:
        storage.write_bytes(path, data)


def _check_quarantine(
    config: TrialConfig, part: PendingPart, places: Mapping[OutputName, Places], report: Report
) -> None:
    """Report how many images are left out; raises ImbvlmError for any under `on_bad_image: strict`."""
    bad = {row: reason for each in places.values() for row, reason in each.reasons.items()}
    if not bad:
        return
    split, first = part.part.split, min(bad)
    name = part.rows.table.column("uri")[first].as_py() or f"row {first}"
    if config.data.on_bad_image == "strict":
        raise bad_image_error(split, name, bad[first])
    _check_limits(config, part, bad)
    verb = "is" if len(bad) == 1 else "are"
    report(f"{len(bad):,} of {len(part.rows):,} {split} images {verb} left out, such as {name}: {bad[first]}")


def _check_limits(config: TrialConfig, part: PendingPart, bad: Mapping[int, str]) -> None:
    """Raise ImbvlmError, before training, above the configured limits of bad images; `bad` maps row to reason."""
    limits = config.data.max_bad_images, config.data.max_bad_share
    findings = bad_image_findings(part.rows, part.part.split, bad, max_images=limits[0], max_share=limits[1])
    if findings:
        fix = "Fix the files or remove their rows. `imbvlm manifest check MANIFEST --decode -o FILE` lists them all."
        raise ImbvlmError("\n  ".join(["too many images can't be used:", *findings, fix]))
