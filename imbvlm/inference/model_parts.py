"""Parts of an exported model's folder that every format has: description, encoder, preprocessing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import PIL
import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.json_file import damage_named
from imbvlm.base.plugin_files import write_copies
from imbvlm.base.yaml_file import YamlTree
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import SECOND_STAGES
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.files.file_listing import list_tree
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder

CONFIG_FILE = "config.json"
ENCODER_FOLDER = "tower"
EXPORT_AGAIN = "Export the model again."


def without_paths(config: TrialConfig) -> TrialConfig:
    """The configuration with file names in place of this machine's paths, since other people get exported models."""
    overrides = {"data.manifest": PurePosixPath(config.data.manifest).name}
    if config.encoder.name.startswith("local-dir:"):
        overrides["encoder.name"] = f"local-dir:{PurePosixPath(config.encoder.name).name}"
    if config.encoder.weights is not None:
        overrides["encoder.weights"] = PurePosixPath(config.encoder.weights).name
    if config.prompts is not None and config.prompts.texts is not None:
        overrides["prompts.texts"] = PurePosixPath(config.prompts.texts).name
    return config.with_overrides(overrides)


def evaluation_input(preprocess: Preprocess, config: TrialConfig) -> Preprocess:
    """An encoder's preprocessing as a configuration predicts: of one crop, or of five whose logits are averaged."""
    return preprocess.five_crop(config.eval.expand) if config.eval.tte == "five_crop" else preprocess


# ---------------------------------------------------------------------------------------------------- description


def write_description(
    folder: str,
    version: int,
    class_names: Sequence[str],
    label_map: Mapping[str, int] | None,
    rest: Mapping[str, Any],
) -> None:
    """Write config.json, which makes a folder a model; `rest` has the keys that differ between formats."""
    description = {
        "format": version,
        "library_name": "imbvlm",
        "class_names": list(class_names),
        "label_map": None if label_map is None else dict(label_map),
        **rest,
    }
    text = json.dumps(description, indent=1, ensure_ascii=False)
    storage.write_bytes(storage.join(folder, CONFIG_FILE), text.encode())


def description_damage_named(location: str) -> AbstractContextManager[None]:
    """Within, what a damaged description makes Python raise becomes an ImbvlmError."""
    return damage_named(f"{location} is not a model's description", EXPORT_AGAIN)


def write_plugins(folder: str, configs: Sequence[TrialConfig]) -> dict[str, Any]:
    """Write the code of the plug-ins that predictions need; return their digests as an entry of the description.

    A loss isn't needed: the weights are trained.
    """
    methods = [(config.plugins, METHODS.kind, config.method) for config in configs]
    stages = [(config.plugins, SECOND_STAGES.kind, each.name) for config in configs if (each := config.second_stage)]
    needed = {
        plugins.adding(kind, name)
        for plugins, kind, name in [*methods, *stages]
        if name in plugins.entries.get(kind, {})
    }
    sources = sorted(needed, key=lambda source: source.name)
    write_copies(folder, sources)
    return {"plugins": {source.name: source.digest for source in sources}} if sources else {}


def read_config(tree: Any, location: str) -> TrialConfig:
    """A configuration in a description, with the default in place of a plug-in's loss. Raises ConfigError."""
    loss = tree.get("loss") if isinstance(tree, dict) else None
    if isinstance(loss, dict) and loss.get("name") not in LOSSES:
        tree = {key: section for key, section in tree.items() if key != "loss"}
    return TrialConfig.from_record(YamlTree(tree, location))


def class_names_of(description: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names in a description; raises KeyError or TypeError."""
    names = description["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names is no list of names")
    return tuple(names)


# -------------------------------------------------------------------------------------------------------- encoder


def write_encoder(folder: str, config: TrialConfig, encoder: Encoder) -> Encoder:
    """Write an encoder below a folder, and return it as a user will load it."""
    location = storage.join(folder, ENCODER_FOLDER)
    encoder.save(location)
    with local_copy(location) as local:
        return _create(local, config, encoder.device)


def load_encoder(
    folder: str, name: str, config: TrialConfig, weights_fingerprint: str, device: torch.device
) -> Encoder:
    """The encoder below a local folder; `name` is the folder in errors.

    Raises ImbvlmError where its weights have another fingerprint.
    """
    encoder = _create(storage.join(folder, ENCODER_FOLDER), config, device)
    if encoder.info.weights_fingerprint != weights_fingerprint:
        raise ImbvlmError(f"the encoder in {name} is not the one that the classifier was trained on. {EXPORT_AGAIN}")
    return encoder


def check_preprocess(actual: Preprocess, expected: Preprocess, fingerprint: str, pillow: str, name: str) -> None:
    """Raise ImbvlmError where images would be prepared differently than in training."""
    if actual != expected:
        raise ImbvlmError(
            f"this version prepares images differently than in the training of {name}: {actual} instead of "
            f"{expected}. {EXPORT_AGAIN}"
        )
    if expected.fingerprint() != fingerprint:
        raise ImbvlmError(
            f"images are resized differently here (Pillow {PIL.__version__}) than where {name} was exported (Pillow "
            f"{pillow}), so its probabilities would mean nothing. Install pillow=={pillow}, or export the model here."
        )


def _create(folder: str, config: TrialConfig, device: torch.device) -> Encoder:
    encoder = EncoderConfig(name=f"local-dir:{folder}", token_pooling=config.encoder.token_pooling)
    return create_encoder(encoder, config.eval, device, with_text=False)


@contextmanager
def local_copy(folder: str) -> Iterator[str]:
    """Within, a local folder itself, or a local copy of a folder in an object store."""
    if storage.is_local(folder):
        yield str(storage.local_path(folder))
        return
    with TemporaryDirectory() as copy:
        for file in list_tree(folder):
            storage.write_bytes(storage.join(copy, file.path), storage.read_bytes(storage.join(folder, file.path)))
        yield copy
