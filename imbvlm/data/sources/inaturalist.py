"""Builds manifests from iNaturalist's annotations (2018, 2019, 2021), with species or a higher rank as classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pyarrow as pa

from imbvlm.base import storage
from imbvlm.base.errors import suggest_name
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.manifest import Manifest, ManifestError
from imbvlm.data.manifest_schema import is_utf8
from imbvlm.data.sources.manifest_builder import class_id
from imbvlm.longtail.taxonomy import Taxonomy

RANKS = ("species", "genus", "family", "order", "class", "phylum", "kingdom", "supercategory")
# Those that are nested, the highest first.
_TREE = RANKS[-2::-1]
NAMES = ("scientific", "common")
_FIX = "; give iNaturalist's own annotation file"


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str)


def _is_id(value: Any) -> bool:
    return class_id(str(value)) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and is_utf8(value)


# Fields of each list's entries, with their rules and the functions that check them.
_FIELDS: Mapping[str, Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "images": {"id": ("a number or a text", _is_key), "file_name": ("a path in UTF-8", _is_text)},
    "annotations": {"image_id": ("a number or a text", _is_key), "category_id": ("a whole number", _is_id)},
    "categories": {"id": ("a whole number", _is_id)},
}


def from_inaturalist(
    annotations: Mapping[str, str],
    root: str,
    name: str,
    *,
    categories: str | None = None,
    rank: str = "species",
    names: str = "scientific",
    group_by: str | None = None,
) -> Manifest:
    """Build a manifest from an annotation file for each split; images lie below `root` at their `file_name`.

    `categories` is the file with the names and ranks of the numbers in the annotations of 2018 and 2019. Without names
    the classes have their ids, and the manifest is marked as unnamed. `rank` joins species into a higher class; `names`
    is `scientific` or `common`; `group_by` is the images' field with their group, such as `location` in camera traps.
    The taxonomy is that of the categories where all have every rank. Raises ManifestError, StorageError.
    """
    if rank not in RANKS:
        raise ManifestError(name, [f"--rank must be a rank of iNaturalist, got {rank!r}; {suggest_name(rank, RANKS)}"])
    if names not in NAMES:
        raise ManifestError(
            name, [f"--names must be scientific or common, got {names!r}; {suggest_name(names, NAMES)}"]
        )
    files = {split: _load_json(path) for split, path in annotations.items()}
    for split, file in files.items():
        if not isinstance(file, dict):
            raise ManifestError(
                annotations[split], [f"it should be an object with images and annotations{_FIX}"], "file"
            )
    where = categories or next((annotations[split] for split, file in files.items() if file.get("categories")), None)
    if where is None:
        raise ManifestError(name, ["no file has categories; give categories.json by --categories"])
    listed = _load_json(categories) if categories else next(filter(_has_categories, files.values()))
    taxa = _entries(listed if isinstance(listed, dict) else {"categories": listed}, "categories", where)
    label_of, class_names = _classes(taxa, rank, names, where)
    read = {split: _rows(file, split, root, label_of, annotations[split], group_by) for split, file in files.items()}
    parts = [table for table, _ in read.values()]
    taxonomy, notes = _taxonomy(taxa, rank, label_of, class_names)
    notes += [
        f"{pluralize(number, 'annotation')} of {annotations[split]} left out: the file lists no image of that id"
        for split, (_, number) in read.items()
        if number
    ]
    ids = sorted(label_of)
    mapped = rank != "species" or ids != list(range(len(ids)))
    manifest = Manifest.build(
        pa.concat_tables(parts),
        class_names,
        name,
        notes=notes,
        label_map={str(key): label_of[key] for key in ids} if mapped else None,
        labeled_by_name=True,
        named=not all(text.removeprefix("class ").isdigit() for text in class_names),
        source=", ".join(annotations.values()),
    )
    return replace(manifest, taxonomy=taxonomy)


def _load_json(path: str) -> Any:
    # An annotation file may be larger than the limit of storage.read_json.
    try:
        return json.loads(storage.read_bytes(path))
    except RecursionError:
        raise ManifestError(path, [f"its values are nested too deeply{_FIX}"], "file") from None
    except ValueError as error:
        raise ManifestError(path, [f"it is no JSON ({error}){_FIX}"], "file") from None


def _has_categories(file: Mapping[str, Any]) -> bool:
    return bool(file.get("categories"))


def _entries(file: Mapping[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    """A list in a file, whose entries have valid fields; raises ManifestError for the first wrong one."""
    entries = file.get(key)
    if not isinstance(entries, list):
        raise ManifestError(source, [f"{key!r} should be a list{_FIX}"], "file")
    for index, entry in enumerate(entries):
        for name, (rule, is_valid) in _FIELDS[key].items():
            if not isinstance(entry, dict) or not is_valid(entry.get(name)):
                shown = f"{entry.get(name)!r:.60}" if isinstance(entry, dict) else f"the entry {entry!r:.60}"
                raise ManifestError(source, [f"{key}[{index}].{name} should be {rule}, and is {shown}{_FIX}"], "file")
    return entries


def _classes(taxa: list[dict[str, Any]], rank: str, names: str, source: str) -> tuple[dict[int, int], list[str]]:
    """Labels by category id, and the class names."""
    taxa = sorted(taxa, key=lambda taxon: int(taxon["id"]))
    repeated = [str(taxon["id"]) for taxon, following in pairwise(taxa) if int(taxon["id"]) == int(following["id"])]
    if repeated:
        number = pluralize(len(repeated), "category id")
        raise ManifestError(source, [f"{number} given twice: {join_limited(repeated, 3)}; keep one of each"], "file")
    if rank == "species":
        return {int(taxon["id"]): label for label, taxon in enumerate(taxa)}, [_name(taxon, names) for taxon in taxa]
    without_rank = [str(taxon["id"]) for taxon in taxa if not taxon.get(rank)]
    if without_rank:
        shown = ", ".join(without_rank[:3])
        raise ManifestError(
            source,
            [f"{len(without_rank)} categories have no {rank}, such as {shown}; give categories.json by --categories"],
        )
    groups = sorted({str(taxon[rank]) for taxon in taxa})
    return {int(taxon["id"]): groups.index(str(taxon[rank])) for taxon in taxa}, groups


def _taxonomy(
    taxa: list[dict[str, Any]], rank: str, label_of: Mapping[int, int], class_names: Sequence[str]
) -> tuple[Taxonomy | None, list[str]]:
    """The ranks above the classes, None without them, and a note where they are no tree.

    Nature has taxa of one name in several places, such as Oenanthe, birds and plants. Each is named with its parent.
    """
    ranks = [name for name in _TREE if RANKS.index(name) > RANKS.index(rank)]
    lacking = [str(taxon["id"]) for taxon in taxa if not all(taxon.get(name) for name in ranks)]
    if not ranks or len(lacking) == len(taxa):
        return None, []
    if lacking:
        return None, [f"no taxonomy: {len(lacking):,} categories lack a rank, such as {lacking[0]}"]
    paths: dict[int, set[tuple[str, ...]]] = {}
    for taxon in taxa:
        paths.setdefault(label_of[int(taxon["id"])], set()).add(tuple(str(taxon[name]) for name in ranks))
    divided = [class_names[label] for label, lineages in paths.items() if len(lineages) > 1]
    if divided:
        return None, [f"no taxonomy: {divided[0]!r} lies in several places, as do {len(divided) - 1:,} other classes"]
    above = {names[:level] for lineages in paths.values() for names in lineages for level in range(1, len(ranks) + 1)}
    homonyms = {key for key, count in Counter((len(path), path[-1]) for path in above).items() if count > 1}
    lineages = []
    for _, (names,) in sorted(paths.items()):
        lineage: list[str] = []
        for name in names:
            is_homonym = (len(lineage) + 1, name) in homonyms
            lineage.append(f"{name} ({lineage[-1]})" if is_homonym else name)
        lineages.append(tuple(lineage))
    return Taxonomy((*ranks, rank), tuple(lineages)), []


def _name(taxon: Mapping[str, Any], names: str) -> str:
    scientific = str(taxon.get("name", ""))
    if not scientific or scientific.isdigit():
        return f"class {taxon['id']}"
    return str(taxon.get("common_name") or scientific) if names == "common" else scientific


def _plain_text(value: Any) -> str:
    # JSON may have surrogates, which no UTF-8 has.
    return str(value).encode("utf-8", "replace").decode()


def _rows(
    file: Mapping[str, Any], split: str, root: str, label_of: Mapping[int, int], source: str, group_by: str | None
) -> tuple[pa.Table, int]:
    """Rows of a file's images, and the number of its annotations without an image."""
    images = _entries(file, "images", source)
    category_of = {
        annotation["image_id"]: int(annotation["category_id"])
        for annotation in (_entries(file, "annotations", source) if "annotations" in file else ())
    }
    unlabeled = [str(image["file_name"]) for image in images if image["id"] not in category_of]
    if unlabeled:
        raise ManifestError(
            source,
            [f"{len(unlabeled)} images have no annotation, such as {unlabeled[0]}; give each one, or take them out"],
            "file",
        )
    if group_by is not None and not any(group_by in image for image in images):
        fields = sorted({field for image in images[:100] for field in image})
        problem = f"its images have no field {group_by!r} for groups; {suggest_name(group_by, fields)}"
        raise ManifestError(source, [problem], "file")
    groups = [None if group_by is None else image.get(group_by) for image in images]
    # The manifest's own check reports the rows with an unknown category, which is label -1.
    labels = [label_of.get(category_of[image["id"]], -1) for image in images]
    folder = storage.absolute(root)
    table = pa.table(
        {
            "uri": [f"{folder}/{image['file_name']}" for image in images],
            "label": pa.array(labels, pa.int32()),
            "split": [split] * len(images),
            "group": pa.array([None if group is None else _plain_text(group) for group in groups], pa.large_string()),
        }
    )
    return table, len(category_of.keys() - {image["id"] for image in images})
