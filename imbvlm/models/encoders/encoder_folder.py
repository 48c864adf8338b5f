"""Writes a loaded tower as a folder that `local-dir:` reads, so that an exported model needs no download."""

from __future__ import annotations

import copy
import json

from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save

from imbvlm.base import storage
from imbvlm.models.encoders.encoder_registry import CONFIG_FILE
from imbvlm.models.encoders.open_clip_encoder import Encoder

WEIGHTS_FILE = HF_SAFE_WEIGHTS_NAME


def save_encoder(encoder: Encoder, folder: str) -> None:
    """Write the whole open_clip model at its present image size: configuration, preprocessing and weights."""
    source = encoder.source
    model_config = copy.deepcopy(dict(source.model_config))
    # Positions were interpolated to this size when the tower was loaded.
    model_config["vision_cfg"]["image_size"] = encoder.info.image_size
    model_config["quick_gelu"] = source.quick_gelu
    if "timm_model_name" in model_config["vision_cfg"]:
        model_config["vision_cfg"]["timm_model_pretrained"] = False
    description = {"model_cfg": model_config, "preprocess_cfg": dict(source.preprocess)}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.model.state_dict().items()}
    storage.write_bytes(storage.join(folder, WEIGHTS_FILE), save(tensors))
    storage.write_bytes(storage.join(folder, CONFIG_FILE), json.dumps(description, indent=1).encode())
