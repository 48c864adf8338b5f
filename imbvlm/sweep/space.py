"""A search space in YAML: dotted keys of a trial, their ranges and conditions, as an Optuna define-by-run function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from imbvlm.config import Tree, dotted_keys
from imbvlm.errors import ConfigError, Problem, nearest
from imbvlm.yaml_file import KeyPath, YamlTree, read_yaml

Draw = dict[str, Any]
Scalar = str | int | float | bool | None
Kind = Literal["choice", "uniform", "loguniform", "int"]
KINDS: tuple[Kind, ...] = ("choice", "uniform", "loguniform", "int")
NEVER_SET = object()


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
        if self.kind == "int" and self.values[1] - self.values[0] < 64:
            return tuple(range(self.values[0], self.values[1] + 1))
        return None

    def contains(self, value: Any) -> bool:
        """Whether the range has a value."""
        if self.kind == "choice":
            return any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.values
            )
        number = isinstance(value, int if self.kind == "int" else (int, float)) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]

    def describe(self) -> str:
        """The range in a few words, such as `loguniform 0.003 .. 0.1 when method = decoder`."""
        body = (
            f"choice {', '.join(map(_word, self.values))}"
            if self.kind == "choice"
            else "{} {} .. {}".format(self.kind, *self.values)
        )
        conditions = " and ".join(f"{key} = {' or '.join(map(_word, values))}" for key, values in self.when.items())
        return f"{body} when {conditions}" if conditions else body


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


@dataclass(frozen=True)
class SearchSpace:
    """The parameters in an order in which each comes after those that its conditions name."""

    parameters: tuple[Parameter, ...]
    tree: Tree

    def draw(self, trial: Suggester, base: Tree) -> Draw:
        """Dotted keys and values of one trial; a key whose conditions don't hold is absent."""
        drawn: Draw = {}
        for parameter in self.parameters:
            if is_active(parameter, drawn, base):
                drawn[parameter.key] = parameter.suggest(trial)
        return drawn

    def names_of(self, draw: Draw, base: Tree) -> dict[str, Any]:
        """The Optuna names and values of a draw; raises ConfigError where the space doesn't contain it."""
        problems, named, seen = [], {}, set()
        for parameter in self.parameters:
            if not is_active(parameter, draw, base):
                continue
            seen.add(parameter.key)
            if parameter.key not in draw:
                problems.append(Problem(f"{parameter.key!r} isn't given; the space draws it: {parameter.describe()}"))
            elif not parameter.contains(draw[parameter.key]):
                problems.append(
                    Problem(
                        f"{parameter.key} = {draw[parameter.key]!r} is outside {parameter.describe()}", parameter.where
                    )
                )
            else:
                named[parameter.name] = draw[parameter.key]
        problems += [Problem(f"{key!r} isn't drawn by the space under these values") for key in draw if key not in seen]
        if problems:
            raise ConfigError(problems)
        return named

    def without(self, keys: Sequence[str]) -> SearchSpace:
        """The space with some keys no longer drawn (they are set in the base instead)."""
        kept = tuple(parameter for parameter in self.parameters if parameter.key not in keys)
        tree = {"parameters": {key: value for key, value in self.tree["parameters"].items() if key not in keys}}
        return SearchSpace(kept, tree)

    def size(self, base: Tree, limit: int = 20_000) -> int | None:
        """How many different draws there are; None where a range is continuous or there are more than the limit."""
        if any(parameter.finite_values() is None for parameter in self.parameters):
            return None
        counted = sum(1 for _ in itertools.islice(self.all_draws(base), limit + 1))
        return counted if counted <= limit else None

    def all_draws(self, base: Tree) -> Iterator[Draw]:
        """Every draw of a finite space, in a fixed order."""

        def extend(index: int, drawn: Draw) -> Iterator[Draw]:
            if index == len(self.parameters):
                yield dict(drawn)
                return
            parameter = self.parameters[index]
            if not is_active(parameter, drawn, base):
                yield from extend(index + 1, drawn)
                return
            for value in parameter.finite_values() or ():
                yield from extend(index + 1, {**drawn, parameter.key: value})

        return extend(0, {})


def value_in(tree: Tree, dotted: str) -> Any:
    """The value of a dotted key in plain data, or NEVER_SET."""
    here: Any = tree
    for part in dotted.split("."):
        if not isinstance(here, dict) or part not in here:
            return NEVER_SET
        here = here[part]
    return here


def is_active(parameter: Parameter, drawn: Draw, base: Tree) -> bool:
    """Whether a parameter's conditions hold under what has been drawn so far and what the base sets."""
    return all(_holds(drawn.get(key, value_in(base, key)), values) for key, values in parameter.when.items())


def _holds(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


# --------------------------------------------------------------------------------------------------- reading


def find_space(name_or_path: str) -> Path:
    """The YAML of a shipped space by name, or of a file by path; raises ConfigError naming the nearest."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError([Problem(f"the search space {name_or_path} is not there")])
    shipped = {file.stem: file for folder in _space_folders() for file in sorted(folder.glob("*.yaml"))}
    if name_or_path not in shipped:
        raise ConfigError([Problem(f"no search space is called {name_or_path!r}; {nearest(name_or_path, shipped)}")])
    return shipped[name_or_path]


def _space_folders() -> list[Path]:
    """Inside the package when installed as a wheel, beside it when installed editable."""
    package = Path(str(resources.files("imbvlm")))
    return [folder for folder in (package / "search_spaces", package.parent / "search_spaces") if folder.is_dir()]


def read_space(name_or_path: str) -> SearchSpace:
    """Read a space; raises ConfigError with every mistake that shows without a base."""
    return parse_space(read_yaml(find_space(name_or_path)))


def parse_space(located: YamlTree) -> SearchSpace:
    """Check plain data of the form {parameters: {key: range}}; raises ConfigError."""
    data, problems = located.data, []
    if not isinstance(data, dict) or set(data) != {"parameters"} or not isinstance(data["parameters"], dict):
        raise ConfigError(
            [
                Problem(
                    "a search space is a section 'parameters' of dotted keys and ranges, and nothing else",
                    located.where(()),
                )
            ]
        )
    parameters: list[Parameter] = []
    valid = dotted_keys()
    for key, value in data["parameters"].items():
        where = located.where(("parameters", key))
        if key not in valid:
            problems.append(Problem(f"{key!r} is no key of a trial; {nearest(str(key), valid)}", where))
            continue
        branches = value if isinstance(value, list) else [value]
        if not branches:
            problems.append(Problem(f"{key} has an empty list of branches", where))
        for index, branch in enumerate(branches):
            path: KeyPath = ("parameters", key, index) if isinstance(value, list) else ("parameters", key)
            name = f"{key}[{index}]" if isinstance(value, list) else key
            parsed = _parse_branch(key, name, branch, path, located)
            if isinstance(parsed, Parameter):
                parameters.append(parsed)
            else:
                problems += parsed
    problems += _check_conditions(parameters, valid)
    ordered, cycle = _in_order(parameters)
    problems += cycle
    if problems:
        raise ConfigError(problems)
    return SearchSpace(tuple(ordered), data)


def _parse_branch(key: str, name: str, branch: Any, path: KeyPath, located: YamlTree) -> Parameter | list[Problem]:
    where = located.where(path)
    if not isinstance(branch, dict):
        return [Problem(f"{key} must be a range such as {{uniform: [0, 1]}}, and is {branch!r}", where)]
    problems = [
        Problem(
            f"unknown word {word!r} in the range of {key}; {nearest(str(word), [*KINDS, 'when'])}",
            located.where((*path, word)),
        )
        for word in branch
        if word not in (*KINDS, "when")
    ]
    kinds = [kind for kind in KINDS if kind in branch]
    if len(kinds) != 1:
        return [*problems, Problem(f"{key} needs exactly one of {', '.join(KINDS)}, and has {len(kinds)}", where)]
    message = _range_mistake(key, kinds[0], branch[kinds[0]])
    if message:
        problems.append(Problem(message, located.where((*path, kinds[0]))))
    when = branch.get("when", {})
    if not isinstance(when, dict) or any(value == [] for value in when.values()):
        problems.append(
            Problem(
                f"'when' of {key} must name keys and their values, such as {{method: decoder}}",
                located.where((*path, "when")),
            )
        )
    if problems:
        return problems
    conditions = {str(k): tuple(v) if isinstance(v, list) else (v,) for k, v in when.items()}
    return Parameter(key, name, kinds[0], tuple(branch[kinds[0]]), conditions, where)


def _range_mistake(key: str, kind: Kind, values: Any) -> str | None:
    if not isinstance(values, list):
        return f"{kind} of {key} must be a list, and is {values!r}"
    if kind == "choice":
        if not values:
            return f"choice of {key} is empty"
        if any(not isinstance(value, (str, int, float, bool, type(None))) for value in values):
            return f"choice of {key} must list plain values, and has {next(v for v in values if isinstance(v, (dict, list)))!r}"
        repeated = [value for index, value in enumerate(values) if _holds(value, tuple(values[:index]))]
        return f"choice of {key} has {repeated[0]!r} twice" if repeated else None
    number = int if kind == "int" else (int, float)
    if len(values) != 2 or any(isinstance(value, bool) or not isinstance(value, number) for value in values):
        return f"{kind} of {key} must be [low, high] of {'whole ' if kind == 'int' else ''}numbers, and is {values!r}"
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{kind} of {key} must be finite, and is {values!r}"
    if low >= high:
        return f"{kind} of {key} is empty: low {low} is not below high {high}"
    if kind == "loguniform" and low <= 0:
        return f"loguniform of {key} must start above 0, and starts at {low}"
    return None


def _check_conditions(parameters: list[Parameter], valid: list[str]) -> list[Problem]:
    problems = []
    for parameter in parameters:
        for key, values in parameter.when.items():
            if key not in valid:
                problems.append(
                    Problem(
                        f"the condition of {parameter.key} names {key!r}, no key of a trial; {nearest(key, valid)}",
                        parameter.where,
                    )
                )
                continue
            sources = [other for other in parameters if other.key == key]
            finite = [other.finite_values() for other in sources]
            if any(choices is None for choices in finite):
                problems.append(
                    Problem(
                        f"the condition of {parameter.key} names {key}, whose range is continuous; use choice",
                        parameter.where,
                    )
                )
                continue
            reachable = [value for choices in finite for value in choices or ()]
            for value in values:
                if sources and not _holds(value, tuple(reachable)):
                    problems.append(
                        Problem(
                            f"{parameter.key} is drawn when {key} = {value!r}, which the space never chooses; {nearest(str(value), map(str, reachable))}",
                            parameter.where,
                        )
                    )
    return problems


def _in_order(parameters: list[Parameter]) -> tuple[list[Parameter], list[Problem]]:
    """Dependencies first, otherwise as written."""
    ordered: list[Parameter] = []
    waiting = list(parameters)
    while waiting:
        open_keys = {parameter.key for parameter in waiting}
        ready = next((parameter for parameter in waiting if not (set(parameter.when) & open_keys)), None)
        if ready is None:
            names = ", ".join(sorted(open_keys))
            return ordered, [Problem(f"the conditions go in a circle through {names}", waiting[0].where)]
        waiting.remove(ready)
        ordered.append(ready)
    return ordered, []
