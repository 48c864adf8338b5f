"""A new sweep that begins with those trials of another that its own spec, code and data would give as well."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from imbvlm import storage
from imbvlm.config import TrialConfig
from imbvlm.sweep.baselines import baselines
from imbvlm.sweep.listing import read_spec
from imbvlm.sweep.post_hoc import logits_file
from imbvlm.sweep.results import TrialLog, TrialRecord
from imbvlm.sweep.space import SearchSpace
from imbvlm.sweep.spec import SweepSpec


@dataclass
class Fork:
    """What a new sweep takes over: trials by their new ids with their old ones, and why the others stay behind."""

    kept: list[tuple[TrialRecord, str]] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def describe(self, source: str) -> str:
        """Lines on what is kept and what isn't."""
        lines = [f"forked from {source}: {len(self.kept)} trials are kept"]
        return "\n".join(lines + [f"  {count} left behind: {reason}" for reason, count in self.left.most_common()])


def choose_fork(source: str, spec: SweepSpec, space: SearchSpace, changes: list[str]) -> Fork:
    """Trials of a sweep's folder that a spec would give the same numbers for; none where code or data have changed.

    Refits stay behind: which ones are needed shows when the new search has ended.
    """
    fork, before = Fork(), read_spec(source)
    same_rule = (before.objective, before.trial_scheduler) == (spec.objective, spec.trial_scheduler)
    own = {_key(one.config): f"b{number:05d}" for number, one in enumerate(baselines(spec, space), 1)}
    log = TrialLog.read(source)
    for record in [*log.of("baseline"), *log.of("search")]:
        reason, trial_id = "; ".join(changes), record.trial_id
        if not reason and record.kind == "baseline":
            trial_id = own.get(_key(record.trial_config()), "")
            # Its patience asks for the objective.
            reason = "" if trial_id and before.objective == spec.objective else "another baseline now"
        elif not reason:
            reason = _unlike(record, spec, space)
        if not reason and (
            record.state not in ("finished", "stopped") or (record.state == "stopped" and not same_rule)
        ):
            reason = "stopped by another rule" if record.state == "stopped" else f"its state is {record.state}"
        if reason:
            fork.left[reason] += 1
        else:
            fork.kept.append((record.model_copy(update={"trial_id": trial_id}), record.trial_id))
    return fork


def write_fork(fork: Fork, source: str, folder: str) -> None:
    """Write the kept records and their validation logits into the new sweep's folder."""
    log = TrialLog(folder)
    for record, old_id in fork.kept:
        logits = logits_file(source, old_id)
        if storage.exists(logits):
            storage.write_bytes(logits_file(folder, record.trial_id), storage.read_bytes(logits))
        log.save(record)


def _unlike(record: TrialRecord, spec: SweepSpec, space: SearchSpace) -> str:
    if not space.contains(record.draw, spec.base):
        return "the space no longer has it"
    config: TrialConfig = spec.trial(record.draw)
    return "" if _key(config) == _key(record.trial_config()) else "the base gives it another configuration"


def _key(config: TrialConfig) -> str:
    """Equal for equal configurations; whether the data is the same shows in its digests, not in its path."""
    return config.with_overrides({"data.manifest": "any"}).key()
