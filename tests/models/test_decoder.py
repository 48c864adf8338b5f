"""The decoder: against a plain full computation, its start, its edges, and that it learns."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.models.decoder import Decoder, num_parameters

WIDTH = 24


def config(**options: Any) -> DecoderConfig:
    return DecoderConfig(**{"depth": 2, "num_heads": 4, **options})


def tokens(
    rows: int = 3, length: int = 7, width: int = WIDTH, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def scrambled(decoder: Decoder, seed: int = 0) -> Decoder:
    """Every parameter at random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return decoder.double()


def reference(decoder: Decoder, x: torch.Tensor) -> torch.Tensor:
    """The same decoder in torch's own modules, every block in full."""
    if not decoder.has_class_token:
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
    x = decoder.projection(decoder.input_norm(x))
    for block in decoder.blocks:
        attention = nn.MultiheadAttention(decoder.width, block.num_heads, batch_first=True).double()
        attention.in_proj_weight, attention.in_proj_bias = block.query_key_value.weight, block.query_key_value.bias
        attention.out_proj = block.attention_out
        h = block.attention_norm(x)
        x = x + attention(h, h, h, need_weights=True)[0]
        x = x + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x))))
    return x[:, 0]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("num_heads", [1, 2, 8])
@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize("width", [None, 16])
def test_output_and_gradients_are_those_of_plain_full_blocks(
    depth: int, num_heads: int, has_class_token: bool, width: int | None
) -> None:
    decoder = scrambled(Decoder(WIDTH, config(depth=depth, num_heads=num_heads, width=width), has_class_token))
    mine, theirs = tokens().requires_grad_(), tokens().requires_grad_()
    out, expected = decoder(mine), reference(decoder, theirs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    out.backward(direction)
    gradients = [parameter.grad.clone() for parameter in decoder.parameters()]
    decoder.zero_grad()
    expected.backward(direction)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    for (name, parameter), gradient in zip(decoder.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_in_float32_at_a_real_width_the_last_block_is_the_full_one() -> None:
    torch.manual_seed(0)
    decoder = Decoder(768, config(depth=1), has_class_token=True)
    x = tokens(rows=4, length=50, width=768, dtype=torch.float32)
    normed = decoder.input_norm(x)
    torch.testing.assert_close(decoder(x), decoder.blocks[0](normed)[:, 0], rtol=1e-5, atol=1e-5)


def test_gradients_are_the_derivatives() -> None:
    decoder = scrambled(Decoder(8, config(depth=2, num_heads=2), has_class_token=False))
    assert torch.autograd.gradcheck(decoder, tokens(rows=2, length=3, width=8).requires_grad_())


# ------------------------------------------------------------------------------------------- start and edges


def tower_norm() -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.rand(WIDTH, generator=generator) + 0.5
    return weight, torch.randn(WIDTH, generator=generator), 1e-3


def test_the_input_norm_starts_as_the_towers_and_does_not_share_its_memory() -> None:
    weight, bias, eps = tower_norm()
    decoder = Decoder(WIDTH, config(depth=0), True, (weight, bias, eps)).double()
    x = tokens()
    pooled = F.layer_norm(x, (WIDTH,), weight.double(), bias.double(), eps)[:, 0]
    torch.testing.assert_close(decoder(x), pooled, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        decoder.input_norm.weight.zero_()
    assert weight.abs().sum() > 0


@pytest.mark.parametrize("has_class_token", [True, False])
def test_identity_blocks_give_what_depth_0_gives(has_class_token: bool) -> None:
    """With the tower's norm that is its pooled output, so that text weights fit the classifier behind."""
    identity = Decoder(WIDTH, config(depth=3, init="identity"), has_class_token, tower_norm())
    none = Decoder(WIDTH, config(depth=0), has_class_token, tower_norm())
    x = tokens(dtype=torch.float32)
    assert torch.equal(identity(x), none(x))


def test_identity_blocks_learn() -> None:
    torch.manual_seed(0)
    decoder = Decoder(WIDTH, config(init="identity"), True)
    x = tokens(dtype=torch.float32)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for _ in range(2):  # the first step opens the branches, the second moves what is inside them
        optimizer.zero_grad()
        decoder(x).square().sum().backward()
        optimizer.step()
    for name, parameter in decoder.blocks.named_parameters():
        if "query_key_value.bias" not in name:
            assert parameter.grad.abs().sum() > 0, name


def test_depth_0_without_norm_is_the_class_token_or_the_mean_token() -> None:
    x = tokens()
    torch.testing.assert_close(Decoder(WIDTH, config(depth=0, input_norm="none"), True)(x), x[:, 0])
    torch.testing.assert_close(Decoder(WIDTH, config(depth=0, input_norm="none"), False)(x), x.mean(dim=1))


def test_the_mean_is_of_the_raw_tokens() -> None:
    decoder = Decoder(WIDTH, config(depth=0), False).double()
    x = tokens()
    torch.testing.assert_close(decoder(x), F.layer_norm(x.mean(dim=1), (WIDTH,)))


def test_a_narrower_width_projects_after_the_norm() -> None:
    decoder = Decoder(WIDTH, config(depth=0, width=8), True).double()
    assert decoder.width == 8
    x = tokens()
    torch.testing.assert_close(decoder(x), decoder.projection(F.layer_norm(x, (WIDTH,)))[:, 0])


def test_there_is_no_norm_at_the_end() -> None:
    torch.manual_seed(0)
    decoder = Decoder(WIDTH, config(input_norm="none", init="identity"), True).double()
    assert decoder(1000 * tokens()).norm() > 1000


def test_the_order_of_other_tokens_does_not_matter() -> None:
    decoder = scrambled(Decoder(WIDTH, config(depth=3), True))
    x = tokens()
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])
    torch.testing.assert_close(decoder(x), decoder(x[:, order]))


def test_one_row_is_the_same_alone_and_in_a_batch() -> None:
    decoder = scrambled(Decoder(WIDTH, config(depth=3), False))
    x = tokens()
    torch.testing.assert_close(decoder(x)[1:2], decoder(x[1:2]))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_batch_without_rows_passes(depth: int) -> None:
    decoder = Decoder(WIDTH, config(depth=depth), False)
    out = decoder(torch.zeros(0, 7, WIDTH))
    assert out.shape == (0, WIDTH)
    out.sum().backward()


@pytest.mark.parametrize("depth", [0, 2])
def test_stored_half_precision_tokens_are_read_as_they_are(depth: int) -> None:
    torch.manual_seed(0)
    decoder = Decoder(WIDTH, config(depth=depth), False)
    x = tokens(dtype=torch.float16)
    assert torch.equal(decoder(x), decoder(x.float()))


def test_under_bfloat16_autocast_outputs_and_gradients_stay_close() -> None:
    torch.manual_seed(0)
    decoder = Decoder(96, config(depth=2), True)
    x = tokens(rows=8, length=50, width=96, dtype=torch.float32)
    direction = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))

    def run(enabled: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        decoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = decoder(x).float()
            with torch.no_grad():
                read = decoder(x).float()
        out.backward(direction)
        return out.detach(), read, {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}

    out, read, gradients = run(enabled=True)
    expected, _, true = run(enabled=False)
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(read, expected, rtol=0.05, atol=0.05)
    for name, gradient in gradients.items():
        difference = (gradient - true[name]).norm() / true[name].norm().clamp(min=1e-3)
        assert difference < 0.03, name


def test_heads_that_do_not_divide_the_width_are_refused_with_ones_that_do() -> None:
    with pytest.raises(ImbvlmError, match=r"must divide the decoder's width of 24, got 5\. Set decoder\.num_heads: 4"):
        Decoder(24, config(num_heads=5), True)


@pytest.mark.parametrize("options", [{}, {"depth": 0}, {"width": 8}, {"input_norm": "none", "mlp_ratio": 1.3}])
def test_parameters_are_counted_without_building_it(options: dict[str, str | float]) -> None:
    built = Decoder(WIDTH, config(**options), True)
    assert num_parameters(WIDTH, config(**options)) == sum(weight.numel() for weight in built.parameters())


def test_the_same_seed_starts_the_same() -> None:
    torch.manual_seed(3)
    first = Decoder(WIDTH, config(), True).state_dict()
    torch.manual_seed(3)
    again = Decoder(WIDTH, config(), True).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_it_learns_what_only_attention_can_see() -> None:
    """The label is the sign of one token's first number, and which token that is, another number says."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, 16, generator=generator)
    place = torch.randint(1, 6, (512,), generator=generator)
    x[..., 1] = 0
    x[torch.arange(512), place, 1] = 4.0
    labels = (x[torch.arange(512), place, 0] > 0).long()
    model = nn.Sequential(Decoder(16, config(depth=2), True), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
