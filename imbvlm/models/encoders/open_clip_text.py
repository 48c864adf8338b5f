"""open_clip's text side: the tokenizer, which needs no weights, and text features."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import LOCAL_DIR
from imbvlm.models.encoders.encoder_source import TRANSFORMERS_FIX, EncoderSource
from imbvlm.models.encoders.image_encoder import BUILD_ERRORS, fingerprint
from imbvlm.models.encoders.open_clip_names import OTHER_TOKENIZER_FILES

TEXTS_AT_ONCE = 256
# open_clip's key for a tokenizer of the hub.
_ON_HUB = "hf_tokenizer_name"


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


def tokenizer_folder(source: EncoderSource) -> Path | None:
    """A local folder with the files of the tokenizer, which are fetched unless cached; None for open_clip's own.

    Raises ImbvlmError.
    """
    if source.tokenizer is None:
        return Path(source.model.removeprefix(LOCAL_DIR)) if source.model_config["text_cfg"].get(_ON_HUB) else None
    if source.tokenizer.cached() is None:
        for name in OTHER_TOKENIZER_FILES:
            source.tokenizer.fetch_alternative(name, source.name)
    return Path(source.tokenizer.fetch(source.name)).parent


def require_transformers(name: str, side: str) -> None:
    """Raise ImbvlmError with the fix where the text side needs a package that isn't installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ImbvlmError(f"{side} of {name} needs the package transformers; install it with {TRANSFORMERS_FIX}.")


def require_tokenizer(source: EncoderSource) -> None:
    """Fetch an encoder's tokenizer unless it is here; raises ImbvlmError where it or the package for it is missing."""
    if source.needs_transformers:
        require_transformers(source.name, "the tokenizer")
        tokenizer_folder(source)


def _tokenizer(source: EncoderSource) -> Callable[..., Tensor]:
    text_config = source.model_config["text_cfg"]
    require_tokenizer(source)
    folder = tokenizer_folder(source)
    try:
        with quiet_logging():
            if folder is None:
                tokenizer: Callable[..., Tensor] = open_clip.get_tokenizer(source.model)
                return tokenizer
            length = text_config.get("context_length", DEFAULT_CONTEXT_LENGTH)
            mode, options = text_config.get("tokenizer_mode"), text_config.get("tokenizer_kwargs") or {}
            # Without the last a repository's own code would be offered at the terminal.
            return HFTokenizer(
                str(folder), context_length=length, tokenizer_mode=mode, **options, trust_remote_code=False
            )
    except BUILD_ERRORS as error:
        raise ImbvlmError(
            f"can't load the tokenizer of {source.name}: {error}. Fetch the encoder again, or choose another one."
        ) from None
