"""taxonomy.json of an exported model: the tree over its classes."""

from __future__ import annotations

import json

from imbvlm.base import storage
from imbvlm.base.json_file import read_json
from imbvlm.inference.model_parts import EXPORT_AGAIN
from imbvlm.longtail.taxonomy import Taxonomy

TAXONOMY_FILE = "taxonomy.json"
FORMAT = 1


def write_taxonomy(folder: str, taxonomy: Taxonomy) -> None:
    """Write a tree over the classes into a model's folder."""
    text = json.dumps({"format": FORMAT, **taxonomy.to_dict()}, ensure_ascii=False)
    storage.write_bytes(storage.join(folder, TAXONOMY_FILE), text.encode())


def read_taxonomy_file(folder: str, num_classes: int) -> Taxonomy | None:
    """The tree in a model's folder, None without one; raises ImbvlmError for a damaged file."""
    location = storage.join(folder, TAXONOMY_FILE)
    return read_json(location, lambda content: Taxonomy.from_dict(content, num_classes), EXPORT_AGAIN)
