"""The live view of a sweep: trials by state, the best so far, throughput, remaining time, last failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from imbvlm.base.formatting import duration, percent, pluralize
from imbvlm.sweep.records.resource_usage import planned_epochs
from imbvlm.sweep.records.summary_tables import HEADINGS, METRICS
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog, TrialRecord, describe_trial

NUM_FAILURES = 2
# The remaining time is estimated once so many trials and processes have ended, from the latest half of the processes:
# the first ones are often the slowest.
MIN_ENDED, MIN_COMPLETE = 3, 2
# The shown remaining time approaches an estimate within this share of the remaining time, by so much at most at once.
SMOOTHING, MAX_WEIGHT = 0.1, 0.5
LABELS: Mapping[TrialKind, str] = {
    "baseline": "trials", "search": "trials", "confirm": "seeds", "folds": "folds", "refit": "refits",
    "pairs": "pairs of folds", "gap": "gap",
}  # fmt: skip
WORDS = {"finished": "to their end", "stopped": "stopped early", "failed": "failed", "error": "lost"}


@dataclass(frozen=True)
class ProgressSnapshot:
    """A running sweep: its trials' kind and planned number, the time, seconds since the start, and used limits."""

    kind: TrialKind
    total: int
    now: float
    seconds: float
    used: str


@dataclass
class Countdown:
    """The remaining seconds that are shown: they pass as time does, and approach each new estimate gradually."""

    seconds: float | None = None
    now: float = 0.0

    def update(self, estimate: float | None, now: float) -> None:
        """Weigh an estimate by the time since the last, and by half at most: both are seconds, at the time `now`."""
        if estimate is not None and self.seconds is not None:
            passed = max(0.0, now - self.now)
            expected = max(1.0, self.seconds - passed)
            weight = min(MAX_WEIGHT, passed / (SMOOTHING * expected))
            # The geometric mean, since an estimate is off by a factor.
            estimate = expected ** (1 - weight) * max(1.0, estimate) ** weight
        self.seconds, self.now = estimate, now


def live_lines(
    log: TrialLog, objective: str, snapshot: ProgressSnapshot, remaining: float | None = None
) -> dict[str, str]:
    """Return the lines of the live view by label, the most important first; empty ones are absent."""
    records = log.of(snapshot.kind)
    speed = sum(map(_images_per_second, _running(_processes(log.records.values()))))
    lines = {
        LABELS[snapshot.kind]: _states(log, records, snapshot),
        "best": _best(log, objective),
        "speed": f"{speed:,.0f} images a second" if speed else "",
        "left": "" if remaining is None else f"about {duration(remaining)}",
        "used": snapshot.used,
        # A lost trial may run again.
        **{
            WORDS[state]: _causes(record for record in records if record.state == state)
            for state in ("failed", "error")
        },
    }
    return {label: text for label, text in lines.items() if text}


def _causes(records: Iterable[TrialRecord]) -> str:
    """Return the causes of the trials that ended last."""
    latest = sorted(records, key=lambda record: record.ended_at or 0.0)[: -NUM_FAILURES - 1 : -1]
    return "; ".join(f"{record.trial_id}: {record.stop_reason}" for record in latest)


def _states(log: TrialLog, records: list[TrialRecord], snapshot: ProgressSnapshot) -> str:
    counts: Mapping[str, int] = Counter(record.state for record in records)
    parts = ", ".join(f"{counts[state]} {word}" for state, word in WORDS.items() if counts[state])
    running = [record for record in log.records.values() if record.state == "running"]
    num_processes = len(_processes(running))
    where = "" if num_processes == len(running) else f" in {pluralize(num_processes, 'process')}"
    baselines = sum(record.kind == "baseline" for record in running)
    return (
        f"{sum(counts[state] for state in WORDS)} of {snapshot.total} done{f' ({parts})' if parts else ''}, "
        f"{len(running)} running{where}{f' ({baselines} of baselines)' if baselines else ''}"
        f"{f', {paused} paused' if (paused := counts['paused']) else ''}"
    )


def _best(log: TrialLog, objective: str) -> str:
    """Describe the best trial, its shot groups at its best epoch, and its lead over the best baseline."""
    best, baseline = (next(iter(log.best(objective, kind)), None) for kind in ("search", "baseline"))
    if best is None:
        return ""
    epoch = best.best_epoch(objective) or {}
    groups = ", ".join(
        f"{heading} {percent(epoch[f'val/{metric}'])}"
        for metric, heading in zip(METRICS, HEADINGS, strict=True)
        if f"val/{metric}" in epoch and f"val/{metric}" != objective
    )
    main = objective.removeprefix("val/").removesuffix("_accuracy").replace("_", " ")
    main = f"{main} {percent(epoch.get(objective))}{f' ({groups})' if groups else ''}"
    text = f"{best.trial_id} {main}, {describe_trial(best)}"
    if baseline is None:
        return text
    lead = (epoch.get(objective) or 0.0) - ((baseline.best_epoch(objective) or {}).get(objective) or 0.0)
    return f"{text}; {100 * lead:+.1f} points to {baseline.name}"


def _processes(records: Iterable[TrialRecord]) -> list[list[TrialRecord]]:
    """Return the trials of each process; those of a pack share one."""
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        groups.setdefault(record.pack or record.trial_id, []).append(record)
    return list(groups.values())


def _running(processes: Iterable[list[TrialRecord]]) -> list[list[TrialRecord]]:
    return [process for process in processes if any(record.state == "running" for record in process)]


def _images_per_second(process: Sequence[TrialRecord]) -> float:
    """Return the images that a process reads in a second of training.

    Members of a pack share each image. Each reports the images of its latest epoch over its share of the time, so that
    the shares add up to the process's own time.
    """
    num_epochs = max(len(record.epochs) for record in process)
    latest = [record.epochs[-1] for record in process if record.epochs and len(record.epochs) == num_epochs]
    seconds = sum(1 / speed for epoch in latest if (speed := epoch.get("train/images_per_second")))
    return 1 / seconds if seconds else 0.0


def seconds_left(log: TrialLog, snapshot: ProgressSnapshot) -> float | None:
    """Estimate the remaining seconds from how long trials take; None before enough of them have ended.

    Running trials continue to their end at their speed so far, and the others take as long as the latest ones. As many
    processes work at once as so far. A pack lasts as long as the longest of its trials.
    """
    now, records = snapshot.now, log.of(snapshot.kind)
    num_ended = sum(record.state in WORDS for record in records)
    processes = _processes(record for record in records if record.state == "running" or record.state in WORDS)
    running = _running(processes)
    complete = [process for process in processes if process not in running]
    worked = sum(_elapsed(process, now, now - snapshot.seconds) for process in _processes(log.records.values()))
    if num_ended < MIN_ENDED or len(complete) < MIN_COMPLETE or worked <= 0:
        return None
    latest = complete[len(complete) // 2 :]
    took = sum(_elapsed(process, now) for process in latest)
    seconds_each = took / sum(map(_size, latest))
    projected = [_projected(process, now, seconds_each) for process in running]
    seconds_each = (took + sum(projected)) / sum(map(_size, [*latest, *running]))
    remaining = [max(0.0, whole - _elapsed(process, now)) for whole, process in zip(projected, running, strict=True)]
    num_waiting = max(0, snapshot.total - num_ended - sum(record.state == "running" for record in records))
    return max([(seconds_each * num_waiting + sum(remaining)) * snapshot.seconds / worked, *remaining])


def _size(process: Sequence[TrialRecord]) -> int:
    return process[0].pack_size


def _elapsed(process: Sequence[TrialRecord], now: float, since: float = 0.0) -> float:
    """Return the seconds from a process's start, or from `since` if later, to its end or to now."""
    ended_at = max(now if record.ended_at is None else record.ended_at for record in process)
    return max(0.0, ended_at - max(since, min(record.started_at for record in process)))


def _projected(process: Sequence[TrialRecord], now: float, seconds_each: float) -> float:
    """Return a process's seconds until its longest trial ends, at its own speed, or others' before its first epoch."""
    shares = [
        len(record.epochs) / epochs
        for record in process
        if record.ended_at is None and record.epochs and (epochs := planned_epochs(record))
    ]
    elapsed = _elapsed(process, now)
    return elapsed / min(1.0, *shares) if shares else max(elapsed, seconds_each * _size(process))
