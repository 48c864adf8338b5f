"""What config.json says of an exported model: inputs, passes and members, of one classifier or a blend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.inference.blend_network import FeatureForm
from imbvlm.inference.model_parts import class_names_of, description_damage_named, evaluation_input, read_config
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment

# Formats of config.json: a model of one classifier, and a blend.
SINGLE_FORMAT, BLEND_FORMAT = 2, 3


@dataclass(frozen=True)
class MemberRecord:
    """A member. `head` is the number of its file; None where it is part of its pass's matrices.

    Its logits are the mean of `num_refits` refits. Weight, temperature and adjustment of a blend's members are for
    readers: the tensors are already multiplied by them.
    """

    name: str
    config: TrialConfig
    adjustment: PostHocAdjustment | None
    weight: float = 1.0
    temperature: float = 1.0
    num_refits: int = 1
    head: int | None = None

    @staticmethod
    def read(data: Mapping[str, Any], location: str) -> MemberRecord:
        """Read a member of a blend; raises KeyError, TypeError, ValueError or ConfigError."""
        head, weight, temperature = data["head"], float(data["weight"]), float(data["temperature"])
        if not (0 < weight < math.inf and 0 < temperature < math.inf):
            raise ValueError(f"weight and temperature must be above 0, got {weight:g} and {temperature:g}")
        if head is not None and (not isinstance(head, int) or head < 1):
            raise ValueError(f"head must be a number from 1 up or null, got {head!r}")
        config, adjustment = _config(data, location), _adjustment(data)
        return MemberRecord(str(data["name"]), config, adjustment, weight, temperature, int(data["num_refits"]), head)


@dataclass(frozen=True)
class PassRecord:
    """A pass: the number of its input from 0, its encoder, and its members.

    `forms` are those of the matrices that stand for all members without a file of their own.
    """

    input: int
    encoder: str
    weights_fingerprint: str
    forms: tuple[FeatureForm, ...]
    members: tuple[MemberRecord, ...]

    @staticmethod
    def read(data: Mapping[str, Any], input_names: Sequence[str], location: str) -> PassRecord:
        """Read a pass of a blend; raises KeyError, TypeError, ValueError or ConfigError."""
        forms = tuple(FeatureForm(**form) for form in data["matrices"])
        for form in forms:
            form.check()
        members = tuple(MemberRecord.read(member, location) for member in _some(data, "members"))
        encoder = data["encoder"]
        number = input_names.index(data["input"])
        return PassRecord(number, str(encoder["name"]), encoder["weights_fingerprint"], forms, members)

    @property
    def heads(self) -> list[MemberRecord]:
        """The members with a file of their own."""
        return [member for member in self.members if member.head is not None]


@dataclass(frozen=True)
class ModelRecord:
    """A model. `input_fingerprints` are those of the preprocessing of each input."""

    class_names: tuple[str, ...]
    inputs: tuple[Preprocess, ...]
    input_fingerprints: tuple[str, ...]
    passes: tuple[PassRecord, ...]
    pillow: str
    digests: Mapping[str, str]

    @staticmethod
    def read(description: Mapping[str, Any], location: str) -> ModelRecord:
        """Read a description of either format; raises ImbvlmError where it is damaged.

        `location` is the file in errors.
        """
        with description_damage_named(location):
            if description["format"] == SINGLE_FORMAT:
                inputs, fingerprints, passes = _read_single(description, location)
            else:
                described, names = description["inputs"], [each["name"] for each in description["inputs"]]
                inputs = tuple(Preprocess.from_dict(each["preprocess"]) for each in described)
                fingerprints = tuple(str(each["preprocess_fingerprint"]) for each in described)
                passes = tuple(PassRecord.read(each, names, location) for each in _some(description, "passes"))
            digests = dict(description.get("digests", {}))
            return ModelRecord(
                class_names_of(description), inputs, fingerprints, passes, str(description["pillow"]), digests
            )


def _read_single(
    description: Mapping[str, Any], location: str
) -> tuple[tuple[Preprocess, ...], tuple[str, ...], tuple[PassRecord, ...]]:
    """Input, fingerprint and pass of a model of one classifier, whose only member is called as its method."""
    config, encoder = _config(description, location), description["encoder"]
    preprocess = evaluation_input(Preprocess.from_dict(description["preprocess"]), config)
    members = (MemberRecord(config.method, config, _adjustment(description)),)
    only = PassRecord(0, str(encoder["name"]), encoder["weights_fingerprint"], (), members)
    return (preprocess,), (str(description["preprocess_fingerprint"]),), (only,)


def _config(data: Mapping[str, Any], location: str) -> TrialConfig:
    return read_config(data["config"], location)


def _adjustment(data: Mapping[str, Any]) -> PostHocAdjustment | None:
    adjusted = data["post_hoc"]
    names = ("tau", "alpha", "temperature")
    return None if adjusted is None else PostHocAdjustment(**{name: float(adjusted[name]) for name in names})


def _some(data: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    items: Sequence[Mapping[str, Any]] = data[key]
    if not items:
        raise ValueError(f"{key} is empty")
    return items


def input_names(inputs: Sequence[Preprocess]) -> list[str]:
    """The names of a model's inputs, in descriptions and graphs."""
    return ["images"] if len(inputs) == 1 else [f"images_{number}" for number in range(1, len(inputs) + 1)]
