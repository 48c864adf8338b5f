"""How many CPUs loading tasks and encoder workers take."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Ray Data looks every tenth of a second for tasks that have ended, and starts none after the first results of a dataset
# until a second is over. So a task loads about this many images, and hands on each block as soon as it is loaded.
IMAGES_PER_TASK = 1024


@dataclass(frozen=True)
class CpuPlan:
    """CPUs booked for each worker and each loading task, and how many tasks may run: never above what is free."""

    per_worker: float
    per_task: float
    num_tasks: int


def plan_cpus(
    free: float,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    smallest_node: float = math.inf,
    num_nodes: int = 1,
) -> CpuPlan:
    """Book CPUs so that both stages always fit at once: a stage that waits for the other's CPUs would wait for ever.

    Workers get what they ask for as long as half of the free CPUs is left for loading (one CPU, with GPUs); on a
    machine without free CPUs nothing is booked. A task fits beside a worker on the node with the fewest CPUs. On
    several nodes it is three quarters, so that both stages fit on what is left where half of the CPUs go away for good:
    Ray starts the workers again there before any task.
    """
    if free <= 0:
        return CpuPlan(0, 0, 1)
    left_for_loading = min(1.0, free / 2) if gpus_per_worker else free / 2
    per_worker = _floor(min(float(cpus_per_worker), (free - left_for_loading) / num_workers))
    num_tasks = max(1, int(free - per_worker * num_workers))
    together = per_worker
    if num_nodes > 1 and not gpus_per_worker:
        per_worker = _floor(min(per_worker, free / 4 / num_workers))
        together = per_worker * num_workers if per_worker * num_workers < smallest_node else per_worker
    left = free - per_worker * num_workers
    beside = smallest_node - together if smallest_node > together else smallest_node
    per_task = _floor(min(1.0, left / num_tasks, beside))
    # Stages that book the same are fused by Ray Data, and the worker would load its images itself.
    return CpuPlan(per_worker, per_task - 0.01 if per_task == per_worker else per_task, num_tasks)


def plan_tasks(num_blocks: int, images_per_block: int, num_at_once: int) -> int:
    """How many tasks load so many blocks: of IMAGES_PER_TASK or fewer, and as many for each of those at once."""
    blocks_per_task = max(1, IMAGES_PER_TASK // max(1, images_per_block))
    return min(num_blocks, num_at_once * math.ceil(num_blocks / (num_at_once * blocks_per_task)))


def _floor(cpus: float) -> float:
    """Ray books CPUs in steps of 0.0001; whole CPUs above 1, as it wants."""
    return float(int(cpus)) if cpus >= 1 else int(cpus * 100) / 100
