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

from imbvlm.base import interrupts, storage
from imbvlm.base.errors import ImbvlmError, StorageError
from imbvlm.base.formatting import duration
from imbvlm.sweep.records.lease_file import lease_file

LEASE_FILE = "running.json"
HEARTBEAT_SECONDS = 10.0
# A run that can't be looked at from here has ended when it has been silent for so long.
HEARTBEAT_TIMEOUT_SECONDS = 120.0
LOOK_SECONDS = 2.0
# Of several that start together one has it after the first attempt, and the others find it with that one.
ATTEMPTS = 20
PAUSE_SECONDS = 0.1
# The file keeps its length when its last number has another one, since it is written in place.
SPARE_BYTES = 16


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
    """A folder's file in the hands of this process; where it finds another one's there, or none, the process ends."""

    def __init__(self, folder: str) -> None:
        self._folder, self._uri, self._holder = folder, storage.join(folder, LEASE_FILE), Holder.here()
        self._file, self._length = lease_file(self._uri), len(_to_bytes(self._holder)) + SPARE_BYTES
        self._is_mains = threading.current_thread() is threading.main_thread()
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._lost: ImbvlmError | None = None

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take it where nobody has it, or wait whether one that can't be looked at has ended; raises ImbvlmError."""
        for _ in range(ATTEMPTS):
            if self._try(say):
                self._beats.start()
                return
            time.sleep(PAUSE_SECONDS)
        raise ImbvlmError(
            f"other runs are taking {self._folder} at this moment, and none has it; try again, and if that doesn't "
            f"help delete {self._uri}"
        )

    def _try(self, say: Callable[[str], None]) -> bool:
        """Whether this process has got it; another one acted in between otherwise. Raises ImbvlmError."""
        before = self._file.read()
        if before is None:
            return self._file.create(self._content())
        holder = _parse(self._uri, before.data)
        if not holder.is_gone:
            if holder.is_seen:
                raise self._still_runs(holder)
            self._outwait(holder, say)
        return self._file.replace(before, holder.token, self._content())

    def check(self) -> None:
        """Raises ImbvlmError where another run has taken the folder meanwhile, or the file was deleted for one."""
        self.check_lost()
        now = _read(self._uri)
        if now is None or now.token != self._holder.token:
            who = "its file was deleted" if now is None else now.describe()
            raise ImbvlmError(f"{self._folder} is another run's now ({who}), so this one ends; what it found is kept")

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    def check_lost(self) -> None:
        """Raises ImbvlmError where a heartbeat has found that."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
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
        left = HEARTBEAT_TIMEOUT_SECONDS - silent
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

    def _content(self) -> bytes:
        self._holder = replace(self._holder, beat=time.time())
        return _to_bytes(self._holder).ljust(self._length)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                # Looked at first: what another run has taken, or a user deleted or moved, must not come back.
                self.check()
                self._file.renew(self._content())
            except StorageError:
                # The store is away; if that lasts, those who want to keep a record say so.
                continue
            except ImbvlmError as error:
                self._lost = error
                if self._is_mains and not self._ended.is_set():
                    # Until it ends both would write the same records.
                    interrupts.interrupt_main()
                return


def _read(uri: str) -> Holder | None:
    """Who works in a folder; None where nobody does. Raises ImbvlmError."""
    try:
        return _parse(uri, storage.read_bytes(uri))
    except StorageError:
        if storage.exists(uri):
            raise
        return None


def _to_bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _parse(uri: str, data: bytes) -> Holder:
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise ImbvlmError(f"{uri} is damaged ({error}); delete it if no run of this sweep is going on") from None


@contextmanager
def folder_lease(folder: str, say: Callable[[str], None]) -> Iterator[Lease]:
    """Within, this process alone runs the sweep in a folder; raises ImbvlmError where another one does."""
    lease = Lease(folder)
    lease.acquire(say)
    try:
        yield lease
    except BaseException:
        # Its own sentence, not that of what ended the work for it.
        if lease.is_lost and (signals := interrupts.current()) is not None:
            signals.forget()
        lease.check_lost()
        raise
    finally:
        lease.release()
