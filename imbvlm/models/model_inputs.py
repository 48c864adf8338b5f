"""The inputs of a model's builder, apart from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.longtail.taxonomy import Taxonomy


class StoredFeatures(Protocol):
    """Training images as the encoder's stored outputs."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image (N,)."""

    def batch(self, output: OutputName, index: npt.NDArray[np.int64]) -> Tensor:
        """One output (B, ...) of the evaluation crops of images `index` (B,), in the stored precision."""


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of a model's builder.

    `class_embeddings` (C, E) is None unless text was extracted. `encoder_tensors` holds those of `final_norm.weight`,
    `final_norm.bias` and `projection` that the encoder has. `encoder` overrides the trial's own section with paths that
    hold in any folder. `taxonomy` is the tree over the classes, if any.
    """

    info: EncoderInfo
    class_names: tuple[str, ...]
    class_embeddings: Tensor | None = None
    encoder_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    stored: StoredFeatures | None = None
    encoder: EncoderConfig | None = None
    taxonomy: Taxonomy | None = None
