"""What config.json says of an exported model: inputs, passes and members, of one classifier or a blend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.inference.blend_network import FeatureForm
from imbvlm.inference.model_parts import class_names_of, description_damage_named, evaluation_input, read_config

# Formats of config.json: a model of one classifier, and a blend.
SINGLE_FORMAT, BLEND_FORMAT = 2, 3


@dataclass(frozen=True)
class MemberRecord:
    """A member. `head` is the number of its file; None where it is part of its pass's matrices.

    Weight, temperature, adjustment and number of refits in the description are for people: the tensors already have
    them.
    """

    config: TrialConfig
    head: int | None = None

    @staticmethod
    def read(data: Mapping[str, Any], location: str) -> MemberRecord:
        """Read a member of a blend; raises KeyError, TypeError, ValueError or ConfigError."""
        head = data["head"]
        if head is not None and (not isinstance(head, int) or head < 1):
            raise ValueError(f"head must be a number from 1 up or null, got {head!r}")
        return MemberRecord(read_config(data["config"], location), head)


@dataclass(frozen=True)
class PassRecord:
    """A pass: the number of its input from 0, the digest of its encoder's weights, and its members.

    `forms` are those of the matrices that stand for all members without a file of their own.
    """

    input: int
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
        number = input_names.index(data["input"])
        return PassRecord(number, data["encoder"]["weights_fingerprint"], forms, members)

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
    """Input, fingerprint and pass of a model of one classifier."""
    config = read_config(description["config"], location)
    preprocess = evaluation_input(Preprocess.from_dict(description["preprocess"]), config)
    only = PassRecord(0, description["encoder"]["weights_fingerprint"], (), (MemberRecord(config),))
    return (preprocess,), (str(description["preprocess_fingerprint"]),), (only,)


def _some(data: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    items: Sequence[Mapping[str, Any]] = data[key]
    if not items:
        raise ValueError(f"{key} is empty")
    return items


def input_names(inputs: Sequence[Preprocess]) -> list[str]:
    """The names of a model's inputs, in descriptions and graphs."""
    return ["images"] if len(inputs) == 1 else [f"images_{number}" for number in range(1, len(inputs) + 1)]
