"""The live view of a sweep: trials by state, the best so far, throughput, remaining time, last failures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from imbvlm.base.formatting import duration, percent, pluralize
from imbvlm.sweep.records.resource_usage import planned_epochs
from imbvlm.sweep.records.summary_tables import HEADINGS, METRICS
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog, TrialRecord, describe_trial

NUM_FAILURES = 2
# The slowest process is one of the running or the NUM_LATEST last ones: the view is drawn ten times a second.
NUM_LATEST = 20
# The remaining time is shown once MIN_ENDED trials and MIN_COMPLETE processes have ended, and its bounds are within
# MAX_RATIO or the upper one is below END_SHARE of the time so far. Bounds within CERTAIN_RATIO are shown as one number.
MIN_ENDED, MIN_COMPLETE, MAX_RATIO, END_SHARE, CERTAIN_RATIO = 3, 2, 3.0, 0.25, 1.25
LABELS: Mapping[TrialKind, str] = {"baseline": "trials", "search": "trials", "confirm": "seeds", "refit": "refits"}
WORDS = {"finished": "to their end", "stopped": "stopped early", "failed": "failed", "error": "lost"}


@dataclass(frozen=True)
class ProgressSnapshot:
    """A running sweep: its trials' kind and planned number, the time, seconds since the start, and used limits."""

    kind: TrialKind
    total: int
    now: float
    seconds: float
    used: str


def live_lines(log: TrialLog, objective: str, snapshot: ProgressSnapshot) -> dict[str, str]:
    """Return the lines of the live view by label, the most important first; empty ones are absent."""
    records = log.of(snapshot.kind)
    lines = {LABELS[snapshot.kind]: _states(log, records, snapshot)}
    lines |= {"best": _best(log, objective)} if log.best(objective) else {}
    lines |= _speed(log, records, snapshot)
    lines |= {"used": snapshot.used} if snapshot.used else {}
    failed = [record for record in records if record.state in ("failed", "error")]
    failed.sort(key=lambda record: record.ended_at or 0.0)
    if failed:
        last = "; ".join(f"{record.trial_id}: {record.stop_reason}" for record in failed[: -NUM_FAILURES - 1 : -1])
        lines["failed"] = last
    return {label: text for label, text in lines.items() if text}


def _states(log: TrialLog, records: list[TrialRecord], snapshot: ProgressSnapshot) -> str:
    counts: Mapping[str, int] = Counter(record.state for record in records)
    ended = sum(counts[state] for state in WORDS)
    parts = ", ".join(f"{counts[state]} {word}" for state, word in WORDS.items() if counts[state])
    running = _running(log)
    num_processes = len(_processes(running))
    where = "" if num_processes == len(running) else f" in {pluralize(num_processes, 'process')}"
    baselines = sum(record.state == "running" for record in log.of("baseline"))
    of_baselines = f" ({baselines} of baselines)" if baselines else ""
    text = (
        f"{ended} of {snapshot.total} done{f' ({parts})' if parts else ''}, {len(running)} running{where}{of_baselines}"
    )
    paused = counts["paused"]
    return f"{text}, {paused} paused" if paused else text


def _best(log: TrialLog, objective: str) -> str:
    """Describe the best trial, its shot groups at its best epoch, and its lead over the best baseline."""
    best = log.best(objective)[0]
    epoch = best.best_epoch(objective) or {}
    main = objective.removeprefix("val/").removesuffix("_accuracy").replace("_", " ")
    groups = ", ".join(
        f"{heading} {percent(epoch[f'val/{metric}'])}"
        for metric, heading in zip(METRICS, HEADINGS, strict=True)
        if f"val/{metric}" in epoch and f"val/{metric}" != objective
    )
    main = f"{main} {percent(epoch.get(objective))}{f' ({groups})' if groups else ''}"
    text = f"{best.trial_id} {main}, {describe_trial(best)}"
    baselines = log.best(objective, "baseline")
    if not baselines:
        return text
    behind = (epoch.get(objective) or 0.0) - ((baselines[0].best_epoch(objective) or {}).get(objective) or 0.0)
    return f"{text}; {100 * behind:+.1f} points to {baselines[0].name}"


def _running(log: TrialLog) -> list[TrialRecord]:
    return [record for record in log.records.values() if record.state == "running"]


def _processes(records: Iterable[TrialRecord]) -> list[list[TrialRecord]]:
    """Return the trials of each process; those of a pack share one."""
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        groups.setdefault(record.pack or record.trial_id, []).append(record)
    return list(groups.values())


def _speed(log: TrialLog, records: list[TrialRecord], snapshot: ProgressSnapshot) -> dict[str, str]:
    speed = sum(map(_images_per_second, _processes(_running(log))))
    remaining = seconds_left(log, records, snapshot)
    time_left = "" if remaining is None else _time_left(*remaining)
    if not speed:
        return {"left": time_left}
    return {"speed": f"{speed:,.0f} images a second{f', {time_left} left' if time_left else ''}"}


def _images_per_second(process: Sequence[TrialRecord]) -> float:
    """Return the mean over a process's trials, which share each image or train in turns."""
    speeds = [record.epochs[-1].get("train/images_per_second", 0.0) for record in process if record.epochs]
    return statistics.fmean(speeds) if speeds else 0.0


def _time_left(low: float, high: float) -> str:
    if high > MAX_RATIO * low:
        return f"up to {duration(high)}"
    return (
        f"about {duration((low + high) / 2)}" if high <= CERTAIN_RATIO * low else f"{duration(low)} to {duration(high)}"
    )


def seconds_left(log: TrialLog, records: list[TrialRecord], snapshot: ProgressSnapshot) -> tuple[float, float] | None:
    """Return bounds on the remaining seconds, from how long trials take; None until the two are close enough.

    The processes that ended first were the fastest, which gives the lower bound. For the upper bound, running trials
    continue to their end at their speed so far, and one more process is as slow as the slowest. A pack lasts as long as
    the longest of its trials.
    """
    now, ended = snapshot.now, [record for record in records if record.state in WORDS]
    running = _processes([record for record in records if record.state == "running"])
    running_packs = {process[0].pack for process in running} - {""}
    complete = [process for process in _processes(ended) if process[0].pack not in running_packs]
    worked = sum(_elapsed(process, now, now - snapshot.seconds) for process in _processes(log.records.values()))
    if len(ended) < MIN_ENDED or len(complete) < MIN_COMPLETE or worked <= 0:
        return None
    took = [_elapsed(process, now) for process in complete]
    min_each = sum(took) / sum(map(_size, complete))
    projected = [_projected(process, now, min_each) for process in running]
    latest = [*complete[-NUM_LATEST:], *running]
    slowest = max(_projected(process, now, min_each) / _size(process) for process in latest)
    num_more = _size(complete[-1])
    num_trials = sum(map(_size, [*complete, *running])) + num_more
    max_each = (sum(took) + sum(projected) + slowest * num_more) / num_trials
    num_waiting = max(0, snapshot.total - len(ended) - sum(map(len, running)))
    bounds = []
    for seconds_each, wholes in ((min_each, [min_each * _size(process) for process in running]), (max_each, projected)):
        remaining = [max(0.0, whole - _elapsed(process, now)) for whole, process in zip(wholes, running, strict=True)]
        # Assumes that as many processes work at once as so far.
        bounds.append(max([(seconds_each * num_waiting + sum(remaining)) * snapshot.seconds / worked, *remaining]))
    low, high = sorted(bounds)
    # Near the end the remaining time is short, however wide its bounds are.
    return (low, high) if high <= max(MAX_RATIO * low, END_SHARE * snapshot.seconds) else None


def _size(process: Sequence[TrialRecord]) -> int:
    return process[0].pack_size


def _elapsed(process: Sequence[TrialRecord], now: float, since: float = 0.0) -> float:
    """Return the seconds from a process's start, or from `since` if later, to its end or to now."""
    ended_at = max(now if record.ended_at is None else record.ended_at for record in process)
    return max(0.0, ended_at - max(since, min(record.started_at for record in process)))


def _projected(process: Sequence[TrialRecord], now: float, seconds_each: float) -> float:
    """Return a process's seconds until its longest trial ends, at its own speed, or others' before its first epoch."""
    unfinished = [record for record in process if record.ended_at is None]
    shares = [
        len(record.epochs) / epochs
        for record in unfinished or process
        if record.epochs and (epochs := planned_epochs(record))
    ]
    elapsed = _elapsed(process, now)
    if not shares:
        return max(elapsed, seconds_each * _size(process))
    return elapsed / min(1.0, min(shares) if unfinished else max(shares))
