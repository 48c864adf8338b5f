"""One image's bytes from where they lie: local files, file:// and s3://, by names as they are or percent-encoded."""

from __future__ import annotations

import os
from functools import lru_cache
from urllib.parse import unquote

import pyarrow.fs as pafs

from imbvlm import storage


class MissingError(Exception):
    """A file that is not there or not readable; the text is the row's reason."""


def read_object(uri: str) -> bytes:
    """The content at a location; a name that isn't there as written is tried with its percent escapes decoded.

    Raises MissingError for this file's own faults, StorageError where the store doesn't answer.
    """
    try:
        return _read(uri)
    except FileNotFoundError:
        decoded = unquote(uri)
        if decoded == uri:
            raise MissingError("file not found") from None
    try:
        return _read(decoded)
    except FileNotFoundError:
        raise MissingError("file not found") from None


def _read(uri: str) -> bytes:
    if storage.is_local(uri):
        return _read_local(uri)
    scheme, _, rest = uri.partition("://")
    bucket = rest.partition("/")[0]
    try:
        with _bucket(f"{scheme}://{bucket}").open_input_stream(rest) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        raise
    except PermissionError:
        raise MissingError("access denied") from None
    except OSError as error:
        if "ACCESS_DENIED" in str(error):
            raise MissingError("access denied") from None
        raise storage.StorageError(f"can't read {uri}: {error}") from None


def _read_local(uri: str) -> bytes:
    try:
        with open(os.path.expanduser(uri.removeprefix("file://")), "rb") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(uri) from None
    except IsADirectoryError:
        raise MissingError("a folder, not a file") from None
    except PermissionError:
        raise MissingError("permission denied") from None
    except ValueError:
        raise MissingError("not a file name") from None
    except OSError as error:
        raise MissingError(error.strerror or "can't be read") from None


@lru_cache(maxsize=16)
def _bucket(uri: str) -> pafs.FileSystem:
    """One client per bucket and process: opening one asks the server for the bucket's region."""
    return storage.open_filesystem(uri)[0]
