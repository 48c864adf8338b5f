"""A blend's members as few products as give the same logits: the weighted mean of their adjusted logits.

A member's logits are z / T with z = (1 - alpha) (f(x) - tau log prior) + alpha zero-shot(x). Where f is an affine map
of a form of the encoder's output, maps of one form add up to one; zero-shot logits are one of the image embedding's
direction, and the prior's term is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.inference.blend_network import FeatureForm
from imbvlm.inference.predictor import LogitPostprocessor
from imbvlm.longtail.logits import log_prior
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.models.classifier import AffineMap, ZeroShotClassifier, affine_map
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.model_builder import restore_head


@dataclass(frozen=True)
class TrainedMember:
    """A trained classifier in a blend, as it would be exported alone.

    `refits` has the classifier's own tensors from each refit, without those of the frozen encoder. The logits of an
    affine map are the mean of all refits', other logits those of the first. Adjusted, they are divided by
    `temperature` and count by `weight`, both above 0.
    """

    name: str
    config: TrialConfig
    refits: Sequence[Mapping[str, Tensor]]
    encoder: Encoder
    weight: float = 1.0
    temperature: float = 1.0
    post_hoc: LogitPostprocessor | None = None


@dataclass(frozen=True)
class MergedHeads:
    """The members of one pass: bias (C,), weights (C, D) by form, and factors of the members that are no matrix.

    `scales` have the numbers of those members. Numbers are in float64.
    """

    bias: Tensor
    weights: Mapping[FeatureForm, Tensor]
    scales: Mapping[int, float]


def merge_heads(
    members: Sequence[TrainedMember], info: EncoderInfo, num_classes: int, total_weight: float
) -> MergedHeads:
    """Merge the members of one pass, whose weights count against `total_weight`, that of the whole blend.

    Raises ImbvlmError where tensors don't fit their configuration.
    """
    bias = torch.zeros(num_classes, dtype=torch.float64)
    weights, scales = dict[FeatureForm, Tensor](), dict[int, float]()
    for number, member in enumerate(members):
        post_hoc = member.post_hoc or LogitPostprocessor(PostHocAdjustment(), (1,) * num_classes)
        adjustment = post_hoc.adjustment
        scale = member.weight / total_weight / member.temperature / adjustment.temperature
        own_scale = scale * (1 - adjustment.alpha)
        bias -= own_scale * adjustment.tau * log_prior(post_hoc.class_counts, bias.device)
        head = None if METHODS[member.config.method].trains_encoder else _affine_head(member, info, num_classes)
        maps = [] if head is None else [(_form_of(member.config, head.is_normalized), head.scaled(own_scale))]
        if head is None:
            scales[number] = own_scale
        if adjustment.alpha:
            embedding = FeatureForm("image_embedding", member.config.features.precision, is_normalized=True)
            maps.append((embedding, _zero_shot(member, info, num_classes).scaled(scale * adjustment.alpha)))
        for form, part in maps:
            weights[form] = weights[form] + part.weight if form in weights else part.weight
            bias += part.bias
    return MergedHeads(bias, weights, scales)


def is_affine(config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the logits of a mean of weights are the mean of the logits; raises ImbvlmError for other tensors."""
    if METHODS[config.method].trains_encoder:
        return False
    return affine_map(restore_head(config, info, num_classes, tensors)) is not None


def feature_form(config: TrialConfig) -> FeatureForm:
    """The form that a head on a frozen encoder reads."""
    return _form_of(config, is_normalized=False)


def _form_of(config: TrialConfig, is_normalized: bool) -> FeatureForm:
    # A trial that ran the frozen encoder on images has seen its output unrounded.
    precision = "float32" if config.reads_images else config.features.precision
    return FeatureForm(METHODS[config.method].reads, precision, is_normalized)


def _affine_head(member: TrainedMember, info: EncoderInfo, num_classes: int) -> AffineMap | None:
    """The mean of a member's refits as a map; None where it is none."""
    maps = [affine_map(restore_head(member.config, info, num_classes, tensors)) for tensors in member.refits]
    affine = [each.scaled(1 / len(maps)) for each in maps if each is not None]
    if not affine:
        return None
    weight, bias = torch.stack([each.weight for each in affine]), torch.stack([each.bias for each in affine])
    return AffineMap(weight.sum(dim=0), bias.sum(dim=0), affine[0].is_normalized)


def _zero_shot(member: TrainedMember, info: EncoderInfo, num_classes: int) -> AffineMap:
    embeddings = None if member.post_hoc is None else member.post_hoc.class_embeddings
    if embeddings is None or METHODS[member.config.method].trains_encoder:
        raise ImbvlmError(
            "alpha mixes in zero-shot logits of class embeddings and an encoder as it was pretrained, and "
            f"{member.name} lacks one of them. Set its alpha to 0."
        )
    if embeddings.shape != (num_classes, info.text_space.width):
        raise ImbvlmError(
            f"class embeddings must be {num_classes} x {info.text_space.width}, got {tuple(embeddings.shape)} of "
            f"{member.name}. Give those of its encoder."
        )
    return ZeroShotClassifier(embeddings.cpu(), info.text_space.logit_scale).affine()
