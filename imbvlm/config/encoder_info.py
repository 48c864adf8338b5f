"""Facts about an encoder, for processes that read its stored outputs without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from imbvlm.base.errors import ImbvlmError

OutputName = Literal["tokens", "pooled", "image_embedding"]
ComputeDtype = Literal["float32", "bfloat16"]
OUTPUT_NAMES: tuple[OutputName, ...] = get_args(OutputName)


class TextSpace(NamedTuple):
    """The space of image and text embeddings: its width, and the factor on cosine similarities in it."""

    width: int
    logit_scale: float


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about one encoder at one image size.

    `logit_scale` is the factor on cosine similarities, not its logarithm; it and `embedding_width` are None for an
    image-only encoder. `weights_fingerprint` is empty for an encoder that was described without its weights.
    `final_norm_eps` is None where there is no final norm.
    """

    name: str
    kind: Literal["vit", "convolution"]
    image_size: int
    num_tokens: int
    token_width: int
    pooled_width: int
    embedding_width: int | None
    has_class_token: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    logit_scale: float | None
    final_norm_eps: float | None
    weights_fingerprint: str
    # Those of the image side.
    num_parameters: int = 0
    # Side of the square of the encoder's tokens whose mean is one token here.
    token_pooling: int = 1
    # The commit of the hub that the weights come from; empty for files of the user's own.
    revision: str = ""

    @property
    def has_text(self) -> bool:
        """Whether images and texts have embeddings in one space."""
        return self.embedding_width is not None

    @property
    def text_space(self) -> TextSpace:
        """The space that images share with texts; raises ImbvlmError for an image-only encoder."""
        if self.embedding_width is None or self.logit_scale is None:
            raise ImbvlmError(f"the encoder {self.name} is image-only and has no text; choose one with text.")
        return TextSpace(self.embedding_width, self.logit_scale)

    @property
    def shapes(self) -> dict[OutputName, tuple[int, ...]]:
        """Shape of one image by output: (T, D) for tokens, (P,) for pooled, (E,) for image_embedding with text."""
        shapes: dict[OutputName, tuple[int, ...]] = {
            "tokens": (self.num_tokens, self.token_width),
            "pooled": (self.pooled_width,),
        }
        return shapes if self.embedding_width is None else {**shapes, "image_embedding": (self.embedding_width,)}
