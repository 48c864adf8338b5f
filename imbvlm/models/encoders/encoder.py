"""An encoder as everything else sees it: an image side, and a text side where it has one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import ComputeDtype, EncoderInfo
from imbvlm.data.images.preprocess import Preprocess

if TYPE_CHECKING:
    # Models on stored features know the protocol and start without open_clip.
    from imbvlm.models.encoders.encoder_outputs import EncoderOutput, FinalNorm, VisualRules


class TextTokenizer(Protocol):
    """Turns texts into token ids; needs no weights."""

    @property
    def context_length(self) -> int:
        """Number of tokens in a text, its start and end included."""

    def tokenize(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """Token ids (N, context length); raises ImbvlmError where the tokenizer is not available."""


class TextEncoder(TextTokenizer, Protocol):
    """The text side of an encoder. `model` and `config` are for prompts whose words are learned (models.text_tower)."""

    model: Any
    config: Mapping[str, Any]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Normalized text features (N, E) in float32, on the encoder's device."""

    def fingerprint(self) -> str:
        """Hex digest of everything that text features depend on."""


class Encoder(Protocol):
    """A pretrained encoder that never trains here: eval mode, no gradients, float32 weights.

    `image_tower` is the module that images pass, `rules` compute its outputs, and `token_pool` is the matrix (T', T)
    over its tokens where they are pooled. `text` is None for an image-only encoder.
    """

    info: EncoderInfo
    preprocess: Preprocess
    device: torch.device
    image_tower: Any
    rules: VisualRules
    token_pool: Tensor | None
    text: TextEncoder | None

    def to(self, device: str | torch.device) -> Self:
        """Move the encoder to another device and return it."""

    def compute_in(self, precision: ComputeDtype) -> Self:
        """Set what the image side computes in and return the encoder; raises ImbvlmError where the GPU can't."""

    def compile(self, batch_size: int) -> str | None:
        """Compile the image side for batches of a size; returns the reason where it can't, None where it did."""

    def forward_images(self, images: Tensor) -> EncoderOutput:
        """Outputs without gradients of crops (B, 3, S, S) in bytes."""

    def outputs(self, images: Tensor) -> EncoderOutput:
        """Outputs as part of a graph, with gradients where the caller keeps them."""

    def pixel_scale(self) -> tuple[Tensor, Tensor]:
        """Factor and summand (1, 3, 1, 1) that turn crops in bytes into the image tower's input."""

    def blocks(self) -> dict[str, nn.Module]:
        """The modules that images pass one after another, by their names in the image tower; empty where unknown."""

    def final_norm(self) -> FinalNorm | None:
        """The layer norm behind the last block; None where there is none."""

    def projection(self) -> Tensor | None:
        """Matrix (P, E) with pooled @ projection = image_embedding up to a constant; None where it is not linear."""

    def check(self) -> None:
        """Compare the outputs with the library's own on a synthetic image; raises ImbvlmError."""

    @abstractmethod
    def save(self, folder: str) -> None:
        """Write a folder that `local-dir:` reads without a download, at the present image size."""


def require_text(encoder: Encoder) -> TextEncoder:
    """The text side of an encoder; raises ImbvlmError for an image-only one."""
    if encoder.text is None:
        raise ImbvlmError(f"the encoder {encoder.info.name} is image-only and has no text; choose one with text.")
    return encoder.text
