"""All files below a folder or an s3:// prefix, with their sizes; S3 is listed in parallel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from imbvlm import s3, storage

_S3_THREADS = 32


class Found(NamedTuple):
    """A file by its path below the root that was listed, with its size in bytes."""

    path: str
    num_bytes: int


def list_tree(root: str) -> list[Found]:
    """Every file below a root, sorted by path; hidden ones are left out. Raises StorageError."""
    found = list(_walk(str(storage.local_path(root)))) if storage.is_local(root) else _list_s3(root)
    return sorted(file for file in found if not _hidden(file.path))


def _hidden(path: str) -> bool:
    return path.startswith((".", "__MACOSX/")) or "/." in path


def _walk(root: str) -> Iterator[Found]:
    if not os.path.isdir(root):
        raise storage.StorageError(f"{root} is not a folder")
    pending = [root]
    start = len(root.rstrip("/")) + 1
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        pending.append(entry.path)
                    elif entry.is_file():
                        yield Found(entry.path[start:], entry.stat().st_size)
        except OSError as error:
            raise storage.StorageError(f"can't list {error.filename}: {error.strerror}") from None


def _list_s3(root: str) -> list[Found]:
    """Prefixes of the first two levels are found one request each, and what is below them side by side."""
    bucket, prefix = s3.split(root)
    prefix = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
    client = s3.client()
    with s3.explained(root), ThreadPoolExecutor(_S3_THREADS) as pool:
        files, folders = _level(client, bucket, prefix)
        for level in pool.map(lambda folder: _level(client, bucket, folder), folders):
            files += level[0]
            for part in pool.map(lambda folder: _below(client, bucket, folder), level[1]):
                files += part
    if not files:
        raise storage.StorageError(f"nothing is below {root}")
    return [Found(file.path[len(prefix) :], file.num_bytes) for file in files if not file.path.endswith("/")]


def _level(client: Any, bucket: str, prefix: str) -> tuple[list[Found], list[str]]:
    files: list[Found] = []
    folders: list[str] = []
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
        files += [Found(item["Key"], item["Size"]) for item in page.get("Contents", ())]
        folders += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
    return files, folders


def _below(client: Any, bucket: str, prefix: str) -> list[Found]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [Found(item["Key"], item["Size"]) for page in pages for item in page.get("Contents", ())]
