"""Plug-ins: entries of a user's own for registries, from Python files and packages that the caller names.

A plug-in defines tables by the names in TABLES: `LOSSES = {"poly1": Loss(...)}`. A registry has its own entries and
those of the plug-ins that are active where it is asked, in a context variable: commands activate those that they are
given, workers those of their trial. Registries themselves never change, so that two sweeps in one process don't see
each other's entries. A configuration's class is made for a set of plug-ins (`trial_class`) and carries it; unpickled
elsewhere, it brings the code along and runs it there, so that workers need no file of the user's.

Only code that the caller names runs. A sweep's folder and an exported model have copies (`plugin_files`), which are
compared with the caller's and never run by themselves. Code is read once into memory and run under a module name with
its digest: an edited file is another module, and submodules are those that were read.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pkgutil import resolve_name
from types import CodeType, ModuleType
from typing import Any, TypeVar

from imbvlm.base.errors import ConfigError, Problem

# The registry of each table that a plug-in may define.
TABLES = {
    "LOSSES": "imbvlm.config.loss_registry:LOSSES",
    "METHODS": "imbvlm.config.method_registry:METHODS",
    "SECOND_STAGES": "imbvlm.config.second_stage_registry:SECOND_STAGES",
    "ENCODERS": "imbvlm.config.encoder_entries:ENCODERS",
    "BENCHMARKS": "imbvlm.data.sources.benchmark_registry:BENCHMARKS",
    "SAMPLERS": "imbvlm.sweep.spec.sampler_registry:SAMPLERS",
}
Result = TypeVar("Result")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class PluginSource:
    """The code of a plug-in, a file or a package: its files as pairs of path and content, sorted by path.

    A file's path is the plug-in's `name`, such as `my_losses.py`. Paths in a package begin with its name and a slash.
    """

    name: str
    files: tuple[tuple[str, bytes], ...]
    # As the caller named it, absolute.
    location: str = field(compare=False)

    @property
    def digest(self) -> str:
        """SHA-256 of a file; of a package, that of the lines `DIGEST  PATH` of its files."""
        digests = {path: hashlib.sha256(content).hexdigest() for path, content in self.files}
        if self.name in digests:
            return digests[self.name]
        return hashlib.sha256("".join(f"{digest}  {path}\n" for path, digest in digests.items()).encode()).hexdigest()

    def place(self, path: str) -> str:
        """Where a file of the plug-in lay when it was read."""
        return self.location + path.removeprefix(self.name)


@dataclass(frozen=True)
class Plugins:
    """Plug-ins with their entries by the kind of registry; equal for equal code. Unpickled, their code is run."""

    sources: tuple[PluginSource, ...] = ()
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)

    @property
    def locations(self) -> list[str]:
        """The files and packages as the caller named them."""
        return [source.location for source in self.sources]

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each plug-in by its name."""
        return {source.name: source.digest for source in self.sources}

    def adding(self, kind: str, name: str) -> PluginSource:
        """The plug-in that has an entry of that kind."""
        return next(source for source in self.sources if name in _entries(source).get(kind, {}))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, registries have the entries of these plug-ins and of no others, in this thread."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def __reduce__(self) -> tuple[Any, ...]:
        return run_plugins, (self.sources,)


_ACTIVE = ContextVar("active plug-ins", default=Plugins())  # noqa: B039


def active_plugins() -> Plugins:
    """The plug-ins whose entries registries have in this thread."""
    return _ACTIVE.get()


def call_with(plugins: Plugins, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function with plug-ins active, such as those of this process in another one."""
    with plugins.active():
        return function(*arguments)


# ---------------------------------------------------------------------------------------------------- running


def run_plugins(sources: Sequence[PluginSource]) -> Plugins:
    """Run plug-ins that this process has not run yet, and check their entries; raises ConfigError."""
    entries: dict[str, dict[str, Any]] = {}
    owners: dict[str, PluginSource] = {}
    for source in sources:
        if (other := owners.setdefault(source.name, source)) is not source:
            raise plugin_error(source.location, f"{other.location} is called {source.name}, too. Rename one of them")
        for kind, added in _entries(source).items():
            for name in added.keys() & entries.setdefault(kind, {}).keys():
                other = Plugins(tuple(sources)).adding(kind, name)
                raise plugin_error(source.location, f"{kind} {name!r} is also in {other.location}. Rename one of them")
            entries[kind] |= added
    return Plugins(tuple(sources), entries)


def _entries(source: PluginSource) -> dict[str, dict[str, Any]]:
    """The checked entries of a plug-in by the kind of their registry; raises ConfigError."""
    module, entries = _module(source), dict[str, dict[str, Any]]()
    for table in TABLES.keys() & vars(module).keys():
        registry, added = resolve_name(TABLES[table]), getattr(module, table)
        # A plug-in may import our table of that name.
        if added is registry:
            continue
        if not isinstance(added, Mapping):
            raise plugin_error(
                _table_place(source, table), f"{table} must map names to entries, and is {added!r}. Define it as a dict"
            )
        for name, entry in added.items():
            if problem := _entry_problem(name, entry, registry.own):
                raise plugin_error(_table_place(source, table), f"{registry.kind} {name!r} {problem}")
        entries[registry.kind] = dict(added)
    if not any(entries.values()):
        raise plugin_error(source.location, f"the plug-in has no entries. Define one of {', '.join(TABLES)}")
    return entries


def _entry_problem(name: Any, entry: Any, own: Mapping[str, Any]) -> str | None:
    key, example = next(iter(own.items()))
    kind = type(example)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "is no name: small letters, digits and underscores are. Rename it"
    if name in own:
        return "exists in imbvlm. Rename it"
    if not isinstance(entry, kind):
        return f"must be a {kind.__module__}.{kind.__name__}, and is {type(entry).__name__}"
    # The name that configurations select an entry by, which ours have too. An encoder's `name` is another one.
    fields = getattr(getattr(entry, "config", None), "model_fields", {})
    own_name = entry.name if getattr(example, "name", None) == key else name
    selected_by = fields["name"].default if "name" in fields else own_name
    return None if selected_by == name else f"must have its own name in its options, and has {selected_by!r}"


def _module(source: PluginSource) -> ModuleType:
    """The module of a plug-in, run once in a process; raises ConfigError."""
    name = f"imbvlm_plugin_{source.name.removesuffix('.py')}_{source.digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    modules = _Modules(name, source)
    sys.meta_path.append(modules)
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        sys.meta_path.remove(modules)
        for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
            del sys.modules[loaded]
        places = {source.place(path) for path, _ in source.files}
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in places]
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else source.location
        if isinstance(error, SyntaxError) and error.filename in places:
            place = f"{error.filename}:{error.lineno}"
        cause = error.msg if isinstance(error, SyntaxError) else str(error)
        raise plugin_error(place, f"the plug-in can't be imported: {type(error).__name__}: {cause}") from error


class _Modules(MetaPathFinder, InspectLoader):
    """Finds and loads the modules of one plug-in from its code in memory."""

    def __init__(self, name: str, source: PluginSource) -> None:
        self._source, self._files = source, dict[str, tuple[str, bytes]]()
        for path, content in source.files:
            parts = path.removesuffix(".py").split("/")[1:]
            self._files[".".join([name, *(part for part in parts if part != "__init__")])] = path, content

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """The specification of a module of the plug-in."""
        if fullname not in self._files:
            return None
        spec = spec_from_loader(fullname, self, origin=self._place(fullname), is_package=self.is_package(fullname))
        if spec is not None:
            spec.has_location = True
        return spec

    def is_package(self, fullname: str) -> bool:
        """Whether a module is a folder."""
        return self._files[fullname][0].endswith("/__init__.py")

    def get_source(self, fullname: str) -> str:
        """The text of a module, which tracebacks show."""
        return self._files[fullname][1].decode()

    def get_code(self, fullname: str) -> CodeType:
        """The compiled module."""
        return self.source_to_code(self._files[fullname][1], self._place(fullname))

    def _place(self, fullname: str) -> str:
        return self._source.place(self._files[fullname][0])


def _table_place(source: PluginSource, table: str) -> str:
    """The line that defines a table."""
    for path, content in source.files:
        for number, line in enumerate(content.decode().splitlines(), 1):
            if line.startswith(table):
                return f"{source.place(path)}:{number}"
    return source.location


def plugin_error(place: str, message: str) -> ConfigError:
    """A mistake of a plug-in."""
    return ConfigError([Problem(message, place)])
