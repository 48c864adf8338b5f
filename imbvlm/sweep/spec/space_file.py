"""Search spaces in YAML: finds them by name or path, and reports all mistakes of a file at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.schema import Tree, shown, violated_rule
from imbvlm.base.yaml_file import KeyPath, YamlTree, read_yaml
from imbvlm.config.trial_config import dotted_keys, trial_class
from imbvlm.sweep.spec.search_space import KINDS, Kind, ListedSpace, Parameter, SearchSpace, is_one_of

FOLDER = "search_spaces"
# The name of a listed configuration, which its refits' folders have, too.
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# Keys of a trial that can't be searched, with the reason.
NOT_SEARCHED: Mapping[str, str] = {
    "data.manifest": "trials on different images can't be compared; run a sweep for each",
    "data.split_seed": "trials on different validation rows can't be compared",
    "data.on_bad_image": "it decides what is extracted, not how well a trial does",
    "data.max_bad_images": "it decides when a run stops, not how well a trial does",
    "data.max_bad_share": "it decides when a run stops, not how well a trial does",
    "features.compile": "it decides how fast features are computed, not how well a trial does",
    "eval.jpeg_downscale": "it decides how fast images are read, not how well a trial does",
    "eval.tte": "validation doesn't use it, so nothing would choose; set it in base",
    "eval.expand": "validation doesn't use it, so nothing would choose; set it in base",
    "train.seed": "the best seed is luck; refit_seeds trains the winner again over several",
}


def find_space(name_or_path: str) -> Path:
    """Return the YAML file of a shipped space by name, or a file by path; raises ConfigError with the nearest name."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(_shipped_folder().glob("*.yaml"))}
    if name_or_path in shipped:
        return shipped[name_or_path]
    noun = "there is no file" if path.suffix in (".yaml", ".yml") else "no search space is called"
    raise ConfigError([Problem(f"{noun} {name_or_path!r}; of the shipped spaces: {suggest_name(path.stem, shipped)}")])


def _shipped_folder() -> Path:
    """Return the folder of shipped spaces: in the package of a wheel, next to it in an editable installation."""
    package = Path(str(resources.files("imbvlm")))
    return next((parent for parent in (package, package.parent) if (parent / FOLDER).is_dir()), package) / FOLDER


def read_space(name_or_path: str) -> SearchSpace:
    """Read a space by name or path; raises ConfigError with all mistakes that show without a base."""
    return parse_space(read_yaml(find_space(name_or_path)))


def parse_space(located: YamlTree) -> SearchSpace:
    """Check plain data, {parameters: {key: range}} or {configurations: {name: {key: value}}}; raises ConfigError."""
    data = located.data
    if isinstance(data, dict) and set(data) == {"configurations"}:
        return _parse_configurations(located)
    if not isinstance(data, dict) or set(data) != {"parameters"} or not isinstance(data["parameters"], dict):
        message = (
            "a search space is a section 'parameters' of dotted keys and ranges, or a section 'configurations' of "
            "names with dotted keys and values, and nothing else"
        )
        raise ConfigError([Problem(message, located.where(()))])
    parameters: list[Parameter] = []
    problems: list[Problem] = []
    valid = dotted_keys()
    for key, value in data["parameters"].items():
        mistake = _key_mistake(key, valid)
        if mistake is not None:
            problems.append(Problem(mistake, located.where(("parameters", key))))
            continue
        branches, branch_problems = _parse_key(key, value, located)
        parameters += branches
        problems += branch_problems
    ordered, cycle = _in_order(parameters)
    problems += [*_check_conditions(parameters, valid), *cycle]
    if problems:
        raise ConfigError(problems)
    return SearchSpace(tuple(ordered), data)


def _parse_configurations(located: YamlTree) -> SearchSpace:
    configurations = located.data["configurations"]
    if not isinstance(configurations, dict) or not all(isinstance(params, dict) for params in configurations.values()):
        message = "'configurations' has names, and for each its dotted keys and values"
        raise ConfigError([Problem(message, located.where(("configurations",)))])
    valid = dotted_keys()
    problems = [
        Problem(
            f"a configuration's name must be of lower-case letters, digits and hyphens, got {name!r}",
            located.where(("configurations", name)),
        )
        for name in configurations
        if not NAME.fullmatch(str(name))
    ]
    problems += [
        Problem(f"{name}: {mistake}", located.where(("configurations", name, key)))
        for name, params in configurations.items()
        for key, value in params.items()
        for mistake in [_key_mistake(key, valid) or _value_mistake(key, value)]
        if mistake
    ]
    if problems:
        raise ConfigError(problems)
    return ListedSpace.of_configurations(configurations, located.where(("configurations",)))


def _key_mistake(key: str, valid: list[str]) -> str | None:
    if key in valid and key not in NOT_SEARCHED:
        return None
    reason = NOT_SEARCHED.get(key)
    return f"{key!r} " + (
        f"can't be searched: {reason}" if reason else f"is no key of a trial; {suggest_name(key, valid)}"
    )


def _value_mistake(key: str, value: Any) -> str | None:
    rule = violated_rule(trial_class(), key, value)
    return f"{key} must be {rule}, and is {value!r}" if rule else None


def _parse_key(key: str, value: Any, located: YamlTree) -> tuple[list[Parameter], list[Problem]]:
    """Return one parameter, or one for each branch of a list, and the problems of the others."""
    path: KeyPath = ("parameters", key)
    if not isinstance(value, list):
        branches = {(key, path): value}
    elif value:
        branches = {(f"{key}[{index}]", (*path, index)): branch for index, branch in enumerate(value)}
    else:
        return [], [Problem(f"{key} has an empty list of branches; give one, or remove the key", located.where(path))]
    parameters, problems = [], []
    for (name, branch_path), branch in branches.items():
        mistakes = _branch_mistakes(key, branch, branch_path, located)
        if mistakes:
            problems += mistakes
        else:
            parameters.append(_parameter(key, name, branch, located.where(branch_path)))
    return parameters, problems


def _parameter(key: str, name: str, branch: Tree, where: str) -> Parameter:
    kind = next(kind for kind in KINDS if kind in branch)
    # Floats: [1, 4] contains 2.7, so its ends must not pass for whole numbers.
    values = tuple(map(float, branch[kind])) if kind in ("uniform", "loguniform") else tuple(branch[kind])
    conditions = branch.get("when", {}).items()
    when = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in conditions}
    return Parameter(key, name, kind, values, when, where)


def _branch_mistakes(key: str, branch: Any, path: KeyPath, located: YamlTree) -> list[Problem]:
    if not isinstance(branch, dict):
        message = f"{key} must be a range such as {{uniform: [0, 1]}}, and is {branch!r}"
        return [Problem(message, located.where(path))]
    valid = [*KINDS, "when"]
    problems = [
        Problem(
            f"unknown word {word!r} in the range of {key}; {suggest_name(word, valid)}", located.where((*path, word))
        )
        for word in branch
        if word not in valid
    ]
    kinds = [kind for kind in KINDS if kind in branch]
    if len(kinds) != 1 and not problems:
        message = f"{key} needs exactly one of {', '.join(KINDS)}, and has {' and '.join(kinds) or 'none'}"
        problems.append(Problem(message, located.where(path)))
    for kind in kinds:
        mistake = _range_mistake(key, kind, branch[kind])
        problems += [Problem(mistake, located.where((*path, kind)))] if mistake else []
    when = branch.get("when", {})
    lists = [value if isinstance(value, list) else [value] for value in when.values()] if isinstance(when, dict) else []
    if not isinstance(when, dict) or [] in lists or not all(map(_is_plain, chain.from_iterable(lists))):
        message = f"'when' of {key} must name keys and their values, such as {{method: decoder}}, and is {when!r}"
        problems.append(Problem(message, located.where((*path, "when"))))
    return problems


def _range_mistake(key: str, kind: Kind, values: Any) -> str | None:
    if not isinstance(values, list):
        return f"{kind} of {key} must be a list, and is {values!r}"
    if kind == "choice":
        return _choice_mistake(key, values)
    number = int if kind == "int" else (int, float)
    if len(values) != 2 or any(isinstance(value, bool) or not isinstance(value, number) for value in values):
        return f"{kind} of {key} must be [low, high] of {'whole ' if kind == 'int' else ''}numbers, and is {values!r}"
    low, high = values
    if not (_is_finite(low) and _is_finite(high) and _is_finite(high - low)):
        return f"{kind} of {key} must be finite, and is {shown(values)}"
    if low >= high:
        return f"{kind} of {key} is empty: low {low} is not below high {high}"
    if kind == "loguniform" and low <= 0:
        return f"loguniform of {key} must start above 0, and starts at {low}"
    if kind != "int" and "integer" in (violated_rule(trial_class(), key, (low + high) / 2) or ""):
        return f"{kind} of {key} has fractions, and {key} must be a whole number; use int"
    return None


def _choice_mistake(key: str, values: list[Any]) -> str | None:
    if not values:
        return f"choice of {key} must have a value"
    nested = [value for value in values if not _is_plain(value)]
    if nested:
        return f"choice of {key} must list plain values, and has {nested[0]!r}"
    infinite = [value for value in values if isinstance(value, (int, float)) and not _is_finite(value)]
    if infinite:
        return f"choice of {key} must be finite, and has {shown(infinite[0])}"
    repeated = [value for index, value in enumerate(values) if is_one_of(value, values[:index])]
    return f"choice of {key} has {repeated[0]!r} twice; remove one" if repeated else None


def _is_finite(value: float) -> bool:
    """Return whether a float can hold a number: whole numbers in YAML may have any length."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _check_conditions(parameters: list[Parameter], valid: list[str]) -> list[Problem]:
    return [
        Problem(f"the condition of {parameter.key} {mistake}", parameter.where)
        for parameter in parameters
        for key, values in parameter.when.items()
        for mistake in _condition_mistakes(key, values, [other for other in parameters if other.key == key], valid)
    ]


def _condition_mistakes(key: str, values: tuple[Any, ...], ranges: list[Parameter], valid: list[str]) -> list[str]:
    """Return the mistakes of `when: {key: values}`, where `ranges` are the key's parameters."""
    if key not in valid:
        return [f"names {key!r}, no key of a trial; {suggest_name(key, valid)}"]
    if any(parameter.finite_values() is None for parameter in ranges):
        return [f"names {key}, whose range is continuous; use choice"]
    reachable = [value for parameter in ranges for value in parameter.finite_values() or ()]
    mistakes = []
    for value in values:
        rule = violated_rule(trial_class(), key, value)
        if rule is not None:
            mistakes.append(f"has {key} = {value!r}, and {key} must be {rule}")
        elif ranges and not is_one_of(value, reachable):
            fix = suggest_name(str(value), map(str, reachable))
            mistakes.append(f"has {key} = {value!r}, which the space never chooses; {fix}")
    return mistakes


def _in_order(parameters: list[Parameter]) -> tuple[list[Parameter], list[Problem]]:
    """Return the parameters after those that they depend on, otherwise as written, and the problem of a cycle."""
    ordered: list[Parameter] = []
    waiting = list(parameters)
    while waiting:
        open_keys = {parameter.key for parameter in waiting}
        ready = next((parameter for parameter in waiting if not parameter.depends_on() & open_keys), None)
        if ready is None:
            return ordered, [_cycle_problem(waiting)]
        waiting.remove(ready)
        ordered.append(ready)
    return ordered, []


def _cycle_problem(waiting: list[Parameter]) -> Problem:
    """Return the problem of a cycle without the parameters that only depend on it."""
    while True:
        needed = {key for parameter in waiting for key in parameter.depends_on()}
        inner = [parameter for parameter in waiting if parameter.key in needed]
        if len(inner) == len(waiting):
            names = ", ".join(sorted({parameter.key for parameter in waiting}))
            return Problem(f"the conditions go in a circle through {names}; remove one", waiting[0].where)
        waiting = inner
