"""The decoder's attention as it trains in bfloat16, beside torch's kernel; a training step both ways and in float32."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import made
import torch
from table import Line, Options, in_turn, shown, times
from torch import Tensor
from torch.nn import functional as F

from imbvlm.config.model_sections import DecoderConfig
from imbvlm.models import decoder

BATCH, REPEATS = 32, 6
# Heads, width of a head, tokens.
SHAPES = ((4, 192, 17), (4, 192, 50), (12, 64, 50), (4, 192, 197), (4, 256, 257))
WIDTH, NUM_TOKENS, DEPTH = 768, 50, 3


def lines(options: Options) -> Iterator[Line]:
    """On a CPU the two differ; elsewhere the decoder has torch's kernel."""
    device = torch.device(options.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield shown(f"attention, forward and backward, batch of {BATCH}, bfloat16, one thread", "")
        for heads, width, num_tokens in SHAPES:
            yield _alone(heads, width, num_tokens, device)
        yield from _step(device)
    finally:
        torch.set_num_threads(threads)


def _alone(heads: int, width: int, num_tokens: int, device: torch.device) -> Line:
    about = {"device": device, "dtype": torch.bfloat16}
    inputs = torch.randn(3, BATCH, heads, num_tokens, width, requires_grad=True, **about)
    gradient = torch.randn(BATCH, heads, num_tokens, width, **about)

    def train(attention: Callable[..., Tensor]) -> None:
        attention(*inputs).backward(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()

    sides = {"ours": decoder._attention, "kernel": F.scaled_dot_product_attention}
    taken = in_turn({name: lambda of=of: train(of) for name, of in sides.items()}, REPEATS)
    return times(f"  {heads} heads of {width}, {num_tokens} tokens", 1000 * taken["ours"], 1000 * taken["kernel"], "ms")


def _step(device: torch.device) -> Iterator[Line]:
    model = decoder.Decoder(WIDTH, DecoderConfig(depth=DEPTH), has_class_token=True).to(device)
    tokens = torch.randn(BATCH, NUM_TOKENS, WIDTH, device=device)
    ours, in_float32 = (made.training_step(model, tokens, precision) for precision in (torch.bfloat16, torch.float32))

    def with_kernel() -> None:
        with patch.object(decoder, "_attention", F.scaled_dot_product_attention):
            ours()

    taken = in_turn({"ours": ours, "kernel": with_kernel, "float32": in_float32}, REPEATS)
    what = f"  training step of a decoder, {BATCH} x {NUM_TOKENS} x {WIDTH}"
    for other in ("kernel", "float32"):
        yield times(f"{what}; {other}", 1000 * taken["ours"], 1000 * taken[other], "ms")
