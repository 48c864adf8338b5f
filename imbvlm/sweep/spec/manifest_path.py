"""A sweep's manifest: its path becomes absolute as the sweep begins, and is found again after folders were moved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.trial_config import apply_overrides
from imbvlm.data.manifest import EMBEDDED, absolute_manifest
from imbvlm.sweep.spec.search_space import get_dotted
from imbvlm.sweep.spec.sweep_spec import SweepSpec


def with_absolute_paths(spec: SweepSpec) -> SweepSpec:
    """The spec with manifest, storage and features as another working directory finds them."""
    changes: dict[str, Any] = {"storage": storage.absolute(spec.storage)}
    if spec.feature_folder is not None:
        changes["feature_folder"] = storage.absolute(spec.feature_folder)
    manifest = get_dotted(spec.base, "data.manifest")
    if isinstance(manifest, str):
        changes["base"] = apply_overrides(spec.base, {"data.manifest": absolute_manifest(manifest)})
    return spec.model_copy(update=changes)


def with_located_manifest(spec: SweepSpec, folder: str, manifest: str | None = None) -> SweepSpec:
    """A spec from a sweep's folder with its manifest's location, which is searched for unless it is given.

    A manifest that is gone keeps the path that was written. Raises ImbvlmError for a given one that isn't there.
    """
    if manifest is not None:
        location = absolute_manifest(manifest)
        if not location.startswith(EMBEDDED) and not storage.exists(location):
            raise ImbvlmError(f"the manifest {manifest} is not there; give the path of the sweep's manifest")
    else:
        try:
            location = locate_manifest(spec, folder)
        except ImbvlmError:
            return spec
    return spec.model_copy(update={"base": apply_overrides(spec.base, {"data.manifest": location})})


def locate_manifest(spec: SweepSpec, folder: str) -> str:
    """The manifest of the sweep in a folder; raises ImbvlmError with the places where it was looked for.

    A relative path, which version 0.1 wrote, is relative to the folder in which the sweep was started. That follows
    from where the sweep is now, and so does the path of a manifest that was moved together with it.
    """
    written = str(spec.base["data"]["manifest"])
    if written.startswith(EMBEDDED) or not storage.is_local(written):
        return written
    path, moved = storage.local_path(written), _moved_along(written, spec.storage, folder)
    here = Path(os.path.abspath(path))
    places = [here, *moved] if path.is_absolute() else [*moved, here]
    location = next((place for place in places if os.path.exists(place)), None)
    if location is None:
        looked = " or ".join(dict.fromkeys(map(str, places)))
        raise ImbvlmError(
            f"the manifest {written} of the sweep {folder} is not at {looked}; put it back, or give its path with "
            "--manifest"
        )
    return str(location)


def _moved_along(manifest: str, written_storage: str, folder: str) -> list[Path]:
    """The manifest's path if it kept its place relative to the sweep's folder; empty where the paths don't tell."""
    if not storage.is_local(written_storage) or not storage.is_local(folder):
        return []
    path, before = storage.local_path(manifest), storage.local_path(written_storage)
    if path.is_absolute() != before.is_absolute():
        return []
    return [Path(os.path.normpath(Path(storage.absolute(folder)).parent / os.path.relpath(path, before)))]
