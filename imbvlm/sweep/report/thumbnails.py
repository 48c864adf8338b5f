"""Small pictures of the images of confused pairs, as data: URIs."""

from __future__ import annotations

import base64
import io

from PIL import Image

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.data.images.decoding import ImageError, decode, fetch
from imbvlm.data.manifest import Manifest
from imbvlm.sweep.spec.manifest_path import locate_manifest
from imbvlm.sweep.spec.sweep_spec import SweepSpec

SIDE = 72
PER_PAIR = 3


def thumbnails(manifest: Manifest, split: str, rows: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """data: URIs of the first images of a split's rows that can still be read, and why the others can't."""
    numbers, found, reasons = manifest.rows_of(split), list[str](), list[str]()
    for row in rows[:PER_PAIR]:
        if row >= len(numbers):
            reasons.append(f"the manifest has no row {row:,} of the {split} split")
            continue
        entry = manifest.table.slice(int(numbers[row]), 1).select(["uri", "bytes"]).to_pylist()[0]
        try:
            pixels = decode(fetch(entry["uri"], entry["bytes"]))
        except (ImageError, storage.StorageError) as error:
            # The page has the pair's numbers all the same; a moved image is no reason to have no report.
            reasons.append(f"{entry['uri'] or f'row {row:,}'}: {error}")
            continue
        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE))
        data = io.BytesIO()
        image.save(data, "WEBP", quality=70)
        found.append(f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}")
    return found, reasons


def read_manifest(spec: SweepSpec, folder: str) -> Manifest | str:
    """The manifest of the sweep in a folder, or why there is none: a report is made of the sweep's folder alone."""
    try:
        return Manifest.read(locate_manifest(spec, folder))
    except ImbvlmError as error:
        return str(error)
