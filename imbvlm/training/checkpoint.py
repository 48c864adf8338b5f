"""A trial's state and exported weights on disk or S3, as safetensors and JSON, never pickle; written whole or not."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.models.model_state import own_state_dict

FORMAT = 1
INDEX_FILE = "state.json"
MODEL_FILE = "model.safetensors"
# Twice the size of open_clip's largest image tower, 1.8 billion parameters of 4 bytes.
_MAX_MODEL_BYTES = 16_000_000_000
TENSORS_NAME = re.compile(r"state-[0-9a-f]{16}\.safetensors")


class CheckpointError(ImbvlmError):
    """A checkpoint that is damaged, incomplete or of another trial; the sentence names it.

    The trial starts again from its first epoch, so that the sentence needs no fix.
    """


@dataclass(frozen=True)
class TrialState:
    """The state with which a trial resumes: `tensors` by name, and plain `scalars` (epoch, step, best values)."""

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: str, state: TrialState) -> None:
    """Write a checkpoint to a local or s3:// folder; it replaces the one before.

    The tensors are written first, to a file named by their digest, and the index, which names that file, last. A reader
    thus sees the old checkpoint or the new one whenever the writer dies, also in S3, which can't rename.
    """
    data = save_safetensors(_portable(state.tensors))
    digest = hashlib.sha256(data).hexdigest()
    name = f"state-{digest[:16]}.safetensors"
    storage.write_bytes(storage.join(folder, name), data)
    index = {"format": FORMAT, "tensors_file": name, "tensors_sha256": digest, "scalars": dict(state.scalars)}
    storage.write_json(storage.join(folder, INDEX_FILE), index)
    for other in storage.list_files(folder):
        if other.startswith("state-") and other != name:
            storage.delete(storage.join(folder, other))


def has_checkpoint(folder: str) -> bool:
    """Whether a folder has a checkpoint, intact or damaged."""
    return storage.exists(storage.join(folder, INDEX_FILE))


def load_checkpoint(folder: str, device: str | torch.device = "cpu") -> TrialState:
    """Read a checkpoint to a device; raises CheckpointError where it is missing, incomplete or damaged."""
    where = storage.join(folder, INDEX_FILE)
    if not has_checkpoint(folder):
        raise CheckpointError(f"no checkpoint in {folder}: {INDEX_FILE} is not there")
    try:
        index = storage.read_json(where)
        version, name = index["format"], str(index["tensors_file"])
        digest, scalars = str(index["tensors_sha256"]), dict(index["scalars"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's index {where} is damaged ({error!r})") from None
    if not TENSORS_NAME.fullmatch(name):
        raise CheckpointError(f"the checkpoint's index {where} names {name!r}, which is not one of its files")
    if version != FORMAT:
        raise CheckpointError(f"{where} has format {version}, and this version reads {FORMAT}")
    tensors = _read_tensors(folder, name, digest)
    return TrialState({key: tensor.to(device) for key, tensor in tensors.items()}, scalars)


def save_model(folder: str, model: nn.Module) -> None:
    """Export a model's own parameters and buffers as `model.safetensors` in a local or s3:// folder.

    An encoder's frozen parameters are left out, since the encoder has its own file.
    """
    storage.write_bytes(storage.join(folder, MODEL_FILE), save_safetensors(_portable(own_state_dict(model))))


def load_model_tensors(folder: str) -> dict[str, Tensor]:
    """The tensors that `save_model` wrote, by name; raises CheckpointError where the file is damaged."""
    return read_tensors(folder, MODEL_FILE, {})


def write_tensors(folder: str, name: str, tensors: Mapping[str, Tensor], digests: dict[str, str]) -> None:
    """Write a file that `read_tensors` reads, and add its digest by its name."""
    data = save_safetensors(_portable(tensors))
    storage.write_bytes(storage.join(folder, name), data)
    digests[name] = hashlib.sha256(data).hexdigest()


def read_tensors(folder: str, name: str, digests: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file in an exported model's folder; raises CheckpointError.

    The file must have its digest, where `digests` has one by its name, and every number in it must be finite.
    """
    where, fix = storage.join(folder, name), "Copy the folder again, or export the model again."
    data = storage.read_bytes(where, _MAX_MODEL_BYTES)
    if name in digests and hashlib.sha256(data).hexdigest() != digests[name]:
        raise CheckpointError(f"{where} is damaged: its content isn't what was exported. {fix}")
    tensors = _parse(data, where, ". Export the model again.")
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{where} has numbers that aren't finite in {key}, so that probabilities would mean nothing. {fix}"
            )
    return tensors


def _read_tensors(folder: str, name: str, digest: str) -> dict[str, Tensor]:
    where = storage.join(folder, name)
    if not storage.exists(where):
        raise CheckpointError(f"the checkpoint in {folder} is incomplete: {name} is not there")
    data = storage.read_bytes(where)
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{where} is damaged: its content isn't what was written")
    return _parse(data, where)


def _parse(data: bytes, where: str, fix: str = "") -> dict[str, Tensor]:
    try:
        return dict(load_safetensors(data))
    except SafetensorError as error:
        raise CheckpointError(f"{where} is damaged ({error}){fix}") from None


def _portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous and without shared memory, as safetensors requires."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        if value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        result[name] = value
    return result


def as_tensor_names(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a mapping, with a prefix before their names."""
    return {f"{prefix}{name}": value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
