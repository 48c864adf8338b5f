"""SAMPLERS: the Optuna samplers that run in process by name, the options of each, and what it can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

from pydantic import Field

from imbvlm.base.registry import Lazy, Registry
from imbvlm.base.schema import Section
from imbvlm.config.input_sections import Seed


class SamplerSection(Section):
    """The options that every sampler has; a subclass adds its own and fixes `name`."""

    name: str
    seed: Seed = Field(0, description="seed of the sampled values")

    @property
    def num_random_trials(self) -> int:
        """The number of first trials that are sampled at random, before the sampler uses results."""
        return 0


class StartupSection(SamplerSection):
    """A sampler that begins with random trials."""

    num_startup_trials: int = Field(10, ge=1, description="random trials before the sampler uses results")

    @property
    def num_random_trials(self) -> int:
        return self.num_startup_trials


class TpeConfig(StartupSection):
    """Tree-structured Parzen estimator [Bergstra et al., NeurIPS 2011]."""

    name: Literal["tpe"] = "tpe"
    num_candidates: int = Field(24, ge=1, description="candidates of which the most promising one becomes a trial")
    multivariate: bool = Field(
        True, description="model keys together, separately for each set of keys that are sampled together"
    )
    constant_liar: bool = Field(True, description="keep away from trials that are still running")


class RandomConfig(SamplerSection):
    """Independent random sampling [Bergstra and Bengio, JMLR 2012]."""

    name: Literal["random"] = "random"

    # Version 0.1 wrote it for every sampler.
    retired_keys: ClassVar[Mapping[str, str | None]] = {"num_startup_trials": None}


class GpConfig(StartupSection):
    """Bayesian optimization with a Gaussian process and log expected improvement [Ament et al., NeurIPS 2023]."""

    name: Literal["gp"] = "gp"
    deterministic: bool = Field(False, description="assume that the same configuration always has the same result")


class CmaesConfig(StartupSection):
    """Covariance matrix adaptation evolution strategy [Hansen, arXiv 1604.00772]."""

    name: Literal["cmaes"] = "cmaes"
    num_startup_trials: int = Field(1, ge=1, description="random trials before the sampler uses results")
    population_size: int | None = Field(None, ge=4, description="null: 4 + 3 ln(number of keys), rounded down")
    # CMA-ES with margin is left out: it learns from its proposals, even where first_trials or stratify fixed values.
    variant: Literal["full", "separable", "adaptive_rate"] = Field(
        "full", description="separable: diagonal covariance; adaptive_rate: a learning rate for noisy objectives"
    )


class QmcConfig(SamplerSection):
    """Quasi-Monte Carlo: a sequence of low discrepancy, which covers the space more evenly than random values."""

    name: Literal["qmc"] = "qmc"
    sequence: Literal["sobol", "halton"] = Field("sobol", description="the sequence of points")
    # Optuna's default is False; a sequence that isn't scrambled is the same for every seed.
    scramble: bool = Field(True, description="randomize the sequence by the seed")


class GeneticSection(SamplerSection):
    """A genetic algorithm, whose first generation is random."""

    population_size: int = Field(50, ge=3, description="trials of one generation; the first one is random")
    mutation_probability: float | None = Field(
        None, ge=0, le=1, description="probability that a key is sampled at random; null: 1 / number of keys"
    )
    crossover: Literal["uniform", "blx_alpha", "sbx", "spx", "undx", "vsbx"] = Field(
        "uniform", description="how numbers of several parents are combined; choices always take those of one"
    )
    crossover_probability: float = Field(0.9, ge=0, le=1, description="probability that a trial has several parents")
    swapping_probability: float = Field(
        0.5, ge=0, le=1, description="probability that a value comes from the second parent"
    )

    @property
    def num_random_trials(self) -> int:
        return self.population_size


class Nsga2Config(GeneticSection):
    """NSGA-II [Deb et al., IEEE TEVC 2002]."""

    name: Literal["nsga2"] = "nsga2"


class Nsga3Config(GeneticSection):
    """NSGA-III [Deb and Jain, IEEE TEVC 2014], for three objectives or more."""

    name: Literal["nsga3"] = "nsga3"
    num_divisions: int = Field(3, ge=1, description="divisions of each objective between the reference points")


class BruteForceConfig(SamplerSection):
    """Every configuration of a finite space, in random order."""

    name: Literal["brute_force"] = "brute_force"


@dataclass(frozen=True)
class Sampler:
    """One sampler: its options, how it is built, and what it can do."""

    config: type[SamplerSection]
    # Its name in sentences.
    title: str
    # build(config, seed, constraints_func) -> optuna.samplers.BaseSampler
    build: Callable[..., Any]
    # It ignores results, so that its trials show fairly which values matter.
    independent: bool = False
    multi_objective: bool = False
    constraints: bool = False
    # It models keys that only some trials have, and keys with unordered values. Others are sampled at random.
    conditional: bool = False
    categorical: bool = True
    # It takes ranges of floats.
    continuous: bool = True
    # It learns only from trials that it has marked: a resumed search asks it for each of the earlier ones again.
    replay: bool = False
    # At so many ended trials the search forgets half, so that proposals stay fast.
    max_history: int | None = None
    # Packages that it imports in addition to ours.
    requires: tuple[str, ...] = ()

    def missing_packages(self) -> list[str]:
        """The required packages that aren't installed."""
        return [package for package in self.requires if find_spec(package) is None]


def _build(name: str) -> Lazy:
    return Lazy(f"imbvlm.sweep.tune.samplers:build_{name}")


SAMPLERS = Registry(
    "sampler",
    {
        "tpe": Sampler(
            TpeConfig,
            "TPE",
            _build("tpe"),
            multi_objective=True,
            constraints=True,
            conditional=True,
            # TPE reads every trial for each proposal.
            max_history=300,
        ),
        "random": Sampler(
            RandomConfig,
            "random search",
            _build("random"),
            independent=True,
            multi_objective=True,
            constraints=True,
            conditional=True,
        ),
        "gp": Sampler(
            GpConfig,
            "a Gaussian process",
            _build("gp"),
            multi_objective=True,
            constraints=True,
            max_history=300,
            requires=("torch", "scipy"),
        ),
        "cmaes": Sampler(CmaesConfig, "CMA-ES", _build("cmaes"), categorical=False, replay=True, requires=("cmaes",)),
        "qmc": Sampler(
            QmcConfig,
            "quasi-Monte Carlo sampling",
            _build("qmc"),
            independent=True,
            multi_objective=True,
            constraints=True,
            replay=True,
            requires=("scipy",),
        ),
        "nsga2": Sampler(Nsga2Config, "NSGA-II", _build("nsga2"), multi_objective=True, constraints=True, replay=True),
        "nsga3": Sampler(Nsga3Config, "NSGA-III", _build("nsga3"), multi_objective=True, constraints=True, replay=True),
        # Optuna's GridSampler adds nothing to it, and takes neither conditions nor values that are fixed.
        "brute_force": Sampler(
            BruteForceConfig,
            "exhaustive search",
            _build("brute_force"),
            independent=True,
            multi_objective=True,
            constraints=True,
            conditional=True,
            continuous=False,
        ),
    },
)
