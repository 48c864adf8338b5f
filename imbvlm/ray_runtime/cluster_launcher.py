"""The check of Ray's own cluster launcher."""

from __future__ import annotations

from typing import Any

import jsonschema

from imbvlm.base.schema import Tree
from imbvlm.ray_runtime.ray_private import check_launcher_file


def launcher_problem(tree: Tree) -> str | None:
    """Return Ray's objection to the content of a launcher file, or None; values that are not set yet are ignored."""
    try:
        check_launcher_file(_without_nulls(tree))
    except jsonschema.ValidationError as error:
        key = ".".join(str(part) for part in error.absolute_path)
        return f"{f'{key}: ' if key else ''}{error.message}"
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        return f"Ray's cluster launcher can't read this: {error!r}. Compare it with cluster/gpu.yaml."
    return None


def _without_nulls(value: Any) -> Any:
    """Replace each null by an empty string, which Ray's schema accepts."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return "" if value is None else value
