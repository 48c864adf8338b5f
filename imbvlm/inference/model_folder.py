"""The folder of an exported model: written from a refit, loaded without Ray."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import PIL
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.json_file import damage_named
from imbvlm.base.yaml_file import YamlTree
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.files.file_listing import list_tree
from imbvlm.data.images.preprocess import FIVE_CROPS, Preprocess
from imbvlm.inference.predictor import InferenceModule, LogitPostprocessor, Model
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_builder import restore_model
from imbvlm.training.checkpoint import MODEL_FILE, read_tensors

CONFIG_FILE = "config.json"
ENCODER_FOLDER = "tower"
FORMAT = 2
# The names of the folders that an export of several trials writes.
_NUMBERED = re.compile(r"\d+-")


def evaluation_crops(preprocess: Preprocess, config: TrialConfig) -> tuple[Preprocess, int]:
    """The preprocessing of a configuration and its number of crops: one, or five whose logits are averaged."""
    if config.eval.tte == "five_crop":
        return preprocess.five_crop(config.eval.expand), len(FIVE_CROPS)
    return preprocess, 1


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
    encoder_folder = storage.join(folder, ENCODER_FOLDER)
    encoder.save(encoder_folder)
    with _local_copy(encoder_folder) as local:
        # Read back, so that the description is of the encoder that a user will load.
        written = _load_encoder(local, config, encoder.device)
    weights = save_safetensors(tensors)
    storage.write_bytes(storage.join(folder, MODEL_FILE), weights)
    digests = {MODEL_FILE: hashlib.sha256(weights).hexdigest()}
    config = without_paths(config)
    description = {
        "format": FORMAT,
        "library_name": "imbvlm",
        "class_names": list(class_names),
        "label_map": None if label_map is None else dict(label_map),
        "preprocess": written.preprocess.to_dict(),
        "preprocess_fingerprint": written.preprocess.fingerprint(),
        "pillow": PIL.__version__,
        "encoder": {**written.info.to_dict(), "name": config.encoder.name},
        "config": config.to_tree(),
        "scores": scores,
        "post_hoc": None if post_hoc is None else post_hoc.write(folder, digests),
        "digests": digests,
    }
    storage.write_bytes(
        storage.join(folder, CONFIG_FILE), json.dumps(description, indent=1, ensure_ascii=False).encode()
    )


def without_paths(config: TrialConfig) -> TrialConfig:
    """The configuration with file names in place of this machine's paths, since other people get exported models."""
    overrides = {"data.manifest": PurePosixPath(config.data.manifest).name}
    if config.encoder.name.startswith("local-dir:"):
        overrides["encoder.name"] = f"local-dir:{PurePosixPath(config.encoder.name).name}"
    if config.encoder.weights is not None:
        overrides["encoder.weights"] = PurePosixPath(config.encoder.weights).name
    return config.with_overrides(overrides)


def _load_encoder(folder: str, config: TrialConfig, device: torch.device) -> Encoder:
    encoder = EncoderConfig(name=f"local-dir:{folder}", token_pooling=config.encoder.token_pooling)
    return create_encoder(encoder, config.eval, device, with_text=False)


@contextmanager
def _local_copy(folder: str) -> Iterator[str]:
    """Within, a local folder itself, or a local copy of a folder in an object store."""
    if storage.is_local(folder):
        yield str(storage.local_path(folder))
        return
    with TemporaryDirectory() as copy:
        for file in list_tree(folder):
            storage.write_bytes(storage.join(copy, file.path), storage.read_bytes(storage.join(folder, file.path)))
        yield copy


def load(folder: str | Path, device: str | torch.device | None = None) -> Model:
    """Load a model that `imbvlm export` wrote, also from s3://, by default onto a GPU if there is one.

    Raises ImbvlmError if the folder is incomplete or damaged, or if images would be prepared differently than in
    training.
    """
    location = model_folder(str(folder))
    # Read before the copy, so that an error names the user's folder.
    description = read_description(location)
    with _local_copy(location) as local:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return _load(local, location, description, device)


def model_folder(folder: str) -> str:
    """The folder with config.json: the given one or its model/; raises ImbvlmError if neither has it."""
    for candidate in (folder, storage.join(folder, "model")):
        if storage.exists(storage.join(candidate, CONFIG_FILE)):
            return candidate
    numbered = [name for name in storage.list_files(folder) if _NUMBERED.match(name)]
    paths = [storage.join(folder, name) for name in numbered]
    exported = [path for path in paths if storage.exists(storage.join(path, "model", CONFIG_FILE))]
    if exported:
        raise ImbvlmError(f"{folder} has several exported models. Name one of them: {', '.join(exported)}")
    raise ImbvlmError(
        f"{folder} has no {CONFIG_FILE}, so it is no exported model. Write one with `imbvlm export SWEEP -o {folder}`."
    )


def read_description(folder: str) -> dict[str, Any]:
    """The content of a model's config.json; raises ImbvlmError for a damaged one or another format."""
    location = storage.join(folder, CONFIG_FILE)
    with _damage_named(location):
        description: dict[str, Any] = storage.read_json(location)
        version = description["format"]
    if version != FORMAT:
        raise ImbvlmError(f"{location} has format {version}, and this version reads {FORMAT}. Export the model again.")
    return description


def _damage_named(location: str) -> AbstractContextManager[None]:
    return damage_named(f"{location} is not a model's description", "Export the model again.")


def described_crops(folder: str) -> tuple[Preprocess, int]:
    """The preprocessing and the number of crops of a model, without loading it; raises ImbvlmError."""
    location, description = storage.join(folder, CONFIG_FILE), read_description(folder)
    with _damage_named(location):
        tree, preprocess = description["config"], Preprocess.from_dict(description["preprocess"])
    return evaluation_crops(preprocess, TrialConfig.from_record(YamlTree(tree, location)))


def _class_names(description: Mapping[str, Any]) -> tuple[str, ...]:
    names = description["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names is no list of names")
    return tuple(names)


def _load(folder: str, name: str, description: Mapping[str, Any], device: torch.device) -> Model:
    """Load a model from a local folder; `name` is the folder in errors."""
    description_file = storage.join(name, CONFIG_FILE)
    with _damage_named(description_file):
        class_names, preprocess = _class_names(description), Preprocess.from_dict(description["preprocess"])
        tree, fingerprint = description["config"], description["encoder"]["weights_fingerprint"]
        preprocess_fingerprint, pillow = description["preprocess_fingerprint"], description["pillow"]
        adjusted, digests = description["post_hoc"], dict(description.get("digests", {}))
        post_hoc = None if adjusted is None else LogitPostprocessor.read(folder, adjusted, len(class_names), digests)
    config = TrialConfig.from_record(YamlTree(tree, description_file))
    encoder = _load_encoder(storage.join(folder, ENCODER_FOLDER), config, device)
    if encoder.info.weights_fingerprint != fingerprint:
        raise ImbvlmError(
            f"the encoder in {name} is not the one that the classifier was trained on. Export the model again."
        )
    infinite = next(
        (key for key, param in encoder.image_tower.named_parameters() if not torch.isfinite(param).all()), None
    )
    if infinite is not None:
        raise ImbvlmError(
            f"the encoder in {name} has numbers that aren't finite in {infinite}, so its probabilities would mean "
            "nothing. Export the model again."
        )
    if encoder.preprocess != preprocess:
        raise ImbvlmError(
            f"this version prepares images differently than in the training of {name}: {encoder.preprocess} instead of "
            f"{preprocess}. Export the model again."
        )
    if preprocess.fingerprint() != preprocess_fingerprint:
        raise ImbvlmError(
            f"images are resized differently here (Pillow {PIL.__version__}) than where {name} was exported (Pillow "
            f"{pillow}), so its probabilities would mean nothing. Install pillow=={pillow}, or export the model here."
        )
    weights = read_tensors(folder, MODEL_FILE, digests)
    classifier = restore_model(config, encoder.info, len(class_names), weights, encoder)
    network = InferenceModule(encoder, classifier, config, post_hoc).to(device)
    return Model(network, *evaluation_crops(preprocess, config), class_names, device)
