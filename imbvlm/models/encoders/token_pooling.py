"""Fewer tokens: the mean of neighbors on an encoder's grid, as one matrix over tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from imbvlm.base.errors import ImbvlmError


def pooling_matrix(num_tokens: int, num_prefix: int, side: int, name: str) -> Tensor:
    """Matrix (T', T) that averages side x side neighbors of the encoder's square grid, row by row.

    The `num_prefix` tokens in front (a class token) stay as they are; at the edge of a grid that `side`
    doesn't divide, fewer neighbors are averaged. Raises ImbvlmError where the tokens are no square.
    """
    grid = math.isqrt(num_tokens - num_prefix)
    if grid * grid != num_tokens - num_prefix:
        raise ImbvlmError(
            f"encoder.token_pooling {side} averages neighbors on a square grid, and the {num_tokens - num_prefix} "
            f"tokens of {name} are no square; set encoder.token_pooling: 1."
        )
    if grid < 2:
        raise ImbvlmError(
            f"encoder.token_pooling {side} averages neighbors, and {name} gives one token at this image size; set "
            "encoder.token_pooling: 1, or a larger encoder.image_size."
        )
    coarse = -(-grid // side)
    index = torch.arange(grid) // side
    targets = num_prefix + (index[:, None] * coarse + index[None, :]).flatten()
    sums = functional.one_hot(torch.cat([torch.arange(num_prefix), targets])).T.float()
    return sums / sums.sum(dim=1, keepdim=True)
