"""The search space: ranges and conditions of a trial's dotted keys, sampled key by key, or a list of configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.schema import Tree
from imbvlm.config.method_registry import optional_sections
from imbvlm.config.trial_config import apply_overrides, drop_unused_sections

Params = dict[str, Any]
Scalar = str | int | float | bool | None
Kind = Literal["choice", "uniform", "loguniform", "int"]
KINDS: tuple[Kind, ...] = ("choice", "uniform", "loguniform", "int")
MISSING = object()
NOTHING: Mapping[str, Any] = MappingProxyType({})
# Wider ranges of whole numbers count as continuous, and so do spaces with more configurations.
MAX_WHOLE_NUMBERS = 64
MAX_CONFIGURATIONS = 20_000
# Optuna's name of the parameter that chooses among listed configurations.
CONFIGURATION = "configuration"


class Suggester(Protocol):
    """The methods of an Optuna trial that a space calls."""

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class Parameter:
    """One Optuna parameter: a key's range under its conditions. A key with branches has one for each branch."""

    key: str
    name: str
    kind: Kind
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]]
    where: str

    def suggest(self, trial: Suggester) -> Any:
        """Sample a value from the range."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.values)
        low, high = self.values
        if self.kind == "int":
            return trial.suggest_int(self.name, low, high)
        return trial.suggest_float(self.name, low, high, log=self.kind == "loguniform")

    def finite_values(self) -> tuple[Any, ...] | None:
        """Return all values of the range; None for a continuous range or more than MAX_WHOLE_NUMBERS values."""
        if self.kind == "choice":
            return self.values
        if self.kind == "int" and self.values[1] - self.values[0] < MAX_WHOLE_NUMBERS:
            return tuple(range(self.values[0], self.values[1] + 1))
        return None

    def contains(self, value: Any) -> bool:
        """Return whether the range contains a value."""
        if self.kind == "choice":
            return is_one_of(value, self.values)
        number = isinstance(value, int if self.kind == "int" else (int, float)) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]

    def depends_on(self) -> set[str]:
        """Return the keys that decide whether it is active: its conditions' keys, and keys that can remove those."""
        sections = {key.split(".")[0] for key in self.when}
        tags = {f"{section}.{tag}" for section in sections for tag in ("name", "kind")}
        keys = set(self.when) | tags | ({"method"} if sections & optional_sections() else set())
        return keys if self.key in self.when else keys - {self.key}

    def describe(self) -> str:
        """Return the range as text, such as `loguniform 0.003 .. 0.1 when method = decoder`."""
        choices = ", ".join(map(_yaml_text, self.values))
        body = f"choice {choices}" if self.kind == "choice" else "{} {} .. {}".format(self.kind, *self.values)
        conditions = " and ".join(
            f"{key} = {' or '.join(map(_yaml_text, values))}" for key, values in self.when.items()
        )
        return f"{body} when {conditions}" if conditions else body


def _yaml_text(value: Any) -> str:
    return "null" if value is None else str(value)


@dataclass(frozen=True)
class SearchSpace:
    """The parameters, each after those that it depends on."""

    parameters: tuple[Parameter, ...]
    tree: Tree

    def sample(self, trial: Suggester, base: Tree) -> Params:
        """Sample the dotted keys and values of one trial; a key whose conditions don't hold is absent."""
        params: Params = {}
        for parameter in self.parameters:
            if is_active(parameter, params, base):
                params[parameter.key] = parameter.suggest(trial)
        return params

    def to_optuna_params(self, params: Mapping[str, Any], base: Tree) -> dict[str, Any]:
        """Return Optuna's names and values of sampled values; raises ConfigError for values outside the space."""
        problems, named, active = [], {}, set()
        for parameter in self.parameters:
            if not is_active(parameter, params, base):
                continue
            active.add(parameter.key)
            if parameter.key not in params:
                message = f"{parameter.key!r} isn't given, and the space searches it: {parameter.describe()}"
                problems.append(Problem(message))
            elif not parameter.contains(params[parameter.key]):
                message = f"{parameter.key} = {params[parameter.key]!r} is outside {parameter.describe()}"
                problems.append(Problem(message, parameter.where))
            else:
                named[parameter.name] = params[parameter.key]
        problems += [self._unsearched_key(key) for key in params if key not in active]
        if problems:
            raise ConfigError(problems)
        return named

    def _unsearched_key(self, key: str) -> Problem:
        ranges = self.of(key)
        if ranges:
            return Problem(f"{key!r} isn't searched under these values; its range: {_ranges(ranges)}", ranges[0].where)
        keys = [parameter.key for parameter in self.parameters]
        return Problem(f"{key!r} isn't searched by the space; {suggest_name(key, keys)}")

    def of(self, key: str) -> list[Parameter]:
        """Return the parameters of one key: none, one, or its branches."""
        return [parameter for parameter in self.parameters if parameter.key == key]

    def values_of(self, key: str, base: Tree, default: Any = None) -> list[Any]:
        """Return all values that trials have for a key with choices.

        Where some trial doesn't sample the key, the last one is the base's value, or else the default.
        """
        values = [value for parameter in self.of(key) for value in parameter.values]
        if values and self.always_samples(key, base):
            return values
        own = get_dotted(base, key)
        own = default if own is MISSING else own
        return values if is_one_of(own, values) else [*values, own]

    def always_samples(self, key: str, base: Tree) -> bool:
        """Return whether every trial samples a key."""
        is_unconditional = any(not parameter.when for parameter in self.of(key))
        return is_unconditional or all(key in params for params in self.boundary_params(base)[0])

    def contains(self, params: Params, base: Tree) -> bool:
        """Return whether the space can sample exactly these keys and values."""
        try:
            self.to_optuna_params(params, base)
        except ConfigError:
            return False
        return True

    def without(self, keys: Iterable[str]) -> SearchSpace:
        """Return the space without some keys, which the base sets instead."""
        removed = frozenset(keys)
        remaining = tuple(parameter for parameter in self.parameters if parameter.key not in removed)
        tree = {"parameters": {key: value for key, value in self.tree["parameters"].items() if key not in removed}}
        return SearchSpace(remaining, tree)

    def restrict_to(self, keys: Iterable[str]) -> SearchSpace:
        """Return the space of these keys and of those that they depend on."""
        wanted = set(keys)
        for parameter in reversed(self.parameters):
            if parameter.key in wanted:
                wanted |= parameter.depends_on()
        return self.without({parameter.key for parameter in self.parameters} - wanted)

    def size(self, base: Tree) -> int | None:
        """Return the number of configurations; None for a continuous or vast space."""
        configurations = self.enumerate_params(base)
        return None if configurations is None else len(configurations)

    def enumerate_params(self, base: Tree, fixed: Mapping[str, Any] = NOTHING) -> list[Params] | None:
        """Return all configurations with the values of `fixed`, in order; None for a continuous or vast space."""

        def extend(index: int, params: Params) -> Iterator[Params | None]:
            if index == len(self.parameters):
                yield dict(params)
                return
            parameter = self.parameters[index]
            if not is_active(parameter, params, base):
                yield from extend(index + 1, params)
                return
            values = parameter.finite_values()
            if parameter.key in fixed:
                values = (fixed[parameter.key],) if parameter.contains(fixed[parameter.key]) else ()
            if values is None:
                yield None
            for value in values or ():
                yield from extend(index + 1, {**params, parameter.key: value})

        configurations: list[Params] = []
        for params in extend(0, {}):
            if params is None or len(configurations) == MAX_CONFIGURATIONS:
                return None
            configurations.append(params)
        return configurations

    def choices_over(self, keys: Iterable[str], base: Tree) -> list[Params]:
        """Return all combinations of values of some finite keys; an inactive key is absent.

        Raises ConfigError for a continuous key.
        """
        wanted = frozenset(keys)
        problems = [
            Problem(
                f"{parameter.key} must be a choice or a short int here, and is {parameter.describe()}", parameter.where
            )
            for parameter in self.parameters
            if parameter.key in wanted and parameter.finite_values() is None
        ]
        configurations = None if problems else self.restrict_to(wanted).enumerate_params(base)
        if configurations is None:
            message = f"{', '.join(sorted(wanted))} have more than {MAX_CONFIGURATIONS} values"
            raise ConfigError(problems or [Problem(message)])
        projected = [{key: value for key, value in params.items() if key in wanted} for params in configurations]
        return list({json.dumps(params, sort_keys=True): params for params in projected}.values())

    def boundary_params(self, base: Tree) -> tuple[list[Params], list[Problem]]:
        """Return all combinations of the choices that conditions or variants depend on, with both ends of other ranges.

        The problems name keys with two active branches.
        """
        structural = {"method"} | {key for parameter in self.parameters for key in parameter.depends_on()}
        # Encoders differ in weights, not in the keys that they admit.
        structural |= {p.key for p in self.parameters if p.key.endswith((".name", ".kind")) and p.key != "encoder.name"}
        clashes: dict[Problem, None] = {}

        def extend(index: int, params: Params, turn: int) -> Iterator[Params]:
            if index == len(self.parameters):
                yield dict(params)
                return
            parameter = self.parameters[index]
            values: tuple[Any, ...] = ()
            if is_active(parameter, params, base):
                if parameter.key in params:
                    clashes[self._clash(parameter)] = None
                else:
                    values = parameter.values
            if not values:
                yield from extend(index + 1, params, turn)
            for value in values if parameter.key in structural else values[turn : turn + 1] or values[-1:]:
                yield from extend(index + 1, {**params, parameter.key: value}, turn)

        num_turns = max((len(p.values) for p in self.parameters if p.key not in structural), default=1)
        return [params for turn in range(num_turns) for params in extend(0, {}, turn)], list(clashes)

    def _clash(self, parameter: Parameter) -> Problem:
        ranges = _ranges(self.of(parameter.key))
        return Problem(f"two branches of {parameter.key} hold at once ({ranges}); make them exclusive", parameter.where)


def _ranges(parameters: list[Parameter]) -> str:
    return "; ".join(parameter.describe() for parameter in parameters)


def get_dotted(tree: Tree, dotted: str) -> Any:
    """Return the value of a dotted key in plain data, or MISSING."""
    value: Any = tree
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value


def is_active(parameter: Parameter, params: Mapping[str, Any], base: Tree) -> bool:
    """Return whether a parameter's conditions hold for the values that a trial has so far."""
    return all(is_one_of(_value_under(key, params, base), values) for key, values in parameter.when.items())


def _value_under(key: str, params: Mapping[str, Any], base: Tree) -> Any:
    """Return a trial's value of a key, not the base's where the trial's method or variant doesn't have the key."""
    if key in params:
        return params[key]
    return get_dotted(drop_unused_sections(apply_overrides(base, params)), key)


def is_one_of(value: Any, values: Iterable[Any]) -> bool:
    """Return whether a value is among others, where truth values differ from numbers."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


@dataclass(frozen=True)
class ListedSpace(SearchSpace):
    """A space of listed configurations alone; a parameter has all values that some configuration has."""

    configurations: Mapping[str, Params] = field(default_factory=dict)

    @staticmethod
    def of_configurations(configurations: Mapping[str, Params], where: str = "") -> ListedSpace:
        """Return the space of named configurations."""
        choices: dict[str, list[Any]] = {}
        for params in configurations.values():
            for key, value in params.items():
                values = choices.setdefault(key, [])
                if not is_one_of(value, values):
                    values.append(value)
        parameters = tuple(Parameter(key, key, "choice", tuple(values), {}, where) for key, values in choices.items())
        return ListedSpace(parameters, {"configurations": configurations}, configurations)

    def sample(self, trial: Suggester, base: Tree) -> Params:
        return dict(self.configurations[trial.suggest_categorical(CONFIGURATION, list(self.configurations))])

    def to_optuna_params(self, params: Mapping[str, Any], base: Tree) -> dict[str, Any]:
        name = self.name_of(params)
        if name is None:
            raise ConfigError(
                [Problem(f"{dict(params)} is none of the space's listed configurations. Take one of them as it is")]
            )
        return {CONFIGURATION: name}

    def always_samples(self, key: str, base: Tree) -> bool:
        return all(key in params for params in self.configurations.values())

    def name_of(self, params: Mapping[str, Any]) -> str | None:
        """Return the name of the configuration with exactly these keys and values."""
        return next((name for name, listed in self.configurations.items() if listed == dict(params)), None)

    def without(self, keys: Iterable[str]) -> ListedSpace:
        removed = frozenset(keys)
        configurations = {
            name: {key: value for key, value in params.items() if key not in removed}
            for name, params in self.configurations.items()
        }
        return ListedSpace.of_configurations(configurations, self.parameters[0].where if self.parameters else "")

    def restrict_to(self, keys: Iterable[str]) -> ListedSpace:
        """Return the whole space: the keys of a list don't depend on each other."""
        return self

    def enumerate_params(self, base: Tree, fixed: Mapping[str, Any] = NOTHING) -> list[Params] | None:
        return [
            dict(params)
            for params in self.configurations.values()
            if all(is_one_of(params[key], [value]) for key, value in fixed.items() if key in params)
        ]

    def boundary_params(self, base: Tree) -> tuple[list[Params], list[Problem]]:
        return self.enumerate_params(base) or [], []
