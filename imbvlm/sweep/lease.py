"""One run at a time in a sweep's folder: a file says which process works there, and when it was last heard of."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from imbvlm import storage
from imbvlm.errors import ImbvlmError, StorageError
from imbvlm.sweep.console import duration

LEASE_FILE = "running.json"
BEAT_SECONDS = 30.0
# A run that can't be looked at from here has ended when it has been silent for so long.
SILENT_SECONDS = 120.0
LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """The process that works in a folder: `place` is its machine's start and its namespace, `born` its own start.

    Containers may share a host's name and numbers of processes, and a number is given again: together these are one
    process and no other.
    """

    token: str
    host: str
    pid: int
    place: str
    born: str
    since: float
    beat: float

    @staticmethod
    def here() -> Holder:
        """This process, from now on."""
        pid, now = os.getpid(), time.time()
        return Holder(uuid.uuid4().hex, socket.gethostname(), pid, _place(), _born(pid), now, now)

    @property
    def is_seen(self) -> bool:
        """Whether it ran where this process can look at it."""
        return self.place == _place()

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended."""
        if not self.is_seen:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            # Somebody else's: it is there.
            pass
        born = _born(self.pid)
        return bool(born and self.born) and born != self.born

    def describe(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"host {self.host}, process {self.pid}, since {since}"


def _place() -> str:
    """This machine since its start, and this process's namespace of processes; the host's name is in it, too."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str:
    """When a process began, in its machine's own count; "ended" for one that nobody has waited for, "" if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


class Lease:
    """A folder's file in the hands of this process, until it finds another one's there, or none."""

    def __init__(self, folder: str) -> None:
        self._folder, self._uri, self._holder = folder, storage.join(folder, LEASE_FILE), Holder.here()
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self, say: Callable[[str], None]) -> None:
        """Take it where nobody has it, or wait whether one that can't be looked at has ended; raises ImbvlmError."""
        found = _read(self._uri)
        if found is not None and not found.is_gone:
            if found.is_seen:
                raise self._still_runs(found)
            self._outwait(found, say)
        self._write()
        # Of two that began together, the one that wrote last has it.
        now = _read(self._uri)
        if now is not None and now.token != self._holder.token:
            raise self._still_runs(now)
        self._beats.start()

    def check(self) -> None:
        """Raises ImbvlmError where another run has taken the folder meanwhile, or the file was deleted for one."""
        now = _read(self._uri)
        if now is None or now.token != self._holder.token:
            who = "its file was deleted" if now is None else now.describe()
            raise ImbvlmError(f"{self._folder} is another run's now ({who}), so this one ends; what it found is kept")

    def give_back(self) -> None:
        """Nobody works here any more."""
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join(LOOK_SECONDS)
        # Where it can't be deleted it still tells of a process that has ended.
        with suppress(ImbvlmError):
            self.check()
            storage.delete(self._uri)

    def _outwait(self, found: Holder, say: Callable[[str], None]) -> None:
        """Wait until a run that can't be looked at has been silent for too long; raises ImbvlmError if it isn't."""
        # By another machine's clock it may have been in the future.
        silent = max(0.0, time.time() - found.beat)
        left = SILENT_SECONDS - silent
        if left <= 0:
            return
        say(
            f"{self._folder} has a run that began elsewhere ({found.describe()}), of which the last was heard "
            f"{duration(silent)} ago; without a word of it in the next {duration(left)} it has ended, and this run "
            f"goes on (at once if you know that it has ended, and delete {self._uri})"
        )
        until = time.monotonic() + left
        while time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            now = _read(self._uri)
            if now is None:
                return
            if now != found:
                raise self._still_runs(now)

    def _still_runs(self, holder: Holder) -> ImbvlmError:
        return ImbvlmError(
            f"this sweep still runs ({holder.describe()}), and two runs in {self._folder} would disturb each other; "
            f"wait for its end or end it, then go on (if that process is none of a sweep, delete {self._uri})"
        )

    def _write(self) -> None:
        self._holder = replace(self._holder, beat=time.time())
        storage.write_bytes(self._uri, json.dumps(asdict(self._holder), indent=1).encode())

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                # Looked at first: what another run has taken, or a user deleted or moved, must not come back.
                self.check()
                self._write()
            except StorageError:
                # The store is away; if that lasts, those who want to keep a record say so.
                continue
            except ImbvlmError:
                return


def _read(uri: str) -> Holder | None:
    """Who works in a folder; None where nobody does. Raises ImbvlmError."""
    try:
        return Holder(**json.loads(storage.read_bytes(uri)))
    except StorageError:
        if storage.exists(uri):
            raise
        return None
    except (ValueError, TypeError) as error:
        raise ImbvlmError(f"{uri} is damaged ({error}); delete it if no run of this sweep is going on") from None


@contextmanager
def held(folder: str, say: Callable[[str], None]) -> Iterator[Lease]:
    """Within, this process alone runs the sweep in a folder; raises ImbvlmError where another one does."""
    lease = Lease(folder)
    lease.take(say)
    try:
        yield lease
    finally:
        lease.give_back()
