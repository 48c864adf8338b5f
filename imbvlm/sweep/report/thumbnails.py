"""Thumbnails of the images of confused pairs, as data: URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.data.images.decoding import ImageError, decode, fetch
from imbvlm.data.manifest import Manifest
from imbvlm.sweep.spec.manifest_path import locate_manifest
from imbvlm.sweep.spec.sweep_spec import SweepSpec

SIDE = 72
MAX_PER_PAIR = 3


def thumbnails(manifest: Manifest, split: str, rows: Sequence[int]) -> tuple[list[str], list[str]]:
    """data: URIs of the first readable images among a split's rows, and the errors of unreadable ones."""
    numbers, uris, reasons = manifest.rows_of(split), list[str](), list[str]()
    for row in rows[:MAX_PER_PAIR]:
        if row >= len(numbers):
            reasons.append(f"the manifest has no row {row:,} of the {split} split")
            continue
        entry = manifest.table.slice(int(numbers[row]), 1).select(["uri", "bytes"]).to_pylist()[0]
        try:
            pixels = decode(fetch(entry["uri"], entry["bytes"]))
        except (ImageError, storage.StorageError) as error:
            # A moved image doesn't prevent the report: the page shows the pair's numbers without it.
            reasons.append(f"{entry['uri'] or f'row {row:,}'}: {error}")
            continue
        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE))
        data = io.BytesIO()
        image.save(data, "WEBP", quality=70)
        uris.append(f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}")
    return uris, reasons


def read_manifest(spec: SweepSpec, folder: str) -> Manifest | str:
    """The manifest of the sweep in a folder, or the error: a report needs only the sweep's folder."""
    try:
        return Manifest.read(locate_manifest(spec, folder))
    except ImbvlmError as error:
        return str(error)
