"""Plug-ins as files: those that the caller names, and their copies in folders of sweeps and models."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from imbvlm.base import storage
from imbvlm.base.errors import PluginNeededError
from imbvlm.base.plugins import Plugins, PluginSource, active_plugins, plugin_error, run_plugins

COPIES_FOLDER = "plugins"
# Limit on the code of a plug-in, which every trial takes along.
MAX_BYTES = 1_000_000
MAX_DIFF_LINES = 5


@contextmanager
def use_plugins(*locations: str) -> Iterator[Plugins]:
    """Within, registries have the entries of the plug-ins at these locations, whose code runs in this process.

    Raises ConfigError with place and cause for a plug-in that can't be read or run, or takes a name that exists.
    """
    absolute = [*dict.fromkeys(map(storage.absolute, locations))]
    current = active_plugins()
    plugins = current if current.locations == absolute else run_plugins(tuple(map(_read, absolute)))
    with plugins.active():
        yield plugins


def _read(location: str) -> PluginSource:
    """Read a plug-in's code without running it; raises ConfigError, StorageError."""
    name, is_file = location.rpartition("/")[2], location.endswith(".py")
    if not name.removesuffix(".py").isidentifier():
        raise plugin_error(location, f"a plug-in needs a name that Python can import, got {name!r}. Rename it.")
    if not storage.exists(location if is_file else storage.join(location, "__init__.py")):
        raise plugin_error(
            location,
            "a plug-in must be a Python file (.py) or a folder with __init__.py, and none is here. Give its path.",
        )
    files = [(name, storage.read_bytes(location))] if is_file else list(_package_files(location, name))
    if (num_bytes := sum(len(content) for _, content in files)) > MAX_BYTES:
        raise plugin_error(
            location,
            f"a plug-in may have {MAX_BYTES:,} bytes of code, and this has {num_bytes:,}. Name a smaller folder.",
        )
    return PluginSource(name, tuple(sorted(files)), location)


def _package_files(folder: str, path: str) -> Iterator[tuple[str, bytes]]:
    files = storage.file_states(folder)
    for name in storage.list_files(folder):
        if name not in files and name.isidentifier() and name != "__pycache__":
            yield from _package_files(storage.join(folder, name), f"{path}/{name}")
        elif name in files and name.endswith(".py"):
            yield f"{path}/{name}", storage.read_bytes(storage.join(folder, name))


def plugin_options() -> str:
    """The options of a command that name the active plug-ins, with a space before each."""
    return "".join(f" --plugin {shlex.quote(location)}" for location in active_plugins().locations)


# ----------------------------------------------------------------------------------------------------- copies


def write_copies(folder: str, sources: Sequence[PluginSource]) -> None:
    """Write the code of plug-ins into a folder of a sweep or a model, in place of earlier copies."""
    copies = storage.join(folder, COPIES_FOLDER)
    for source in sources:
        copy = storage.join(copies, source.name)
        # The caller may have named the copy itself.
        if storage.absolute(copy) != source.location:
            storage.delete(copy)
            for path, content in source.files:
                storage.write_bytes(storage.join(copies, *path.split("/")), content)


def require_plugins(folder: str, digests: Mapping[str, str], *, check: bool = True) -> None:
    """Raise PluginNeededError where a plug-in that a folder has a copy of isn't active, or where it has other code.

    Without `check` the code may differ.
    """
    active = {source.name: source for source in active_plugins().sources}
    copies = [storage.join(folder, COPIES_FOLDER, name) for name in digests]
    for name, copy in zip(digests, copies, strict=True):
        if name not in active:
            raise PluginNeededError(
                f"{folder} needs the plug-in {name}, and its code runs only where you name it. Read {copy}, then add "
                f"--plugin {copy}.",
                copies,
            )
        if check and active[name].digest != digests[name]:
            raise PluginNeededError(
                f"{active[name].location} isn't the plug-in that {folder} was made with: {plugin_change(folder, name)}."
                f" Name the folder's copy, --plugin {copy}.",
                copies,
            )


def plugin_change(folder: str, name: str) -> str:
    """How an active plug-in differs from a folder's copy: a clause with the first lines of the difference."""
    copy = storage.join(folder, COPIES_FOLDER, name)
    before = dict(_read(copy).files) if storage.exists(copy) else {}
    now = dict(next(source.files for source in active_plugins().sources if source.name == name))
    path = next((path for path in sorted(before | now) if before.get(path) != now.get(path)), name)
    old, new = (files.get(path, b"").decode(errors="replace").splitlines() for files in (before, now))
    lines = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
    return f"{path} has changed ({' | '.join(lines[:MAX_DIFF_LINES])})"


def read_digests(data: Mapping[str, str]) -> dict[str, str]:
    """Names of plug-ins with their digests from a description; raises ValueError or TypeError for other data."""
    for name, digest in data.items():
        if not name.removesuffix(".py").isidentifier() or not isinstance(digest, str):
            raise ValueError(f"{name!r} is no plug-in's name, or {digest!r} no digest")
    return dict(data)
