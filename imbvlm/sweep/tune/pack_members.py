"""Packs: several trials as one Tune trial, while searcher, scheduler and records see each of them.

The adapters between Tune and them are a searcher that groups trials, a scheduler and a callback that pass on each
member, and the file by which a member that the scheduler stops leaves its pack.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from imbvlm.base import storage
from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.spec.baselines import BASELINES_PER_ENCODER, feature_key
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.in_process_trial import compress_settings
from imbvlm.sweep.tune.jobs import UnsavedSearcher
from imbvlm.sweep.tune.unpickled import Unpickled
from imbvlm.training.trial_pack import pack_key


@dataclass
class MemberTrial:
    """A trial of a pack, with the attributes of a Tune trial that searcher, scheduler and records read."""

    trial_id: str
    config: Tree
    last_result: Tree = field(default_factory=dict)
    stopped: bool = False
    error_file: str | None = None
    run_metadata: Any = None
    max_failures: int = 0

    @property
    def name(self) -> str:
        return str(self.config["record"]["trial_id"])


class Members:
    """The members of every Tune trial that runs, by the Tune trial's id, then by their own."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._members: dict[str, dict[str, MemberTrial]] = {}
        self._stopped: dict[str, list[str]] = {}

    def open(self, tune_id: str, members: list[MemberTrial]) -> Tree:
        """Register a new group and return its Tune configuration."""
        self._members[tune_id] = {member.name: member for member in members}
        together = len(members) > 1 and all(_trains_with_others(member.config) for member in members)
        for member in members:
            member.config["record"]["pack_size"] = len(members) if together else 1
            member.config["record"]["pack"] = members[0].name if len(members) > 1 else ""
        return {
            "record": {"trial_id": members[0].name},
            "names": [member.name for member in members],
            "together": together,
            "settings": compress_settings([member.config["settings"] for member in members]),
            "stop_file": self._stop_file(tune_id),
        }

    def of(self, tune_id: str) -> list[MemberTrial]:
        """Return the members that have not ended."""
        return list(self._members.get(tune_id, {}).values())

    def reporting(self, tune_id: str, result: Tree) -> Iterator[tuple[MemberTrial, Tree]]:
        """Iterate over the members that have not ended, each with its report."""
        members = self._members.get(tune_id, {})
        for report in result.get("reports", []):
            if report["member"] in members:
                yield members[report["member"]], report

    def end(self, tune_id: str, member: MemberTrial) -> None:
        """Remove a member that has ended."""
        self._members[tune_id].pop(member.name, None)

    def write_stopped(self, tune_id: str) -> None:
        """Write for the trial's process which members have been stopped so far."""
        names = self._stopped.setdefault(tune_id, [])
        names += [member.name for member in self.of(tune_id) if member.stopped]
        storage.write_bytes(self._stop_file(tune_id), json.dumps(names).encode())

    def _stop_file(self, tune_id: str) -> str:
        return storage.join(self._folder, f"stopped-{tune_id}.json")


@dataclass(frozen=True)
class _Waiting:
    """A suggested trial that is not handed out yet; up to `size` trials of its `key` may train together."""

    member: MemberTrial
    key: str | None
    size: int


class TuneSearcher(UnsavedSearcher):
    """Asks another searcher for trials in advance, and hands out those of one `pack_key` as one group.

    `size` gives the size of a configuration's pack. The baselines of an encoder are a group too, although each trains
    alone: they take seconds, and Tune would start a process for each of them.
    """

    def __init__(self, inner: Searcher, packs: Members, size: Callable[[TrialConfig], int]) -> None:
        super().__init__(metric=inner.metric, mode=inner.mode)
        self._inner, self._packs, self._size = inner, packs, size
        self._waiting: list[_Waiting] = []
        self._open: dict[str, dict[str, str]] = {}
        self._num_asked = 0

    def suggest(self, trial_id: str) -> Tree | str:
        if not self._waiting and not self._ask():
            return str(Searcher.FINISHED)
        first = self._waiting[0]
        while first.key is not None and len(self._waiting) < first.size and self._ask():
            pass
        together = [trial for trial in self._waiting[1:] if first.key is not None and trial.key == first.key]
        group = [first, *together[: first.size - 1]]
        self._waiting = [trial for trial in self._waiting if not any(trial is member for member in group)]
        self._open[trial_id] = {trial.member.name: trial.member.trial_id for trial in group}
        return self._packs.open(trial_id, [trial.member for trial in group])

    def _ask(self) -> bool:
        """Put one more trial into the waiting list; return False if there is none."""
        inner_id = f"member-{self._num_asked}"
        suggested = self._inner.suggest(inner_id)
        if not isinstance(suggested, dict):
            return False
        self._num_asked += 1
        record = suggested["record"]
        config = TrialConfig.from_tree(record["config"])
        if record["kind"] == "baseline" and not suggested["alone"]:
            size = BASELINES_PER_ENCODER
            key: str | None = f"baselines of {feature_key(config)}"
        else:
            size = self._size(config) if _trains_with_others(suggested) else 1
            key = pack_key(config) if size > 1 else None
        self._waiting.append(_Waiting(MemberTrial(inner_id, suggested), key, size))
        return True

    def on_trial_result(self, trial_id: str, result: Tree) -> None:
        for member, report in self._packs.reporting(trial_id, result):
            if report.get("done") or member.stopped:
                self._complete(trial_id, member.name, report)

    def on_trial_complete(self, trial_id: str, result: Tree | None = None, error: bool = False) -> None:
        reports = {report["member"]: report for report in (result or {}).get("reports", [])}
        for name in list(self._open.get(trial_id, {})):
            self._complete(trial_id, name, reports.get(name), error)

    def _complete(self, trial_id: str, name: str, report: Tree | None, error: bool = False) -> None:
        inner_id = self._open[trial_id].pop(name, None)
        if inner_id is not None:
            self._inner.on_trial_complete(inner_id, report, error)


class TuneScheduler(Unpickled, FIFOScheduler):
    """Passes each member's reports to another scheduler; a pack ends with its last member."""

    def __init__(self, inner: AshaBrackets, packs: Members) -> None:
        super().__init__()
        self._inner, self._packs = inner, packs
        self._open: dict[str, dict[str, MemberTrial]] = {}

    def on_trial_add(self, tune_controller: object, trial: Trial) -> None:
        self._open[trial.trial_id] = {member.name: member for member in self._packs.of(trial.trial_id)}
        for member in self._packs.of(trial.trial_id):
            self._inner.on_trial_add(tune_controller, member)

    def on_trial_result(self, tune_controller: object, trial: Trial, result: Tree) -> str:
        remaining, newly_stopped = self._open[trial.trial_id], False
        for member, report in self._packs.reporting(trial.trial_id, result):
            if report.get("done"):
                self._complete(tune_controller, trial.trial_id, member.name, report)
            elif self._inner.on_trial_result(tune_controller, member, report) == TrialScheduler.STOP:
                remaining.pop(member.name)
                member.stopped = newly_stopped = True
        if not remaining:
            return str(TrialScheduler.STOP)
        if newly_stopped:
            self._packs.write_stopped(trial.trial_id)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: object, trial: Trial, result: Tree) -> None:
        for report in result.get("reports", []):
            self._complete(tune_controller, trial.trial_id, report["member"], report)

    def _complete(self, tune_controller: object, tune_id: str, name: str, report: Tree) -> None:
        member = self._open[tune_id].pop(name, None)
        if member is not None:
            self._inner.on_trial_complete(tune_controller, member, report)


class TuneCallback(Unpickled, tune.Callback):
    """Passes each member to other callbacks; a member ends at once, while its pack continues."""

    def __init__(self, inner: Sequence[tune.Callback], packs: Members) -> None:
        self._inner, self._packs = inner, packs

    def setup(self, **info: Any) -> None:
        for callback in self._inner:
            callback.setup(**info)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        for callback in self._inner:
            callback.on_step_end(iteration, trials)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        for member in self._packs.of(trial.trial_id):
            for callback in self._inner:
                callback.on_trial_start(iteration, trials, member)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: Tree, **info: Any) -> None:
        for member, report in list(self._packs.reporting(trial.trial_id, result)):
            member.last_result = report
            for callback in self._inner:
                callback.on_trial_result(iteration, trials, member, report)
            if report.get("done") or member.stopped:
                self._complete(iteration, trials, trial, member)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        for member in self._packs.of(trial.trial_id):
            self._complete(iteration, trials, trial, member)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        for member in self._packs.of(trial.trial_id):
            member.error_file = trial.error_file
            for callback in self._inner:
                callback.on_trial_recover(iteration, trials, member)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        for member in self._packs.of(trial.trial_id):
            self._packs.end(trial.trial_id, member)
            member.run_metadata, member.max_failures = trial.run_metadata, trial.max_failures
            if len(trial.config["names"]) > 1:
                # Another member may be the cause, so this one counts as lost before its restarts were spent.
                member.max_failures = trial.run_metadata.num_failures
            member.error_file = trial.error_file
            for callback in self._inner:
                callback.on_trial_error(iteration, trials, member)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for callback in self._inner:
            callback.on_experiment_end(trials, **info)

    def _complete(self, iteration: int, trials: list[Trial], trial: Trial, member: MemberTrial) -> None:
        self._packs.end(trial.trial_id, member)
        for callback in self._inner:
            callback.on_trial_complete(iteration, trials, member)


def _trains_with_others(payload: Tree) -> bool:
    """Return whether a trial may join a pack: baselines end by their patience, restarted trials are at any epoch."""
    return payload["record"]["kind"] == "search" and not payload["alone"]
