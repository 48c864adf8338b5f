"""Build a trial's model, and restore an exported one, by the functions that METHODS names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.input_sections import PromptsConfig
from imbvlm.config.method_registry import METHODS
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.models.classifier import (
    CosineClassifier,
    FeatureClassifier,
    LinearClassifier,
    ZeroShotClassifier,
    build_classifier,
)
from imbvlm.models.classifier_init import class_means, text_weights
from imbvlm.models.decoder import Decoder, FinalNorm
from imbvlm.models.encoder_classifier import ON_FEATURES_PREFIX
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.model_inputs import ModelInputs
from imbvlm.models.model_state import load_own_state_dict
from imbvlm.models.second_stage_modules import stage_module


def refusals(config: TrialConfig, info: EncoderInfo) -> list[str]:
    """Return a sentence for each thing that a trial's method needs and its encoder lacks."""
    if not info.has_text and (problems := list(_text_refusals(config, info.name))):
        return problems
    refuse = METHODS[config.method].refuse
    return [] if refuse is None else refuse(config, info)


def _text_refusals(config: TrialConfig, name: str) -> Iterator[str]:
    """Return a sentence for each thing that a trial needs of a text side, for an image-only encoder of that name."""
    or_text = "or choose an encoder with text, such as openai_vit_b16"
    if METHODS[config.method].reads == "image_embedding":
        yield (
            f"method {config.method} compares images with the class names' text, and {name} is image-only: it has no "
            f"text. Take method linear_probe or decoder, {or_text}."
        )
    if config.classifier is not None and config.classifier.init == "text":
        yield (
            f"classifier.init is text, and {name} is image-only: it has no text. Set classifier.init: class_mean or "
            f"random, {or_text}."
        )
    if config.prompts is not None and config.prompts != PromptsConfig():
        yield (
            f"the section prompts is set, and {name} is image-only: it has no text. Take the section prompts out, "
            f"{or_text}."
        )


def stored_outputs(config: TrialConfig) -> frozenset[OutputName]:
    """The encoder outputs that must be stored before a trial starts."""
    starts_from_means = config.classifier is not None and config.classifier.init == "class_mean"
    return frozenset({METHODS[config.method].reads} if starts_from_means or not config.reads_images else ())


def build_model(config: TrialConfig, inputs: ModelInputs, device: torch.device) -> nn.Module:
    """The initialized model of a trial on its device; raises ImbvlmError where its encoder lacks something."""
    method = METHODS[config.method]
    if inputs.encoder is not None:
        config = config.model_copy(update={"encoder": inputs.encoder})
    if problems := refusals(config, inputs.info):
        raise ImbvlmError(" ".join(problems))
    encoder = None
    if config.reads_images or method.needs_encoder:
        # open_clip takes seconds to import, and trials on stored features do without it.
        from imbvlm.models.encoder_tuning import load_encoder

        encoder = load_encoder(config, inputs.info, device)
    model: nn.Module = method.build(config, inputs, encoder, device)
    return _with_encoder(config, model, encoder, len(inputs.class_names)).to(device)


def restore_model(
    config: TrialConfig,
    info: EncoderInfo,
    num_classes: int,
    tensors: Mapping[str, Tensor],
    encoder: Encoder | None = None,
) -> nn.Module:
    """A trained model, ready to predict, from its configuration and exported tensors; raises ImbvlmError.

    A model of a trial on images takes over the image tower of `encoder`.
    """
    on_features = _restore(config, info, num_classes, _of_head(config, tensors))
    return _filled(config, _with_encoder(config, on_features, encoder, num_classes), tensors)


def restore_head(config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A trained model as `restore_model` gives it, but on the encoder's output, even if its trial read images."""
    own = _of_head(config, tensors)
    return _filled(config, _restore(config, info, num_classes, own), own)


def _of_head(config: TrialConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Exported tensors by their names in the model on the encoder's output."""
    if not config.reads_images:
        return tensors
    return {name.removeprefix(ON_FEATURES_PREFIX): tensor for name, tensor in tensors.items()}


def _restore(config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model of the exported shapes on the encoder's output; raises ImbvlmError for tensors of others."""
    restore = METHODS[config.method].restore
    # Shapes are compared before memory is taken: a description may ask for more than its weights hold.
    with torch.device("meta"):
        _check_fits(config, restore(config, info, num_classes, tensors), tensors, num_classes)
    model: nn.Module = restore(config, info, num_classes, tensors)
    return model


def _filled(config: TrialConfig, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model with its exported tensors, ready to predict; raises ImbvlmError where they don't fit."""
    try:
        load_own_state_dict(model, tensors)
    except RuntimeError as error:
        raise ImbvlmError(
            f"the exported weights don't fit their configuration ({config.method}): {error}. Export the model again."
        ) from None
    return model.eval()


def _with_encoder(config: TrialConfig, model: nn.Module, encoder: Encoder | None, num_classes: int) -> nn.Module:
    """A model on features, on the image tower if the trial reads images."""
    if not config.reads_images:
        return model
    if encoder is None:
        raise ImbvlmError(f"a model of method {config.method} on images needs its encoder, got none. Give it one.")
    from imbvlm.models.encoder_tuning import put_on_encoder

    return put_on_encoder(config, encoder, model, num_classes)


def _check_fits(config: TrialConfig, model: nn.Module, tensors: Mapping[str, Tensor], num_classes: int) -> None:
    """Raise ImbvlmError where a model's tensors have other shapes than the exported ones."""
    for key, tensor in model.state_dict().items():
        shape = tuple(tensors[key].shape) if key in tensors else None
        if shape != tuple(tensor.shape):
            raise ImbvlmError(
                f"the exported weights don't fit their configuration ({config.method}, {num_classes:,} classes): "
                f"{key} is {'missing' if shape is None else f'of shape {shape}'} and should be of shape "
                f"{tuple(tensor.shape)}. Export the model again."
            )


# ----------------------------------------------------------------------------------------------------- zero-shot


def build_zero_shot(
    config: TrialConfig, inputs: ModelInputs, encoder: Encoder | None, device: torch.device
) -> nn.Module:
    """Class embeddings as they were extracted; raises ImbvlmError without them."""
    return ZeroShotClassifier(_class_embeddings(config, inputs), inputs.info.text_space.logit_scale)


def restore_zero_shot(
    config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A zero-shot classifier of the exported shapes."""
    return ZeroShotClassifier(torch.zeros(num_classes, info.text_space.width), info.text_space.logit_scale)


# --------------------------------------------------------------------------- a classifier behind a decoder or none


def build_feature_classifier(
    config: TrialConfig, inputs: ModelInputs, encoder: Encoder | None, device: torch.device
) -> nn.Module:
    """A classifier, behind a decoder if the trial has one, started as classifier.init says; raises ImbvlmError."""
    return build_behind(*_decoder(config, inputs.info, inputs.encoder_tensors), config, inputs, device)


def restore_feature_classifier(
    config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A classifier of the exported shapes, with what its second stage puts in its place."""
    return restore_behind(*_decoder(config, info, {}), config, num_classes)


def build_behind(
    decoder: nn.Module, width: int, config: TrialConfig, inputs: ModelInputs, device: torch.device
) -> FeatureClassifier:
    """A classifier behind a module that gives (B, width), started as classifier.init says; raises ImbvlmError."""
    init_weight = _initial_weight(config, inputs, decoder.to(device), width, device)
    return FeatureClassifier(decoder, _classifier(config, width, len(inputs.class_names), init_weight))


def restore_behind(decoder: nn.Module, width: int, config: TrialConfig, num_classes: int) -> FeatureClassifier:
    """The same of the exported shapes, with what its second stage puts in the classifier's place."""
    classifier, stage = _classifier(config, width, num_classes), config.second_stage
    return FeatureClassifier(decoder, classifier if stage is None else stage_module(stage, classifier))


def _classifier(
    config: TrialConfig, width: int, num_classes: int, init_weight: Tensor | None = None
) -> LinearClassifier | CosineClassifier:
    assert config.classifier is not None, "TrialConfig fills in the section of a method that reads it"
    return build_classifier(config.classifier, width, num_classes, init_weight=init_weight)


def _decoder(config: TrialConfig, info: EncoderInfo, encoder_tensors: Mapping[str, Tensor]) -> tuple[nn.Module, int]:
    """The module before the classifier, and the width of its output."""
    section = config.section(DecoderConfig)
    if section is None:
        return nn.Identity(), info.pooled_width
    decoder = Decoder(info.token_width, section, info.has_class_token, _final_norm(info, encoder_tensors))
    return decoder, decoder.width


def _final_norm(info: EncoderInfo, encoder_tensors: Mapping[str, Tensor]) -> FinalNorm | None:
    """The encoder's final norm, as torch starts one if `encoder_tensors` lacks its weights."""
    if info.final_norm_eps is None:
        return None
    weight = encoder_tensors.get("final_norm.weight", torch.ones(info.token_width))
    bias = encoder_tensors.get("final_norm.bias", torch.zeros(info.token_width))
    return weight, bias, info.final_norm_eps


def _initial_weight(
    config: TrialConfig, inputs: ModelInputs, decoder: nn.Module, width: int, device: torch.device
) -> Tensor | None:
    """Weights (C, width) that the classifier starts from; None for random ones."""
    init = None if config.classifier is None else config.classifier.init
    if init == "text":
        if config.section(DecoderConfig) is not None:
            _check_identity(inputs)
        return text_weights(_class_embeddings(config, inputs), inputs.encoder_tensors.get("projection"), width)
    if init == "class_mean":
        if inputs.stored is None:
            raise ImbvlmError(
                "classifier.init: class_mean needs stored features of the training images, got none. "
                "Set features.store: true."
            )
        return class_means(decoder, inputs.stored, METHODS[config.method].reads, len(inputs.class_names), width, device)
    return None


def _check_identity(inputs: ModelInputs) -> None:
    """An identity decoder gives the pooled output only where that is the class token behind the final norm."""
    if not inputs.info.has_class_token or "final_norm.weight" not in inputs.encoder_tensors:
        raise ImbvlmError(
            "classifier.init: text behind a decoder needs a pooled output that is the normed class token, and that of "
            f"{inputs.info.name} isn't. Set method: linear_probe, or classifier.init: class_mean."
        )


def _class_embeddings(config: TrialConfig, inputs: ModelInputs) -> Tensor:
    if inputs.class_embeddings is None:
        raise ImbvlmError(
            f"method {config.method} needs the class names' text embeddings, and this feature set has none. "
            "Extract the features again with image_embedding among the outputs."
        )
    return inputs.class_embeddings
