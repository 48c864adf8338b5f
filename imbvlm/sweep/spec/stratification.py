"""Equal chances under `stratify`: which combination of choices is next, and how a trial is made one of it."""

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
    """The combinations of choices of the stratified keys, and how many trials each has had; one arm without keys."""

    def __init__(self, sweep: ResolvedSweep) -> None:
        spec, space = sweep.spec, sweep.space
        self._base, self._space, self._keys = spec.base, space, spec.stratify
        self._open = space.choices_over(spec.stratify, spec.base)
        # What the stratified keys hang on, since an arm may exist under some of it only.
        self._within = space.restrict_to(spec.stratify)
        keys = [parameter.key for parameter in self._within.parameters]
        self._ways = space.choices_over(keys, spec.base)
        self._counts: Counter[tuple[Any, ...]] = Counter()

    def of(self, draw: Mapping[str, Any]) -> Params:
        """The arm of a draw."""
        return {key: draw[key] for key in self._keys if key in draw}

    def count(self, draw: Mapping[str, Any]) -> None:
        """One more trial of the draw's arm."""
        self._counts[self._key(draw)] += 1

    def close(self, arm: Params) -> None:
        """No more trials of an arm."""
        self._open.remove(arm)

    def least_sampled(self) -> list[Params]:
        """The open arms, that with the fewest trials first."""
        return sorted(self._open, key=lambda arm: self._counts[self._key(arm)])

    def fixed_params(self, stratum: Params, rng: random.Random) -> dict[str, Any]:
        """Optuna's names and values that make a trial one of the arm; the sampler chooses the rest.

        Where the arm exists only under some values of what its keys hang on, one of those is taken by chance.
        """
        ways = [way for way in self._ways if self.of(way) == stratum]
        others = {self._key(way, invert=True) for way in self._ways}
        if len(ways) < len(others):
            return self._within.to_optuna_params(rng.choice(ways), self._base)
        named = [one for one in self._within.parameters if one.key in stratum and one.contains(stratum[one.key])]
        return {one.name: stratum[one.key] for one in named}

    def _key(self, draw: Mapping[str, Any], *, invert: bool = False) -> tuple[Any, ...]:
        return tuple(sorted((key, repr(value)) for key, value in draw.items() if (key in self._keys) != invert))


@dataclass(frozen=True)
class RandomTrial:
    """Draws each parameter evenly over its range, those with a given name excepted."""

    chance: random.Random
    given: Mapping[str, Any]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.given[name] if name in self.given else self.chance.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if name in self.given:
            return float(self.given[name])
        if not log:
            return self.chance.uniform(low, high)
        return min(max(math.exp(self.chance.uniform(math.log(low), math.log(high))), low), high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self.given[name]) if name in self.given else self.chance.randint(low, high)
