"""What one trial is: a strict, typed configuration, from YAML and dotted overrides, all mistakes named at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from imbvlm.config_losses import LossConfig as LossConfig
from imbvlm.config_losses import SmoothedLoss
from imbvlm.config_methods import (
    DEFAULT_SECTIONS,
    IMAGE_SECTIONS,
    METHOD_DEFAULTS,
    METHOD_SECTIONS,
    OPTIONAL_SECTIONS,
    Method,
)
from imbvlm.config_mixing import FeatureAugmentationConfig, MixingConfig
from imbvlm.config_prompts import PromptsConfig as PromptsConfig
from imbvlm.config_prompts import PromptTuningConfig as PromptTuningConfig
from imbvlm.config_stages import READ_NORMS
from imbvlm.config_stages import SecondStageConfig as SecondStageConfig
from imbvlm.config_tower import AdapterConfig, AugmentationConfig, FineTuningConfig, LoraConfig, MemoryConfig
from imbvlm.errors import ConfigError, Problem
from imbvlm.schema import GONE_WITHOUT_NAME, dotted_keys_of, explain, set_keys
from imbvlm.schema import Section as Section
from imbvlm.schema import Tree as Tree
from imbvlm.yaml_file import YamlTree, dump_yaml, read_yaml

T = TypeVar("T")
# Seeds go to torch and numpy alike.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MAX_IMAGE_SIZE = 2048
# Above the CPUs of any machine. torch ends by SIGSEGV where the system can't start as many threads as it is told.
MAX_THREADS = 1024

ClassSampling = Literal["instance_balanced", "square_root", "class_balanced", "progressively_balanced"]


class DataConfig(Section):
    """Which images, which rows of them are validation, and how an epoch draws from them."""

    manifest: str = Field(description="path or s3:// URI of a manifest, or embedded:NAME")
    split_seed: Seed = Field(0, description="of the validation rows carved from training, where the data has none")
    class_sampling: ClassSampling = Field("instance_balanced", description="how often an epoch draws each class")
    on_bad_image: Literal["quarantine", "strict"] = Field(
        "quarantine",
        description="quarantine: leave out and list files that can't be decoded; strict: stop at the first",
    )
    max_bad_images: int | None = Field(
        None, ge=0, description="more in a split stop the run before training; null: only the share counts"
    )
    max_bad_share: float = Field(0.5, ge=0, le=1, description="a larger share of a split stops the run, too")


class EncoderConfig(Section):
    """The frozen image tower: a name of ENCODERS, open_clip's model/tag, or local-dir:PATH."""

    name: str
    image_size: int | None = Field(None, ge=8, le=MAX_IMAGE_SIZE, description="pixels a side; null: the tower's own")
    weights: str | None = Field(None, description="path of a weights file to load instead of the tag's download")
    quick_gelu: bool | None = Field(
        None, description="what local weights were trained with; null: what their own config says"
    )
    token_pooling: Literal[1, 2] = Field(
        1, description="2: each 2 x 2 neighbouring tokens become their mean, the class token stays; a quarter to store"
    )


class FeaturesConfig(Section):
    """How the tower's outputs are kept."""

    store: bool = Field(
        True,
        description="compute the frozen tower's output once and read it in every trial; false: run the tower on fresh "
        "crops in every epoch",
    )
    num_views: int = Field(
        1, ge=1, le=64, description="stored crops per training image; the first is the evaluation crop"
    )
    tail_views: int | None = Field(
        None,
        ge=2,
        le=64,
        description="stored crops of a few-shot class's training image, more than num_views; null: as many as others",
    )
    precision: Literal["float16", "float32"] = "float16"
    int8_tokens: bool = Field(
        False, description="tokens are stored as bytes with a scale per channel and shard; half of float16's size"
    )
    computed_in: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="what the tower computes in; auto: bfloat16 on GPUs, and of a ViT on a single machine whose CPU "
        "has AMX, where it is 3 times as fast; else float32",
    )

    @field_validator("computed_in")
    @classmethod
    def _only_of_stored(cls, computed_in: str, info: ValidationInfo) -> str:
        if computed_in != "auto" and not info.data.get("store", True):
            raise ValueError(
                f"features.computed_in {computed_in} is of stored features; set features.store: true, or "
                "features.computed_in: auto (train.precision is what trials compute in that read images)"
            )
        return computed_in

    @field_validator("tail_views")
    @classmethod
    def _more_than_others(cls, tail_views: int | None, info: ValidationInfo) -> int | None:
        num_views = info.data.get("num_views", 1)
        if tail_views is not None and tail_views <= num_views:
            raise ValueError(
                f"features.tail_views must be more than features.num_views, which is {num_views}, and is {tail_views}; "
                "raise it, or set it to null"
            )
        return tail_views


class DecoderConfig(Section):
    """The study's transformer decoder over all tokens."""

    depth: int = Field(3, ge=0, le=32, description="blocks; 0 leaves the (normalised) class token as it is")
    num_heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(0.5, gt=0)
    width: int | None = Field(None, ge=1, description="narrower width behind a linear projection; null: the tower's")
    input_norm: Literal["layer_norm", "none"] = Field("layer_norm", description="starts from the tower's final norm")
    init: Literal["random", "identity"] = Field("random", description="identity: blocks add nothing at step 0")

    @field_validator("width")
    @classmethod
    def _heads_divide_it(cls, width: int | None, info: ValidationInfo) -> int | None:
        num_heads = info.data.get("num_heads")
        if width is not None and num_heads is not None and width % num_heads:
            raise ValueError(f"decoder.width {width} must be a multiple of decoder.num_heads {num_heads}")
        return width

    @field_validator("init")
    @classmethod
    def _identity_keeps_the_width(cls, init: str, info: ValidationInfo) -> str:
        if init == "identity" and info.data.get("width") is not None:
            raise ValueError("decoder.init: identity keeps the tower's width; set decoder.width: null")
        return init


class LinearClassifierConfig(Section):
    """Weights and bias."""

    kind: Literal["linear"] = "linear"
    init: Literal["random", "text", "class_mean"] = "random"


class CosineClassifierConfig(Section):
    """Cosine similarity divided by a temperature."""

    kind: Literal["cosine"] = "cosine"
    temperature: float = Field(0.04, gt=0, description="LIFT's scale of 25 is 0.04")
    init: Literal["random", "text", "class_mean"] = "random"


ClassifierConfig = Annotated[LinearClassifierConfig | CosineClassifierConfig, Field(discriminator="kind")]


class _OptimBase(Section):
    lr: float = Field(gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    warmup_fraction: float = Field(
        0.0625, ge=0, lt=1, description="share of the steps over which the rate rises linearly"
    )
    lr_schedule: Literal["cosine", "half_cosine", "epoch_half_cosine", "constant"] = Field(
        "cosine",
        description="cosine: rate x cos(pi x cycles x progress); half_cosine: rate x (1 + cos(pi x progress)) / 2; "
        "epoch_half_cosine: the same, changed at the start of an epoch only, as LIFT does",
    )
    cosine_cycles: float = Field(0.5, gt=0, le=0.5, description="cycles of lr_schedule cosine; 7/16 is the study's")
    first_epoch_lr: float | None = Field(
        None, gt=0, description="rate of the whole first epoch in place of a warm-up; the schedule follows"
    )

    @field_validator("first_epoch_lr")
    @classmethod
    def _one_warmup(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if rate is not None and info.data.get("warmup_fraction"):
            raise ValueError(
                "optim.first_epoch_lr stands in place of a warm-up; set it to null, or optim.warmup_fraction to 0"
            )
        return rate

    @field_validator("cosine_cycles")
    @classmethod
    def _only_of_cosine(cls, cycles: float, info: ValidationInfo) -> float:
        schedule = info.data.get("lr_schedule", "cosine")
        if schedule != "cosine" and cycles != 0.5:
            raise ValueError(f"optim.cosine_cycles has no effect with lr_schedule {schedule}; take it out")
        return cycles


class SgdConfig(_OptimBase):
    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.03, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(_OptimBase):
    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)


OptimConfig = Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")]


class TrainConfig(Section):
    """How long and how large: exactly one of num_epochs and num_steps."""

    num_epochs: int | None = Field(
        None, ge=1, description="passes over the epoch plan; 10 where num_steps is not given either"
    )
    num_steps: int | None = Field(None, ge=1, description="optimiser steps, as the study counts")
    batch_size: int = Field(256, ge=1, description="global: over all workers of the trial")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 on GPUs that have it and, for decoders, on CPUs that have it; else float32",
    )
    clip_grad_norm: float | None = Field(1.0, gt=0)
    compile: bool = Field(False, description="run the model through torch.compile")
    num_threads: int | None = Field(
        None, ge=1, le=MAX_THREADS, description="CPU threads; null: the process's own. Numbers depend on it"
    )
    seed: Seed = Field(0, description="of initial weights and of the epoch plan")

    @field_validator("num_steps")
    @classmethod
    def _one_length(cls, num_steps: int | None, info: ValidationInfo) -> int | None:
        if num_steps is not None and info.data.get("num_epochs") is not None:
            raise ValueError("train.num_epochs and train.num_steps are both given; keep exactly one")
        return num_steps


class EvalConfig(Section):
    """How an image becomes a tower's input when it isn't augmented."""

    resize: float = Field(
        8 / 7, ge=1, le=2, description="shorter side before the centre crop, as a multiple of the crop"
    )
    interpolation: Literal["bicubic", "bilinear"] | None = Field(None, description="null: the tower's own")
    jpeg_downscale: float | None = Field(
        None,
        ge=1,
        le=8,
        description="large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, if that leaves this multiple of the "
        "side that is needed: faster, and off by a few grey levels; null: exact",
    )
    tte: Literal["none", "five_crop"] = Field(
        "none",
        description="five_crop: test images are also scored by the mean logits of five crops, centre and corners, "
        "which costs five times a pass, and an exported model predicts by them",
    )
    expand: int = Field(
        24, ge=0, le=512, description="pixels that an image's shorter side is larger than one of the five crops"
    )

    @field_validator("expand")
    @classmethod
    def _only_of_five_crops(cls, expand: int, info: ValidationInfo) -> int:
        if expand != 24 and info.data.get("tte") == "none":
            raise ValueError("eval.expand has no effect with eval.tte none; set eval.tte: five_crop, or take it out")
        return expand


class TrialConfig(Section):
    """One trial: the same file for `imbvlm train`, for a sweep's base, and for an exported best."""

    data: DataConfig
    encoder: EncoderConfig
    features: FeaturesConfig = FeaturesConfig()
    method: Method
    prompts: PromptsConfig | None = None
    prompt_tuning: PromptTuningConfig | None = None
    decoder: DecoderConfig | None = None
    adapter: AdapterConfig | None = None
    lora: LoraConfig | None = None
    fine_tuning: FineTuningConfig | None = None
    augmentation: AugmentationConfig | None = None
    memory: MemoryConfig | None = None
    classifier: ClassifierConfig | None = None
    loss: LossConfig | None = None
    mixing: MixingConfig | None = None
    feature_augmentation: FeatureAugmentationConfig | None = None
    optim: OptimConfig | None = None
    train: TrainConfig | None = None
    second_stage: Annotated[SecondStageConfig | None, GONE_WITHOUT_NAME] = None
    eval: EvalConfig = EvalConfig()

    @field_validator("classifier")
    @classmethod
    def _text_needs_the_pooled_output(cls, classifier: Section | None, info: ValidationInfo) -> Section | None:
        decoder = info.data.get("decoder")
        if getattr(classifier, "init", None) != "text" or not isinstance(decoder, DecoderConfig):
            return classifier
        if decoder.init != "identity" or decoder.width is not None or decoder.input_norm == "none":
            raise ValueError(
                "classifier.init: text needs the tower's pooled output, and a random decoder changes it; set "
                "decoder.init: identity (with decoder.width: null and decoder.input_norm: layer_norm), or method: "
                "linear_probe"
            )
        return classifier

    @field_validator("second_stage")
    @classmethod
    def _stands_on_stored_features_and_lengths(cls, stage: Section | None, info: ValidationInfo) -> Section | None:
        name, features = getattr(stage, "name", None), info.data.get("features")
        if stage is not None and isinstance(features, FeaturesConfig) and not features.store:
            raise ValueError("second_stage stands on stored features; set features.store: true, or second_stage: null")
        if name in READ_NORMS and isinstance(info.data.get("classifier"), CosineClassifierConfig):
            raise ValueError(
                f"second_stage {name} uses the lengths of the classifier's weights, and a cosine classifier's mean "
                "nothing; set classifier.kind: linear, or choose another second stage"
            )
        return stage

    @field_validator("mixing")
    @classmethod
    def _images_are_mixed_where_they_are_read(cls, mixing: Section | None, info: ValidationInfo) -> Section | None:
        if not isinstance(mixing, MixingConfig) or not mixing.is_on:
            return mixing
        if not _reads_images(info.data):
            raise ValueError(
                "mixing is of images, and this trial reads stored features; set features.store: false, or mixing: "
                "null and feature_augmentation.mixup"
            )
        _check_soft_targets("mixing", info.data.get("loss"))
        return mixing

    @field_validator("feature_augmentation")
    @classmethod
    def _features_vary_where_they_are_stored(cls, section: Section | None, info: ValidationInfo) -> Section | None:
        if not isinstance(section, FeatureAugmentationConfig) or not section.is_on:
            return section
        if _reads_images(info.data):
            raise ValueError(
                "feature_augmentation is of stored features, and this trial reads images; set features.store: true, "
                "or feature_augmentation: null and mixing.mixup"
            )
        if section.mixup:
            _check_soft_targets("feature_augmentation.mixup", info.data.get("loss"))
        return section

    @field_validator("classifier")
    @classmethod
    def _class_means_are_of_stored_features(cls, classifier: Section | None, info: ValidationInfo) -> Section | None:
        features = info.data.get("features")
        stored = not isinstance(features, FeaturesConfig) or features.store
        if getattr(classifier, "init", None) == "class_mean" and not stored:
            raise ValueError(
                "classifier.init: class_mean needs the stored features of all training images; set features.store: "
                "true, or classifier.init: text or random"
            )
        return classifier

    @property
    def reads_images(self) -> bool:
        """Whether the trial runs the tower itself, on images, instead of reading its stored output."""
        return _reads_images({"features": self.features, "method": self.method})

    @staticmethod
    def from_yaml(path: str | Path) -> TrialConfig:
        """Read a trial's file; raises ConfigError with every mistake, its line and the nearest valid name."""
        return TrialConfig.from_tree(read_yaml(path))

    @staticmethod
    def from_tree(tree: YamlTree | Tree) -> TrialConfig:
        """Check plain data; sections that the method reads get their defaults. Raises ConfigError."""
        located = tree if isinstance(tree, YamlTree) else YamlTree(tree, "")
        data = _complete(located.data)
        problems = _unread_sections(located)
        try:
            config = TrialConfig.model_validate(data)
        except ValidationError as error:
            raise ConfigError([*problems, *explain(TrialConfig, error, located, data)]) from None
        if problems:
            raise ConfigError(problems)
        return config

    def to_tree(self) -> Tree:
        """Plain data that `from_tree` reads back to an equal configuration; unused sections are left out."""
        dumped = self.model_dump(mode="json")
        return {key: value for key, value in dumped.items() if value is not None or key not in OPTIONAL_SECTIONS}

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
        """Canonical JSON: equal for equal configurations."""
        return json.dumps(self.to_tree(), sort_keys=True)


def needed(section: T | None) -> T:
    """A section that the trial's method is known to read (TrialConfig fills those in)."""
    if section is None:
        raise AssertionError("this method doesn't read that section; METHOD_SECTIONS says which it reads")
    return section


def _reads_images(data: Tree) -> bool:
    """Whether a trial of these sections reads images; False where they aren't valid."""
    features = data.get("features")
    without_store = isinstance(features, FeaturesConfig) and not features.store
    return without_store or METHOD_SECTIONS.get(str(data.get("method")), frozenset()) >= IMAGE_SECTIONS


def _check_soft_targets(section: str, loss: Section | None) -> None:
    """Raises ValueError for a loss that isn't defined between two classes."""
    if loss is not None and not isinstance(loss, SmoothedLoss):
        name = getattr(loss, "name", "")
        raise ValueError(
            f"{section} gives targets between two classes, and loss {name} is defined for one class alone; choose a "
            f"loss with label_smoothing, such as balanced_softmax, or take {section} out"
        )


def _complete(data: Any) -> Any:
    """Plain data with what a section may leave out; anything but a section stays, for the check to refuse."""
    if not isinstance(data, dict):
        return data
    complete: Tree = {key: value for key, value in data.items() if value is not None or key not in OPTIONAL_SECTIONS}
    own = METHOD_DEFAULTS.get(str(data.get("method")), {})
    for key, general in DEFAULT_SECTIONS.items():
        default = {**general, **own.get(key, {})}
        section = complete.get(key, {} if key in _read_by(data) else None)
        if isinstance(section, dict):
            tags = {tag: value for tag, value in default.items() if tag in ("name", "kind")}
            unset = section.get("num_epochs") is None and section.get("num_steps") is None
            lengths = default if key == "train" and unset else {}
            # Another optimiser than the paper's has its own defaults.
            knobs = default if key != "train" and all(section.get(tag, tags[tag]) == tags[tag] for tag in tags) else {}
            complete[key] = {**tags, **knobs, **section, **lengths}
    return complete


def _unread_sections(located: YamlTree) -> list[Problem]:
    data = located.data
    if not isinstance(data, dict) or not _read_by(data):
        return []
    message = "method {} doesn't read the section {!r}; take it out or choose another method"
    unread = [key for key in data if key in OPTIONAL_SECTIONS - _read_by(data) and data[key] is not None]
    return [Problem(message.format(data["method"], key), located.where((key,))) for key in unread]


def _read_by(data: Tree) -> frozenset[str]:
    """The optional sections that the data's method reads; none where its method isn't known."""
    method = data.get("method")
    return METHOD_SECTIONS.get(method, frozenset()) if isinstance(method, str) else frozenset()


# -------------------------------------------------------------------------------------------------- dotted keys

# Setting one of these lets go of what was said beside it: another tower's weights, the length in other units.
_LETS_GO: Mapping[str, tuple[str, ...]] = {
    "encoder.name": ("encoder.weights", "encoder.quick_gelu"),
    "train.num_epochs": ("train.num_steps",),
    "train.num_steps": ("train.num_epochs",),
}


def apply_overrides(tree: Tree, overrides: Mapping[str, Any]) -> Tree:
    """A deep copy of plain data with dotted keys set; choosing another variant drops the old variant's knobs."""
    return set_keys(TrialConfig, tree, overrides, _LETS_GO)


def drop_unused_sections(tree: Tree, keep: Iterable[str] = ()) -> Tree:
    """Without the sections that the tree's method doesn't read, except those named by the dotted keys in `keep`."""
    read = _read_by(tree)
    kept = read | {key.split(".")[0] for key in keep}
    return {key: value for key, value in tree.items() if not read or key not in OPTIONAL_SECTIONS or key in kept}


def dotted_keys() -> list[str]:
    """Every dotted key that a trial's configuration can have, over all variants."""
    return dotted_keys_of(TrialConfig)
