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

# The stores that don't answer this process; the console registers itself to report them.
OUTAGES = Outages()
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 1.0, 10.0

# Limit on a JSON file; no description, record or list of this package comes near it.
MAX_JSON_BYTES = 64_000_000

_CHUNK_BYTES = 8_000_000
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# Path libraries make `s3:/x` of s3://x, and `s3:x` is a typing error. Other words before `:` may belong to a folder.
SCHEMED = r"(?:[A-Za-z][A-Za-z0-9+.-]+://|(?:s3|S3|file):|data:[a-z]+/[a-z0-9.+-]+[;,])"
# The URIs that are read and written.
SUPPORTED = r"(?:file://.|s3://[A-Za-z0-9][A-Za-z0-9._-]*(?:/|$))"
ONLY = "only local paths and s3://BUCKET/... are supported"
_SCHEMED, _SUPPORTED = re.compile(SCHEMED), re.compile(SUPPORTED)

Result = TypeVar("Result")


class FileState(NamedTuple):
    """Size and times in nanoseconds, which change with a file's content; an object has one time.

    A user can set a local file's `modified` back, but not `changed`.
    """

    size: int
    modified: int
    changed: int

    def is_before(self, time_ns: int) -> bool:
        """Whether both times are earlier."""
        return max(self.modified, self.changed) < time_ns


def is_uri(location: str) -> bool:
    """Whether a location is written as a URI, supported or not, and not as a path."""
    return _SCHEMED.match(location) is not None


def location_problem(location: str) -> str | None:
    """The reason why a location is invalid, with the nearest valid form; None for a path, file:// and s3://BUCKET."""
    if location.startswith("data:") and is_uri(location):
        return f"{location[:40]}... is the content of an image and no location; {ONLY}"
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


def folder_problem(location: str) -> str | None:
    """The reason why a location can't be a folder for output: as `location_problem`, and for an empty one."""
    return location_problem(location) if location else "an empty name is no folder; the current folder is `.`"


def check_location(location: str) -> None:
    """Raise StorageError for a location that is neither a path nor a supported URI."""
    problem = location_problem(location)
    if problem is not None:
        raise StorageError(problem)


def check_folder(location: str) -> None:
    """Raise StorageError for a location that can't be a folder for output."""
    problem = folder_problem(location)
    if problem is not None:
        raise StorageError(problem)


def is_local(uri: str) -> bool:
    """Whether a location is on this machine's file systems rather than in S3; raises StorageError for any other."""
    check_location(uri)
    return not uri.startswith(s3.SCHEME)


def local_path(uri: str) -> Path:
    """The path of a local location; raises StorageError for any other."""
    if not is_local(uri):
        raise StorageError(f"{uri} must be a path on this machine's disk; give one without s3://")
    if "\0" in uri:
        raise StorageError(f"{uri!r} has a null character, which no path can have; take it out")
    try:
        return Path(uri.removeprefix("file://")).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{uri} is no path: {error}; write it without ~") from None


def absolute(uri: str) -> str:
    """The location with a local relative path resolved against the current folder."""
    return os.path.abspath(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """A location below another."""
    return "/".join([uri.rstrip("/"), *parts]) if not is_local(uri) else str(local_path(uri).joinpath(*parts))


def free_bytes(uri: str) -> int | None:
    """Free space on the disk of a location, which need not exist yet; None for an object store."""
    return shutil.disk_usage(_existing(uri)).free if is_local(uri) else None


def is_same_disk(uri: str, other: str) -> bool:
    """Whether two locations, which need not exist yet, lie on one disk of this machine."""
    both_local = is_local(uri) and is_local(other)
    return both_local and _existing(uri).stat().st_dev == _existing(other).stat().st_dev


def _existing(uri: str) -> Path:
    """A local location, or the nearest folder above it that exists."""
    path = Path(absolute(uri))
    return next(above for above in (path, *path.parents) if os.path.exists(above))


def check_name(uri: str) -> None:
    """Raise StorageError for a name that is not UTF-8, which pyarrow and Parquet require."""
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
        raise StorageError(f"can't open {uri}: {error}; check the bucket's name and AWS_ENDPOINT_URL") from None


def storage_error(action: str, uri: str, error: Exception) -> StorageError:
    """The StorageError for a failed `action`: names a missing file, a denied access, a full disk, a file in the way.

    `action` is a verb, such as "read" or "write". For S3 a denied access names bucket, key and account.
    """
    if action == "read" and isinstance(error, FileNotFoundError):
        return StorageError(f"{uri} is not there; check the name")
    if uri.startswith(s3.SCHEME) and s3.is_denied(error):
        return s3.denied(uri)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return DiskFullError(f"can't {action} {uri}: the disk is full; free some space there")
    if isinstance(error, (FileExistsError, NotADirectoryError)) and is_local(uri):
        return StorageError(f"can't {action} {uri}: {_existing(uri)} is a file and no folder; choose another folder")
    what = "the path and its permissions" if is_local(uri) else "the network and AWS_ENDPOINT_URL"
    return StorageError(f"can't {action} {uri}: {error}; check {what}")


def _retry(uri: str, call: Callable[[], Result], kind: str = "read", waits: bool = True) -> Result:
    """Retry a call that is denied once in a while and, if it `waits`, one to a store that does not answer.

    Lasting errors are raised at once.
    """
    return s3.retry_denied(uri, call if is_local(uri) else lambda: _wait_for_store(uri, call, kind, waits))


def _wait_for_store(uri: str, call: Callable[[], Result], kind: str, waits: bool) -> Result:
    # The same name with other settings is another store.
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
            # The outage may end for other calls while this one still fails: its own deadline stays.
            deadline = min(deadline, OUTAGES.failed(store, kind, error, wait) if waits else -math.inf)
            if time.monotonic() + wait > deadline:
                raise
            interrupts.sleep(wait)
            wait = min(2 * wait, MAX_WAIT_SECONDS)
        else:
            OUTAGES.answered(store, kind)
            return result


def _is_lasting(error: OSError) -> bool:
    is_gone = isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in str(error)
    return is_gone or s3.is_denied(error) or error.errno in _DISK_FULL


def exists(uri: str) -> bool:
    """Whether a file or folder exists; raises StorageError."""
    try:
        if is_local(uri):
            return local_path(uri).exists()
        filesystem, path = open_filesystem(uri)
        return _retry(uri, lambda: bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound))
    except OSError as error:
        raise storage_error("check", uri, error) from None


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """The whole content of a file at one moment; raises StorageError with the cause.

    A pipe or a device, which may never end, is not read, and neither is a file above `max_bytes`.
    """
    check_readable(uri, max_bytes)

    def read() -> bytes:
        if uri.startswith(s3.SCHEME):
            # pyarrow requests the size and then parts, which may be of different versions while another process writes.
            return s3.get(uri)
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    try:
        return _retry(uri, read)
    except OSError as error:
        raise storage_error("read", uri, error) from None


def read_json(uri: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Plain data of a JSON file; raises StorageError where it can't be read, ValueError where it is no JSON.

    `object_pairs_hook` makes an object of its names and values.
    """
    data = read_bytes(uri, MAX_JSON_BYTES)
    try:
        return json.loads(data, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def check_readable(uri: str, max_bytes: int | None = None) -> None:
    """Raise StorageError for a folder, pipe or device, or a file above `max_bytes`; a missing file passes."""
    try:
        if is_local(uri):
            state = os.stat(local_path(uri))
            if not stat.S_ISREG(state.st_mode):
                kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe or a device"
                raise StorageError(f"can't read {uri}: it is {kind}; name a file")
            size = state.st_size
        elif max_bytes is not None:
            filesystem, path = open_filesystem(uri)
            size = _retry(uri, lambda: filesystem.get_file_info(path).size or 0, waits=False)
        else:
            return
    except (OSError, ValueError):
        # Reading the file gives the reason.
        return
    if max_bytes is not None and size > max_bytes:
        raise StorageError(
            f"can't read {uri}: it has {size_text(size)}, and at most {size_text(max_bytes)} are read; "
            "check that it is the right file"
        )


def download(uri: str, path: Path) -> None:
    """Copy a file to a local path, which is overwritten, in bounded memory; raises StorageError."""
    check_readable(uri)
    filesystem, source = open_filesystem(uri)

    def copy() -> None:
        with filesystem.open_input_stream(source) as stream, path.open("wb") as target:
            while chunk := stream.read(_CHUNK_BYTES):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())

    try:
        _retry(uri, copy)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise storage_error("write", str(path), error) from None
        raise storage_error("read", uri, error) from None


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a file so that it appears whole or not at all, and its folders; raises StorageError."""

    def upload() -> None:
        # An object store shows an object only once its upload is complete.
        filesystem, path = open_filesystem(uri)
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    try:
        if is_local(uri):
            _write_local(local_path(uri), data)
        else:
            _retry(uri, upload, "write")
    except OSError as error:
        raise storage_error("write", uri, error) from None


def write_json(uri: str, content: Any) -> None:
    """Write plain data as a JSON file, as `write_bytes` does."""
    write_bytes(uri, json.dumps(content, indent=1).encode())


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
    """Names of the files and folders directly in a folder, sorted; empty for a missing folder.

    With `waits` the call waits for a store that does not answer. Raises StorageError.
    """
    return sorted(info.base_name for info in _infos(uri, waits))


def file_states(uri: str) -> dict[str, FileState]:
    """Size and times of the files directly in a folder, by name; empty for a missing folder. Raises StorageError."""
    if not is_local(uri):
        return {
            info.base_name: FileState(info.size, info.mtime_ns or 0, info.mtime_ns or 0)
            for info in _infos(uri)
            if info.is_file
        }
    states = {}
    try:
        with os.scandir(local_path(uri)) as entries:
            for entry in entries:
                # A temporary file may be gone by now.
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        status = entry.stat()
                        states[entry.name] = FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise storage_error("list", uri, error) from None
    return states


def _infos(uri: str, waits: bool = True) -> list[pafs.FileInfo]:
    filesystem, path = open_filesystem(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    try:
        return _retry(uri, lambda: filesystem.get_file_info(selector), waits=waits)
    except OSError as error:
        raise storage_error("list", uri, error) from None


def delete(uri: str) -> None:
    """Remove a file or a whole folder, if it exists; raises StorageError."""
    filesystem, path = open_filesystem(uri)

    def remove() -> None:
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)

    try:
        _retry(uri, remove, "write")
    except OSError as error:
        raise storage_error("remove", uri, error) from None
