"""Trials of earlier sweeps: those that warm-start a sampler, that a fork keeps, and that an update trains again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.base.schema import Tree
from imbvlm.config.method_registry import METHODS, optional_sections
from imbvlm.config.trial_config import TrialConfig, apply_overrides
from imbvlm.data.manifest import absolute_manifest
from imbvlm.sweep.records.adjustment_selection import logits_file
from imbvlm.sweep.records.sweep_folder import SweepState, read_spec
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.spec.baselines import baselines, feature_key
from imbvlm.sweep.spec.manifest_path import with_located_manifest
from imbvlm.sweep.spec.sampler_registry import SAMPLERS
from imbvlm.sweep.spec.search_space import MISSING, ListedSpace, Params, get_dotted, is_active
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec


@dataclass(frozen=True)
class WarmTrial:
    """An ended trial of an earlier sweep and its values as parameters of the new space."""

    draw: Params
    record: TrialRecord


@dataclass(frozen=True)
class WarmStart:
    """The trials of one earlier sweep that lie in the new space, out of `num_ended` with a result.

    `other_manifest` is the earlier sweep's data if that differs from the new sweep's.
    """

    folder: str
    trials: tuple[WarmTrial, ...]
    num_ended: int
    other_manifest: str | None

    def describe(self) -> str:
        """A sentence on what the search begins with."""
        text = f"warm start: {len(self.trials)} of {self.num_ended} trials of {self.folder} lie in this space"
        if self.other_manifest is not None:
            text += f"; they come from other data ({self.other_manifest}), so they guide the search only roughly"
        return text


def warm_starts(sweep: ResolvedSweep) -> list[WarmStart]:
    """Read each sweep of `warm_start`; raises ImbvlmError if one isn't a sweep's folder."""
    return [_warm_start(sweep, folder) for folder in sweep.spec.warm_start]


def _warm_start(sweep: ResolvedSweep, folder: str) -> WarmStart:
    spec = sweep.spec
    before = str(with_located_manifest(read_spec(folder), folder).base["data"]["manifest"])
    ended = [
        record for record in TrialLog.read(folder).of("search") if record.best_value(spec.best_objective) is not None
    ]
    trials = [WarmTrial(draw, record) for record in ended if (draw := _params_of(record, sweep)) is not None]
    is_same = absolute_manifest(before) == absolute_manifest(str(spec.base["data"]["manifest"]))
    return WarmStart(folder, tuple(trials), len(ended), None if is_same else before)


def _params_of(record: TrialRecord, sweep: ResolvedSweep) -> Params | None:
    """A trial's values for the parameters of this space, also those that its own sweep had fixed.

    None if the space does not contain the trial.
    """
    params: Params = {}
    for parameter in sweep.space.parameters:
        if is_active(parameter, params, sweep.spec.base):
            value = get_dotted(record.config, parameter.key)
            if value is MISSING or not parameter.contains(value):
                return None
            params[parameter.key] = value
    try:
        method = sweep.spec.trial(params).method
    except ConfigError:
        return None
    return params if method == record.config["method"] else None


def warm_trials(starts: Sequence[WarmStart]) -> list[WarmTrial]:
    """The trials of all warm starts."""
    return [trial for start in starts for trial in start.trials]


@dataclass
class Fork:
    """The trials that a new sweep takes over, each with its old id, and the reasons against the others, counted."""

    retained: list[tuple[TrialRecord, str]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    def describe(self, source: str) -> str:
        """Lines on retained and rejected trials."""
        lines = [f"forked from {source}: {len(self.retained)} trials are kept"]
        return "\n".join(lines + [f"  {count} left behind: {reason}" for reason, count in self.rejected.most_common()])


def select_fork_trials(source: str, sweep: ResolvedSweep, changes: list[str]) -> Fork:
    """Select the trials of a sweep's folder whose numbers a spec would repeat; none if code or data have changed.

    Runs over folds and refits are not taken over: the end of the new search decides which ones are needed.
    """
    fork, before, spec = Fork(), read_spec(source, check_plugins=False), sweep.spec
    same_rule = (before.objective, before.trial_scheduler) == (spec.objective, spec.trial_scheduler)
    own = {_key(baseline.config): trial_id for trial_id, baseline in baselines(sweep).items()}
    log = TrialLog.read(source)
    for record in [*log.of("baseline"), *log.of("search")]:
        reason, trial_id = "; ".join(changes), record.trial_id
        if not reason and record.kind == "baseline":
            trial_id = own.get(_key(record.trial_config()), "")
            # A baseline's patience depends on the objective.
            reason = "" if trial_id and before.objective == spec.objective else "another baseline now"
        elif not reason:
            reason = _difference(record, sweep)
        if not reason and record.state not in ("finished", "stopped"):
            reason = f"its state is {record.state}"
        if not reason and record.state == "stopped" and not same_rule:
            reason = "stopped by another rule"
        if reason:
            fork.rejected[reason] += 1
        else:
            fork.retained.append((record.model_copy(update={"trial_id": trial_id}), record.trial_id))
    return fork


def write_fork(fork: Fork, source: str, folder: str) -> None:
    """Write the retained records and their validation logits into the new sweep's folder."""
    log = TrialLog(folder)
    for record, old_id in fork.retained:
        logits = logits_file(source, old_id)
        if storage.exists(logits):
            storage.write_bytes(logits_file(folder, record.trial_id), storage.read_bytes(logits))
        log.save(record)


def _difference(record: TrialRecord, sweep: ResolvedSweep) -> str:
    """Why a spec would not repeat a trial of the search; empty if it would."""
    if not sweep.space.contains(record.draw, sweep.spec.base):
        return "the space no longer has it"
    config: TrialConfig = sweep.spec.trial(record.draw)
    return "" if _key(config) == _key(record.trial_config()) else "the base gives it another configuration"


def _key(config: TrialConfig) -> str:
    """A key that equal configurations share, without the data's path: digests tell whether the data has changed."""
    return config.with_overrides({"data.manifest": "any"}).key()


def update_spec(folder: str, manifest: str, num_search: int = 0) -> SweepSpec:
    """The specification of a sweep that trains a finished sweep's delivered model again on another manifest.

    It keeps that sweep's rules and lists its `delivered_trials`. With `num_search` these come first in a search of so
    many more, which starts from the earlier trials. Raises ImbvlmError.
    """
    state = SweepState.read(folder)
    spec, space = state.spec, state.spec.read_space()
    if not state.is_finished:
        raise ImbvlmError(f"only a finished sweep has a model to update. Finish it with: imbvlm sweep resume {folder}")
    if spec.study:
        raise ImbvlmError(f"{folder} is a study, which delivers tables and no model. Run it again with --manifest.")
    if num_search and isinstance(space, ListedSpace):
        searched = "" if spec.update_of is None else f", or name the sweep that searched: {spec.update_of}"
        raise ImbvlmError(f"{folder} lists its configurations and has no space to search. Omit --search{searched}.")
    trials = delivered_trials(state.log, spec)
    changes: Tree = {"update_of": storage.absolute(folder), "max_trials": None, "smoke": {}}
    base = apply_overrides(spec.base, {"data.manifest": manifest})
    if num_search:
        changes["first_trials"] = [trial.draw for trial in trials]
        changes["num_trials"] = len(trials) + num_search
        # A sampler at random learns nothing from earlier trials.
        changes["warm_start"] = [] if SAMPLERS[spec.searcher.name].independent else [storage.absolute(folder)]
    else:
        changes["space"] = {"configurations": {trial.trial_id: trial.draw for trial in trials}}
        changes |= {"num_trials": None, "first_trials": [], "warm_start": [], "stratify": []}
        # Early stopping would take a member of the delivered model away.
        changes["trial_scheduler"] = {"name": "none"}
        read = frozenset[str]().union(*(METHODS[str(trial.config["method"])].sections for trial in trials))
        base = {key: value for key, value in base.items() if key in read or key not in optional_sections()}
    return SweepSpec.from_tree({**spec.to_tree(), **changes, "base": base})


def delivered_trials(log: TrialLog, spec: SweepSpec) -> list[TrialRecord]:
    """The delivered model's trials of the search, and for its baselines the best trials that read the same features.

    Every sweep runs the baselines of its encoders itself.
    """
    winner = log.winner(spec.objective)
    assert winner is not None, "a finished sweep has a winner"
    members = () if log.selected is None else log.selected.members
    delivered = [log.records[member] for member in members] or [winner]
    trials, ranked = [record for record in delivered if record.kind == "search"], log.best(spec.objective)
    for record in delivered:
        key = feature_key(record.trial_config())
        if key not in {feature_key(trial.trial_config()) for trial in trials}:
            trials += [trial for trial in ranked if feature_key(trial.trial_config()) == key][:1]
    return trials or ranked[:1]
