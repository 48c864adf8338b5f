"""Image-text encoders by open_clip."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from open_clip.factory import _find_checkpoint_in_dir, load_checkpoint
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from imbvlm.config.input_sections import LOCAL_DIR
from imbvlm.models.encoders.encoder import TextEncoder
from imbvlm.models.encoders.encoder_source import EncoderSource
from imbvlm.models.encoders.image_encoder import BUILD_ERRORS, ImageEncoder, build_error, write_model
from imbvlm.models.encoders.open_clip_names import CONFIG_FILE
from imbvlm.models.encoders.open_clip_text import OpenClipText, quiet_logging, require_transformers

# Stands in for the text tower of a model folder, which is loaded without one.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class OpenClipEncoder(ImageEncoder):
    """An encoder by open_clip, whose image tower is one of the classes of encoder_outputs.OUTPUTS."""

    @staticmethod
    def build(source: EncoderSource, weights: str | None, device: str, with_text: bool) -> Any:
        """open_clip's model with its weights, or without any on the meta device; raises ImbvlmError.

        Without `with_text` only the image side of a folder that `save` wrote is filled, and nothing that its
        description names is fetched: no text tower, no tokenizer.
        """
        if with_text and source.model_config["text_cfg"].get("hf_model_name"):
            require_transformers(source.name, "the text tower")
        loads = device != "meta"
        try:
            is_resized = _is_resized(source)
            with quiet_logging():
                model = open_clip.create_model(
                    source.model,
                    pretrained=weights,
                    load_weights=loads and with_text and not is_resized,
                    require_pretrained=loads and with_text and not is_resized,
                    force_quick_gelu=source.quick_gelu,
                    pretrained_text=False,
                    device=device,
                    **({} if with_text else {"text_cfg": dict(_NO_TEXT)}),
                )
                if is_resized:
                    model.visual.set_input_size(source.model_config["vision_cfg"]["image_size"])
                if loads and with_text and is_resized:
                    load_checkpoint(model, _find_checkpoint_in_dir(Path(source.model.removeprefix(LOCAL_DIR))))
                if loads and not with_text:
                    _load_image_side(model, source.model.removeprefix(LOCAL_DIR))
                return model
        except BUILD_ERRORS as error:
            raise build_error(source, weights, error) from None

    @staticmethod
    def image_tower_of(model: Any) -> Any:
        """open_clip's `visual`."""
        return model.visual

    @staticmethod
    def switches(source: EncoderSource, image_tower: nn.Module) -> Mapping[str, Any]:
        """The class, the activation and the settings of the image tower."""
        config = source.model_config
        return {
            "class": type(image_tower).__name__,
            "quick_gelu": source.quick_gelu,
            "embed_dim": config["embed_dim"],
            "vision": config["vision_cfg"],
        }

    @staticmethod
    def logit_scale(source: EncoderSource, model: Any) -> float:
        """Factor on cosine similarities, an untrained model's on the meta device."""
        if model.logit_scale.is_meta:
            return float(np.exp(source.model_config.get("init_logit_scale", np.log(1 / 0.07))))
        return float(model.logit_scale.detach().exp())

    @staticmethod
    def text_of(source: EncoderSource, model: Any) -> TextEncoder:
        """The text side of a model."""
        return OpenClipText(source, model)

    def own_output(self, pixels: Tensor) -> Tensor:
        """open_clip's `encode_image`."""
        embedding: Tensor = self.model.encode_image(pixels)
        return embedding

    def save(self, folder: str) -> None:
        """Write the whole model at its present image size: configuration, preprocessing and weights."""
        source = self.source
        model_config = copy.deepcopy(dict(source.model_config))
        # Positions were interpolated to this size when the encoder was loaded.
        model_config["vision_cfg"]["image_size"] = self.info.image_size
        model_config["quick_gelu"] = source.quick_gelu
        if "timm_model_name" in model_config["vision_cfg"]:
            model_config["vision_cfg"]["timm_model_pretrained"] = False
        description = {"model_cfg": model_config, "preprocess_cfg": dict(source.preprocess)}
        write_model(folder, HF_SAFE_WEIGHTS_NAME, self.model.state_dict(), CONFIG_FILE, description, source.origin)


def _is_resized(source: EncoderSource) -> bool:
    """Whether a folder has a timm trunk at another size than its architecture's, which open_clip would build."""
    vision = source.model_config["vision_cfg"]
    if not source.is_local or "timm_model_name" not in vision:
        return False
    own = get_pretrained_cfg(vision["timm_model_name"])
    return own is not None and vision.get("image_size", own.input_size[-1]) != own.input_size[-1]


def _load_image_side(model: Any, folder: str) -> None:
    """Give a model the weights that `save` wrote, except those of the text side."""
    tensors, prefix = load_file(Path(folder) / HF_SAFE_WEIGHTS_NAME), "visual."
    model.visual.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    with torch.no_grad():
        model.logit_scale.copy_(tensors["logit_scale"])
