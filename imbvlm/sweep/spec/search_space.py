"""A search space: dotted keys of a trial, their ranges and conditions, as an Optuna define-by-run function."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.schema import Tree
from imbvlm.config.method_registry import OPTIONAL_SECTIONS
from imbvlm.config.trial_config import apply_overrides, drop_unused_sections

Params = dict[str, Any]
Scalar = str | int | float | bool | None
Kind = Literal["choice", "uniform", "loguniform", "int"]
KINDS: tuple[Kind, ...] = ("choice", "uniform", "loguniform", "int")
MISSING = object()
NOTHING: Mapping[str, Any] = MappingProxyType({})
# Whole numbers of a wider range count as continuous, and so does a space of more draws.
MAX_WHOLE_NUMBERS = 64
MAX_DRAWS = 20_000


class Suggester(Protocol):
    """What the space needs of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class Parameter:
    """One Optuna parameter: a key's range under its conditions; a key with branches has one for each."""

    key: str
    name: str
    kind: Kind
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]]
    where: str

    def suggest(self, trial: Suggester) -> Any:
        """Draw a value from the range."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.values)
        low, high = self.values
        if self.kind == "int":
            return trial.suggest_int(self.name, low, high)
        return trial.suggest_float(self.name, low, high, log=self.kind == "loguniform")

    def finite_values(self) -> tuple[Any, ...] | None:
        """Every value of the range; None where it is continuous or has more than 64."""
        if self.kind == "choice":
            return self.values
        if self.kind == "int" and self.values[1] - self.values[0] < MAX_WHOLE_NUMBERS:
            return tuple(range(self.values[0], self.values[1] + 1))
        return None

    def contains(self, value: Any) -> bool:
        """Whether the range has a value."""
        if self.kind == "choice":
            return is_one_of(value, self.values)
        number = isinstance(value, int if self.kind == "int" else (int, float)) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]

    def depends_on(self) -> set[str]:
        """The keys that decide whether it is drawn: those of its conditions, and what can take those out of a trial."""
        sections = {key.split(".")[0] for key in self.when}
        tags = {f"{section}.{tag}" for section in sections for tag in ("name", "kind")}
        keys = set(self.when) | tags | ({"method"} if sections & OPTIONAL_SECTIONS else set())
        return keys if self.key in self.when else keys - {self.key}

    def describe(self) -> str:
        """The range in a few words, such as `loguniform 0.003 .. 0.1 when method = decoder`."""
        choices = ", ".join(map(_word, self.values))
        body = f"choice {choices}" if self.kind == "choice" else "{} {} .. {}".format(self.kind, *self.values)
        conditions = " and ".join(f"{key} = {' or '.join(map(_word, values))}" for key, values in self.when.items())
        return f"{body} when {conditions}" if conditions else body


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


@dataclass(frozen=True)
class SearchSpace:
    """The parameters in an order in which each comes after those that it hangs on."""

    parameters: tuple[Parameter, ...]
    tree: Tree

    def draw(self, trial: Suggester, base: Tree) -> Params:
        """Dotted keys and values of one trial; a key whose conditions don't hold is absent."""
        drawn: Params = {}
        for parameter in self.parameters:
            if is_active(parameter, drawn, base):
                drawn[parameter.key] = parameter.suggest(trial)
        return drawn

    def to_optuna_params(self, draw: Mapping[str, Any], base: Tree) -> dict[str, Any]:
        """The Optuna names and values of a draw; raises ConfigError where the space doesn't contain it."""
        problems, named, seen = [], {}, set()
        for parameter in self.parameters:
            if not is_active(parameter, draw, base):
                continue
            seen.add(parameter.key)
            if parameter.key not in draw:
                problems.append(Problem(f"{parameter.key!r} isn't given; the space draws it: {parameter.describe()}"))
            elif not parameter.contains(draw[parameter.key]):
                message = f"{parameter.key} = {draw[parameter.key]!r} is outside {parameter.describe()}"
                problems.append(Problem(message, parameter.where))
            else:
                named[parameter.name] = draw[parameter.key]
        problems += [self._not_drawn(key) for key in draw if key not in seen]
        if problems:
            raise ConfigError(problems)
        return named

    def _not_drawn(self, key: str) -> Problem:
        ranges = self.of(key)
        if ranges:
            return Problem(f"{key!r} isn't drawn under these values; its range: {_ranges(ranges)}", ranges[0].where)
        return Problem(f"{key!r} isn't drawn by the space; {suggest_name(key, [one.key for one in self.parameters])}")

    def of(self, key: str) -> list[Parameter]:
        """The parameters of one key: none, one, or its branches."""
        return [parameter for parameter in self.parameters if parameter.key == key]

    def contains(self, draw: Params, base: Tree) -> bool:
        """Whether the space can draw exactly these keys and values."""
        try:
            self.to_optuna_params(draw, base)
        except ConfigError:
            return False
        return True

    def without(self, keys: Iterable[str]) -> SearchSpace:
        """The space with some keys no longer drawn (they are set in the base instead)."""
        gone = frozenset(keys)
        kept = tuple(parameter for parameter in self.parameters if parameter.key not in gone)
        tree = {"parameters": {key: value for key, value in self.tree["parameters"].items() if key not in gone}}
        return SearchSpace(kept, tree)

    def restrict_to(self, keys: Iterable[str]) -> SearchSpace:
        """Only the parameters of these keys and those that they hang on."""
        wanted = set(keys)
        for parameter in reversed(self.parameters):
            if parameter.key in wanted:
                wanted |= parameter.depends_on()
        return self.without({parameter.key for parameter in self.parameters} - wanted)

    def size(self, base: Tree) -> int | None:
        """How many different draws there are; None where that can't be counted."""
        draws = self.enumerate_params(base)
        return None if draws is None else len(draws)

    def enumerate_params(self, base: Tree, fixed: Mapping[str, Any] = NOTHING) -> list[Params] | None:
        """Every draw in a fixed order, where `fixed` keys have their value; None for a continuous or vast space."""

        def extend(index: int, drawn: Params) -> Iterator[Params | None]:
            if index == len(self.parameters):
                yield dict(drawn)
                return
            parameter = self.parameters[index]
            if not is_active(parameter, drawn, base):
                yield from extend(index + 1, drawn)
                return
            values = parameter.finite_values()
            if parameter.key in fixed:
                values = (fixed[parameter.key],) if parameter.contains(fixed[parameter.key]) else ()
            if values is None:
                yield None
            for value in values or ():
                yield from extend(index + 1, {**drawn, parameter.key: value})

        found: list[Params] = []
        for draw in extend(0, {}):
            if draw is None or len(found) == MAX_DRAWS:
                return None
            found.append(draw)
        return found

    def choices_over(self, keys: Iterable[str], base: Tree) -> list[Params]:
        """Every combination of values that a draw can have for some finite keys; an inactive one is absent.

        Raises ConfigError where one is continuous.
        """
        wanted = frozenset(keys)
        problems = [
            Problem(f"{one.key} must be a choice or a short int here, and is {one.describe()}", one.where)
            for one in self.parameters
            if one.key in wanted and one.finite_values() is None
        ]
        draws = None if problems else self.restrict_to(wanted).enumerate_params(base)
        if draws is None:
            raise ConfigError(problems or [Problem(f"{', '.join(sorted(wanted))} have more than {MAX_DRAWS} values")])
        projected = [{key: value for key, value in draw.items() if key in wanted} for draw in draws]
        return list({json.dumps(draw, sort_keys=True): draw for draw in projected}.values())

    def boundary_params(self, base: Tree) -> tuple[list[Params], list[Problem]]:
        """Draws over every combination of the choices that conditions or variants hang on, elsewhere at both ends.

        The problems name keys of which two branches hold at once.
        """
        structural = {"method"} | {key for parameter in self.parameters for key in parameter.depends_on()}
        # Towers differ in weights, not in the keys that they admit.
        structural |= {p.key for p in self.parameters if p.key.endswith((".name", ".kind")) and p.key != "encoder.name"}
        clashes: dict[Problem, None] = {}

        def extend(index: int, drawn: Params, turn: int) -> Iterator[Params]:
            if index == len(self.parameters):
                yield dict(drawn)
                return
            parameter = self.parameters[index]
            values: tuple[Any, ...] = ()
            if is_active(parameter, drawn, base):
                if parameter.key in drawn:
                    clashes[self._clash(parameter)] = None
                else:
                    values = parameter.values
            if not values:
                yield from extend(index + 1, drawn, turn)
            for value in values if parameter.key in structural else values[turn : turn + 1] or values[-1:]:
                yield from extend(index + 1, {**drawn, parameter.key: value}, turn)

        turns = max((len(p.values) for p in self.parameters if p.key not in structural), default=1)
        return [draw for turn in range(turns) for draw in extend(0, {}, turn)], list(clashes)

    def _clash(self, parameter: Parameter) -> Problem:
        ranges = _ranges(self.of(parameter.key))
        return Problem(f"two branches of {parameter.key} hold at once ({ranges}); make them exclusive", parameter.where)


def _ranges(parameters: list[Parameter]) -> str:
    return "; ".join(parameter.describe() for parameter in parameters)


def get_dotted(tree: Tree, dotted: str) -> Any:
    """The value of a dotted key in plain data, or MISSING."""
    here: Any = tree
    for part in dotted.split("."):
        if not isinstance(here, dict) or part not in here:
            return MISSING
        here = here[part]
    return here


def is_active(parameter: Parameter, drawn: Mapping[str, Any], base: Tree) -> bool:
    """Whether a parameter's conditions hold in the trial that has been drawn so far."""
    return all(is_one_of(_value_under(key, drawn, base), values) for key, values in parameter.when.items())


def _value_under(key: str, drawn: Mapping[str, Any], base: Tree) -> Any:
    """A trial's value of a key; the base's doesn't count where the draw's method or variant hasn't got that key."""
    if key in drawn:
        return drawn[key]
    return get_dotted(drop_unused_sections(apply_overrides(base, drawn)), key)


def is_one_of(value: Any, values: Iterable[Any]) -> bool:
    """Membership in which truth values aren't numbers."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


# What Optuna calls the one thing that it is told of a trial.
CONFIGURATION = "configuration"


@dataclass(frozen=True)
class ListedSpace(SearchSpace):
    """Its draws are the listed configurations and nothing between; a parameter has every value that some draw has."""

    configurations: Mapping[str, Params] = field(default_factory=dict)

    @staticmethod
    def of_configurations(configurations: Mapping[str, Params], where: str = "") -> ListedSpace:
        """The space of named draws."""
        values: dict[str, list[Any]] = {}
        for draw in configurations.values():
            for key, value in draw.items():
                known = values.setdefault(key, [])
                if not is_one_of(value, known):
                    known.append(value)
        parameters = tuple(Parameter(key, key, "choice", tuple(found), {}, where) for key, found in values.items())
        return ListedSpace(parameters, {"configurations": configurations}, configurations)

    def draw(self, trial: Suggester, base: Tree) -> Params:
        return dict(self.configurations[trial.suggest_categorical(CONFIGURATION, list(self.configurations))])

    def to_optuna_params(self, draw: Mapping[str, Any], base: Tree) -> dict[str, Any]:
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

    def restrict_to(self, keys: Iterable[str]) -> ListedSpace:
        """Whole: nothing in a list hangs on anything else."""
        return self

    def enumerate_params(self, base: Tree, fixed: Mapping[str, Any] = NOTHING) -> list[Params] | None:
        return [
            dict(draw)
            for draw in self.configurations.values()
            if all(is_one_of(draw[key], [value]) for key, value in fixed.items() if key in draw)
        ]

    def boundary_params(self, base: Tree) -> tuple[list[Params], list[Problem]]:
        return self.enumerate_params(base) or [], []
