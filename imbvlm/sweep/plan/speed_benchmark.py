"""Measures the speed and memory of configurations by a few real steps on made-up features."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.method_registry import METHODS
from imbvlm.config.training_sections import AdamWConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.data.image_stream import ImageRows, StreamPlan, stream_in_threads
from imbvlm.data.manifest import Manifest, absolute_manifest
from imbvlm.data.manifest_schema import Rows
from imbvlm.data.splits import train_val_rows
from imbvlm.features.encoder_worker import BATCH_ON_CPU, BATCH_ON_GPU
from imbvlm.features.entry_index import DIGEST_BYTES
from imbvlm.features.extraction_plan import resolve_compute_dtype
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import StoreLayout
from imbvlm.features.stored_split import StoredSplit
from imbvlm.features.trial_data import RowSource, StoredRows, TrialData
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.training.step.batch_source import READ_AHEAD
from imbvlm.training.trial_pack import TrialPack, pack_key
from imbvlm.training.trial_run import TrialRun, build_trial
from imbvlm.training.trial_session import default_device
from imbvlm.training.validation_logits import RowLogits

# Steps run for STEP_SECONDS, at least three of them. After SLOW_STEP_SECONDS two are enough.
STEP_SECONDS = 1.0
SLOW_STEP_SECONDS = 8.0
# The size of the made-up store. Its rows repeat, so it stays in memory as a small real one does.
SAMPLE_ROWS = 256
SAMPLE_BYTES = 64_000_000
# The size of a measured pack, and the length of its members' epochs.
PACK_MEMBERS, PACK_SECONDS, MAX_PACK_STEPS = 4, 0.1, 16
# On a CPU trials on images are measured with smaller batches: their time is proportional to the number of images.
IMAGES_ON_CPU = 8
# A head that nothing trains is built from so many images, and selects its options by so many logits.
HEAD_ROWS, HEAD_LOGITS = 2**14, 2**23

Speed = TypeVar("Speed")


@dataclass(frozen=True)
class TrialSpeed:
    """Seconds of one image in training and in evaluation, and bytes of one worker on its host and on its GPU.

    A head that nothing trains is built from its training images, and selects its options on those of validation.
    """

    seconds_per_train_image: float
    eval_seconds: float
    host_bytes: int
    device_bytes: int
    # Seconds that one more member of a pack adds to a training image; None if packing saves nothing.
    extra_member_seconds: float | None = None

    def epoch_seconds(self, num_train: int, num_val: int, num_workers: int, pack_size: float = 1.0) -> float:
        """Return a trial's seconds of one epoch with its validation; its workers share the images evenly."""
        train = self.seconds_per_train_image
        if self.extra_member_seconds is not None:
            train = (train + (pack_size - 1) * self.extra_member_seconds) / pack_size
        return (train * num_train + self.eval_seconds * num_val) / num_workers


@dataclass(frozen=True)
class EncoderSpeed:
    """Seconds of one image: to read and crop it on one CPU, and to encode it on one device."""

    load_seconds: float
    encoder_seconds: float


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement."""

    host: str
    device: str
    num_threads: int

    def describe(self) -> str:
        threads = pluralize(self.num_threads, "CPU thread")
        return f"{self.host}, {threads if self.device == 'cpu' else self.device}"


@dataclass(frozen=True)
class SpeedBenchmark:
    """Speeds in the order of their configurations; a sentence for one that can't be measured."""

    machine: Machine
    trials: tuple[TrialSpeed | str, ...]
    encoders: tuple[EncoderSpeed | str, ...]
    seconds: float


def measure_speeds(trials: Sequence[TrialConfig], encoders: Sequence[TrialConfig], num_threads: int) -> SpeedBenchmark:
    """Measure configurations one after another, each alone, with `num_threads` CPU threads; raises ImbvlmError.

    Methods on stored features need no weights of an encoder. Methods on images, and encoders, do.
    """
    started, before = time.perf_counter(), torch.get_num_threads()
    own_bytes = _resident_bytes()
    torch.set_num_threads(num_threads)
    try:
        device = default_device()
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        return SpeedBenchmark(
            Machine(socket.gethostname(), name, num_threads),
            tuple(_measured(partial(trial_speed, own_bytes), config, device) for config in trials),
            tuple(_measured(encoder_speed, config, device) for config in encoders),
            time.perf_counter() - started,
        )
    finally:
        torch.set_num_threads(before)


def _measured(
    measure: Callable[[TrialConfig, torch.device], Speed], config: TrialConfig, device: torch.device
) -> Speed | str:
    try:
        return measure(config, device)
    except ImbvlmError as error:
        return str(error)


# --------------------------------------------------------------------------------------------------- one trial


class _EnoughSteps(Exception):
    """Ends a run in the middle of its first epoch."""


class _StepClock:
    """Times the steps after the first, and adds up the tensors that the first one saves for its backward pass."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.saved: dict[int, int] = {}
        self._watching = ExitStack()

    def start(self) -> None:
        self._watching.enter_context(saved_tensors_hooks(self._note, lambda tensor: tensor))
        self._started = time.perf_counter()

    def after_step(self) -> None:
        self._watching.close()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        steps, spent = len(self.times), self.times[-1] - self._started
        if (steps >= 3 and self.times[-1] - self.times[0] > STEP_SECONDS) or (steps >= 2 and spent > SLOW_STEP_SECONDS):
            raise _EnoughSteps

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def step_seconds(self) -> float:
        if len(self.times) < 2:
            return self.times[0] - self._started
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def trial_speed(own_bytes: int, config: TrialConfig, device: torch.device) -> TrialSpeed:
    with tempfile.TemporaryDirectory(prefix="imbvlm-calibration-") as folder:
        # The initialization doesn't change the time of a step.
        overrides = {} if config.classifier is None else {"classifier.init": "random"}
        config = config.with_overrides({**overrides, **({} if config.train is None else {"second_stage": None})})
        num_images = 0 if config.train is None else config.train.batch_size
        # Memory counts for the configured batch size, also if the measured batches are smaller.
        batch = num_images or 256
        if config.reads_images and device.type == "cpu" and num_images > IMAGES_ON_CPU:
            config, num_images = config.with_overrides({"train.batch_size": IMAGES_ON_CPU}), IMAGES_ON_CPU
        if config.train is not None and config.train.num_threads is not None:
            config = config.with_overrides({"train.num_threads": None})
        data = make_up_data(config, Path(folder))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        is_head = num_images == 0 and METHODS[config.method].learns
        if is_head:
            val, max_val = data.val if len(data.val) else data.train, HEAD_LOGITS // len(data.class_names)
            data = replace(data, train=_spaced(data.train, HEAD_ROWS), val=_spaced(val, max_val))
        started = time.perf_counter()
        run, clock = build_trial(config, data, device), _StepClock()
        build_seconds = time.perf_counter() - started
        if num_images:
            clock.start()
            try:
                for _ in run.epochs(clock.after_step):
                    pass
            except _EnoughSteps:
                pass
        if is_head:
            started = time.perf_counter()
            # An epoch also selects options.
            next(run.epochs())
            step_seconds = build_seconds / len(data.train)
            eval_seconds = (time.perf_counter() - started) / len(data.val)
        else:
            eval_seconds = _eval_seconds(run, data.val, num_images or 256)
            step_seconds = clock.step_seconds / num_images if num_images else 0.0
        host, on_device = _bytes(run, clock, batch, num_images)
        if device.type == "cuda":
            host, on_device = host - on_device, torch.cuda.max_memory_allocated()
        else:
            on_device = 0
        # Members that train in turns gain nothing on a CPU.
        alone = pack_key(config) is None or (METHODS[config.method].packs == "in_turns" and device.type == "cpu")
        extra = None if alone else _extra_member_seconds(config, data, device, clock.step_seconds)
        return TrialSpeed(step_seconds, eval_seconds, own_bytes + host, on_device, extra)


def _extra_member_seconds(config: TrialConfig, data: TrialData, device: torch.device, step_seconds: float) -> float:
    """Measure the seconds that each further member of a pack adds to an image, in short epochs without validation."""
    num_steps = min(MAX_PACK_STEPS, max(1, int(PACK_SECONDS / step_seconds)))
    # The first epoch warms up, unless its steps are long enough to make no difference.
    num_epochs = 2 if num_steps > 1 else 1
    config = config.with_overrides({"train.num_epochs": num_epochs, "second_stage": None})
    rows = np.arange(min(len(data.train), num_steps * require_section(config.train).batch_size))
    part = replace(data, train=_take(data.train, rows), val=_take(data.val, rows[:0]))
    runs, pack = [build_trial(config, part, device) for _ in range(PACK_MEMBERS)], TrialPack()
    for run in runs:
        run.join(pack)
    generators, seconds = [run.epochs() for run in runs], []
    for _ in range(num_epochs):
        started = time.perf_counter()
        for generator in generators:
            next(generator)
        seconds.append(time.perf_counter() - started)
    alone = step_seconds * len(rows) / require_section(config.train).batch_size
    return max(0.0, seconds[-1] - alone) / ((PACK_MEMBERS - 1) * max(1, len(rows)))


def _eval_seconds(run: TrialRun, val: RowSource, batch_size: int) -> float:
    """Measure the evaluation of one image, over more and more rows until it takes long enough."""
    if not len(val):
        return 0.0
    rows = np.arange(min(len(val), batch_size))
    while True:
        part = _take(val, rows)
        started = time.perf_counter()
        run.counters(part)
        seconds = time.perf_counter() - started
        if len(rows) == len(val) or seconds > STEP_SECONDS / 3:
            return seconds / len(rows)
        rows = np.arange(min(len(val), 4 * len(rows)))


def _spaced(source: RowSource, max_rows: int) -> RowSource:
    """Return at most so many evenly spaced rows."""
    num_rows = min(len(source), max_rows)
    return _take(source, np.arange(num_rows) * len(source) // num_rows)


def _take(source: RowSource, rows: Rows) -> RowSource:
    if isinstance(source, StoredRows):
        return StoredRows(source.store, source.rows[rows], source.labels[rows])
    return ImageRows(source.manifest, source.rows[rows], source.manifest_rows[rows], source.labels[rows])


def _bytes(run: TrialRun, clock: _StepClock, batch_size: int, num_images: int) -> tuple[int, int]:
    """Return the bytes that a trial adds to its process, and those of them that would be on a GPU.

    They are weights, gradients, optimizer state, tensors saved for the backward pass, logits and their gradients (batch
    size x classes), batches that are read ahead, and stored validation logits.
    """
    weights = sum(param.numel() * param.element_size() for param in run.model.parameters())
    weights += sum(buffer.numel() * buffer.element_size() for buffer in run.model.buffers())
    trained = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
    states = 2 if isinstance(run.config.optim, AdamWConfig) else 1
    own = {param.untyped_storage().data_ptr() for param in run.model.parameters()}
    saved = sum(size for pointer, size in clock.saved.items() if pointer not in own)
    num_classes, scale = len(run.data.class_names), batch_size / max(1, num_images)
    parts = 1 if run.config.memory is None else run.config.memory.accumulation
    logits = 2 * 4 * batch_size * num_classes
    on_device = int(weights + trained * (1 + states) + (saved * scale + logits) / parts)
    numbers = run.batch_source.numbers_per_example * batch_size
    reading = numbers * (2 * (READ_AHEAD + 1) + 4)
    rows = len(run.data.val)
    val_logits = 2 * rows * num_classes if RowLogits.fits(rows, num_classes) else 0
    return on_device + reading + val_logits, on_device


def _resident_bytes() -> int:
    """Return this process's resident bytes: Python, torch and their libraries."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def make_up_data(config: TrialConfig, folder: Path) -> TrialData:
    """Return the manifest's rows and classes with made-up features of the encoder's shapes, or with its images."""
    manifest = Manifest.read(config.data.manifest)
    train, val = train_val_rows(manifest, config.data.split_seed)
    needs_encoder = config.reads_images or METHODS[config.method].needs_encoder
    info = _encoder(config).info if needs_encoder else describe_encoder(config.encoder)
    sources: list[RowSource]
    if config.reads_images:
        location = absolute_manifest(config.data.manifest)
        sources = [ImageRows(location, np.arange(len(rows)), rows, manifest.labels[rows]) for rows in (train, val)]
    else:
        store = _made_up_store(config, info, folder)
        sources = [
            StoredRows(store, np.arange(len(rows)) % store.num_rows, manifest.labels[rows]) for rows in (train, val)
        ]
    num_classes = len(manifest.class_names)
    embeddings = None
    if info.has_text:
        embeddings = torch.nn.functional.normalize(torch.randn(num_classes, info.text_space.width), dim=-1)
    return TrialData(
        class_names=tuple(manifest.class_names),
        class_stats=manifest.class_stats(train),
        train=sources[0],
        val=sources[1],
        info=info,
        class_embeddings=embeddings,
        encoder=config.encoder.absolute(),
        taxonomy=manifest.taxonomy,
    )


def _made_up_store(config: TrialConfig, info: EncoderInfo, folder: Path) -> StoredSplit:
    precision, output = config.features.precision, METHODS[config.method].reads
    row_bytes = int(np.prod(info.shapes[output])) * np.dtype(precision).itemsize
    num_rows = max(8, min(SAMPLE_ROWS, SAMPLE_BYTES // row_bytes))
    layout = StoreLayout("calibration", precision, info.shapes, config.features.int8_tokens)
    store = FeatureStore.create(str(folder / layout.digest), layout)
    values = np.random.default_rng(0).standard_normal((num_rows, *info.shapes[output]), dtype=np.float32)
    contents = np.arange(2 * num_rows).view(np.uint8).reshape(num_rows, DIGEST_BYTES)
    store.append(output, contents, np.zeros(num_rows, dtype=np.int64), values, [None] * num_rows)
    return StoredSplit.open(store.write_split(contents, 1, (output,)))


# ---------------------------------------------------------------------------------------------------- one encoder


def _encoder(config: TrialConfig, device: str | torch.device = "cpu") -> Encoder:
    """Return the encoder with its weights; raises ImbvlmError if they are not on this machine."""
    if not resolve_encoder(config.encoder).has_weights:
        raise ImbvlmError(f"the weights of {config.encoder.name} are not here yet. `imbvlm encoder fetch` brings them.")
    return create_encoder(config.encoder, config.eval, device)


def encoder_speed(config: TrialConfig, device: torch.device) -> EncoderSpeed:
    """Measure how fast images are read and encoded; raises ImbvlmError if the encoder's weights are not here."""
    encoder = _encoder(config, device)
    encoder.compute_in(resolve_compute_dtype(config, encoder.info))
    manifest = Manifest.read(config.data.manifest)
    rows = manifest.rows_of("train")[:16]
    plan = StreamPlan(rows, [np.arange(len(rows))], encoder.preprocess, None, 0, 0)
    location = absolute_manifest(config.data.manifest)
    # The first batch opens the manifest and starts threads.
    next(stream_in_threads(location, plan))
    started = time.perf_counter()
    batch = next(stream_in_threads(location, plan))
    load = (time.perf_counter() - started) * min(os.cpu_count() or 1, len(rows)) / len(rows)
    batch_size = BATCH_ON_GPU if device.type == "cuda" else BATCH_ON_CPU
    images = torch.from_numpy(np.resize(batch.images, (batch_size, *batch.images.shape[1:])))
    encoder.forward_images(images)
    started, num_times = time.perf_counter(), 0
    while num_times == 0 or time.perf_counter() - started < STEP_SECONDS:
        encoder.forward_images(images).pooled.cpu()
        num_times += 1
    return EncoderSpeed(load, (time.perf_counter() - started) / (num_times * batch_size))
