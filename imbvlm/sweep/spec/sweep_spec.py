"""The specification of a sweep: base configuration, search space, objectives, budget and resources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, create_model, field_validator

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.plugin_files import use_plugins
from imbvlm.base.plugins import Plugins, active_plugins
from imbvlm.base.schema import (
    Section,
    Tree,
    flatten,
    shown,
    to_problems,
    violated_rule,
)
from imbvlm.base.yaml_file import KeyPath, YamlTree, dump_yaml, read_yaml
from imbvlm.config.input_sections import DataConfig, FeatureCacheConfig, Seed
from imbvlm.config.training_sections import MAX_THREADS, TrainConfig
from imbvlm.config.trial_config import TrialConfig, apply_overrides, dotted_keys, drop_unused_sections, trial_class
from imbvlm.sweep.spec.objectives import running_maximum
from imbvlm.sweep.spec.sampler_registry import SAMPLERS, SamplerSection, TpeConfig
from imbvlm.sweep.spec.search_space import MISSING, ListedSpace, Params, SearchSpace, get_dotted
from imbvlm.sweep.spec.space_file import parse_space, read_space


class AshaConfig(Section):
    """Asynchronous successive halving [Li et al., MLSys 2020], with brackets of their own for each method."""

    name: Literal["asha"] = "asha"
    grace_fraction: float = Field(1 / 3, gt=0, le=1, description="fraction of a trial before it may be stopped")
    reduction_factor: int = Field(3, ge=2, description="one of this many trials continues at each rung")


class NoSchedulerConfig(Section):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


TrialSchedulerConfig = Annotated[AshaConfig | NoSchedulerConfig, Field(discriminator="name")]
if TYPE_CHECKING:
    SearcherConfig = SamplerSection
else:
    SearcherConfig = SAMPLERS.union(is_own=True)


class BlendConfig(Section):
    """Limits of the blend of trials and baselines that a sweep delivers where it beats its best single one."""

    max_members: int = Field(
        8, ge=1, description="most trials and baselines in the blend; each is refitted over refit_seeds"
    )
    max_passes: int = Field(1, ge=1, description="most encoder passes over an image at prediction")
    max_gigabytes: float = Field(4.0, gt=0, description="most validation logits of trials that are kept as candidates")


DEFAULT_OBJECTIVE = "val/balanced_accuracy"
# The default folder of sweeps and features.
LOCAL_STORAGE = "runs"
# Trials of a search whose specification gives no number.
NUM_TRIALS = 24
# Trials that are scored again over folds, as many as a blend has members.
MIN_CONFIRMED = 8


@dataclass(frozen=True)
class Origin:
    """The file and the lines of a specification, which equality ignores."""

    file: str = field(default="", compare=False)
    places: Mapping[KeyPath, str] = field(default_factory=dict, compare=False)


class StudyRow(Section):
    """One row of a study's table: its label and the listed configuration that it shows."""

    label: str = Field(description="the row's name in the table")
    configuration: str = Field(description="a name of the space's `configurations`")


class StudyTable(Section):
    """One table of a study; several tables may show the same configuration."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="name of the table's files")
    title: str = Field(description="heading of the table")
    columns: Literal["scores", "cost"] = Field(
        "scores", description="scores: accuracies by shot group, precision and F1; cost: parameters, memory and time"
    )
    rows: list[StudyRow] = Field(description="rows in their order")


class SweepSpec(Section):
    """The specification of one sweep, which its folder keeps as sweep.yaml with the space written out."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the sweep; its folder is NAME-DATE in `storage`"
    )
    base: dict[str, Any] = Field(
        description="configuration of a trial; it may have sections for any method of the space"
    )
    space: str | dict[str, Any] = Field(description="name of a shipped space, path of a YAML file, or the space itself")
    objective: str = Field(
        DEFAULT_OBJECTIVE, description="what the sampler and ASHA see, and what tables are sorted by"
    )
    select_by: Literal["log_likelihood", "objective"] | None = Field(
        None,
        description="what selects winner and adjustments: the class-balanced log-likelihood of calibrated validation "
        "logits, or the objective; null: the likelihood for val/balanced_accuracy, else the objective",
    )
    other_objectives: list[str] = Field(
        [],
        description="further objectives of the search, which looks for the Pareto set; `objective` selects the winner",
    )
    constraints: dict[str, float] = Field(
        {}, description="minimum accuracies and maximum time/train_seconds; a trial that violates one is never selected"
    )
    num_trials: int | None = Field(
        None,
        ge=1,
        description="different configurations to train, without baselines; null: 24, or all configurations of a list",
    )
    max_trials: int | None = Field(None, ge=1, description="limit of trials, over all resumptions")
    max_hours: float | None = Field(None, gt=0, description="limit of wall time, over all resumptions")
    max_cost: float | None = Field(
        None, gt=0, description="limit in the currency of the price; needs one of the two prices"
    )
    price_per_gpu_hour: float | None = Field(None, gt=0, description="price of each GPU of the cluster")
    price_per_machine_hour: float | None = Field(
        None, gt=0, description="price of each machine of the cluster, with or without GPUs"
    )
    driver: Literal["auto", "in_process", "ray_train"] = Field(
        "auto",
        description="auto: Ray Train for a search with several workers a trial or with trials that run the encoder; "
        "otherwise, and for baselines and refits of one worker on stored features, in process",
    )
    num_workers: int = Field(1, ge=1, description="Ray Train workers of one trial")
    cpus_per_worker: float = Field(1.0, gt=0, le=MAX_THREADS, description="CPUs that Ray reserves for each worker")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs that Ray reserves for each worker; a fraction lets several trials share a GPU"
    )
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="trials that run at once; null: as many as fit the cluster"
    )
    max_pack_size: int | None = Field(
        None,
        ge=1,
        description="limit of trials that share features, batches and seed and train together; null: as many as fit "
        "into memory, at first 1, 4, 16 and so on, at most a quarter of num_trials, because the sampler receives "
        "their results at once, and each decoder alone on CPUs; 1: each trial alone",
    )
    searcher: SearcherConfig = TpeConfig()
    trial_scheduler: TrialSchedulerConfig = AshaConfig()
    stratify: list[str] = Field([], description="keys whose choices all get the same number of trials")
    first_trials: list[dict[str, Any]] = Field(
        [], description="sampled values to try first; the space must contain them"
    )
    warm_start: list[str] = Field([], description="folders of earlier sweeps whose trials are reported to the sampler")
    update_of: str | None = Field(
        None,
        description="folder of the sweep whose delivered model this sweep trains again on other data; at the end both "
        "are compared on the same test images. `imbvlm sweep update` sets it",
    )
    num_folds: int | None = Field(
        None,
        ge=1,
        description="folds of the training images that score trials on stored features where the data has no "
        "validation split; null: 5 where held-out images decide too little, else 1; 1: images held out from training",
    )
    confirm_trials: int = Field(
        0,
        ge=0,
        description="number of the best trials that run again with confirm_seeds; the best validation mean wins",
    )
    confirm_seeds: list[Seed] = Field(
        [1, 2], min_length=1, description="seeds that confirm_trials run again with, besides their own"
    )
    confirm_folds: int | None = Field(
        5,
        ge=2,
        description="folds of the training images over which the best trials and the baselines are scored again, with "
        "the validation images, where the validation split decides too little and the log-likelihood selects; null: "
        "never",
    )
    refit_seeds: list[Seed] = Field(
        [0, 1, 2], min_length=1, description="seeds of the winner's and the baselines' refits on all training images"
    )
    blend: BlendConfig | None = Field(
        BlendConfig(),
        description="the blend of trials and baselines, where the log-likelihood selects; null: the best single one",
    )
    study: list[StudyTable] = Field(
        [], description="tables of listed configurations, each refitted and scored as the winner is"
    )
    fresh_crops: bool = Field(
        False,
        description="refit the winner and the best of each method on fresh crops, too, to measure the cost of views",
    )
    max_failures: int = Field(3, ge=0, description="restarts of a trial after lost workers, without preemptions")
    max_trial_minutes: float | None = Field(None, gt=0, description="time after which a trial fails; null: no limit")
    smoke: dict[str, Any] = Field({}, description="settings of --smoke; {}: four trials of two epochs with one seed")
    storage: str = Field(LOCAL_STORAGE, description="folder or s3:// URI of sweeps and features")
    feature_folder: str | None = Field(None, description="folder or s3:// URI of features; null: `features` in storage")
    feature_copies: FeatureCacheConfig = FeatureCacheConfig()
    plugins: list[str] = Field(
        [],
        description="Python files and package folders of your own with further losses, methods, second stages, "
        "encoders, benchmarks and samplers; running the sweep runs their code",
    )
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @field_validator("searcher", mode="before")
    @classmethod
    def _with_sampler_name(cls, value: Any) -> Any:
        return {"name": TpeConfig().name, **value} if isinstance(value, Mapping) else value

    @field_validator("storage", "feature_folder", "warm_start", "update_of", "plugins")
    @classmethod
    def _check_locations(cls, value: Any, info: ValidationInfo) -> Any:
        locations = value if isinstance(value, list) else [value] if value is not None else []
        for problem in filter(None, map(storage.folder_problem, locations)):
            raise ValueError(f"{info.field_name}: {problem}")
        return value

    @field_validator("confirm_seeds", "refit_seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int], info: ValidationInfo) -> list[int]:
        if len(set(seeds)) < len(seeds):
            text = ", ".join(map(str, seeds))
            raise ValueError(f"{info.field_name} must have each seed once, got {text}. Remove the repeated ones.")
        return seeds

    @staticmethod
    def from_yaml(path: str | Path) -> SweepSpec:
        """Read a specification; raises ConfigError with all mistakes and their lines.

        Plug-ins that it names run where it is checked or run, not here.
        """
        return SweepSpec.from_tree(read_yaml(path))

    @staticmethod
    def from_tree(tree: YamlTree | Tree) -> SweepSpec:
        """Check plain data with the active plug-ins; raises ConfigError with all mistakes."""
        located, cls = tree if isinstance(tree, YamlTree) else YamlTree(tree, ""), spec_class()
        try:
            spec = cls.model_validate(located.data)
        except ValidationError as error:
            problems = to_problems(cls, error, located, located.data)
            raise ConfigError(dict.fromkeys([*problems, *_nested_mistakes(located)])) from None
        spec._origin = Origin(located.file, located.places)
        return spec

    def to_tree(self) -> Tree:
        """Return plain data, which `from_tree` reads back to an equal specification."""
        return self.model_dump(mode="json")

    def to_yaml(self, path: str | Path) -> None:
        """Write the specification with its space written out."""
        Path(path).write_text(self.to_yaml_text(), encoding="utf-8")

    def to_yaml_text(self) -> str:
        """Return the specification as YAML with its space written out, which needs no other file."""
        return dump_yaml(self.resolve().spec.to_tree())

    def resolve(self) -> ResolvedSweep:
        """Read the space and fix the number of trials; raises ConfigError."""
        space = self.read_space()
        num_trials = self.num_trials or NUM_TRIALS
        if isinstance(space, ListedSpace):
            num_trials = min(self.num_trials or len(space.configurations), len(space.configurations))
        spec = self.model_copy(update={"num_trials": num_trials, "space": space.tree})
        return ResolvedSweep(spec, space, num_trials)

    def read_space(self) -> SearchSpace:
        """Read the search space; raises ConfigError with all mistakes."""
        with use_plugins(*self.plugins):
            if not isinstance(self.space, str):
                return parse_space(self.located("space", self.space))
            try:
                return read_space(self.space)
            except ConfigError as error:
                where = self.where("space")
                raise ConfigError(
                    problem if problem.where else Problem(problem.message, where) for problem in error.problems
                ) from None

    def trial(self, params: Params) -> TrialConfig:
        """Return the configuration of sampled values; raises ConfigError."""
        with use_plugins(*self.plugins):
            return TrialConfig.from_tree(YamlTree(self.trial_tree(params), f"sweep {self.name}"))

    def trial_tree(self, params: Params) -> Tree:
        """Return the base with sampled values, without the sections that their method doesn't read."""
        return drop_unused_sections(apply_overrides(self.base, params), keep=params)

    @property
    def origin(self) -> Origin:
        """The file and the lines that the specification was read from."""
        return self._origin

    def where(self, *path: str | int) -> str:
        """Return the place of a key in its file."""
        return self.located(path[0], None).where(path[1:])

    def located(self, key: str | int, data: Any) -> YamlTree:
        """Return data of one key with the places of the keys in it."""
        file = self._origin.file or f"{key} of sweep {self.name}"
        return YamlTree(None, file, self._origin.places).part(key, data)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The metric that selects the winner, then the others."""
        return (self.objective, *self.other_objectives)

    @property
    def selects_by_likelihood(self) -> bool:
        """Whether the log-likelihood selects the winner; in a study and among several objectives the first one does."""
        if self.select_by is not None or self.study or self.other_objectives:
            return self.select_by == "log_likelihood"
        return self.objective == DEFAULT_OBJECTIVE

    @property
    def blends(self) -> BlendConfig | None:
        """The limits of a blend; None where the sweep delivers a single trial."""
        return self.blend if self.selects_by_likelihood else None

    @property
    def num_confirmed(self) -> int:
        """The number of trials that confirm_folds scores."""
        return max(self.confirm_trials, MIN_CONFIRMED)

    @property
    def cpus_per_trial(self) -> float:
        """CPUs of all workers of a trial."""
        return self.num_workers * self.cpus_per_worker

    @property
    def gpus_per_trial(self) -> float:
        """GPUs of all workers of a trial."""
        return self.num_workers * self.gpus_per_worker

    @property
    def own_seed(self) -> int:
        """The seed of all trials, which no space can search."""
        seed = get_dotted(self.base, "train.seed")
        return TrainConfig().seed if seed is MISSING else int(seed)

    @property
    def split_seed(self) -> int:
        """The seed of the validation rows of all trials, which no space can search."""
        seed = get_dotted(self.base, "data.split_seed")
        return int(DataConfig.model_fields["split_seed"].default if seed is MISSING else seed)

    @property
    def more_seeds(self) -> list[int]:
        """The seeds of confirm_seeds that differ from the trials' own, whose run would be repeated."""
        return [seed for seed in self.confirm_seeds if seed != self.own_seed]

    @property
    def feature_root(self) -> str:
        """The folder or s3:// URI of features."""
        return self.feature_folder or storage.join(self.storage, "features")

    @property
    def best_objective(self) -> str:
        """The name of the objective's running maximum, which Tune, ASHA, Optuna and all tables use."""
        return running_maximum(self.objective)


def spec_class() -> type[SweepSpec]:
    """SweepSpec as it takes the samplers of the active plug-ins, too."""
    return _spec_class(active_plugins())


@cache
def _spec_class(plugins: Plugins) -> type[SweepSpec]:
    if not plugins.entries.get(SAMPLERS.kind):
        return SweepSpec
    with plugins.active():
        fields: dict[str, Any] = {"searcher": (SAMPLERS.union(), TpeConfig())}
        return create_model("SweepSpec", __base__=SweepSpec, **fields)


@dataclass(frozen=True)
class ResolvedSweep:
    """A specification with its search space, read once; `spec` has the space written out and `num_trials` set."""

    spec: SweepSpec
    space: SearchSpace
    num_trials: int

    def corner_trials(self) -> Iterator[TrialConfig]:
        """Iterate over the configurations of every combination of choices that a condition or variant depends on."""
        return map(self.spec.trial, self.space.boundary_params(self.spec.base)[0])


def _nested_mistakes(located: YamlTree) -> list[Problem]:
    """Return the mistakes in the base and the space of a file with other mistakes, to report all at once."""
    data = located.data if isinstance(located.data, dict) else {}
    problems = base_mistakes(located.part("base", data.get("base")))
    try:
        if isinstance(data.get("space"), dict):
            parse_space(located.part("space", data["space"]))
    except ConfigError as error:
        problems += error.problems
    return problems


def base_mistakes(located: YamlTree) -> list[Problem]:
    """Return a base's keys that no method's trial has, and values that no method's trial can have."""
    if not isinstance(located.data, dict):
        return []
    valid, problems = dotted_keys(), []
    for key, value in flatten(located.data).items():
        if key in valid:
            rule = violated_rule(trial_class(), key, value)
            mistake = f"{key} must be {rule}, and is {shown(value)}" if rule else None
        else:
            is_section = any(name.startswith(f"{key}.") for name in valid)
            mistake = None if is_section else f"unknown key {key!r}; {suggest_name(key, valid)}"
        if mistake is not None:
            problems.append(Problem(mistake, located.where(tuple(key.split(".")))))
    return problems
