"""A Parzen estimator of whole configurations, which follows the space's own conditions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr, ndtri

from imbvlm.base.schema import Tree
from imbvlm.sweep.spec.search_space import SearchSpace

Array = np.ndarray


class TreeSampler(BaseSampler):
    """TPE over whole configurations: each value is drawn given those before it, by the space's order and conditions.

    The good trials are a mixture of kernels, each a product over its keys; a key that a trial lacks has a flat factor.
    Of `num_candidates` configurations of that mixture the one of the highest ratio to the others' mixture is taken.
    """

    def __init__(
        self, space: SearchSpace, base: Tree, seed: int, *, num_startup: int = 10, num_candidates: int = 24,
        share_of_good: float = 0.15, width: float = 0.2,
    ) -> None:  # fmt: skip
        self._space, self._base, self._rng = space, base, np.random.default_rng(seed)
        self._num_startup, self._num_candidates = num_startup, num_candidates
        self._share_of_good, self._width = share_of_good, width
        self._chosen: dict[str, Any] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Mapping[str, Any]) -> dict[str, Any]:
        given = trial.system_attrs.get("fixed_params", {})
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        trials = sorted(trials, key=lambda each: sign * (each.value or 0.0))
        num_good = math.ceil(self._share_of_good * len(trials)) if len(trials) >= self._num_startup else 0
        good = _Mixture([each.params for each in trials[:num_good]], self._width)
        others = [*trials[num_good:], *(each for each in running if each.number != trial.number)]
        bad = _Mixture([each.params for each in others], self._width)
        best = -math.inf
        for _ in range(self._num_candidates if num_good else 1):
            draw = _Draw(good, bad, given, self._rng)
            SearchSpace.sample(self._space, draw, self._base)
            if draw.score > best:
                best, self._chosen = draw.score, draw.params
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._chosen[param_name]


class _Mixture:
    """Kernels around N configurations and a flat one; a configuration without a key has a flat factor for it."""

    def __init__(self, params: Sequence[Mapping[str, Any]], width: float) -> None:
        self.params, self._width = params, width
        self._choices: dict[str, Array] = {}
        self._centers: dict[str, tuple[Array, float]] = {}

    def choices(self, name: str, choices: Sequence[Any]) -> Array:
        """Probabilities (N + 1, K) of the choices."""
        if name not in self._choices:
            number = len(choices)
            table = np.full((len(self.params) + 1, number), 1 / number)
            mixed = number / (len(self.params) + number)
            for row, params in enumerate(self.params):
                if name in params:
                    table[row] *= mixed
                    table[row, list(choices).index(params[name])] += 1 - mixed
            self._choices[name] = table
        return self._choices[name]

    def centers(self, name: str, unit: Callable[[float], float]) -> tuple[Array, float]:
        """Centers (N,) on the unit interval, NaN without the key, and the kernels' width."""
        if name not in self._centers:
            centers = np.array([unit(params[name]) if name in params else np.nan for params in self.params])
            self._centers[name] = centers, self._width * max(1, int(np.isfinite(centers).sum())) ** -0.2
        return self._centers[name]


class _Draw:
    """One candidate; `score` is the logarithm of the mixtures' ratio."""

    def __init__(self, good: _Mixture, bad: _Mixture, given: Mapping[str, Any], rng: np.random.Generator) -> None:
        self.params: dict[str, Any] = {}
        self._mixtures, self._given, self._rng = (good, bad), given, rng
        # Each kernel's weight by the values so far.
        self._weights = [np.ones(len(mixture.params) + 1) for mixture in self._mixtures]

    @property
    def score(self) -> float:
        good, bad = (weights.mean() for weights in self._weights)
        return math.log(good) - math.log(bad)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        tables = [mixture.choices(name, choices) for mixture in self._mixtures]
        if name in self._given:
            index = list(choices).index(self._given[name])
        else:
            cumulative = np.cumsum(self._weights[0] @ tables[0])
            index = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1]))
        for weights, table in zip(self._weights, tables, strict=True):
            weights *= len(choices) * table[:, index]
        self.params[name] = choices[index]
        return choices[index]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        scale = math.log if log else float
        start, length = scale(low), scale(high) - scale(low)

        def unit(value: float) -> float:
            return (scale(value) - start) / length

        kernels = [mixture.centers(name, unit) for mixture in self._mixtures]
        if name in self._given:
            value = float(self._given[name])
        else:
            place = start + length * self._sample(*kernels[0])
            value = min(max(math.exp(place) if log else place, low), high)
        for weights, (centers, width) in zip(self._weights, kernels, strict=True):
            density = np.exp(-0.5 * ((unit(value) - centers) / width) ** 2) / (width * math.sqrt(2 * math.pi))
            density /= ndtr((1 - centers) / width) - ndtr(-centers / width)
            weights[:-1] *= np.where(np.isfinite(centers), density, 1.0)
        self.params[name] = value
        return value

    def _sample(self, centers: Array, width: float) -> float:
        """A number of the unit interval from a kernel that is cut off at its ends."""
        cumulative, part = np.cumsum(self._weights[0]), float(self._rng.random())
        row = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1]))
        if row == len(centers) or not np.isfinite(centers[row]):
            return part
        low, high = ndtr(-centers[row] / width), ndtr((1 - centers[row]) / width)
        return min(max(float(centers[row] + width * ndtri(low + part * (high - low))), 0.0), 1.0)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self.suggest_categorical(name, list(range(low, high + 1))))
