"""Manifests from WebDataset tar shards: images stay where they are, each a byte range of its shard."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from imbvlm import storage
from imbvlm.data.assembly import IMAGE_SUFFIXES, assemble, split_of_file
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.packs import range_uri

_LABEL_KEYS = ("label", "class", "cls", "class_id", "category_id", "target", "class_name")
_SHARDS_AT_ONCE = 8
# A sparse member is of any size in a small shard.
_MOST_LABEL_BYTES = 1 << 20


def from_shards(paths: Sequence[str], name: str, *, class_names: Sequence[str] | None = None) -> Manifest:
    """Uncompressed tar shards: `KEY.jpg` (or another image) with `KEY.cls`, or `KEY.json` with a label.

    A shard's name tells its split (`train-0000.tar`, `imagenet-val-000.tar`), or else it is training. Raises
    ManifestError, StorageError.
    """
    paths = [storage.absolute(path) for path in paths]
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        shards = list(pool.map(_read_shard, paths))
    samples = [(path, key, sample) for path, shard in zip(paths, shards, strict=True) for key, sample in shard.items()]
    images = [entry for entry in samples if "uri" in entry[2]]
    unlabelled = [f"{path}: {key}" for path, key, sample in images if "label" not in sample]
    if unlabelled:
        shown = ", ".join(unlabelled[:5])
        raise ManifestError(
            ", ".join(paths), [f"{len(unlabelled)} images have neither a .cls nor a .json with a label: {shown}"]
        )
    labels = [sample["label"] for _, _, sample in images]
    if not all(isinstance(label, int) for label in labels):
        labels = [str(label) for label in labels]
    return assemble(
        name,
        labels,
        [split_of_file(path) or "train" for path, _, _ in images],
        uris=[sample["uri"] for _, _, sample in images],
        class_names=class_names,
        source=", ".join(paths),
    )


def _read_shard(path: str) -> dict[str, dict[str, Any]]:
    """Sample's key -> its image's uri and its label."""
    samples: dict[str, dict[str, Any]] = {}
    filesystem, inner = storage.open_filesystem(path)
    local = storage.is_local(path)
    try:
        # Headers are far apart: local files are skipped through, objects are read from start to end in one request.
        with (
            filesystem.open_input_file(inner) if local else filesystem.open_input_stream(inner) as stream,
            tarfile.open(fileobj=stream, mode="r:" if local else "r|") as archive,
        ):
            for member in archive:
                if member.isfile():
                    _add_member(samples, path, archive, member)
    except FileNotFoundError:
        raise storage.StorageError(f"{path} is not there") from None
    except tarfile.TarError as error:
        raise ManifestError(path, [f"it can't be read as an uncompressed tar file: {error}"]) from None
    except OSError as error:
        raise storage.failure("read", path, error) from None
    return samples


def _add_member(
    samples: dict[str, dict[str, Any]], path: str, archive: tarfile.TarFile, member: tarfile.TarInfo
) -> None:
    folder, _, file = member.name.rpartition("/")
    stem, _, extension = file.partition(".")
    sample = samples.setdefault(f"{folder}/{stem}", {})
    if f".{extension.lower()}" in IMAGE_SUFFIXES:
        sample["uri"] = range_uri(path, member.offset_data, member.size)
    elif extension in ("cls", "json"):
        if member.size > _MOST_LABEL_BYTES:
            raise ManifestError(path, [f"{member.name} has {member.size:,} bytes, too many for a label"])
        content = archive.extractfile(member)
        text = content.read().decode().strip() if content is not None else ""
        label = _label_of(text) if extension == "json" else text
        if label is not None:
            sample["label"] = int(label) if str(label).isdigit() else label


def _label_of(text: str) -> Any:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return next((data[key] for key in _LABEL_KEYS if key in data), None) if isinstance(data, dict) else None
