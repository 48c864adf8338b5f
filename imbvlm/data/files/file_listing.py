"""Lists all files below a folder or an s3:// prefix with their sizes; S3 is listed in parallel."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imbvlm.base import s3, storage
from imbvlm.data.files.object_reader import file_names, file_state

_S3_THREADS = 32
_STAT_THREADS, _STAT_CHUNK = 8, 8192
# Photos of phones, which Pillow reads with another package.
HEIF_SUFFIXES = (".heic", ".heif")
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2"),
        *(".avif", *HEIF_SUFFIXES),
    )
)


class ListedFile(NamedTuple):
    """A file's path below the listed root, and its size in bytes; an object has a number of its content, too.

    The size is -1 for a broken link, a link to a folder above it, a pipe or a device.
    """

    path: str
    num_bytes: int
    version: int = -1


def list_tree(root: str) -> list[ListedFile]:
    """Every file below a root that is not hidden, sorted by path. Raises StorageError."""
    files = list(_walk(str(storage.local_path(root)))) if storage.is_local(root) else _list_s3(root)
    return sorted(file for file in files if not is_hidden(file.path))


def listed_objects(uris: Sequence[str]) -> dict[str, ListedFile]:
    """The existing objects below the deepest common folder of each bucket's uris, by uri. Raises StorageError."""
    present: dict[str, ListedFile] = {}
    by_bucket: dict[str, list[str]] = {}
    for uri in uris:
        by_bucket.setdefault("/".join(uri.split("/", 3)[:3]), []).append(uri)
    for group in by_bucket.values():
        low, high = min(group), max(group)
        same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
        folder = low[:same].rpartition("/")[0]
        present |= {f"{folder}/{file.path}": file for file in list_tree(folder)}
    return present


def file_sizes(uris: Sequence[str]) -> npt.NDArray[np.int64]:
    """Sizes in bytes (N,) of the files that contain the images, -1 for missing ones; objects are found by listing.

    Raises StorageError where a store can't be listed.
    """
    return file_versions(uris)[:, 0]


def file_versions(uris: Sequence[str]) -> npt.NDArray[np.int64]:
    """Size and modification time (N, 2) of the files that contain the images, of an object the number of its content.

    Both are -1 for missing files. Raises StorageError where a store can't be listed.
    """
    versions = file_states(uris)
    remote = {row: file_names(uri) for row, uri in enumerate(uris) if not storage.is_local(uri)}
    if remote:
        present = listed_objects([name for names in remote.values() for name in names])
        for row, names in remote.items():
            file = next((present[name] for name in names if name in present), None)
            versions[row] = (-1, -1) if file is None else (file.num_bytes, file.version)
    return versions


def is_hidden(path: str) -> bool:
    """Whether a path below a root, or a folder's name, is hidden or an extra of macOS in archives."""
    return path.startswith(".") or "/." in path or "__MACOSX" in path.split("/")


def printable_path(path: str) -> str:
    """A path as text, with each byte that isn't UTF-8 as `\\xe9`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _walk(root: str) -> Iterator[ListedFile]:
    if not os.path.isdir(root):
        raise storage.StorageError(f"{root} is not a folder; name an existing one")
    pending = [(root, frozenset((_identity(os.stat(root)),)))]
    start = len(root.rstrip("/")) + 1
    while pending:
        folder, above = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    state = _state(entry)
                    if state is not None and stat.S_ISREG(state.st_mode):
                        yield ListedFile(entry.path[start:], state.st_size)
                    elif state is not None and stat.S_ISDIR(state.st_mode) and _identity(state) not in above:
                        pending.append((entry.path, above | {_identity(state)}))
                    else:
                        yield ListedFile(entry.path[start:], -1)
        except OSError as error:
            raise storage.StorageError(
                f"can't list {error.filename}: {error.strerror}; make it readable or take it out of the folder"
            ) from None


def _state(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The state of an entry's target; None for a broken link."""
    try:
        return entry.stat()
    except OSError:
        return None


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def _list_s3(root: str) -> list[ListedFile]:
    """List the first two levels by a request for each prefix, and what is below them in parallel."""
    bucket, prefix = s3.split(root)
    prefix = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
    client = s3.client()
    with s3.translate_errors(root), ThreadPoolExecutor(_S3_THREADS) as pool:
        files, folders = _level(client, bucket, prefix)
        for level in pool.map(lambda folder: _level(client, bucket, folder), folders):
            files += level[0]
            for part in pool.map(lambda folder: _below(client, bucket, folder), level[1]):
                files += part
    if not files:
        raise storage.StorageError(f"{root} has no objects below it; check bucket and prefix")
    return [file._replace(path=file.path[len(prefix) :]) for file in files if not file.path.endswith("/")]


def _level(client: Any, bucket: str, prefix: str) -> tuple[list[ListedFile], list[str]]:
    pages = _pages(client, Bucket=bucket, Prefix=prefix, Delimiter="/")
    folders = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
    return _files_of(pages), folders


def _below(client: Any, bucket: str, prefix: str) -> list[ListedFile]:
    return _files_of(_pages(client, Bucket=bucket, Prefix=prefix))


def _pages(client: Any, **options: str) -> list[dict[str, Any]]:
    return s3.retry_denied(s3.SCHEME, lambda: list(client.get_paginator("list_objects_v2").paginate(**options)))


def _files_of(pages: Sequence[Mapping[str, Any]]) -> list[ListedFile]:
    return [
        ListedFile(item["Key"], item["Size"], _number_of(item["ETag"]))
        for page in pages
        for item in page.get("Contents", ())
    ]


def _number_of(etag: str) -> int:
    return int.from_bytes(hashlib.blake2b(etag.encode(), digest_size=7).digest())


def file_states(uris: Sequence[str]) -> npt.NDArray[np.int64]:
    """Size and modification time (N, 2) of local files; -1 for missing files and for objects."""
    chunks = [uris[start : start + _STAT_CHUNK] for start in range(0, len(uris), _STAT_CHUNK)]
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        states = list(pool.map(_states_of, chunks))
    return np.concatenate([np.empty((0, 2), dtype=np.int64), *states])


def _states_of(uris: Sequence[str]) -> npt.NDArray[np.int64]:
    states = np.full((len(uris), 2), -1, dtype=np.int64)
    for index, uri in enumerate(uris):
        state = file_state(uri)
        if state is not None:
            states[index] = state.st_size, state.st_mtime_ns
    return states
