"""What a sweep is: base configuration, search space, objective, budget, resources; checked as a whole before anything starts."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from imbvlm.config import (
    METHOD_SECTIONS,
    OPTIONAL_SECTIONS,
    Section,
    Tree,
    TrialConfig,
    apply_overrides,
    dotted_keys,
    drop_unused_sections,
)
from imbvlm.errors import ConfigError, Problem, nearest
from imbvlm.sweep.space import NEVER_SET, Draw, Parameter, SearchSpace, is_active, parse_space, read_space, value_in
from imbvlm.yaml_file import KeyPath, YamlTree, dump_yaml, read_yaml

# What a trial reports on validation and a sweep can maximise; each has its running maximum as val/best_...
OBJECTIVES = (
    "val/top1_accuracy",
    "val/balanced_accuracy",
    "val/many_shot_accuracy",
    "val/medium_shot_accuracy",
    "val/few_shot_accuracy",
)


class SearcherConfig(Section):
    """How Optuna proposes configurations."""

    name: Literal["tpe", "random"] = "tpe"
    seed: int = Field(0, ge=0)
    num_startup_trials: int = Field(10, ge=1, description="random trials before TPE's model takes over")


class AshaConfig(Section):
    """Asynchronous successive halving, apart for each method."""

    name: Literal["asha"] = "asha"
    grace_fraction: float = Field(1 / 3, gt=0, le=1, description="share of the longest trial before any is stopped")
    reduction_factor: int = Field(3, ge=2, description="one in so many goes on at each rung")


class NoSchedulerConfig(Section):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


TrialSchedulerConfig = Annotated[AshaConfig | NoSchedulerConfig, Field(discriminator="name")]


class SweepSpec(Section):
    """One sweep; to and from YAML, and saved in its folder as sweep.yaml with its space written out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    base: dict[str, Any] = Field(
        description="a trial's configuration; sections that some method of the space reads are allowed"
    )
    space: str | dict[str, Any] = Field(description="a shipped space's name, a YAML's path, or the space itself")
    objective: str = "val/balanced_accuracy"
    num_trials: int = Field(24, ge=1, description="different configurations trained; baselines don't count")
    driver: Literal["auto", "in_process", "ray_train"] = Field(
        "auto", description="auto: in process for one worker on stored features, else Ray Train"
    )
    num_workers: int = Field(1, ge=1, description="Ray Train workers of one trial")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    max_concurrent_trials: int | None = Field(None, ge=1, description="null: as many as the cluster holds")
    searcher: SearcherConfig = SearcherConfig()
    trial_scheduler: TrialSchedulerConfig = AshaConfig()
    stratify: list[str] = Field([], description="keys whose every choice gets the same number of trials")
    first_trials: list[dict[str, Any]] = Field([], description="draws to try first; the space must contain them")
    refit_seeds: list[int] = Field([0, 1, 2], min_length=1)
    max_failures: int = Field(3, ge=0, description="restarts of a trial whose worker is lost")
    smoke: dict[str, Any] = Field({}, description="settings that --smoke makes")
    storage: str = Field("runs", description="folder or s3:// URI under which sweeps and features are kept")

    @staticmethod
    def from_yaml(path: str | Path) -> SweepSpec:
        """Read a sweep's file; raises ConfigError with every mistake and its line."""
        return SweepSpec.from_tree(read_yaml(path))

    @staticmethod
    def from_tree(tree: YamlTree | Tree) -> SweepSpec:
        """Check plain data; raises ConfigError."""
        located = tree if isinstance(tree, YamlTree) else YamlTree(tree, "")
        adapter: TypeAdapter[SweepSpec] = TypeAdapter(SweepSpec)
        try:
            return adapter.validate_python(located.data)
        except ValidationError as error:
            raise ConfigError(
                Problem(_sentence(item), located.where(tuple(item["loc"]))) for item in error.errors()
            ) from None

    def to_tree(self) -> Tree:
        """Plain data that `from_tree` reads back to an equal spec."""
        return self.model_dump(mode="json")

    def to_yaml(self, path: str | Path) -> None:
        """Write the spec with its space written out."""
        Path(path).write_text(self.to_yaml_text(), encoding="utf-8")

    def to_yaml_text(self) -> str:
        """The spec with its space written out, so that it can be read where the space's file is not."""
        return dump_yaml({**self.to_tree(), "space": self.read_space().tree})

    def with_settings(self, settings: Mapping[str, Any], origin: str = "--set") -> SweepSpec:
        """A copy with keys of the sweep or dotted keys of its trials set; a key that the space draws is fixed instead."""
        tree, space = self.to_tree(), self.read_space()
        of_trials = {key: value for key, value in settings.items() if key.split(".")[0] in TrialConfig.model_fields}
        unknown = [key for key in of_trials if key not in dotted_keys()]
        problems = [Problem(f"{key!r} is no key of a trial; {nearest(key, dotted_keys())}", origin) for key in unknown]
        for key in settings:
            if key not in of_trials and key.split(".")[0] not in SweepSpec.model_fields:
                problems.append(
                    Problem(
                        f"{key!r} is no key of a sweep or trial; {nearest(key, [*SweepSpec.model_fields, *dotted_keys()])}",
                        origin,
                    )
                )
        if problems:
            raise ConfigError(problems)
        tree["base"] = apply_overrides(tree["base"], of_trials)
        drawn = [key for key in of_trials if any(parameter.key == key for parameter in space.parameters)]
        if drawn:
            tree["space"] = space.without(drawn).tree
        for key, value in settings.items():
            if key not in of_trials:
                _set(tree, key.split("."), value)
        return SweepSpec.from_tree(YamlTree(tree, origin))

    def read_space(self) -> SearchSpace:
        """The search space, read and checked; raises ConfigError."""
        if isinstance(self.space, str):
            return read_space(self.space)
        return parse_space(YamlTree(self.space, f"space of sweep {self.name}"))

    def trial(self, draw: Draw) -> TrialConfig:
        """The configuration of one draw: base and draw together, without the sections that its method doesn't read."""
        return TrialConfig.from_tree(
            YamlTree(drop_unused_sections(apply_overrides(self.base, draw), keep=draw), f"sweep {self.name}")
        )

    def corner_trials(self, space: SearchSpace) -> Iterator[TrialConfig]:
        """Configurations over every combination of choices that conditions or variants hang on."""
        for draw, clash in _corner_draws(space, self.base):
            if clash is None:
                yield self.trial(draw)

    @property
    def best_objective(self) -> str:
        """The reported key of the objective's running maximum, which Tune, ASHA, Optuna and every table use."""
        return self.objective.replace("val/", "val/best_")


def _set(tree: Tree, parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        child = tree.get(part)
        tree = tree[part] if isinstance(child, dict) else tree.setdefault(part, {})
    if parts[-1] == "name" and isinstance(tree.get("name"), str) and tree["name"] != value and len(parts) > 1:
        tree.clear()
    tree[parts[-1]] = value


def _sentence(item: Any) -> str:
    dotted = ".".join(str(part) for part in item["loc"] if part not in ("asha", "none", "str", "dict[str,any]"))
    if item["type"] == "extra_forbidden":
        scope = SweepSpec.model_fields if len(item["loc"]) == 1 else []
        for cls in (SearcherConfig, AshaConfig):
            if len(item["loc"]) > 1 and item["loc"][0] == ("searcher" if cls is SearcherConfig else "trial_scheduler"):
                scope = cls.model_fields
        return f"unknown key {dotted!r} of a sweep; {nearest(str(item['loc'][-1]), scope)}"
    if item["type"] == "missing":
        return f"{dotted!r} is required and is not given"
    return f"{dotted} is {item.get('input')!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"


# ------------------------------------------------------------------------------------------------- the check


def check_spec(spec: SweepSpec) -> SearchSpace:
    """Refuse what can be refused without looking at data or cluster; raises one ConfigError with everything."""
    space = spec.read_space()
    problems: list[Problem] = []
    where = f"sweep {spec.name}"
    if spec.objective not in OBJECTIVES:
        problems.append(
            Problem(f"objective {spec.objective!r} is not measured; {nearest(spec.objective, OBJECTIVES)}", where)
        )
    drawn = {parameter.key for parameter in space.parameters}
    for parameter in space.parameters:
        for key in parameter.when:
            if key not in drawn and value_in(spec.base, key) is NEVER_SET:
                problems.append(
                    Problem(
                        f"the condition of {parameter.key} names {key}, which neither base nor space sets",
                        parameter.where,
                    )
                )
    for key in spec.stratify:
        sources = [parameter for parameter in space.parameters if parameter.key == key]
        if not sources or any(source.finite_values() is None for source in sources):
            problems.append(Problem(f"stratify names {key!r}, which the space doesn't choose from a list", where))
    problems += _check_base(spec, space)
    if not problems:
        problems += _check_draws(spec, space)
    if not problems:
        for index, draw in enumerate(spec.first_trials):
            try:
                space.names_of(draw, spec.base)
            except ConfigError as error:
                problems += [Problem(f"first_trials[{index}]: {problem.message}", where) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return space


def _methods(spec: SweepSpec, space: SearchSpace) -> list[str]:
    chosen = [value for parameter in space.parameters if parameter.key == "method" for value in parameter.values]
    return [str(method) for method in chosen or [spec.base.get("method")]]


def _check_base(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    """The base's sections are known and some method of the space reads them."""
    where = f"base of sweep {spec.name}"
    methods = [method for method in _methods(spec, space) if method in METHOD_SECTIONS]
    read = frozenset[str]().union(*(METHOD_SECTIONS[method] for method in methods))
    problems = []
    for key in spec.base:
        if key not in TrialConfig.model_fields:
            problems.append(Problem(f"unknown key {key!r}; {nearest(key, TrialConfig.model_fields)}", where))
        elif key in OPTIONAL_SECTIONS and methods and key not in read:
            problems.append(
                Problem(f"section {key!r} is read by no method of the space ({', '.join(methods)}); take it out", where)
            )
    return problems


def _check_draws(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    """Build the trial of every combination of choices that decide what exists, at both ends of each range."""
    problems: dict[Problem, None] = {}
    for draw, clash in _corner_draws(space, spec.base):
        if clash is not None:
            problems[clash] = None
            continue
        method = draw.get("method", spec.base.get("method"))
        unread = [
            Problem(
                f"{key} is drawn when method = {method}, which doesn't read {key.split('.')[0]!r}; "
                f"add when: {{method: {_readers(key.split('.')[0])}}}",
                _where_of(space, key),
            )
            for key in draw
            if method in METHOD_SECTIONS and key.split(".")[0] in OPTIONAL_SECTIONS - METHOD_SECTIONS[str(method)]
        ]
        if unread:
            problems.update(dict.fromkeys(unread))
            continue
        tree = drop_unused_sections(apply_overrides(spec.base, draw), keep=draw)
        try:
            TrialConfig.from_tree(YamlTree(tree, f"base of sweep {spec.name}", _places(space, draw)))
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    return list(problems)


def _readers(section: str) -> str:
    names = [method for method, sections in METHOD_SECTIONS.items() if section in sections]
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"


def _places(space: SearchSpace, draw: Draw) -> dict[KeyPath, str]:
    """A mistake at a drawn key is the space's."""
    return {tuple(key.split(".")): _where_of(space, key) for key in draw}


def _where_of(space: SearchSpace, key: str) -> str:
    return next(parameter.where for parameter in space.parameters if parameter.key == key)


def _corner_draws(space: SearchSpace, base: Tree) -> Iterator[tuple[Draw, Problem | None]]:
    """Draws over every combination of the choices that conditions or variants hang on, each at several values elsewhere."""
    structural = {key for parameter in space.parameters for key in parameter.when}
    structural |= {
        parameter.key
        for parameter in space.parameters
        if parameter.key == "method" or parameter.key.endswith((".name", ".kind"))
    }
    # Towers differ in weights, not in the keys that they admit.
    structural -= {"encoder.name"} - {key for parameter in space.parameters for key in parameter.when}
    rounds = max(
        (len(_samples(parameter)) for parameter in space.parameters if parameter.key not in structural), default=1
    )

    def extend(index: int, drawn: Draw, turn: int) -> Iterator[tuple[Draw, Problem | None]]:
        if index == len(space.parameters):
            yield dict(drawn), None
            return
        parameter = space.parameters[index]
        if not is_active(parameter, drawn, base):
            yield from extend(index + 1, drawn, turn)
        elif parameter.key in drawn:
            yield (
                drawn,
                Problem(
                    f"two branches of {parameter.key} hold at once ({_conditions(space, parameter)}); make them exclusive",
                    parameter.where,
                ),
            )
        else:
            samples = _samples(parameter)
            values = samples if parameter.key in structural else [samples[min(turn, len(samples) - 1)]]
            for value in values:
                yield from extend(index + 1, {**drawn, parameter.key: value}, turn)

    return itertools.chain.from_iterable(extend(0, {}, turn) for turn in range(rounds))


def _samples(parameter: Parameter) -> list[Any]:
    return list(parameter.finite_values() or parameter.values) if parameter.kind == "choice" else list(parameter.values)


def _conditions(space: SearchSpace, parameter: Parameter) -> str:
    return "; ".join(other.describe() for other in space.parameters if other.key == parameter.key)


def canonical_key(config: TrialConfig) -> str:
    """Equal for configurations that train the same thing: aliases of losses are folded (PROTOCOL, "Duplicates")."""
    tree = copy.deepcopy(config.to_tree())
    loss = tree.get("loss")
    if isinstance(loss, dict):
        tree["loss"] = _folded_loss(loss)
    return json.dumps(tree, sort_keys=True)


def _folded_loss(loss: Tree) -> Tree:
    name = loss["name"]
    if name == "logit_adjustment" and loss["tau"] == 1:
        return {"name": "balanced_softmax", "prior": loss["prior"]}
    if name == "logit_adjustment" and loss["tau"] == 0:
        return {"name": "cross_entropy", "label_smoothing": 0.0}
    if name == "generalized_reweight" and loss["exponent"] == 1:
        return {"name": "inverse_frequency"}
    if (name == "generalized_reweight" and loss["exponent"] == 0) or (name == "focal" and loss["gamma"] == 0):
        return {"name": "cross_entropy", "label_smoothing": 0.0}
    if name == "lade" and loss["weight"] == 0:
        return {"name": "balanced_softmax", "prior": loss["prior"]}
    return loss
