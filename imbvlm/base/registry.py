"""Registries: one table for each kind of extension, whose implementations are imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any, Generic, TypeVar

from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.base.plugins import active_plugins

EntryT = TypeVar("EntryT")


@dataclass(frozen=True)
class Lazy:
    """A definition by its path, `imbvlm.longtail.losses:focal`, so that naming it imports nothing."""

    path: str

    def load(self) -> Any:
        """Import and return the definition."""
        module, _, name = self.path.partition(":")
        return getattr(import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)


def definition(function: Callable[..., Any]) -> Any:
    """What an entry names: the entry of a plug-in has the function itself, where ours have its path."""
    return function.load() if isinstance(function, Lazy) else function


class UnknownEntryError(ImbvlmError, KeyError):
    """A registry has no entry of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(Mapping[str, EntryT], Generic[EntryT]):
    """The entries of one kind by name, in the order in which texts list them; those of active plug-ins come last."""

    def __init__(self, kind: str, entries: Mapping[str, EntryT]) -> None:
        self.kind = kind
        self.own = dict(entries)

    def _all(self) -> Mapping[str, EntryT]:
        added = active_plugins().entries.get(self.kind)
        return {**self.own, **added} if added else self.own

    def __getitem__(self, name: str) -> EntryT:
        """Raises UnknownEntryError, which names the nearest valid name."""
        try:
            return self._all()[name]
        except KeyError:
            raise UnknownEntryError(f"{name!r} is no {self.kind}; {suggest_name(name, self)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def union(self, discriminator: str = "name", *, is_own: bool = False) -> Any:
        """The annotation of a configuration's field that holds any entry's `config`, told apart by `discriminator`.

        `is_own` leaves out those of plug-ins, for classes that are made when their module is imported.
        """
        # Pydantic takes a tenth of a second, and tables are listed without it.
        from pydantic import Field

        sections = [getattr(entry, "config") for entry in (self.own if is_own else self).values()]  # noqa: B009
        return Annotated[reduce(or_, sections), Field(discriminator=discriminator)]
