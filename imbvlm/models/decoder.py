"""The study's decoder: pre-norm transformer blocks over all tokens of an image, read at the class token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.trial_config import TrialConfig, require_section

FinalNorm = tuple[Tensor, Tensor, float]


def refuse_decoder(config: TrialConfig, info: EncoderInfo) -> list[str]:
    """Reject heads that don't divide the encoder's width, and an identity without a class token to keep."""
    decoder = require_section(config.section(DecoderConfig))
    problems = _head_problems(decoder.width or info.token_width, decoder.num_heads)
    if decoder.init == "identity" and not info.has_class_token:
        problems.append(
            f"decoder.init: identity needs an encoder with a class token, and {info.name} has none. Set decoder.init: "
            "random, or choose another encoder."
        )
    return problems


class Decoder(nn.Module):
    """Tokens (B, T, D) to features (B, width) [Wang et al. 2023]; width is D unless `decoder.width` narrows it.

    Without a class token the mean token is put first. `input_norm: layer_norm` starts from `final_norm`, the encoder's
    weight (D,), bias (D,) and eps. There is no norm at the end. Raises ImbvlmError where num_heads doesn't divide the
    width.
    """

    def __init__(
        self, width_in: int, config: DecoderConfig, has_class_token: bool, final_norm: FinalNorm | None = None
    ) -> None:
        super().__init__()
        self.width = width_in if config.width is None else config.width
        self.has_class_token = has_class_token
        if problems := _head_problems(self.width, config.num_heads):
            raise ImbvlmError(problems[0])
        self.input_norm = _input_norm(width_in, final_norm) if config.input_norm == "layer_norm" else nn.Identity()
        self.projection = nn.Identity() if config.width is None else _linear(width_in, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(self.width, config) for _ in range(config.depth))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
        if not self.has_class_token:
            tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        if not self.blocks:
            tokens = tokens[:, :1]
        tokens = self.projection(self.input_norm(tokens))
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, first_only=number == len(self.blocks))
        return tokens[:, 0]


def num_parameters(width_in: int, config: DecoderConfig) -> int:
    """Number of parameters of a Decoder(width_in, config, ...), without building it."""
    width = config.width or width_in
    hidden = _hidden_width(width, config)
    norms, attention, mlp = 4 * width, 4 * width * (width + 1), 2 * width * hidden + hidden + width
    input_norm = 2 * width_in if config.input_norm == "layer_norm" else 0
    projection = 0 if config.width is None else width * (width_in + 1)
    return input_norm + projection + config.depth * (norms + attention + mlp)


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with GELU: (B, T, D) to (B, T, D), or to (B, 1, D) `first_only`."""

    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.head_width = config.num_heads, width // config.num_heads
        hidden = _hidden_width(width, config)
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = _linear(width, 3 * width)
        self.attention_out = _linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = _linear(width, hidden)
        self.mlp_out = _linear(hidden, width)
        if config.init == "identity":
            for branch in (self.attention_out, self.mlp_out):
                nn.init.zeros_(branch.weight)

    def forward(self, tokens: Tensor, first_only: bool = False) -> Tensor:
        normed = self.attention_norm(tokens)
        if first_only:
            tokens, attended = tokens[:, :1], self._attend_from_first(normed)
        else:
            attended = self._attend(normed)
        tokens = tokens + self.attention_out(attended)
        return tokens + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(tokens))))

    def _attend(self, normed: Tensor) -> Tensor:
        by_head = (*normed.shape[:2], 3, self.num_heads, self.head_width)
        # `unbind` gives views, whose gradients are put together in one pass over memory.
        query, key, value = (part.transpose(1, 2) for part in self.query_key_value(normed).view(by_head).unbind(2))
        return _attention(query, key, value).transpose(1, 2).flatten(2)

    def _attend_from_first(self, normed: Tensor) -> Tensor:
        """`_attend(normed)[:, :1]` without keys and values of every token.

        With one query, q . (W_k x + b_k) is (W_k^T q) . x plus a term that all tokens share, which softmax ignores.
        The attention's weights sum to 1, so W_v and b_v can follow the averaging of tokens. An image takes
        2 D^2 + 2 heads T D multiplications instead of 2 T D^2.
        """
        batch, _, width = normed.shape
        query_weight, key_weight, value_weight = self.query_key_value.weight.chunk(3)
        query_bias, _, value_bias = self.query_key_value.bias.chunk(3)
        by_head = (self.num_heads, self.head_width, width)
        query = F.linear(normed[:, 0], query_weight, query_bias).view(batch, self.num_heads, self.head_width)
        query_on_tokens = torch.einsum("bhe,hed->bhd", query, key_weight.view(by_head))
        # The dimension for one head selects the faster kernel, and ONNX has no other form.
        query_on_tokens, tokens = query_on_tokens.unsqueeze(1), normed.unsqueeze(1)
        averaged = F.scaled_dot_product_attention(query_on_tokens, tokens, tokens, scale=self.head_width**-0.5)
        attended = torch.einsum("bhd,hed->bhe", averaged.squeeze(1), value_weight.view(by_head))
        return (attended.flatten(1) + value_bias).unsqueeze(1)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention over (B, heads, T, D)."""
    if query.requires_grad and query.dtype is torch.bfloat16 and query.device.type == "cpu":
        # Forward and backward, plain products take 0.3 to 0.9 of the kernel's time there, for any T.
        with torch.autocast("cpu", enabled=False):
            scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
            return torch.softmax(scores, dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


def _hidden_width(width: int, config: DecoderConfig) -> int:
    return max(1, int(width * config.mlp_ratio))


def _linear(width_in: int, width_out: int) -> nn.Linear:
    """A layer that starts with torch's weights and a bias of 0, as the study's do."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.bias)
    return layer


def _input_norm(width: int, final_norm: FinalNorm | None) -> nn.LayerNorm:
    if final_norm is None:
        return nn.LayerNorm(width)
    weight, bias, eps = final_norm
    norm = nn.LayerNorm(width, eps=eps)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    return norm


def _head_problems(width: int, num_heads: int) -> list[str]:
    if width % num_heads == 0:
        return []
    nearest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - num_heads))
    return [
        f"decoder.num_heads must divide the decoder's width of {width}, got {num_heads}. Set decoder.num_heads: "
        f"{nearest}, or another decoder.width."
    ]
