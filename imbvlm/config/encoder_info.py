"""What a tower gives, without the tower: shapes, preprocessing, identity, for processes that read stored features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

OutputName = Literal["tokens", "pooled", "image_embedding"]
ComputeDtype = Literal["float32", "bfloat16"]
OUTPUT_NAMES: tuple[OutputName, ...] = get_args(OutputName)


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about one tower at one image size; JSON-able.

    `logit_scale` is the factor on cosine similarities (exponential taken), `weights_fingerprint` is empty for a tower
    that was only described, `final_norm_eps` is None where the tower has no final norm.
    """

    name: str
    kind: Literal["vit", "convolution"]
    image_size: int
    num_tokens: int
    token_width: int
    pooled_width: int
    embedding_width: int
    has_class_token: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    logit_scale: float
    final_norm_eps: float | None
    weights_fingerprint: str
    # Of the image side.
    num_parameters: int = 0
    # Tokens are means of so many by so many of the tower's.
    token_pooling: int = 1

    def shape(self, output: OutputName) -> tuple[int, ...]:
        """Shape of one image's output: (T, D) for tokens, (P,) for pooled, (E,) for image_embedding."""
        shapes: dict[OutputName, tuple[int, ...]] = {
            "tokens": (self.num_tokens, self.token_width),
            "pooled": (self.pooled_width,),
            "image_embedding": (self.embedding_width,),
        }
        return shapes[output]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> EncoderInfo:
        """Back from `to_dict`, also after a way through JSON."""
        return EncoderInfo(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})
