"""Images inside larger files: uris for byte ranges of tar shards and pack files, and the writer of pack files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from imbvlm.base import storage

RANGE_MARK = "#bytes="
_RANGE = re.compile(RANGE_MARK + r"(\d+)\+(\d+)$")
_PACK_BYTES = 1_000_000_000


class ByteRange(NamedTuple):
    """A part of a file."""

    uri: str
    offset: int
    num_bytes: int


def range_uri(uri: str, offset: int, num_bytes: int) -> str:
    """The uri of an image that is a part of a file: `shard.tar#bytes=OFFSET+LENGTH`."""
    return f"{uri}{RANGE_MARK}{offset}+{num_bytes}"


def parse_range(uri: str) -> ByteRange | None:
    """The file, offset and length that a uri names; None for a whole file."""
    match = _RANGE.search(uri)
    return ByteRange(uri[: match.start()], int(match[1]), int(match[2])) if match else None


def whole_uri(uri: str) -> str:
    """The uri of the file that contains an image."""
    part = parse_range(uri)
    return uri if part is None else part.uri


class ContainerWriter:
    """Collects embedded images; beyond `max_embedded_bytes` it writes all of them to pack files."""

    def __init__(self, prefix: str | None, max_embedded_bytes: int) -> None:
        self.prefix, self.max_embedded_bytes = prefix, max_embedded_bytes
        self._embedded: list[bytes | None] = []
        self._ranges: list[str | None] = []
        self._num_bytes = 0
        self._stream: Any = None
        self._path, self._offset, self._num_packs = "", 0, 0

    def add(self, images: Sequence[bytes | None]) -> None:
        """Add rows; None for a row without an embedded image."""
        for image in images:
            self._num_bytes += len(image or b"")
            if self._num_packs == 0 and (self.prefix is None or self._num_bytes <= self.max_embedded_bytes):
                self._embedded.append(image)
                continue
            if self._num_packs == 0:
                self._move_to_packs()
            self._ranges.append(None if image is None else self._write(image))

    @property
    def embedded(self) -> list[bytes | None] | None:
        """The images that stay in the manifest; None if there are none."""
        return self._embedded if any(image is not None for image in self._embedded) else None

    def located(self, uris: Sequence[str | None]) -> list[str | None]:
        """The rows' uris, with those of packed images replaced by their byte ranges."""
        if not self._num_packs:
            return list(uris)
        return [packed or uri for packed, uri in zip(self._ranges, uris, strict=True)]

    def close(self) -> None:
        """Finish the last pack file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _move_to_packs(self) -> None:
        self._next_pack()
        self._ranges = [None if image is None else self._write(image) for image in self._embedded]
        self._embedded = []

    def _write(self, image: bytes) -> str:
        if self._offset >= _PACK_BYTES:
            self._next_pack()
        self._stream.write(image)
        start, self._offset = self._offset, self._offset + len(image)
        return range_uri(self._path, start, len(image))

    def _next_pack(self) -> None:
        self.close()
        self._path = f"{self.prefix}-{self._num_packs:05d}.pack"
        self._num_packs += 1
        self._offset = 0
        if storage.is_local(self._path):
            self._path = storage.absolute(self._path)
            storage.local_path(self._path).parent.mkdir(parents=True, exist_ok=True)
        filesystem, inner = storage.open_filesystem(self._path)
        self._stream = filesystem.open_output_stream(inner)
