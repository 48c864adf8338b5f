"""Optuna behind Tune's Searcher: no configuration is trained twice, failures are told, an exhausted space ends."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from ray.tune.search import Searcher

from imbvlm.config import Tree, TrialConfig
from imbvlm.errors import ConfigError
from imbvlm.sweep.results import TrialKind, TrialRecord
from imbvlm.sweep.space import Draw, SearchSpace
from imbvlm.sweep.spec import SweepSpec, canonical_key

# So many proposals in a row that were all tried before end the search of a space that can't be counted.
MAX_REPEATS = 200


@dataclass
class Job:
    """One trial to run: its identity, its configuration, and what Optuna calls it (baselines have nothing there)."""

    trial_id: str
    kind: TrialKind
    name: str
    config: TrialConfig
    draw: Draw = field(default_factory=dict)
    asked: optuna.trial.Trial | None = None


class _UnsavedSearcher(Searcher):
    """A searcher that Tune has nothing to save of: resuming reads the trials' records, without unpickling."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class FixedSearcher(_UnsavedSearcher):
    """Hands out a given list of jobs; Optuna doesn't know them."""

    def __init__(self, jobs: list[Job], payload: Callable[[Job], Tree]) -> None:
        super().__init__(metric="epoch", mode="max")
        self._jobs = list(jobs)
        self._payload = payload

    def suggest(self, trial_id: str) -> Tree | str:
        if not self._jobs:
            return str(Searcher.FINISHED)
        return self._payload(self._jobs.pop(0))

    def on_trial_complete(self, trial_id: str, result: Tree | None = None, error: bool = False) -> None:
        """Nothing learns from these."""


class StudySearcher(_UnsavedSearcher):
    """First the given jobs (baselines, unfinished trials), then what Optuna proposes, until `num_trials` are handed out.

    A proposal that was drawn before takes the known value and doesn't count. A finite space ends when every
    draw has been tried; `exhausted` then says so.
    """

    def __init__(
        self,
        spec: SweepSpec,
        space: SearchSpace,
        jobs: list[Job],
        known: list[TrialRecord],
        payload: Callable[[Job], Tree],
    ) -> None:
        super().__init__(metric=spec.best_objective, mode="max")
        self._spec, self._space, self._payload = spec, space, payload
        self._jobs = list(jobs)
        self._size = space.size(spec.base)
        self._running: dict[str, Job] = {}
        self._values: dict[str, float | None] = {}
        self._same: dict[str, list[optuna.trial.Trial]] = {}
        self._arms: Counter[tuple[Any, ...]] = Counter()
        self._handed_out = 0
        self.num_repeats = 0
        self.exhausted = False
        self.study = optuna.create_study(direction="maximize", sampler=_sampler(spec, len(known)))
        for record in known:
            self._add_known(record)
        for draw in spec.first_trials if not known else []:
            self.study.enqueue_trial(space.names_of(draw, spec.base))

    # ------------------------------------------------------------------------------------ what Tune asks

    def suggest(self, trial_id: str) -> Tree | str:
        job = self._jobs.pop(0) if self._jobs else self._next_search_job()
        if job is None:
            return str(Searcher.FINISHED)
        if job.kind == "search" and job.asked is None:
            self._adopt(job)
        self._running[trial_id] = job
        return self._payload(job)

    def on_trial_complete(self, trial_id: str, result: Tree | None = None, error: bool = False) -> None:
        job = self._running.pop(trial_id, None)
        if job is None or job.asked is None:
            return
        failed = error or not result or bool(result.get("failure"))
        value = None if failed or result is None else float(result[self._spec.best_objective])
        key = canonical_key(job.config)
        self._values[key] = value
        for asked in [job.asked, *self._same.pop(key, [])]:
            self._tell(asked, value)

    # -------------------------------------------------------------------------------------- what Optuna does

    def _next_search_job(self) -> Job | None:
        repeats = 0
        while self._handed_out < self._spec.num_trials and not self.exhausted:
            if self._size is not None and len(self._values) >= self._size:
                break
            if repeats == MAX_REPEATS // 4:
                self._enqueue_untried()
            if repeats > MAX_REPEATS:
                break
            self._enqueue_arm()
            asked = self.study.ask()
            draw = self._space.draw(asked, self._spec.base)
            config = self._spec.trial(draw)
            key = canonical_key(config)
            if key not in self._values:
                self._values[key] = None
                return self._new_job(asked, draw, config)
            repeats += 1
            self._repeat(asked, key)
        self.exhausted = self._handed_out < self._spec.num_trials
        return None

    def _new_job(self, asked: optuna.trial.Trial, draw: Draw, config: TrialConfig) -> Job:
        self._handed_out += 1
        self._arms[self._arm(draw)] += 1
        return Job(f"t{self._handed_out:05d}", "search", "", config, draw, asked)

    def _repeat(self, asked: optuna.trial.Trial, key: str) -> None:
        self.num_repeats += 1
        if any(job.asked is not None and canonical_key(job.config) == key for job in self._running.values()):
            self._same.setdefault(key, []).append(asked)
        else:
            self._tell(asked, self._values[key])

    def _tell(self, asked: optuna.trial.Trial, value: float | None) -> None:
        if value is None:
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(asked, value)

    def _enqueue_untried(self) -> None:
        """Where the sampler keeps repeating itself in a finite space, an untried draw is next."""
        if self._size is None:
            return
        untried = [
            draw
            for draw in self._space.all_draws(self._spec.base)
            if canonical_key(self._spec.trial(draw)) not in self._values
        ]
        if not untried:
            self.exhausted = True
            return
        chosen = random.Random(self._spec.searcher.seed + self._handed_out).choice(untried)
        self.study.enqueue_trial(self._space.names_of(chosen, self._spec.base))

    def _enqueue_arm(self) -> None:
        """Under `stratify` the arm with the fewest trials is next; the sampler chooses the rest."""
        waiting = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        if not self._spec.stratify or waiting:
            return
        arms = stratified_arms(self._space, self._spec)
        arm = min(arms, key=lambda one: self._arms[tuple(one.get(key) for key in self._spec.stratify)])
        names = {parameter.key: parameter.name for parameter in self._space.parameters}
        self.study.enqueue_trial({names[key]: value for key, value in arm.items()})

    def _arm(self, draw: Draw) -> tuple[Any, ...]:
        return tuple(draw.get(key) for key in self._spec.stratify)

    # --------------------------------------------------------------------------------------- what is resumed

    def _add_known(self, record: TrialRecord) -> None:
        value = record.best_value(self._spec.best_objective)
        self._values[canonical_key(record.trial_config())] = value
        self._handed_out += 1
        self._arms[self._arm(record.draw)] += 1
        fixed = optuna.trial.FixedTrial(self._space.names_of(record.draw, self._spec.base))
        self._space.draw(fixed, self._spec.base)
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state, value=value, params=fixed.params, distributions=dict(fixed.distributions)
            )
        )

    def _adopt(self, job: Job) -> None:
        """An unfinished trial of an earlier run goes on as a trial of this study."""
        self.study.enqueue_trial(self._space.names_of(job.draw, self._spec.base))
        job.asked = self.study.ask()
        self._space.draw(job.asked, self._spec.base)
        self._values[canonical_key(job.config)] = None
        self._handed_out += 1
        self._arms[self._arm(job.draw)] += 1


def _sampler(spec: SweepSpec, num_known: int) -> optuna.samplers.BaseSampler:
    # A resumed search must not propose what the first one began with.
    seed = spec.searcher.seed + num_known
    if spec.searcher.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=spec.searcher.num_startup_trials, multivariate=True, group=True, constant_liar=True
    )


def stratified_arms(space: SearchSpace, spec: SweepSpec) -> list[Draw]:
    """Every combination of choices of the stratified keys that the space can draw."""
    arms: list[Draw] = [{}]
    for parameter in space.parameters:
        if parameter.key in spec.stratify:
            extended = []
            for arm in arms:
                conditions: Mapping[str, tuple[Any, ...]] = parameter.when
                holds = all(key not in arm or arm[key] in values for key, values in conditions.items())
                extended += (
                    [{**arm, parameter.key: value} for value in parameter.finite_values() or ()] if holds else [arm]
                )
            arms = extended
    if not arms:
        raise ConfigError([])
    return arms
