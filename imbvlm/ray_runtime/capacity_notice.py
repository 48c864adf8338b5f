"""Says that a cluster lacks machines, or that it is gone: Ray waits for ever without a word, or ends without one."""

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
# A machine may be back at once, and a new one takes a moment until it is known.
PATIENCE_SECONDS = 30.0
SAY_AGAIN_SECONDS = 1800.0
_END_SECONDS = 5.0
# Once its cluster is gone Ray may end this process at any call, so that it must be seen at once.
_WATCH_SECONDS = 0.1


class NoticeThrottle:
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


def missing_capacity(
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
def notify_while(lacks: Callable[[], str | None], say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` what `lacks` gives where it lasts."""
    ended = threading.Event()

    def watch() -> None:
        patience = NoticeThrottle()
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


# From the first line that it is sent on: it says the next one, nothing for an empty one, and its own where this process
# ends and has sent none.
_SHELL = 'read -r _ || exit; read -r line || line=$1; [ -z "$line" ] || printf "%s%s\\n" "$3" "$line" | tee -a "$2"'
_SILENT = (
    "this run was ended without a word: it was killed, perhaps since this machine's memory was full, or Ray has ended "
    "it, as it does where one of its own processes is gone; its logs in /tmp/ray/session_latest/logs may say more"
)


@contextmanager
def ended_when(lost: Callable[[bool], str | None], last_word: LastWord) -> Iterator[None]:
    """Inside, this process ends with code 1 as soon as `lost` gives a sentence, which is its last word.

    `lost` is told whether an error has come meanwhile, of which it may be the cause. No exception would do: a call of
    Ray that waits for a cluster that is gone can't be interrupted. And Ray itself ends the process from C++, with code
    1, after a minute or as soon as a raylet is asked; a shell outside it has the last word then.
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
        # Now, since a Ctrl-C before this line leaves the shell behind.
        send_empty_line()
        thread.start()
        if signals is not None:
            # What ends this process at once at a signal has said so itself.
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
