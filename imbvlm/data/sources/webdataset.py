"""Builds manifests from WebDataset tar shards; images stay in place, each a byte range of its shard."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Self

from imbvlm.base import storage
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.files.byte_ranges import range_uri
from imbvlm.data.files.file_listing import IMAGE_SUFFIXES, printable_path
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.sources.manifest_builder import assemble, class_id, split_of_file

_LABEL_KEYS = ("label", "class", "cls", "class_id", "category_id", "target", "class_name")
_NUM_THREADS = 8
# A sparse member may have any size in a small shard.
_MAX_LABEL_BYTES = 1 << 20


class _WholeHeader(tarfile.TarInfo):
    """A member's header that raises an error where it is cut or damaged; tarfile takes that for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            where = f"at byte {tarfile_.offset:,}, where a member should begin"
            raise tarfile.ReadError(f"{error} {where}; it may be cut short, so copy or make it again") from None


@dataclass
class _Shard:
    """A shard's samples by key, each with its image's `uri` and its `label`.

    Further the names of other members, the keys of replaced images, and the names of links, pipes and devices.
    """

    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    has_end: bool = True


def from_shards(paths: Sequence[str], name: str, *, class_names: Sequence[str] | None = None) -> Manifest:
    """Build a manifest from uncompressed tar shards of `KEY.jpg` (or another image) with `KEY.cls` or `KEY.json`.

    The split is in a shard's name (`train-0000.tar`, `imagenet-val-000.tar`); the default is training. Notes list the
    members that are left out. Raises ManifestError, StorageError.
    """
    paths = [storage.absolute(path) for path in paths]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        shards = list(pool.map(_read_shard, paths))
    images = [
        (path, key, sample)
        for path, shard in zip(paths, shards, strict=True)
        for key, sample in shard.samples.items()
        if "uri" in sample
    ]
    open_ended = [path for path, shard in zip(paths, shards, strict=True) if not shard.has_end]
    notes = [*_left_out(shards), *_open_ended_notes(open_ended)]
    if not images:
        raise ManifestError(", ".join(paths), ["no image is in it, such as KEY.jpg; name shards with images", *notes])
    unlabeled = [f"{path}: {key}" for path, key, sample in images if "label" not in sample]
    if unlabeled:
        shown = ", ".join(unlabeled[:5])
        raise ManifestError(
            ", ".join(paths),
            [
                f"{len(unlabeled)} images have neither a .cls nor a .json with a label: {shown}; "
                "add KEY.cls next to each KEY.jpg"
            ],
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
        notes=notes,
        source=", ".join(paths),
    )


def _left_out(shards: Sequence[_Shard]) -> list[str]:
    others = [name for shard in shards for name in shard.others]
    dotted = [name for name in others if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    extensions = sorted({printable_path(_split_name(name)[1]) for name in set(others) - set(dotted)})
    replaced = [name for shard in shards for name in shard.replaced]
    notes = []
    if dotted:
        notes.append(
            f"{pluralize(len(dotted), 'image')} left out, such as {printable_path(dotted[0])}: in WebDataset a name's "
            "extension begins at its first dot; rename them without a dot in the key"
        )
    if extensions:
        kinds = [f".{extension}" if extension else "no extension" for extension in extensions]
        number = pluralize(len(others) - len(dotted), "member")
        notes.append(f"{number} left out by their extension: {join_limited(kinds)}")
    if replaced:
        number, example = pluralize(len(replaced), "image"), printable_path(replaced[0].removeprefix("/"))
        notes.append(f"{number} left out for a later one of the same key in its shard, such as {example}")
    links = [name for shard in shards for name in shard.links]
    if links:
        number = pluralize(len(links), "member")
        notes.append(
            f"{number} left out, each a link, a pipe or a device, such as {printable_path(links[0])}: tar writes a "
            "file that comes twice as a link; make the shard with --hard-dereference"
        )
    lone = [
        key for shard in shards for key, sample in shard.samples.items() if "label" in sample and "uri" not in sample
    ]
    if lone:
        shown = printable_path(lone[0].removeprefix("/"))
        notes.append(f"{pluralize(len(lone), 'label')} left out without an image of the same key, such as {shown}")
    return notes


def _open_ended_notes(paths: Sequence[str]) -> list[str]:
    shown = join_limited([printable_path(path) for path in paths], 3)
    return [f"{pluralize(len(paths), 'shard')} without tar's end mark, and perhaps cut short: {shown}"] if paths else []


def _read_shard(path: str) -> _Shard:
    shard = _Shard()
    storage.check_readable(path)
    filesystem, inner = storage.open_filesystem(path)
    is_local = storage.is_local(path)
    try:
        # Headers are far apart: this seeks in local files, and reads objects from start to end in one request.
        with (
            filesystem.open_input_file(inner) if is_local else filesystem.open_input_stream(inner) as stream,
            tarfile.open(fileobj=stream, mode="r:" if is_local else "r|", tarinfo=_WholeHeader) as archive,
        ):
            for member in archive:
                if member.isfile():
                    _add_member(shard, path, archive, member)
                elif not member.isdir():
                    shard.links.append(member.name)
            shard.has_end = archive.offset < filesystem.get_file_info(inner).size
    except tarfile.TarError as error:
        raise ManifestError(
            path,
            [f"it can't be read as an uncompressed tar file: {error}; unpack a compressed one with gunzip"],
            "shard",
        ) from None
    except OSError as error:
        raise storage.storage_error("read", path, error) from None
    return shard


def _split_name(name: str) -> tuple[str, str]:
    """A member's key and extension, which begins after the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}", extension


def _add_member(shard: _Shard, path: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    key, extension = _split_name(member.name)
    sample = shard.samples.setdefault(key, {})
    if f".{extension.lower()}" in IMAGE_SUFFIXES:
        # As in tar itself, a later member replaces an earlier one.
        if "uri" in sample:
            shard.replaced.append(key)
        sample["uri"] = range_uri(path, member.offset_data, member.size)
    elif extension in ("cls", "json"):
        if member.size > _MAX_LABEL_BYTES:
            raise ManifestError(
                path,
                [
                    f"{member.name} has {member.size:,} bytes, too many for a label; "
                    "give a shard with text files of a label each"
                ],
                "shard",
            )
        content = archive.extractfile(member)
        data = content.read() if content is not None else b""
        label = _label_of(data) if extension == "json" else _text_of(data, path, member.name)
        if label is not None:
            number = class_id(str(label))
            sample["label"] = label if number is None else number
    elif not key.endswith("/"):
        # Hidden files, whose key is empty, are macOS's extra files.
        shard.others.append(member.name)


def _text_of(data: bytes, path: str, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        text = data[:80].decode("utf-8", "backslashreplace").strip()
        problem = f"{printable_path(name)} has '{text}', which is not UTF-8; write labels as UTF-8"
        raise ManifestError(path, [problem], "shard") from None


def _label_of(data: bytes) -> Any:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return next((fields[key] for key in _LABEL_KEYS if key in fields), None) if isinstance(fields, dict) else None
