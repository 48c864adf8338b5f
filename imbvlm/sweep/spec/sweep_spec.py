"""What a sweep is: base configuration, space, objective, budget, resources; checked as a whole before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.schema import (
    Section,
    Tree,
    dotted_keys_of,
    flatten,
    shown,
    to_problems,
    violated_rule,
    with_dotted_keys,
)
from imbvlm.base.yaml_file import KeyPath, YamlTree, dump_yaml, read_yaml
from imbvlm.config.input_sections import Seed
from imbvlm.config.training_sections import MAX_THREADS, TrainConfig
from imbvlm.config.trial_config import TrialConfig, apply_overrides, dotted_keys, drop_unused_sections
from imbvlm.features.feature_cache import DEFAULT_COPIES, Copies
from imbvlm.sweep.spec.objectives import running_maximum
from imbvlm.sweep.spec.sampler_registry import SAMPLERS, SamplerSection, TpeConfig
from imbvlm.sweep.spec.search_space import MISSING, ListedSpace, Params, SearchSpace, get_dotted
from imbvlm.sweep.spec.space_file import parse_space, read_space


class AshaConfig(Section):
    """Asynchronous successive halving, apart for each method."""

    name: Literal["asha"] = "asha"
    grace_fraction: float = Field(1 / 3, gt=0, le=1, description="share of a trial before it may be stopped")
    reduction_factor: int = Field(3, ge=2, description="one in so many goes on at each rung")


class NoSchedulerConfig(Section):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


TrialSchedulerConfig = Annotated[AshaConfig | NoSchedulerConfig, Field(discriminator="name")]
if TYPE_CHECKING:
    SearcherConfig = SamplerSection
else:
    SearcherConfig = SAMPLERS.union()

# Where sweeps and features are kept unless something else is said.
LOCAL_STORAGE = "runs"
# Trials of a search whose specification gives no number.
NUM_TRIALS = 24


@dataclass(frozen=True)
class _Origin:
    """Where a spec was written; two specs that say the same are equal wherever they come from."""

    file: str = field(default="", compare=False)
    places: Mapping[KeyPath, str] = field(default_factory=dict, compare=False)


class StudyRow(Section):
    """One row: what it is called in its table, and the listed configuration that it shows."""

    label: str
    configuration: str


class StudyTable(Section):
    """One table; the same configuration may stand in several."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="of its files")
    title: str
    columns: Literal["scores", "cost"] = "scores"
    rows: list[StudyRow]


class SweepSpec(Section):
    """One sweep; to and from YAML, and saved in its folder as sweep.yaml with its space written out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    base: dict[str, Any] = Field(
        description="a trial's configuration; sections that some method of the space reads are allowed"
    )
    space: str | dict[str, Any] = Field(description="a shipped space's name, a YAML's path, or the space itself")
    objective: str = "val/balanced_accuracy"
    other_objectives: list[str] = Field(
        [], description="what else counts: the search looks for trials that none beats in all; the first still decides"
    )
    constraints: dict[str, float] = Field(
        {}, description="accuracies at least, time/train_seconds at most; who breaks one isn't chosen"
    )
    num_trials: int | None = Field(
        None,
        ge=1,
        description="different configurations to train, without baselines; null: 24, or all configurations of a list",
    )
    max_trials: int | None = Field(None, ge=1, description="no trial starts beyond so many, over all resumptions")
    max_hours: float | None = Field(None, gt=0, description="wall time of the whole sweep, over all resumptions")
    max_cost: float | None = Field(None, gt=0, description="in the currency of the price; with one of the two prices")
    price_per_gpu_hour: float | None = Field(None, gt=0, description="all GPUs of the cluster are paid for")
    price_per_machine_hour: float | None = Field(
        None, gt=0, description="of a machine with or without GPUs; all machines of the cluster are paid for"
    )
    driver: Literal["auto", "in_process", "ray_train"] = Field(
        "auto", description="auto: in process for one worker on stored features, else Ray Train"
    )
    num_workers: int = Field(1, ge=1, description="Ray Train workers of one trial")
    cpus_per_worker: float = Field(1.0, gt=0, le=MAX_THREADS)
    gpus_per_worker: float = Field(0.0, ge=0)
    max_concurrent_trials: int | None = Field(None, ge=1, description="null: as many as the cluster holds")
    max_pack_size: int | None = Field(
        None,
        ge=1,
        description="trials that share features, batches and seed and train together; null: by memory, a quarter of "
        "num_trials at most, since the searcher learns of them together, on CPUs no decoders; 1: each alone",
    )
    searcher: SearcherConfig = TpeConfig()
    trial_scheduler: TrialSchedulerConfig = AshaConfig()
    stratify: list[str] = Field([], description="keys whose every choice gets the same number of trials")
    first_trials: list[dict[str, Any]] = Field([], description="draws to try first; the space must contain them")
    warm_start: list[str] = Field([], description="folders of earlier sweeps whose trials the sampler is told")
    confirm_trials: int = Field(
        0, ge=0, description="so many of the best run again over confirm_seeds; the best mean on validation wins"
    )
    confirm_seeds: list[Seed] = Field([1, 2], min_length=1, description="a trial's own seed is left out")
    refit_seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    study: list[StudyTable] = Field(
        [], description="tables of listed configurations, each of which is refitted and scored as the winner is"
    )
    fresh_crops: bool = Field(
        False, description="refit the winner and each method's best on fresh crops, too, to see what stored views cost"
    )
    max_failures: int = Field(3, ge=0, description="restarts of a trial whose worker is lost; preemptions don't count")
    max_trial_minutes: float | None = Field(None, gt=0, description="a trial that runs longer has failed; null: none")
    smoke: dict[str, Any] = Field(
        {}, description="settings that --smoke makes; {}: four trials of two epochs, one seed"
    )
    storage: str = Field(LOCAL_STORAGE, description="folder or s3:// URI under which sweeps and features are kept")
    feature_folder: str | None = Field(
        None, description="folder or s3:// URI for features; null: `features` under storage"
    )
    feature_copies: Copies = DEFAULT_COPIES
    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    @field_validator("searcher", mode="before")
    @classmethod
    def _with_sampler_name(cls, value: Any) -> Any:
        return {"name": TpeConfig().name, **value} if isinstance(value, Mapping) else value

    @field_validator("storage", "feature_folder", "warm_start")
    @classmethod
    def _can_be_read_and_written(cls, value: Any, info: ValidationInfo) -> Any:
        locations = value if isinstance(value, list) else [value] if value is not None else []
        for problem in filter(None, map(storage.location_problem, locations)):
            raise ValueError(f"{info.field_name}: {problem}")
        return value

    @field_validator("confirm_seeds", "refit_seeds")
    @classmethod
    def _each_seed_once(cls, seeds: list[int], info: ValidationInfo) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{info.field_name} has a seed twice: {', '.join(map(str, seeds))}")
        return seeds

    @staticmethod
    def from_yaml(path: str | Path) -> SweepSpec:
        """Read a sweep's file; raises ConfigError with every mistake and its line."""
        return SweepSpec.from_tree(read_yaml(path))

    @staticmethod
    def from_tree(tree: YamlTree | Tree) -> SweepSpec:
        """Check plain data; raises ConfigError."""
        located = tree if isinstance(tree, YamlTree) else YamlTree(tree, "")
        try:
            spec = SweepSpec.model_validate(located.data)
        except ValidationError as error:
            problems = to_problems(SweepSpec, error, located, located.data)
            raise ConfigError(dict.fromkeys([*problems, *_mistakes_inside(located)])) from None
        spec._origin = _Origin(located.file, located.places)
        return spec

    def to_tree(self) -> Tree:
        """Plain data that `from_tree` reads back to an equal spec."""
        return self.model_dump(mode="json")

    def to_yaml(self, path: str | Path) -> None:
        """Write the spec with its space written out."""
        Path(path).write_text(self.to_yaml_text(), encoding="utf-8")

    def to_yaml_text(self) -> str:
        """The spec with its space written out, so that it can be read where the space's file is not."""
        return dump_yaml(self.resolve().spec.to_tree())

    def resolve(self) -> ResolvedSweep:
        """Read the space and fix the number of trials; raises ConfigError."""
        space = self.read_space()
        num_trials = self.num_trials or NUM_TRIALS
        if isinstance(space, ListedSpace):
            num_trials = min(self.num_trials or len(space.configurations), len(space.configurations))
        spec = self.model_copy(update={"num_trials": num_trials, "space": space.tree})
        return ResolvedSweep(spec, space, num_trials)

    def with_settings(self, settings: Mapping[str, Any], origin: str = "--set") -> SweepSpec:
        """A copy with keys of the sweep or dotted keys of its trials set; a key that the space draws is fixed instead.

        Raises ConfigError with every key that doesn't exist and every value that its key can't have.
        """
        of_trials = {key: value for key, value in settings.items() if key.split(".")[0] in TrialConfig.model_fields}
        of_sweep = {key: value for key, value in settings.items() if key not in of_trials}
        problems = [
            Problem(mistake, origin) for key, value in settings.items() if (mistake := _setting_mistake(key, value))
        ]
        if problems:
            raise ConfigError(problems)
        places = dict(self._origin.places)
        places |= {(*key.split("."),): origin for key in of_sweep}
        places |= {("base", *key.split(".")): origin for key in of_trials}
        spec = SweepSpec.from_tree(
            YamlTree(with_dotted_keys(SweepSpec, self.to_tree(), of_sweep), self._origin.file, places)
        )
        if not of_trials:
            return spec
        space = spec.read_space()
        base = apply_overrides(spec.base, of_trials)
        if "method" in of_trials:
            base = drop_unused_sections(base, keep=of_trials)
        tree = {**spec.to_tree(), "base": base}
        if any(parameter.key in of_trials for parameter in space.parameters):
            rest = space.without(of_trials)
            tree |= {"space": rest.tree, "first_trials": spec._first_trials_within(space, rest, base)}
        return SweepSpec.from_tree(YamlTree(tree, self._origin.file, places))

    def _first_trials_within(self, space: SearchSpace, rest: SearchSpace, base: Tree) -> list[Params]:
        """The first trials without the keys that `rest` no longer draws; those that it can't draw are left out.

        One that was outside the space before stays, to be refused with the others' mistakes.
        """
        fixed = {parameter.key for parameter in space.parameters} - {parameter.key for parameter in rest.parameters}
        shorter = [{key: value for key, value in draw.items() if key not in fixed} for draw in self.first_trials]
        return [
            draw
            for draw, whole in zip(shorter, self.first_trials, strict=True)
            if rest.contains(draw, base) or not space.contains(whole, self.base)
        ]

    def read_space(self) -> SearchSpace:
        """The search space, read and checked; raises ConfigError."""
        if not isinstance(self.space, str):
            return parse_space(self._located("space", self.space))
        try:
            return read_space(self.space)
        except ConfigError as error:
            raise ConfigError(
                p if p.where else Problem(p.message, self.where("space")) for p in error.problems
            ) from None

    def trial(self, draw: Params) -> TrialConfig:
        """The configuration of one draw: base and draw together, without the sections that its method doesn't read."""
        return TrialConfig.from_tree(YamlTree(self._trial_tree(draw), f"sweep {self.name}"))

    def _trial_tree(self, draw: Params) -> Tree:
        return drop_unused_sections(apply_overrides(self.base, draw), keep=draw)

    def where(self, *path: str | int) -> str:
        """Where a key of the spec was written."""
        return self._located(path[0], None).where(path[1:])

    def _located(self, key: str | int, data: Any) -> YamlTree:
        """A part of the spec with the places of its keys."""
        inside = {path[1:]: place for path, place in self._origin.places.items() if path[:1] == (key,)}
        return YamlTree(data, self._origin.file or f"{key} of sweep {self.name}", inside)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The metric that decides, and the others."""
        return (self.objective, *self.other_objectives)

    @property
    def cpus_per_trial(self) -> float:
        """CPUs of a trial's workers together."""
        return self.num_workers * self.cpus_per_worker

    @property
    def gpus_per_trial(self) -> float:
        """GPUs of a trial's workers together."""
        return self.num_workers * self.gpus_per_worker

    @property
    def own_seed(self) -> int:
        """Every trial's own seed, which no space can draw."""
        seed = get_dotted(self.base, "train.seed")
        return TrainConfig().seed if seed is MISSING else int(seed)

    @property
    def more_seeds(self) -> list[int]:
        """Those of confirm_seeds that a trial doesn't have already: the same run again would count as another."""
        return [seed for seed in self.confirm_seeds if seed != self.own_seed]

    @property
    def feature_root(self) -> str:
        """Where features are kept."""
        return self.feature_folder or storage.join(self.storage, "features")

    @property
    def best_objective(self) -> str:
        """The reported key of the objective's running maximum, which Tune, ASHA, Optuna and every table use."""
        return running_maximum(self.objective)


@dataclass(frozen=True)
class ResolvedSweep:
    """A specification with its search space, read once; `spec` has the space written out and `num_trials` set."""

    spec: SweepSpec
    space: SearchSpace
    num_trials: int

    def corner_trials(self) -> Iterator[TrialConfig]:
        """Iterate over the configurations of every combination of choices that a condition or variant depends on."""
        return map(self.spec.trial, self.space.boundary_params(self.spec.base)[0])


def _mistakes_inside(located: YamlTree) -> list[Problem]:
    """Mistakes in the base and the space of a sweep that has others, so that all of a file's are shown at once."""
    data = located.data if isinstance(located.data, dict) else {}

    def part(key: str) -> YamlTree:
        places = {path[1:]: place for path, place in located.places.items() if path[:1] == (key,)}
        return YamlTree(data.get(key), located.file, places)

    problems = _base_mistakes(part("base"))
    try:
        if isinstance(data.get("space"), dict):
            parse_space(part("space"))
    except ConfigError as error:
        problems += error.problems
    return problems


def _base_mistakes(located: YamlTree) -> list[Problem]:
    """Keys that no trial has, and values that their keys can't have, whatever the method."""
    if not isinstance(located.data, dict):
        return []
    valid, problems = dotted_keys(), []
    for key, value in flatten(located.data).items():
        if key in valid:
            rule = violated_rule(TrialConfig, key, value)
            mistake = f"{key} must be {rule}, and is {shown(value)}" if rule else None
        else:
            is_section = any(name.startswith(f"{key}.") for name in valid)
            mistake = None if is_section else f"unknown key {key!r}; {suggest_name(key, valid)}"
        if mistake is not None:
            problems.append(Problem(mistake, located.where(tuple(key.split(".")))))
    return problems


# Parts of a sweep that hold keys of their own.
_WHOLE = frozenset({"base", "space", "smoke"})


def _setting_mistake(key: str, value: Any) -> str | None:
    """What is wrong with setting a key of a sweep or a dotted key of its trials."""
    first, _, rest = key.partition(".")
    if first in _WHOLE and rest:
        return f"{key!r} is set as {rest!r}" if first == "base" else f"{first} is set as a whole, not {key!r}"
    of_trial = first in TrialConfig.model_fields
    valid = dotted_keys() if of_trial else [*SweepSpec.model_fields, *dotted_keys_of(SweepSpec)]
    if key not in valid:
        owner, names = ("a trial", valid) if of_trial else ("a sweep or trial", [*valid, *dotted_keys()])
        return f"{key!r} is no key of {owner}; {suggest_name(key, names)}"
    rule = violated_rule(TrialConfig if of_trial else SweepSpec, key, value)
    return f"{key} must be {rule}, and is {value!r}" if rule else None
