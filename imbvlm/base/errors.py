"""Errors for the user: every mistake of a file in one error, with its line and its fix."""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass

# Control characters, line separators, overrides of the reading direction, and bytes of a path that aren't UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Kept by `printable` in a text of several lines.
LINE_BREAKS = "\n"


def printable(text: str, *, keep: str = "") -> str:
    """Untrusted text as one line for a terminal: escapes what would move the cursor or forge a line, as `\\x1b`, `\\n`.

    Characters in `keep` stay, such as the line breaks of our own texts.
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    is_byte = "\udc80" <= character <= "\udcff"
    return f"\\x{ord(character) - 0xDC00:02x}" if is_byte else character.encode("unicode_escape").decode()


def end_sentence(text: str) -> str:
    """The text with a full stop, unless it ends with one or with a question mark."""
    return text if text.endswith((".", "?")) else f"{text}."


class ImbvlmError(Exception):
    """An error that the user can fix; the command line prints its sentence and no traceback."""


class StorageError(ImbvlmError):
    """A file or bucket that can't be read or written; the sentence names it and the cause."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class DiskFullError(StorageError):
    """The disk has no space for a file, so that a retry is pointless."""


class LostProcessesError(ImbvlmError):
    """Several processes in a row were lost at the same work; the sentence names it and a fix."""


class PackError(ImbvlmError):
    """A pack of trials stopped in the middle of an epoch; none of them can continue from there."""


class PluginNeededError(ImbvlmError):
    """A sweep or model needs plug-ins that the caller hasn't named as they were; `copies` of them would do."""

    def __init__(self, sentence: str, copies: Iterable[str]) -> None:
        super().__init__(sentence)
        self.copies = tuple(copies)

    def __reduce__(self) -> tuple[type["PluginNeededError"], tuple[str, tuple[str, ...]]]:
        return (PluginNeededError, (str(self), self.copies))


@dataclass(frozen=True)
class Problem:
    """One mistake and its location (`file:line`, or the option that set it)."""

    message: str
    where: str = ""

    def __str__(self) -> str:
        sentence = end_sentence(self.message)
        return f"{self.where}: {sentence}" if self.where else sentence


class ConfigError(ImbvlmError, ValueError):
    """All mistakes of a configuration, search space or sweep; `problems` lists them."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = "1 mistake" if count == 1 else f"{count} mistakes"
        super().__init__(
            "\n".join([f"{heading} in the configuration:", *(f"  {problem}" for problem in self.problems)])
        )

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[Problem, ...]]]:
        return (ConfigError, (self.problems,))


# Names whose nearest valid name is sought, which takes long.
MAX_SUGGESTED = 20


def _folded(name: str) -> str:
    """A name for comparison, without regard to case and to how Unicode codes its accents."""
    return unicodedata.normalize("NFC", name).casefold()


def suggest_name(name: str, valid: Iterable[str]) -> str:
    """A clause with the closest valid name, or else with all valid names where they are few."""
    names = sorted(set(valid))
    same = [other for other in names if other != name and _folded(other) == _folded(name)]
    if same and unicodedata.normalize("NFC", same[0]) == unicodedata.normalize("NFC", name):
        return (
            f"it looks like {same[0]!r}, whose letters are coded in another way (Unicode NFC and NFD); copy that name"
        )
    close = same or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) <= 20:
        return f"valid: {', '.join(names)}" if names else "nothing can be named here, so leave it out"
    return f"{len(names)} names are valid, such as {', '.join(names[:5])}"


def suggest_names(names: Iterable[str], valid: Collection[str]) -> list[str]:
    """Each name with a clause of `suggest_name`, which is left out behind the first MAX_SUGGESTED."""
    return [
        f"{name!r}: {suggest_name(name, valid)}" if number < MAX_SUGGESTED else repr(name)
        for number, name in enumerate(names)
    ]
