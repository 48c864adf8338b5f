"""Lists of the classes that are possible, such as a region's species, among which a model predicts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, printable, suggest_names
from imbvlm.base.formatting import limited

_MAX_LISTED = 1_000
# Letters of a name that a sentence shows: a file that is no list may be one long line.
_MAX_LENGTH = 80


def read_possible(path: str) -> tuple[str, ...]:
    """The class names in a text file, one a line; raises ImbvlmError for an empty one, StorageError."""
    if not path:
        raise ImbvlmError(
            "--only must name the file of the possible classes, got an empty name. Name it, or leave --only out."
        )
    names = tuple(line.strip() for line in utf8_lines(path) if line.strip())
    if not names:
        raise ImbvlmError(f"{path} must list the possible classes, one a line, and is empty. List one or more.")
    return names


def utf8_lines(path: str) -> list[str]:
    """A text file's lines; raises ImbvlmError where it isn't UTF-8, StorageError."""
    try:
        return storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ImbvlmError(f"{path} must be UTF-8, and byte {error.start} isn't. Save it as UTF-8.") from None


def possible_labels(names: Collection[str], class_names: Sequence[str], noun: str = "possible classes") -> list[int]:
    """The labels of possible classes, which errors call `noun`, in ascending order; classes of one name are all.

    Raises ImbvlmError with every unknown name and its nearest, and without any name.
    """
    if not names:
        raise ImbvlmError("a model needs a possible class, got none. List one or more.")
    classes, wanted = set(class_names), set(names)
    unknown = [printable(name)[:_MAX_LENGTH] for name in dict.fromkeys(names) if name not in classes]
    if unknown:
        clauses = limited(suggest_names(unknown, classes), _MAX_LISTED)
        rule = f"{noun} must be classes of the model, and these are none. List one a line; correct or remove them."
        raise ImbvlmError("\n  ".join([rule, *clauses]))
    return [label for label, name in enumerate(class_names) if name in wanted]
