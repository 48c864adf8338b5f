"""Small pictures of the images of confused pairs, as data: URIs."""

from __future__ import annotations

import base64
import io

from PIL import Image

from imbvlm import storage
from imbvlm.data.images import ImageError, decode, fetch
from imbvlm.data.manifest import Manifest
from imbvlm.errors import ImbvlmError

SIDE = 72
PER_PAIR = 3


def thumbnails(manifest: Manifest, split: str, rows: tuple[int, ...]) -> list[str]:
    """data: URIs of the first images of a split's rows that can still be read."""
    numbers, found = manifest.rows_of(split), list[str]()
    for row in rows[:PER_PAIR]:
        if row >= len(numbers):
            continue
        entry = manifest.table.slice(int(numbers[row]), 1).select(["uri", "bytes"]).to_pylist()[0]
        try:
            pixels = decode(fetch(entry["uri"], entry["bytes"]))
        except (ImageError, storage.StorageError):
            # The page has the pair's numbers all the same; a moved image is no reason to have no report.
            continue
        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE))
        data = io.BytesIO()
        image.save(data, "WEBP", quality=70)
        found.append(f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}")
    return found


def manifest_or_none(uri: str) -> Manifest | None:
    """The sweep's manifest, or None where it has gone: a report is made of the sweep's folder alone."""
    try:
        return Manifest.read(uri)
    except ImbvlmError:
        return None
