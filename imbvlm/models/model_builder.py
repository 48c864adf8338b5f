"""The methods a trial can be: which encoder output each reads, what it builds and what of it trains. METHODS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.method_registry import IMAGE_SECTIONS, METHOD_SECTIONS
from imbvlm.config.model_sections import ClassifierConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.models.classifier import FeatureClassifier, ZeroShotClassifier, build_classifier
from imbvlm.models.classifier_init import class_means, text_weights
from imbvlm.models.decoder import Decoder, FinalNorm
from imbvlm.models.encoder_classifier import ON_FEATURES_PREFIX
from imbvlm.models.model_inputs import ModelInputs
from imbvlm.models.model_state import load_own_state_dict
from imbvlm.models.prompt_learner import PromptClassifier, build_prompt_classifier, prompt_tokens
from imbvlm.models.second_stage_modules import stage_module
from imbvlm.models.text_tower import TextTower, unsupported_text_tower

if TYPE_CHECKING:
    from imbvlm.models.encoders.open_clip_encoder import Encoder


@dataclass(frozen=True)
class Method:
    """One method: the encoder output its classifier reads, whether anything trains, and how its model is built.

    `build(config, inputs, device)` gives a model that maps a batch of that output to logits (B, C); of images where the
    method trains inside the tower, or where nothing is stored. Random numbers are drawn on the CPU from torch's global
    generator, so that weights don't depend on the device.
    """

    reads: OutputName
    trains: bool
    trains_tower: bool
    build: Callable[[TrialConfig, ModelInputs, torch.device], nn.Module]
    summary: str
    paper: str


def build_model(config: TrialConfig, inputs: ModelInputs, device: torch.device) -> nn.Module:
    """The model of a trial on its device, initialised as the configuration says; raises ImbvlmError."""
    return METHODS[config.method].build(config, inputs, device).to(device)


def restore_model(
    config: TrialConfig,
    info: EncoderInfo,
    num_classes: int,
    tensors: Mapping[str, Tensor],
    encoder: Encoder | None = None,
) -> nn.Module:
    """A trained model, ready to predict, from its configuration and exported tensors; raises ImbvlmError.

    Where the trial reads images it takes over the tower of `encoder`.
    """
    # Without memory first: a description may ask for more than its weights hold.
    with torch.device("meta"):
        _check_fits(config, _on_features(config, info, num_classes, tensors), tensors, num_classes)
    model = _on_features(config, info, num_classes, tensors)
    if config.reads_images:
        if encoder is None:
            raise ImbvlmError(f"a model of method {config.method} needs its tower")
        model = _on_images(config, model, encoder, num_classes)
    try:
        load_own_state_dict(model, tensors)
    except RuntimeError as error:
        raise ImbvlmError(f"the exported weights don't fit their configuration ({config.method}): {error}") from None
    return model.eval()


def _on_features(config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model on the tower's output, of the shape that its exported tensors should have."""
    if config.method == "prompt_tuning":
        # How much context there is, is in the weights alone.
        context = next((one for name, one in tensors.items() if name.split(".")[-1] == "context"), torch.zeros(0))
        embeddings = torch.zeros(num_classes, info.embedding_width)
        return PromptClassifier(torch.zeros(context.shape), embeddings, info.logit_scale, None)
    if config.classifier is None:
        return ZeroShotClassifier(torch.zeros(num_classes, info.embedding_width), info.logit_scale)
    decoder, width = _decoder(config, info, {})
    classifier, stage = build_classifier(config.classifier, width, num_classes), config.second_stage
    return FeatureClassifier(decoder, classifier if stage is None else stage_module(stage.name, classifier))


def _check_fits(config: TrialConfig, model: nn.Module, tensors: Mapping[str, Tensor], num_classes: int) -> None:
    """Raise ImbvlmError where a model's tensors have other shapes than the exported ones."""
    prefix = ON_FEATURES_PREFIX if config.reads_images else ""
    for name, tensor in model.state_dict().items():
        key = prefix + name
        shape = tuple(tensors[key].shape) if key in tensors else None
        if shape != tuple(tensor.shape):
            raise ImbvlmError(
                f"the exported weights don't fit their configuration ({config.method}, {num_classes:,} classes): "
                f"{key} is {'missing' if shape is None else f'of shape {shape}'} and should be of shape "
                f"{tuple(tensor.shape)}; export the model again"
            )


def tower_problem(config: TrialConfig, info: EncoderInfo) -> str | None:
    """Why a method can't train inside a tower, a sentence with the mend; None where it can."""
    if config.method in ("adapter", "lora") and info.kind == "convolution":
        return (
            f"method {config.method} needs a transformer's blocks, and {info.name} is a convolution tower; choose "
            "method bias_tuning or fine_tuning, or a ViT as encoder.name"
        )
    return None


def stored_outputs(config: TrialConfig) -> frozenset[OutputName]:
    """The encoder outputs that must be stored before a trial starts."""
    if not config.reads_images:
        return frozenset({METHODS[config.method].reads})
    starts_from_means = config.classifier is not None and config.classifier.init == "class_mean"
    return frozenset({METHODS[config.method].reads} if starts_from_means else ())


# --------------------------------------------------------------------------------------------------- builders


def _build_zero_shot(config: TrialConfig, inputs: ModelInputs, device: torch.device) -> nn.Module:
    model = ZeroShotClassifier(_class_embeddings(config, inputs), inputs.info.logit_scale)
    return _with_tower(config, inputs, model, device) if config.reads_images else model


def _build_prompt_tuning(config: TrialConfig, inputs: ModelInputs, device: torch.device) -> nn.Module:
    # Not imported with this file: open_clip takes seconds, and trials that read stored outputs do without it.
    from imbvlm.models.encoder_tuning import load_encoder

    encoder = load_encoder(inputs.encoder or config.encoder, config.eval, inputs.info, device)
    prompts, text_config = require_section(config.prompt_tuning), encoder.source.model_config["text_cfg"]
    refusal = unsupported_text_tower(text_config, encoder.info.name, prompts.num_tokens)
    if refusal is not None:
        raise ImbvlmError(refusal)
    tokens = prompt_tokens(encoder, inputs.class_names, prompts.init_words)
    model = build_prompt_classifier(prompts, TextTower(encoder.model, text_config), tokens, inputs.info, device)
    return _on_images(config, model, encoder, len(inputs.class_names)) if config.reads_images else model


def _build_trained(config: TrialConfig, inputs: ModelInputs, device: torch.device) -> nn.Module:
    """A classifier behind a decoder or none, on the stored output or on the tower, by what its configuration has."""
    decoder, width = _decoder(config, inputs.info, inputs.encoder_tensors)
    classifier = config.classifier
    assert classifier is not None, "TrialConfig gives every method that trains its classifier section"
    init_weight = _initial_weight(config, classifier, inputs, decoder.to(device), width, device)
    model = FeatureClassifier(
        decoder, build_classifier(classifier, width, len(inputs.class_names), init_weight=init_weight)
    )
    return _with_tower(config, inputs, model, device) if config.reads_images else model


def _with_tower(config: TrialConfig, inputs: ModelInputs, model: nn.Module, device: torch.device) -> nn.Module:
    # Trials on stored features start faster without open_clip.
    from imbvlm.models.encoder_tuning import load_encoder

    encoder = load_encoder(inputs.encoder or config.encoder, config.eval, inputs.info, device)
    return _on_images(config, model, encoder, len(inputs.class_names))


def _on_images(config: TrialConfig, model: nn.Module, encoder: Encoder, num_classes: int) -> nn.Module:
    from imbvlm.models.encoder_tuning import tower_classifier

    problem = tower_problem(config, encoder.info)
    if problem is not None:
        raise ImbvlmError(problem)
    return tower_classifier(config, encoder, METHODS[config.method].reads, model, num_classes)


def _decoder(config: TrialConfig, info: EncoderInfo, tower: Mapping[str, Tensor]) -> tuple[nn.Module, int]:
    """What stands before the classifier, and the width it gives; `tower` may have the final norm's weights."""
    if config.decoder is None:
        return nn.Identity(), info.pooled_width
    decoder = Decoder(info.token_width, config.decoder, info.has_class_token, _final_norm(info, tower))
    return decoder, decoder.width


def _final_norm(info: EncoderInfo, tower: Mapping[str, Tensor]) -> FinalNorm | None:
    """The tower's final norm; with its own eps but no weights yet where `tower` hasn't got them."""
    if info.final_norm_eps is None:
        return None
    weight = tower.get("final_norm.weight", torch.ones(info.token_width))
    bias = tower.get("final_norm.bias", torch.zeros(info.token_width))
    return weight, bias, info.final_norm_eps


# --------------------------------------------------------------------------------- how a classifier's weights start


def _initial_weight(
    config: TrialConfig,
    classifier: ClassifierConfig,
    inputs: ModelInputs,
    decoder: nn.Module,
    width: int,
    device: torch.device,
) -> Tensor | None:
    """Weights (C, width) that the classifier starts from, None for random ones."""
    if classifier.init == "text":
        if config.decoder is not None:
            _check_identity(inputs)
        return text_weights(_class_embeddings(config, inputs), inputs.encoder_tensors.get("projection"), width)
    if classifier.init == "class_mean":
        reads = METHODS[config.method].reads
        if inputs.stored is None:
            raise ImbvlmError("classifier.init is class_mean, and the training images have no stored features")
        return class_means(decoder, inputs.stored, reads, len(inputs.class_names), width, device)
    return None


def _check_identity(inputs: ModelInputs) -> None:
    """An identity decoder gives the pooled output only where that is the class token behind the final norm."""
    if not inputs.info.has_class_token or "final_norm.weight" not in inputs.encoder_tensors:
        raise ImbvlmError(
            f"classifier.init is text behind a decoder, and the pooled output of {inputs.info.name} isn't its normed "
            "class token, so that the decoder can't start from it; set method: linear_probe, or classifier.init: "
            "class_mean"
        )


def _class_embeddings(config: TrialConfig, inputs: ModelInputs) -> Tensor:
    if inputs.class_embeddings is None:
        raise ImbvlmError(
            f"method {config.method} needs the class names' text embeddings, and this feature set has none; "
            "extract the features again with image_embedding among the outputs"
        )
    return inputs.class_embeddings


METHODS: Mapping[str, Method] = {
    "zero_shot": Method(
        reads="image_embedding",
        trains=False,
        trains_tower=False,
        build=_build_zero_shot,
        summary="Compares image embeddings with the class names' text embeddings; nothing is trained.",
        paper="Radford et al., ICML 2021",
    ),
    "prompt_tuning": Method(
        reads="image_embedding",
        trains=True,
        trains_tower=False,
        build=_build_prompt_tuning,
        summary="Learns the words around the class names, before the frozen text tower.",
        paper="Zhou et al., IJCV 2022",
    ),
    "linear_probe": Method(
        reads="pooled",
        trains=True,
        trains_tower=False,
        build=_build_trained,
        summary="Trains a linear or cosine classifier on the tower's pooled output.",
        paper="Radford et al., ICML 2021",
    ),
    "decoder": Method(
        reads="tokens",
        trains=True,
        trains_tower=False,
        build=_build_trained,
        summary="Trains a light transformer decoder over all of the tower's tokens, and a classifier.",
        paper="Wang et al., IJCV 2023",
    ),
    "adapter": Method(
        reads="pooled",
        trains=True,
        trains_tower=True,
        build=_build_trained,
        summary="Trains a narrow adapter beside the MLP in every block of a ViT, and a classifier on pooled output.",
        paper="Chen et al., NeurIPS 2022; Shi et al., ICML 2024 (LIFT)",
    ),
    "lora": Method(
        reads="pooled",
        trains=True,
        trains_tower=True,
        build=_build_trained,
        summary="Trains low-rank updates of attention in every block of a ViT, and a classifier on pooled output.",
        paper="Hu et al., ICLR 2022",
    ),
    "bias_tuning": Method(
        reads="pooled",
        trains=True,
        trains_tower=True,
        build=_build_trained,
        summary="Trains the biases of the tower, and a classifier on its pooled output.",
        paper="Zaken et al., ACL 2022",
    ),
    "fine_tuning": Method(
        reads="pooled",
        trains=True,
        trains_tower=True,
        build=_build_trained,
        summary="Trains the whole image tower, early blocks at lower rates, and a classifier on its pooled output.",
        paper="Radford et al., ICML 2021",
    ),
}

if set(METHODS) != set(METHOD_SECTIONS):
    raise AssertionError(
        f"METHODS and method_registry.METHOD_SECTIONS differ: {sorted(set(METHODS) ^ set(METHOD_SECTIONS))}"
    )
if any(entry.trains_tower != (METHOD_SECTIONS[name] >= IMAGE_SECTIONS) for name, entry in METHODS.items()):
    raise AssertionError("a method trains inside the tower if and only if it reads method_registry.IMAGE_SECTIONS")
