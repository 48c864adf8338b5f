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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.context import DataContext

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.image_stream import ImageBatch, StreamPlan, cached_manifest, load_batch
from imbvlm.ray_runtime.attempt_limit import AttemptLimiter
from imbvlm.ray_runtime.capacity_notice import missing_capacity, notify_while
from imbvlm.ray_runtime.cluster_resources import connected_cluster
from imbvlm.ray_runtime.cpu_allocation import plan_cpus, plan_tasks

Block = dict[str, Any]
Load = Callable[[Block], Block]

_DESCRIPTOR, _REST, _ERROR, _WHICH = "descriptor", "rest", "error", "which"
_AT_ONCE, _IN_THREADS = "max_concurrent_calls_per_actor", "enable_true_multi_threading"
# Name prefixes of the threads in which Ray Data fetches results; they end within a second after the iteration.
RAY_DATA_THREADS = ("iter_threaded", "map_tp_", "ray-data-")
_THREADS_END_SECONDS = 5.0
# Ray reports CPUs as free a moment after an earlier pass has ended.
_FREE_CPU_WAIT_SECONDS = 2.0


def map_images(
    blocks: Sequence[Block],
    load: Load,
    worker: Callable[..., Load],
    worker_args: tuple[Any, ...],
    *,
    images_per_block: int,
    num_encoder_workers: int,
    notify: Callable[[str], None],
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    calls_per_worker: int = 1,
) -> Iterator[Block]:
    """Summaries of the blocks, in the order in which they are completed.

    `load(descriptor)` runs in tasks and returns a dict of up to `images_per_block` images, whose numpy arrays travel
    without copies (read-only in the worker) and whose other values are pickled. `worker(*worker_args)` is created once
    per pool member; called with that dict, in up to `calls_per_worker` threads, it returns a small summary. `notify`
    gets, from another thread, the reason why nothing goes on while the cluster lacks machines.

    An ImbvlmError of either is raised here. Raises LostProcessesError where several processes in a row are lost at one
    block, whose `name` is in the sentence, or at their start.
    """
    if not blocks:
        return
    free = _free_cpus(num_encoder_workers * cpus_per_worker + 1)
    nodes = _cpus_of_nodes()
    smallest = min(nodes, default=math.inf)
    cpus = plan_cpus(free, num_encoder_workers, cpus_per_worker, gpus_per_worker, smallest, len(nodes))
    rows = _Descriptors(blocks)
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
                fn_constructor_args=(worker, worker_args, attempts),
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
            yield from _summaries(dataset)


def stream_blocks(blocks: Sequence[Block], load: Load, *, images_per_block: int, num_tasks: int) -> Iterator[Block]:
    """Loaded blocks in the given order, some loaded ahead; arrays are read-only and not copied.

    The tasks book no CPU, like a DataLoader's workers, so that they run next to Train workers that hold every CPU. An
    ImbvlmError of `load` is raised here, and LostProcessesError as in `map_images`.
    """
    if not blocks:
        return
    rows = _Descriptors(blocks)
    with _quiet_context() as context, _threads_ended(), closing(AttemptLimiter()) as attempts:
        context.execution_options.preserve_order = True
        dataset = ray.data.from_items(
            rows, override_num_blocks=plan_tasks(len(rows), images_per_block, num_tasks)
        ).map_batches(_Load(load, attempts), batch_size=1, batch_format="numpy", num_cpus=0, concurrency=num_tasks)
        for batch in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=1):
            block = _unpack(batch)
            del block[_WHICH]
            if _ERROR in block:
                raise block[_ERROR]
            yield block


def stream_in_ray(location: str, plan: StreamPlan, *, num_tasks: int = 1) -> Iterator[ImageBatch]:
    """A plan's batches of the manifest at a location, in order, loaded by Ray Data's tasks."""
    blocks = plan.blocks(cached_manifest(location))
    largest = max(map(len, plan.batches), default=0)
    for block in stream_blocks(blocks, load_batch, images_per_block=largest, num_tasks=num_tasks):
        yield ImageBatch(block["images"], block["rows"], block["ok"], block["reasons"])


def _pool(num_encoder_workers: int, calls_per_worker: int) -> dict[str, Any]:
    """Options of map_batches for a pool of workers; versions of Ray without concurrent calls make one at a time."""
    options = inspect.signature(ray.data.ActorPoolStrategy).parameters
    if calls_per_worker == 1 or not options.keys() >= {_AT_ONCE, _IN_THREADS}:
        return {"concurrency": num_encoder_workers}
    overlapping = {_AT_ONCE: calls_per_worker, _IN_THREADS: True}
    return {"compute": ray.data.ActorPoolStrategy(size=num_encoder_workers, **overlapping)}


class _Descriptors(Sequence[Block]):
    """Blocks as rows of a dataset, pickled one at a time, since they may contain embedded images."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: Any) -> Any:
        return {_DESCRIPTOR: pickle.dumps((index, self.blocks[index]))}


def _summaries(dataset: ray.data.Dataset) -> Iterator[Block]:
    for row in dataset.iter_rows():
        summary: Block = pickle.loads(row[_REST])
        if _ERROR in summary:
            raise summary[_ERROR]
        yield summary


class _Load:
    """First stage: a descriptor becomes a loaded block."""

    def __init__(self, load: Load, attempts: AttemptLimiter) -> None:
        self.load, self.attempts = load, attempts

    def __call__(self, batch: Mapping[str, Any]) -> Block:
        number, block = pickle.loads(batch[_DESCRIPTOR][0])
        name = block.get("name", "images")

        def load() -> Block:
            with self.attempts.at(f"load-{number}", f"loading {name}"):
                return self.load(block)

        return _pack({**_guarded(load), _WHICH: (number, name)})


class _Worker:
    """Second stage: a loaded block becomes a summary."""

    def __init__(self, worker: Callable[..., Load], worker_args: tuple[Any, ...], attempts: AttemptLimiter) -> None:
        self.attempts = attempts
        self.failure: Block | None = None
        try:
            with attempts.at("start", "starting an encoder worker"):
                self.worker = worker(*worker_args)
        except ImbvlmError as error:
            self.failure = {_ERROR: error}

    def __call__(self, batch: Mapping[str, Any]) -> Block:
        block = _unpack(batch)
        number, name = block.pop(_WHICH)

        def work() -> Block:
            with self.attempts.at(f"work-{number}", f"running the encoder over {name}"):
                return self.worker(block)

        return {_REST: [pickle.dumps(self.failure or (block if _ERROR in block else _guarded(work)))]}


def _guarded(stage: Callable[[], Block]) -> Block:
    """Return ImbvlmErrors as values: Ray Data would log them and pass on only their text."""
    try:
        return stage()
    except ImbvlmError as error:
        return {_ERROR: error}


def _pack(block: Block) -> Block:
    """Numeric arrays as tensor columns of one row, which are shared without copies; other values are pickled."""
    arrays = {
        f"array:{key}": value[None]
        for key, value in block.items()
        if isinstance(value, np.ndarray) and value.dtype != object and value.size
    }
    rest = {key: value for key, value in block.items() if f"array:{key}" not in arrays}
    return {**arrays, _REST: [pickle.dumps(rest)]}


def _unpack(batch: Mapping[str, Any]) -> Block:
    arrays = {key.removeprefix("array:"): value[0] for key, value in batch.items() if key.startswith("array:")}
    return {**arrays, **pickle.loads(batch[_REST][0])}


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
