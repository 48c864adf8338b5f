"""What one trial is: a strict, typed configuration, from YAML and dotted overrides, with every mistake named at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from imbvlm.errors import ConfigError, Problem, nearest
from imbvlm.yaml_file import KeyPath, YamlTree, dump_yaml, read_yaml

T = TypeVar("T")
Tree = dict[str, Any]


class Section(BaseModel):
    """A part of a configuration: unknown keys are refused, types are not coerced, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


ClassSampling = Literal["instance_balanced", "square_root", "class_balanced", "progressively_balanced"]


class DataConfig(Section):
    """Which images, which rows of them are validation, and how an epoch draws from them."""

    manifest: str = Field(description="path or s3:// URI of a manifest, or embedded:NAME")
    split_seed: int = Field(
        0, ge=0, description="seed of the validation rows carved from training, where the data has none"
    )
    class_sampling: ClassSampling = Field("instance_balanced", description="how often an epoch draws each class")
    on_bad_image: Literal["quarantine", "strict"] = Field(
        "quarantine",
        description="quarantine: leave out and list files that can't be decoded; strict: stop at the first",
    )


class EncoderConfig(Section):
    """The frozen image tower: a name of ENCODERS, open_clip's model/tag, or local-dir:PATH."""

    name: str
    image_size: int | None = Field(None, ge=8, le=2048, description="pixels a side; null: the tower's own")
    weights: str | None = Field(None, description="path of a weights file to load instead of the tag's download")
    quick_gelu: bool | None = Field(
        None, description="what local weights were trained with; null: what their own config says"
    )


class FeaturesConfig(Section):
    """How the tower's outputs are kept."""

    store: bool = Field(True, description="compute the frozen tower's output once and read it in every trial")
    num_views: int = Field(
        1, ge=1, le=64, description="stored crops per training image; the first is the evaluation crop"
    )
    precision: Literal["float16", "float32"] = "float16"


class PromptsConfig(Section):
    """Sentences that turn a class name into text features; several are averaged."""

    templates: Literal["plain", "imagenet"] | list[str] = Field(
        "plain", description="plain: 'a photo of a {}.'; imagenet: open_clip's 80; or your own, each with one {}"
    )


class DecoderConfig(Section):
    """The study's transformer decoder over all tokens."""

    depth: int = Field(3, ge=0, le=32, description="blocks; 0 leaves the (normalised) class token as it is")
    num_heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(0.5, gt=0)
    width: int | None = Field(None, ge=1, description="narrower width behind a linear projection; null: the tower's")
    input_norm: Literal["layer_norm", "none"] = Field("layer_norm", description="starts from the tower's final norm")
    init: Literal["random", "identity"] = Field("random", description="identity: blocks add nothing at step 0")


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

PriorCounts = Literal["sampled", "train"]


class CrossEntropyConfig(Section):
    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class FocalConfig(Section):
    name: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0)


class InverseFrequencyConfig(Section):
    name: Literal["inverse_frequency"] = "inverse_frequency"


class EffectiveNumberConfig(Section):
    name: Literal["effective_number"] = "effective_number"
    beta: float = Field(0.9999, ge=0, lt=1)


class GeneralizedReweightConfig(Section):
    name: Literal["generalized_reweight"] = "generalized_reweight"
    exponent: float = Field(1.2, ge=0)


class BalancedSoftmaxConfig(Section):
    name: Literal["balanced_softmax"] = "balanced_softmax"
    prior: PriorCounts = Field(
        "sampled", description="sampled: the counts that class sampling really gives; train: the rows'"
    )


class LogitAdjustmentConfig(Section):
    name: Literal["logit_adjustment"] = "logit_adjustment"
    tau: float = 1.0
    prior: PriorCounts = "sampled"


class LdamConfig(Section):
    name: Literal["ldam"] = "ldam"
    max_margin: float = Field(0.5, gt=0)
    margin_scale: float | None = Field(None, gt=0, description="null: 1/temperature with a cosine classifier, else 1")
    reweight_from: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of training after which classes are weighted by effective number; null: never",
    )


class LadeConfig(Section):
    name: Literal["lade"] = "lade"
    remine_lambda: float = Field(0.1, ge=0)
    weight: float = Field(0.1, ge=0)
    prior: PriorCounts = "sampled"


# Every loss of LOSSES has its knobs here; a contract test keeps the two in step.
LossConfig = Annotated[
    CrossEntropyConfig
    | FocalConfig
    | InverseFrequencyConfig
    | EffectiveNumberConfig
    | GeneralizedReweightConfig
    | BalancedSoftmaxConfig
    | LogitAdjustmentConfig
    | LdamConfig
    | LadeConfig,
    Field(discriminator="name"),
]


class _OptimBase(Section):
    lr: float = Field(gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    warmup_fraction: float = Field(
        0.0625, ge=0, lt=1, description="share of the steps over which the rate rises linearly"
    )
    lr_schedule: Literal["cosine", "half_cosine", "constant"] = Field(
        "cosine",
        description="cosine: rate x cos(pi x cycles x progress); half_cosine: rate x (1 + cos(pi x progress)) / 2",
    )
    cosine_cycles: float = Field(0.5, gt=0, le=0.5, description="cycles of lr_schedule cosine; 7/16 is the study's")


class SgdConfig(_OptimBase):
    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.03, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True


class AdamWConfig(_OptimBase):
    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)


OptimConfig = Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")]


class TrainConfig(Section):
    """How long and how large: exactly one of num_epochs and num_steps."""

    num_epochs: int | None = Field(
        None, ge=1, description="passes over the epoch plan; 10 where num_steps is not given either"
    )
    num_steps: int | None = Field(None, ge=1, description="optimiser steps, as the study counts")
    batch_size: int = Field(256, ge=1, description="global: over all workers of the trial")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 elsewhere"
    )
    clip_grad_norm: float | None = Field(1.0, gt=0)
    compile: bool = Field(False, description="run the model through torch.compile")
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads; null: the process's own. Numbers depend on it"
    )
    seed: int = Field(0, ge=0, description="of initial weights and of the epoch plan")


class EvalConfig(Section):
    """How an image becomes a tower's input when it isn't augmented."""

    resize: float = Field(
        8 / 7, ge=1, le=2, description="shorter side before the centre crop, as a multiple of the crop"
    )
    interpolation: Literal["bicubic", "bilinear"] | None = Field(None, description="null: the tower's own")


Method = Literal["zero_shot", "linear_probe", "decoder"]

# Which optional sections each method reads; a section that it doesn't read is refused in its file.
TRAINING_SECTIONS = frozenset({"classifier", "loss", "optim", "train"})
METHOD_SECTIONS: Mapping[str, frozenset[str]] = {
    "zero_shot": frozenset({"prompts"}),
    "linear_probe": TRAINING_SECTIONS | {"prompts"},
    "decoder": TRAINING_SECTIONS | {"prompts", "decoder"},
}
OPTIONAL_SECTIONS = frozenset().union(*METHOD_SECTIONS.values())

_DEFAULT_SECTIONS: Mapping[str, Tree] = {
    "prompts": {},
    "decoder": {},
    "classifier": {"kind": "cosine"},
    "loss": {"name": "balanced_softmax"},
    "optim": {"name": "sgd"},
    "train": {"num_epochs": 10},
}


class TrialConfig(Section):
    """One trial: the same file for `imbvlm train`, for a sweep's base, and for an exported best."""

    data: DataConfig
    encoder: EncoderConfig
    features: FeaturesConfig = FeaturesConfig()
    method: Method
    prompts: PromptsConfig | None = None
    decoder: DecoderConfig | None = None
    classifier: ClassifierConfig | None = None
    loss: LossConfig | None = None
    optim: OptimConfig | None = None
    train: TrainConfig | None = None
    eval: EvalConfig = EvalConfig()

    @staticmethod
    def from_yaml(path: str | Path) -> TrialConfig:
        """Read a trial's file; raises ConfigError with every mistake, its line and the nearest valid name."""
        return TrialConfig.from_tree(read_yaml(path))

    @staticmethod
    def from_tree(tree: YamlTree | Tree) -> TrialConfig:
        """Check plain data; sections that the method reads get their defaults. Raises ConfigError."""
        located = tree if isinstance(tree, YamlTree) else YamlTree(tree, "")
        data, problems = _complete(located)
        adapter: TypeAdapter[TrialConfig] = TypeAdapter(TrialConfig)
        try:
            config = adapter.validate_python(data)
        except ValidationError as error:
            raise ConfigError([*problems, *_explain(error, located, data)]) from None
        problems += [Problem(message, located.where(path)) for path, message in _disagreements(config, located.data)]
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

    def with_overrides(self, overrides: Mapping[str, Any]) -> TrialConfig:
        """A checked copy with dotted keys replaced, such as {"optim.lr": 0.01}; raises ConfigError."""
        tree = apply_overrides(self.to_tree(), overrides)
        if "method" in overrides:
            tree = drop_unused_sections(tree, keep=overrides)
        return TrialConfig.from_tree(YamlTree(tree, "override"))

    def key(self) -> str:
        """Canonical JSON: equal for equal configurations."""
        return json.dumps(self.to_tree(), sort_keys=True)


def needed(section: T | None) -> T:
    """A section that the trial's method is known to read (TrialConfig fills those in)."""
    if section is None:
        raise AssertionError("this method doesn't read that section; METHOD_SECTIONS says which it reads")
    return section


# ------------------------------------------------------------------------------------------------ overrides

# Keys that choose a variant: other knobs of the section that the new variant doesn't have go with the old one.
_VARIANT_KEYS = frozenset({"loss.name", "optim.name", "classifier.kind"})
_ENCODER_KNOBS = ("weights", "quick_gelu")


def apply_overrides(tree: Tree, overrides: Mapping[str, Any]) -> Tree:
    """A deep copy of plain data with dotted keys set; choosing another variant drops the old variant's knobs."""
    result = copy.deepcopy(tree)
    for dotted in sorted(overrides, key=lambda key: (key != "method", key.rpartition(".")[2] not in ("name", "kind"))):
        parts = dotted.split(".")
        parent = result
        for part in parts[:-1]:
            if not isinstance(parent.get(part), dict):
                parent[part] = {}
            parent = parent[part]
        value = copy.deepcopy(overrides[dotted])
        if dotted in _VARIANT_KEYS and parent.get(parts[-1]) != value:
            allowed = set(_variant_fields(parts[0], value))
            for knob in [knob for knob in parent if knob not in allowed]:
                del parent[knob]
        if dotted == "encoder.name" and parent.get("name") != value:
            for knob in _ENCODER_KNOBS:
                parent.pop(knob, None)
        if dotted in ("train.num_epochs", "train.num_steps") and value is not None:
            other = "num_steps" if parts[-1] == "num_epochs" else "num_epochs"
            if f"train.{other}" not in overrides:
                parent.pop(other, None)
        parent[parts[-1]] = value
    return result


def drop_unused_sections(tree: Tree, keep: Iterable[str] = ()) -> Tree:
    """Without the sections that the tree's method doesn't read, except those named by the dotted keys in `keep`."""
    method = tree.get("method")
    read = METHOD_SECTIONS.get(method) if isinstance(method, str) else None
    if read is None:
        return tree
    kept = {key.split(".")[0] for key in keep}
    return {key: value for key, value in tree.items() if key not in OPTIONAL_SECTIONS or key in read or key in kept}


# --------------------------------------------------------------------------------------------------- schema


def _variants(annotation: Any) -> list[type[Section]]:
    """The section classes that an annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [variant for part in get_args(annotation) for variant in _variants(part)]


def _section_classes(path: KeyPath) -> list[type[Section]]:
    """The section classes that may stand at a path of a trial's tree; empty where a plain value stands."""
    classes: list[type[Section]] = [TrialConfig]
    for part in path:
        found = [cls.model_fields[str(part)] for cls in classes if str(part) in cls.model_fields]
        classes = [variant for info in found for variant in _variants(info.annotation)]
    return classes


def _variant_fields(section: str, variant: Any) -> list[str]:
    """The keys of one variant of a section; of all its variants where there is none of that name."""
    classes = _section_classes((section,))
    chosen = [cls for cls in classes if variant in (_tag(cls, "name"), _tag(cls, "kind"))]
    return [name for cls in chosen or classes for name in cls.model_fields]


def _tag(cls: type[Section], key: str) -> str | None:
    info = cls.model_fields.get(key)
    literals = get_args(info.annotation) if info is not None else ()
    return literals[0] if literals and isinstance(literals[0], str) else None


def dotted_keys() -> list[str]:
    """Every dotted key that a trial's configuration can have, over all variants."""
    keys: list[str] = []

    def walk(classes: list[type[Section]], prefix: str) -> None:
        for cls in classes:
            for name, info in cls.model_fields.items():
                inner = _variants(info.annotation)
                if inner:
                    walk(inner, f"{prefix}{name}.")
                elif f"{prefix}{name}" not in keys:
                    keys.append(f"{prefix}{name}")

    walk([TrialConfig], "")
    return keys


# --------------------------------------------------------------------------------------------------- errors


def _complete(located: YamlTree) -> tuple[Any, list[Problem]]:
    """Fill in what a section may leave out, and name the sections that the method doesn't read."""
    if not isinstance(located.data, dict):
        return located.data, []
    data: Tree = {key: value for key, value in located.data.items() if not (value is None and key in OPTIONAL_SECTIONS)}
    method = data.get("method")
    read = METHOD_SECTIONS.get(method) if isinstance(method, str) else None
    problems = [
        Problem(
            f"method {method} doesn't read the section {key!r}; take it out or choose another method",
            located.where((key,)),
        )
        for key in data
        if read is not None and key in OPTIONAL_SECTIONS and key not in read
    ]
    for key, default in _DEFAULT_SECTIONS.items():
        value = data.get(key, {} if read is not None and key in read else None)
        if not isinstance(value, dict):
            continue
        for name in ("name", "kind"):
            if name in default and name not in value:
                value = {name: default[name], **value}
        if key == "train" and value.get("num_epochs") is None and value.get("num_steps") is None:
            value = {**value, **default}
        data[key] = value
    return data, problems


def _explain(error: ValidationError, located: YamlTree, data: Any) -> list[Problem]:
    problems = []
    for item in error.errors():
        path, classes = _written_path(item["loc"], data)
        problem = Problem(_sentence(item, path, classes, data), located.where(path))
        if problem not in problems:
            problems.append(problem)
    return problems


def _written_path(loc: tuple[str | int, ...], data: Any) -> tuple[KeyPath, list[type[Section]]]:
    """pydantic's location without the variant names it adds, and the sections that may stand above its last key."""
    path: list[str | int] = []
    here = data
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(here, dict) and (part in here or last):
            path.append(part)
            here = here.get(part) if isinstance(part, str) else None
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(part)
            here = here[part]
    parent = tuple(path[:-1])
    classes = _section_classes(parent)
    value: Any = data
    for part in parent:
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):
        tagged = [
            cls
            for cls in classes
            if any(_tag(cls, key) is not None and _tag(cls, key) == value.get(key) for key in ("name", "kind"))
        ]
        classes = tagged or classes
    return tuple(path), classes


def _sentence(item: Any, path: KeyPath, classes: list[type[Section]], data: Any) -> str:
    dotted = ".".join(str(part) for part in path) or "the file"
    kind, context, value = item["type"], item.get("ctx", {}), item.get("input")
    if kind == "extra_forbidden":
        valid = [name for cls in classes for name in cls.model_fields]
        owner = _owner(path, data)
        return f"unknown key {dotted!r}{owner}; {nearest(str(path[-1]), valid)}"
    if kind == "missing":
        return f"{dotted!r} is required and is not given"
    if kind in ("union_tag_invalid", "literal_error"):
        valid = [
            word.strip().strip("'")
            for word in str(context.get("expected_tags") or context["expected"]).replace(" or ", ", ").split(",")
        ]
        got = (
            value.get(str(context["discriminator"]).strip("'"))
            if kind == "union_tag_invalid" and isinstance(value, dict)
            else value
        )
        name = f"{dotted}.{str(context['discriminator']).strip(chr(39))}" if kind == "union_tag_invalid" else dotted
        return f"{name} is {got!r}, which is not one of its values; {nearest(str(got), valid)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{dotted} must be a section of keys, and is {value!r}"
    return f"{dotted} is {value!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"


def _owner(path: KeyPath, data: Any) -> str:
    """Which variant an unknown key was given to, such as `for loss cross_entropy`."""
    section = data.get(path[0]) if isinstance(data, dict) and len(path) == 2 else None
    if isinstance(section, dict):
        for key in ("name", "kind"):
            if f"{path[0]}.{key}" in _VARIANT_KEYS and isinstance(section.get(key), str):
                return f" for {path[0]} {section[key]}"
    return ""


def _disagreements(config: TrialConfig, written: Any) -> list[tuple[KeyPath, str]]:
    """Rules that tie several keys together."""
    found: list[tuple[KeyPath, str]] = []
    if config.train is not None and config.train.num_epochs is not None and config.train.num_steps is not None:
        found.append((("train", "num_steps"), "train.num_epochs and train.num_steps are both given; keep exactly one"))
    if (
        config.decoder is not None
        and config.decoder.width is not None
        and config.decoder.width % config.decoder.num_heads
    ):
        found.append(
            (
                ("decoder", "width"),
                f"decoder.width {config.decoder.width} must be a multiple of decoder.num_heads {config.decoder.num_heads}",
            )
        )
    if (
        config.optim is not None
        and config.optim.lr_schedule != "cosine"
        and "cosine_cycles" in (written.get("optim") or {})
    ):
        if config.optim.cosine_cycles != 0.5:
            found.append(
                (
                    ("optim", "cosine_cycles"),
                    f"optim.cosine_cycles has no effect with lr_schedule {config.optim.lr_schedule}",
                )
            )
    if isinstance(config.prompts, PromptsConfig) and isinstance(config.prompts.templates, list):
        if not config.prompts.templates:
            found.append(
                (("prompts", "templates"), "prompts.templates is an empty list; give at least one sentence with {}")
            )
        for index, template in enumerate(config.prompts.templates):
            if template.count("{}") != 1:
                found.append(
                    (
                        ("prompts", "templates", index),
                        f"template {template!r} must have exactly one {{}} for the class name",
                    )
                )
    if config.classifier is not None and config.classifier.init == "text" and config.method == "decoder":
        decoder = needed(config.decoder)
        if decoder.init != "identity" or decoder.width is not None or decoder.input_norm == "none":
            found.append(
                (
                    ("classifier", "init"),
                    "classifier.init: text needs the tower's pooled output, and a random decoder changes it; "
                    "set decoder.init: identity (with decoder.width: null and input_norm: layer_norm), or method: linear_probe",
                )
            )
    if config.decoder is not None and config.decoder.init == "identity" and config.decoder.width is not None:
        found.append((("decoder", "init"), "decoder.init: identity keeps the tower's width; set decoder.width: null"))
    return found
