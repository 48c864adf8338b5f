"""Finds image files that are copies of each other: compares their sizes, then their last bytes, then all bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa

from imbvlm.base.errors import StorageError
from imbvlm.data.files.byte_ranges import ByteRange, parse_range, range_uri
from imbvlm.data.files.file_listing import file_sizes
from imbvlm.data.files.object_reader import MissingError, read_object
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import digest_of, with_column

_THREADS = 16
# Files of a dataset often have the same size, but hardly ever the same end.
_LAST_BYTES = 4096


def mark_duplicates(manifest: Manifest) -> Manifest:
    """The manifest with content digests of training files that are copies, so that random splits keep them together.

    If a store doesn't answer, the manifest gets a note that its files were not compared.
    """
    contents = manifest.table.column("content").to_pylist()
    uris = manifest.table.column("uri").to_pylist()
    rows = [row for row in manifest.rows_of("train").tolist() if contents[row] is None]
    try:
        digests = duplicate_digests([uris[row] for row in rows])
    except StorageError as error:
        note = f"files were not compared, so copies of one image may fall on both sides of a split: {error}"
        return replace(manifest, notes=(*manifest.notes, note))
    for row, digest in zip(rows, digests, strict=True):
        contents[row] = digest
    column = pa.array(contents, manifest.table.schema.field("content").type)
    return replace(manifest, table=with_column(manifest.table, "content", column))


def duplicate_digests(uris: Sequence[str]) -> list[bytes | None]:
    """Digests of the files that have a copy under another name in the list, None for all others.

    Reads only files that share their size, and all bytes only of those that share their end too. Raises StorageError.
    """
    ranges = {uri: part for uri, part in _byte_ranges(list(dict.fromkeys(uris))).items() if part.num_bytes > 0}
    keys: dict[str, tuple[int, bytes]] = {uri: (part.num_bytes, b"") for uri, part in ranges.items()}
    with ThreadPoolExecutor(_THREADS) as pool:
        for max_bytes in (_LAST_BYTES, None):
            counts = Counter(keys.values())
            similar = [uri for uri, key in keys.items() if counts[key] > 1]
            digests = pool.map(_end_digest, [ranges[uri] for uri in similar], [max_bytes] * len(similar))
            keys = {
                uri: (ranges[uri].num_bytes, digest)
                for uri, digest in zip(similar, digests, strict=True)
                if digest is not None
            }
    counts = Counter(keys.values())
    return [keys[uri][1] if uri in keys and counts[keys[uri]] > 1 else None for uri in uris]


def _byte_ranges(uris: Sequence[str]) -> dict[str, ByteRange]:
    """The file, offset and size of each image; the size of a missing file is -1."""
    parts = {uri: part for uri in uris if (part := parse_range(uri))}
    whole = [uri for uri in uris if uri not in parts]
    sizes = file_sizes(whole).tolist()
    return parts | {uri: ByteRange(uri, 0, size) for uri, size in zip(whole, sizes, strict=True)}


def _end_digest(part: ByteRange, max_bytes: int | None) -> bytes | None:
    """Digest of the last `max_bytes` bytes, by default of all; None where they can't be read."""
    num_bytes = part.num_bytes if max_bytes is None else min(max_bytes, part.num_bytes)
    try:
        return digest_of(read_object(range_uri(part.uri, part.offset + part.num_bytes - num_bytes, num_bytes)))
    except MissingError:
        return None
