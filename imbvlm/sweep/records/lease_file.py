"""A file that only one of several writers can take: by creating it, or by replacing the version that all have read.

A hard link decides on local disks, and a conditional write in S3.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from imbvlm.base import s3, storage

# A store without conditional writes keeps the last write. After this time every writer that read the same version has
# written, and a writer that is overwritten later sees it at its next heartbeat.
SETTLE_SECONDS = 15.0
# Age at which a claim is left over from a killed writer: claims normally exist for milliseconds.
CLAIM_SECONDS = 60.0
# Answers of FAT and of some network file systems, which have no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Content(NamedTuple):
    """The bytes of a file and the version that was read."""

    data: bytes
    version: str


class LeaseFile(Protocol):
    """The file of a lease; each method raises StorageError if the storage doesn't answer."""

    def read(self) -> Content | None:
        """The content; None if there is no file."""

    def create(self, data: bytes) -> bool:
        """Create the file; False if another writer has done so."""

    def replace(self, before: Content, token: str, data: bytes) -> bool:
        """Replace the version that was read, whose holder `token` names; False if another writer has done so."""

    def renew(self, data: bytes) -> None:
        """Write the file again; has no effect if another writer has replaced it."""


def lease_file(uri: str) -> LeaseFile:
    """The lease's file at a location, local or in S3."""
    return LocalLeaseFile(storage.local_path(uri)) if storage.is_local(uri) else StoredLeaseFile(uri)


class LocalLeaseFile:
    """A lease's file in a folder that several machines may share."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Renewed in place: after another writer has replaced the file, a write to this stream reaches nobody.
        self._stream: BinaryIO | None = None

    def read(self) -> Content | None:
        try:
            return Content(self._path.read_bytes(), "")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage.storage_error("read", str(self._path), error) from None

    def create(self, data: bytes) -> bool:
        self._stream = self._create(self._path, data)
        return self._stream is not None

    def replace(self, before: Content, token: str, data: bytes) -> bool:
        # The writer that creates this claim may replace the version that the token names, and no other meanwhile.
        claim = self._path.with_name(f".{self._path.name}.{token}")
        stream = self._create(claim, data)
        if stream is None:
            self._remove_leftover(claim)
            return False
        now = self.read()
        try:
            if now is None or now.data != before.data:
                claim.unlink()
                return False
            os.replace(claim, self._path)
        except FileNotFoundError:
            # Another writer has removed the claim, since this process was stopped for too long.
            return False
        self._stream = stream
        return True

    def renew(self, data: bytes) -> None:
        assert self._stream is not None
        try:
            os.pwrite(self._stream.fileno(), data, 0)
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise storage.storage_error("write", str(self._path), error) from None

    def _remove_leftover(self, claim: Path) -> None:
        """Remove the claim of a writer that was killed before it replaced the file, by the file system's clock."""
        with suppress(OSError), tempfile.NamedTemporaryFile(dir=claim.parent, prefix=f"{claim.name}.") as now:
            if os.stat(now.name).st_mtime - claim.stat().st_mtime > CLAIM_SECONDS:
                claim.unlink()

    def _create(self, path: Path, data: bytes) -> BinaryIO | None:
        """Create the file whole and return its stream; None if it exists."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                os.chmod(temporary, 0o644)
                stream = _written(os.fdopen(handle, "r+b"), data)
                return stream if _link(temporary, path) else None
            finally:
                os.unlink(temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise storage.storage_error("write", str(path), error) from None
        try:
            return _written(path.open("x+b"), data)
        except FileExistsError:
            return None
        except OSError as error:
            raise storage.storage_error("write", str(path), error) from None


def _written(stream: BinaryIO, data: bytes) -> BinaryIO:
    stream.write(data)
    stream.flush()
    os.fsync(stream.fileno())
    return stream


def _link(source: str, path: Path) -> bool:
    try:
        os.link(source, path)
    except FileExistsError:
        # NFS answers so if it has made the link, lost its answer and was asked again.
        return os.stat(source).st_nlink == 2
    return True


class StoredLeaseFile:
    """A lease's file in S3, taken by conditional writes; without them the last of simultaneous writers has it."""

    def __init__(self, uri: str) -> None:
        self._uri, self._is_conditional = uri, True
        self._etag, self._last = "", b""

    def read(self) -> Content | None:
        version = s3.get_version(self._uri)
        return None if version is None else Content(*version)

    def create(self, data: bytes) -> bool:
        return self._take(data, lambda: s3.put(self._uri, data, IfNoneMatch="*"))

    def replace(self, before: Content, token: str, data: bytes) -> bool:
        return self._take(data, lambda: s3.put(self._uri, data, IfMatch=before.version))

    def renew(self, data: bytes) -> None:
        if not self._is_conditional:
            s3.put(self._uri, data)
            return
        before, self._last = self._last, data
        etag = s3.put(self._uri, data, IfMatch=self._etag)
        if etag is None:
            # Either another writer's file, or ours: this write or the one before succeeded and its answer was lost.
            now = self.read()
            if now is None or now.data not in (before, data):
                return
            etag = now.version
        self._etag = etag

    def _take(self, data: bytes, put: Callable[[], str | None]) -> bool:
        try:
            etag = put()
            if etag is None:
                now = self.read()
                if now is None or now.data != data:
                    return False
                etag = now.version
            self._etag = etag
            # The condition is false by now: a store that ignores conditions writes nevertheless.
            if put() is None:
                return True
        except s3.NoConditionsError:
            s3.put(self._uri, data)
        self._is_conditional = False
        time.sleep(SETTLE_SECONDS)
        now = self.read()
        return now is not None and now.data == data
