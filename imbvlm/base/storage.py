"""Files by path or URI, local disk and S3 alike; what is written appears whole or not at all."""

import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow.fs as pafs

from imbvlm.base import interrupts, s3
from imbvlm.base.errors import DiskFullError
from imbvlm.base.errors import StorageError as StorageError
from imbvlm.base.formatting import size_text
from imbvlm.base.outages import Outages

# This process's, for whoever shows what happens to name who is told.
OUTAGES = Outages()
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 1.0, 10.0

# No description, record or list of this package comes near it.
MAX_JSON_BYTES = 64_000_000

_CHUNK_BYTES = 8_000_000
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# `s3:/x` is s3://x after a path library has joined it, and `s3:x` a slip. Another word before `:` may be a folder's.
SCHEMED = r"(?:[A-Za-z][A-Za-z0-9+.-]+://|(?:s3|S3|file):)"
# The URIs that are read and written.
SUPPORTED = r"(?:file://.|s3://[A-Za-z0-9][A-Za-z0-9._-]*(?:/|$))"
ONLY = "only local paths and s3://BUCKET/... are supported"
_SCHEMED, _SUPPORTED = re.compile(SCHEMED), re.compile(SUPPORTED)

Result = TypeVar("Result")


class FileState(NamedTuple):
    """What changes with a file's content: size, and times of change in nanoseconds; an object has one time.

    Whoever sets a local file's `modified` back can't set `changed` back.
    """

    size: int
    modified: int
    changed: int

    def is_before(self, time_ns: int) -> bool:
        return max(self.modified, self.changed) < time_ns


def is_uri(location: str) -> bool:
    """Whether a location is written as a URI, supported or not, and not as a path."""
    return _SCHEMED.match(location) is not None


def location_problem(location: str) -> str | None:
    """The reason why a location is invalid, with the nearest valid form; None for a path, file:// and s3://BUCKET."""
    if not is_uri(location) or _SUPPORTED.match(location):
        return None
    scheme, _, rest = location.partition(":")
    rest = rest.lstrip("/")
    if scheme.lower() == "s3":
        if location.startswith(s3.SCHEME) or not _SUPPORTED.match(f"{s3.SCHEME}{rest}"):
            return f"{location} names no bucket; it should look like s3://BUCKET/KEY"
        return f"{location} is no location; did you mean s3://{rest}?"
    if scheme.lower() == "file":
        return f"{location} is no location; it should look like file:///{rest or 'FOLDER'}"
    if scheme.lower() in ("gs", "gcs", "r2", "s3a", "s3n", "oss") and _SUPPORTED.match(f"{s3.SCHEME}{rest}"):
        return f"{location}: {ONLY}; if that store speaks S3, give s3://{rest} and set AWS_ENDPOINT_URL"
    return f"{location}: {ONLY}; copy it to one of them"


def check_location(location: str) -> None:
    """Raise StorageError for a location that is neither a path nor a supported URI."""
    problem = location_problem(location)
    if problem is not None:
        raise StorageError(problem)


def is_local(uri: str) -> bool:
    """Whether a location is on this machine's file systems rather than in S3; raises StorageError for any other."""
    check_location(uri)
    return not uri.startswith(s3.SCHEME)


def local_path(uri: str) -> Path:
    """The path of a local location; raises StorageError for any other."""
    if not is_local(uri):
        raise StorageError(f"{uri} is not on a local disk")
    if "\0" in uri:
        raise StorageError(f"{uri!r} has a null character, which no path can have; take it out")
    try:
        return Path(uri.removeprefix("file://")).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{uri} is no path: {error}") from None


def absolute(uri: str) -> str:
    """The location with a local relative path resolved against the current folder."""
    return os.path.abspath(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """A location below another."""
    return "/".join([uri.rstrip("/"), *parts]) if not is_local(uri) else str(local_path(uri).joinpath(*parts))


def free_bytes(uri: str) -> int | None:
    """Room on the disk of a location, also of one that isn't there yet; None for an object store."""
    return shutil.disk_usage(_existing(uri)).free if is_local(uri) else None


def is_same_disk(uri: str, other: str) -> bool:
    """Whether two locations, which need not exist yet, take their room from one disk of this machine."""
    both_local = is_local(uri) and is_local(other)
    return both_local and _existing(uri).stat().st_dev == _existing(other).stat().st_dev


def _existing(uri: str) -> Path:
    """A local location, or the nearest folder above it that exists."""
    path = Path(absolute(uri))
    return next(above for above in (path, *path.parents) if os.path.exists(above))


def check_name(uri: str) -> None:
    """Raises StorageError for a name whose bytes aren't UTF-8: pyarrow and Parquet know no others."""
    shown = uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if shown != uri:
        raise StorageError(f"{shown} has a name that isn't UTF-8; rename it")


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system and the path in it; S3's endpoint, region and credentials come from the AWS settings."""
    check_name(uri)
    if is_local(uri):
        return pafs.LocalFileSystem(), absolute(uri)
    bucket, key = s3.split(uri)
    try:
        return s3.filesystem(bucket), f"{bucket}/{key}".rstrip("/")
    except (OSError, ValueError) as error:
        raise StorageError(f"can't open {uri}: {error}") from None


def storage_error(what: str, uri: str, error: Exception) -> StorageError:
    """What to raise for a pyarrow error; a refusal of S3 names bucket, key and who asked, a full disk is named so."""
    if uri.startswith(s3.SCHEME) and s3.is_denied(error):
        return s3.denied(uri)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return DiskFullError(f"can't {what} {uri}: the disk is full; free some space there")
    return StorageError(f"can't {what} {uri}: {error}")


def _patiently(uri: str, call: Callable[[], Result], kind: str = "read", waits: bool = True) -> Result:
    """A call that outlasts refusals now and then and, if it `waits`, a store that is away; what lasts comes at once."""
    return s3.retry_denied(uri, call if is_local(uri) else lambda: _outlasting(uri, call, kind, waits))


def _outlasting(uri: str, call: Callable[[], Result], kind: str, waits: bool) -> Result:
    # With other settings it is another store's, or one that answers.
    store = ("/".join(uri.split("/", 3)[:3]), *s3.settings())
    OUTAGES.check(store, kind)
    wait, deadline = FIRST_WAIT_SECONDS, math.inf
    while True:
        try:
            result = call()
        except OSError as error:
            if _is_lasting(error):
                OUTAGES.answered(store, kind)
                raise
            # Others may be answered meanwhile, so that the store is back and this call's file isn't.
            deadline = min(deadline, OUTAGES.failed(store, kind, error, wait) if waits else -math.inf)
            if time.monotonic() + wait > deadline:
                raise
            interrupts.sleep(wait)
            wait = min(2 * wait, MAX_WAIT_SECONDS)
        else:
            OUTAGES.answered(store, kind)
            return result


def _is_lasting(error: OSError) -> bool:
    gone = isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in str(error)
    return gone or s3.is_denied(error) or error.errno in _DISK_FULL


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    try:
        if is_local(uri):
            return local_path(uri).exists()
        filesystem, path = open_filesystem(uri)
        return _patiently(uri, lambda: bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound))
    except OSError as error:
        raise storage_error("look at", uri, error) from None


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """The whole content of a file, as it was at one moment; raises StorageError with the cause.

    A pipe or a device is denied, because it may never end, and so is a file of more than `max_bytes`.
    """
    check_readable(uri, max_bytes)

    def read() -> bytes:
        if uri.startswith(s3.SCHEME):
            # pyarrow asks for the size and then for parts, of other versions where somebody writes it anew meanwhile.
            return s3.get(uri)
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    try:
        return _patiently(uri, read)
    except FileNotFoundError:
        raise StorageError(f"{uri} is not there") from None
    except OSError as error:
        raise storage_error("read", uri, error) from None


def read_json(uri: str) -> Any:
    """Plain data of a JSON file; raises StorageError where it can't be read, ValueError where it is no JSON."""
    data = read_bytes(uri, MAX_JSON_BYTES)
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def check_readable(uri: str, max_bytes: int | None = None) -> None:
    """Raises StorageError for what is no file or a larger one; says nothing of a file that isn't there."""
    try:
        if is_local(uri):
            state = os.stat(local_path(uri))
            if not stat.S_ISREG(state.st_mode):
                what = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe or a device"
                raise StorageError(f"can't read {uri}: it is {what} and no file")
            size = state.st_size
        elif max_bytes is not None:
            filesystem, path = open_filesystem(uri)
            size = _patiently(uri, lambda: filesystem.get_file_info(path).size or 0, waits=False)
        else:
            return
    except (OSError, ValueError):
        # Reading says why, in its own words.
        return
    if max_bytes is not None and size > max_bytes:
        raise StorageError(f"can't read {uri}: it has {size_text(size)}, and at most {size_text(max_bytes)} are read")


def download(uri: str, path: Path) -> None:
    """Copy a file to a local path, over what lies there, in bounded memory; raises StorageError."""
    check_readable(uri)
    filesystem, source = open_filesystem(uri)

    def copy() -> None:
        with filesystem.open_input_stream(source) as stream, path.open("wb") as target:
            while chunk := stream.read(_CHUNK_BYTES):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())

    try:
        _patiently(uri, copy)
    except FileNotFoundError:
        raise StorageError(f"{uri} is not there") from None
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise storage_error("write", str(path), error) from None
        raise storage_error("read", uri, error) from None


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all; folders above it are made. Raises StorageError."""

    def upload() -> None:
        # An object store shows an object only once its upload is complete.
        filesystem, path = open_filesystem(uri)
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    try:
        if is_local(uri):
            _write_local(local_path(uri), data)
        else:
            _patiently(uri, upload, "write")
    except OSError as error:
        raise storage_error("write", uri, error) from None


def _write_local(path: Path, data: bytes | memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def list_files(uri: str, *, waits: bool = True) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; empty where there is none.

    `waits` is whether a store that is away is waited for. Raises StorageError.
    """
    return sorted(info.base_name for info in _infos(uri, waits))


def file_states(uri: str) -> dict[str, FileState]:
    """Size and times of the files directly in a folder, by name; empty where there is none."""
    if not is_local(uri):
        return {
            info.base_name: FileState(info.size, info.mtime_ns or 0, info.mtime_ns or 0)
            for info in _infos(uri)
            if info.is_file
        }
    found = {}
    try:
        with os.scandir(local_path(uri)) as entries:
            for entry in entries:
                # What a writer is about to rename may be gone by now.
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        one = entry.stat()
                        found[entry.name] = FileState(one.st_size, one.st_mtime_ns, one.st_ctime_ns)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise storage_error("list", uri, error) from None
    return found


def _infos(uri: str, waits: bool = True) -> list[pafs.FileInfo]:
    filesystem, path = open_filesystem(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    try:
        return _patiently(uri, lambda: filesystem.get_file_info(selector), waits=waits)
    except OSError as error:
        raise storage_error("list", uri, error) from None


def delete(uri: str) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    filesystem, path = open_filesystem(uri)

    def remove() -> None:
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)

    try:
        _patiently(uri, remove, "write")
    except OSError as error:
        raise storage_error("remove", uri, error) from None
