"""One run at a time in a sweep's folder: a file names the process that works there and its last heartbeat."""

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
from imbvlm.base.json_file import damage_named
from imbvlm.sweep.records.lease_file import lease_file

LEASE_FILE = "running.json"
HEARTBEAT_SECONDS = 10.0
# A run on another machine counts as ended after this time without a heartbeat.
HEARTBEAT_TIMEOUT_SECONDS = 120.0
POLL_SECONDS = 2.0
# If several runs start together, one holds the lease after the first attempt, and the others see its file.
MAX_ATTEMPTS = 20
PAUSE_SECONDS = 0.1
# Heartbeats are written in place: padding keeps the file's length while a number has more or fewer digits.
SPARE_BYTES = 16


@dataclass(frozen=True)
class Holder:
    """The process that works in a folder: `place` is its machine's boot and its namespace, `born` its own start.

    Containers may share a host's name and process ids, and ids are reused: only all fields together identify a process.
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
        """This process, holding from now on."""
        pid, now = os.getpid(), time.time()
        return Holder(uuid.uuid4().hex, socket.gethostname(), pid, _place(), _born(pid), now, now)

    @property
    def is_local(self) -> bool:
        """Whether it runs in this process's namespace, so that its end can be observed."""
        return self.place == _place()

    @property
    def is_gone(self) -> bool:
        """Whether it has certainly ended."""
        if not self.is_local:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            # The process exists and belongs to another user.
            pass
        born = _born(self.pid)
        return bool(born and self.born) and born != self.born

    def describe(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"host {self.host}, process {self.pid}, since {since}"


def _place() -> str:
    """An identifier of this machine's boot and of the namespace of process ids, beginning with the host's name."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str:
    """A process's start in clock ticks since boot; "ended" for a zombie, "" if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


class Lease:
    """This process's hold on a sweep's folder; the main thread is interrupted if another run takes the folder."""

    def __init__(self, folder: str, holder: Holder) -> None:
        self._folder, self._uri, self._holder = folder, storage.join(folder, LEASE_FILE), holder
        self._file, self._length = lease_file(self._uri), len(_to_bytes(self._holder)) + SPARE_BYTES
        self._is_mains = threading.current_thread() is threading.main_thread()
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._lost: ImbvlmError | None = None

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the lease, waiting for the timeout of a holder on another machine; raises ImbvlmError if it is held."""
        for _ in range(MAX_ATTEMPTS):
            if self._try(say):
                self._beats.start()
                return
            time.sleep(PAUSE_SECONDS)
        raise ImbvlmError(
            f"other runs try to take {self._folder} at the same time, and none has it. Try again, and if that doesn't "
            f"help, delete {self._uri}."
        )

    def _try(self, say: Callable[[str], None]) -> bool:
        """Whether this process has taken the lease; False if another one acted in between. Raises ImbvlmError."""
        before = self._file.read()
        if before is None:
            return self._file.create(self._content())
        holder = _parse(self._uri, before.data)
        if not holder.is_gone:
            if holder.is_local:
                raise self._still_runs(holder)
            self._outwait(holder, say)
        return self._file.replace(before, holder.token, self._content())

    def check(self) -> None:
        """Raise ImbvlmError if another run has taken the folder, or if the lease's file was deleted."""
        self.check_lost()
        now = _read(self._uri)
        if now is None or now.token != self._holder.token:
            who = "its file was deleted" if now is None else now.describe()
            raise ImbvlmError(
                f"{self._folder} is another run's now ({who}), so this one ends; finished trials are kept."
            )

    @property
    def is_lost(self) -> bool:
        """Whether a heartbeat has seen that another run has the folder."""
        return self._lost is not None

    def check_lost(self) -> None:
        """Raise ImbvlmError if a heartbeat has seen that another run has the folder."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """End the heartbeats and delete the file."""
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join(POLL_SECONDS)
        # A file that can't be deleted names a process that has ended, so the next run may take it.
        with suppress(ImbvlmError):
            self.check()
            storage.delete(self._uri)

    def _outwait(self, holder: Holder, say: Callable[[str], None]) -> None:
        """Wait until a holder on another machine has timed out; raises ImbvlmError if it sends a heartbeat."""
        # The other machine's clock may be ahead.
        silent = max(0.0, time.time() - holder.beat)
        remaining = HEARTBEAT_TIMEOUT_SECONDS - silent
        if remaining <= 0:
            return
        say(
            f"{self._folder} has a run that began elsewhere ({holder.describe()}); its last heartbeat was "
            f"{duration(silent)} ago. Without another one in the next {duration(remaining)} it counts as ended, and "
            f"this run goes on (at once if you know that it has ended and delete {self._uri})"
        )
        until = time.monotonic() + remaining
        while time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            now = _read(self._uri)
            if now is None:
                return
            if now != holder:
                raise self._still_runs(now)

    def _still_runs(self, holder: Holder) -> ImbvlmError:
        return ImbvlmError(
            f"this sweep still runs ({holder.describe()}), and two runs in {self._folder} would disturb each other. "
            f"Wait for its end or end it, then resume; if that process is not a sweep, delete {self._uri}."
        )

    def _content(self) -> bytes:
        self._holder = replace(self._holder, beat=time.time())
        return _to_bytes(self._holder).ljust(self._length)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                # Checked first: a file that another run has taken, or a user deleted or moved, must not come back.
                self.check()
                self._file.renew(self._content())
            except StorageError:
                # The store doesn't answer; if that lasts, saving a record reports it.
                continue
            except ImbvlmError as error:
                self._lost = error
                if self._is_mains and not self._ended.is_set():
                    # Until this run ends, both write the same records.
                    interrupts.interrupt_main()
                return


def is_running(folder: str) -> bool:
    """Whether a sweep runs in a folder, or may: the machine of its last heartbeat may only be out of reach."""
    holder = _read(storage.join(folder, LEASE_FILE))
    return holder is not None and not holder.is_gone


def _read(uri: str) -> Holder | None:
    """The holder that a lease's file names, None without a file; raises ImbvlmError."""
    try:
        return _parse(uri, storage.read_bytes(uri))
    except StorageError:
        if storage.exists(uri):
            raise
        return None


def _to_bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _parse(uri: str, data: bytes) -> Holder:
    with damage_named(f"{uri} is damaged", "Delete it if no run of this sweep is going on."):
        return Holder(**json.loads(data))


@contextmanager
def folder_lease(folder: str, say: Callable[[str], None]) -> Iterator[Lease]:
    """Within, only this process runs the sweep in a folder; raises ImbvlmError if another one does."""
    lease = Lease(folder, Holder.here())
    lease.acquire(say)
    try:
        yield lease
    except BaseException:
        # The lease's own error, not that of the interrupt by which a heartbeat ended the work.
        if lease.is_lost and (signals := interrupts.current()) is not None:
            signals.forget()
        lease.check_lost()
        raise
    finally:
        lease.release()
