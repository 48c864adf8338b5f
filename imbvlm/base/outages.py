"""Object stores that have stopped answering this process: each is waited for once, whichever calls ask it."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# So long a store that has gone away is waited for when files are read, written or looked for.
OUTAGE_SECONDS = 90.0
# A store that was given up is asked again this often at most: a call to one that refuses connections took 3 to 17 s.
ASK_AGAIN_SECONDS = 30.0


@dataclass
class _Outage:
    """Since when a store hasn't answered, which kinds of calls it hasn't answered, and the last one that failed."""

    since: float
    kinds: set[str] = field(default_factory=set)
    failed_at: float = 0.0
    error: str = ""
    is_given_up: bool = False


# A store's name, and behind it what the client that asks was made with.
Store = tuple[str, ...]


class Outages:
    """The stores that don't answer now; `say` is told when one stops answering and when it answers again.

    Reading and writing (`kind`) are kept apart: a store that is full answers one and not the other.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], None] = _say_on_stderr
        self._lock = threading.Lock()
        self._outages: dict[Store, _Outage] = {}

    def check(self, store: Store, kind: str) -> None:
        """Raises ConnectionError where the store was given up and has been asked again just now."""
        with self._lock:
            outage = self._outages.get(store)
            if outage is None or kind not in outage.kinds or not outage.is_given_up:
                return
            if time.monotonic() - outage.failed_at < ASK_AGAIN_SECONDS:
                raise ConnectionError(outage.error)

    def failed(self, store: Store, kind: str, error: OSError, wait: float) -> float:
        """A call was not answered, and would ask again after `wait` seconds.

        Gives the time.monotonic() until which the store is waited for; -inf once a call has given it up.
        """
        now = time.monotonic()
        with self._lock:
            is_new = store not in self._outages
            outage = self._outages.setdefault(store, _Outage(now))
            outage.kinds.add(kind)
            outage.failed_at, outage.error = now, str(error)
            outage.is_given_up |= now + wait > outage.since + OUTAGE_SECONDS
        if is_new:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + OUTAGE_SECONDS))
            self.say(f"{store[0]} doesn't answer; it is waited for until {until}")
        return -math.inf if outage.is_given_up else outage.since + OUTAGE_SECONDS

    def answered(self, store: Store, kind: str) -> None:
        """A call was answered."""
        with self._lock:
            outage = self._outages.get(store)
            if outage is None:
                return
            outage.kinds.discard(kind)
            if outage.kinds:
                return
            del self._outages[store]
        self.say(f"{store[0]} answers again, after {time.monotonic() - outage.since:.0f} s")

    @contextmanager
    def said_by(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within, `say` is told instead of standard error."""
        before, self.say = self.say, say
        try:
            yield
        finally:
            self.say = before


def _say_on_stderr(sentence: str) -> None:
    print(f"imbvlm: {sentence}", file=sys.stderr, flush=True)
