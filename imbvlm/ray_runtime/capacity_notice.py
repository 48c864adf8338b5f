"""Tells the user that a cluster lacks machines or is lost, where Ray would wait forever or end without a message."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from imbvlm.base import interrupts
from imbvlm.base.console import LastWord

LOOK_SECONDS = 10.0
# A lost machine may return at once, and a new one takes a moment to join.
PATIENCE_SECONDS = 30.0
SAY_AGAIN_SECONDS = 1800.0
_END_SECONDS = 5.0
# When the cluster is gone Ray may end this process at any call, so that the watch must be faster.
_WATCH_SECONDS = 0.1


class NoticeThrottle:
    """Repeats a notice every SAY_AGAIN_SECONDS, from when its cause has lasted PATIENCE_SECONDS."""

    def __init__(self) -> None:
        self._say_at: float | None = None

    def to_say(self, sentence: str | None) -> str | None:
        """Return the sentence if it is due; call it regularly with the present sentence, or None without a cause."""
        now = time.monotonic()
        if sentence is None:
            self._say_at = None
        elif self._say_at is None:
            self._say_at = now + PATIENCE_SECONDS
        elif now >= self._say_at:
            self._say_at = now + SAY_AGAIN_SECONDS
            return sentence
        return None


def missing_capacity(
    nodes: Sequence[tuple[float, float]], cpus_per_worker: float, gpus: float, cpus_per_task: float
) -> str | None:
    """The reason why a pass makes no progress on machines with these CPUs and GPUs; None where it does.

    The cluster must have space for an encoder worker and a loading task.
    """
    fits = any(node_cpus >= cpus_per_worker and node_gpus >= gpus for node_cpus, node_gpus in nodes)
    num_cpus = sum(cpus for cpus, _ in nodes)
    if fits and num_cpus >= cpus_per_worker + cpus_per_task:
        return None
    needed = f"{cpus_per_worker:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    available = f"{num_cpus:g} CPUs" + (f" and {sum(gpus for _, gpus in nodes):g} GPUs" if gpus else "")
    return (
        f"waiting for a machine: an encoder worker needs {needed} in addition to a loading task's {cpus_per_task:g}, "
        f"and there are {available} in the cluster now"
    )


@contextmanager
def notify_while(lacks: Callable[[], str | None], notify: Callable[[str], None]) -> Iterator[None]:
    """Within, pass the sentence of `lacks` to `notify` while it lasts."""
    ended = threading.Event()

    def watch() -> None:
        throttle = NoticeThrottle()
        while not ended.wait(LOOK_SECONDS):
            if sentence := throttle.to_say(lacks()):
                notify(sentence)

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # The thread calls Ray, which ends a process that calls it after the connection is closed.
        thread.join(_END_SECONDS)


# After a first line it prints the next line, nothing for an empty one, and its own line if this process ends first.
_SHELL = 'read -r _ || exit; read -r line || line=$1; [ -z "$line" ] || printf "%s%s\\n" "$3" "$line" | tee -a "$2"'
_SILENT = (
    "this run was ended without a message: it was killed, perhaps since this machine's memory was full, or by Ray, "
    "which ends it when a Ray process is gone; its logs in /tmp/ray/session_latest/logs may say more"
)


@contextmanager
def ended_when(lost: Callable[[bool], str | None], last_word: LastWord) -> Iterator[None]:
    """Within, end this process with code 1 as soon as `lost` returns a sentence, which is printed last.

    `lost` gets whether an error has occurred, of which a lost cluster may be the cause. An exception is not enough: a
    call of Ray that waits for a lost cluster can't be interrupted. Ray itself ends the process from C++, with code 1,
    after a minute or when a raylet is called; a shell outside this process then prints the last sentence.
    """
    shell = subprocess.Popen(
        ["sh", "-c", _SHELL, "sh", last_word.text(_SILENT), last_word.copy, last_word.before],
        stdin=subprocess.PIPE, stdout=last_word.descriptor, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert shell.stdin is not None
    ended, ending, to_shell = threading.Event(), threading.Lock(), shell.stdin.fileno()

    def send_empty_line() -> None:
        with suppress(OSError):
            os.write(to_shell, b"\n")

    def tell_shell(line: str) -> None:
        with suppress(OSError, subprocess.TimeoutExpired):
            shell.communicate(f"{line}\n".encode(), timeout=_END_SECONDS)

    def end_if_lost(*, failed: bool) -> None:
        with ending:
            if sentence := lost(failed):
                tell_shell(last_word.text(sentence))
                os._exit(1)

    def watch() -> None:
        while not ended.wait(_WATCH_SECONDS):
            end_if_lost(failed=False)

    thread, signals = threading.Thread(target=watch, name="cluster", daemon=True), interrupts.current()
    try:
        # Sent here, within the try block: a Ctrl-C before it would leave the shell behind.
        send_empty_line()
        thread.start()
        if signals is not None:
            # The handler of a signal prints its own last sentence.
            signals.before_leaving = send_empty_line
        yield
    except Exception:
        end_if_lost(failed=True)
        raise
    finally:
        with interrupts.held():
            ended.set()
            if thread.is_alive():
                thread.join(_END_SECONDS)
            if signals is not None:
                signals.before_leaving = None
            tell_shell("")
