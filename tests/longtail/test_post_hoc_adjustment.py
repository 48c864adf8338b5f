"""After training: logit adjustment, calibration and mixing, from logits alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail import post_hoc_adjustment
from imbvlm.longtail.losses import balanced_softmax, logit_adjustment
from imbvlm.longtail.post_hoc_adjustment import (
    ALPHAS,
    TAUS,
    adjust_logits,
    balanced_accuracy,
    fit_temperature,
    mix_logits,
    select_alpha,
    select_best,
    select_tau,
    uncalibrated_note,
)

COUNTS = np.array([1000, 200, 40, 8, 2, 0])


def rows(num: int = 300, num_classes: int = 6, seed: int = 0, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, num_classes, (num,), generator=generator)
    noise = torch.randn(num, num_classes, generator=generator, dtype=torch.float64)
    return scale * (F.one_hot(targets, num_classes) + noise), targets


def biased_rows(tau: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model that is right but for tau times the prior of its training classes."""
    logits, targets = rows()
    return adjust_logits(logits, COUNTS, -tau), targets


# ------------------------------------------------------------------------------------------- logit adjustment


def test_adjusting_is_the_formula_with_an_empty_class_as_half_an_image() -> None:
    logits, _ = rows()
    floored = np.maximum(COUNTS, 0.5)
    expected = logits.numpy() - 1.3 * np.log(floored / floored.sum())
    np.testing.assert_allclose(adjust_logits(logits, COUNTS, 1.3).numpy(), expected, rtol=1e-12)
    assert torch.equal(adjust_logits(logits, COUNTS, 0.0), logits)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_adjusting_undoes_what_the_loss_of_that_tau_adds(tau: float) -> None:
    """Cross entropy with post-hoc tau, and logit adjustment with tau in training, are two roads to one prediction."""
    logits, targets = rows()
    biased = adjust_logits(logits, COUNTS, -tau)
    counts = torch.tensor(COUNTS)
    torch.testing.assert_close(F.cross_entropy(biased, targets), logit_adjustment(logits, targets, counts, tau=tau))
    if tau == 1.0:
        torch.testing.assert_close(F.cross_entropy(biased, targets), balanced_softmax(logits, targets, counts))


def test_half_precision_logits_are_adjusted_in_float32() -> None:
    logits, _ = rows()
    half = logits.to(torch.float16)
    assert torch.equal(adjust_logits(half, COUNTS, 1.0), adjust_logits(half.float(), COUNTS, 1.0))


def test_the_chosen_tau_recovers_a_model_that_follows_the_prior() -> None:
    biased, targets = biased_rows(tau=1.0)
    choice = select_tau(biased, targets, COUNTS)
    assert abs(choice.value - 1.0) <= 0.5
    before = dict(choice.candidates)[0.0]
    assert choice.score > before + 0.1
    honest, _ = rows()
    assert choice.score >= balanced_accuracy(targets, 6, lambda part: honest[part]) - 1e-12


def test_every_tau_tried_is_shown_with_its_own_score() -> None:
    biased, targets = biased_rows()
    choice = select_tau(biased, targets, COUNTS)
    assert [tau for tau, _ in choice.candidates] == list(TAUS)
    assert (min(TAUS), max(TAUS), len(TAUS)) == (-1.0, 2.0, 31)
    assert 0.0 in TAUS
    for tau, score in choice.candidates:
        adjusted = adjust_logits(biased, COUNTS, tau)
        expected = np.mean([(adjusted.argmax(1)[targets == c] == c).double().mean() for c in range(6)])
        assert score == pytest.approx(expected)
    assert choice.score == max(score for _, score in choice.candidates)


def test_choosing_never_does_worse_than_nothing_on_validation() -> None:
    for seed in range(5):
        logits, targets = rows(seed=seed)
        choice = select_tau(logits, targets, COUNTS)
        assert choice.score >= dict(choice.candidates)[0.0]


def test_of_equal_taus_the_one_that_changes_least_is_chosen() -> None:
    certain = 100.0 * F.one_hot(torch.arange(6), 6).double()
    assert select_tau(certain, torch.arange(6), COUNTS).value == 0.0
    assert select_best([-1, 2, 1], lambda value: 0.5, neutral=0).value == -1
    assert select_best([-1, 2, 1], lambda value: float(value == 2), neutral=0).value == 2


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_logits_and_counts_give_a_choice(data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(1, 5))
    num = data.draw(st.integers(1, 8))
    values = data.draw(st.lists(st.floats(-1e4, 1e4), min_size=num * num_classes, max_size=num * num_classes))
    counts = data.draw(st.lists(st.integers(0, 10**6), min_size=num_classes, max_size=num_classes))
    targets = torch.tensor(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=num, max_size=num)))
    logits = torch.tensor(values, dtype=torch.float64).view(num, num_classes)
    choice = select_tau(logits, targets, counts)
    assert 0 <= choice.score <= 1
    calibration = fit_temperature(logits, targets)
    assert 0.01 <= calibration.temperature <= 100
    assert math.isfinite(calibration.loss_after)


def test_balanced_accuracy_counts_classes_with_rows_and_a_nan_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, torch.nan, 9]])
    targets = torch.tensor([0, 1, 1, 1])
    expected = np.mean([1, 1 / 3])
    assert balanced_accuracy(targets, 3, lambda part: logits[part]) == pytest.approx(expected)
    monkeypatch.setattr(post_hoc_adjustment, "CHUNK_SIZE", 3)
    assert balanced_accuracy(targets, 3, lambda part: logits[part]) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 4.0, 40.0])
def test_the_temperature_is_where_the_loss_is_least(scale: float) -> None:
    logits, targets = rows(scale=scale)
    fitted = fit_temperature(logits, targets)
    assert fitted.loss_after == pytest.approx(F.cross_entropy(logits / fitted.temperature, targets).item())
    assert fitted.loss_before == pytest.approx(F.cross_entropy(logits, targets).item())
    for factor in (0.99, 1.01):
        assert F.cross_entropy(logits / (fitted.temperature * factor), targets).item() > fitted.loss_after


def test_scaling_the_logits_scales_the_temperature() -> None:
    logits, targets = rows()
    one, seven = fit_temperature(logits, targets), fit_temperature(7 * logits, targets)
    assert seven.temperature == pytest.approx(7 * one.temperature, rel=1e-6)
    assert seven.loss_after == pytest.approx(one.loss_after)


def test_the_temperature_that_made_the_labels_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(torch.softmax(logits / 2.5, dim=1), 1, generator=generator).squeeze(1)
    fitted = fit_temperature(logits.float(), targets)
    assert fitted.temperature == pytest.approx(2.5, rel=0.05)
    assert fitted.calibration_error_after < 0.02 < 0.1 < fitted.calibration_error_before


def test_where_the_loss_falls_for_ever_the_temperature_ends_at_a_bound() -> None:
    targets = torch.arange(4)
    right = F.one_hot(targets, 4).double()
    assert fit_temperature(-right, targets).temperature == pytest.approx(100, rel=1e-4)
    assert fit_temperature(0.1 * right, targets).temperature == pytest.approx(0.01, rel=1e-4)
    certain = fit_temperature(right, targets)  # where float64 can't tell the loss from 0, any is as good
    assert 0.01 <= certain.temperature < 0.02
    assert certain.loss_after < 1e-15


def test_equal_logits_stay_as_they_are() -> None:
    assert fit_temperature(torch.zeros(3, 4), torch.tensor([0, 1, 2])).temperature == 1.0


def outliers(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are right, but for two that are wrong with logits six times as large, as a cosine classifier's are."""
    targets = torch.arange(num) % 10
    logits = 10 * F.one_hot(targets, 10).double()
    logits[:2] = 6 * logits[:2].roll(1, dims=1)
    return logits, targets


def test_classes_of_one_to_three_rows_leave_probabilities_uncalibrated() -> None:
    targets = torch.tensor([0] * 4 + [2] * 3 + [3])
    fitted = fit_temperature(torch.eye(5)[targets], targets)
    assert fitted.num_uncalibrated == 2
    assert uncalibrated_note(fitted.num_uncalibrated) == "not calibrated: 2 classes with 1 to 3 validation images"
    assert uncalibrated_note(fit_temperature(torch.eye(5)[targets[:4]], targets[:4]).num_uncalibrated) == ""


def test_two_certain_mistakes_among_few_rows_do_not_spoil_the_calibration() -> None:
    """Their cross entropy alone asks for a temperature at which every right row is doubted."""
    fitted = fit_temperature(*outliers(15))
    assert fitted.temperature > 10
    assert fitted.loss_after < fitted.loss_before - fitted.standard_error
    assert fitted.calibration_error_after > 0.4 > 0.2 > fitted.calibration_error_before
    assert fitted.objection == "lowers the cross entropy and not the calibration error"
    assert fitted.accepted == 1
    assert fitted.accepted_calibration_error == fitted.calibration_error_before


def test_a_temperature_without_a_minimum_is_not_taken() -> None:
    """Where all few rows are right any smaller one has less loss, and where all are wrong any larger one."""
    right = F.one_hot(torch.arange(6), 6).double()
    for logits, objection in (
        (right, "has no lower bound, because every row is correct"),
        (-right, "is at a bound of its range"),
    ):
        fitted = fit_temperature(logits, torch.arange(6))
        assert fitted.objection == objection
        assert fitted.accepted == 1


def test_the_standard_error_of_the_gain_is_that_of_paired_rows() -> None:
    logits, targets = rows(scale=4.0)
    fitted = fit_temperature(logits, targets)
    before, after = (F.cross_entropy(logits.double() / t, targets, reduction="none") for t in (1, fitted.temperature))
    difference = (before - after).numpy()
    assert fitted.standard_error == pytest.approx(np.std(difference, ddof=1) / np.sqrt(len(difference)))
    assert fitted.objection is None
    assert fitted.accepted == fitted.temperature


def test_of_calibrated_logits_a_temperature_is_seldom_taken() -> None:
    """Few rows of a model that needs none: a gain by chance is noise."""
    taken = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(15, 5, generator=generator, dtype=torch.float64)
        targets = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator).squeeze(1)
        taken.append(fit_temperature(logits, targets).accepted)
    assert taken.count(1.0) >= 25
    assert all(0.2 < one < 5 for one in taken)


def test_one_row_supports_no_temperature() -> None:
    assert fit_temperature(torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([2])).accepted == 1


def test_the_temperature_takes_few_passes_over_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass over iNaturalist's validation logits takes seconds."""
    passes, slope = [], post_hoc_adjustment._slope
    monkeypatch.setattr(post_hoc_adjustment, "_slope", lambda *given: passes.append(given) or slope(*given))
    for scale in (0.3, 1.0, 4.0, 40.0):
        passes.clear()
        fit_temperature(*rows(scale=scale))
        assert len(passes) <= 15


def test_parts_in_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = rows()
    whole = fit_temperature(logits, targets)
    monkeypatch.setattr(post_hoc_adjustment, "CHUNK_SIZE", 7)
    assert fit_temperature(logits, targets).temperature == pytest.approx(whole.temperature, rel=1e-9)


def test_the_temperature_leaves_the_argmax_to_tau() -> None:
    biased, targets = biased_rows()
    adjusted = adjust_logits(biased, COUNTS, select_tau(biased, targets, COUNTS).value)
    scaled = adjusted / fit_temperature(adjusted, targets).temperature
    assert torch.equal(scaled.argmax(dim=1), adjusted.argmax(dim=1))


# ----------------------------------------------------------------------------------------------------- mixing


def test_mixing_goes_from_the_model_to_zero_shot() -> None:
    logits, _ = rows()
    zero_shot, _ = rows(seed=1)
    assert torch.equal(mix_logits(logits, zero_shot, 0.0), logits)
    assert torch.equal(mix_logits(logits, zero_shot, 1.0), zero_shot)
    torch.testing.assert_close(mix_logits(logits, zero_shot, 0.25), 0.75 * logits + 0.25 * zero_shot)


def test_two_models_that_know_different_classes_are_mixed() -> None:
    targets = torch.arange(6).repeat(20)
    truth = F.one_hot(targets, 6).double()
    head, tail = truth.clone(), truth.clone()
    head[targets >= 3] = 0.1
    tail[targets < 3] = 0.1
    choice = select_alpha(head, tail, targets)
    assert 0 < choice.value < 1
    assert choice.score == 1
    assert [alpha for alpha, _ in choice.candidates] == list(ALPHAS)
    assert (min(ALPHAS), max(ALPHAS)) == (0.0, 1.0)
    assert dict(choice.candidates)[0.0] < 1 > dict(choice.candidates)[1.0]


def test_one_row_more_is_within_its_standard_error_whatever_the_number_of_rows() -> None:
    """Both are 1 / (classes x rows of a class) then, and how sums are rounded must not decide what is exported."""
    for num_classes in (2, 5, 10):
        for each in range(5, 50, 3):
            targets = torch.arange(num_classes).repeat_interleave(each)
            right = F.one_hot(targets, num_classes).double()
            wrong_once = right.clone()
            wrong_once[0] = wrong_once[0].roll(1)
            choice = select_alpha(wrong_once, right, targets)
            assert choice.value > 0
            assert choice.gain == pytest.approx(choice.standard_error)
            assert choice.accepted == 0
            wrong_twice = right.clone()
            wrong_twice[:2] = wrong_twice[:2].roll(1, dims=1)
            assert select_alpha(wrong_twice, right, targets).accepted > 0


# --------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_chosen_on_is_refused() -> None:
    logits, targets = rows()
    none = torch.zeros(0, dtype=torch.long)
    for attempt in (
        lambda: select_tau(logits[:0], none, COUNTS),
        lambda: select_alpha(logits[:0], logits[:0], none),
        lambda: fit_temperature(logits[:0], none),
    ):
        with pytest.raises(ImbvlmError, match="needs validation rows"):
            attempt()
    with pytest.raises(ImbvlmError, match="with 299 rows"):
        select_tau(logits, targets[:-1], COUNTS)
    with pytest.raises(ImbvlmError, match="rows and classes of the model"):
        select_alpha(logits, logits[:, :4], targets)
    logits[3, 1] = torch.inf
    with pytest.raises(ImbvlmError, match="finite"):
        fit_temperature(logits, targets)
