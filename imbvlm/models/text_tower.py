"""The frozen text tower from token embeddings on, for prompts whose words are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT_LENGTH = 77


class TextTower(nn.Module):
    """A causal text tower, such as CLIP's, that takes embeddings of tokens.

    Tokens behind the one that is read have no influence, so sequences can end at the last such token.
    """

    positions: Tensor
    mask: Tensor

    def __init__(self, model: Any, text_config: Mapping[str, Any]) -> None:
        """`model` is open_clip's, `text_config` its text_cfg, which `unsupported_text_tower` has passed."""
        super().__init__()
        # CustomTextCLIP has its text side in one module, CLIP among its own attributes.
        text = getattr(model, "text", model)
        self.end_id: int | None = text_config.get("eos_id", 2) if _pool_type(text_config) == "eos" else None
        self.token_embedding: nn.Embedding = text.token_embedding
        self.transformer: nn.Module = text.transformer
        self.final_norm: nn.Module = text.ln_final
        self.projection: nn.Parameter | nn.Linear | None = text.text_projection
        self.register_buffer("positions", text.positional_embedding.detach())
        self.register_buffer("mask", text.attn_mask)
        self.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """Width of a token's embedding."""
        return self.token_embedding.embedding_dim

    def ends(self, ids: Tensor) -> Tensor:
        """Positions (N,) of the token that is read in texts of token ids (N, T), by the tower's own rule."""
        return ids.argmax(dim=-1) if self.end_id is None else (ids == self.end_id).int().argmax(dim=-1)

    def forward(self, embeddings: Tensor, ends: Tensor) -> Tensor:
        """Normalized text features (N, E) of token embeddings (N, T, D) that are read at `ends` (N,)."""
        length = embeddings.shape[1]
        hidden = self.transformer(embeddings + self.positions[:length], attn_mask=self.mask[:length, :length])
        features = self.final_norm(hidden[torch.arange(len(hidden), device=hidden.device), ends])
        if isinstance(self.projection, nn.Linear):
            features = self.projection(features)
        elif self.projection is not None:
            features = features @ self.projection
        return F.normalize(features.float(), dim=-1)


def unsupported_text_tower(text_config: Mapping[str, Any], name: str, num_tokens: int | None) -> str | None:
    """The reason why prompts of an encoder can't have `num_tokens` learned vectors; None where they can.

    `text_config` is open_clip's text_cfg, `num_tokens` None for the default.
    """
    is_native = not any(text_config.get(key) for key in ("hf_model_name", "no_causal_mask", "embed_cls"))
    if not is_native or _pool_type(text_config) not in ("argmax", "eos"):
        return (
            f"method prompt_tuning needs a text tower that reads a text's end token and attends backwards only, as "
            f"CLIP's does, and that of {name} doesn't. Choose a CLIP encoder, or a method that trains on images alone."
        )
    context_length = text_config.get("context_length", CONTEXT_LENGTH)
    # Start, end, and a token of the name.
    max_tokens = context_length - 3
    if num_tokens is not None and num_tokens > max_tokens:
        return (
            f"prompt_tuning.num_tokens must leave 3 of the {context_length} tokens of {name} for start, end and class "
            f"name, got {num_tokens}. Set it to at most {max_tokens}."
        )
    return None


def _pool_type(text_config: Mapping[str, Any]) -> str:
    return str(text_config.get("pool_type", "argmax"))
