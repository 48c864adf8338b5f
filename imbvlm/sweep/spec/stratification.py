"""Strata of a search: combinations of the choices of the keys under `stratify`, which get equal numbers of trials."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep


class Strata:
    """The strata of a sweep and the number of trials of each. Without stratified keys there is one stratum."""

    def __init__(self, sweep: ResolvedSweep) -> None:
        spec, space = sweep.spec, sweep.space
        self._base, self._keys = spec.base, spec.stratify
        self._open = space.choices_over(spec.stratify, spec.base)
        # The stratified keys and those that they depend on: a stratum may exist only under some of their values.
        self._within = space.restrict_to(spec.stratify)
        self._combinations = space.choices_over([parameter.key for parameter in self._within.parameters], spec.base)
        self._counts: Counter[tuple[Any, ...]] = Counter()

    def of(self, params: Mapping[str, Any]) -> Params:
        """Return the stratum of sampled values."""
        return {key: params[key] for key in self._keys if key in params}

    def count(self, params: Mapping[str, Any]) -> None:
        """Count a trial in the stratum of its values."""
        self._counts[self._key(params)] += 1

    def close(self, stratum: Params) -> None:
        """Give a stratum no more trials."""
        self._open.remove(stratum)

    def least_sampled(self) -> list[Params]:
        """Return the open strata, those with the fewest trials first."""
        return sorted(self._open, key=lambda stratum: self._counts[self._key(stratum)])

    def fixed_params(self, stratum: Params, rng: random.Random) -> dict[str, Any]:
        """Return Optuna's names and values that put a trial into a stratum; the sampler chooses the others.

        Where the stratum needs certain values of other keys, they are chosen at random.
        """
        combinations = [params for params in self._combinations if self.of(params) == stratum]
        values_of_others = {self._key(params, invert=True) for params in self._combinations}
        if len(combinations) < len(values_of_others):
            return self._within.to_optuna_params(rng.choice(combinations), self._base)
        return {
            parameter.name: stratum[parameter.key]
            for parameter in self._within.parameters
            if parameter.key in stratum and parameter.contains(stratum[parameter.key])
        }

    def _key(self, params: Mapping[str, Any], *, invert: bool = False) -> tuple[Any, ...]:
        return tuple(sorted((key, repr(value)) for key, value in params.items() if (key in self._keys) != invert))


@dataclass(frozen=True)
class RandomTrial:
    """Samples each parameter uniformly over its range, except those with a given value."""

    rng: random.Random
    given: Mapping[str, Any]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.given[name] if name in self.given else self.rng.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if name in self.given:
            return float(self.given[name])
        if not log:
            return self.rng.uniform(low, high)
        return min(max(math.exp(self.rng.uniform(math.log(low), math.log(high))), low), high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self.given[name]) if name in self.given else self.rng.randint(low, high)
