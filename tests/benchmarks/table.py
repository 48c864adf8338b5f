"""One table for all benchmarks: ours, the other side, their ratio, and what it should be."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What the command line says; every section scales itself by these."""

    device: str
    large: bool
    folder: Path
    # Of the section `sweep`: training images (None: by size), and how many of the script's trials are run.
    images: int | None = None
    script_trials: int = 2
    # Where the sections `choice` and `labels` keep the encoder's outputs for the next time (None: in `folder`).
    features: Path | None = None


@dataclass(frozen=True)
class Line:
    """A row of the table; `ratio` above 1 means that ours is better."""

    what: str
    ours: str
    other: str = ""
    ratio: float | None = None
    wanted: str = ""
    holds: bool | None = None

    def text(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:8.2f}"
        verdict = {None: "", True: "held", False: "MISSED"}[self.holds]
        return f"{self.what:66.66} {self.ours:>20} {self.other:>20} {ratio:>8}  {self.wanted:>10} {verdict}".rstrip()


HEADING = f"{'':66} {'ours':>20} {'the other side':>20} {'ratio':>8}  {'wanted':>10}"


def rates(what: str, ours: float, other: float, unit: str, wanted: float | None = None) -> Line:
    """Two speeds, more is better."""
    return _compared(what, ours, other, unit, ours / other, wanted)


def times(what: str, ours: float, other: float, unit: str = "s", wanted: float | None = None) -> Line:
    """Two times, less is better."""
    return _compared(what, ours, other, unit, other / ours, wanted)


def limited(what: str, value: float, unit: str, at_most: float) -> Line:
    """A value with a limit of its own."""
    return Line(what, f"{number(value)} {unit}", "", None, f"<= {number(at_most)}", value <= at_most)


def shown(what: str, value: float | str, unit: str = "") -> Line:
    """A value to know, without a limit."""
    return Line(what, value if isinstance(value, str) else f"{number(value)} {unit}".rstrip())


def number(value: float) -> str:
    """Three digits that count, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(work: Callable[[], object], repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of some runs."""
    taken = []
    for _ in range(repeats):
        begin = clock()
        work()
        taken.append(clock() - begin)
    return min(taken)


def in_turn(
    sides: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Each side's shortest time, the sides by turns, so that what else the machine does falls on all of them."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, work in sides.items():
            best[name] = min(best[name], seconds(work, clock=clock))
    return best


def _compared(what: str, ours: float, other: float, unit: str, ratio: float, wanted: float | None) -> Line:
    text = "" if wanted is None else f">= {wanted:g}"
    holds = None if wanted is None else ratio >= wanted
    return Line(what, f"{number(ours)} {unit}", f"{number(other)} {unit}", ratio, text, holds)
