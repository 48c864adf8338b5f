"""Object stores that have stopped answering this process; all calls share the wait for a store."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Limit on the wait for a store that does not answer.
OUTAGE_SECONDS = 90.0
# Pause before a store is tried again after its wait has ended: a call to a store that refuses connections took 3-17 s.
ASK_AGAIN_SECONDS = 30.0


@dataclass
class _Outage:
    """Start of a store's outage, the kinds of calls that it does not answer, and the last failure."""

    since: float
    kinds: set[str] = field(default_factory=set)
    failed_at: float = 0.0
    error: str = ""
    is_given_up: bool = False


# A store's name, followed by the settings of the client that calls it.
Store = tuple[str, ...]


class Outages:
    """The stores that don't answer now; `say` is called when one stops answering and when it answers again.

    Reading and writing (`kind`) are counted separately: a full store answers one and not the other.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], None] = _say_on_stderr
        self._lock = threading.Lock()
        self._outages: dict[Store, _Outage] = {}

    def check(self, store: Store, kind: str) -> None:
        """Raise ConnectionError where the wait for the store has ended and a call has failed just now."""
        with self._lock:
            outage = self._outages.get(store)
            if outage is None or kind not in outage.kinds or not outage.is_given_up:
                return
            if time.monotonic() - outage.failed_at < ASK_AGAIN_SECONDS:
                raise ConnectionError(outage.error)

    def failed(self, store: Store, kind: str, error: OSError, wait: float) -> float:
        """Record a failed call that would be retried after `wait` seconds.

        Returns the time.monotonic() until which calls wait for the store; -inf once the wait has ended.
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
        """Record an answered call."""
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
        """Within, report to `say` in place of standard error."""
        before, self.say = self.say, say
        try:
            yield
        finally:
            self.say = before


def _say_on_stderr(sentence: str) -> None:
    print(f"imbvlm: {sentence}", file=sys.stderr, flush=True)
