"""When and how it is said that a cluster lacks machines: Ray waits for them without a word, for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

LOOK_SECONDS = 10.0
# A machine may be back at once, and a new one takes a moment until it is known.
PATIENCE_SECONDS = 30.0
SAY_AGAIN_SECONDS = 1800.0
_END_SECONDS = 5.0


class Patience:
    """Decides when a lack is said: once it has lasted for PATIENCE_SECONDS, and then every SAY_AGAIN_SECONDS."""

    def __init__(self) -> None:
        self._say_at: float | None = None

    def to_say(self, sentence: str | None) -> str | None:
        """The sentence where it is to be said now; told again and again what lacks, None for nothing."""
        now = time.monotonic()
        if sentence is None:
            self._say_at = None
        elif self._say_at is None:
            self._say_at = now + PATIENCE_SECONDS
        elif now >= self._say_at:
            self._say_at = now + SAY_AGAIN_SECONDS
            return sentence
        return None


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
        "in the cluster now"
    )


@contextmanager
def said_while(lacks: Callable[[], str | None], say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` what `lacks` gives where it lasts."""
    ended = threading.Event()

    def watch() -> None:
        patience = Patience()
        while not ended.wait(LOOK_SECONDS):
            if sentence := patience.to_say(lacks()):
                say(sentence)

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # It asks Ray, which ends a process that asks behind the end of its connection.
        thread.join(_END_SECONDS)
