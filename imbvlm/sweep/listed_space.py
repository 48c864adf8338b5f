"""A space that is a list of configurations, each with a name: a study's, where nothing is searched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from imbvlm.config import Tree
from imbvlm.errors import ConfigError, Problem
from imbvlm.sweep.space import NOTHING, Draw, Parameter, SearchSpace, Suggester, is_one_of

# What Optuna calls the one thing that it is told of a trial.
CONFIGURATION = "configuration"


@dataclass(frozen=True)
class ListedSpace(SearchSpace):
    """Its draws are the listed configurations and nothing between; a parameter has every value that some draw has."""

    configurations: Mapping[str, Draw] = field(default_factory=dict)

    @staticmethod
    def of_configurations(configurations: Mapping[str, Draw], where: str = "") -> ListedSpace:
        """The space of named draws."""
        values: dict[str, list[Any]] = {}
        for draw in configurations.values():
            for key, value in draw.items():
                known = values.setdefault(key, [])
                if not is_one_of(value, known):
                    known.append(value)
        parameters = tuple(Parameter(key, key, "choice", tuple(found), {}, where) for key, found in values.items())
        return ListedSpace(parameters, {"configurations": configurations}, configurations)

    def draw(self, trial: Suggester, base: Tree) -> Draw:
        return dict(self.configurations[trial.suggest_categorical(CONFIGURATION, list(self.configurations))])

    def names_of(self, draw: Mapping[str, Any], base: Tree) -> dict[str, Any]:
        name = self.name_of(draw)
        if name is None:
            raise ConfigError([Problem(f"{dict(draw)} is none of the space's listed configurations")])
        return {CONFIGURATION: name}

    def name_of(self, draw: Mapping[str, Any]) -> str | None:
        """The configuration with exactly these keys and values."""
        return next((name for name, listed in self.configurations.items() if listed == dict(draw)), None)

    def without(self, keys: Iterable[str]) -> ListedSpace:
        gone = frozenset(keys)
        return ListedSpace.of_configurations(
            {
                name: {key: value for key, value in draw.items() if key not in gone}
                for name, draw in self.configurations.items()
            },
            self.parameters[0].where if self.parameters else "",
        )

    def onto(self, keys: Iterable[str]) -> ListedSpace:
        """Whole: nothing in a list hangs on anything else."""
        return self

    def finite_draws(self, base: Tree, fixed: Mapping[str, Any] = NOTHING) -> list[Draw] | None:
        return [
            dict(draw)
            for draw in self.configurations.values()
            if all(is_one_of(draw[key], [value]) for key, value in fixed.items() if key in draw)
        ]

    def corner_draws(self, base: Tree) -> tuple[list[Draw], list[Problem]]:
        return self.finite_draws(base) or [], []
