"""What is shown of a sweep while it runs: trials by state, the best so far, throughput, time left, last failures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from imbvlm.sweep.console import duration, percent
from imbvlm.sweep.results import TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.summary import HEADINGS, METRICS, describe

NUM_FAILURES = 2
LABELS: Mapping[TrialKind, str] = {"baseline": "trials", "search": "trials", "confirm": "seeds", "refit": "refits"}
WORDS = {"finished": "to their end", "stopped": "stopped early", "failed": "failed", "error": "lost"}


@dataclass(frozen=True)
class Moment:
    """One look at a sweep: what runs, of how many, since when in seconds, and what is used of what is limited."""

    kind: TrialKind
    total: int
    num_ended_before: int
    seconds: float
    used: str


def live_lines(log: TrialLog, objective: str, moment: Moment) -> dict[str, str]:
    """Lines by their label, most important first; those without anything to say are absent."""
    records = log.of(moment.kind)
    lines = {LABELS[moment.kind]: _states(log, records, moment)}
    lines |= {"best": _best(log, objective)} if log.best(objective) else {}
    lines |= _speed(log, records, moment)
    lines |= {"used": moment.used} if moment.used else {}
    failed = sorted((one for one in records if one.state in ("failed", "error")), key=lambda one: one.ended_at or 0.0)
    if failed:
        last = "; ".join(f"{one.trial_id}: {one.stop_reason}" for one in failed[: -NUM_FAILURES - 1 : -1])
        lines["failed"] = last
    return {label: text for label, text in lines.items() if text}


def _states(log: TrialLog, records: list[TrialRecord], moment: Moment) -> str:
    counts: Mapping[str, int] = Counter(record.state for record in records)
    ended = sum(counts[state] for state in WORDS)
    parts = ", ".join(f"{counts[state]} {word}" for state, word in WORDS.items() if counts[state])
    running = sum(record.state == "running" for record in log.records.values())
    baselines = sum(one.state == "running" for one in log.of("baseline"))
    of_baselines = f" ({baselines} of baselines)" if baselines else ""
    text = f"{ended} of {moment.total} done{f' ({parts})' if parts else ''}, {running} running{of_baselines}"
    paused = counts["paused"]
    return f"{text}, {paused} paused" if paused else text


def _best(log: TrialLog, objective: str) -> str:
    """The best trial with its shot groups at its best epoch, and by how much the best baseline is behind."""
    best = log.best(objective)[0]
    epoch = best.best_epoch(objective) or {}
    main = objective.removeprefix("val/").removesuffix("_accuracy").replace("_", " ")
    groups = ", ".join(
        f"{heading} {percent(epoch[f'val/{metric}'])}"
        for metric, heading in zip(METRICS, HEADINGS, strict=True)
        if f"val/{metric}" in epoch and f"val/{metric}" != objective
    )
    text = f"{best.trial_id} {main} {percent(epoch.get(objective))}{f' ({groups})' if groups else ''}, {describe(best)}"
    baselines = log.best(objective, "baseline")
    if not baselines:
        return text
    behind = (epoch.get(objective) or 0.0) - ((baselines[0].best_epoch(objective) or {}).get(objective) or 0.0)
    return f"{text}; {100 * behind:+.1f} points to {baselines[0].name}"


def _speed(log: TrialLog, records: list[TrialRecord], moment: Moment) -> dict[str, str]:
    running = [one for one in log.records.values() if one.state == "running" and one.epochs]
    speed = sum(one.epochs[-1].get("train/images_per_second", 0.0) for one in running)
    left = seconds_left(records, moment)
    time_left = f"about {duration(left)}" if math.isfinite(left) else ""
    if not speed:
        return {"left": time_left}
    return {"speed": f"{speed:,.0f} images a second{f', {time_left} left' if time_left else ''}"}


def seconds_left(records: list[TrialRecord], moment: Moment) -> float:
    """At the pace of this run so far; not a number before a trial has ended in it."""
    ended = sum(record.state in WORDS for record in records)
    here = ended - moment.num_ended_before
    return moment.seconds / here * max(0, moment.total - ended) if here > 0 else math.nan
