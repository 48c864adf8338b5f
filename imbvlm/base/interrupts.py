"""Ctrl-C and SIGTERM end a command with a sentence and exit code 130 or 143, also where a library catches exceptions.

The handler records the signal and raises KeyboardInterrupt. Within `held` only `check` raises it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

HANDLED = (signal.SIGINT, signal.SIGTERM)
# Kubernetes and Slurm kill a process 30 s after SIGTERM, so that it must end before.
GRACE_SECONDS = 8.0
# A second signal ends the process at once. Launchers forward a signal twice within milliseconds.
AGAIN_SECONDS = 1.0
CHECK_SECONDS = 0.2


class Interrupts:
    """The handler of both signals; a thread ends the process where the main thread is stuck in a call."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        # The folder of the running sweep. Without one a signal during an import ends the process at once.
        self.folder: str | None = None
        # Whether the last sentence is printed and the process is about to end.
        self.is_told = False
        # Called before an immediate exit, which runs no `finally`.
        self.before_leaving: Callable[[], None] | None = None
        self._num_held = 0
        self._before: dict[signal.Signals, object] = {}
        self._reader = self._writer = self._stderr = -1

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if self._num_held:
            return
        if self.folder is None and _is_importing(frame):
            self._leave(self.received)
        raise KeyboardInterrupt

    @property
    def handled(self) -> list[signal.Signals]:
        """The signals that this process doesn't ignore."""
        return list(self._before)

    @property
    def sentence(self) -> str:
        """The sentence for the user."""
        return f"interrupted{' by SIGTERM' if self.received is signal.SIGTERM else ''}"

    @property
    def exit_code(self) -> int:
        """The shell's code for a process that a signal has ended."""
        return 128 + (self.received or signal.SIGINT)

    def outlast(self, call: Callable[[], int]) -> int | None:
        """The result of a call; None after a signal, also where a library made another error of it or continued."""
        try:
            code = call()
        except KeyboardInterrupt:
            self.received = self.received or signal.SIGINT
            return None
        except Exception:
            if self.received is None:
                raise
            return None
        return code if self.received is None or self.is_told else None

    def end(self) -> None:
        """Mark the process as about to end: a further signal raises nothing."""
        self._num_held += 1
        self.is_told = True

    def finish(self) -> None:
        """Exit after SIGTERM at once: Ray's processes may have had it too, and without them Ray's shutdown hangs."""
        if self.received is signal.SIGTERM:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                # A pipe may have lost its reader.
                with suppress(OSError):
                    stream.flush()
            os._exit(self.exit_code)

    def forget(self) -> None:
        """Drop a signal that this process sent itself after its last sentence."""
        self.received = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within, only record a signal; raises KeyboardInterrupt at the end if one came."""
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1
            if self.received is not None:
                raise KeyboardInterrupt

    def install(self) -> None:
        """Handle the signals that this process doesn't ignore; for the main thread."""
        handlers = {number: signal.getsignal(number) for number in HANDLED}
        self._before = {number: old for number, old in handlers.items() if old is not signal.SIG_IGN}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._stderr = os.dup(2) if sys.stderr is not None else os.open(os.devnull, os.O_WRONLY)
        # Set before the handlers, so that the thread sees every signal.
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        self.own()

    def own(self) -> None:
        """Set the handlers, also after a library has replaced them."""
        for number in self._before:
            signal.signal(number, self)

    def remove(self) -> None:
        """Restore the previous handlers; after a SIGTERM the limit of GRACE_SECONDS stays."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(-1)
        os.close(self._writer)

    def _watch(self) -> None:
        """End the process at a second signal, and GRACE_SECONDS after a SIGTERM.

        Python calls a handler between two instructions of the main thread. A library's call can delay that for minutes,
        such as a read from a store that doesn't answer.
        """
        first, first_at = signal.SIGINT, 0.0
        deadline: float | None = None
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], remaining)[0]:
                self._leave(first)
            numbers = os.read(self._reader, 64)
            if not numbers:
                if deadline is None:
                    os.close(self._reader)
                    os.close(self._stderr)
                    return
                time.sleep(max(0.0, deadline - time.monotonic()))
                self._leave(first)
            now = time.monotonic()
            for number in set(numbers).intersection(HANDLED):
                if not first_at:
                    first, first_at = signal.Signals(number), now
                elif now - first_at > AGAIN_SECONDS:
                    self._leave(first)
                if number == signal.SIGTERM and deadline is None:
                    deadline = now + GRACE_SECONDS

    def _leave(self, first: signal.Signals) -> None:
        self.received = first
        if not self.is_told:
            how = "" if self.folder is None else f"; go on with: imbvlm sweep resume {self.folder}"
            text = f"\nimbvlm: {self.sentence}{how}\n"
            # The terminal may be gone.
            with suppress(OSError):
                os.write(self._stderr, text.encode())
        if self.before_leaving is not None:
            self.before_leaving()
        os._exit(self.exit_code)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def current() -> Interrupts | None:
    """The Interrupts that handles this process's signals, if any."""
    handlers = [signal.getsignal(number) for number in HANDLED]
    return next((handler for handler in handlers if isinstance(handler, Interrupts)), None)


def check() -> None:
    """Raise KeyboardInterrupt in the main thread after a signal that a library has swallowed."""
    handler = current()
    if handler is not None and handler.received is not None and _is_main_thread():
        raise KeyboardInterrupt


def sleep(seconds: float) -> None:
    """Sleep, also within `held`, until a signal comes."""
    until = time.monotonic() + seconds
    while (remaining := until - time.monotonic()) > 0:
        check()
        time.sleep(min(remaining, CHECK_SECONDS))


def interrupt_main() -> None:
    """Raise KeyboardInterrupt in the main thread from another thread, as a signal does."""
    handler, main = current(), threading.main_thread().ident
    number = signal.SIGINT if handler is None else next(iter(handler.handled), None)
    if main is not None and number is not None:
        signal.pthread_kill(main, number)


@contextmanager
def handled() -> Iterator[Interrupts]:
    """Within, handle this process's signals; has an effect in the main thread only."""
    handler = current() or Interrupts()
    is_new = _is_main_thread() and current() is None
    if is_new:
        handler.install()
    try:
        yield handler
    finally:
        if handler.is_told and _is_program(sys.modules["__main__"].__dict__):
            handler.finish()
        elif is_new:
            handler.remove()


@contextmanager
def held() -> Iterator[None]:
    """Within, signals wait: a library's `except BaseException` would turn KeyboardInterrupt into a logged error.

    Raises KeyboardInterrupt at the end if a signal came.
    """
    if not _is_main_thread():
        yield
        return
    with handled() as handler, handler.hold():
        yield


def from_first_line() -> None:
    """Handle the signals from now on where a program's own file has imported the caller, a module.

    A notebook keeps its handlers, and so does a program that imports the module indirectly.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    is_ours = frame is not None and frame.f_globals.get("__name__") == "__main__" and _is_program(frame.f_globals)
    if not is_ours or not _is_main_thread() or current() is not None:
        return
    handler, before = Interrupts(), sys.excepthook

    def say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, traceback)
            return
        if not handler.is_told:
            print(f"\nimbvlm: {handler.sentence}", file=sys.stderr)
        raise SystemExit(handler.exit_code)

    sys.excepthook = say
    handler.install()


def _is_program(main: dict[str, object]) -> bool:
    """Whether `__main__` is a file, unlike in a notebook or an interactive session."""
    return "__file__" in main
