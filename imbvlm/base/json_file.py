"""JSON files that may be missing or damaged, with errors that say how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError

T = TypeVar("T")


def read_json(uri: str, parse: Callable[[Any], T], fix: str) -> T | None:
    """The parsed content of a JSON file, None if there is no file; raises ImbvlmError with `fix` for a damaged one."""
    if not storage.exists(uri):
        return None
    with damage_named(f"{uri} is damaged", fix):
        return parse(storage.read_json(uri))


@contextmanager
def damage_named(problem: str, fix: str) -> Iterator[None]:
    """Within, what damaged content makes Python raise becomes an ImbvlmError: problem, cause, fix."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        cause = f"{type(error).__name__}: {str(error)[:300]}"
        raise ImbvlmError(f"{problem} ({cause}). {fix}") from None
