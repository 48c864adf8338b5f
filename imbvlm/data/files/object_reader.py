"""Reads one image's bytes from a local file, file:// or s3://, by its name as written or percent-encoded."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from urllib.parse import unquote

from imbvlm.base import s3, storage
from imbvlm.data.files.byte_ranges import ByteRange, parse_range, whole_uri


class MissingError(Exception):
    """A missing or unreadable file; the text is the row's reason."""


def file_names(uri: str) -> tuple[str, ...]:
    """The names under which an image's file may exist: as written, then with its percent escapes decoded."""
    whole = whole_uri(uri)
    return tuple(dict.fromkeys((whole, unquote(whole))))


def file_state(uri: str) -> os.stat_result | None:
    """The state of the local file that `read_object` reads; None for a missing file and for an object."""
    for name in file_names(uri) if storage.is_local(uri) else ():
        with suppress(OSError, ValueError):
            state = os.stat(_local_path(name))
            if stat.S_ISREG(state.st_mode):
                return state
    return None


def read_object(uri: str) -> bytes:
    """The content at a location, or the part of it that `#bytes=OFFSET+LENGTH` names.

    A missing name is tried again with its percent escapes decoded. Raises MissingError for faults of this file,
    StorageError where the store doesn't answer.
    """
    if (problem := storage.location_problem(uri)) is not None:
        raise MissingError(problem)
    part = parse_range(uri)
    for name in file_names(uri):
        try:
            return _read_local(name, part) if storage.is_local(name) else _read_remote(name, part)
        except FileNotFoundError:
            continue
    raise MissingError("file not found")


def _local_path(uri: str) -> str:
    return os.path.expanduser(uri.removeprefix("file://"))


def _read_local(uri: str, part: ByteRange | None) -> bytes:
    path = _local_path(uri)
    try:
        state = os.stat(path)
        if stat.S_ISDIR(state.st_mode):
            raise MissingError("a folder, not a file")
        # A manifest may name a device, which never ends, or a pipe, which never begins.
        if not stat.S_ISREG(state.st_mode):
            raise MissingError("a device or a pipe, not a file")
        with open(path, "rb") as stream:
            if part is None:
                return stream.read()
            stream.seek(min(part.offset, state.st_size))
            # Python allocates as many bytes as it is asked for.
            return stream.read(min(part.num_bytes, state.st_size))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(uri) from None
    except PermissionError:
        raise MissingError("permission denied") from None
    except ValueError:
        raise MissingError("not a file name") from None
    except OSError as error:
        raise MissingError(error.strerror or "can't be read") from None


def _read_remote(uri: str, part: ByteRange | None) -> bytes:
    try:
        return s3.get(uri) if part is None else s3.get(uri, part.offset, part.num_bytes)
    except FileNotFoundError:
        raise
    except PermissionError:
        raise MissingError(f"access denied for {s3.identity()}") from None
    except OSError as error:
        raise storage.storage_error("read", uri, error) from None
