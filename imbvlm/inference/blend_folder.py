"""The folder of a blend, format 3 of an exported model: passes of encoders, and members that share them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import PIL
import torch
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.method_registry import METHODS
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.inference.blend_merging import MergedHeads, TrainedMember, feature_form, merge_heads
from imbvlm.inference.blend_network import BlendNetwork, FeatureForm, FrozenPass, Head, TunedPass
from imbvlm.inference.model_parts import (
    CONFIG_FILE,
    EXPORT_AGAIN,
    check_preprocess,
    evaluation_input,
    load_encoder,
    without_paths,
    write_description,
    write_encoder,
    write_plugins,
)
from imbvlm.inference.model_record import BLEND_FORMAT, ModelRecord, PassRecord, input_names
from imbvlm.inference.predictor import Model
from imbvlm.models.model_builder import restore_head, restore_model
from imbvlm.training.checkpoint import CheckpointError, read_tensors, write_tensors

MERGED_FILE = "merged.safetensors"


def pass_folder(number: int) -> str:
    """The name of a pass's folder; passes count from 1."""
    return f"pass-{number}"


def head_file(number: int) -> str:
    """The name of a head's file in its pass's folder; heads count from 1."""
    return f"head-{number}.safetensors"


# -------------------------------------------------------------------------------------------------------- writing


def write_blend(
    folder: str,
    members: Sequence[TrainedMember],
    class_names: Sequence[str],
    scores: Mapping[str, Any],
    label_map: Mapping[str, int] | None = None,
) -> None:
    """Write a blend: each pass's encoder once, its members merged where that gives the same logits, and a description.

    Members of one encoder, image size, token pooling and number of crops share a pass, except those that train in the
    encoder. `label_map` maps the source's class ids to classes if those ids are not 0, 1, 2, ... Raises ImbvlmError for
    weights or temperatures that aren't above 0, and tensors that don't fit their configuration.
    """
    _check_members(members)
    total, inputs, passes, digests = sum(member.weight for member in members), list[Preprocess](), [], dict[str, str]()
    for number, group in enumerate(_grouped(members), 1):
        encoder = write_encoder(storage.join(folder, pass_folder(number)), group[0].config, group[0].encoder)
        merged = merge_heads(group, encoder.info, len(class_names), total)
        _write_tensors(folder, number, group, merged, digests)
        preprocess = evaluation_input(encoder.preprocess, group[0].config)
        if preprocess not in inputs:
            inputs.append(preprocess)
        passes.append((inputs.index(preprocess), _describe_pass(group, merged, encoder.info)))
    names = input_names(inputs)
    rest = {
        "inputs": [_describe_input(name, preprocess) for name, preprocess in zip(names, inputs, strict=True)],
        "pillow": PIL.__version__,
        "passes": [{"input": names[index], **described} for index, described in passes],
        "scores": dict(scores),
        "digests": digests,
        **write_plugins(folder, [member.config for member in members]),
    }
    write_description(folder, BLEND_FORMAT, class_names, label_map, rest)


def _check_members(members: Sequence[TrainedMember]) -> None:
    if not members:
        raise ImbvlmError("a blend must have a member, got none. Export a single trial.")
    for member in members:
        if not (0 < member.weight < math.inf and 0 < member.temperature < math.inf):
            raise ImbvlmError(
                f"a blend's weights and temperatures must be above 0, got {member.weight:g} and "
                f"{member.temperature:g} of {member.name}. Leave it out."
            )
        if not member.refits:
            raise ImbvlmError(f"a blend's member must have a refit, got none of {member.name}. Leave it out.")


def _grouped(members: Sequence[TrainedMember]) -> list[list[TrainedMember]]:
    """The members of each pass; equal weights under different names are one encoder."""
    groups = dict[object, list[TrainedMember]]()
    for number, member in enumerate(members):
        own = number if METHODS[member.config.method].trains_encoder else None
        info = replace(member.encoder.info, name="")
        key = (info, evaluation_input(member.encoder.preprocess, member.config), own)
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def _write_tensors(
    folder: str, number: int, group: Sequence[TrainedMember], merged: MergedHeads, digests: dict[str, str]
) -> None:
    """Write a pass's tensors, and add the digests of its files."""
    matrices = {f"weight_{index}": weight for index, weight in enumerate(merged.weights.values(), 1)}
    scales = torch.tensor(list(merged.scales.values()), dtype=torch.float64)
    tensors = {name: tensor.float() for name, tensor in {"bias": merged.bias, **matrices}.items()}
    files: dict[str, Mapping[str, Tensor]] = {MERGED_FILE: {**tensors, "scales": scales}}
    files |= {head_file(index): group[member].refits[0] for index, member in enumerate(merged.scales, 1)}
    for name, content in files.items():
        write_tensors(folder, f"{pass_folder(number)}/{name}", content, digests)


def _describe_pass(group: Sequence[TrainedMember], merged: MergedHeads, info: EncoderInfo) -> dict[str, Any]:
    configs = [without_paths(member.config) for member in group]
    heads = {member: index for index, member in enumerate(merged.scales, 1)}
    return {
        "encoder": {**asdict(info), "name": configs[0].encoder.name},
        "matrices": [form._asdict() for form in merged.weights],
        "members": [
            {
                "name": member.name,
                "weight": member.weight,
                "temperature": member.temperature,
                "num_refits": 1 if number in heads else len(member.refits),
                "head": heads.get(number),
                "post_hoc": None if member.post_hoc is None else member.post_hoc.to_dict(),
                "config": config.to_tree(),
            }
            for number, (member, config) in enumerate(zip(group, configs, strict=True))
        ],
    }


def _describe_input(name: str, preprocess: Preprocess) -> dict[str, Any]:
    return {
        "name": name,
        "num_crops": preprocess.num_crops,
        "preprocess": preprocess.to_dict(),
        "preprocess_fingerprint": preprocess.fingerprint(),
    }


# -------------------------------------------------------------------------------------------------------- loading


def load_blend(folder: str, name: str, description: Mapping[str, Any], device: torch.device) -> Model:
    """Load a blend from a local folder; `name` is the folder in errors.

    Raises ImbvlmError if the folder is incomplete or damaged, or if images would be prepared differently than in
    training.
    """
    record = ModelRecord.read(description, storage.join(name, CONFIG_FILE))
    passes = [_load_pass(folder, name, record, number, device) for number in range(1, len(record.passes) + 1)]
    network = BlendNetwork(passes, [each.input for each in record.passes]).to(device)
    return Model(network, record.inputs, record.class_names, device)


def _load_pass(
    folder: str, name: str, record: ModelRecord, number: int, device: torch.device
) -> FrozenPass | TunedPass:
    own, location = record.passes[number - 1], storage.join(name, pass_folder(number))
    config = own.members[0].config
    encoder = load_encoder(storage.join(folder, pass_folder(number)), location, config, own.weights_fingerprint, device)
    expected, fingerprint = record.inputs[own.input], record.input_fingerprints[own.input]
    check_preprocess(evaluation_input(encoder.preprocess, config), expected, fingerprint, record.pillow, location)
    num_classes = len(record.class_names)

    def read(file: str) -> dict[str, Tensor]:
        path = f"{pass_folder(number)}/{file}"
        return read_tensors(folder, path, {path: record.digests.get(path, "")})

    merged = read(MERGED_FILE)
    _check_merged(storage.join(location, MERGED_FILE), merged, own, encoder.info, num_classes)
    bias, scales = merged["bias"], merged["scales"].tolist()
    tensors = [read(head_file(index)) for index in range(1, len(scales) + 1)]
    if METHODS[config.method].trains_encoder:
        model = restore_model(config, encoder.info, num_classes, tensors[0], encoder)
        return TunedPass(model, bias, scales[0])
    heads = [
        Head(restore_head(member.config, encoder.info, num_classes, part), feature_form(member.config), scale)
        for member, part, scale in zip(own.heads, tensors, scales, strict=True)
    ]
    weights = [merged[f"weight_{index}"] for index in range(1, len(own.forms) + 1)]
    return FrozenPass(encoder, bias, own.forms, weights, heads)


def _check_merged(
    location: str, merged: Mapping[str, Tensor], own: PassRecord, info: EncoderInfo, num_classes: int
) -> None:
    """Raise CheckpointError where a pass's tensors aren't those of its description."""
    numbers = [member.head for member in own.heads]
    trains = [METHODS[member.config.method].trains_encoder for member in own.members]
    is_tuned_alone = len(trains) == len(numbers) == 1 and not own.forms
    if numbers != list(range(1, len(numbers) + 1)) or (any(trains) and not is_tuned_alone):
        raise CheckpointError(
            f"{location} can't belong to its description, whose members have the heads {numbers}. {EXPORT_AGAIN}"
        )
    expected = {"bias": (num_classes,), "scales": (len(numbers),), **_shapes_of(own.forms, info, num_classes)}
    actual = {name: tuple(tensor.shape) for name, tensor in merged.items()}
    if actual != expected:
        raise CheckpointError(
            f"{location} doesn't fit its description: its tensors have the shapes {actual}, and should have "
            f"{expected}. {EXPORT_AGAIN}"
        )


def _shapes_of(forms: Iterable[FeatureForm], info: EncoderInfo, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a pass's matrices by their names; no tensor has that of one on an output that the encoder lacks."""
    return {
        f"weight_{index}": (num_classes, *info.shapes.get(form.reads, (-1,))) for index, form in enumerate(forms, 1)
    }
