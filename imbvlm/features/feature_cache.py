"""A machine's own copies of stored features that lie elsewhere: fetched once, bounded, the longest unused goes first.

What is copied is one output of one store, a folder. Beside its copy lie two files that processes lock (the kernel lets
go of a lock when its process ends, however it ends): `.fetch` while files are brought, `.use` shared by all readers.
Who waits for room holds nothing of what it asks for: two never wait for each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, field_validator

from imbvlm.base import storage
from imbvlm.base.errors import StorageError
from imbvlm.base.formatting import size_text
from imbvlm.base.schema import Section
from imbvlm.base.storage import FileState

# Of the disk, where no limit is set.
MAX_DISK_FRACTION = 0.8
FETCHES_AT_ONCE = 8
# So long a trial waits for room that others use: they may be about to end.
WAIT_SECONDS = 600.0
_SIZE_FILE = "bytes"

# Brings a file of the source, by its name, to a path; raises ImbvlmError where what came isn't whole.
Fetch = Callable[[str, Path], None]


class CacheFullError(StorageError):
    """A machine that can't keep a copy, or not yet: another try, there or elsewhere, may go well."""


class CacheRequest(NamedTuple):
    """A folder of which a copy is wanted: its files as they are now, and what brings them."""

    source: str
    files: Mapping[str, FileState]
    fetch: Fetch

    @property
    def num_bytes(self) -> int:
        return sum(state.size for state in self.files.values())

    def lacking(self, folder: Path) -> list[str]:
        """Files that a copy hasn't got as they are now."""
        return [name for name, state in self.files.items() if not _is_copy(folder / name, state)]


class Copies(Section):
    """Where each machine keeps its copies of features, and how much of its disk they may take."""

    folder: str | None = Field(None, description="on each machine's own disk; null: imbvlm-features-UID in /tmp")
    max_gigabytes: float | None = Field(None, gt=0, description="on each machine; null: 80 % of that disk")
    of_shared_folders: bool | Literal["auto"] = Field(
        "auto",
        description="copy from a file system that machines share, too; auto: where there are several, to those "
        "that have a disk for it; from an object store it is always so",
    )

    @field_validator("folder")
    @classmethod
    def _same_everywhere(cls, folder: str | None) -> str | None:
        if folder is not None and not (folder.startswith(("/", "~")) and storage.is_local(folder)):
            raise ValueError(f"folder is {folder!r}, which isn't a place on each machine; give a path from / or ~ on")
        return folder

    def needed_for(self, uri: str, *, many_machines: bool) -> bool:
        """Whether trials read a copy of what lies there."""
        of_shared = many_machines if self.of_shared_folders == "auto" else self.of_shared_folders
        return of_shared or not storage.is_local(uri)

    def check_disk(self) -> None:
        """Raise CacheFullError where nobody asked for copies and this machine has no disk for them.

        Copies in memory would take that of trials, and those in a container's own layer or on a network help nobody.
        """
        there = next(one for one in (self.root, *self.root.parents) if one.exists())
        # What is no block device has no major number.
        if self.of_shared_folders == "auto" and os.major(there.stat().st_dev) == 0:
            raise CacheFullError(
                f"{self.root} on {socket.gethostname()} isn't on a disk of this machine; set feature_copies.folder to "
                "one, or feature_copies.of_shared_folders to true or false"
            )

    @property
    def root(self) -> Path:
        if self.folder is not None:
            return Path(os.path.abspath(storage.local_path(self.folder)))
        return Path(tempfile.gettempdir()) / f"imbvlm-features-{os.getuid()}"

    def limit_bytes(self) -> int:
        """How much the copies on this machine may take together."""
        room = sum(map(_bytes_on_disk, self._held())) + (storage.free_bytes(str(self.root)) or 0)
        return int(room * MAX_DISK_FRACTION if self.max_gigabytes is None else min(self.max_gigabytes * 1e9, room))

    def check_fits(self, source: str, num_bytes: int, *, here: bool = True) -> None:
        """Raise CacheFullError where no copy of so many bytes can fit on a machine; without `here` by the limit."""
        limit = self.limit_bytes() if here else (self.max_gigabytes or math.inf) * 1e9
        if num_bytes > limit:
            where = f" on {socket.gethostname()}" if here else ""
            raise CacheFullError(
                f"{source} has {size_text(num_bytes)}, and the copies of features{where} may take {size_text(limit)} "
                f"of {self.root}; set feature_copies.max_gigabytes higher or feature_copies.folder "
                "to a larger disk, or lower features.num_views or features.precision"
            )

    def pin(self, wanted: Sequence[CacheRequest], *, wait_seconds: float | None = None) -> list[PinnedCopy]:
        """This machine's copies of some folders, all or none, whole and as they are now; each stays while it lives.

        Whoever asks while another process fetches waits for it, and some minutes for room that other trials use. Raises
        CacheFullError where there is none, StorageError where a source can't be read.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheFullError(
                f"{socket.gethostname()} can't keep copies of features in {self.root} ({error.strerror}); set "
                "feature_copies.folder to a place on each machine's own disk"
            ) from None
        deadline = time.monotonic() + (WAIT_SECONDS if wait_seconds is None else wait_seconds)
        while isinstance(found := self._try_hold(wanted), int):
            if time.monotonic() > deadline:
                raise CacheFullError(
                    f"the copies of features on {socket.gethostname()} may take {size_text(self.limit_bytes())} of "
                    f"{self.root}, trials use {size_text(found)} of it, and {_name(wanted)} has "
                    f"{size_text(sum(one.num_bytes for one in wanted))}; set feature_copies.max_gigabytes higher, or "
                    "max_concurrent_trials lower"
                )
            time.sleep(1)
        for one, held in zip(wanted, found, strict=True):
            with _locked(_beside(held.folder, "fetch"), fcntl.LOCK_EX):
                _complete(one, held.folder)
        return found

    def _held(self) -> list[Path]:
        """Folders of copies, the longest unused first."""
        found = [path.with_suffix("") for path in self.root.glob("*.use")]
        return sorted(filter(Path.is_dir, found), key=lambda folder: _beside(folder, "use").stat().st_mtime_ns)

    def _try_hold(self, wanted: Sequence[CacheRequest]) -> list[PinnedCopy] | int:
        """The copies with room for all that they lack; or how many bytes others use, where that leaves too few.

        Unused copies go where that makes the room, and only then.
        """
        own = [self.root / hashlib.sha256(one.source.encode()).hexdigest()[:32] for one in wanted]
        # Whoever uses or removes a copy begins under this lock: what is unused here stays so.
        with _locked(self.root / "room", fcntl.LOCK_EX):
            if any(one.lacking(folder) for one, folder in zip(wanted, own, strict=True)):
                num_bytes = sum(one.num_bytes for one in wanted)
                self.check_fits(_name(wanted), num_bytes)
                limit = self.limit_bytes()
                others = {one: _bytes_taken(one) for one in self._held() if one not in own}
                unused = [one for one in others if not _is_used(one)]
                in_use = sum(others.values()) - sum(others[one] for one in unused)
                if in_use + num_bytes > limit:
                    return in_use
                while sum(others.values()) + num_bytes > limit:
                    oldest = unused.pop(0)
                    shutil.rmtree(oldest)
                    del others[oldest]
                for one, folder in zip(wanted, own, strict=True):
                    folder.mkdir(exist_ok=True)
                    storage.write_bytes(str(folder / _SIZE_FILE), str(one.num_bytes).encode())
            return [_pin(folder) for folder in own]


DEFAULT_COPIES = Copies()


class PinnedCopy:
    """A folder that isn't removed while this object lives."""

    def __init__(self, folder: Path, use: int) -> None:
        self.folder = folder
        weakref.finalize(self, _release, use)


def _pin(folder: Path) -> PinnedCopy:
    use = _lock(_beside(folder, "use"), fcntl.LOCK_SH)
    _touch(use)
    return PinnedCopy(folder, use)


def _name(wanted: Sequence[CacheRequest]) -> str:
    more = len(wanted) - 1
    return wanted[0].source + (f" with {more} more {'folders' if more > 1 else 'folder'}" if more else "")


def _complete(wanted: CacheRequest, folder: Path) -> None:
    """Bring what a copy lacks; only who holds its lock does."""
    lacking = wanted.lacking(folder)
    if lacking:
        _remove_others(folder, wanted.files)
        with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
            list(pool.map(lambda name: _bring(wanted.fetch, folder, name, wanted.files[name]), lacking))


def _bring(fetch: Fetch, folder: Path, name: str, state: FileState) -> None:
    """A file that appears whole, with its source's time, or not at all; only who holds the lock writes here."""
    part = folder / f".{name}.part"
    try:
        fetch(name, part)
        os.utime(part, ns=(state.modified, state.modified))
        os.replace(part, folder / name)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _is_copy(path: Path, source: FileState) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_mtime_ns) == (source.size, source.modified)


def _remove_others(folder: Path, files: Mapping[str, FileState]) -> None:
    """What a killed process left half done, and what the source no longer has."""
    for path in folder.iterdir():
        if path.name not in files and path.name != _SIZE_FILE:
            path.unlink()


def _is_used(folder: Path) -> bool:
    try:
        with _locked(_beside(folder, "use"), fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


def _bytes_taken(folder: Path) -> int:
    """What a copy has, or will have once it is whole."""
    with suppress(OSError, ValueError):
        return max(int((folder / _SIZE_FILE).read_text()), _bytes_on_disk(folder))
    return _bytes_on_disk(folder)


def _bytes_on_disk(folder: Path) -> int:
    return sum(state.size for state in storage.file_states(str(folder)).values())


# ---------------------------------------------------------------------------------------------------------- locks


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_suffix(f".{suffix}")


def _lock(path: Path, how: int) -> int:
    """An open file with a lock on it, of which closing lets go."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, how)
    except BaseException:
        os.close(file)
        raise
    return file


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    file = _lock(path, how)
    try:
        yield
    finally:
        os.close(file)


def _touch(use: int) -> None:
    # The file system's own clock ticks too slowly to tell two of them apart.
    os.utime(use, ns=(time.time_ns(), time.time_ns()))


def _release(use: int) -> None:
    _touch(use)
    os.close(use)
