"""Numbers, durations and sizes as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from imbvlm.base.errors import printable

# 95 % of a normal distribution lie within this many standard errors of its mean.
Z95 = 1.96


def size_text(num_bytes: float) -> str:
    """A size for people: 1.2 kB, 57.1 MB, 230.2 GB."""
    if 0 < num_bytes < 1e5:
        return f"{num_bytes / 1e3:,.1f} kB"
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Such as `42 s`, `3 min 5 s` or `2 h 10 min`."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one digit, or a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def pluralize(number: float, word: str) -> str:
    """`1 class`, `3 classes`, `0.5 GPUs`."""
    plural = f"{word}es" if word.endswith("s") else f"{word}s"
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {word if number == 1 else plural}"


def limited(items: Sequence[str], max_items: int) -> list[str]:
    """The first few items of a list, and how many more there are."""
    more = len(items) - max_items
    return [*items[:max_items], f"and {more:,} more"] if more > 0 else list(items)


def join_limited(items: Sequence[str], max_items: int = 10) -> str:
    """Untrusted names as one line: the first few, and how many more there are."""
    more = len(items) - max_items
    return ", ".join(map(printable, items[:max_items])) + (f" and {more} more" if more > 0 else "")


def mean_std(values: list[float]) -> str:
    """Mean and standard deviation of fractions, in percent; a dash without values."""
    if not values:
        return "-"
    mean = percent(statistics.fmean(values))
    return f"{mean} ± {percent(statistics.stdev(values))}" if len(values) > 1 else mean


def between(low: float, high: float) -> str:
    """A range of durations, such as `40 s to 1 min 10 s`, or `40 s` where both texts are equal."""
    texts = duration(low), duration(high)
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)
