"""Changes to a specification: the keys of `--set`, and the few short trials of `--smoke`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.schema import Tree, dotted_keys_of, violated_rule, with_dotted_keys
from imbvlm.base.yaml_file import YamlTree
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import apply_overrides, dotted_keys, drop_unused_sections, trial_class
from imbvlm.sweep.spec.search_space import ListedSpace, Params, SearchSpace, get_dotted
from imbvlm.sweep.spec.sweep_spec import SweepSpec, spec_class

MAX_SMOKE_TRIALS = 4
# The longest smoke trial, in the unit that the sweep counts in.
MAX_SMOKE_LENGTHS = {"train.num_epochs": 2, "train.num_steps": 20}
# Keys of a sweep whose value has keys of its own.
WHOLE_KEYS = frozenset({"base", "space", "smoke"})


def with_settings(spec: SweepSpec, settings: Mapping[str, Any], origin: str = "--set") -> SweepSpec:
    """Return a copy with keys of the sweep, or dotted keys of its trials, set to values.

    A key that the space searches is fixed instead, and leaves the space and `first_trials`. Raises ConfigError with all
    unknown keys and invalid values.
    """
    of_trials = {key: value for key, value in settings.items() if key.split(".")[0] in trial_class().model_fields}
    of_sweep = {key: value for key, value in settings.items() if key not in of_trials}
    problems = [Problem(mistake, origin) for key, value in settings.items() if (mistake := setting_mistake(key, value))]
    if problems:
        raise ConfigError(problems)
    file, places = spec.origin.file, dict(spec.origin.places)
    places |= {(*key.split("."),): origin for key in of_sweep}
    places |= {("base", *key.split(".")): origin for key in of_trials}
    changed = SweepSpec.from_tree(YamlTree(with_dotted_keys(spec_class(), spec.to_tree(), of_sweep), file, places))
    if not of_trials:
        return changed
    space = changed.read_space()
    base = apply_overrides(changed.base, of_trials)
    if "method" in of_trials:
        base = drop_unused_sections(base, keep=of_trials)
    tree = {**changed.to_tree(), "base": base}
    if any(parameter.key in of_trials for parameter in space.parameters):
        remaining = space.without(of_trials)
        tree |= {"space": remaining.tree, "first_trials": _first_trials_within(changed, space, remaining, base)}
    return SweepSpec.from_tree(YamlTree(tree, file, places))


def _first_trials_within(spec: SweepSpec, space: SearchSpace, remaining: SearchSpace, base: Tree) -> list[Params]:
    """Return the first trials without the keys that `remaining` no longer has, and only those that it contains.

    A trial outside the space before stays, and is rejected with the other mistakes.
    """
    fixed = {parameter.key for parameter in space.parameters} - {parameter.key for parameter in remaining.parameters}
    shorter = [{key: value for key, value in params.items() if key not in fixed} for params in spec.first_trials]
    return [
        params
        for params, whole in zip(shorter, spec.first_trials, strict=True)
        if remaining.contains(params, base) or not space.contains(whole, spec.base)
    ]


def setting_mistake(key: str, value: Any) -> str | None:
    """Return the mistake in setting a key of a sweep or a dotted key of its trials; None for a valid setting."""
    first, _, rest = key.partition(".")
    if first in WHOLE_KEYS and rest:
        return (
            f"{key!r} is set as {rest!r}"
            if first == "base"
            else f"{first} is set as a whole, not {key!r}; name all its parts"
        )
    is_of_trial = first in trial_class().model_fields
    valid = dotted_keys() if is_of_trial else [*SweepSpec.model_fields, *dotted_keys_of(spec_class())]
    if key not in valid:
        owner, names = ("a trial", valid) if is_of_trial else ("a sweep or trial", [*valid, *dotted_keys()])
        return f"{key!r} is no key of {owner}; {suggest_name(key, names)}"
    rule = violated_rule(trial_class() if is_of_trial else spec_class(), key, value)
    return f"{key} must be {rule}, and is {value!r}" if rule else None


def smoke_settings(spec: SweepSpec) -> Mapping[str, Any]:
    """Return the settings of `--smoke`: the specification's own, or a few short trials with one seed.

    Raises ConfigError for an invalid space.
    """
    if spec.smoke:
        return spec.smoke
    space = spec.read_space()
    settings = {"refit_seeds": spec.refit_seeds[:1], "confirm_trials": 0, "confirm_folds": None}
    settings |= _smoke_length(spec, space)
    if isinstance(space, ListedSpace):
        # All configurations of a list run.
        return settings
    return {"num_trials": min(spec.num_trials or MAX_SMOKE_TRIALS, MAX_SMOKE_TRIALS), **settings}


def _smoke_length(spec: SweepSpec, space: SearchSpace) -> dict[str, int]:
    """Return the length of a smoke trial, up to the sweep's own; nothing where no method of the space trains."""
    methods = space.values_of("method", spec.base)
    if not any(method not in METHODS or METHODS[method].trains for method in methods):
        return {}
    lengths = {key: get_dotted(spec.base, key) for key in MAX_SMOKE_LENGTHS}
    used = [key for key, length in lengths.items() if isinstance(length, int) or space.of(key)] or ["train.num_epochs"]
    # A trial has one unit. Where branches of the space have different ones, their lengths stay.
    if len(used) > 1:
        return {}
    (key,), longest = used, MAX_SMOKE_LENGTHS[used[0]]
    return {key: min(longest, lengths[key]) if isinstance(lengths[key], int) else longest}
