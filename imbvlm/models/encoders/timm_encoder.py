"""Image-only encoders by timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from imbvlm.models.encoders.encoder_outputs import TimmTower
from imbvlm.models.encoders.encoder_source import EncoderSource
from imbvlm.models.encoders.image_encoder import BUILD_ERRORS, ImageEncoder, build_error, write_model
from imbvlm.models.encoders.timm_names import TIMM_CONFIG_FILE, TIMM_WEIGHTS_FILE


class TimmEncoder(ImageEncoder):
    """An image-only encoder by timm, of one of the classes of encoder_outputs.TIMM_TRUNKS."""

    @staticmethod
    def build(source: EncoderSource, weights: str | None, device: str, with_text: bool) -> TimmTower:
        """timm's model without its classifier, with its weights or on the meta device; raises ImbvlmError."""
        pool, size = source.model_config["global_pool"], source.model_config["image_size"]
        try:
            trunk = timm.create_model(source.model, num_classes=0, **({} if pool is None else {"global_pool": pool}))
            tower = TimmTower(trunk, int(trunk.pretrained_cfg["input_size"][-1]))
            if size != tower.image_size:
                tower.set_input_size(size)
            if weights is not None:
                trunk.load_state_dict(_without_classifier(load_file(weights), trunk.pretrained_cfg["classifier"]))
            return tower
        except BUILD_ERRORS as error:
            raise build_error(source, weights, error) from None

    @staticmethod
    def image_tower_of(model: TimmTower) -> TimmTower:
        """The model itself."""
        return model

    @staticmethod
    def switches(source: EncoderSource, image_tower: nn.Module) -> Mapping[str, Any]:
        """The architecture and its pooling."""
        return {"timm": source.model, "global_pool": _global_pool(image_tower)}

    @staticmethod
    def logit_scale(source: EncoderSource, model: Any) -> None:
        """None: there is no text."""

    @staticmethod
    def text_of(source: EncoderSource, model: Any) -> None:
        """None: there is no text."""

    def own_output(self, pixels: Tensor) -> Tensor:
        """timm's features before the classifier."""
        pooled: Tensor = self.model.trunk(pixels)
        return pooled

    def save(self, folder: str) -> None:
        """Write a folder as timm's on the hub, at the present image size."""
        size, preprocess = self.info.image_size, self.source.preprocess
        description = {
            "architecture": self.source.model,
            "num_classes": 0,
            "num_features": self.info.pooled_width,
            "global_pool": _global_pool(self.model),
            "pretrained_cfg": {
                "input_size": [3, size, size],
                "interpolation": preprocess["interpolation"],
                "crop_mode": "center" if preprocess["resize_mode"] == "shortest" else "squash",
                "mean": list(preprocess["mean"]),
                "std": list(preprocess["std"]),
                "num_classes": 0,
            },
        }
        state = self.model.trunk.state_dict()
        write_model(folder, TIMM_WEIGHTS_FILE, state, TIMM_CONFIG_FILE, description, self.source.origin)


def _global_pool(tower: Any) -> str | None:
    """The pooling where it is a choice; convolutional models have a module of that name."""
    pool = getattr(tower.trunk, "global_pool", None)
    return pool if isinstance(pool, str) else None


def _without_classifier(state: dict[str, Tensor], classifier: str | tuple[str, ...] | None) -> dict[str, Tensor]:
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    dropped = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    return {name: tensor for name, tensor in state.items() if name not in dropped}
