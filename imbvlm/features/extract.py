"""The pass that fills the feature store: what is missing, whether the disk can hold it, and how far it is."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from imbvlm import interrupts, storage
from imbvlm.config import TrialConfig
from imbvlm.data.cluster import connected, has_machine_to_itself, has_many_machines, is_alone, joined, ray_gpus
from imbvlm.data.images import FIVE_CROPS, Preprocess
from imbvlm.data.manifest import Manifest, absolute_manifest
from imbvlm.data.pipeline import map_images
from imbvlm.data.quarantine import limit_findings
from imbvlm.data.table import Rows, TakenRows
from imbvlm.errors import ImbvlmError
from imbvlm.features.examples import FeatureSet
from imbvlm.features.loading import Block, bad_image_error, load_block
from imbvlm.features.local_copy import DEFAULT_COPIES, Copies
from imbvlm.features.store import PACE_FILE, STORE_FILE, TOWER_FILE, FeatureStore, StoreKey, StoreLayout
from imbvlm.features.text import ensure_class_embeddings
from imbvlm.features.tower_pass import BATCH_ON_CPU, TowerWorker, start_worker
from imbvlm.models.encoder import Encoder, absolute_encoder, describe_encoder
from imbvlm.models.encoder_info import OUTPUT_NAMES, ComputedIn, EncoderInfo, OutputName
from imbvlm.models.methods import METHODS
from imbvlm.storage import size_text

Report = Callable[[str], None]

ROWS_PER_SHARD = 512
# A block of crops, and the largest output of a shard, stay near this size in memory.
SHARD_BYTES = 96_000_000
# Small data is still cut into a few blocks, so that several workers share it.
LEAST_SHARDS = 8
# Few CPUs: a worker each. Many: a worker per this many, since each holds the whole tower.
THREADS_PER_WORKER = 4
# What this process computes in so long needs no workers: they take about as long until each has its tower.
SECONDS_HERE = 10.0
# Each holds a block.
LOADING_THREADS = 8
# What lies beside a store's numbers: rows, reasons, Arrow's own words.
DISK_MARGIN = 1.02


class _Part(NamedTuple):
    """One store: an official split, or its rows of few-shot classes, in so many crops that `preprocess` makes."""

    split: str
    preprocess: Preprocess
    num_views: int
    is_tail: bool = False

    def rows(self, manifest: Manifest) -> Manifest:
        rows = manifest.split(self.split)
        return rows.take(few_shot_rows(rows)) if self.is_tail else rows


@dataclass(frozen=True)
class _Work:
    """What a part lacks: shard number -> outputs to compute."""

    part: _Part
    store: FeatureStore
    rows: Manifest
    missing: Mapping[int, tuple[OutputName, ...]]

    @property
    def num_images(self) -> int:
        return sum(len(self.store.layout.rows_of(shard)) for shard in self.missing) * self.store.num_views

    def num_bytes(self, output: OutputName) -> int:
        layout = self.store.layout
        rows = sum(len(layout.rows_of(shard)) for shard, outputs in self.missing.items() if output in outputs)
        return replace(layout, num_rows=rows).num_bytes(output)


@joined()
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
    encoder = Encoder.from_config(config.encoder, config.eval)
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


def plan_bytes(
    config: TrialConfig, manifest: Manifest, outputs: frozenset[OutputName], splits: Sequence[str]
) -> dict[OutputName, int]:
    """Bytes on disk of each output over some official splits; needs no weights."""
    info = describe_encoder(config.encoder)
    sizes = _sizes(config, manifest, splits)
    if config.eval.tte == "five_crop" and "test" in splits:
        sizes.append((len(manifest.rows_of("test")), len(FIVE_CROPS)))
    layouts = [_layout(config, info, count, num_rows, "") for num_rows, count in sizes if num_rows]
    stored = [output for output in OUTPUT_NAMES if output in outputs and config.features.store]
    return {output: sum(layout.num_bytes(output) for layout in layouts) for output in stored}


def trial_bytes(config: TrialConfig, manifest: Manifest, outputs: frozenset[OutputName]) -> int:
    """What one trial reads at the most: a refit reads its output of all splits, and image embeddings of the test."""
    each = plan_bytes(config, manifest, outputs, manifest.splits)
    beside = frozenset[OutputName]({"image_embedding"}) & outputs if "test" in manifest.splits else frozenset()
    of_test = plan_bytes(config, manifest, beside, ("test",)).get("image_embedding", 0)
    return max((count + (of_test if output != "image_embedding" else 0) for output, count in each.items()), default=0)


def check_room(
    configs: Sequence[TrialConfig],
    manifest: Manifest,
    root: str,
    outputs: frozenset[OutputName],
    *,
    copies: Copies = DEFAULT_COPIES,
    other_bytes: int = 0,
) -> None:
    """Refuse, before the first of the passes for these towers, what the disk can't hold of all splits of all of them.

    Or what no machine could hold a copy of. `other_bytes` are what trials will write to that disk. Raises ImbvlmError.
    """
    root, free = storage.absolute(root), storage.free_bytes(root)
    whole = sum(sum(plan_bytes(config, manifest, outputs, manifest.splits).values()) for config in configs)
    # What is there already is looked up, with the towers' weights, only where that matters.
    if free is not None and whole * DISK_MARGIN + other_bytes > free:
        works = [work for config in configs for work in _works_left(config, manifest, root, outputs, manifest.splits)]
        # Towers may share a store.
        _check_disk(configs, root, list({work.store.folder: work for work in works}.values()), other_bytes)
    if not storage.is_local(root):
        for config in configs:
            _check_copy(
                copies, f"what a trial of {config.encoder.name} reads of {root}", trial_bytes(config, manifest, outputs)
            )


def num_crops(config: TrialConfig, manifest: Manifest, splits: Sequence[str]) -> int:
    """Crops of some official splits that training and evaluation read."""
    return sum(num_rows * num_views for num_rows, num_views in _sizes(config, manifest, splits))


def _sizes(config: TrialConfig, manifest: Manifest, splits: Sequence[str]) -> list[tuple[int, int]]:
    """Rows and views of what is stored of some official splits, five crops aside."""
    sizes = [(len(manifest.rows_of(split)), _num_views(config, split)) for split in splits]
    if "train" in splits and config.features.tail_views is not None:
        sizes.append((len(few_shot_rows(manifest)), config.features.tail_views))
    return sizes


def few_shot_rows(manifest: Manifest) -> Rows:
    """Row numbers of the training images of few-shot classes, in manifest order."""
    rows = manifest.rows_of("train")
    return rows[np.isin(manifest.labels[rows], manifest.class_stats().few_shot)]


def image_bytes(config: TrialConfig, info: EncoderInfo, outputs: frozenset[OutputName]) -> int:
    """Bytes of these outputs of one crop."""
    layout = _layout(config, info, 1, 1, "")
    return sum(layout.num_bytes(output) for output in outputs)


@joined()
def stored_images(
    config: TrialConfig, manifest: Manifest, root: str, outputs: frozenset[OutputName], splits: Sequence[str]
) -> tuple[int, int]:
    """Crops that a pass would still compute, and bytes that it would still write, by the shards that are there now.

    Needs the weights; writes nothing, and takes a shard that is there for whole. Raises ImbvlmError.
    """
    works = _works_left(config, manifest, root, outputs, splits)
    return sum(work.num_images for work in works), sum(work.num_bytes(output) for work in works for output in outputs)


def _works_left(
    config: TrialConfig, manifest: Manifest, root: str, outputs: frozenset[OutputName], splits: Sequence[str]
) -> list[_Work]:
    """What `stored_images` counts."""
    encoder, found = Encoder.from_config(config.encoder, config.eval), []
    for part in _parts(config, manifest, encoder, splits, ("test",) if "test" in splits else ()):
        rows = part.rows(manifest)
        key = _store_key(config, rows, encoder, part)
        folder = storage.join(root, key.digest)
        layout = _layout(config, encoder.info, key.num_views, len(rows), key.digest)
        store = FeatureStore(folder, layout)
        if storage.exists(storage.join(folder, STORE_FILE)):
            store = FeatureStore.open(folder)
        missing = {
            output: sorted(set(range(store.layout.num_shards)) - set(store.present(output)))
            for output in OUTPUT_NAMES
            if output in outputs and config.features.store
        }
        shards = {s: tuple(o for o in missing if s in missing[o]) for s in _any_of(missing)}
        found.append(_Work(part, store, rows, shards))
    return found


def _any_of(missing: Mapping[OutputName, Sequence[int]]) -> list[int]:
    return sorted({shard for shards in missing.values() for shard in shards})


# ------------------------------------------------------------------------------------------------- planning


def _num_views(config: TrialConfig, split: str) -> int:
    return config.features.num_views if split == "train" else 1


def _parts(
    config: TrialConfig, manifest: Manifest, encoder: Encoder, splits: Sequence[str], five_crop: Sequence[str]
) -> list[_Part]:
    """What is computed: each split as it is evaluated or trained on, and where they are asked for more views of
    few-shot classes, and some splits as five crops.
    """
    found = [_Part(split, encoder.preprocess, _num_views(config, split)) for split in splits]
    tail_views = config.features.tail_views
    if tail_views is not None and "train" in splits and len(few_shot_rows(manifest)):
        found.append(_Part("train", encoder.preprocess, tail_views, is_tail=True))
    if config.eval.tte == "five_crop":
        preprocess = encoder.preprocess.five_crop(config.eval.expand)
        found += [_Part(split, preprocess, len(FIVE_CROPS)) for split in five_crop]
    return found


def _layout(config: TrialConfig, info: EncoderInfo, views: int, num_rows: int, digest: str) -> StoreLayout:
    precision = config.features.precision
    shapes = {output: info.shape(output) for output in OUTPUT_NAMES}
    largest = max(math.prod(shape) for shape in shapes.values()) * np.dtype(precision).itemsize
    bytes_per_row = views * max(largest, 3 * info.image_size**2)
    rows = min(ROWS_PER_SHARD, SHARD_BYTES // bytes_per_row, -(-num_rows // LEAST_SHARDS))
    return StoreLayout(digest, num_rows, views, max(1, rows), precision, shapes, config.features.int8_tokens)


def computed_in(config: TrialConfig, info: EncoderInfo) -> ComputedIn:
    """What the tower computes in; of itself by where a pass would run: the connected cluster, or else this machine.

    That is bfloat16 on GPUs, and of a ViT on a single machine whose CPU has AMX, where it takes a third of the time.
    """
    if config.features.computed_in != "auto":
        return config.features.computed_in
    if _num_gpus():
        return "bfloat16"
    # What the CPUs of other machines have isn't known.
    pays = info.kind == "vit" and torch.cpu._is_amx_tile_supported() and not has_many_machines()
    return "bfloat16" if pays else "float32"


def _num_gpus() -> int:
    """Of where a pass would run."""
    num_gpus = ray_gpus()
    return torch.cuda.device_count() if num_gpus is None else num_gpus


def _plan_part(
    config: TrialConfig,
    manifest: Manifest,
    root: str,
    outputs: Sequence[OutputName],
    encoder: Encoder,
    part: _Part,
) -> _Work:
    rows = part.rows(manifest)
    if not len(rows):
        raise ImbvlmError(
            f"the manifest {config.data.manifest} has no {part.split} rows; it has {', '.join(manifest.splits)}"
        )
    key = _store_key(config, rows, encoder, part)
    layout = _layout(config, encoder.info, key.num_views, len(rows), key.digest)
    store = FeatureStore.create(storage.join(root, key.digest), layout)
    missing: dict[int, tuple[OutputName, ...]] = {}
    for output in outputs:
        for shard in store.missing(output):
            missing[shard] = (*missing.get(shard, ()), output)
    return _Work(part, store, rows, dict(sorted(missing.items())))


def _store_key(config: TrialConfig, rows: Manifest, encoder: Encoder, part: _Part) -> StoreKey:
    """Of the rows of a part."""
    return StoreKey(
        rows=rows.row_fingerprint(part.split),
        weights=encoder.info.weights_fingerprint,
        preprocess=part.preprocess.to_dict(),
        num_views=part.num_views,
        precision=config.features.precision,
        computed_in=computed_in(config, encoder.info),
        token_pooling=encoder.info.token_pooling,
        int8_tokens=config.features.int8_tokens,
    )


def _check_disk(configs: Sequence[TrialConfig], root: str, works: Sequence[_Work], other_bytes: int = 0) -> None:
    needed = {output: sum(work.num_bytes(output) for work in works) for output in OUTPUT_NAMES}
    total, free = sum(needed.values()), storage.free_bytes(root)
    if free is None or not total or total * DISK_MARGIN + other_bytes <= free:
        return
    config = configs[0]
    features = config.features
    knobs = [f"features.num_views ({features.num_views})", f"features.precision ({features.precision})"]
    if features.tail_views is not None:
        knobs.insert(1, f"features.tail_views ({features.tail_views})")
    size = config.encoder.image_size or "the tower's own"
    knobs.append(f"encoder.image_size ({size})")
    if needed["tokens"]:
        knobs += token_knobs(config)
        reading = ", ".join(name for name, entry in METHODS.items() if entry.reads == "tokens")
        knobs.append(f"or leave out the methods that need tokens ({reading})")
    if len(configs) > 1:
        knobs.append(f"the number of towers ({len(configs)})")
    parts = ", ".join(f"{output} {size_text(count)}" for output, count in needed.items() if count)
    others = f", trials' validation logits up to {size_text(other_bytes)}," if other_bytes else ""
    raise ImbvlmError(
        f"the stored features need {size_text(total)} more ({parts}){others} and {root} has {size_text(free)} free; "
        f"reduce {', '.join(knobs)}, or choose a storage folder on a larger disk"
    )


def token_knobs(config: TrialConfig) -> list[str]:
    """What makes stored tokens smaller and isn't set yet, with the share of bytes that it leaves of them."""
    share = "a half" if config.features.precision == "float16" else "a quarter"
    knobs = [] if config.features.int8_tokens else [f"set features.int8_tokens: true ({share} of the tokens' bytes)"]
    return knobs if config.encoder.token_pooling > 1 else [*knobs, "set encoder.token_pooling: 2 (a quarter of them)"]


def _check_copies(copies: Copies, root: str, outputs: Sequence[OutputName], works: Sequence[_Work]) -> None:
    """A trial reads all splits of an output together."""
    num_bytes = {output: sum(work.store.layout.num_bytes(output) for work in works) for output in outputs}
    if num_bytes:
        largest = max(num_bytes, key=num_bytes.__getitem__)
        _check_copy(copies, f"{largest} of {root}", num_bytes[largest])


def _check_copy(copies: Copies, what: str, num_bytes: int) -> None:
    """Refuse what a machine could never hold; of other machines only the limit is known, and not the disk."""
    if copies.max_gigabytes is not None or is_alone():
        copies.check_fits(what, num_bytes, here=is_alone())


# -------------------------------------------------------------------------------------------------- filling


def _fill(config: TrialConfig, works: Sequence[_Work], encoder: Encoder, report: Report) -> None:
    progress = _Progress(sum(work.num_images for work in works), report)
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
        by_folder[folder].store.trust(output, shards, bad[folder])


def _fits_here(config: TrialConfig, encoder: Encoder, num_images: int) -> bool:
    """Whether this process would have computed so many images about as soon as workers have started; `encoder` is made
    ready for that.
    """
    if _num_gpus() or not has_machine_to_itself():
        return False
    encoder.compute_in(computed_in(config, encoder.info))
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
    worker, loads = TowerWorker(encoder), deque[Future[Block]]()
    num_threads, deadline = min(LOADING_THREADS, os.cpu_count() or 1), time.monotonic() + 2 * SECONDS_HERE
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            while blocks and len(loads) <= num_threads and time.monotonic() < deadline:
                loads.append(pool.submit(load_block, blocks.popleft()))
            if not loads:
                return
            yield worker(loads.popleft().result())


def _by_workers(
    config: TrialConfig, works: Sequence[_Work], encoder: Encoder, blocks: Sequence[Block], progress: _Progress
) -> Iterator[Block]:
    if not blocks:
        return
    planned, is_chosen = computed_in(config, encoder.info), config.features.computed_in != "auto"
    with connected() as cluster:
        gpus = int(cluster.most_gpus) if is_chosen or planned == "bfloat16" else 0
        if planned == "bfloat16" and computed_in(config, encoder.info) == "float32":
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
            start_worker,
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


def _blocks(config: TrialConfig, work: _Work) -> list[Block]:
    return [
        {
            "folder": work.store.folder,
            "name": f"{work.part.split} images {rows.start} to {rows.stop - 1}",
            "shard": shard,
            "outputs": outputs,
            "split": work.part.split,
            "first_row": rows.start,
            "num_views": work.store.num_views,
            "preprocess": work.part.preprocess.to_dict(),
            "strict": config.data.on_bad_image == "strict",
            "images": TakenRows(work.rows.table, np.arange(rows.start, rows.stop)),
        }
        for shard, outputs in work.missing.items()
        for rows in [work.store.layout.rows_of(shard)]
    ]


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
        self._tell(f"features: {num_images:,} images to compute")

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


def _check_quarantine(config: TrialConfig, work: _Work, outputs: Sequence[OutputName], report: Report) -> None:
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


def _check_limits(config: TrialConfig, work: _Work, bad: Mapping[int, str]) -> None:
    """Stop before training where more images of a split are bad than the configuration allows; `bad`: row -> reason."""
    limits = config.data.max_bad_images, config.data.max_bad_share
    findings = limit_findings(work.rows, work.part.split, bad, max_images=limits[0], max_share=limits[1])
    if findings:
        mend = "mend the files or take their rows out; `imbvlm manifest check MANIFEST --decode -o FILE` names them all"
        raise ImbvlmError("\n  ".join(["too many images can't be used:", *findings, mend]))
