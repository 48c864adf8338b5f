"""Each machine's cache of stored features: fetched once, verified, bounded, the least recently used evicted first.

A cache entry is a folder with the files of one output of one store. Two lock files stand next to it: `.fetch` is held
while files are fetched, `.use` is shared by all readers. The kernel releases a lock when its process ends.
A process that waits for space holds no entry that it requests, so that two processes never wait for each other.
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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from imbvlm.base import storage
from imbvlm.base.errors import StorageError
from imbvlm.base.formatting import size_text
from imbvlm.base.storage import FileState
from imbvlm.config.input_sections import FeatureCacheConfig

# Fraction of the disk that the cache may take where the configuration sets no limit.
MAX_DISK_FRACTION = 0.8
NUM_FETCH_THREADS = 8
# Trials that use the cache may be about to end, so that a request waits this long for space.
WAIT_SECONDS = 600.0
_SIZE_FILE = "bytes"

# Brings a file of the source, by its name, to a path. Raises ImbvlmError where its content is not whole.
Fetch = Callable[[str, Path], None]


class CacheFullError(StorageError):
    """This machine has no space for a cache entry now; a retry, here or on another machine, may succeed."""


class CacheRequest(NamedTuple):
    """A folder to cache: its files as they are now, and the function that fetches one of them."""

    source: str
    files: Mapping[str, FileState]
    fetch: Fetch

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(state.size for state in self.files.values())

    def missing_files(self, folder: Path) -> list[str]:
        """Names of the files that an entry lacks or has in another version."""
        return [name for name, state in self.files.items() if not _is_copy(folder / name, state)]


@dataclass(frozen=True)
class FeatureCache:
    """This machine's cache, as the configuration places and limits it."""

    config: FeatureCacheConfig

    def is_needed_for(self, uri: str, *, has_many_machines: bool) -> bool:
        """Whether trials read the features at `uri` through the cache."""
        of_shared = self.config.of_shared_folders
        return (has_many_machines if of_shared == "auto" else of_shared) or not storage.is_local(uri)

    def check_disk(self) -> None:
        """Raise CacheFullError where the user did not ask for a cache and this machine has no disk for it.

        A cache in memory would take memory from the trials. One in a container's own layer or on a network is no faster
        than the source.
        """
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        # A file system that is not on a block device has major number 0.
        if self.config.of_shared_folders == "auto" and os.major(existing.stat().st_dev) == 0:
            raise CacheFullError(
                f"{self.root} on {socket.gethostname()} is not on a disk of this machine. Set feature_copies.folder to "
                "one, or feature_copies.of_shared_folders to true or false."
            )

    @property
    def root(self) -> Path:
        """The cache's folder."""
        if self.config.folder is not None:
            return Path(os.path.abspath(storage.local_path(self.config.folder)))
        return Path(tempfile.gettempdir()) / f"imbvlm-features-{os.getuid()}"

    def limit_bytes(self) -> int:
        """Size that the cache on this machine may have."""
        available = sum(map(_bytes_on_disk, self._entries())) + (storage.free_bytes(str(self.root)) or 0)
        gigabytes = self.config.max_gigabytes
        return int(available * MAX_DISK_FRACTION if gigabytes is None else min(gigabytes * 1e9, available))

    def check_fits(self, source: str, num_bytes: int, *, on_this_machine: bool = True) -> None:
        """Raise CacheFullError where the limit is below `num_bytes`; of other machines only max_gigabytes is known."""
        limit = self.limit_bytes() if on_this_machine else (self.config.max_gigabytes or math.inf) * 1e9
        if num_bytes > limit:
            where = f" on {socket.gethostname()}" if on_this_machine else ""
            raise CacheFullError(
                f"{source} has {size_text(num_bytes)}, and the feature cache{where} may take {size_text(limit)} "
                f"of {self.root}. Set feature_copies.max_gigabytes higher or feature_copies.folder "
                "to a larger disk, or lower features.num_views or features.precision."
            )

    def pin(self, requests: Sequence[CacheRequest], *, wait_seconds: float | None = None) -> list[PinnedCopy]:
        """Return cache entries for all requests, whole and current; each stays while its PinnedCopy lives.

        Waits for other processes that fetch the same files, and up to `wait_seconds` (default WAIT_SECONDS) for space
        that other trials use. Raises CacheFullError without space, StorageError where a source can't be read.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheFullError(
                f"{socket.gethostname()} can't cache features in {self.root} ({error.strerror}). Set "
                "feature_copies.folder to a place on each machine's own disk."
            ) from None
        deadline = time.monotonic() + (WAIT_SECONDS if wait_seconds is None else wait_seconds)
        while isinstance(pinned := self._try_pin(requests), int):
            if time.monotonic() > deadline:
                raise CacheFullError(
                    f"the feature cache on {socket.gethostname()} may take {size_text(self.limit_bytes())} of "
                    f"{self.root}, trials use {size_text(pinned)} of it, and {_name(requests)} has "
                    f"{size_text(sum(request.num_bytes for request in requests))}. Set feature_copies.max_gigabytes "
                    "higher, or max_concurrent_trials lower."
                )
            time.sleep(1)
        for request, copy in zip(requests, pinned, strict=True):
            with _locked(_lock_file(copy.folder, "fetch"), fcntl.LOCK_EX):
                _complete(request, copy.folder)
        return pinned

    def _entries(self) -> list[Path]:
        """Folders of the cache entries, the least recently used first."""
        folders = filter(Path.is_dir, (path.with_suffix("") for path in self.root.glob("*.use")))
        return sorted(folders, key=lambda folder: _lock_file(folder, "use").stat().st_mtime_ns)

    def _try_pin(self, requests: Sequence[CacheRequest]) -> list[PinnedCopy] | int:
        """The pinned entries with space for all files that they lack, or the bytes in use where that leaves too few.

        Unused entries are evicted only if that makes enough space.
        """
        folders = [self.root / hashlib.sha256(request.source.encode()).hexdigest()[:32] for request in requests]
        # Every process pins or removes entries under this lock, so that an unused entry stays unused here.
        with _locked(self.root / "room", fcntl.LOCK_EX):
            if any(request.missing_files(folder) for request, folder in zip(requests, folders, strict=True)):
                num_bytes = sum(request.num_bytes for request in requests)
                self.check_fits(_name(requests), num_bytes)
                limit = self.limit_bytes()
                others = {entry: _bytes_taken(entry) for entry in self._entries() if entry not in folders}
                unused = [entry for entry in others if not _is_used(entry)]
                in_use = sum(others.values()) - sum(others[entry] for entry in unused)
                if in_use + num_bytes > limit:
                    return in_use
                while sum(others.values()) + num_bytes > limit:
                    oldest = unused.pop(0)
                    shutil.rmtree(oldest)
                    del others[oldest]
                for request, folder in zip(requests, folders, strict=True):
                    folder.mkdir(exist_ok=True)
                    storage.write_bytes(str(folder / _SIZE_FILE), str(request.num_bytes).encode())
            return [_pin(folder) for folder in folders]


class PinnedCopy:
    """A cache entry that is not evicted while this object lives; `use` is the descriptor of its shared lock."""

    def __init__(self, folder: Path, use: int) -> None:
        self.folder = folder
        weakref.finalize(self, _release, use)


def _pin(folder: Path) -> PinnedCopy:
    use = _lock(_lock_file(folder, "use"), fcntl.LOCK_SH)
    _touch(use)
    return PinnedCopy(folder, use)


def _name(requests: Sequence[CacheRequest]) -> str:
    more = len(requests) - 1
    return requests[0].source + (f" with {more} more {'folders' if more > 1 else 'folder'}" if more else "")


def _complete(request: CacheRequest, folder: Path) -> None:
    """Fetch the files that an entry lacks; the caller holds its `.fetch` lock."""
    missing = request.missing_files(folder)
    if missing:
        # A killed process leaves parts of files, and the source may have lost some.
        for path in folder.iterdir():
            if path.name not in request.files and path.name != _SIZE_FILE:
                path.unlink()
        with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
            list(pool.map(lambda name: _fetch(request, folder, name), missing))


def _fetch(request: CacheRequest, folder: Path, name: str) -> None:
    """Fetch a file, with its source's time, so that it appears whole or not at all."""
    part, modified = folder / f".{name}.part", request.files[name].modified
    try:
        request.fetch(name, part)
        os.utime(part, ns=(modified, modified))
        os.replace(part, folder / name)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _is_copy(path: Path, source: FileState) -> bool:
    try:
        state = path.stat()
    except FileNotFoundError:
        return False
    return (state.st_size, state.st_mtime_ns) == (source.size, source.modified)


def _is_used(folder: Path) -> bool:
    try:
        with _locked(_lock_file(folder, "use"), fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


def _bytes_taken(folder: Path) -> int:
    """Size that an entry has, or will have once it is whole."""
    with suppress(OSError, ValueError):
        return max(int((folder / _SIZE_FILE).read_text()), _bytes_on_disk(folder))
    return _bytes_on_disk(folder)


def _bytes_on_disk(folder: Path) -> int:
    return sum(state.size for state in storage.file_states(str(folder)).values())


# ---------------------------------------------------------------------------------------------------------- locks


def _lock_file(folder: Path, suffix: str) -> Path:
    return folder.with_suffix(f".{suffix}")


def _lock(path: Path, operation: int) -> int:
    """Open and lock a file; closing the descriptor releases the lock."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, operation)
    except BaseException:
        os.close(file)
        raise
    return file


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    file = _lock(path, operation)
    try:
        yield
    finally:
        os.close(file)


def _touch(use: int) -> None:
    # The file system's own clock ticks too slowly to order two uses.
    os.utime(use, ns=(time.time_ns(), time.time_ns()))


def _release(use: int) -> None:
    _touch(use)
    os.close(use)
