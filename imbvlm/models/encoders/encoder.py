"""Tokenizer and preprocessing of an encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import open_clip
from safetensors import SafetensorError
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.input_sections import EvalConfig
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.models.encoders.encoder_registry import EncoderSource
from imbvlm.models.encoders.encoder_weights import cached_file, require_transformers, unreachable

# What open_clip, timm and torch raise when weights and architecture don't go together.
_BUILD_ERRORS = (
    RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError, ImportError, EOFError,
    SafetensorError, UnpicklingError,
)  # fmt: skip


class TextTokenizer:
    """What a tower's tokenizer makes of texts; needs no weights."""

    def __init__(self, source: EncoderSource) -> None:
        self._source = source
        self._tokenizer: Callable[..., Tensor] | None = None

    def tokenize(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """Token ids (N, context length); raises ImbvlmError where the tokenizer can't be had."""
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._source)
        if context_length is None:
            return self._tokenizer(list(texts))
        return self._tokenizer(list(texts), context_length=context_length)

    @property
    def context_length(self) -> int:
        """Tokens in a text, its start and end included."""
        return self.tokenize([""]).shape[1]


def preprocess_of(info: EncoderInfo, evaluation: EvalConfig) -> Preprocess:
    """How images become this tower's input; raises ImbvlmError for a mode or interpolation that isn't known."""
    interpolation: Any = evaluation.interpolation or info.interpolation
    mode: Any = info.resize_mode
    return Preprocess(
        info.image_size, evaluation.resize, interpolation, info.mean, info.std, mode, evaluation.jpeg_downscale
    )


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Without open_clip's remarks, which it makes to the root logger, and without the handler that this would add."""
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
                "is a network, or use a method that needs no text"
            )
    try:
        with _quiet_logging():
            tokenizer: Callable[..., Tensor] = open_clip.get_tokenizer(source.model)
            return tokenizer
    except _BUILD_ERRORS as error:
        raise ImbvlmError(f"can't load the tokenizer of {source.name}: {error}") from None
