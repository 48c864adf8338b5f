"""The folder of an exported model: written from a refit, loaded without Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.plugin_files import read_digests, require_plugins, use_plugins
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.inference.blend_folder import load_blend
from imbvlm.inference.calibration_file import ModelCalibration
from imbvlm.inference.model_parts import (
    CONFIG_FILE,
    EXPORT_AGAIN,
    check_preprocess,
    class_names_of,
    description_damage_named,
    evaluation_input,
    load_encoder,
    local_copy,
    read_config,
    without_paths,
    write_description,
    write_encoder,
    write_plugins,
)
from imbvlm.inference.model_record import BLEND_FORMAT, SINGLE_FORMAT, ModelRecord
from imbvlm.inference.predictor import InferenceModule, LogitPostprocessor, Model
from imbvlm.inference.taxonomy_file import ModelTaxonomy
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.model_builder import restore_model
from imbvlm.training.checkpoint import MODEL_FILE, read_tensors, write_tensors

# The names of the folders that an export of several trials writes.
_NUMBERED = re.compile(r"\d+-")


def write_model(
    folder: str,
    config: TrialConfig,
    tensors: dict[str, Tensor],
    encoder: Encoder,
    class_names: Sequence[str],
    scores: dict[str, Any],
    post_hoc: LogitPostprocessor | None = None,
    label_map: Mapping[str, int] | None = None,
) -> None:
    """Write weights, encoder, class names, preprocessing and adjustment: everything that prediction needs.

    `label_map` maps the source's class ids to classes if those ids are not 0, 1, 2, ...
    """
    written = write_encoder(folder, config, encoder)
    digests = dict[str, str]()
    write_tensors(folder, MODEL_FILE, tensors, digests)
    config = without_paths(config)
    rest = {
        "preprocess": written.preprocess.to_dict(),
        "preprocess_fingerprint": written.preprocess.fingerprint(),
        "pillow": PIL.__version__,
        "encoder": {**asdict(written.info), "name": config.encoder.name},
        "config": config.to_tree(),
        "scores": scores,
        "post_hoc": None if post_hoc is None else post_hoc.write(folder, digests),
        "digests": digests,
        **write_plugins(folder, [config]),
    }
    write_description(folder, SINGLE_FORMAT, class_names, label_map, rest)


def load(folder: str | Path, device: str | torch.device | None = None, *, plugins: Sequence[str | Path] = ()) -> Model:
    """Load a model that `imbvlm export` wrote, also from s3://, by default onto a GPU if there is one.

    A model that needs plug-ins is loaded where they are named, or active, and have the code that it was exported with.
    Its own copies don't run by themselves. Raises ImbvlmError if the folder is incomplete or damaged, or if images
    would be prepared differently than in training.
    """
    if plugins:
        with use_plugins(*map(str, plugins)):
            return load(folder, device)
    location = model_folder(str(folder))
    # Read before the copy, so that an error names the user's folder.
    description = read_description(location)
    with local_copy(location) as local:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        read = load_blend if description["format"] == BLEND_FORMAT else _load
        model = read(local, location, description, device)
    names = model.class_names
    return model.completed(ModelTaxonomy.read(location, names), ModelCalibration.read(location, names))


def model_folder(folder: str) -> str:
    """The folder with config.json: the given one or its model/; raises ImbvlmError if neither has it."""
    for candidate in (folder, storage.join(folder, "model")):
        if storage.exists(storage.join(candidate, CONFIG_FILE)):
            return candidate
    numbered = [name for name in storage.list_files(folder) if _NUMBERED.match(name)]
    paths = [storage.join(folder, name) for name in numbered]
    exported = [path for path in paths if storage.exists(storage.join(path, "model", CONFIG_FILE))]
    if exported:
        raise ImbvlmError(f"{folder} has several exported models. Name one of {', '.join(exported)}.")
    raise ImbvlmError(
        f"{folder} has no {CONFIG_FILE}, so it is no exported model. Write one with `imbvlm export SWEEP -o {folder}`."
    )


def read_description(folder: str) -> dict[str, Any]:
    """The content of a model's config.json; raises ImbvlmError for a damaged one or another format.

    Raises PluginNeededError where a plug-in that the model needs isn't active, or has other code.
    """
    location = storage.join(folder, CONFIG_FILE)
    with description_damage_named(location):
        description: dict[str, Any] = storage.read_json(location)
        version, plugins = description["format"], read_digests(description.get("plugins", {}))
    if version not in (SINGLE_FORMAT, BLEND_FORMAT):
        raise ImbvlmError(
            f"{location} has format {version}, and this version reads {SINGLE_FORMAT} and {BLEND_FORMAT}. "
            f"{EXPORT_AGAIN}"
        )
    require_plugins(folder, plugins)
    return description


def read_record(folder: str) -> ModelRecord:
    """Inputs, passes and members of a model, without loading it; raises ImbvlmError."""
    return ModelRecord.read(read_description(folder), storage.join(folder, CONFIG_FILE))


def _load(folder: str, name: str, description: Mapping[str, Any], device: torch.device) -> Model:
    """Load a model of one classifier from a local folder; `name` is the folder in errors."""
    description_file = storage.join(name, CONFIG_FILE)
    with description_damage_named(description_file):
        class_names, preprocess = class_names_of(description), Preprocess.from_dict(description["preprocess"])
        tree, fingerprint = description["config"], description["encoder"]["weights_fingerprint"]
        preprocess_fingerprint, pillow = description["preprocess_fingerprint"], description["pillow"]
        adjusted, digests = description["post_hoc"], dict(description.get("digests", {}))
    config = read_config(tree, description_file)
    encoder = load_encoder(folder, name, config, fingerprint, device)
    width, post_hoc = encoder.info.embedding_width, None
    if adjusted is not None:
        with description_damage_named(description_file):
            post_hoc = LogitPostprocessor.read(folder, adjusted, len(class_names), width, digests)
    check_preprocess(encoder.preprocess, preprocess, preprocess_fingerprint, pillow, name)
    weights = read_tensors(folder, MODEL_FILE, digests)
    classifier = restore_model(config, encoder.info, len(class_names), weights, encoder)
    network = InferenceModule(encoder, classifier, config, post_hoc).to(device)
    return Model(network, [evaluation_input(preprocess, config)], class_names, device)
