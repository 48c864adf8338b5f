"""What goes wrong, said to the user: every mistake of a file in one error, with its place and its mend."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

# Control characters, line separators, overrides of the reading direction, and bytes of a path that aren't UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What a sentence of several lines keeps.
LINE_BREAKS = "\n"


def printable(text: str, *, keep: str = "") -> str:
    """Text of others as one line for a terminal: what would move its cursor or forge a line stands as `\\x1b`, `\\n`.

    Characters in `keep` stay, such as the line breaks of a sentence of ours.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(letter: str) -> str:
    is_byte = "\udc80" <= letter <= "\udcff"
    return f"\\x{ord(letter) - 0xDC00:02x}" if is_byte else letter.encode("unicode_escape").decode()


class ImbvlmError(Exception):
    """A failure that its user can mend; the command line prints its sentence and no traceback."""


class StorageError(ImbvlmError):
    """A file or bucket that can't be read or written; the sentence names it and the cause."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class DiskFullError(StorageError):
    """There is no room for a file; another try can't change that."""


class LostProcessesError(ImbvlmError):
    """Process after process is lost over the same work; the sentence says which, and what to change."""


class PackError(ImbvlmError):
    """Trials that trained together broke off in the middle of an epoch; none of them can go on from there."""


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong and where it was written (`file:line`, or the option that set it)."""

    message: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class ConfigError(ImbvlmError, ValueError):
    """Every mistake of a configuration, search space or sweep at once; `problems` has them one by one."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = "1 mistake" if count == 1 else f"{count} mistakes"
        super().__init__(
            "\n".join([f"{heading} in the configuration:", *(f"  {problem}" for problem in self.problems)])
        )

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[Problem, ...]]]:
        return (ConfigError, (self.problems,))


def suggest_name(name: str, valid: Iterable[str]) -> str:
    """A clause that names the closest of the valid names, and all of them where they are few."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) <= 20:
        return f"valid: {', '.join(names)}" if names else "nothing is valid here"
    return f"{len(names)} names are valid, such as {', '.join(names[:5])}"
