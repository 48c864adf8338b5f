"""Finds the best long-tailed image classifier that a vision-language model can give on your images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imbvlm.base.version import __version__ as __version__

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from imbvlm.inference.predictor import Model


def load(folder: str | Path, device: str | torch.device | None = None) -> Model:
    """Load what `imbvlm export` wrote; `load(folder).predict(images)` needs neither Ray nor a network.

    Raises ImbvlmError where the folder is incomplete, or where images would be prepared otherwise than for training.
    """
    # Importing the package stays free of torch: the command line starts with it.
    from imbvlm.inference.model_folder import load

    return load(folder, device)
