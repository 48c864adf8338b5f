"""The path of a sweep's manifest: absolute from the start, and found again after folders have moved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.config.input_sections import absolute_encoder_name, absolute_path
from imbvlm.config.trial_config import apply_overrides
from imbvlm.data.manifest import EMBEDDED, absolute_manifest
from imbvlm.sweep.spec.search_space import get_dotted
from imbvlm.sweep.spec.sweep_spec import SweepSpec

_PATHS = {
    "encoder.name": absolute_encoder_name,
    "encoder.weights": absolute_path,
    "prompts.texts": storage.absolute,
}


def with_absolute_paths(spec: SweepSpec) -> SweepSpec:
    """Return the specification with absolute paths of all its files and folders, also in its space."""
    changes: dict[str, Any] = {"storage": storage.absolute(spec.storage)}
    if spec.feature_folder is not None:
        changes["feature_folder"] = storage.absolute(spec.feature_folder)
    base = _absolute_settings(spec.base)
    manifest = get_dotted(base, "data.manifest")
    if isinstance(manifest, str):
        base = apply_overrides(base, {"data.manifest": absolute_manifest(manifest)})
    changes["plugins"] = [*dict.fromkeys(map(storage.absolute, spec.plugins))]
    changes["first_trials"] = _absolute_settings(spec.first_trials)
    try:
        tree = spec.read_space().tree
    except ConfigError:
        # The check names its mistakes together with all others.
        return spec.model_copy(update={**changes, "base": base})
    space = _absolute_settings(tree)
    if space != tree:
        changes["space"] = space
    return spec.model_copy(update={**changes, "base": base})


def _absolute_settings(value: Any, key: str = "") -> Any:
    """Return a tree of settings with absolute values of the keys in _PATHS, dotted or nested."""
    if isinstance(value, dict):
        return {name: _absolute_settings(child, _dotted_key(key, name)) for name, child in value.items()}
    if isinstance(value, list):
        return [_absolute_settings(child, key) for child in value]
    return _PATHS[key](value) if key in _PATHS and isinstance(value, str) else value


def _dotted_key(parent: str, name: str) -> str:
    # A key below encoder.name, such as `choice`, describes its range.
    return parent if parent in _PATHS else f"{parent}.{name}" if parent in ("encoder", "prompts") else name


def with_located_manifest(spec: SweepSpec, folder: str, manifest: str | None = None) -> SweepSpec:
    """Return the specification of a sweep's folder with the present path of its manifest, given or located.

    A manifest that can't be located keeps its path. Raises ImbvlmError where a given one is missing.
    """
    if manifest is not None:
        location = absolute_manifest(manifest)
        if not location.startswith(EMBEDDED) and not storage.exists(location):
            raise ImbvlmError(f"the manifest {manifest} is missing. Give the path of the sweep's manifest.")
    else:
        try:
            location = locate_manifest(spec, folder)
        except ImbvlmError:
            return spec
    return spec.model_copy(update={"base": apply_overrides(spec.base, {"data.manifest": location})})


def locate_manifest(spec: SweepSpec, folder: str) -> str:
    """Return the path of the manifest of the sweep in a folder; raises ImbvlmError with the paths that were tried.

    Version 0.1 wrote paths relative to the folder in which the sweep was started. The sweep's present folder shows
    where that folder is, and where a manifest is that was moved together with the sweep.
    """
    written = str(spec.base["data"]["manifest"])
    if written.startswith(EMBEDDED) or not storage.is_local(written):
        return written
    path, moved = storage.local_path(written), _moved_together(written, spec.storage, folder)
    absolute = Path(os.path.abspath(path))
    candidates = [absolute, *moved] if path.is_absolute() else [*moved, absolute]
    location = next((candidate for candidate in candidates if os.path.exists(candidate)), None)
    if location is None:
        tried = " or ".join(dict.fromkeys(map(str, candidates)))
        raise ImbvlmError(
            f"the manifest {written} of the sweep {folder} is not at {tried}. Put it back, or give its path with "
            "--manifest."
        )
    return str(location)


def _moved_together(manifest: str, written_storage: str, folder: str) -> list[Path]:
    """Return the path of a manifest that moved together with the sweep's folder; [] where the paths don't tell."""
    if not storage.is_local(written_storage) or not storage.is_local(folder):
        return []
    path, before = storage.local_path(manifest), storage.local_path(written_storage)
    if path.is_absolute() != before.is_absolute():
        return []
    return [Path(os.path.normpath(Path(storage.absolute(folder)).parent / os.path.relpath(path, before)))]
