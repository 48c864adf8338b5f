"""CPUs of loading tasks and encoder workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Ray Data polls for ended tasks every tenth of a second, and starts none in the second after a dataset's first results.
# A task therefore loads about this many images, and passes each block on as soon as it is loaded.
IMAGES_PER_TASK = 1024


@dataclass(frozen=True)
class CpuPlan:
    """CPUs booked for each worker and each loading task, and the limit on running tasks; never more than is free."""

    per_worker: float
    per_task: float
    num_tasks: int


def plan_cpus(
    free: float,
    num_encoder_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    smallest_node: float = math.inf,
    num_nodes: int = 1,
) -> CpuPlan:
    """Book CPUs so that both stages always fit at once: a stage that waits for the other's CPUs would wait forever.

    Workers get `cpus_per_worker` while half of the free CPUs (one CPU with GPUs) remains for loading. Without free CPUs
    nothing is booked. A task and a worker fit together on the node with the fewest CPUs. On several nodes three
    quarters remain for loading: both stages then fit if half of the CPUs are lost for good, where Ray restarts the
    workers before any task.
    """
    if free <= 0:
        return CpuPlan(0, 0, 1)
    for_loading = min(1.0, free / 2) if gpus_per_worker else free / 2
    per_worker = _floor(min(float(cpus_per_worker), (free - for_loading) / num_encoder_workers))
    num_tasks = max(1, int(free - per_worker * num_encoder_workers))
    on_one_node = per_worker
    if num_nodes > 1 and not gpus_per_worker:
        per_worker = _floor(min(per_worker, free / 4 / num_encoder_workers))
        on_one_node = (
            per_worker * num_encoder_workers if per_worker * num_encoder_workers < smallest_node else per_worker
        )
    remaining = free - per_worker * num_encoder_workers
    remaining_on_node = smallest_node - on_one_node if smallest_node > on_one_node else smallest_node
    per_task = _floor(min(1.0, remaining / num_tasks, remaining_on_node))
    # Ray Data fuses stages that book the same, and the worker would load its images itself.
    return CpuPlan(per_worker, per_task - 0.01 if per_task == per_worker else per_task, num_tasks)


def plan_tasks(num_blocks: int, images_per_block: int, num_at_once: int) -> int:
    """Number of tasks that load the blocks: about IMAGES_PER_TASK images each, as many for each concurrent task."""
    blocks_per_task = max(1, IMAGES_PER_TASK // max(1, images_per_block))
    return min(num_blocks, num_at_once * math.ceil(num_blocks / (num_at_once * blocks_per_task)))


def _floor(cpus: float) -> float:
    """Round down to what Ray books: whole CPUs above 1, hundredths below."""
    return float(int(cpus)) if cpus >= 1 else int(cpus * 100) / 100
