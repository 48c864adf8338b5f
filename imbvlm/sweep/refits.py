"""What is trained again on all training images for the test split: the winner and the best baseline of each kind."""

from __future__ import annotations

from dataclasses import dataclass

from imbvlm.config import TrialConfig
from imbvlm.config_stages import TauNormalizationConfig
from imbvlm.sweep.results import TrialLog, TrialRecord
from imbvlm.sweep.spec import SweepSpec

WINNER = "winner"


@dataclass(frozen=True)
class Refit:
    """A configuration that is trained again on all training rows and scored on the test split, once a seed."""

    name: str
    record: TrialRecord
    config: TrialConfig
    seeds: tuple[int, ...]

    def seeded(self) -> list[tuple[int, TrialConfig]]:
        """Each seed with its configuration."""
        if self.config.train is None:
            return [(seed, self.config) for seed in self.seeds]
        return [(seed, self.config.with_overrides({"train.seed": seed})) for seed in self.seeds]


def refits(log: TrialLog, spec: SweepSpec) -> list[Refit]:
    """The winner; and of each kind of baseline the best over the towers."""
    best, seeds = log.best(spec.objective)[0], tuple(spec.refit_seeds)
    found = [Refit(WINNER, best, refit_config(best, spec), seeds)]
    ranked = log.best(spec.objective, "baseline")
    for method, its_seeds in (("linear_probe", seeds), ("zero_shot", (0,))):
        record = next((one for one in ranked if one.config["method"] == method), None)
        if record is not None:
            found.append(Refit(record.name, record, refit_config(record, spec), its_seeds))
    return found


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
