"""Sentences for classes from a JSON file, {class name: [sentences]}, the form of CuPL's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from imbvlm.base import storage
from imbvlm.base.errors import MAX_SUGGESTED, ImbvlmError, printable, suggest_names
from imbvlm.base.formatting import join_limited, limited, pluralize

_FORM = 'Write an object such as {"snow leopard": ["a gray spotted cat on rocks."]}'


def read_class_texts(path: str | None, class_names: Sequence[str]) -> dict[str, list[str]]:
    """The sentences of each class that the file has; none without a file.

    Raises ImbvlmError for another form or a class that isn't there, StorageError where the file can't be read.
    """
    if path is None:
        return {}
    if not storage.exists(path):
        raise ImbvlmError(f"prompts.texts must be a JSON file, and {path} is not there. Give its path.")
    try:
        content = storage.read_json(path, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ImbvlmError(
            f"prompts.texts must be UTF-8, and byte {error.start} of {path} isn't. Save it as UTF-8."
        ) from None
    except ValueError as error:
        raise ImbvlmError(f"prompts.texts must be a JSON file, and {path} is none: {error}. {_FORM}.") from None
    if not isinstance(content, dict) or not content:
        raise ImbvlmError(f"prompts.texts must have sentences by class, and {path} has {content!r:.60}. {_FORM}.")
    wrong, sentences = list(_mistakes(content)), []
    if wrong:
        sentences.append(
            f"prompts.texts must have a list of sentences for each class, and {join_limited(wrong, 5)} in {path}. "
            f"{_FORM}."
        )
    unknown = sorted(content.keys() - set(class_names))
    if unknown:
        nearest = limited(suggest_names(map(printable, unknown), class_names), MAX_SUGGESTED)
        rule = f"{path} has sentences for {pluralize(len(unknown), 'class')} that the manifest doesn't have."
        sentences.append("\n  ".join([rule, *nearest]))
    if sentences:
        raise ImbvlmError("\n".join(sentences))
    return content


def describe_class_texts(path: str, class_names: Sequence[str]) -> str:
    """How many classes have sentences in the file, and which have none; raises as `read_class_texts`."""
    texts = read_class_texts(path, class_names)
    without = [name for name in class_names if name not in texts]
    rest = f"; {len(without):,} without keep the templates: {join_limited(without, 5)}" if without else ""
    return f"prompts.texts {path}: {len(class_names) - len(without):,} of {pluralize(len(class_names), 'class')}{rest}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; raises ValueError for a name that it has twice, of which JSON would keep the last."""
    repeated = [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]
    if repeated:
        raise ValueError(f"it names {join_limited([repr(name) for name in repeated], 5)} more than once")
    return dict(pairs)


def _is_broken(text: str) -> bool:
    """Whether a text has half of a character, as JSON can have and no text tower reads."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _mistakes(content: dict[str, Any]) -> Iterator[str]:
    for name, sentences in content.items():
        if not isinstance(sentences, list) or not sentences:
            yield f"{name!r} has {sentences!r:.60}"
        else:
            blank = [text for text in sentences if not isinstance(text, str) or not text.strip() or _is_broken(text)]
            yield from (f"{name!r} has {text!r:.60} among them" for text in blank)
