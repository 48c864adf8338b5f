"""Manifests from iNaturalist's annotation files (2018, 2019, 2021): species or a higher rank as classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imbvlm import storage
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.errors import nearest

RANKS = ("species", "genus", "family", "order", "class", "phylum", "kingdom", "supercategory")
NAMES = ("scientific", "common")


def from_inaturalist(
    annotations: Mapping[str, str],
    root: str,
    name: str,
    *,
    categories: str | None = None,
    rank: str = "species",
    names: str = "scientific",
) -> Manifest:
    """Annotation JSON by split; images lie below `root` as `file_name` says.

    `categories` is the file with the names and ranks that the annotations of 2018 and 2019 hide behind numbers; where
    names stay unknown the classes are called by their ids and the manifest says that they are unnamed. `rank` joins
    species into a higher class, `names` is `scientific` or `common`. Raises ManifestError, StorageError.
    """
    if rank not in RANKS:
        raise ManifestError(name, [f"rank {rank!r} is not known; {nearest(rank, RANKS)}"])
    if names not in NAMES:
        raise ManifestError(name, [f"names {names!r} is not known; {nearest(names, NAMES)}"])
    files = {split: _read_json(path) for split, path in annotations.items()}
    listed = _read_json(categories) if categories else None
    taxa = listed["categories"] if isinstance(listed, dict) else listed
    if taxa is None:
        taxa = next((file["categories"] for file in files.values() if file.get("categories")), None)
    if taxa is None:
        raise ManifestError(name, ["no file has categories"])
    label_of, class_names = _classes(taxa, rank, names, name)
    parts = [_rows(file, split, root, label_of, annotations[split]) for split, file in files.items()]
    ids = sorted(label_of)
    mapped = rank != "species" or ids != list(range(len(ids)))
    return Manifest.build(
        pa.concat_tables(parts),
        class_names,
        name,
        label_map={str(key): label_of[key] for key in ids} if mapped else None,
        labeled_by_name=True,
        named=not all(text.removeprefix("class ").isdigit() for text in class_names),
        source=", ".join(annotations.values()),
    )


def _read_json(path: str) -> Any:
    try:
        return json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise ManifestError(path, [f"it is no JSON: {error}"]) from None


def _classes(taxa: list[dict[str, Any]], rank: str, names: str, source: str) -> tuple[dict[int, int], list[str]]:
    """Category id -> label, and the class names."""
    taxa = sorted(taxa, key=lambda taxon: int(taxon["id"]))
    if rank == "species":
        return {int(taxon["id"]): label for label, taxon in enumerate(taxa)}, [_name(taxon, names) for taxon in taxa]
    lacking = [str(taxon["id"]) for taxon in taxa if not taxon.get(rank)]
    if lacking:
        shown = ", ".join(lacking[:3])
        raise ManifestError(
            source, [f"{len(lacking)} categories have no {rank}, such as {shown}; give categories.json"]
        )
    groups = sorted({str(taxon[rank]) for taxon in taxa})
    return {int(taxon["id"]): groups.index(str(taxon[rank])) for taxon in taxa}, groups


def _name(taxon: Mapping[str, Any], names: str) -> str:
    scientific = str(taxon.get("name", ""))
    if not scientific or scientific.isdigit():
        return f"class {taxon['id']}"
    return str(taxon.get("common_name") or scientific) if names == "common" else scientific


def _rows(file: Mapping[str, Any], split: str, root: str, label_of: Mapping[int, int], source: str) -> pa.Table:
    category_of = {note["image_id"]: int(note["category_id"]) for note in file.get("annotations", ())}
    images = file["images"]
    bare = [str(image["file_name"]) for image in images if image["id"] not in category_of]
    if bare:
        raise ManifestError(source, [f"{len(bare)} images have no annotation, such as {bare[0]}"])
    labels = _labels([category_of[image["id"]] for image in images], label_of)
    folder = storage.absolute(root)
    return pa.table(
        {
            "uri": [f"{folder}/{image['file_name']}" for image in images],
            "label": pa.array(labels, pa.int32()),
            "split": [split] * len(images),
        }
    )


def _labels(categories: list[int], label_of: Mapping[int, int]) -> npt.NDArray[np.int64]:
    """Labels; an unknown category becomes -1, which the manifest's own check reports with its rows."""
    return np.array([label_of.get(category, -1) for category in categories], dtype=np.int64)
