"""Runs Ray Data: tasks load blocks of images, and a pool of encoder workers processes them.

The only file that imports ray.data. A block stays one row of the dataset from its descriptor to its summary, so that
Ray Data can't split, merge or drop its content. Bad images are marked inside the block.
"""

from __future__ import annotations

import inspect
import logging
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import ray
import ray.data
from ray.data.context import DataContext

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.plugins import active_plugins, call_with
from imbvlm.data.image_stream import ImageBatch, StreamPlan, cached_manifest, load_batch
from imbvlm.ray_runtime.attempt_limit import AttemptLimiter
from imbvlm.ray_runtime.capacity_notice import missing_capacity, notify_while
from imbvlm.ray_runtime.cluster_resources import connected_cluster
from imbvlm.ray_runtime.cpu_allocation import plan_cpus, plan_tasks

BlockT = TypeVar("BlockT")
LoadedT = TypeVar("LoadedT")
SummaryT = TypeVar("SummaryT")
Row = dict[str, Any]

# Columns of a row: a pickled item, and its arrays by their number.
_PICKLED, _ARRAY = "pickled", "array"
# Smaller arrays are pickled: a column of their own takes longer.
_MIN_ARRAY_BYTES = 1024
_AT_ONCE, _IN_THREADS = "max_concurrent_calls_per_actor", "enable_true_multi_threading"
# Name prefixes of the threads in which Ray Data fetches results; they end within a second after the iteration.
RAY_DATA_THREADS = ("iter_threaded", "map_tp_", "ray-data-")
_THREADS_END_SECONDS = 5.0
# Ray reports CPUs as free a moment after an earlier pass has ended.
_FREE_CPU_WAIT_SECONDS = 2.0


def map_images(
    blocks: Sequence[BlockT],
    load: Callable[[BlockT], LoadedT],
    worker: Callable[..., Callable[[LoadedT], SummaryT]],
    worker_args: tuple[Any, ...],
    *,
    images_per_block: int,
    num_encoder_workers: int,
    notify: Callable[[str], None],
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    calls_per_worker: int = 1,
    name: Callable[[BlockT], str] = lambda block: "images",
) -> Iterator[SummaryT]:
    """Summaries of the blocks, in the order in which they are completed.

    `load(block)` runs in tasks and returns up to `images_per_block` images, whose numpy arrays travel without copies
    (read-only in the worker), while all else is pickled. `worker(*worker_args)` is created once per pool member; called
    with what was loaded, in up to `calls_per_worker` threads, it returns a small summary. `notify` gets, from another
    thread, the reason why nothing goes on while the cluster lacks machines.

    An ImbvlmError of either is raised here. Raises LostProcessesError where several processes in a row are lost at one
    block, whose `name(block)` is in the sentence, or at their start.
    """
    if not blocks:
        return
    free = _free_cpus(num_encoder_workers * cpus_per_worker + 1)
    nodes = _cpus_of_nodes()
    smallest = min(nodes, default=math.inf)
    cpus = plan_cpus(free, num_encoder_workers, cpus_per_worker, gpus_per_worker, smallest, len(nodes))
    rows, make = _Descriptors(blocks, name), partial(call_with, active_plugins(), worker)
    with _quiet_context(), _threads_ended(), closing(AttemptLimiter()) as attempts:
        dataset = (
            ray.data.from_items(rows, override_num_blocks=plan_tasks(len(rows), images_per_block, cpus.num_tasks))
            .map_batches(
                _Load(load, attempts),
                batch_size=1,
                batch_format="numpy",
                num_cpus=cpus.per_task,
                concurrency=cpus.num_tasks,
            )
            .map_batches(
                _Worker,
                fn_constructor_args=(make, worker_args, attempts, num_encoder_workers),
                batch_size=1,
                batch_format="numpy",
                zero_copy_batch=True,
                num_cpus=cpus.per_worker,
                num_gpus=gpus_per_worker,
                **_pool(num_encoder_workers, calls_per_worker),
            )
        )
        needed = (cpus.per_worker, gpus_per_worker, cpus.per_task)
        with notify_while(lambda: missing_capacity(connected_cluster().nodes, *needed), notify):
            yield from _values(dataset)


def stream_blocks(
    blocks: Sequence[BlockT], load: Callable[[BlockT], LoadedT], *, images_per_block: int, num_tasks: int
) -> Iterator[LoadedT]:
    """Loaded blocks in the given order, some loaded ahead; arrays are read-only and not copied.

    The tasks book no CPU, like a DataLoader's workers, so that they run next to Train workers that hold every CPU. An
    ImbvlmError of `load` is raised here, and LostProcessesError as in `map_images`.
    """
    if not blocks:
        return
    rows = _Descriptors(blocks, lambda block: "images")
    with _quiet_context() as context, _threads_ended(), closing(AttemptLimiter()) as attempts:
        context.execution_options.preserve_order = True
        dataset = ray.data.from_items(
            rows, override_num_blocks=plan_tasks(len(rows), images_per_block, num_tasks)
        ).map_batches(_Load(load, attempts), batch_size=1, batch_format="numpy", num_cpus=0, concurrency=num_tasks)
        yield from _values(dataset)


def stream_in_ray(location: str, plan: StreamPlan, *, num_tasks: int = 1) -> Iterator[ImageBatch]:
    """A plan's batches of the manifest at a location, in order, loaded by Ray Data's tasks."""
    largest = max(map(len, plan.batches), default=0)
    blocks = plan.blocks(cached_manifest(location))
    return stream_blocks(blocks, load_batch, images_per_block=largest, num_tasks=num_tasks)


def _pool(num_encoder_workers: int, calls_per_worker: int) -> dict[str, Any]:
    """Options of map_batches for a pool of workers; versions of Ray without concurrent calls make one at a time."""
    options = inspect.signature(ray.data.ActorPoolStrategy).parameters
    if calls_per_worker == 1 or not options.keys() >= {_AT_ONCE, _IN_THREADS}:
        return {"concurrency": num_encoder_workers}
    overlapping = {_AT_ONCE: calls_per_worker, _IN_THREADS: True}
    return {"compute": ray.data.ActorPoolStrategy(size=num_encoder_workers, **overlapping)}


@dataclass(frozen=True)
class _Item:
    """A block on its way: what its last stage made of it, or the ImbvlmError of that stage."""

    number: int
    name: str
    value: Any

    def advance(self, attempts: AttemptLimiter, step: str, doing: str, stage: Callable[[Any], Any]) -> Row:
        """Return the row of the item behind a stage; Ray Data would log an error and pass on only its text."""
        try:
            with attempts.at(f"{step}-{self.number}", f"{doing} {self.name}"):
                value = stage(self.value)
        except ImbvlmError as error:
            value = error
        return _pack(replace(self, value=value))


class _Descriptors(Sequence[Row]):
    """Blocks as rows of a dataset, pickled one at a time, since they may contain embedded images."""

    def __init__(self, blocks: Sequence[BlockT], name: Callable[[BlockT], str]) -> None:
        self.blocks, self.name = blocks, name

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: Any) -> Any:
        block = self.blocks[index]
        return {_PICKLED: pickle.dumps(_Item(index, self.name(block), block))}


class _Load:
    """First stage: a descriptor becomes a loaded block."""

    def __init__(self, load: Callable[[Any], object], attempts: AttemptLimiter) -> None:
        self.load, self.attempts = load, attempts

    def __call__(self, row: Row) -> Row:
        return _unpack(row).advance(self.attempts, "load", "loading", self.load)


class _Worker:
    """Second stage: a loaded block becomes a summary."""

    def __init__(
        self,
        worker: Callable[..., Callable[[Any], object]],
        worker_args: tuple[Any, ...],
        attempts: AttemptLimiter,
        num_workers: int,
    ) -> None:
        self.attempts = attempts
        self.failure: ImbvlmError | None = None
        try:
            with attempts.at("start", "starting an encoder worker", num_at_once=num_workers):
                self.worker = worker(*worker_args)
        except ImbvlmError as error:
            self.failure = error

    def __call__(self, row: Row) -> Row:
        item = _unpack(row)
        if self.failure is not None:
            return _pack(replace(item, value=self.failure))
        if isinstance(item.value, ImbvlmError):
            return _pack(item)
        return item.advance(self.attempts, "work", "running the encoder over", self.worker)


def _values(dataset: ray.data.Dataset) -> Iterator[Any]:
    """The last stage's result of each block; raises the first error."""
    for row in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=1):
        value = _unpack(row).value
        if isinstance(value, ImbvlmError):
            raise value
        yield value


def _pack(item: _Item) -> Row:
    """Numeric arrays as columns of one row, which are shared without copies; all else is pickled."""
    arrays: list[npt.NDArray[np.uint8]] = []

    def is_pickled(buffer: pickle.PickleBuffer) -> bool:
        data = buffer.raw()
        if data.nbytes < _MIN_ARRAY_BYTES:
            return True
        arrays.append(np.frombuffer(data, np.uint8))
        return False

    pickled = pickle.dumps(item, protocol=5, buffer_callback=is_pickled)
    return {_PICKLED: [pickled], **{f"{_ARRAY}{number}": array[None] for number, array in enumerate(arrays)}}


def _unpack(row: Row) -> _Item:
    arrays = [row[f"{_ARRAY}{number}"][0] for number in range(len(row) - 1)]
    item: _Item = pickle.loads(row[_PICKLED][0], buffers=arrays)
    return item


def _free_cpus(wanted: float) -> float:
    deadline = time.monotonic() + _FREE_CPU_WAIT_SECONDS
    total = ray.cluster_resources().get("CPU", 0.0)
    while (free := float(ray.available_resources().get("CPU", 0.0))) < min(wanted, total):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return free


def _cpus_of_nodes() -> list[float]:
    """CPUs of each node that has any."""
    return [cpus for cpus, _ in connected_cluster().nodes if cpus]


@contextmanager
def _threads_ended() -> Iterator[None]:
    """Within, run a pass; afterwards, also after an error, its threads have ended.

    A thread that still fetches a result when this process leaves the cluster would end the process, with code 1 and
    without a message.
    """
    before = set(threading.enumerate())
    try:
        yield
    finally:
        deadline = time.monotonic() + _THREADS_END_SECONDS
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith(RAY_DATA_THREADS):
                thread.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def _quiet_context() -> Iterator[DataContext]:
    """Within, Ray Data runs without progress bars and log lines."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.enable_auto_log_stats = False
    # Each row, one of our blocks, is passed on at once.
    context.target_max_block_size = 1
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with DataContext.current(context):
            yield context
    finally:
        logger.setLevel(level)
