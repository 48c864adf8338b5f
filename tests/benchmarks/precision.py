"""What bfloat16 under autocast gains: why decoders have it on CPUs by themselves, trials with a frozen tower not."""

from collections.abc import Callable, Iterator

import made
import open_clip
import torch
from table import Line, Options, in_turn, shown, times
from torch import Tensor, nn

from imbvlm.config.model_sections import DecoderConfig
from imbvlm.models.decoder import Decoder

BATCH, REPEATS = 32, 4
KINDS = (torch.bfloat16, torch.float32)
# Depth and width of a decoder.
DECODERS = ((3, 768), (1, 192))
NUM_TOKENS, TOKEN_WIDTH = 50, 768
Sides = dict[torch.dtype, Callable[[], None]]


def lines(options: Options) -> Iterator[Line]:
    device, threads = torch.device(options.device), torch.get_num_threads()
    yield shown(f"under autocast, bfloat16 beside float32, {BATCH} images, {threads} threads", "")
    tokens = torch.randn(BATCH, NUM_TOKENS, TOKEN_WIDTH, device=device)
    for depth, width in DECODERS:
        decoder = Decoder(TOKEN_WIDTH, DecoderConfig(depth=depth, width=width), has_class_token=True).to(device)
        yield _beside(f"training step of a decoder, depth {depth}, width {width}", _steps(decoder, tokens))
    tower = open_clip.create_model("ViT-B-32", pretrained=None).visual.to(device).eval()
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    yield _beside("fine-tuning step of a ViT-B-32", _steps(tower, images))
    tower.requires_grad_(False)
    yield _beside("the same tower frozen, forward", {one: _forward(tower, images, one) for one in KINDS})


def _steps(model: nn.Module, inputs: Tensor) -> Sides:
    return {precision: made.training_step(model, inputs, precision) for precision in KINDS}


def _forward(model: nn.Module, inputs: Tensor, precision: torch.dtype) -> Callable[[], None]:
    @torch.no_grad()
    def forward() -> None:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision is torch.bfloat16):
            model(inputs).sum().item()

    return forward


def _beside(what: str, sides: Sides) -> Line:
    halved, whole = (1000 * taken for taken in in_turn(sides, REPEATS).values())
    return times(f"  {what}", halved, whole, "ms")
