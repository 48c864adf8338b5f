"""A trial with a second stage: one stream of epochs, a decoder that stays as it was, and numbers that come again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import CLASS_COUNTS, NUM_VIEWS, tiny_config, tiny_data

from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.config.second_stage_registry import SECOND_STAGES
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.trial_data import TrialData
from imbvlm.models.model_builder import restore_model
from imbvlm.models.second_stage_modules import NORM_TAUS, best_tau, tau_normalized
from imbvlm.training import checkpoint
from imbvlm.training.trial_run import EpochResult, build_trial

METHODS = ("linear_probe", "decoder")
TRAINED = [name for name, stage in SECOND_STAGES.items() if stage.loss is not None]
FIRST_EPOCHS, STAGE_EPOCHS = 3, 2


def cases() -> list[tuple[str, str, str]]:
    return [
        (method, kind, name)
        for method in METHODS
        for kind in ("linear", "cosine")
        for name in SECOND_STAGES
        if kind == "linear" or not SECOND_STAGES[name].reads_weight_norms
    ]


def config(method: str = "decoder", kind: str = "linear", name: str = "disalign", **overrides: Any) -> TrialConfig:
    length = {} if name == "tau_normalization" else {"second_stage__num_epochs": STAGE_EPOCHS}
    return tiny_config(method, classifier__kind=kind, second_stage__name=name, **length, **overrides)


def num_epochs(name: str) -> int:
    return FIRST_EPOCHS + (1 if name == "tau_normalization" else STAGE_EPOCHS)


def numbers(results: Iterable[EpochResult]) -> list[tuple[int, int, dict[str, Any]]]:
    return [
        (r.epoch, r.step, {k: v for k, v in r.metrics.items() if "seconds" not in k and "per_second" not in k})
        for r in results
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return tiny_data(tmp_path_factory.mktemp("features"))


def without_validation(data: TrialData) -> TrialData:
    empty = dataclasses.replace(data.val, rows=data.val.rows[:0], labels=data.val.labels[:0])
    return dataclasses.replace(data, val=empty)


# ------------------------------------------------------------------------------------ contract, every stage alike


@pytest.mark.parametrize(("method", "kind", "name"), cases())
def test_its_epochs_follow_the_first_stages_and_its_metrics_are_the_new_classifiers(
    data: TrialData, method: str, kind: str, name: str
) -> None:
    run = build_trial(config(method, kind, name), data)
    plain = build_trial(tiny_config(method, classifier__kind=kind), data)
    results = list(run.epochs())
    assert numbers(results[:FIRST_EPOCHS]) == numbers(plain.epochs()), "the first stage is that of a trial without one"
    assert [result.epoch for result in results] == list(range(1, num_epochs(name) + 1))
    assert run.num_epochs == num_epochs(name)
    per_epoch = results[0].step
    trained = 0 if name == "tau_normalization" else STAGE_EPOCHS
    assert results[-1].step == (FIRST_EPOCHS + trained) * per_epoch
    last = results[-1].metrics
    for metric, value in run.counters(data.val).compute(data.class_stats).items():
        assert last[f"val/{metric}"] == pytest.approx(value, abs=1e-5), metric
    values = [result.metrics["val/balanced_accuracy"] for result in results]
    assert [r.metrics["val/best_balanced_accuracy"] for r in results] == np.maximum.accumulate(values).tolist()
    if trained:
        assert last["train/lr"] < results[FIRST_EPOCHS].metrics["train/lr"]


@pytest.mark.parametrize(("method", "kind", "name"), cases())
def test_what_was_trained_first_stays_bit_for_bit(data: TrialData, method: str, kind: str, name: str) -> None:
    plain = build_trial(tiny_config(method, classifier__kind=kind), data)
    list(plain.epochs())
    run = build_trial(config(method, kind, name), data)
    list(run.epochs())
    before, after = plain.model.state_dict(), run.model.state_dict()
    frozen = [key for key in before if key.startswith("decoder.")]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert bool(frozen) == (method == "decoder")
    if name in ("learnable_weight_scaling", "disalign", "marc"):
        for key, value in plain.model.classifier.state_dict().items():
            assert torch.equal(after[f"classifier.first_stage.{key}"], value)
    assert not torch.equal(run.model(batch(data, method)), plain.model(batch(data, method)))


@pytest.mark.parametrize(("method", "kind", "name"), cases())
def test_the_same_seed_gives_the_same_numbers(data: TrialData, method: str, kind: str, name: str) -> None:
    first = numbers(build_trial(config(method, kind, name), data).epochs())
    torch.manual_seed(99)
    assert numbers(build_trial(config(method, kind, name), data).epochs()) == first
    assert numbers(build_trial(config(method, kind, name, train__seed=1), data).epochs()) != first


@pytest.mark.parametrize(("method", "kind", "name"), cases())
def test_resuming_after_any_epoch_changes_no_number(
    data: TrialData, tmp_path: Path, method: str, kind: str, name: str
) -> None:
    trial = config(method, kind, name)
    whole = build_trial(trial, data)
    expected = []
    for result in whole.epochs():
        expected.append(result)
        checkpoint.save_checkpoint(str(tmp_path / str(result.epoch)), whole.state_dict())
    for epoch in range(1, len(expected) + 1):
        resumed = build_trial(trial, data)
        resumed.load_state_dict(checkpoint.load_checkpoint(str(tmp_path / str(epoch))))
        assert numbers(resumed.epochs()) == numbers(expected[epoch:] or expected[-1:])
        final = resumed.state_dict().tensors
        assert final.keys() == whole.state_dict().tensors.keys()
        assert all(torch.equal(final[key], tensor) for key, tensor in whole.state_dict().tensors.items())


@pytest.mark.parametrize(("method", "kind", "name"), cases())
def test_exported_weights_predict_without_the_training_data(
    data: TrialData, tmp_path: Path, method: str, kind: str, name: str
) -> None:
    trial = config(method, kind, name)
    run = build_trial(trial, data)
    list(run.epochs())
    checkpoint.save_model(str(tmp_path), run.model)
    restored = restore_model(trial, data.info, len(CLASS_COUNTS), checkpoint.load_model_tensors(str(tmp_path)))
    assert torch.equal(restored(batch(data, method)), run.model.eval()(batch(data, method)))


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_its_own_loss_and_only_its_own_weights_move(data: TrialData, name: str) -> None:
    long = {"train.num_epochs": 6, "second_stage.num_epochs": 20, "second_stage.lr": 0.05}
    run = build_trial(config(name=name).with_overrides(long), data)
    losses = [result.metrics["train/loss"] for result in run.epochs()][6:]
    assert losses[-1] < losses[0]
    trainable = [key for key, param in run.model.named_parameters() if param.requires_grad]
    assert trainable
    assert all(key.startswith("classifier.") and "first_stage" not in key for key in trainable)


def batch(data: TrialData, method: str) -> torch.Tensor:
    reads = "tokens" if method == "decoder" else "pooled"
    return data.train.batch(reads, np.array([0, 130, 200]), None).float()


# ------------------------------------------------------------------------------------------ sampling, views, length


@pytest.mark.parametrize("name", TRAINED)
def test_each_epoch_draws_classes_as_the_paper_does_and_unlike_the_first_stage(data: TrialData, name: str) -> None:
    run = build_trial(config(name=name), data)
    course = run._build_second_stage().trainer
    counts = np.bincount(data.train.labels[course.plan_of(FIRST_EPOCHS).rows], minlength=len(CLASS_COUNTS))
    if SECOND_STAGES[name].class_sampling == "class_balanced":
        assert counts[:5].max() - counts[:5].min() <= 1
    else:
        assert counts.tolist() == list(CLASS_COUNTS)
    assert course.plan_of(3).rows.tolist() != course.plan_of(4).rows.tolist()


def test_every_stored_view_is_trained_on(data: TrialData) -> None:
    run = build_trial(config("linear_probe", name="learnable_weight_scaling"), data)
    second = run._build_second_stage()
    rows, views = np.array([3, 150, 3]), np.array([1, 0, 0])
    features, labels, _ = second.features.batch(rows, views)
    torch.testing.assert_close(features, data.train.batch("pooled", rows, views).float())
    assert labels.tolist() == data.train.labels[rows].tolist()
    assert set(second.trainer.plan_of(3).views.tolist()) == set(range(NUM_VIEWS))


def test_it_follows_a_length_in_steps(data: TrialData) -> None:
    trial = config(name="marc").with_overrides({"train.num_steps": 11})
    results = list(build_trial(trial, data).epochs())
    assert [result.step for result in results] == [8, 11, 19, 27]


def test_decoder_outputs_are_computed_once(data: TrialData, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_trial(config("decoder", name="classifier_retraining"), data)
    results = run.epochs()
    for _ in range(FIRST_EPOCHS + 1):
        next(results)
    monkeypatch.setattr(run.model.decoder, "forward", lambda tokens: pytest.fail("the decoder ran again"))
    next(results)


def test_retraining_does_not_start_from_the_first_stages_start(data: TrialData) -> None:
    run = build_trial(config("linear_probe", name="classifier_retraining"), data)
    start = run.model.classifier.weight.detach().clone()
    run._build_second_stage()
    assert not torch.isclose(run.model.classifier.weight, start).any()


def test_a_rate_that_is_too_high_is_a_failure_of_the_second_stage(data: TrialData) -> None:
    trial = config("linear_probe", name="disalign", second_stage__lr=1e38, train__clip_grad_norm=None)
    results = list(build_trial(trial, data).epochs())
    assert len(results) == FIRST_EPOCHS + 1
    assert "in epoch 4, step" in results[-1].failure
    assert "generalized_reweight of second_stage disalign" in results[-1].failure
    assert "lower second_stage.lr" in results[-1].failure


# ------------------------------------------------------------------------------------------------- tau-normalization


def test_tau_is_the_best_on_validation_and_is_reported(data: TrialData) -> None:
    run = build_trial(config(name="tau_normalization"), data)
    plain = build_trial(tiny_config("decoder", classifier__kind="linear"), data)
    list(plain.epochs())
    last = list(run.epochs())[-1].metrics
    plain.model.eval()
    with torch.no_grad():
        features = plain.model.decoder(data.val.batch("tokens", np.arange(len(data.val)), None).float())
    choice = best_tau(plain.model.classifier, features, torch.from_numpy(data.val.labels))
    assert last["second_stage/tau"] == choice.value
    assert last["second_stage/tau"] in NORM_TAUS
    assert last["val/balanced_accuracy"] == pytest.approx(choice.score)
    assert torch.equal(run.model.classifier.weight, tau_normalized(plain.model.classifier, choice.value).weight)
    assert not run.model.classifier.bias.any()


def test_a_refit_without_validation_takes_the_tau_that_it_is_given(data: TrialData) -> None:
    refit = without_validation(data)
    results = list(build_trial(config(name="tau_normalization", second_stage__tau=0.35), refit).epochs())
    assert results[-1].metrics == {"second_stage/tau": 0.35}
    assert len(results) == FIRST_EPOCHS + 1
    with pytest.raises(ImbvlmError, match=r"Set second_stage\.tau"):
        build_trial(config(name="tau_normalization"), refit)


@pytest.mark.parametrize("name", TRAINED)
def test_other_stages_need_no_validation(data: TrialData, name: str) -> None:
    results = list(build_trial(config(name=name), without_validation(data)).epochs())
    assert len(results) == FIRST_EPOCHS + STAGE_EPOCHS
    assert not [key for key in results[-1].metrics if key.startswith("val/")]


# -------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", [name for name, entry in SECOND_STAGES.items() if entry.reads_weight_norms])
def test_stages_that_read_lengths_are_refused_with_a_cosine_classifier(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"second_stage {name} reads the lengths .*Set classifier\.kind: linear"):
        config(kind="cosine", name=name)


def test_a_method_that_trains_nothing_has_no_second_stage() -> None:
    with pytest.raises(ConfigError, match="zero_shot doesn't read the section 'second_stage'"):
        tiny_config("zero_shot", second_stage__name="disalign")


def test_a_name_builds_the_section_another_drops_the_old_options_and_null_takes_it_away() -> None:
    plain = tiny_config("decoder", classifier__kind="linear")
    disalign = plain.with_overrides({"second_stage.name": "disalign", "second_stage.exponent": 0.8})
    assert disalign.second_stage.exponent == 0.8
    scaled = disalign.with_overrides({"second_stage.name": "learnable_weight_scaling"})
    assert "exponent" not in scaled.to_tree()["second_stage"]
    assert scaled.with_overrides({"second_stage.name": "tau_normalization"}).to_tree()["second_stage"] == {
        "name": "tau_normalization",
        "tau": None,
    }
    assert scaled.with_overrides({"second_stage.name": None}) == plain
    assert plain.with_overrides({"second_stage.name": None}) == plain
    with pytest.raises(ConfigError, match=r"'second_stage.name' is required"):
        plain.with_overrides({"second_stage.name": None, "second_stage.lr": 0.1})
    with pytest.raises(ConfigError, match="did you mean 'disalign'"):
        plain.with_overrides({"second_stage.name": "disalgn"})
    with pytest.raises(ConfigError, match=r"classifier\.kind"):
        plain.with_overrides({"classifier.kind": None})
