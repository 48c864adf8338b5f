"""A trial gives the same numbers whatever ran before it and wherever it is resumed, and says what went wrong.

The first losses of a tiny run of every (method, loss) are kept in first_losses.json. After a change that is meant to
change them, write them anew and commit the difference:

    python tests/training/test_trial_run.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from tiny_data import CLASS_COUNTS, tiny_config, tiny_data
from tiny_images import TinyImages
from trial_logits import trial_logits

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.losses import build_loss
from imbvlm.longtail.worker_group import SINGLE_WORKER
from imbvlm.training import checkpoint
from imbvlm.training.checkpoint import CheckpointError
from imbvlm.training.step.loss_schedule import LossSchedule
from imbvlm.training.trial_run import NUM_FIRST_LOSSES, EpochResult, build_trial

STORED = [name for name, entry in METHODS.items() if not entry.trains_encoder]
TRAINED = [name for name in STORED if METHODS[name].trains]
FIRST_LOSSES = Path(__file__).with_name("first_losses.json")
# Pillow resizes images that are taller than wide in another way since 13, with which first_losses.json was recorded.
RESIZES_OTHERWISE = int(PIL.__version__.partition(".")[0]) < 13
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return tiny_data(tmp_path_factory.mktemp("features"), text_tower=True)


def numbers(results: Iterable[EpochResult]) -> list[tuple[int, int, dict[str, Any]]]:
    """Everything of the results but times."""
    return [
        (r.epoch, r.step, {k: v for k, v in r.metrics.items() if "seconds" not in k and "per_second" not in k})
        for r in results
    ]


# ------------------------------------------------------------------------------------------------ first losses


def first_losses(data: TrialData, images: TinyImages) -> dict[Any, Any]:
    """Of every method with every loss on stored features, and with one loss on images."""
    torch.set_num_threads(1)
    losses = {}
    for method in METHODS:
        if METHODS[method].trains_encoder:
            config = images.config(method, loss__name="balanced_softmax", train__num_epochs=1, train__batch_size=6)
            run = build_trial(config, images.data(config))
            list(run.epochs())
            losses[f"{method} balanced_softmax"] = run.first_losses
    for method in TRAINED:
        for loss in LOSSES:
            run = build_trial(tiny_config(method, loss__name=loss, train__num_epochs=1), data)
            list(run.epochs())
            losses[f"{method} {loss}"] = run.first_losses
    return losses


def test_first_losses_are_the_recorded_ones(data: TrialData, tmp_path: Path) -> None:
    """A new method or loss is compared once first_losses.json is written anew (see above)."""
    recorded, threads = json.loads(FIRST_LOSSES.read_text()), torch.get_num_threads()
    computed = first_losses(data, TinyImages(tmp_path))
    torch.set_num_threads(threads)
    assert recorded.keys() <= computed.keys()
    for name in recorded:
        tolerance = 1e-3 if RESIZES_OTHERWISE and METHODS[name.split()[0]].trains_encoder else 1e-4
        assert computed[name] == pytest.approx(recorded[name], abs=tolerance), name
        assert len(computed[name]) == NUM_FIRST_LOSSES


# ---------------------------------------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("method", STORED)
def test_a_trial_gives_the_same_numbers_whatever_ran_before_it(data: TrialData, method: str) -> None:
    first = numbers(build_trial(tiny_config(method), data).epochs())
    torch.manual_seed(99)
    np.random.seed(99)
    list(build_trial(tiny_config("decoder", loss__name="focal"), data).epochs())
    before = torch.get_rng_state()
    assert numbers(build_trial(tiny_config(method), data).epochs()) == first
    assert torch.equal(torch.get_rng_state(), before), "other users of the process keep their random numbers"


def test_another_seed_gives_other_numbers(data: TrialData) -> None:
    runs = [numbers(build_trial(tiny_config("linear_probe", train__seed=seed), data).epochs()) for seed in (0, 1)]
    assert runs[0] != runs[1]


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("zero_shot", {}),
        ("linear_probe", {"optim__name": "adamw", "data__class_sampling": "progressively_balanced"}),
        ("linear_probe", {"train__num_epochs": None, "train__num_steps": 20, "optim__momentum": 0.0}),
        ("decoder", {"loss__name": "ldam", "loss__reweight_from": 0.5, "classifier__init": "class_mean"}),
        ("prompt_tuning", {"prompt_tuning__per_class": True, "prompt_tuning__chunk_size": 4}),
    ],
)
def test_resuming_after_any_epoch_changes_no_number(
    data: TrialData, tmp_path: Path, method: str, overrides: dict[str, str | float | None]
) -> None:
    config = tiny_config(method, **overrides)
    whole = build_trial(config, data)
    expected = []
    for result in whole.epochs():
        expected.append(result)
        checkpoint.save_checkpoint(str(tmp_path / str(result.epoch)), whole.state_dict())
    for epoch in range(1, len(expected)):
        resumed = build_trial(config, data)
        resumed.load_state_dict(checkpoint.load_checkpoint(str(tmp_path / str(epoch))))
        assert numbers(resumed.epochs()) == numbers(expected[epoch:])
        final = resumed.state_dict().tensors
        assert all(torch.equal(final[name], tensor) for name, tensor in whole.state_dict().tensors.items())


def test_a_run_restored_at_its_end_gives_its_last_result_again(data: TrialData) -> None:
    run = build_trial(tiny_config("linear_probe"), data)
    last = list(run.epochs())[-1]
    restored = build_trial(tiny_config("linear_probe"), data)
    restored.load_state_dict(run.state_dict())
    assert list(restored.epochs()) == [last]


def test_a_checkpoint_of_another_trial_or_with_a_gap_is_refused(data: TrialData) -> None:
    state = build_trial(tiny_config("linear_probe"), data).state_dict()
    with pytest.raises(CheckpointError, match="another configuration"):
        build_trial(tiny_config("linear_probe", optim__lr=0.5), data).load_state_dict(state)
    for lacking in (
        dataclasses.replace(state, tensors={}),
        dataclasses.replace(state, scalars={"trial": state.scalars["trial"]}),
    ):
        with pytest.raises(CheckpointError, match="lacks what this trial needs"):
            build_trial(tiny_config("linear_probe"), data).load_state_dict(lacking)


# ------------------------------------------------------------------------------------------------------ results


def test_training_learns_and_best_values_are_running_maxima(data: TrialData) -> None:
    results = list(build_trial(tiny_config("decoder", train__num_epochs=6), data).epochs())
    assert results[-1].metrics["train/loss"] < results[0].metrics["train/loss"] / 2
    assert results[-1].metrics["val/top1_accuracy"] > 0.6
    for name in ("top1_accuracy", "balanced_accuracy", "many_shot_accuracy", "few_shot_accuracy"):
        values = [result.metrics[f"val/{name}"] for result in results]
        assert [result.metrics[f"val/best_{name}"] for result in results] == np.maximum.accumulate(values).tolist()
    assert "val/best_loss" not in results[0].metrics


def test_a_group_without_classes_is_absent(tmp_path: Path) -> None:
    result = next(build_trial(tiny_config("linear_probe"), tiny_data(tmp_path, (30, 25, 3))).epochs())
    assert "val/many_shot_accuracy" not in result.metrics
    assert "val/zero_train_accuracy" not in result.metrics
    assert "val/few_shot_accuracy" in result.metrics


@pytest.mark.parametrize("num_steps", [1, 8, 9, 20])
def test_num_steps_is_exactly_that_many_steps(data: TrialData, num_steps: int) -> None:
    config = tiny_config("linear_probe", train__num_steps=num_steps)
    run = build_trial(config, data)
    results = list(run.epochs())
    assert results[-1].step == num_steps
    assert [result.epoch for result in results] == list(range(1, math.ceil(num_steps / 8) + 1))
    assert all("val/top1_accuracy" in result.metrics for result in results)


def test_the_epochs_loss_weighs_a_short_batch_by_its_images(data: TrialData) -> None:
    """At a rate of almost nothing the weights stay, and the epoch's loss must be that of all images at once."""
    config = tiny_config("linear_probe", optim__lr=1e-12, train__num_epochs=1, train__batch_size=100)
    run = build_trial(config, data)
    result = next(run.epochs())
    assert len(data.train) % 100
    views = [data.train.batch("pooled", np.arange(len(data.train)), np.full(len(data.train), v)) for v in (0, 1)]
    losses = [
        torch.nn.functional.cross_entropy(
            run.model(view.float()), torch.from_numpy(data.train.labels), reduction="none"
        ).detach()
        for view in views
    ]
    from imbvlm.longtail.class_sampling import epoch_plan

    plan = epoch_plan(data.train.labels, len(CLASS_COUNTS), "instance_balanced", 0, 0, 1, 2)
    expected = torch.stack(losses)[torch.from_numpy(plan.views), torch.from_numpy(plan.rows)].mean()
    assert result.metrics["train/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_refit_without_validation_has_no_val_keys(data: TrialData) -> None:
    empty = dataclasses.replace(data.val, rows=data.val.rows[:0], labels=data.val.labels[:0])
    results = list(build_trial(tiny_config("linear_probe"), dataclasses.replace(data, val=empty)).epochs())
    assert len(results) == 3
    assert not [key for key in results[-1].metrics if key.startswith("val/")]


def test_zero_shot_is_one_result_without_training(data: TrialData) -> None:
    results = list(build_trial(tiny_config("zero_shot"), data).epochs())
    assert [(result.epoch, result.step) for result in results] == [(1, 0)]
    assert results[0].metrics["val/top1_accuracy"] > 0.6
    assert not [key for key in results[0].metrics if key.startswith("train/")]


def test_logits_are_in_order_and_agree_with_the_counters(data: TrialData, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_trial(tiny_config("decoder"), data)
    list(run.epochs())
    whole = trial_logits(run, data.val)
    monkeypatch.setattr("imbvlm.training.evaluator.EVAL_BYTES", 0)
    assert trial_logits(run, data.val).shape == whole.shape
    torch.testing.assert_close(trial_logits(run, data.val), whole, atol=1e-4, rtol=1e-4)
    assert whole.dtype == torch.float32
    right = (whole.argmax(dim=-1).numpy() == data.val.labels).mean()
    assert run.counters(data.val).compute(data.class_stats)["top1_accuracy"] == pytest.approx(right)
    assert run.counters(data.val).total.tolist() == [8] * len(CLASS_COUNTS)


def test_no_row_to_train_on_is_said(data: TrialData) -> None:
    empty = dataclasses.replace(data.train, rows=data.train.rows[:0], labels=data.train.labels[:0])
    with pytest.raises(ImbvlmError, match="no training image"):
        build_trial(tiny_config("linear_probe"), dataclasses.replace(data, train=empty))


# ----------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("method", TRAINED)
def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(data: TrialData, method: str) -> None:
    own = {"optim__first_epoch_lr": None} if method == "prompt_tuning" else {"classifier__kind": "linear"}
    config = tiny_config(method, optim__lr=1e38, train__clip_grad_norm=None, **own)
    results = list(build_trial(config, data).epochs())
    assert len(results) == 1
    assert results[0].epoch == 1
    assert results[0].metrics == {}
    assert "wasn't finite in epoch 1, step" in results[0].failure
    assert "loss cross_entropy" in results[0].failure
    assert "optim.lr" in results[0].failure


def test_the_step_that_failed_is_the_one_named(data: TrialData) -> None:
    config = tiny_config("linear_probe")
    run = build_trial(config, data)
    epochs = run.epochs()
    next(epochs)
    with torch.no_grad():
        run.model.classifier.weight[0, 0] = float("nan")
    result = next(epochs)
    assert "in epoch 2, step 9 of 24" in result.failure
    assert next(epochs, None) is None


def test_weights_that_overflow_in_the_last_step_are_a_failure_too(data: TrialData) -> None:
    """The step's own loss was finite: only validation can see it, and its accuracies mean nothing."""
    config = tiny_config(
        "linear_probe", classifier__kind="linear", optim__lr=1e38, train__num_steps=1, train__clip_grad_norm=None
    )
    results = list(build_trial(config, data).epochs())
    assert [result.metrics for result in results] == [{}]
    assert "validation loss wasn't finite in epoch 1, step 1 of 1" in results[0].failure


def test_out_of_memory_names_what_to_lower(data: TrialData) -> None:
    run = build_trial(tiny_config("linear_probe"), data)

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    run.model.register_forward_pre_hook(too_large)
    with pytest.raises(ImbvlmError, match=r"out of memory with train.batch_size 32 .* 6 classes.*Lower"):
        next(run.epochs())


@pytest.mark.parametrize(
    ("decoder", "fix"),
    [
        ({"decoder__width": 4096}, r"Set decoder\.width below 4096, whose weights take 4.0 GB in training\.$"),
        ({}, r"Lower train\.batch_size, or give the trial more workers; or set decoder\.width below 16\.$"),
    ],
)
def test_out_of_memory_names_the_decoders_width_where_its_weights_are_most_of_it(
    data: TrialData, decoder: dict[str, int], fix: str
) -> None:
    """A width of 16 was meant and 16,384 set: no batch is small enough for that."""
    run = build_trial(tiny_config("decoder", train__batch_size=64), data)
    decoder = run.config.with_overrides({key.replace("__", "."): value for key, value in decoder.items()}).decoder
    computing = dataclasses.replace(run._computing, decoder=decoder)
    assert (computing.num_tokens, computing.token_width) == (data.info.num_tokens, data.info.token_width)
    with pytest.raises(ImbvlmError, match=fix), computing.working():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")


def test_an_error_while_reading_features_is_raised_and_no_thread_stays(data: TrialData) -> None:
    broken = dataclasses.replace(data.train, rows=data.train.rows + 10_000)
    with pytest.raises(IndexError):
        next(build_trial(tiny_config("linear_probe"), dataclasses.replace(data, train=broken)).epochs())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_a_run_stopped_between_epochs_leaves_nothing_behind(data: TrialData) -> None:
    epochs = build_trial(tiny_config("linear_probe"), data).epochs()
    next(epochs)
    epochs.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


# ---------------------------------------------------------------------------------------------- the loop's options


def test_threads_are_the_trials_own_and_given_back(data: TrialData, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    wanted = before + 1
    run = build_trial(tiny_config("linear_probe", train__num_threads=wanted), data)
    seen = []
    run.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    for _ in run.epochs():
        assert torch.get_num_threads() == before
    assert set(seen) == {wanted}


def test_bfloat16_trains_with_float32_weights_and_is_close(data: TrialData) -> None:
    exact = list(build_trial(tiny_config("decoder"), data).epochs())
    run = build_trial(tiny_config("decoder", train__precision="bfloat16"), data)
    rounded = list(run.epochs())
    assert all(param.dtype == torch.float32 for param in run.model.parameters())
    assert rounded[0].metrics["train/loss"] != exact[0].metrics["train/loss"]
    assert rounded[0].metrics["train/loss"] == pytest.approx(exact[0].metrics["train/loss"], rel=0.2)


def test_by_itself_a_decoder_computes_in_bfloat16_where_the_processor_has_it(
    data: TrialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed_in(method: str, **options: Any) -> set[bool]:
        run = build_trial(tiny_config(method, train__precision="auto", train__num_epochs=1, **options), data)
        seen = set[bool]()
        run.model.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
        list(run.epochs())
        return seen

    for has_it in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        assert computed_in("decoder") == {has_it}
        assert computed_in("linear_probe") == {False}


def test_clipping_changes_the_course_only_where_gradients_are_larger(data: TrialData) -> None:
    def course(limit: float | None) -> list[tuple[int, int, dict[str, Any]]]:
        return numbers(build_trial(tiny_config("linear_probe", train__clip_grad_norm=limit), data).epochs())

    assert course(1e9) == course(None)
    assert course(0.01) != course(None)


def objective(config: TrialConfig) -> LossSchedule:
    return LossSchedule(config, np.array(CLASS_COUNTS), 10, 100, CPU, SINGLE_WORKER)


def test_prior_correction_follows_the_sampling_and_weights_do_not() -> None:
    balanced = {"data__class_sampling": "class_balanced"}
    corrected = objective(tiny_config("linear_probe", loss__name="balanced_softmax", **balanced)).counts_at(0)
    assert corrected[:5].std() == pytest.approx(0, abs=1e-9)
    assert corrected[5] == 0
    for name, overrides in (("inverse_frequency", {}), ("balanced_softmax", {"loss__prior": "train"}), ("ldam", {})):
        counts = objective(tiny_config("linear_probe", loss__name=name, **overrides, **balanced)).counts_at(0)
        assert counts.tolist() == list(CLASS_COUNTS)


def test_progressive_sampling_is_corrected_epoch_by_epoch() -> None:
    config = tiny_config("linear_probe", loss__name="balanced_softmax", data__class_sampling="progressively_balanced")
    spreads = [objective(config).counts_at(epoch)[:5].std() for epoch in range(10)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] == pytest.approx(0, abs=1e-9)


def test_ldams_margin_is_scaled_as_the_classifier_is() -> None:
    cosine = {"loss__name": "ldam", "classifier__kind": "cosine", "classifier__temperature": 0.05}
    linear = {"loss__name": "ldam", "classifier__kind": "linear"}
    for overrides, scale in ((cosine, 20.0), (linear, 1.0), ({**cosine, "loss__margin_scale": 3.0}, 3.0)):
        loss = objective(tiny_config("linear_probe", **overrides)).at_epoch(0)(0)
        assert loss.numbers()["margin_scale"] == pytest.approx(scale)


def test_deferred_reweighting_begins_where_it_is_asked_to() -> None:
    config = tiny_config("linear_probe", loss__name="ldam", loss__reweight_from=0.8)
    logits, labels = torch.randn(4, 6), torch.tensor([0, 0, 3, 4])
    loss_at = objective(config).at_epoch(7)
    plain = loss_at(0)(logits, labels)
    assert plain == build_loss("ldam", CLASS_COUNTS, margin_scale=config.classifier.logit_scale)(logits, labels)
    assert loss_at(79)(logits, labels) == plain
    assert loss_at(80)(logits, labels) != plain


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_losses(data: TrialData) -> None:
    exact = build_trial(tiny_config("decoder"), data)
    compiled = build_trial(tiny_config("decoder", train__compile=True), data)
    assert [r.step for r in compiled.epochs()] == [r.step for r in exact.epochs()]
    assert compiled.first_losses == pytest.approx(exact.first_losses, abs=1e-3)
    assert compiled.state_dict().tensors.keys() == exact.state_dict().tensors.keys()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        images = TinyImages(Path(folder) / "images")
        text = json.dumps(first_losses(tiny_data(folder, text_tower=True), images), indent=1)
    FIRST_LOSSES.write_text(text + "\n")
