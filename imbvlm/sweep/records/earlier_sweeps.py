"""Trials of earlier sweeps: to warm-start a sampler, or kept by a fork."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import absolute_manifest
from imbvlm.sweep.records.adjustment_selection import logits_file
from imbvlm.sweep.records.sweep_folder import read_spec
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.spec.baselines import baselines
from imbvlm.sweep.spec.manifest_path import with_located_manifest
from imbvlm.sweep.spec.search_space import MISSING, Params, SearchSpace, get_dotted, is_active
from imbvlm.sweep.spec.sweep_spec import SweepSpec


@dataclass(frozen=True)
class WarmTrial:
    """An ended trial of an earlier sweep as a draw of the new space."""

    draw: Params
    record: TrialRecord


@dataclass(frozen=True)
class WarmStart:
    """The trials of one earlier sweep that are told, of how many with a result, and its data where that was another."""

    folder: str
    trials: tuple[WarmTrial, ...]
    num_ended: int
    other_manifest: str | None

    def describe(self) -> str:
        """A sentence on what the search begins with."""
        text = f"warm start: {len(self.trials)} of {self.num_ended} trials of {self.folder} lie in this space"
        if self.other_manifest is not None:
            text += f"; they are of other data ({self.other_manifest}), so that they guide the search only roughly"
        return text


def warm_starts(spec: SweepSpec, space: SearchSpace) -> list[WarmStart]:
    """What each sweep of `warm_start` has to tell; raises ImbvlmError where one isn't a sweep's folder."""
    return [_warm_start(spec, space, folder) for folder in spec.warm_start]


def _warm_start(spec: SweepSpec, space: SearchSpace, folder: str) -> WarmStart:
    before = str(with_located_manifest(read_spec(folder), folder).base["data"]["manifest"])
    ended = [one for one in TrialLog.read(folder).of("search") if one.best_value(spec.best_objective) is not None]
    found = [WarmTrial(draw, one) for one in ended if (draw := _draw_of(one, spec, space)) is not None]
    is_same = absolute_manifest(before) == absolute_manifest(str(spec.base["data"]["manifest"]))
    return WarmStart(folder, tuple(found), len(ended), None if is_same else before)


def _draw_of(record: TrialRecord, spec: SweepSpec, space: SearchSpace) -> Params | None:
    """The draw of this space with a trial's values, also of keys that its own sweep had fixed; None without one."""
    drawn: Params = {}
    for parameter in space.parameters:
        if is_active(parameter, drawn, spec.base):
            value = get_dotted(record.config, parameter.key)
            if value is MISSING or not parameter.contains(value):
                return None
            drawn[parameter.key] = value
    try:
        method = spec.trial(drawn).method
    except ConfigError:
        return None
    return drawn if method == record.config["method"] else None


def warm_trials(starts: Sequence[WarmStart]) -> list[WarmTrial]:
    """All of them."""
    return [trial for start in starts for trial in start.trials]


@dataclass
class Fork:
    """What a new sweep takes over: trials by their new ids with their old ones, and why the others stay behind."""

    kept: list[tuple[TrialRecord, str]] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def describe(self, source: str) -> str:
        """Lines on what is kept and what isn't."""
        lines = [f"forked from {source}: {len(self.kept)} trials are kept"]
        return "\n".join(lines + [f"  {count} left behind: {reason}" for reason, count in self.left.most_common()])


def select_fork_trials(source: str, spec: SweepSpec, space: SearchSpace, changes: list[str]) -> Fork:
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
