"""open_clip's text side: the tokenizer, which needs no weights, and text features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import open_clip
import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.models.encoders.encoder_source import EncoderSource
from imbvlm.models.encoders.encoder_weights import cached_file, require_transformers, unreachable
from imbvlm.models.encoders.image_encoder import BUILD_ERRORS, fingerprint

TEXTS_AT_ONCE = 256


class OpenClipTokenizer:
    """The tokenizer of an encoder, loaded on first use."""

    def __init__(self, source: EncoderSource) -> None:
        self._source = source
        self._tokenizer: Callable[..., Tensor] | None = None

    def tokenize(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """Token ids (N, context length); raises ImbvlmError where the tokenizer is not available."""
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._source)
        if context_length is None:
            return self._tokenizer(list(texts))
        return self._tokenizer(list(texts), context_length=context_length)

    @property
    def context_length(self) -> int:
        """Number of tokens in a text, its start and end included."""
        return self.tokenize([""]).shape[1]


class OpenClipText(OpenClipTokenizer):
    """The text side of open_clip's `model`; `config` is its text_cfg."""

    def __init__(self, source: EncoderSource, model: Any) -> None:
        super().__init__(source)
        self.model = model
        self.config: Mapping[str, Any] = source.model_config["text_cfg"]

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Normalized text features (N, E) in float32, on the encoder's device."""
        device = next(self.model.parameters()).device
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        encoded = [self.model.encode_text(self.tokenize(part).to(device), normalize=True) for part in parts]
        return torch.cat(encoded).float()

    def fingerprint(self) -> str:
        """Hex digest of the weights by name, the activation and the tokenizer's settings."""
        source = self._source
        embed_dim = source.model_config["embed_dim"]
        switches = {"quick_gelu": source.quick_gelu, "embed_dim": embed_dim, "text": self.config}
        state = {name: value for name, value in self.model.state_dict().items() if not name.startswith("visual.")}
        return fingerprint(state, switches)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Within, open_clip's remarks to the root logger are dropped, and no handler is added for them."""
    root, handler, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)


def _tokenizer(source: EncoderSource) -> Callable[..., Tensor]:
    hub_name = source.model_config["text_cfg"].get("hf_tokenizer_name")
    if hub_name or ("siglip" in source.model.lower() and not source.is_local):
        require_transformers(source.name, "the tokenizer")
    if hub_name and not source.is_local and cached_file(hub_name, ["tokenizer_config.json", "tokenizer.json"]) is None:
        cause = unreachable(f"https://huggingface.co/{hub_name}")
        if cause is not None:
            raise ImbvlmError(
                f"can't download the tokenizer of {source.name}, {hub_name} ({cause}); fetch it beforehand where there "
                "is a network, or use a method that needs no text."
            )
    try:
        with quiet_logging():
            tokenizer: Callable[..., Tensor] = open_clip.get_tokenizer(source.model)
            return tokenizer
    except BUILD_ERRORS as error:
        raise ImbvlmError(f"can't load the tokenizer of {source.name}: {error}") from None
