"""The learning rate that is asked for is the one that is used, and clipping clips."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from imbvlm.config.training_sections import AdamWConfig, SgdConfig
from imbvlm.training.step.optimizers import build_optimizer, clip_gradients, lr_at_step, lr_factor, set_lr


def rates(config: Any, num_steps: int) -> list[float]:
    return [lr_factor(config, step, num_steps) for step in range(num_steps)]


def test_warm_up_rises_linearly_and_reaches_the_full_rate() -> None:
    factors = rates(SgdConfig(warmup_fraction=0.25, lr_schedule="constant"), 16)
    assert factors == [0.25, 0.5, 0.75, 1.0] + [1.0] * 12


def test_the_studys_schedule_ends_near_a_fifth_of_the_rate() -> None:
    factors = rates(SgdConfig(warmup_fraction=0, cosine_cycles=7 / 16), 8192)
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.195, abs=1e-3)
    assert factors[4096] == pytest.approx(math.cos(math.pi * 7 / 32))


def test_half_cosine_is_half_in_the_middle_and_never_wastes_a_step() -> None:
    factors = rates(SgdConfig(warmup_fraction=0, lr_schedule="half_cosine"), 10)
    assert factors[5] == pytest.approx(0.5)
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] > 0


def test_lifts_schedule_changes_between_epochs_as_its_scheduler_does() -> None:
    config = SgdConfig(lr=0.02, warmup_fraction=0, lr_schedule="epoch_half_cosine")
    param = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([param], lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 5)
    expected = []
    for _ in range(5):
        expected += [theirs.param_groups[0]["lr"]] * 3
        theirs.step()
        scheduler.step()
    assert [lr_at_step(config, step, 15, 3) for step in range(15)] == pytest.approx(expected)
    # A warm-up goes on from step to step, and the schedule starts behind it.
    warmed = SgdConfig(lr=1.0, warmup_fraction=4 / 15, lr_schedule="epoch_half_cosine")
    found = [lr_at_step(warmed, step, 15, 3) for step in range(15)]
    assert found[:6] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert found[6] == found[8] < 1


@pytest.mark.parametrize("schedule", ["cosine", "half_cosine", "epoch_half_cosine", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 17])
@pytest.mark.parametrize("warmup", [0.0, 0.0625, 0.5, 0.99])
def test_every_step_of_any_length_trains(schedule: str, num_steps: int, warmup: float) -> None:
    factors = rates(SgdConfig(warmup_fraction=warmup, lr_schedule=schedule), num_steps)
    assert all(0 < factor <= 1 for factor in factors)


def test_a_step_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 9, got 10"):
        lr_factor(SgdConfig(), 10, 10)


def test_clipping_scales_all_gradients_together() -> None:
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    params[0].grad = torch.tensor([3.0, 0.0, 0.0])
    params[1].grad = torch.tensor([0.0, 4.0])
    assert clip_gradients(params, 1.0) == pytest.approx(5.0)
    assert torch.cat([param.grad for param in params]).norm() == pytest.approx(1.0, abs=1e-5)
    assert params[0].grad[0] / params[1].grad[1] == pytest.approx(0.75)


def test_a_small_gradient_and_no_limit_leave_gradients_alone() -> None:
    param = nn.Parameter(torch.zeros(2))
    for limit in (10.0, None):
        param.grad = torch.tensor([3.0, 4.0])
        assert clip_gradients([param], limit) == pytest.approx(5.0)
        assert param.grad.tolist() == [3.0, 4.0]


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([float("nan"), 1.0])
    assert not math.isfinite(clip_gradients([param], 1.0))


def test_nesterov_step_is_the_textbooks() -> None:
    param = nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer(SgdConfig(momentum=0.9, weight_decay=0.0), [param])
    set_lr(optimizer, 0.1)
    for _ in range(2):
        param.grad = torch.tensor([1.0])
        optimizer.step()
    # v1 = 1, step 0.1 (1 + 0.9); v2 = 1.9, step 0.1 (1 + 0.9 x 1.9)
    assert param.item() == pytest.approx(1 - 0.19 - 0.271)


def test_momentum_zero_is_plain_descent_with_decay() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(SgdConfig(momentum=0.0, weight_decay=0.5), [param])
    set_lr(optimizer, 0.1)
    param.grad = torch.tensor([1.0])
    optimizer.step()
    assert param.item() == pytest.approx(2 - 0.1 * (1 + 0.5 * 2))


def test_adamw_decays_apart_from_the_gradient() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(AdamWConfig(weight_decay=0.5, betas=[0.8, 0.9]), [param])
    set_lr(optimizer, 0.1)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    param.grad = torch.tensor([0.0])
    optimizer.step()
    assert param.item() == pytest.approx(2 * (1 - 0.1 * 0.5))


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_said() -> None:
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    trained = nn.Parameter(torch.zeros(1))
    assert build_optimizer(SgdConfig(), [frozen, trained]).param_groups[0]["params"] == [trained]
    with pytest.raises(ValueError, match="no parameter trains"):
        build_optimizer(SgdConfig(), [frozen])
