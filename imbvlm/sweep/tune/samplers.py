"""Builds the Optuna samplers of SAMPLERS: functions of a sampler's options, a seed and its constraints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
    nsgaii,
)
from optuna.trial import FrozenTrial

from imbvlm.sweep.spec.sampler_registry import (
    SAMPLERS,
    BruteForceConfig,
    CmaesConfig,
    GeneticSection,
    GpConfig,
    Nsga2Config,
    Nsga3Config,
    QmcConfig,
    RandomConfig,
    TpeConfig,
)
from imbvlm.sweep.spec.sweep_spec import SweepSpec

Constraints = Callable[[FrozenTrial], Sequence[float]] | None

# The attribute of a trial that holds how far it is beyond each limit.
VIOLATIONS = "violations"
# Without one, NSGA takes the uniform crossover with the configured swapping probability.
CROSSOVERS: Mapping[str, Callable[[], nsgaii.BaseCrossover]] = {
    "blx_alpha": nsgaii.BLXAlphaCrossover,
    "sbx": nsgaii.SBXCrossover,
    "spx": nsgaii.SPXCrossover,
    "undx": nsgaii.UNDXCrossover,
    "vsbx": nsgaii.VSBXCrossover,
}


def make_sampler(spec: SweepSpec, num_ended: int) -> BaseSampler:
    """Build the sampler of a search that starts with `num_ended` trials."""
    # A resumed search must not propose what the first one began with.
    seed = spec.searcher.seed + num_ended
    return SAMPLERS[spec.searcher.name].build(spec.searcher, seed, _violations if spec.constraints else None)


def _violations(trial: FrozenTrial) -> list[float]:
    return list(trial.user_attrs[VIOLATIONS])


def build_tpe(config: TpeConfig, seed: int, constraints: Constraints) -> TPESampler:
    """Build Optuna's TPE."""
    return TPESampler(
        seed=seed,
        n_startup_trials=config.num_startup_trials,
        n_ei_candidates=config.num_candidates,
        multivariate=config.multivariate,
        group=config.multivariate,
        constant_liar=config.constant_liar,
        constraints_func=constraints,
    )


def build_random(config: RandomConfig, seed: int, constraints: Constraints) -> RandomSampler:
    """Build Optuna's random sampler."""
    return RandomSampler(seed=seed)


def build_gp(config: GpConfig, seed: int, constraints: Constraints) -> GPSampler:
    """Build Optuna's Gaussian process."""
    return GPSampler(
        seed=seed,
        n_startup_trials=config.num_startup_trials,
        deterministic_objective=config.deterministic,
        constraints_func=constraints,
        warn_independent_sampling=False,
    )


def build_cmaes(config: CmaesConfig, seed: int, constraints: Constraints) -> CmaEsSampler:
    """Build Optuna's CMA-ES."""
    return CmaEsSampler(
        seed=seed,
        n_startup_trials=config.num_startup_trials,
        popsize=config.population_size,
        use_separable_cma=config.variant == "separable",
        lr_adapt=config.variant == "adaptive_rate",
        warn_independent_sampling=False,
    )


def build_qmc(config: QmcConfig, seed: int, constraints: Constraints) -> QMCSampler:
    """Build Optuna's quasi-Monte Carlo sampler."""
    # The sequence stays the same over resumptions: replayed trials take it to where it was.
    return QMCSampler(
        qmc_type=config.sequence,
        scramble=config.scramble,
        seed=config.seed,
        independent_sampler=RandomSampler(seed=seed),
        warn_independent_sampling=False,
    )


def build_nsga2(config: Nsga2Config, seed: int, constraints: Constraints) -> NSGAIISampler:
    """Build Optuna's NSGA-II."""
    return NSGAIISampler(**_genetic_options(config, seed, constraints))


def build_nsga3(config: Nsga3Config, seed: int, constraints: Constraints) -> NSGAIIISampler:
    """Build Optuna's NSGA-III."""
    return NSGAIIISampler(**_genetic_options(config, seed, constraints), dividing_parameter=config.num_divisions)


def _genetic_options(config: GeneticSection, seed: int, constraints: Constraints) -> dict[str, Any]:
    crossover = CROSSOVERS.get(config.crossover)
    return {
        "seed": seed,
        "population_size": config.population_size,
        "mutation_prob": config.mutation_probability,
        "crossover": crossover() if crossover else None,
        "crossover_prob": config.crossover_probability,
        "swapping_prob": config.swapping_probability,
        "constraints_func": constraints,
    }


class ExhaustiveSampler(BruteForceSampler):
    """Optuna's brute force, whose end StudySearch sees: `Study.stop` fails outside of `Study.optimize`."""

    def after_trial(self, *args: Any) -> None:
        """Don't stop the study."""


def build_brute_force(config: BruteForceConfig, seed: int, constraints: Constraints) -> ExhaustiveSampler:
    """Build Optuna's brute force."""
    return ExhaustiveSampler(seed=seed)
