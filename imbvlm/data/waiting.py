"""Says what a pass over images waits for where its cluster has lost machines: Ray Data waits without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

LOOK_SECONDS = 10.0
# A machine may be back at once, and a new one takes a moment until it is known.
PATIENCE_LOOKS = 3
_END_SECONDS = 5.0


def lacking(
    nodes: Sequence[tuple[float, float]], cpus_per_worker: float, gpus: float, cpus_per_task: float
) -> str | None:
    """Why no image goes on by CPUs and GPUs of the machines that are there; None where one does.

    A tower worker and a loading task must both find room.
    """
    fits = any(has_cpus >= cpus_per_worker and has_gpus >= gpus for has_cpus, has_gpus in nodes)
    in_all = sum(cpus for cpus, _ in nodes)
    if fits and in_all >= cpus_per_worker + cpus_per_task:
        return None
    wanted = f"{cpus_per_worker:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    has = f"there are {in_all:g} CPUs" + (f" and {sum(gpus for _, gpus in nodes):g} GPUs" if gpus else "")
    return (
        f"waiting for a machine: a tower worker needs {wanted} beside a loading task's {cpus_per_task:g}, and {has} "
        "in the cluster now; what was computed is kept, so it can be ended and started again for what there is"
    )


@contextmanager
def said_while(lacks: Callable[[], str | None], say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` again and again what `lacks` gives, once it has given something PATIENCE_LOOKS times in a row."""
    ended = threading.Event()

    def watch() -> None:
        in_a_row = 0
        while not ended.wait(LOOK_SECONDS):
            sentence = lacks()
            in_a_row = 0 if sentence is None else in_a_row + 1
            if sentence is not None and in_a_row >= PATIENCE_LOOKS:
                say(sentence)

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # It asks Ray, which ends a process that asks behind the end of its connection.
        thread.join(_END_SECONDS)
