"""Files by path or URI, local disk and S3 alike; what is written appears whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path

import pyarrow.fs as pafs

from imbvlm import s3
from imbvlm.errors import StorageError as StorageError


def is_local(uri: str) -> bool:
    """Whether a location is on this machine's file systems rather than in an object store."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local location; raises StorageError for any other."""
    if not is_local(uri):
        raise StorageError(f"{uri} is not on a local disk")
    return Path(uri.removeprefix("file://")).expanduser()


def absolute(uri: str) -> str:
    """The location with a local relative path resolved against the current folder."""
    return os.path.abspath(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """A location below another."""
    return "/".join([uri.rstrip("/"), *parts]) if not is_local(uri) else str(local_path(uri).joinpath(*parts))


def free_bytes(uri: str) -> int | None:
    """Room on the disk of a location, also of one that isn't there yet; None for an object store."""
    if not is_local(uri):
        return None
    path = Path(absolute(uri))
    return shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists())).free


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system and the path in it; S3's endpoint, region and credentials come from the AWS settings."""
    if is_local(uri):
        return pafs.LocalFileSystem(), absolute(uri)
    try:
        if uri.startswith(s3.SCHEME):
            bucket, key = s3.split(uri)
            return s3.filesystem(bucket), f"{bucket}/{key}".rstrip("/")
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise StorageError(f"can't open {uri}: {error}") from None
    return filesystem, path


def failure(what: str, uri: str, error: Exception) -> StorageError:
    """What to raise for a pyarrow error; a refusal of S3 names bucket, key and who asked."""
    if uri.startswith(s3.SCHEME) and s3.is_denied(error):
        return s3.denied(uri)
    return StorageError(f"can't {what} {uri}: {error}")


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = open_filesystem(uri)
    try:
        return s3.patiently(uri, lambda: bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound))
    except OSError as error:
        raise failure("look at", uri, error) from None


def read_bytes(uri: str) -> bytes:
    """The whole content of a file; raises StorageError with the cause."""
    filesystem, path = open_filesystem(uri)

    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    try:
        return s3.patiently(uri, read)
    except FileNotFoundError:
        raise StorageError(f"{uri} is not there") from None
    except OSError as error:
        raise failure("read", uri, error) from None


def write_bytes(uri: str, data: bytes) -> None:
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
            s3.patiently(uri, upload)
    except OSError as error:
        raise failure("write", uri, error) from None


def _write_local(path: Path, data: bytes) -> None:
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


def list_files(uri: str) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; empty where there is none."""
    filesystem, path = open_filesystem(uri)
    try:
        infos = s3.patiently(uri, lambda: filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)))
    except OSError as error:
        raise failure("list", uri, error) from None
    return sorted(info.base_name for info in infos)


def delete(uri: str) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    filesystem, path = open_filesystem(uri)
    try:
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)
    except OSError as error:
        raise failure("remove", uri, error) from None
