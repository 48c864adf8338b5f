"""The configuration of one trial: strict, typed, from YAML and dotted overrides, with all mistakes at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, SupportsIndex, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator

from imbvlm.base.errors import ConfigError, Problem
from imbvlm.base.plugins import Plugins, active_plugins, plugin_error
from imbvlm.base.schema import (
    DROP_RETIRED_KEYS,
    NULL_NAME_REMOVES,
    Section,
    Tree,
    digest_tree,
    dotted_keys_of,
    to_problems,
    with_dotted_keys,
)
from imbvlm.base.yaml_file import YamlTree, dump_yaml, read_yaml
from imbvlm.config.input_sections import DataConfig, EncoderConfig, EvalConfig, FeaturesConfig, PromptsConfig
from imbvlm.config.loss_registry import LOSSES, LossConfig, LossSection
from imbvlm.config.method_registry import (
    METHODS,
    Method,
    MethodName,
    default_sections,
    optional_sections,
    own_sections,
)
from imbvlm.config.model_sections import ClassifierConfig, CosineClassifierConfig, DecoderConfig
from imbvlm.config.second_stage_registry import SECOND_STAGES, SecondStageConfig, StageSection
from imbvlm.config.training_sections import (
    AugmentationConfig,
    FeatureAugmentationConfig,
    MemoryConfig,
    MixingConfig,
    OptimConfig,
    TrainConfig,
)

T = TypeVar("T")


class _Inputs(Section):
    """The sections before those of METHODS. Validators see the sections that stand before their own."""

    data: DataConfig
    encoder: EncoderConfig
    features: FeaturesConfig = FeaturesConfig()
    method: MethodName = Field(description="what is trained, and on which output of the encoder")
    prompts: PromptsConfig | None = None

    @field_validator("method")
    @classmethod
    def _method_has_what_it_is_built_from(cls, method: str, info: ValidationInfo) -> str:
        if METHODS[method].needs_stored and _is_without_store(info.data):
            raise ValueError(
                f"method {method} is built from the stored features of all training images. Set features.store: true, "
                "or choose another method."
            )
        return method


if TYPE_CHECKING:
    _WithMethods = _Inputs
else:
    _WithMethods = create_model(
        "_WithMethods",
        __base__=_Inputs,
        **{name: (section | None, None) for name, section in own_sections(METHODS.own).items()},
    )


class TrialConfig(_WithMethods):
    """One trial. `imbvlm train`, a sweep's base and an export share this file format.

    `section` reads the section of a method. `plugins` are those whose entries its class has, beside ours.
    """

    plugins: ClassVar[Plugins] = Plugins()

    augmentation: AugmentationConfig | None = None
    memory: MemoryConfig | None = None
    classifier: ClassifierConfig | None = None
    loss: LossConfig | None = None
    mixing: MixingConfig | None = None
    feature_augmentation: FeatureAugmentationConfig | None = None
    optim: OptimConfig | None = None
    train: TrainConfig | None = None
    second_stage: Annotated[SecondStageConfig | None, NULL_NAME_REMOVES] = None
    eval: EvalConfig = EvalConfig()

    @field_validator("classifier")
    @classmethod
    def _text_needs_the_pooled_output(cls, classifier: Section | None, info: ValidationInfo) -> Section | None:
        decoder = info.data.get("decoder")
        if getattr(classifier, "init", None) != "text" or not isinstance(decoder, DecoderConfig):
            return classifier
        if decoder.init != "identity" or decoder.width is not None or decoder.input_norm == "none":
            raise ValueError(
                "classifier.init: text needs the encoder's pooled output, which a random decoder changes. Set "
                "decoder.init: identity (with decoder.width: null and decoder.input_norm: layer_norm), or method: "
                "linear_probe."
            )
        return classifier

    @field_validator("second_stage")
    @classmethod
    def _second_stage_has_what_it_reads(cls, stage: StageSection | None, info: ValidationInfo) -> StageSection | None:
        if stage is None:
            return None
        if _is_without_store(info.data):
            raise ValueError("second_stage needs stored features. Set features.store: true, or second_stage: null.")
        is_cosine = isinstance(info.data.get("classifier"), CosineClassifierConfig)
        if is_cosine and SECOND_STAGES[stage.name].reads_weight_norms:
            raise ValueError(
                f"second_stage {stage.name} reads the lengths of the classifier's weights, which mean nothing in a "
                "cosine classifier. Set classifier.kind: linear, or choose another second stage."
            )
        return stage

    @field_validator("mixing")
    @classmethod
    def _mixing_needs_images(cls, mixing: Section | None, info: ValidationInfo) -> Section | None:
        if not isinstance(mixing, MixingConfig) or not mixing.is_on:
            return mixing
        if not _reads_images(info.data):
            raise ValueError(
                "mixing mixes images, and this trial reads stored features. Set features.store: false, or use "
                "feature_augmentation.mixup."
            )
        _check_soft_targets("mixing", info.data.get("loss"))
        return mixing

    @field_validator("feature_augmentation")
    @classmethod
    def _feature_augmentation_needs_stored_features(
        cls, section: Section | None, info: ValidationInfo
    ) -> Section | None:
        if not isinstance(section, FeatureAugmentationConfig) or not section.is_on:
            return section
        if _reads_images(info.data):
            raise ValueError(
                "feature_augmentation varies stored features, and this trial reads images. Set features.store: true, "
                "or use mixing.mixup."
            )
        if section.mixup:
            _check_soft_targets("feature_augmentation.mixup", info.data.get("loss"))
        return section

    @field_validator("classifier")
    @classmethod
    def _class_means_need_stored_features(cls, classifier: Section | None, info: ValidationInfo) -> Section | None:
        if getattr(classifier, "init", None) == "class_mean" and _is_without_store(info.data):
            raise ValueError(
                "classifier.init: class_mean needs the stored features of all training images. Set features.store: "
                "true, or classifier.init: text or random."
            )
        return classifier

    def section(self, kind: type[T]) -> T | None:
        """The section of class `kind`; None where the trial has none."""
        return next((section for _, section in self if isinstance(section, kind)), None)

    @property
    def reads_images(self) -> bool:
        """Whether the trial runs the encoder on images instead of reading its stored output."""
        return _reads_images({"features": self.features, "method": self.method})

    @staticmethod
    def from_yaml(path: str | Path) -> TrialConfig:
        """Read a trial's file; raises ConfigError with every mistake, its line and the nearest valid name."""
        return TrialConfig.from_tree(read_yaml(path))

    @staticmethod
    def from_tree(tree: YamlTree | Tree, *, drop_retired_keys: bool = False) -> TrialConfig:
        """Check plain data and fill in the defaults of the sections that the method reads. Raises ConfigError."""
        located = tree if isinstance(tree, YamlTree) else YamlTree(tree, "")
        data, cls = _complete(located.data), trial_class()
        problems = _unread_sections(located)
        try:
            config = cls.model_validate(data, context={DROP_RETIRED_KEYS: drop_retired_keys})
        except ValidationError as error:
            raise ConfigError([*problems, *to_problems(cls, error, located, data)]) from None
        if problems:
            raise ConfigError(problems)
        return config

    @staticmethod
    def from_record(tree: YamlTree | Tree) -> TrialConfig:
        """Check plain data that version 0.1 may have written; its retired keys are dropped. Raises ConfigError."""
        return TrialConfig.from_tree(tree, drop_retired_keys=True)

    def to_tree(self) -> Tree:
        """Plain data that `from_tree` reads back to an equal configuration; unused sections are left out."""
        return _without_null_sections(self.model_dump(mode="json"))

    def to_yaml(self, path: str | Path) -> None:
        """Write the whole configuration, defaults included."""
        Path(path).write_text(dump_yaml(self.to_tree()), encoding="utf-8")

    def with_overrides(self, overrides: Mapping[str, Any], origin: str = "override") -> TrialConfig:
        """A checked copy with dotted keys replaced, such as {"optim.lr": 0.01}; raises ConfigError."""
        tree = apply_overrides(self.to_tree(), overrides)
        if "method" in overrides:
            tree = drop_unused_sections(tree, keep=overrides)
        return TrialConfig.from_tree(YamlTree(tree, origin))

    def key(self) -> str:
        """Canonical JSON: equal for equal configurations, and the same as in version 0.1, whose retired key it has."""
        tree = digest_tree(self)
        tree["features"]["tail_views"] = None
        return json.dumps(_without_null_sections(tree), sort_keys=True)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # No process can import a class that was made for plug-ins.
        return (_restore, (self.plugins, self.to_tree())) if self.plugins.sources else super().__reduce_ex__(protocol)


def trial_class() -> type[TrialConfig]:
    """TrialConfig as it takes the entries of the active plug-ins, too: the class that checks configurations."""
    return _trial_class(active_plugins())


@cache
def _trial_class(plugins: Plugins) -> type[TrialConfig]:
    if not plugins.sources:
        return TrialConfig
    with plugins.active():
        for name in plugins.entries.get(METHODS.kind, {}).keys() & TrialConfig.model_fields.keys():
            location = plugins.adding(METHODS.kind, name).location
            raise plugin_error(location, f"{METHODS.kind} {name!r} has the name of a trial's section. Rename it")
        own = {name: section for name, section in own_sections().items() if name not in TrialConfig.model_fields}
        fields: dict[str, Any] = {
            "method": (Literal[tuple(METHODS)], ...),
            "loss": (LOSSES.union() | None, None),
            "second_stage": (Annotated[SECOND_STAGES.union() | None, NULL_NAME_REMOVES], None),
            **{name: (section | None, None) for name, section in own.items()},
        }
        made = create_model("TrialConfig", __base__=TrialConfig, **fields)
    made.plugins = plugins
    return made


def _restore(plugins: Plugins, tree: Tree) -> TrialConfig:
    with plugins.active():
        return TrialConfig.from_tree(tree)


def require_section(section: T | None) -> T:
    """A section that the trial's method reads, so that TrialConfig has filled it in."""
    if section is None:
        raise AssertionError("this method doesn't read that section; METHODS says which it reads")
    return section


def _without_null_sections(tree: Tree) -> Tree:
    optional = optional_sections()
    return {key: value for key, value in tree.items() if value is not None or key not in optional}


def _reads_images(data: Tree) -> bool:
    """Whether a trial of these sections reads images; False where they aren't valid."""
    method = _method(data)
    return _is_without_store(data) or (method is not None and method.trains_encoder)


def _is_without_store(data: Tree) -> bool:
    """Whether these sections switch stored features off; False where they aren't valid."""
    features = data.get("features")
    return isinstance(features, FeaturesConfig) and not features.store


def _check_soft_targets(section: str, loss: LossSection | None) -> None:
    """Raises ValueError for a loss that takes no targets between classes."""
    if loss is not None and not LOSSES[loss.name].takes_soft_targets:
        raise ValueError(
            f"{section} makes targets between two classes, and loss {loss.name} takes one class. Choose a loss with "
            f"label_smoothing, such as balanced_softmax, or remove {section}."
        )


def _complete(data: Any) -> Any:
    """Plain data with the defaults of its method; what isn't a section stays, and the check rejects it."""
    if not isinstance(data, dict):
        return data
    complete = _without_null_sections(data)
    method = _method(data)
    own = {} if method is None else method.defaults
    for key, general in default_sections().items():
        default = {**general, **own.get(key, {})}
        section = complete.get(key, {} if key in _read_by(data) else None)
        if isinstance(section, dict):
            tags = {tag: value for tag, value in default.items() if tag in ("name", "kind")}
            unset = section.get("num_epochs") is None and section.get("num_steps") is None
            lengths = default if key == "train" and unset else {}
            # An optimizer other than the paper's has its own defaults.
            options = (
                default if key != "train" and all(section.get(tag, tags[tag]) == tags[tag] for tag in tags) else {}
            )
            complete[key] = {**tags, **options, **section, **lengths}
    return complete


def _unread_sections(located: YamlTree) -> list[Problem]:
    data = located.data
    if not isinstance(data, dict) or not _read_by(data):
        return []
    message = "method {} doesn't read the section {!r}. Remove it, or choose another method."
    unread = [key for key in data if key in optional_sections() - _read_by(data) and data[key] is not None]
    return [Problem(message.format(data["method"], key), located.where((key,))) for key in unread]


def _read_by(data: Tree) -> frozenset[str]:
    """The optional sections that the data's method reads; none where there is no such method."""
    method = _method(data)
    return frozenset() if method is None else method.sections


def _method(data: Tree) -> Method | None:
    """The data's method; None where there is no such method."""
    name = data.get("method")
    return METHODS.get(name) if isinstance(name, str) else None


# -------------------------------------------------------------------------------------------------- dotted keys

# Setting a key removes these others: the weights of another encoder, the length in another unit.
RESETS: Mapping[str, tuple[str, ...]] = {
    "encoder.name": ("encoder.weights", "encoder.quick_gelu"),
    "train.num_epochs": ("train.num_steps",),
    "train.num_steps": ("train.num_epochs",),
}


def apply_overrides(tree: Tree, overrides: Mapping[str, Any]) -> Tree:
    """A deep copy of plain data with dotted keys set; choosing another variant drops the old one's options."""
    return with_dotted_keys(trial_class(), tree, overrides, RESETS)


def drop_unused_sections(tree: Tree, keep: Iterable[str] = ()) -> Tree:
    """A copy without sections that the tree's method doesn't read, except those of the dotted keys in `keep`."""
    read, optional = _read_by(tree), optional_sections()
    retained = read | {key.split(".")[0] for key in keep}
    return {key: value for key, value in tree.items() if not read or key not in optional or key in retained}


def dotted_keys() -> list[str]:
    """Every dotted key of a trial's configuration, over all variants."""
    return dotted_keys_of(trial_class())


def needs_text(config: TrialConfig) -> bool:
    """Whether a trial reads the class names' text embeddings."""
    return METHODS[config.method].needs_text or (config.classifier is not None and config.classifier.init == "text")


def selected_options(tree: Tree) -> dict[str, float | None]:
    """A trial's options that validation selects where they are null, by dotted key; a run reports each as a metric.

    `tree` is plain data of a checked configuration. Lists of sweeps don't know the options of plug-ins.
    """
    sections, stage = {}, tree.get("second_stage")
    if tree["method"] in METHODS:
        sections[tree["method"]] = METHODS[tree["method"]].selected
    if stage and stage["name"] in SECOND_STAGES:
        sections["second_stage"] = SECOND_STAGES[stage["name"]].selected
    return {f"{section}.{option}": tree[section][option] for section, options in sections.items() for option in options}


def option_metric(key: str) -> str:
    """The metric that reports a selected option: second_stage/tau for second_stage.tau."""
    return key.replace(".", "/")
