"""Optuna behind Tune's Searcher: no configuration is trained twice, failures are told, an exhausted space ends."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search import Searcher

from imbvlm.base.schema import Tree
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.earlier_sweeps import WarmTrial
from imbvlm.sweep.records.trial_log import TrialRecord
from imbvlm.sweep.spec.equivalence import canonical_key
from imbvlm.sweep.spec.objectives import Epochs, ObjectiveValues, direction, outcome
from imbvlm.sweep.spec.sampler_registry import SAMPLERS
from imbvlm.sweep.spec.search_space import ListedSpace, Params
from imbvlm.sweep.spec.stratification import RandomTrial, Strata
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.sweep.tune.jobs import AskedTrial, Job, UnsavedSearcher
from imbvlm.sweep.tune.samplers import VIOLATIONS, make_sampler

# So many proposals in a row may be known ones before an untried one is chosen by chance: a sampler that is told a good
# value again and again proposes nothing else.
MAX_REPEATS = 8
# So many random draws of a space that can't be counted are tried until it is taken for exhausted.
MAX_RANDOM_DRAWS = 500


def silence_optuna() -> None:
    """Suppress Optuna's progress messages and its warnings about experimental features, for the whole process."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class StudySearch(UnsavedSearcher):
    """First the given jobs (baselines, unfinished trials), then what Optuna proposes, until `num_trials` have gone out.

    A proposal that was drawn before takes the known value (of a running trial: when it ends) and doesn't count. Under
    `stratify` the arm with the fewest trials is next, and an arm without an untried configuration is closed; when all
    are, `exhausted` says so. `trim_history` keeps proposals fast: the sampler goes on with half of many trials.
    """

    def __init__(
        self,
        sweep: ResolvedSweep,
        jobs: list[Job],
        known: list[TrialRecord],
        payload: Callable[[Job], Tree],
        budget: Budget,
        epochs_of: Callable[[str], Epochs],
        study: optuna.Study,
        journal: OptunaJournal | None,
    ) -> None:
        spec, space = sweep.spec, sweep.space
        super().__init__(metric=spec.best_objective, mode="max")
        self._epochs_of, self._num_trials = epochs_of, sweep.num_trials
        self._spec, self._space, self._payload, self._budget = spec, space, payload, budget
        self._sampler = SAMPLERS[spec.searcher.name]
        self._jobs = list(jobs)
        self._listed = space.configurations if isinstance(space, ListedSpace) else {}
        self._first = [*spec.first_trials, *self._listed.values()]
        self._arms = Strata(sweep)
        self._running: dict[str, Job] = {}
        # By canonical key: the value of each configuration, and who waits for that of a running one.
        self._values: dict[str, ObjectiveValues | None] = {}
        self._waiting: dict[str, list[AskedTrial]] = {}
        self._handed_out = 0
        ids = [record.trial_id for record in known] + [job.trial_id for job in jobs if job.kind == "search"]
        self._last_number = max((int(one[1:]) for one in ids), default=0)
        self.num_repeats = 0
        self.exhausted = False
        self.study, self._journal = study, journal

    @staticmethod
    def open(
        sweep: ResolvedSweep,
        jobs: list[Job],
        known: list[TrialRecord],
        payload: Callable[[Job], Tree],
        budget: Budget,
        epochs_of: Callable[[str], Epochs] = lambda trial_id: (),
        warm: Sequence[WarmTrial] = (),
        journal: Path | None = None,
    ) -> StudySearch:
        """Open a search that has learned from other sweeps' trials, `warm`, and from the ended ones of its own."""
        optuna_journal = None if journal is None else OptunaJournal.create(journal, sweep.spec)
        study = _new_study(sweep.spec, len(known))
        search = StudySearch(sweep, jobs, known, payload, budget, epochs_of, study, optuna_journal)
        for trial in warm:
            search._add_finished(trial.draw, search._outcome(trial.record.epochs))
        for record in known:
            search._add_known(record)
        search.trim_history()
        return search

    # ------------------------------------------------------------------------------------ what Tune asks

    def suggest(self, trial_id: str) -> Tree | str:
        if self._budget.exhausted(keep_for_refits=True):
            return str(Searcher.FINISHED)
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
        value = None if error or not result or result.get("failure") else self._outcome(self._epochs(job, result))
        key = canonical_key(job.config)
        self._values[key] = value
        for asked in [job.asked, *self._waiting.pop(key, [])]:
            self._tell(asked, value)
        self.trim_history()

    def _epochs(self, job: Job, result: Tree) -> list[Mapping[str, float]]:
        """All that a trial has reported; its record may not have the last report yet."""
        before = [epoch for epoch in self._epochs_of(job.trial_id) if epoch["epoch"] < result.get("epoch", math.inf)]
        return [*before, result]

    def _outcome(self, epochs: Epochs) -> ObjectiveValues | None:
        """None for what can't be compared: Optuna keeps a NaN running for ever and takes inf for the best.

        The objective's value is its running maximum, which also an epoch has that an earlier process ran.
        """
        spec, best = self._spec, self._spec.best_objective
        value = max((one[best] for one in epochs if math.isfinite(one.get(best, math.nan))), default=None)
        if value is None:
            return None
        if not spec.other_objectives and not spec.constraints:
            return ObjectiveValues((float(value),), ())
        found = outcome(epochs, spec.objective, spec.other_objectives, spec.constraints)
        return None if found is None else ObjectiveValues((float(value), *found.values[1:]), found.violations)

    # -------------------------------------------------------------------------------------- what Optuna does

    def _next_search_job(self) -> Job | None:
        if self._handed_out >= self._num_trials or self._budget.trials_exhausted(self._handed_out):
            return None
        while self._first:
            draw = self._first.pop(0)
            job = self._propose(self._space.to_optuna_params(draw, self._spec.base)) if self._is_untried(draw) else None
            if job is not None:
                return job
        if self._listed:
            self.exhausted = True
            return None
        for arm in self._arms.least_sampled():
            job = self._untried_of(arm)
            if job is not None:
                return job
            self._arms.close(arm)
        self.exhausted = True
        return None

    def _untried_of(self, arm: Params) -> Job | None:
        """What the sampler proposes within an arm; where it repeats itself, an untried draw by chance."""
        chance = random.Random(f"{self._spec.searcher.seed} {self._last_number}")
        for _ in range(MAX_REPEATS):
            job = self._propose(self._arms.fixed_params(arm, chance))
            if job is not None:
                return job
        draws = self._space.enumerate_params(self._spec.base, arm)
        if draws is None:
            drawn = (self._random_draw(arm, chance) for _ in range(MAX_RANDOM_DRAWS))
            untried = next((draw for draw in drawn if self._is_untried(draw)), None)
        else:
            left = [draw for draw in draws if self._arms.of(draw) == arm and self._is_untried(draw)]
            untried = chance.choice(left) if left else None
        return None if untried is None else self._propose(self._space.to_optuna_params(untried, self._spec.base))

    def _random_draw(self, arm: Params, chance: random.Random) -> Params:
        return self._space.sample(RandomTrial(chance, self._arms.fixed_params(arm, chance)), self._spec.base)

    def _is_untried(self, draw: Params) -> bool:
        return canonical_key(self._spec.trial(draw)) not in self._values

    def _propose(self, names: Mapping[str, Any]) -> Job | None:
        """A new trial with some parameters given and the others from the sampler; None where it was drawn before."""
        asked, draw = self._ask(names)
        config = self._spec.trial(draw)
        key = canonical_key(config)
        if key not in self._values:
            self._last_number += 1
            job = Job(f"t{self._last_number:05d}", "search", "", config, draw, asked)
            self._hand_out(job)
            return job
        self.num_repeats += 1
        if key in self._waiting:
            self._waiting[key].append(asked)
        else:
            self._tell(asked, self._values[key])
        return None

    def _ask(self, names: Mapping[str, Any]) -> tuple[AskedTrial, Params]:
        trial, draw = self._ask_study(names)
        return AskedTrial(trial, None if self._journal is None else self._journal.begin(trial)), draw

    def _ask_study(self, names: Mapping[str, Any]) -> tuple[optuna.trial.Trial, Params]:
        # Put in and taken out at once: what is left in Optuna's queue would come up in another trial's place.
        if names:
            self.study.enqueue_trial(dict(names))
        trial = self.study.ask()
        if self._sampler.replay:
            # Optuna asks a sampler for its values, and lets it mark the trial, only once a value isn't given.
            _ = trial.relative_params
        return trial, self._space.sample(trial, self._spec.base)

    def trim_history(self) -> None:
        """Go on with half of many trials that have ended: the best ones, and as many of the others by chance.

        Where several values or constraints decide, all are kept.
        """
        spec, max_history = self._spec, self._sampler.max_history
        if max_history is None or spec.other_objectives or spec.constraints:
            return
        most = max(max_history, 4 * spec.searcher.num_random_trials)
        ended = [one for one in self.study.get_trials(deepcopy=False) if one.state.is_finished()]
        if len(ended) < most:
            return
        complete = [one for one in ended if one.state is TrialState.COMPLETE]
        by_value = sorted(complete, key=lambda one: -(one.value or 0.0))
        best, others = by_value[: most // 4], by_value[most // 4 :]
        chance = random.Random(f"{spec.searcher.seed} {self._last_number}")
        kept = best + chance.sample(others, min(len(others), most // 4))
        self.study = _new_study(spec, self._last_number)
        # In the order in which they ended: TPE weighs the later ones more.
        self.study.add_trials(sorted(kept, key=lambda one: one.number))
        running = [job.asked for job in self._running.values() if job.asked is not None]
        for asked in [*running, *chain.from_iterable(self._waiting.values())]:
            asked.trial, _ = self._ask_study(asked.trial.params)

    def _hand_out(self, job: Job) -> None:
        key = canonical_key(job.config)
        self._values[key], self._waiting[key] = None, []
        self._handed_out += 1
        self._arms.count(job.draw)

    def _tell(self, asked: AskedTrial, value: ObjectiveValues | None) -> None:
        if value is None:
            told = self.study.tell(asked.trial, state=TrialState.FAIL)
        else:
            asked.trial.set_user_attr(VIOLATIONS, value.violations)
            told = self.study.tell(asked.trial, list(value.values))
        if self._journal is not None and asked.shown is not None:
            self._journal.end(asked.shown, told)

    # --------------------------------------------------------------------------------------- what is resumed

    def _add_known(self, record: TrialRecord) -> None:
        value = record.best_value(self._spec.best_objective)
        told = None if value is None else self._outcome(record.epochs)
        self._values[canonical_key(record.trial_config())] = told
        self._handed_out += 1
        self._arms.count(record.draw)
        self._add_finished(record.draw, told)

    def _add_finished(self, draw: Params, value: ObjectiveValues | None) -> None:
        """A trial that this study didn't ask for."""
        if self._sampler.replay:
            asked, _ = self._ask(self._space.to_optuna_params(draw, self._spec.base))
            self._tell(asked, value)
            return
        fixed = optuna.trial.FixedTrial(self._space.to_optuna_params(draw, self._spec.base))
        self._space.sample(fixed, self._spec.base)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        # The sampler reads violations there; of trials that it has asked for it writes them itself.
        attributes = {} if value is None or not value.violations else {"constraints": list(value.violations)}
        trial = optuna.trial.create_trial(
            state=state,
            values=None if value is None else list(value.values),
            params=fixed.params,
            distributions=dict(fixed.distributions),
            system_attrs=attributes,
        )
        self.study.add_trial(trial)
        if self._journal is not None:
            self._journal.add(trial)

    def _adopt(self, job: Job) -> None:
        """An unfinished trial of an earlier run goes on as a trial of this study."""
        job.asked, _ = self._ask(self._space.to_optuna_params(job.draw, self._spec.base))
        self._hand_out(job)


class _NoLock:
    """A sweep's lease lets one process write its journal.

    Optuna's lock of a killed process stands in the next one's way for 30 s, and makes an error of an interrupt.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Nothing."""


class OptunaJournal:
    """Every trial in a file that Optuna's dashboard can read meanwhile; a resumed search is told again from records."""

    def __init__(self, study: optuna.Study) -> None:
        self._study, self._num_trials = study, 0

    @staticmethod
    def create(path: Path, spec: SweepSpec) -> OptunaJournal:
        """Create an empty journal in place of an earlier one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        # Version 0.1 locked it. A lock that it left makes other writers, such as a dashboard, wait for 30 s.
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        storage = JournalStorage(JournalFileBackend(str(path), _NoLock()))
        directions = [direction(metric) for metric in spec.objectives]
        return OptunaJournal(optuna.create_study(study_name=spec.name, directions=directions, storage=storage))

    def begin(self, trial: optuna.trial.Trial) -> int:
        """Its number there."""
        self.add(
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=trial.params, distributions=dict(trial.distributions)
            )
        )
        return self._num_trials - 1

    def add(self, trial: optuna.trial.FrozenTrial) -> None:
        self._study.add_trial(trial)
        self._num_trials += 1

    def end(self, number: int, told: optuna.trial.FrozenTrial) -> None:
        self._study.tell(number, told.values, told.state)


def _new_study(spec: SweepSpec, num_known: int) -> optuna.Study:
    directions = [direction(metric) for metric in spec.objectives]
    return optuna.create_study(study_name=spec.name, directions=directions, sampler=make_sampler(spec, num_known))
