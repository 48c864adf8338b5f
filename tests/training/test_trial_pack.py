"""Trials that train together give what each gives alone, whatever tells them apart, and none reaches another."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import tiny_config, tiny_data, tiny_features
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imbvlm.base.errors import PackError
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.second_stage_registry import SECOND_STAGES
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.trial_data import StoredRows, TrialData
from imbvlm.longtail.losses import build_loss, stack_losses
from imbvlm.training import trial_pack as pack_module
from imbvlm.training.evaluator import Evaluator
from imbvlm.training.step.batch_source import CachedFeatureSource
from imbvlm.training.trial_pack import TrialPack, pack_key
from imbvlm.training.trial_run import EpochResult, TrialRun, build_trial
from imbvlm.training.trial_session import HAS_JOINED, TrialSession, TrialSettings

LOSS_OPTIONS = {
    "focal": [{"gamma": 0.5}, {"gamma": 2.5}],
    "effective_number": [{"beta": 0.9}, {"beta": 0.9999}],
    "generalized_reweight": [{"exponent": 0.25}, {"exponent": 1.5}],
    "logit_adjustment": [{"tau": 0.5}, {"tau": 1.5}],
    "ldam": [{"max_margin": 0.2}, {"max_margin": 0.8, "reweight_from": 0.5}],
    "lade": [{"remine_lambda": 0.05}, {"remine_lambda": 0.5, "weight": 0.01}],
}


def probe(**overrides: Any) -> TrialConfig:
    return tiny_config("linear_probe", train__num_epochs=4, **overrides)


def members(optim: str) -> list[TrialConfig]:
    """Every loss with unlike options, both classifiers, each with a rate and schedule of its own."""
    configs = []
    losses = [(name, options) for name in LOSSES for options in LOSS_OPTIONS.get(name, [{}, {}])]
    for number, (name, options) in enumerate(losses):
        classifier = {"classifier.kind": "linear"} if number % 3 else {
            "classifier.kind": "cosine", "classifier.temperature": 0.02 + number / 200}  # fmt: skip
        config = probe().with_overrides({
            "optim.name": optim, "optim.lr": 0.01 * 1.2**number, "optim.weight_decay": 1e-4 * number,
            "optim.lr_schedule": ("cosine", "half_cosine", "constant")[number % 3], **classifier,
            "loss.name": name, **{f"loss.{key}": value for key, value in options.items()}})  # fmt: skip
        configs.append(config)
    return configs


def alone(config: TrialConfig, data: TrialData) -> tuple[list[dict], torch.Tensor]:
    run = build_trial(config, data)
    return [result.metrics for result in run.epochs()], weights(run)


def joined(configs: list[TrialConfig], data: TrialData) -> tuple[TrialPack, list[TrialRun]]:
    """A pack with a run of each configuration in it."""
    pack, runs = TrialPack(), [build_trial(config, data) for config in configs]
    for run in runs:
        run.join(pack)
    return pack, runs


def assert_as_alone(results: Iterable[EpochResult], config: TrialConfig, data: TrialData, first: int = 0) -> None:
    """Results of epochs from `first` on are those of the configuration trained alone."""
    expected, _ = alone(config, data)
    assert [result.metrics["val/loss"] for result in results] == pytest.approx(
        [epoch["val/loss"] for epoch in expected[first:]], rel=1e-5
    )


def weights(run: TrialRun) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in run.model.parameters()])


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_pack_gives_each_member_what_it_gives_alone(tmp_path: Path, optim: str) -> None:
    data, configs = tiny_data(tmp_path), members(optim)
    assert len({pack_key(config) for config in configs}) == 1
    _, runs = joined(configs, data)
    generators = [run.epochs() for run in runs]
    together = [[next(generator).metrics for generator in generators] for _ in range(4)]
    for place, config in enumerate(configs):
        expected, expected_weights = alone(config, data)
        torch.testing.assert_close(weights(runs[place]), expected_weights, rtol=1e-4, atol=1e-5, msg=str(config.loss))
        for epoch, metrics in enumerate(expected):
            for name in ("train/loss", "train/lr", "val/loss", "val/balanced_accuracy", "val/best_top1_accuracy"):
                assert together[epoch][place][name] == pytest.approx(metrics[name], rel=1e-5), (config.loss, name)


def test_one_that_leaves_or_breaks_changes_nothing_for_the_others(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    configs = [probe(optim__lr=0.05), probe(optim__lr=1e38, train__clip_grad_norm=1.0), probe(optim__lr=0.2)]
    _, runs = joined(configs, data)
    steady, broken, short = (run.epochs() for run in runs)
    results = [next(steady)]
    failed = next(broken)
    next(short)
    assert "wasn't finite in epoch 1" in failed.failure
    assert failed.failure == next(build_trial(configs[1], data).epochs()).failure
    for run in runs[1:]:
        run.leave_pack()
    assert_as_alone([*results, *steady], configs[0], data)


@pytest.mark.parametrize("method", ["linear_probe", "decoder"])
def test_an_error_in_the_middle_of_an_epoch_is_everybodys_and_no_number_comes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Such as memory that runs out: all have moved on by a part of the epoch, and each may go on alone."""
    features, left, brought = tiny_features(tmp_path), [1000], pack_module.to_device
    trials = [
        TrialSettings(tiny_config(method, train__num_epochs=3, optim__lr=lr), features, "val/loss")
        for lr in (0.02, 0.03, 0.05)
    ]

    def failing(batch: Any, device: torch.device) -> Any:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("can't allocate memory")
        return brought(batch, device)

    monkeypatch.setattr(pack_module, "to_device", failing)
    session, pack = TrialSession(torch.device("cpu")), TrialPack()
    members = [session.reports(trial, pack) for trial in trials]
    assert [next(member) for member in members] == [HAS_JOINED] * 3
    assert [next(member).epoch for member in members] == [1, 1, 1]
    left[0] = 2
    for member in members:
        with pytest.raises(PackError, match="stopped in epoch 2: RuntimeError: can't allocate memory"):
            next(member)


def test_a_member_goes_on_alone_from_its_checkpoint(tmp_path: Path) -> None:
    data, configs = tiny_data(tmp_path), [probe(optim__lr=0.05), probe(optim__lr=0.2)]
    pack, runs = joined(configs, data)
    generators = [run.epochs() for run in runs]
    for _ in range(2):
        for generator in generators:
            next(generator)
    resumed = build_trial(configs[1], data)
    resumed.load_state_dict(runs[1].state_dict())
    resumed.join(pack)
    assert_as_alone(resumed.epochs(), configs[1], data, first=2)


def second_stages() -> list[TrialConfig]:
    """Each with several rates and options, on both classifiers where it may be; one of another length, one without."""
    overrides = []
    for name in SECOND_STAGES:
        for place in range(2 if SECOND_STAGES[name].reads_weight_norms else 4):
            keys = {"second_stage.name": name, "optim.lr": 0.02 * 2**place}
            keys |= {"classifier.temperature": 0.02 * place} if place > 1 else {"classifier.kind": "linear"}
            if name != "tau_normalization":
                keys |= {"second_stage.num_epochs": 2, "second_stage.lr": 0.02 + place / 50}
            if name in ("disalign", "marc"):
                keys["second_stage.exponent"] = 0.5 + place
            overrides.append(keys)
    overrides += [{**overrides[0], "second_stage.num_epochs": 1}, {"optim.lr": 0.05}]
    return [probe().with_overrides({"train.num_epochs": 2, **keys}) for keys in overrides]


def test_second_stages_train_together_as_each_does_alone(tmp_path: Path) -> None:
    data, configs = tiny_data(tmp_path), second_stages()
    assert len({pack_key(config) for config in configs}) == 1
    pack, runs = joined(configs, data)
    generators = [run.epochs() for run in runs]
    together = [[] for _ in runs]
    for turn in itertools.zip_longest(*generators):
        for run, results, result in zip(runs, together, turn, strict=True):
            results += [] if result is None else [result.metrics]
            if result is not None and result.epoch == run.num_epochs:
                run.leave_pack()
    assert not pack.members
    for config, run, results in zip(configs, runs, together, strict=True):
        expected, expected_weights = alone(config, data)
        assert len(results) == len(expected) == run.num_epochs
        torch.testing.assert_close(weights(run), expected_weights, rtol=1e-4, atol=1e-5, msg=str(config.second_stage))
        for name in ("val/loss", "train/loss", "train/lr", "second_stage/tau"):
            got, wanted = ([epoch[name] for epoch in epochs if name in epoch] for epochs in (results, expected))
            assert got == pytest.approx(wanted, rel=1e-5), (config.second_stage, name)


def test_second_stages_of_a_pack_keep_one_copy_of_what_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy for each of 32 members would take 40 GB on iNaturalist 2018."""
    computed = []
    outputs = Evaluator.all_views
    monkeypatch.setattr(Evaluator, "all_views", lambda self, *rest: computed.append(1) or outputs(self, *rest))
    _, runs = joined(second_stages(), tiny_data(tmp_path))
    for turn in zip(*[run.epochs() for run in runs[:-1]], strict=False):
        assert len(computed) == (0 if turn[0].epoch <= 2 else 2), "training rows and validation, once each"


def test_one_that_leaves_its_second_stage_changes_nothing_for_the_others(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    configs = [probe(optim__lr=0.05, second_stage__name="classifier_retraining", second_stage__lr=rate)
               for rate in (0.02, 1e38, 0.1)]  # fmt: skip
    _, runs = joined(configs, data)
    steady, broken, short = (run.epochs() for run in runs)
    results = []
    for _ in range(4):
        results += [next(steady)]
        next(broken), next(short)
    results += [next(steady)]
    assert "wasn't finite in epoch 5" in next(broken).failure
    next(short)
    for run in runs[1:]:
        run.leave_pack()
    assert_as_alone([*results, *steady], configs[0], data)


def decoders(**keys: Any) -> list[TrialConfig]:
    """Of one shape; each with a loss, a rate and a classifier of its own."""
    base = tiny_config("decoder", train__num_epochs=3, **keys)
    return [
        base.with_overrides({"loss.name": "balanced_softmax", "optim.lr": 2e-3}),
        base.with_overrides({"loss.name": "focal", "optim.lr": 5e-3, "classifier.kind": "linear"}),
        base.with_overrides({"loss.name": "ldam", "loss.reweight_from": 0.5, "classifier.temperature": 0.1}),
    ]


@pytest.mark.parametrize("keys", [{}, {"decoder__depth": 0, "decoder__input_norm": "none"}, {"decoder__width": 8}])
def test_decoders_of_a_pack_give_exactly_what_they_give_alone_and_read_each_batch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, int | str]
) -> None:
    data, configs = tiny_data(tmp_path), decoders(**keys)
    assert len({pack_key(config) for config in configs}) == 1
    expected, num_read, batch = [alone(config, data) for config in configs], [0], StoredRows.batch

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        num_read[0] += self is data.train
        return batch(self, *arguments)

    monkeypatch.setattr(StoredRows, "batch", counted)
    *_, _ = build_trial(configs[0], data).epochs()
    of_one, num_read[0] = num_read[0], 0
    _, runs = joined(configs, data)
    together = list(zip(*[run.epochs() for run in runs], strict=True))
    assert num_read[0] == of_one > 0
    for place, (metrics, expected_weights) in enumerate(expected):
        assert torch.equal(weights(runs[place]), expected_weights)
        for name in ("train/loss", "train/lr", "val/loss", "val/best_balanced_accuracy"):
            assert [turn[place].metrics[name] for turn in together] == [epoch[name] for epoch in metrics]


@pytest.mark.parametrize(("most", "kept_on"), [(2**20, "meta"), (0, "cpu")])
def test_what_members_are_evaluated_on_goes_to_the_device_once_where_it_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, kept_on: str
) -> None:
    monkeypatch.setattr("imbvlm.training.step.batch_source.ON_DEVICE_BYTES", most)
    data = tiny_data(tmp_path)
    feed = CachedFeatureSource(data.info, "pooled", torch.device("meta"))
    chunks = np.array_split(np.arange(len(data.val)), 3)
    first, second = list(feed.evaluate(data.val, chunks)), list(feed.evaluate(data.val, chunks))
    assert {tensor.device.type for batch in first for tensor in batch[:2]} == {kept_on}
    assert all(tensor is other for tensor, other in zip(first, second, strict=True))
    assert np.array_equal(np.concatenate([batch.examples for batch in first]), np.arange(len(data.val)))


def test_a_decoder_that_leaves_or_breaks_changes_nothing_for_the_others(tmp_path: Path) -> None:
    data, configs = tiny_data(tmp_path), decoders()
    configs[1] = configs[1].with_overrides({"optim.lr": 1e38})
    _, runs = joined(configs, data)
    steady, broken, short = (run.epochs() for run in runs)
    results = [next(steady)]
    failed = next(broken)
    next(short)
    assert failed.failure == next(build_trial(configs[1], data).epochs()).failure
    assert "wasn't finite in epoch 1" in failed.failure
    for run in runs[1:]:
        run.leave_pack()
    assert_as_alone([*results, *steady], configs[0], data)


@pytest.mark.parametrize("stage", SECOND_STAGES)
def test_second_stages_behind_decoders_read_each_its_own(tmp_path: Path, stage: str) -> None:
    data, lengths = tiny_data(tmp_path), {} if stage == "tau_normalization" else {"second_stage.num_epochs": 2}
    kind = {"classifier.kind": "linear"} if SECOND_STAGES[stage].reads_weight_norms else {}
    configs = [config.with_overrides({"second_stage.name": stage, **lengths, **kind}) for config in decoders()]
    _, runs = joined(configs, data)
    together = list(zip(*[run.epochs() for run in runs], strict=True))
    for place, config in enumerate(configs):
        metrics, expected_weights = alone(config, data)
        assert torch.equal(weights(runs[place]), expected_weights)
        assert [turn[place].metrics["val/loss"] for turn in together] == [epoch["val/loss"] for epoch in metrics]


def test_what_shares_no_stream_of_features_is_not_packed() -> None:
    key = pack_key(probe())
    assert pack_key(probe(optim__lr=0.5, loss__name="focal", classifier__init="class_mean")) == key
    for other in (
        {"train__seed": 1}, {"train__batch_size": 16}, {"train__num_epochs": 5}, {"train__clip_grad_norm": 2.0},
        {"data__class_sampling": "square_root"}, {"features__num_views": 2}, {"optim__momentum": 0.8},
        {"optim__name": "adamw"}, {"encoder__image_size": 64},
    ):  # fmt: skip
        assert pack_key(tiny_config("linear_probe", **{"train__num_epochs": 4, **other})) not in (key, None), other
    assert pack_key(tiny_config("zero_shot")) is None
    (key,) = {pack_key(config) for config in decoders()}
    for shape in ({"decoder__depth": 2}, {"decoder__width": 8}, {"decoder__mlp_ratio": 2.0}):
        assert {pack_key(config) for config in decoders(**shape)}.isdisjoint({key, None})
    assert pack_key(probe(features__store=False)) is None


class Devices(TorchDispatchMode):
    """Notes where the tensors lie that operations are given; a single number travels with its operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor) and tensor.ndim]
        self.seen |= {tensor.device.type for tensor in tensors}
        return function(*args, **(kwargs or {}))


def test_no_step_of_losses_together_waits_for_a_copy_to_the_device() -> None:
    losses = [build_loss(name, [50, 20, 5, 1, 0]) for name in LOSSES]
    together = stack_losses([*losses, build_loss("focal", [50, 20, 5, 1, 0], gamma=1.0)], "meta")
    with Devices() as devices:
        stacked = together(torch.empty(7, len(LOSSES) + 1, 5, device="meta"), torch.empty(7, dtype=int, device="meta"))
    assert stacked.shape == (len(LOSSES) + 1,)
    assert devices.seen == {"meta"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_together_are_each_loss_and_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    counts, targets = torch.tensor([50, 20, 5, 1, 0]), torch.tensor([0, 0, 1, 2, 3, 1, 0])
    losses = [build_loss(name, counts, **{k: v for k, v in options.items() if k != "reweight_from"})
              for options in LOSS_OPTIONS.get(name, [{}, {}])] + [build_loss("cross_entropy", counts)]  # fmt: skip
    logits = torch.randn(7, len(losses), 5, requires_grad=True)
    got = stack_losses(losses)(logits, targets)
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    assert got.dtype == gradient.dtype == torch.float32
    for place, loss in enumerate(losses):
        own = logits[:, place].detach().clone().requires_grad_()
        value = loss(own, targets)
        value.backward()
        torch.testing.assert_close(got[place], value.detach())
        torch.testing.assert_close(gradient[:, place], own.grad)
