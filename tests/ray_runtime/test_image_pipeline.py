"""Blocks of images through Ray Data: whole, none lost, none waiting for ever, errors as they were raised."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from imbvlm.base.errors import LostProcessesError, StorageError
from imbvlm.ray_runtime.attempt_limit import MAX_LOST_WORKERS
from imbvlm.ray_runtime.cpu_allocation import IMAGES_PER_TASK, plan_cpus, plan_tasks
from imbvlm.ray_runtime.image_pipeline import RAY_DATA_THREADS, map_images

SIDE = 16
# Workers don't have the folder of the tests on their path.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def block(shard: int, num_images: int, **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"shard": shard, "num_images": num_images} | fields)


def load(descriptor: Any) -> SimpleNamespace:
    num_images = descriptor.num_images
    if getattr(descriptor, "fail", False):
        raise StorageError("the bucket doesn't answer")
    images = np.full((num_images, 3, SIDE, SIDE), descriptor.shard, np.uint8)
    return SimpleNamespace(
        shard=descriptor.shard,
        images=images,
        ok=np.arange(num_images) % 3 > 0,
        reasons=["truncated", None],
        nothing=np.zeros((0, 5), np.float32),
        # In columns, as libraries of linear algebra leave them.
        turned=np.arange(6000, dtype=np.int64).reshape(2, 3000).T,
        pid=os.getpid(),
    )


class Tower:
    """Stands for a tower: made once per worker, sees whole blocks."""

    def __init__(self, scale: int) -> None:
        if scale == 0:
            raise StorageError("the tower's file is not there")
        self.scale = scale
        self.calls = 0

    def __call__(self, loaded: Any) -> SimpleNamespace:
        self.calls += 1
        if loaded.shard == 255:
            raise StorageError("the disk is full")
        return SimpleNamespace(
            shard=loaded.shard,
            shape=loaded.images.shape,
            sum=int(loaded.images.sum()) * self.scale,
            num_bad=int((~loaded.ok).sum()),
            reasons=loaded.reasons,
            is_copied=loaded.images.flags.writeable or loaded.turned.flags.writeable,
            others=(loaded.nothing.shape, loaded.turned[:3].tolist()),
            loaded_here=loaded.pid == os.getpid(),
            pid=os.getpid(),
            calls=self.calls,
        )


def run(blocks: Sequence[Any], **options: Any) -> list[Any]:
    return sorted(
        map_images(blocks, load, Tower, (2,), images_per_block=300, num_encoder_workers=1, notify=print, **options),
        key=lambda summary: summary.shard,
    )


@pytest.mark.ray
def test_every_block_comes_out_once_and_whole_also_a_short_last_one(ray_cluster: str) -> None:
    blocks = [block(shard, 300 if shard < 7 else 5) for shard in range(8)]
    summaries = run(blocks)
    assert [row.shard for row in summaries] == list(range(8))
    assert [row.shape[0] for row in summaries] == [300] * 7 + [5]
    assert [row.sum for row in summaries] == [2 * b.shard * b.num_images * 3 * SIDE * SIDE for b in blocks]
    assert [row.num_bad for row in summaries] == [100] * 7 + [2]
    assert all(row.reasons == ["truncated", None] for row in summaries)
    assert {row.pid for row in summaries} == {summaries[0].pid}
    assert max(row.calls for row in summaries) == 8
    assert not any(row.loaded_here for row in summaries)


@pytest.mark.ray
def test_arrays_of_any_shape_and_order_arrive_and_are_not_copied(ray_cluster: str) -> None:
    """What Ray's memory holds can only be read."""
    (summary,) = run([block(1, 300)])
    assert not summary.is_copied
    assert summary.others == ((0, 5), [[0, 3000], [1, 3001], [2, 3002]])


@pytest.mark.ray
def test_a_block_larger_than_ray_datas_own_block_size_is_not_split(ray_cluster: str) -> None:
    num_images = 150 * 2**20 // (3 * SIDE * SIDE)
    assert run([block(1, num_images)])[0].shape == (num_images, 3, SIDE, SIDE)


@pytest.mark.ray
def test_nothing_to_do_starts_nothing(ray_cluster: str) -> None:
    assert run([]) == []


@pytest.mark.ray
@pytest.mark.parametrize("held", [1.5, 2])
def test_a_pass_finishes_beside_others_that_hold_most_or_all_cpus(ray_cluster: str, held: float) -> None:
    import ray

    @ray.remote(num_cpus=held)
    class Holder:
        def ready(self) -> bool:
            return True

    holder = Holder.remote()
    ray.get(holder.ready.remote(), timeout=30)
    try:
        assert len(run([block(shard, 4) for shard in range(3)])) == 3
    finally:
        ray.kill(holder)
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("broken", "message"),
    [(block(0, 3, fail=True), "the bucket doesn't answer"), (block(255, 3), "the disk is full")],
)
def test_an_error_of_either_stage_comes_out_as_it_was_raised(
    ray_cluster: str, broken: SimpleNamespace, message: str
) -> None:
    with pytest.raises(StorageError, match=message):
        run([block(1, 3), broken])


@pytest.mark.ray
def test_an_error_of_a_worker_that_starts_comes_out_as_it_was_raised(
    ray_cluster: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StorageError, match="the tower's file is not there"):
        list(
            map_images(
                [block(1, 3)],
                load,
                Tower,
                (0,),
                images_per_block=3,
                num_encoder_workers=1,
                notify=print,
            )
        )
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.ray
def test_behind_an_error_no_thread_asks_ray_for_more(ray_cluster: str) -> None:
    """Where the connection is closed by then, Ray ends the process without a word of the error."""
    blocks = [block(shard, 3) for shard in range(9)]
    for _ in range(3):
        with pytest.raises(StorageError, match="the tower's file is not there"):
            list(map_images(blocks, load, Tower, (0,), images_per_block=3, num_encoder_workers=1, notify=print))
        assert not [one.name for one in threading.enumerate() if one.name.startswith(RAY_DATA_THREADS)]


def die_at_first(folder: Path, number: int) -> None:
    """So many processes do, as if a machine had ended them."""
    for path in (folder / str(one) for one in range(number)):
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def dying_load(descriptor: Any) -> SimpleNamespace:
    die_at_first(*descriptor.load)
    loaded = load(descriptor)
    loaded.work = descriptor.work
    return loaded


class DyingTower(Tower):
    def __init__(self, *start: Any) -> None:
        die_at_first(*start)
        super().__init__(1)

    def __call__(self, loaded: Any) -> SimpleNamespace:
        die_at_first(*loaded.work)
        return super().__call__(loaded)


def run_dying(folder: Path, stage: str, number: int) -> list[Any]:
    """Three blocks, over one of which so many processes die, or as many as they start."""
    deaths = {name: (folder, number if name == stage else 0) for name in ("load", "work", "start")}
    start = deaths.pop("start")
    none = dict.fromkeys(deaths, (folder, 0))
    blocks = [block(shard, 3, **(deaths if shard == 1 else none)) for shard in range(3)]
    return list(
        map_images(
            blocks,
            dying_load,
            DyingTower,
            start,
            images_per_block=3,
            num_encoder_workers=1,
            notify=print,
            name=lambda block: f"shard {block.shard}",
        )
    )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("stage", "work"),
    [("load", "loading shard 1"), ("work", "running the encoder over shard 1"), ("start", "starting")],
)
def test_process_after_process_lost_over_the_same_work_ends_the_pass(
    ray_cluster: str, tmp_path: Path, stage: str, work: str
) -> None:
    with pytest.raises(LostProcessesError, match=rf"{work}.*: {MAX_LOST_WORKERS} processes in a row were lost"):
        run_dying(tmp_path, stage, MAX_LOST_WORKERS + 9)
    assert len(os.listdir(tmp_path)) == MAX_LOST_WORKERS


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("stage", ["load", "work", "start"])
def test_a_few_lost_processes_cost_nothing(ray_cluster: str, tmp_path: Path, stage: str) -> None:
    summaries = run_dying(tmp_path, stage, MAX_LOST_WORKERS - 1)
    assert sorted(summary.shard for summary in summaries) == [0, 1, 2]


@pytest.mark.ray
def test_ray_data_prints_nothing(ray_cluster: str, capfd: pytest.CaptureFixture[str]) -> None:
    run([block(shard, 4) for shard in range(3)])
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Dataset" not in shown.err
    assert "Running" not in shown.err


@pytest.mark.parametrize("free", [0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 16.0, 17.0])
@pytest.mark.parametrize("num_encoder_workers", [1, 2, 8])
@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (8, 0), (1, 1), (0.5, 0.25)])
def test_both_stages_always_fit_into_the_free_cpus_at_once(
    free: float, num_encoder_workers: int, cpus: float, gpus: float
) -> None:
    plan = plan_cpus(free, num_encoder_workers, cpus, gpus)
    assert plan.num_tasks >= 1
    assert plan.per_worker * num_encoder_workers + plan.per_task * plan.num_tasks <= free + 1e-9
    assert 0 <= plan.per_worker <= cpus
    assert free == 0 or plan.per_worker != plan.per_task
    assert free == 0 or plan.per_task > 0


@pytest.mark.parametrize(("nodes", "node_cpus"), [(2, 1.0), (3, 2.0), (2, 4.0)])
def test_a_task_fits_beside_a_worker_on_every_node(nodes: int, node_cpus: float) -> None:
    """On two nodes of one CPU, workers of half a CPU on each leave no whole CPU for a task."""
    plan = plan_cpus(nodes * node_cpus, nodes, 1, 0, node_cpus)
    assert plan.per_worker + plan.per_task <= node_cpus
    assert 0 < plan.per_task != plan.per_worker


@pytest.mark.parametrize(("nodes", "node_cpus"), [(2, 1.0), (2, 8.0), (3, 1.0), (4, 8.0), (10, 16.0)])
@pytest.mark.parametrize("cpus", [1, 4])
def test_where_half_of_the_nodes_go_away_the_workers_are_started_again_beside_a_task(
    nodes: int, node_cpus: float, cpus: int
) -> None:
    num_encoder_workers = max(1, int(nodes * node_cpus) // cpus)
    plan = plan_cpus(nodes * node_cpus, num_encoder_workers, cpus, 0, node_cpus, nodes)
    left = [node_cpus] * (nodes - nodes // 2)
    for _ in range(num_encoder_workers):
        fullest = min((cpus for cpus in left if cpus >= plan.per_worker), default=None)
        if fullest is not None:
            left[left.index(fullest)] = fullest - plan.per_worker
    assert max(left) + 1e-9 >= plan.per_task
    # As many tasks as where nothing goes away.
    assert plan.num_tasks == plan_cpus(nodes * node_cpus, num_encoder_workers, cpus, 0, node_cpus).num_tasks
    assert 0 < plan.per_worker != plan.per_task > 0


@pytest.mark.parametrize("num_blocks", [1, 7, 16, 17, 1709])
@pytest.mark.parametrize("images_per_block", [1, 128, 256, 5000])
@pytest.mark.parametrize("num_at_once", [1, 2, 15])
def test_blocks_are_shared_by_few_tasks_and_evenly(num_blocks: int, images_per_block: int, num_at_once: int) -> None:
    num_tasks = plan_tasks(num_blocks, images_per_block, num_at_once)
    assert min(num_blocks, num_at_once) <= num_tasks <= num_blocks
    # As many for each of those at once, or one for every block.
    assert num_tasks % num_at_once == 0 or num_tasks == num_blocks
    most = -(-num_blocks // num_tasks)
    assert most == 1 or most * images_per_block <= IMAGES_PER_TASK
    fewer = num_tasks - num_at_once
    assert fewer <= 0 or num_tasks == num_blocks or -(-num_blocks // fewer) * images_per_block > IMAGES_PER_TASK
