"""What is trained again on all training images for the test split: the winner and the best baseline of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from imbvlm.config.second_stage_registry import TauNormalizationConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.sweep.records.trial_log import WINNER, TrialLog, TrialRecord
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.sweep_spec import SweepSpec

# Before the name of a refit whose configuration was chosen by an earlier run of the sweep and is no longer.
SUPERSEDED = "earlier "


@dataclass(frozen=True)
class Refit:
    """A configuration that is trained again on all training rows and scored on the test split, once a seed.

    `is_fresh`: on fresh crops where its search read stored views, so that what validation chose isn't for it.
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
        """Of the run with a seed: that which an earlier run of the sweep has given the same configuration, if any."""
        config, known = dict(self.seeded())[seed], log.of("refit")
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())
        if self.record.kind == "search":
            names = {one.name for one in log.of("baseline")}
            same = (one for one in known if one.name not in names and one.trial_config() == config)
            found = next(same, None)
            if found is not None:
                return found.trial_id
        plain = f"refit-{slug}-seed{seed}"
        is_free = plain not in log.records or self.record.kind == "baseline"
        return plain if is_free else f"refit-{slug}-{self.record.trial_id}-seed{seed}"


def refit_seconds(log: TrialLog, spec: SweepSpec, concurrent: int) -> float:
    """What the refits would take by now, from how long their trials took; nothing before there is a best trial."""
    if not log.best(spec.objective):
        return 0.0
    each = [one.record.seconds() for one in refits(log, spec) for _ in one.seeds]
    return max(sum(each) / concurrent, max(each))


def mark_superseded(log: TrialLog, trial_ids: Mapping[str, str]) -> None:
    """Rename the refits that an earlier run made of what is no longer chosen; `trial_ids` has the chosen ones' names.

    They have read the test split, so they stay and are shown.
    """
    for record in log.of("refit"):
        name = trial_ids.get(record.trial_id, f"{SUPERSEDED}{record.name.removeprefix(SUPERSEDED)}")
        if record.name != name:
            record.name = name
            log.save(record)


def refits(log: TrialLog, spec: SweepSpec) -> list[Refit]:
    """The winner, and of each kind of baseline the best over the towers; in a study all that it lists, too.

    With `fresh_crops` the winner and each method's best come once more, on crops that are drawn anew in every epoch.
    """
    best, *others = log.best(spec.objective)
    found = [_refit(WINNER, best, spec)]
    ranked = log.best(spec.objective, "baseline")
    for method in ("linear_probe", "zero_shot"):
        record = next((one for one in ranked if one.config["method"] == method), None)
        if record is not None:
            found.append(_refit(record.name, record, spec))
    if spec.study:
        names = listed_names(log, spec)
        found += [_refit(names[one.trial_id], one, spec) for one in sorted(others, key=lambda one: one.trial_id)]
    if spec.fresh_crops:
        known = {one.name for one in found}
        for stored in _bests_of_methods(log, spec):
            found += [] if stored.name in known else [stored]
            fresh = stored.config.with_overrides({"features.store": False})
            found.append(replace(stored, name=fresh_name(stored.name), config=fresh, is_fresh=True))
    return found


def listed_names(log: TrialLog, spec: SweepSpec) -> dict[str, str]:
    """What the refits of a study's trials are called, by the trials' ids; one of them is the winner's."""
    space = spec.read_space()
    assert isinstance(space, ListedSpace), "check_spec lets only such a space have a study"
    names = {one.trial_id: f"study: {require_section(space.name_of(one.draw))}" for one in log.of("search")}
    return names | {one.trial_id: WINNER for one in log.best(spec.objective)[:1]}


def fresh_name(name: str) -> str:
    """What a refit is called when it is trained again on fresh crops."""
    return f"{name}, fresh crops"


def _refit(name: str, record: TrialRecord, spec: SweepSpec) -> Refit:
    config = refit_config(record, spec)
    # Without training every seed is the same.
    return Refit(name, record, config, tuple(spec.refit_seeds) if config.train is not None else (0,))


def _bests_of_methods(log: TrialLog, spec: SweepSpec) -> list[Refit]:
    """Of each method that trains on stored features the best trial that can do without them, the winner's first."""
    names = listed_names(log, spec) if spec.study else {one.trial_id: WINNER for one in log.best(spec.objective)[:1]}
    found: dict[str, Refit] = {}
    for record in log.best(spec.objective):
        method = str(record.config["method"])
        if method in found:
            continue
        name = names.get(record.trial_id, f"best {method.replace('_', ' ')}")
        refit = _refit(name, record, spec)
        if _can_be_fresh(refit.config):
            found[method] = refit
    return list(found.values())


def _can_be_fresh(config: TrialConfig) -> bool:
    """A second stage and class means stand on stored features."""
    from_means = config.classifier is not None and config.classifier.init == "class_mean"
    return config.train is not None and not config.reads_images and config.second_stage is None and not from_means


def refit_config(record: TrialRecord, spec: SweepSpec) -> TrialConfig:
    """The trial's configuration with what its run chose by validation, of which a refit has none.

    A second stage's tau is the one that was chosen; a baseline that stopped by its patience takes as many epochs as its
    best took.
    """
    config, overrides = record.trial_config(), dict[str, float]()
    best = record.best_epoch(spec.objective)
    if record.kind == "baseline" and config.train is not None and best is not None:
        overrides["train.num_epochs"] = int(best["epoch"])
    tau = record.chosen_tau
    if isinstance(config.second_stage, TauNormalizationConfig) and tau is not None:
        overrides["second_stage.tau"] = tau
    return config.with_overrides(overrides)
