"""The configurations that are retrained on all training images for the test split: winner and best baselines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.sweep.records.trial_log import ENDED, WINNER, TrialLog, TrialRecord
from imbvlm.sweep.spec.baselines import baselines
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

# Precedes the name of a refit that an earlier run of the sweep selected and the present one no longer selects.
SUPERSEDED = "earlier "


@dataclass(frozen=True)
class Refit:
    """A configuration that is retrained on all training rows and scored on the test split, once per seed.

    `is_fresh`: trained on fresh crops although the search used stored views, so validation choices do not apply.
    """

    name: str
    record: TrialRecord
    config: TrialConfig
    seeds: tuple[int, ...]
    is_fresh: bool = False

    def seeded(self) -> list[tuple[int, TrialConfig]]:
        """Each seed with its configuration."""
        if self.config.train is None:
            return [(seed, self.config) for seed in self.seeds]
        return [(seed, self.config.with_overrides({"train.seed": seed})) for seed in self.seeds]

    def trial_id(self, seed: int, log: TrialLog) -> str:
        """Id of the run with a seed; a run of the same configuration from an earlier run of the sweep keeps its id."""
        config = dict(self.seeded())[seed]
        if self.record.kind == "search":
            baseline_names = {record.name for record in log.of("baseline")}
            for record in log.of("refit"):
                if record.name not in baseline_names and record.trial_config() == config:
                    return record.trial_id
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())
        plain = f"refit-{slug}-seed{seed}"
        existing = log.records.get(plain)
        return (
            plain
            if existing is None or existing.trial_config() == config
            else f"refit-{slug}-{self.record.trial_id}-seed{seed}"
        )


def folds_id(trial_id: str) -> str:
    """The id of a trial's run over folds."""
    return f"{trial_id}-folds"


def to_confirm(log: TrialLog, spec: SweepSpec) -> list[TrialRecord]:
    """The records that `confirm_folds` scores: baselines, the best trials, and the runs of these with more seeds.

    Those that read images are none, because a fold's models train on stored features.
    """
    eligible = (
        record
        for record in log.ranked(spec.objective)
        if record.state == "finished"
        and not log.constraint_violation(record, spec.objective)
        and not record.trial_config().reads_images
    )
    best = [*itertools.islice(eligible, spec.num_confirmed)]
    trial_ids = {record.trial_id for record in best}
    more_seeds = [record for record in log.of("confirm") if record.name in trial_ids and record.state == "finished"]
    of_baselines = [record for record in log.best(spec.objective, "baseline") if not record.trial_config().reads_images]
    return [*of_baselines, *best, *more_seeds]


def max_confirmed(sweep: ResolvedSweep) -> int:
    """The most records that `to_confirm` can have."""
    spec = sweep.spec
    num_best = min(spec.num_confirmed, sweep.num_trials)
    return len(baselines(sweep)) + num_best + spec.confirm_trials * len(spec.more_seeds)


def confirmed(log: TrialLog, spec: SweepSpec) -> dict[str, TrialRecord]:
    """The runs over folds by their trials' ids; none before all have ended, since rows of some can't be compared.

    Those that failed are left out.
    """
    if not log.of("folds"):
        return {}
    runs = {record.trial_id: log.records.get(folds_id(record.trial_id)) for record in to_confirm(log, spec)}
    if any(run is None or run.state not in ENDED for run in runs.values()):
        return {}
    return {trial_id: run for trial_id, run in runs.items() if run is not None and run.state == "finished"}


def confirm_seconds(log: TrialLog, spec: SweepSpec, num_folds: int, concurrent: int) -> float:
    """Estimated seconds of the runs over so many folds that are left, from those of their trials; 0 for one fold."""
    if num_folds == 1:
        return 0.0
    seconds = [
        num_folds * record.seconds() for record in to_confirm(log, spec) if folds_id(record.trial_id) not in log.records
    ]
    return max(sum(seconds) / concurrent, max(seconds, default=0.0))


def refit_seconds(log: TrialLog, spec: SweepSpec, concurrent: int) -> float:
    """Estimated seconds of the refits, from the seconds of their trials; 0 before there is a best trial."""
    if log.winner(spec.objective) is None:
        return 0.0
    selected = refits(log, spec)
    if log.selected is None and spec.blends is not None:
        # A blend's members are unknown before the selection, and the best trials are like them.
        likely = log.ranked(spec.objective)[: spec.blends.max_members - 1]
        selected += [_refit(record.trial_id, record, spec) for record in likely]
    seconds = [refit.record.seconds() for refit in selected for _ in refit.seeds]
    return max(sum(seconds) / concurrent, max(seconds))


def mark_superseded(log: TrialLog, trial_ids: Mapping[str, str]) -> None:
    """Rename refits and delivered models that are no longer selected; `trial_ids` maps the others' ids to their names.

    They have read the test split, so they stay and are shown.
    """
    for record in [*log.of("refit"), *log.of("delivered")]:
        name = trial_ids.get(record.trial_id, f"{SUPERSEDED}{record.name.removeprefix(SUPERSEDED)}")
        if record.name != name:
            record.name = name
            log.save(record)


def refits(log: TrialLog, spec: SweepSpec) -> list[Refit]:
    """The winner, the best baseline of each kind over all encoders, a blend's members, and all of a study.

    With `fresh_crops` the winner and the best trial of each method are refitted a second time, on fresh crops.
    """
    best, *others = log.winner_first(spec.objective)
    selected = [_refit(WINNER, best, spec)]
    ranked = log.best_baselines(spec.objective)
    best_baselines = {record.config["method"]: record for record in reversed(ranked)}
    # The probe first, then the heads, then zero-shot.
    methods = {name: METHODS[name] for name in best_baselines}
    for name in sorted(methods, key=lambda name: (not methods[name].trains, not methods[name].learns)):
        selected.append(_refit(best_baselines[name].name, best_baselines[name], spec))
    members = () if log.selected is None else log.selected.members
    refitted = {refit.record.trial_id for refit in selected}
    for record in (log.records[member] for member in members if member not in refitted):
        selected.append(_refit(record.name or f"member {record.trial_id}", record, spec))
    names = listed_names(log, spec) if spec.study else {best.trial_id: WINNER}
    if spec.study:
        ordered = sorted(others, key=lambda record: record.trial_id)
        selected += [_refit(names[record.trial_id], record, spec) for record in ordered]
    if spec.fresh_crops:
        selected_names = {refit.name for refit in selected}
        for stored in _best_of_methods(log, spec, names):
            fresh = stored.config.with_overrides({"features.store": False})
            selected += [] if stored.name in selected_names else [stored]
            selected.append(replace(stored, name=fresh_name(stored.name), config=fresh, is_fresh=True))
    return selected


def listed_names(log: TrialLog, spec: SweepSpec) -> dict[str, str]:
    """Names of the refits of a study's trials by the trials' ids; one of them is the winner."""
    space = spec.read_space()
    assert isinstance(space, ListedSpace), "check_spec lets only such a space have a study"
    names = {record.trial_id: f"study: {require_section(space.name_of(record.draw))}" for record in log.of("search")}
    return names | {record.trial_id: WINNER for record in log.winner_first(spec.objective)[:1]}


def fresh_name(name: str) -> str:
    """Name of a refit's second run, on fresh crops."""
    return f"{name}, fresh crops"


def _refit(name: str, record: TrialRecord, spec: SweepSpec) -> Refit:
    config = refit_config(record, spec)
    # Without training all seeds are equal.
    return Refit(name, record, config, tuple(spec.refit_seeds) if config.train is not None else (0,))


def _best_of_methods(log: TrialLog, spec: SweepSpec, names: Mapping[str, str]) -> list[Refit]:
    """The best trial of each method that can train on fresh crops in place of stored views, the winner's first."""
    best: dict[str, Refit] = {}
    for record in log.best(spec.objective):
        method = str(record.config["method"])
        if method in best:
            continue
        name = names.get(record.trial_id, f"best {method.replace('_', ' ')}")
        refit = _refit(name, record, spec)
        if _can_be_fresh(refit.config):
            best[method] = refit
    return list(best.values())


def _can_be_fresh(config: TrialConfig) -> bool:
    """Whether a configuration trains on stored features and needs them neither for a second stage nor class means."""
    from_means = config.classifier is not None and config.classifier.init == "class_mean"
    return config.train is not None and not config.reads_images and config.second_stage is None and not from_means


def refit_config(record: TrialRecord, spec: SweepSpec) -> TrialConfig:
    """The trial's configuration with the values that its run selected on validation, which a refit does not have.

    Options that validation selected are set. A baseline that its patience stopped takes the epochs of its best.
    """
    config, overrides = record.trial_config(), dict[str, float]()
    best = record.best_epoch(spec.objective)
    if record.kind == "baseline" and config.train is not None and best is not None:
        overrides["train.num_epochs"] = int(best["epoch"])
    return config.with_overrides({**overrides, **record.selected_options})
