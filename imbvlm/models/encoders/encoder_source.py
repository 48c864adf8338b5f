"""An encoder's name resolved to everything but its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import LOCAL_DIR
from imbvlm.models.encoders.encoder_weights import (
    WeightsState,
    cached_weights,
    download_weights,
    unreachable,
    weights_address,
)

_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")
Loader = Literal["open_clip", "timm"]


@dataclass(frozen=True)
class EncoderSource:
    """An encoder's name resolved to everything but its weights.

    `model` is what the library builds: an architecture, or for open_clip a local folder behind LOCAL_DIR. `weights` is
    the user's own file, and `published` says where the weights are fetched from without one (`hf_hub` or `url`).
    """

    name: str
    loader: Loader
    model: str
    weights: str | None
    published: Mapping[str, Any]
    model_config: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    quick_gelu: bool

    @property
    def is_local(self) -> bool:
        """Whether open_clip is given a local folder."""
        return self.model.startswith(LOCAL_DIR)

    def weights_file(self) -> str | None:
        """The file to load, downloaded if necessary; None for a folder, which open_clip searches itself.

        Raises ImbvlmError where there is none or the download fails.
        """
        if self.weights is not None:
            return self.weights
        if self.is_local:
            if not self._folder_files():
                raise ImbvlmError(
                    f"encoder.name is {self.name!r}, and {self.model.removeprefix(LOCAL_DIR)} has no weights "
                    f"({', '.join(f'*{suffix}' for suffix in _WEIGHTS_SUFFIXES)})."
                )
            return None
        return download_weights(self.name, self.published)

    def weights_bytes(self) -> int | None:
        """Bytes of the user's own file, or of the largest file in a folder; None without one, or for published ones."""
        if self.weights is not None:
            return os.path.getsize(self.weights)
        return max((path.stat().st_size for path in self._folder_files()), default=None)

    def _folder_files(self) -> list[Path]:
        """Weights in a local folder; none where there is no folder. Raises ImbvlmError for a pipe or a device."""
        folder = Path(self.model.removeprefix(LOCAL_DIR))
        if not self.is_local or not folder.is_dir():
            return []
        paths = [path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES]
        for path in paths:
            # open_clip would open it, and wait for ever.
            if not path.is_file():
                raise ImbvlmError(f"encoder.name is {self.name!r}, and {path} is no file with weights; remove it.")
        return paths

    @property
    def has_weights(self) -> bool:
        """Whether the weights are on this machine; asks no network, raises ImbvlmError for a folder without."""
        if self.weights is not None or self.is_local:
            self.weights_file()
            return True
        return cached_weights(self.published) is not None

    def weights_state(self) -> WeightsState:
        """Where the weights are or would be fetched from, without doing so; raises ImbvlmError for a folder without."""
        if self.weights is not None or self.is_local:
            self.weights_file()
            return WeightsState(True, self.weights or self.model, None)
        is_cached, address = cached_weights(self.published) is not None, weights_address(self.published)
        return WeightsState(is_cached, address, None if is_cached else unreachable(address))
