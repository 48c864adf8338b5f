"""The search: Optuna as a source of jobs, which trains no configuration twice and ends an exhausted space."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.earlier_sweeps import WarmTrial
from imbvlm.sweep.records.trial_log import TrialRecord
from imbvlm.sweep.spec.equivalence import canonical_key
from imbvlm.sweep.spec.objectives import Epochs, ObjectiveValues, best_epoch, direction, outcome
from imbvlm.sweep.spec.sampler_registry import SAMPLERS
from imbvlm.sweep.spec.search_space import ListedSpace, Params
from imbvlm.sweep.spec.stratification import RandomTrial, Strata
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.sweep.tune.jobs import AskedTrial, Job
from imbvlm.sweep.tune.samplers import VIOLATIONS, make_sampler

# Proposals in a row that may repeat earlier ones. A sampler may propose the best configuration forever. After that many
# repeats the search takes an untried configuration at random.
MAX_REPEATS = 8
# Random samples of an uncountable space without an untried configuration before the space counts as exhausted.
MAX_RANDOM_SAMPLES = 500


def silence_optuna() -> None:
    """Suppress Optuna's progress messages and its warnings about experimental features, for the whole process."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class StudySearch:
    """Hands out the given jobs (baselines, unfinished trials), then `num_trials` configurations that Optuna proposes.

    A repeated proposal takes the value of the earlier trial, once that has ended, and doesn't count. Under `stratify`
    the stratum with the fewest trials is next. A stratum without untried configurations is closed, and `exhausted` is
    true once all are. `trim_history` keeps proposals fast.
    """

    def __init__(
        self,
        sweep: ResolvedSweep,
        jobs: list[Job],
        records: list[TrialRecord],
        budget: Budget,
        study: optuna.Study,
        journal: OptunaJournal | None,
    ) -> None:
        spec, space = sweep.spec, sweep.space
        self._spec, self._space, self._budget, self._num_trials = spec, space, budget, sweep.num_trials
        self._sampler = SAMPLERS[spec.searcher.name]
        self._jobs = list(jobs)
        self._listed = space.configurations if isinstance(space, ListedSpace) else {}
        self._first = [*spec.first_trials, *self._listed.values()]
        self._strata = Strata(sweep)
        self._running: dict[str, Job] = {}
        # By canonical key: the values of each configuration, and the repeated proposals that wait for those of a
        # running one.
        self._values: dict[str, ObjectiveValues | None] = {}
        self._waiting: dict[str, list[AskedTrial]] = {}
        self._handed_out = 0
        ids = [record.trial_id for record in records] + [job.trial_id for job in jobs if job.kind == "search"]
        self._last_number = max((int(trial_id[1:]) for trial_id in ids), default=0)
        self.num_repeats = 0
        self.exhausted = False
        self.study, self._journal = study, journal

    @staticmethod
    def open(
        sweep: ResolvedSweep,
        jobs: list[Job],
        records: list[TrialRecord],
        budget: Budget,
        warm: Sequence[WarmTrial] = (),
        journal: Path | None = None,
    ) -> StudySearch:
        """Open a search that has learned from other sweeps' trials, `warm`, and from the ended ones of its own."""
        optuna_journal = None if journal is None else OptunaJournal.create(journal, sweep.spec)
        study = _new_study(sweep.spec, len(records))
        search = StudySearch(sweep, jobs, records, budget, study, optuna_journal)
        for trial in warm:
            search._add_finished(trial.draw, search._outcome(trial.record.epochs))
        for record in records:
            search._add_record(record)
        search.trim_history()
        return search

    # ------------------------------------------------------------------------------------ what a run asks

    def next_job(self) -> Job | None:
        """Return the next job; None while a limit is used up, and once the space or the number of trials is."""
        if self._budget.exhausted(keep_for_refits=True):
            return None
        job = self._jobs.pop(0) if self._jobs else self._next_search_job()
        if job is not None:
            if job.kind == "search" and job.asked is None:
                self._adopt(job)
            self._running[job.trial_id] = job
        return job

    def finished(self, job: Job, epochs: Epochs) -> None:
        """Report a trial's value to the sampler; a trial without epochs has failed."""
        if self._running.pop(job.trial_id, None) is None or job.asked is None:
            return
        value, key = self._outcome(epochs), canonical_key(job.config)
        self._values[key] = value
        for asked in [job.asked, *self._waiting.pop(key, [])]:
            self._tell(asked, value)
        self.trim_history()

    def _outcome(self, epochs: Epochs) -> ObjectiveValues | None:
        """Return the values of a trial; None for NaN, with which Optuna keeps a trial running, and for infinity.

        The objective's value is its running maximum, which includes the epochs of earlier processes.
        """
        spec, best = self._spec, self._spec.best_objective
        epoch = best_epoch(epochs, best)
        if epoch is None:
            return None
        value = float(epoch[best])
        if not spec.other_objectives and not spec.constraints:
            return ObjectiveValues((value,), ())
        result = outcome(epochs, spec.objective, spec.other_objectives, spec.constraints)
        return None if result is None else ObjectiveValues((value, *result.values[1:]), result.violations)

    # -------------------------------------------------------------------------------------- what Optuna does

    def _next_search_job(self) -> Job | None:
        if self._handed_out >= self._num_trials or self._budget.trials_exhausted(self._handed_out):
            return None
        while self._first:
            params = self._first.pop(0)
            if self._is_untried(params) and (job := self._propose(self._optuna_params(params))) is not None:
                return job
        if self._listed:
            self.exhausted = True
            return None
        for stratum in self._strata.least_sampled():
            job = self._propose_untried(stratum)
            if job is not None:
                return job
            self._strata.close(stratum)
        self.exhausted = True
        return None

    def _propose_untried(self, stratum: Params) -> Job | None:
        """Return a proposal of the sampler in a stratum, or an untried configuration at random; None without any."""
        rng = random.Random(f"{self._spec.searcher.seed} {self._last_number}")
        for _ in range(MAX_REPEATS):
            job = self._propose(self._strata.fixed_params(stratum, rng))
            if job is not None:
                return job
        configurations = self._space.enumerate_params(self._spec.base, stratum)
        if configurations is None:
            samples = (self._sample_randomly(stratum, rng) for _ in range(MAX_RANDOM_SAMPLES))
            untried = next((params for params in samples if self._is_untried(params)), None)
        else:
            remaining = [
                params for params in configurations if self._strata.of(params) == stratum and self._is_untried(params)
            ]
            untried = rng.choice(remaining) if remaining else None
        return None if untried is None else self._propose(self._optuna_params(untried))

    def _sample_randomly(self, stratum: Params, rng: random.Random) -> Params:
        return self._space.sample(RandomTrial(rng, self._strata.fixed_params(stratum, rng)), self._spec.base)

    def _is_untried(self, params: Params) -> bool:
        return canonical_key(self._spec.trial(params)) not in self._values

    def _optuna_params(self, params: Params) -> dict[str, Any]:
        return self._space.to_optuna_params(params, self._spec.base)

    def _propose(self, given: Mapping[str, Any]) -> Job | None:
        """Return a trial with some given parameters, the others from the sampler; None for a repeated configuration."""
        asked, params = self._ask(given)
        config = self._spec.trial(params)
        key = canonical_key(config)
        if key not in self._values:
            self._last_number += 1
            job = Job(f"t{self._last_number:05d}", "search", "", config, params, asked)
            self._hand_out(job)
            return job
        self.num_repeats += 1
        if key in self._waiting:
            self._waiting[key].append(asked)
        else:
            self._tell(asked, self._values[key])
        return None

    def _ask(self, given: Mapping[str, Any]) -> tuple[AskedTrial, Params]:
        trial, params = self._ask_study(given)
        return AskedTrial(trial, None if self._journal is None else self._journal.begin(trial)), params

    def _ask_study(self, given: Mapping[str, Any]) -> tuple[optuna.trial.Trial, Params]:
        # The trial leaves Optuna's queue at once: a queued one would take the place of another trial.
        if given:
            self.study.enqueue_trial(dict(given))
        trial = self.study.ask()
        if self._sampler.replay:
            # Optuna 5 calls the sampler, which marks the trial, only for a value that isn't given.
            _ = trial.relative_params
        return trial, self._space.sample(trial, self._spec.base)

    def trim_history(self) -> None:
        """Continue with half of the ended trials once they are many: the best ones, and as many others at random.

        A search with several objectives or constraints keeps all.
        """
        spec, max_history = self._spec, self._sampler.max_history
        if max_history is None or spec.other_objectives or spec.constraints:
            return
        max_ended = max(max_history, 4 * spec.searcher.num_random_trials)
        ended = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        if len(ended) < max_ended:
            return
        complete = [trial for trial in ended if trial.state is TrialState.COMPLETE]
        by_value = sorted(complete, key=lambda trial: -(trial.value or 0.0))
        best, others = by_value[: max_ended // 4], by_value[max_ended // 4 :]
        rng = random.Random(f"{spec.searcher.seed} {self._last_number}")
        retained = best + rng.sample(others, min(len(others), max_ended // 4))
        self.study = _new_study(spec, self._last_number)
        # The order in which they ended matters: TPE gives later trials more weight.
        self.study.add_trials(sorted(retained, key=lambda trial: trial.number))
        running = [job.asked for job in self._running.values() if job.asked is not None]
        for asked in [*running, *chain.from_iterable(self._waiting.values())]:
            asked.trial, _ = self._ask_study(asked.trial.params)

    def _hand_out(self, job: Job) -> None:
        key = canonical_key(job.config)
        self._values[key], self._waiting[key] = None, []
        self._handed_out += 1
        self._strata.count(job.draw)

    def _tell(self, asked: AskedTrial, value: ObjectiveValues | None) -> None:
        if value is None:
            trial = self.study.tell(asked.trial, state=TrialState.FAIL)
        else:
            asked.trial.set_user_attr(VIOLATIONS, value.violations)
            trial = self.study.tell(asked.trial, list(value.values))
        if self._journal is not None and asked.journal_number is not None:
            self._journal.end(asked.journal_number, trial)

    # --------------------------------------------------------------------------------------- what is resumed

    def _add_record(self, record: TrialRecord) -> None:
        has_value = record.best_value(self._spec.best_objective) is not None
        value = self._outcome(record.epochs) if has_value else None
        self._values[canonical_key(record.trial_config())] = value
        self._handed_out += 1
        self._strata.count(record.draw)
        self._add_finished(record.draw, value)

    def _add_finished(self, params: Params, value: ObjectiveValues | None) -> None:
        """Add an ended trial of an earlier study."""
        if self._sampler.replay:
            asked, _ = self._ask(self._optuna_params(params))
            self._tell(asked, value)
            return
        fixed = optuna.trial.FixedTrial(self._optuna_params(params))
        self._space.sample(fixed, self._spec.base)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        # The sampler reads violations from this attribute, which it writes itself for trials that it proposed.
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
        """Continue an unfinished trial of an earlier run as a trial of this study."""
        job.asked, _ = self._ask(self._optuna_params(job.draw))
        self._hand_out(job)


class _NoLock:
    """No lock: the sweep's lease already lets only one process write the journal.

    Optuna's own lock would make the process after a killed one wait for 30 s, and an interrupt an error.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Do nothing."""


class OptunaJournal:
    """A file of all trials for Optuna's dashboard. A resumed search reads the trials' records, not this file."""

    def __init__(self, study: optuna.Study) -> None:
        self._study, self._num_trials = study, 0

    @staticmethod
    def create(path: Path, spec: SweepSpec) -> OptunaJournal:
        """Create an empty journal in place of an earlier one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        # A lock that version 0.1 left would make other writers, such as a dashboard, wait for 30 s.
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        storage = JournalStorage(JournalFileBackend(str(path), _NoLock()))
        directions = [direction(metric) for metric in spec.objectives]
        return OptunaJournal(optuna.create_study(study_name=spec.name, directions=directions, storage=storage))

    def begin(self, trial: optuna.trial.Trial) -> int:
        """Add a running trial and return its number in the journal."""
        self.add(
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=trial.params, distributions=dict(trial.distributions)
            )
        )
        return self._num_trials - 1

    def add(self, trial: optuna.trial.FrozenTrial) -> None:
        """Add a trial."""
        self._study.add_trial(trial)
        self._num_trials += 1

    def end(self, number: int, trial: optuna.trial.FrozenTrial) -> None:
        """Write the state and the values of a trial that has ended."""
        self._study.tell(number, trial.values, trial.state)


def _new_study(spec: SweepSpec, num_ended: int) -> optuna.Study:
    directions = [direction(metric) for metric in spec.objectives]
    return optuna.create_study(study_name=spec.name, directions=directions, sampler=make_sampler(spec, num_ended))
