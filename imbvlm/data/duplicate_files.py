"""Which image files are copies of each other: told by their sizes, then by their last bytes, then by all bytes."""

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
# Files of many datasets often have the same size, but hardly ever the same end.
_LAST_BYTES = 4096


def mark_duplicates(manifest: Manifest) -> Manifest:
    """The manifest with the content of training files that are copies, so that what is drawn keeps these together.

    Where a store doesn't answer, a note says that copies aren't known.
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
    """Digests of those files that have a copy under another name among these, None for all others.

    Only files that share their size are read, and as a whole only those that share their end too. Raises StorageError.
    """
    places = {uri: place for uri, place in _places(list(dict.fromkeys(uris))).items() if place.num_bytes > 0}
    keys: dict[str, tuple[int, bytes]] = {uri: (place.num_bytes, b"") for uri, place in places.items()}
    with ThreadPoolExecutor(_THREADS) as pool:
        for most_bytes in (_LAST_BYTES, None):
            counts = Counter(keys.values())
            alike = [uri for uri, key in keys.items() if counts[key] > 1]
            digests = pool.map(_end_digest, [places[uri] for uri in alike], [most_bytes] * len(alike))
            keys = {
                uri: (places[uri].num_bytes, digest)
                for uri, digest in zip(alike, digests, strict=True)
                if digest is not None
            }
    counts = Counter(keys.values())
    return [keys[uri][1] if uri in keys and counts[keys[uri]] > 1 else None for uri in uris]


def _places(uris: Sequence[str]) -> dict[str, ByteRange]:
    """Where each image's bytes lie, -1 of them where its file isn't there; a part of a file says so itself."""
    parts = {uri: part for uri in uris if (part := parse_range(uri))}
    whole = [uri for uri in uris if uri not in parts]
    sizes = file_sizes(whole).tolist()
    return parts | {uri: ByteRange(uri, 0, size) for uri, size in zip(whole, sizes, strict=True)}


def _end_digest(place: ByteRange, most_bytes: int | None) -> bytes | None:
    """Of so many last bytes; None where they can't be read."""
    num_bytes = place.num_bytes if most_bytes is None else min(most_bytes, place.num_bytes)
    try:
        return digest_of(read_object(range_uri(place.uri, place.offset + place.num_bytes - num_bytes, num_bytes)))
    except MissingError:
        return None
