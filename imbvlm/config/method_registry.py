"""METHODS: the methods that a trial can be, with all that is special to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from imbvlm.base.plugins import Plugins, active_plugins
from imbvlm.base.registry import Lazy, Registry
from imbvlm.base.schema import Section, Tree
from imbvlm.config.encoder_info import OutputName
from imbvlm.config.model_sections import (
    AdapterConfig,
    ClassMeansConfig,
    DecoderConfig,
    DiscriminantConfig,
    FineTuningConfig,
    LoraConfig,
    PromptTuningConfig,
    PrototypeCacheConfig,
)

TRAINING_SECTIONS = frozenset({"classifier", "loss", "optim", "train", "mixing"})
STORED_SECTIONS = TRAINING_SECTIONS | {"prompts", "feature_augmentation"}
IMAGE_SECTIONS = TRAINING_SECTIONS | {"prompts", "augmentation", "memory"}
_BUILD_CLASSIFIER = Lazy("imbvlm.models.model_builder:build_feature_classifier")
_RESTORE_CLASSIFIER = Lazy("imbvlm.models.model_builder:restore_feature_classifier")


@dataclass(frozen=True)
class Method:
    """One method.

    `reads` is the encoder output that its classifier reads. `section` holds its own options and stands in a trial's
    file under `name`. It reads `shared_sections` too, and `defaults` has what its paper sets otherwise in them.

    `build(config, inputs, encoder, device)` gives a model that maps a batch of that output to logits (B, C). `encoder`
    is loaded only where the trial reads images or the method `needs_encoder`. Initial weights are sampled on the CPU
    from torch's global generator, so that they don't depend on the device. `restore(config, info, num_classes,
    tensors)` gives a model with the shapes of its exported `tensors`.

    `install(encoder, config, num_classes)` makes parts of the image tower train and returns `adapters.Installed`; a
    method with it reads images. `refuse(config, info)` lists what the encoder lacks, a sentence each. `needs_text`:
    the model is built from class embeddings.

    `needs_stored`: the model is built from the stored features of all training images, so that `features.store` must be
    on. `select(model, features (N, D), targets (N,), section)` then gives the model its options `selected` on the
    validation rows, where they are null, and returns them by name; a trial reports each as the metric METHOD/OPTION.

    `packs` says how trials of one shape train together: their products `stacked` into one, or each on a batch
    `in_turns`, which pays off where reading the batch is the larger part.
    """

    name: str
    summary: str
    paper: str
    reads: OutputName
    section: type[Section] | None = None
    shared_sections: frozenset[str] = STORED_SECTIONS
    defaults: Mapping[str, Tree] = field(default_factory=dict)
    build: Callable[..., Any] = _BUILD_CLASSIFIER
    restore: Callable[..., Any] = _RESTORE_CLASSIFIER
    install: Callable[..., Any] | None = None
    refuse: Callable[..., Any] | None = None
    needs_text: bool = False
    needs_encoder: bool = False
    needs_stored: bool = False
    select: Callable[..., Any] | None = None
    selected: tuple[str, ...] = ()
    packs: Literal["stacked", "in_turns"] | None = None

    @property
    def sections(self) -> frozenset[str]:
        """The optional sections that it reads; its file is rejected with any other."""
        return self.shared_sections | (frozenset() if self.section is None else {self.name})

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return "optim" in self.shared_sections

    @property
    def learns(self) -> bool:
        """Whether its model depends on the training images."""
        return self.trains or self.needs_stored

    @property
    def trains_encoder(self) -> bool:
        """Whether parts of the image tower train, so that stored features are of no use."""
        return self.install is not None


METHODS: Registry[Method] = Registry(
    "method",
    {
        method.name: method
        for method in (
            Method(
                name="zero_shot",
                summary="Compares image embeddings with the class names' text embeddings; nothing is trained.",
                paper="Radford et al., ICML 2021",
                reads="image_embedding",
                shared_sections=frozenset({"prompts"}),
                build=Lazy("imbvlm.models.model_builder:build_zero_shot"),
                restore=Lazy("imbvlm.models.model_builder:restore_zero_shot"),
                needs_text=True,
            ),
            Method(
                name="class_means",
                summary="Compares pooled output with the mean of each class's training images; nothing is trained.",
                paper="Wang et al., arXiv 2019 (SimpleShot)",
                reads="pooled",
                section=ClassMeansConfig,
                shared_sections=frozenset({"prompts"}),
                build=Lazy("imbvlm.models.training_free:build_class_means"),
                restore=Lazy("imbvlm.models.training_free:restore_class_means"),
                needs_stored=True,
            ),
            Method(
                name="discriminant",
                summary="Linear discriminant analysis of pooled output, with one covariance for all classes, shrunk as "
                "validation selects; nothing is trained.",
                paper="Wang et al., ICLR 2024",
                reads="pooled",
                section=DiscriminantConfig,
                shared_sections=frozenset({"prompts"}),
                build=Lazy("imbvlm.models.training_free:build_discriminant"),
                restore=Lazy("imbvlm.models.training_free:restore_discriminant"),
                needs_stored=True,
                select=Lazy("imbvlm.models.training_free:select_discriminant"),
                selected=("shrinkage", "temperature"),
            ),
            Method(
                name="prototype_cache",
                summary="Compares pooled output with up to 16 prototypes of each class's training images "
                "(Tip-Adapter's cache); nothing is trained.",
                paper="Zhang et al., ECCV 2022",
                reads="pooled",
                section=PrototypeCacheConfig,
                shared_sections=frozenset({"prompts"}),
                build=Lazy("imbvlm.models.training_free:build_prototype_cache"),
                restore=Lazy("imbvlm.models.training_free:restore_prototype_cache"),
                needs_stored=True,
            ),
            Method(
                name="prompt_tuning",
                summary="Learns the words around the class names, before the frozen text tower.",
                paper="Zhou et al., IJCV 2022",
                reads="image_embedding",
                section=PromptTuningConfig,
                shared_sections=STORED_SECTIONS - {"classifier"},
                defaults={
                    "optim": {
                        "name": "sgd",
                        "lr": 0.002,
                        "nesterov": False,
                        "lr_schedule": "half_cosine",
                        "warmup_fraction": 0.0,
                        "first_epoch_lr": 1e-5,
                    },
                    "train": {"num_epochs": 50},
                },
                build=Lazy("imbvlm.models.prompt_learner:build_prompt_tuning"),
                restore=Lazy("imbvlm.models.prompt_learner:restore_prompt_tuning"),
                refuse=Lazy("imbvlm.models.prompt_learner:refuse_text_tower"),
                needs_encoder=True,
            ),
            Method(
                name="linear_probe",
                summary="Trains a linear or cosine classifier on the image tower's pooled output.",
                paper="Radford et al., ICML 2021",
                reads="pooled",
                shared_sections=STORED_SECTIONS | {"second_stage"},
                packs="stacked",
            ),
            Method(
                name="decoder",
                summary="Trains a light transformer decoder over all of the image tower's tokens, and a classifier.",
                paper="Wang et al., IJCV 2023",
                reads="tokens",
                section=DecoderConfig,
                shared_sections=STORED_SECTIONS | {"second_stage"},
                refuse=Lazy("imbvlm.models.decoder:refuse_decoder"),
                packs="in_turns",
            ),
            Method(
                name="adapter",
                summary="Trains a narrow adapter in parallel to the MLP in every block of a ViT, and a classifier on "
                "pooled output.",
                paper="Chen et al., NeurIPS 2022; Shi et al., ICML 2024 (LIFT)",
                reads="pooled",
                section=AdapterConfig,
                shared_sections=IMAGE_SECTIONS,
                install=Lazy("imbvlm.models.adapters:install_adapters"),
                refuse=Lazy("imbvlm.models.adapters:refuse_convolution"),
            ),
            Method(
                name="lora",
                summary="Trains low-rank updates of attention in every block of a ViT, and a classifier on pooled "
                "output.",
                paper="Hu et al., ICLR 2022",
                reads="pooled",
                section=LoraConfig,
                shared_sections=IMAGE_SECTIONS,
                install=Lazy("imbvlm.models.adapters:install_low_rank_updates"),
                refuse=Lazy("imbvlm.models.adapters:refuse_convolution"),
            ),
            Method(
                name="bias_tuning",
                summary="Trains the biases of the image tower, and a classifier on its pooled output.",
                paper="Zaken et al., ACL 2022",
                reads="pooled",
                shared_sections=IMAGE_SECTIONS,
                install=Lazy("imbvlm.models.adapters:train_biases"),
            ),
            Method(
                name="fine_tuning",
                summary="Trains the whole image tower, early blocks at lower rates, and a classifier on its pooled "
                "output.",
                paper="Radford et al., ICML 2021",
                reads="pooled",
                section=FineTuningConfig,
                shared_sections=IMAGE_SECTIONS,
                install=Lazy("imbvlm.models.adapters:train_all"),
            ),
        )
    },
)

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS.own)]


def own_sections(methods: Mapping[str, Method] = METHODS) -> dict[str, type[Section]]:
    """The sections that one method has to itself, by their name, the method's."""
    return {name: method.section for name, method in methods.items() if method.section is not None}


def optional_sections() -> frozenset[str]:
    """Sections that a method may read or not; the others stand in every trial."""
    return _optional_sections(active_plugins())


@cache
def _optional_sections(plugins: Plugins) -> frozenset[str]:
    with plugins.active():
        return frozenset[str]().union(*(method.sections for method in METHODS.values()))


def default_sections() -> Mapping[str, Tree]:
    """Defaults of the sections that a method reads. Others are absent unless a file has them."""
    return _default_sections(active_plugins())


@cache
def _default_sections(plugins: Plugins) -> Mapping[str, Tree]:
    with plugins.active():
        own: dict[str, Tree] = {name: {} for name in own_sections()}
    return {
        "prompts": {},
        **own,
        "augmentation": {},
        "memory": {},
        "classifier": {"kind": "cosine"},
        "loss": {"name": "balanced_softmax"},
        "optim": {"name": "sgd"},
        "train": {"num_epochs": 10},
    }
