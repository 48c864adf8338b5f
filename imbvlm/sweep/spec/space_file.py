"""Reads a search space's YAML: finds shipped ones, and names every mistake of a file at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.schema import Tree, shown, violated_rule
from imbvlm.base.yaml_file import KeyPath, YamlTree, read_yaml
from imbvlm.config.trial_config import TrialConfig, dotted_keys
from imbvlm.sweep.spec.search_space import KINDS, Kind, ListedSpace, Parameter, SearchSpace, is_one_of

FOLDER = "search_spaces"
# Of a listed configuration: its refits' folders are called so.
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# Keys of a trial that no search may choose, and why.
NOT_SEARCHED: Mapping[str, str] = {
    "data.manifest": "trials on different images can't be compared; run a sweep for each",
    "data.split_seed": "trials on different validation rows can't be compared",
    "data.on_bad_image": "it decides what is extracted, not how well a trial does",
    "data.max_bad_images": "it decides when a run stops, not how well a trial does",
    "data.max_bad_share": "it decides when a run stops, not how well a trial does",
    "eval.jpeg_downscale": "it decides how fast images are read, not how well a trial does",
    "eval.tte": "validation doesn't use it, so nothing would choose; set it in base",
    "eval.expand": "validation doesn't use it, so nothing would choose; set it in base",
    "train.seed": "the best seed is luck; refit_seeds trains the winner again over several",
}


def find_space(name_or_path: str) -> Path:
    """The YAML of a shipped space by name, or of a file by path; raises ConfigError naming the nearest."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(_shipped_folder().glob("*.yaml"))}
    if name_or_path in shipped:
        return shipped[name_or_path]
    what = "there is no file" if path.suffix in (".yaml", ".yml") else "no search space is called"
    raise ConfigError([Problem(f"{what} {name_or_path!r}; of the shipped spaces: {suggest_name(path.stem, shipped)}")])


def _shipped_folder() -> Path:
    """Inside the package when installed as a wheel, beside it when installed editable."""
    package = Path(str(resources.files("imbvlm")))
    return next((one for one in (package, package.parent) if (one / FOLDER).is_dir()), package) / FOLDER


def read_space(name_or_path: str) -> SearchSpace:
    """Read a space; raises ConfigError with every mistake that shows without a base."""
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
        found, mistakes = _parse_key(key, value, located)
        parameters += found
        problems += mistakes
    ordered, circle = _in_order(parameters)
    problems += [*_check_conditions(parameters, valid), *circle]
    if problems:
        raise ConfigError(problems)
    return SearchSpace(tuple(ordered), data)


def _parse_configurations(located: YamlTree) -> SearchSpace:
    configurations = located.data["configurations"]
    if not isinstance(configurations, dict) or not all(isinstance(one, dict) for one in configurations.values()):
        message = "'configurations' has names, and for each its dotted keys and values"
        raise ConfigError([Problem(message, located.where(("configurations",)))])
    valid = dotted_keys()
    problems = [
        Problem(
            f"a configuration's name is of lower-case letters, digits and hyphens, and not {name!r}",
            located.where(("configurations", name)),
        )
        for name in configurations
        if not NAME.fullmatch(str(name))
    ]
    problems += [
        Problem(f"{name}: {mistake}", located.where(("configurations", name, key)))
        for name, draw in configurations.items()
        for key, value in draw.items()
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
    rule = violated_rule(TrialConfig, key, value)
    return f"{key} must be {rule}, and is {value!r}" if rule else None


def _parse_key(key: str, value: Any, located: YamlTree) -> tuple[list[Parameter], list[Problem]]:
    """One parameter, or one for each branch of a list."""
    path: KeyPath = ("parameters", key)
    if not isinstance(value, list):
        branches = {(key, path): value}
    elif value:
        branches = {(f"{key}[{index}]", (*path, index)): branch for index, branch in enumerate(value)}
    else:
        return [], [Problem(f"{key} has an empty list of branches", located.where(path))]
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
    # As floats: [1, 4] draws 2.7, so that its ends must not pass for whole numbers.
    values = tuple(map(float, branch[kind])) if kind in ("uniform", "loguniform") else tuple(branch[kind])
    when = {one: tuple(v) if isinstance(v, list) else (v,) for one, v in branch.get("when", {}).items()}
    return Parameter(key, name, kind, values, when, where)


def _branch_mistakes(key: str, branch: Any, path: KeyPath, located: YamlTree) -> list[Problem]:
    if not isinstance(branch, dict):
        message = f"{key} must be a range such as {{uniform: [0, 1]}}, and is {branch!r}"
        return [Problem(message, located.where(path))]
    words = [*KINDS, "when"]
    problems = [
        Problem(
            f"unknown word {word!r} in the range of {key}; {suggest_name(word, words)}", located.where((*path, word))
        )
        for word in branch
        if word not in words
    ]
    kinds = [kind for kind in KINDS if kind in branch]
    if len(kinds) != 1 and not problems:
        message = f"{key} needs exactly one of {', '.join(KINDS)}, and has {' and '.join(kinds) or 'none'}"
        problems.append(Problem(message, located.where(path)))
    for kind in kinds:
        mistake = _range_mistake(key, kind, branch[kind])
        problems += [Problem(mistake, located.where((*path, kind)))] if mistake else []
    when = branch.get("when", {})
    values = (
        [one for v in when.values() for one in (v if isinstance(v, list) else [v])] if isinstance(when, dict) else []
    )
    if not isinstance(when, dict) or any(v == [] for v in when.values()) or not all(map(_is_plain, values)):
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
    if kind != "int" and "integer" in (violated_rule(TrialConfig, key, (low + high) / 2) or ""):
        return f"{kind} of {key} draws fractions, and {key} must be a whole number; use int"
    return None


def _choice_mistake(key: str, values: list[Any]) -> str | None:
    if not values:
        return f"choice of {key} is empty"
    nested = [value for value in values if not _is_plain(value)]
    if nested:
        return f"choice of {key} must list plain values, and has {nested[0]!r}"
    endless = [value for value in values if isinstance(value, (int, float)) and not _is_finite(value)]
    if endless:
        return f"choice of {key} must be finite, and has {shown(endless[0])}"
    repeated = [value for index, value in enumerate(values) if is_one_of(value, values[:index])]
    return f"choice of {key} has {repeated[0]!r} twice" if repeated else None


def _is_finite(value: float) -> bool:
    """Whether a number is one that a float can hold; a YAML's whole number may have any length."""
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
        for mistake in _condition_mistakes(key, values, [one for one in parameters if one.key == key], valid)
    ]


def _condition_mistakes(key: str, values: tuple[Any, ...], ranges: list[Parameter], valid: list[str]) -> list[str]:
    """What is wrong with `when: {key: values}`; `ranges` are those that the space has for the key."""
    if key not in valid:
        return [f"names {key!r}, no key of a trial; {suggest_name(key, valid)}"]
    if any(one.finite_values() is None for one in ranges):
        return [f"names {key}, whose range is continuous; use choice"]
    reachable = [value for one in ranges for value in one.finite_values() or ()]
    mistakes = []
    for value in values:
        rule = violated_rule(TrialConfig, key, value)
        if rule is not None:
            mistakes.append(f"has {key} = {value!r}, and {key} must be {rule}")
        elif ranges and not is_one_of(value, reachable):
            mend = suggest_name(str(value), map(str, reachable))
            mistakes.append(f"has {key} = {value!r}, which the space never chooses; {mend}")
    return mistakes


def _in_order(parameters: list[Parameter]) -> tuple[list[Parameter], list[Problem]]:
    """Dependencies first, otherwise as written."""
    ordered: list[Parameter] = []
    waiting = list(parameters)
    while waiting:
        open_keys = {parameter.key for parameter in waiting}
        ready = next((parameter for parameter in waiting if not parameter.depends_on() & open_keys), None)
        if ready is None:
            return ordered, [_circle(waiting)]
        waiting.remove(ready)
        ordered.append(ready)
    return ordered, []


def _circle(waiting: list[Parameter]) -> Problem:
    """What only hangs on the circle is left out, piece by piece."""
    while True:
        needed = {key for parameter in waiting for key in parameter.depends_on()}
        inner = [parameter for parameter in waiting if parameter.key in needed]
        if len(inner) == len(waiting):
            names = ", ".join(sorted({parameter.key for parameter in waiting}))
            return Problem(f"the conditions go in a circle through {names}", waiting[0].where)
        waiting = inner
