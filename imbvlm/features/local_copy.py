"""A machine's own copies of stored features that lie elsewhere: fetched once, bounded, the longest unused goes first.

What is copied is one output of one store, a folder. Beside its copy lie two files that processes lock (the kernel lets
go of a lock when its process ends, however it ends): `.fetch` while files are brought, `.use` shared by all readers.
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import Field, field_validator

from imbvlm import storage
from imbvlm.errors import ImbvlmError
from imbvlm.schema import Section
from imbvlm.storage import FileState, size_text

# Of the disk, where no limit is set.
MOST_OF_DISK = 0.8
FETCHES_AT_ONCE = 8
# So long a trial waits for room that others use: they may be about to end.
WAIT_SECONDS = 600.0
_SIZE_FILE = "bytes"

# Brings a file of the source, by its name, to a path; raises ImbvlmError where what came isn't whole.
Fetch = Callable[[str, Path], None]


class Copies(Section):
    """Where each machine keeps its copies of features, and how much of its disk they may take."""

    folder: str | None = Field(None, description="on each machine's own disk; null: imbvlm-features-UID in /tmp")
    max_gigabytes: float | None = Field(None, gt=0, description="on each machine; null: 80 % of that disk")
    of_shared_folders: bool = Field(
        False, description="copy from a file system that machines share, too; from an object store it is always so"
    )

    @field_validator("folder")
    @classmethod
    def _same_everywhere(cls, folder: str | None) -> str | None:
        if folder is not None and not (folder.startswith(("/", "~")) and storage.is_local(folder)):
            raise ValueError(f"folder is {folder!r}, which isn't a place on each machine; give a path from / or ~ on")
        return folder

    def needed_for(self, uri: str) -> bool:
        """Whether trials read a copy of what lies there."""
        return self.of_shared_folders or not storage.is_local(uri)

    @property
    def root(self) -> Path:
        if self.folder is not None:
            return Path(os.path.abspath(storage.local_path(self.folder)))
        return Path(tempfile.gettempdir()) / f"imbvlm-features-{os.getuid()}"

    def limit_bytes(self) -> int:
        """How much the copies on this machine may take together."""
        room = sum(map(_bytes_on_disk, self._held())) + (storage.free_bytes(str(self.root)) or 0)
        return int(room * MOST_OF_DISK if self.max_gigabytes is None else min(self.max_gigabytes * 1e9, room))

    def check_fits(self, source: str, num_bytes: int, *, here: bool = True) -> None:
        """Raise ImbvlmError where a machine could never hold a copy of so many bytes; without `here` by the limit."""
        limit = self.limit_bytes() if here else (self.max_gigabytes or math.inf) * 1e9
        if num_bytes > limit:
            where = f" on {socket.gethostname()}" if here else ""
            raise ImbvlmError(
                f"{source} has {size_text(num_bytes)}, and the copies of features{where} may take {size_text(limit)} "
                f"of {self.root}; set feature_copies.max_gigabytes higher or feature_copies.folder "
                "to a larger disk, or lower features.num_views or features.precision"
            )

    def hold(self, source: str, files: Mapping[str, FileState], fetch: Fetch) -> HeldCopy:
        """This machine's copy of some files of a folder, whole and as they are now; it stays while the answer lives.

        Whoever asks while another process fetches waits for it, and some minutes for room that other trials use. Raises
        ImbvlmError where there is none, StorageError where the source can't be read.
        """
        folder = self.root / hashlib.sha256(source.encode()).hexdigest()[:32]
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ImbvlmError(
                f"{socket.gethostname()} can't keep copies of features in {self.root} ({error.strerror}); set "
                "feature_copies.folder to a place on each machine's own disk"
            ) from None
        with _locked(_beside(folder, "fetch"), fcntl.LOCK_EX):
            held = HeldCopy(folder, _lock(_beside(folder, "use"), fcntl.LOCK_SH))
            lacking = [name for name, state in files.items() if not _is_copy(folder / name, state)]
            if lacking:
                self._make_room(source, folder, sum(state.size for state in files.values()))
                _remove_others(folder, files)
                with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
                    list(pool.map(lambda name: _bring(fetch, folder, name, files[name]), lacking))
        return held

    def _held(self) -> list[Path]:
        """Folders of copies, the longest unused first."""
        found = [path.with_suffix("") for path in self.root.glob("*.use")]
        return sorted(filter(Path.is_dir, found), key=lambda folder: _beside(folder, "use").stat().st_mtime_ns)

    def _make_room(self, source: str, folder: Path, num_bytes: int) -> None:
        """Take so many bytes for a folder; other copies that nobody uses go where that is needed."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (used := self._try_room(source, folder, num_bytes)) is not None:
            if time.monotonic() > deadline:
                raise ImbvlmError(
                    f"the copies of features on {socket.gethostname()} may take {size_text(self.limit_bytes())} of "
                    f"{self.root}, trials use {size_text(used)} of it, and {source} has {size_text(num_bytes)}; set "
                    "feature_copies.max_gigabytes higher, or max_concurrent_trials lower"
                )
            time.sleep(1)

    def _try_room(self, source: str, folder: Path, num_bytes: int) -> int | None:
        """None, and the bytes are taken; or how many are in use by others, where there are too few."""
        with _locked(self.root / "room", fcntl.LOCK_EX):
            self.check_fits(source, num_bytes)
            limit = self.limit_bytes()
            others = {one: _bytes_taken(one) for one in self._held() if one != folder}
            for one in list(others):
                if sum(others.values()) + num_bytes > limit and _evict(one):
                    del others[one]
            if sum(others.values()) + num_bytes > limit:
                return sum(others.values())
            folder.mkdir(exist_ok=True)
            storage.write_bytes(str(folder / _SIZE_FILE), str(num_bytes).encode())
            return None


DEFAULT_COPIES = Copies()


class HeldCopy:
    """A folder that isn't removed while this object lives."""

    def __init__(self, folder: Path, use: int) -> None:
        self.folder = folder
        _touch(use)
        weakref.finalize(self, _release, use)


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


def _evict(folder: Path) -> bool:
    """Remove a copy unless somebody uses it."""
    try:
        with _locked(_beside(folder, "use"), fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(folder)
    except BlockingIOError:
        return False
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
