"""Mixed examples: exact formulas and targets, off means off, and the same draws wherever a trial goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import CLASS_COUNTS, NUM_VIEWS, tiny_config, tiny_data
from tiny_images import TinyImages

from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.losses import build_loss
from imbvlm.sweep.spec.equivalence import canonical_key
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.training import checkpoint
from imbvlm.training.step.batch_mixing import BatchMixer, FeatureTransfer, cutmix
from imbvlm.training.trial_run import TrialRun, build_trial

CLASSES = 4
TOWER_METHODS = [name for name, entry in METHODS.items() if entry.trains_encoder]
ON_STORE = [name for name, entry in METHODS.items() if entry.trains and not entry.trains_encoder]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> TinyImages:
    return TinyImages(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return tiny_data(tmp_path_factory.mktemp("features"), text_tower=True)


def trial(images: TinyImages, method: str, **overrides: Any) -> TrialRun:
    config = images.config(method, **{"features__store": METHODS[method].trains_encoder, **overrides})
    return build_trial(config, images.data(config))


def course(run: TrialRun) -> list[dict[str, Any]]:
    """Every number but times."""
    return [{k: v for k, v in one.metrics.items() if "second" not in k} for one in run.epochs()]


# ------------------------------------------------------------------------------------------------- one batch


def test_mixup_is_a_weighted_sum_of_two_images_and_of_their_labels() -> None:
    inputs, labels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 0, 1])
    mixed, shares = BatchMixer(0.4, 0.0, CLASSES, seed=3)(inputs, labels, step=5)
    rng = np.random.default_rng([0x31C5, 3, 5])
    rng.integers(1)
    share = rng.beta(0.4, 0.4)
    other = np.random.default_rng([0x31C5, 3, 5, 0]).permutation(6)
    for row in range(6):
        expected = share * inputs[row].double() + (1 - share) * inputs[other[row]].double()
        torch.testing.assert_close(mixed[row].double(), expected, atol=1e-3, rtol=0)
        target = share * np.eye(CLASSES)[labels[row]] + (1 - share) * np.eye(CLASSES)[labels[other[row]]]
        np.testing.assert_allclose(shares[row].numpy(), target, atol=1e-6)


def test_cutmix_pastes_one_rectangle_and_its_area_is_the_share() -> None:
    own, others = torch.zeros(2, 3, 10, 14, dtype=torch.uint8), torch.ones(2, 3, 10, 14, dtype=torch.uint8)
    areas = []
    for seed in range(200):
        mixed, share = cutmix(own, others, 0.6, np.random.default_rng(seed))
        assert mixed.dtype == torch.uint8
        assert mixed[0, 0].float().mean().item() == pytest.approx(1 - share)
        rows, columns = mixed[0, 0].any(dim=1).nonzero().flatten(), mixed[0, 0].any(dim=0).nonzero().flatten()
        if len(rows):
            assert mixed[0, 0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        areas.append(1 - share)
    assert own.sum() == 0, "the batch that came in stays as it was"
    assert max(areas) == pytest.approx(0.4, abs=0.05)
    # Rectangles near an edge are cut off.
    assert min(areas) < 0.2


def test_both_kinds_come_up_where_both_are_on_and_draws_hang_on_seed_and_step_alone() -> None:
    inputs, labels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % CLASSES
    mixer = BatchMixer(0.3, 1.0, CLASSES, seed=0)
    found = [mixer(inputs, labels, step) for step in range(20)]
    assert {one[0].dtype for one in found} == {torch.uint8, torch.float32}
    again = BatchMixer(0.3, 1.0, CLASSES, seed=0)
    for step in reversed(range(20)):
        assert all(torch.equal(*pair) for pair in zip(again(inputs, labels, step), found[step], strict=True))
    other = BatchMixer(0.3, 1.0, CLASSES, seed=1)
    assert not all(torch.equal(other(inputs, labels, step)[1], found[step][1]) for step in range(20))


def test_workers_draw_the_same_share_and_their_own_order() -> None:
    labels = torch.arange(4)
    shares = [BatchMixer(0.5, 0.0, CLASSES, seed=0, rank=rank)(torch.randn(4, 2), labels, 1)[1] for rank in (0, 1)]
    # An image may meet itself.
    found = [{round(share, 6) for share in one.flatten().tolist()} - {0.0, 1.0} for one in shares]
    assert found[0] == found[1]
    assert len(found[0]) == 2
    assert not torch.equal(*shares)
    empty = BatchMixer(0.5, 0.5, CLASSES, seed=0)(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), labels[:0], 1)
    assert empty[0].shape[0] == 0
    assert empty[1].shape == (0, CLASSES)


# -------------------------------------------------------------------------------------- losses of soft targets


SOFT_TARGETS = {name for name, entry in LOSSES.items() if entry.takes_soft_targets}
COUNTS = torch.tensor([500, 30, 1, 0])


@pytest.mark.parametrize("name", sorted(SOFT_TARGETS))
def test_whole_shares_are_classes(name: str) -> None:
    logits, targets = torch.randn(9, CLASSES, dtype=torch.float64), torch.arange(9) % CLASSES
    loss = build_loss(name, COUNTS, label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, torch.eye(CLASSES)[targets]), loss(logits, targets))


@pytest.mark.parametrize("name", sorted(SOFT_TARGETS))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_are_split_examples(name: str, smoothing: float) -> None:
    """An example of 3/4 of one class and 1/4 of another: four examples, three of the one and one of the other."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, CLASSES, generator=generator, dtype=torch.float64)
    own, other = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 1, 0, 2, 1])
    eye = torch.eye(CLASSES, dtype=torch.float64)
    loss = build_loss(name, COUNTS, label_smoothing=smoothing)
    split = torch.cat([own, own, own, other])
    torch.testing.assert_close(loss(logits, 0.75 * eye[own] + 0.25 * eye[other]), loss(logits.repeat(4, 1), split))


@pytest.mark.parametrize("name", sorted(SOFT_TARGETS))
def test_gradients_of_soft_targets_are_the_derivatives_and_finite(name: str) -> None:
    shares = torch.rand(4, CLASSES, dtype=torch.float64)
    shares /= shares.sum(dim=1, keepdim=True)
    logits = torch.randn(4, CLASSES, dtype=torch.float64, requires_grad=True)
    loss = build_loss(name, COUNTS)
    assert torch.autograd.gradcheck(lambda z: loss(z, shares), logits)
    large = (1e4 * torch.eye(CLASSES)).to(torch.bfloat16).requires_grad_()
    value = loss(large, shares.float())
    value.backward()
    assert value.isfinite()
    assert large.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - SOFT_TARGETS))
def test_other_losses_refuse_soft_targets(name: str, data: TrialData) -> None:
    with pytest.raises(ImbvlmError, match=f"loss {name} needs one class"):
        build_loss(name, COUNTS)(torch.zeros(2, CLASSES), torch.full((2, CLASSES), 0.25))
    with pytest.raises(ConfigError, match=rf"loss {name} takes one class\. Choose a loss with label_smo"):
        tiny_config("linear_probe", loss__name=name, feature_augmentation__mixup=0.2)


# ------------------------------------------------------------------------------------------------ borrowed variation


def test_only_classes_without_many_images_vary_and_by_two_images_of_one_class(data: TrialData) -> None:
    train = data.train
    transfer = FeatureTransfer(1.0, train, data.class_stats, seed=0)
    examples = np.arange(len(train))
    stored = train.batch("pooled", examples)
    changed = stored.clone()
    transfer.add_to(changed, "pooled", examples, examples, epoch=2)
    moved = (changed != stored).any(dim=1).numpy()
    assert CLASS_COUNTS[0] > 100
    assert (moved == (train.labels > 0)).all()
    pairs, views = transfer._pairs(2)
    first, second = (train.batch("pooled", pairs[k], views[k]).float() for k in (0, 1))
    assert (train.labels[pairs] == 0).all()
    assert (pairs[0] != pairs[1]).all()
    expected = stored.float() + (first - second) / np.sqrt(2)
    torch.testing.assert_close(changed.float()[moved], expected[moved], atol=0.01, rtol=0.01)


def test_the_variation_is_that_within_the_class(data: TrialData) -> None:
    train = data.train
    transfer = FeatureTransfer(1.0, train, data.class_stats, seed=0)
    tail = np.flatnonzero(train.labels == 4)[:1]
    place = np.arange(len(train))
    added = []
    for epoch in range(60):
        inputs = torch.zeros(len(place), *train.batch("pooled", tail).shape[1:])
        transfer.add_to(inputs, "pooled", np.repeat(tail, len(place)), place, epoch)
        added.append(inputs)
    added = torch.cat(added)
    head = np.flatnonzero(train.labels == 0)
    views = torch.cat([train.batch("pooled", head, np.full(len(head), view)).float() for view in range(NUM_VIEWS)])
    assert added.mean(dim=0).abs().max() < 0.05
    torch.testing.assert_close(torch.cov(added.T), torch.cov(views.T), atol=0.08, rtol=0.15)


def test_no_class_to_borrow_from_is_said(data: TrialData) -> None:
    small = ClassStats.from_counts([20, 20, 10, 5, 2, 0])
    with pytest.raises(ImbvlmError, match="borrows the variation within classes of more than 100 training images"):
        FeatureTransfer(1.0, data.train, small, seed=0)


# ---------------------------------------------------------------------------------------------- whole trials


@pytest.mark.parametrize("method", [*TOWER_METHODS, "linear_probe"])
def test_mixing_of_strength_0_is_none(images: TinyImages, method: str) -> None:
    overrides = {"train__num_epochs": 1}
    plain = course(trial(images, method, **overrides))
    assert course(trial(images, method, **overrides, mixing__mixup=0.0, mixing__cutmix=0.0)) == plain
    for strengths in ({"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}):
        mixing = {f"mixing__{key}": value for key, value in strengths.items()}
        assert course(trial(images, method, **overrides, **mixing)) != plain


@pytest.mark.parametrize("method", ON_STORE)
def test_feature_augmentation_of_strength_0_is_none(data: TrialData, method: str) -> None:
    def run(**overrides: Any) -> list[dict[str, Any]]:
        return course(build_trial(tiny_config(method, train__num_epochs=2, **overrides), data))

    plain = run()
    assert run(feature_augmentation__mixup=0.0, feature_augmentation__transfer=0.0) == plain
    assert run(feature_augmentation__mixup=0.3) != plain
    assert run(feature_augmentation__transfer=0.5) != plain


@pytest.mark.parametrize("method", [*TOWER_METHODS, *ON_STORE])
def test_mixed_examples_train_and_resuming_within_an_epoch_changes_no_number(
    images: TinyImages, data: TrialData, method: str, tmp_path: Path
) -> None:
    in_tower = METHODS[method].trains_encoder
    options = {"mixing.mixup": 0.2, "mixing.cutmix": 1.0} if in_tower else {
        "feature_augmentation.mixup": 0.2, "feature_augmentation.transfer": 0.7}  # fmt: skip
    config = (images.config(method) if in_tower else tiny_config(method)).with_overrides(
        {**options, "loss.name": "generalized_reweight", "loss.label_smoothing": 0.1, "train.num_epochs": 2}
    )
    read = images.data(config) if in_tower else data
    whole = build_trial(config, read)
    expected = course(whole)
    stopped = build_trial(config, read)

    class Stop(Exception):
        pass

    def stop() -> None:
        if stopped.step == 2:
            checkpoint.save_checkpoint(str(tmp_path), stopped.state_dict())
            raise Stop

    with pytest.raises(Stop):
        list(stopped.epochs(stop))
    resumed = build_trial(config, read)
    resumed.load_state_dict(checkpoint.load_checkpoint(str(tmp_path)))
    assert course(resumed) == expected


def test_mixed_examples_learn(data: TrialData) -> None:
    options = {"feature_augmentation__mixup": 0.2, "feature_augmentation__transfer": 0.5}
    run = build_trial(tiny_config("linear_probe", train__num_epochs=8, optim__lr=0.1, **options), data)
    results = course(run)
    assert results[-1]["train/loss"] < 0.8 * results[0]["train/loss"]
    assert results[-1]["val/top1_accuracy"] > 0.5


@pytest.mark.parametrize("loss", sorted(SOFT_TARGETS))
def test_a_mixed_batch_in_parts_gives_the_same_course(images: TinyImages, loss: str) -> None:
    overrides = {"loss__name": loss, "mixing__mixup": 0.4, "train__batch_size": 8, "train__num_steps": 4}
    whole = trial(images, "adapter", **overrides)
    parts = trial(images, "adapter", **overrides, memory__accumulation=3)
    list(whole.epochs())
    list(parts.epochs())
    assert parts.first_losses == pytest.approx(whole.first_losses, abs=1e-5)


# --------------------------------------------------------------------------------------------- configurations


def test_where_mixing_and_feature_augmentation_have_no_place_says_what_has() -> None:
    with pytest.raises(ConfigError, match=r"mixing mixes images, and this trial reads stored features\. Set feature"):
        tiny_config("linear_probe", mixing__mixup=0.2)
    with pytest.raises(ConfigError, match=r"feature_augmentation varies stored features, and .* mixing\.mixup"):
        tiny_config("linear_probe", features__store=False, feature_augmentation__transfer=0.2)
    with pytest.raises(ConfigError, match="adapter doesn't read the section 'feature_augmentation'"):
        tiny_config("adapter", feature_augmentation__transfer=0.2)
    with pytest.raises(ConfigError, match="zero_shot doesn't read the section 'mixing'"):
        tiny_config("zero_shot", mixing__mixup=0.2)
    # Off is off, wherever it stands.
    tiny_config("linear_probe", mixing__mixup=0.0, loss__name="focal", feature_augmentation__mixup=0.0)


def test_off_is_no_other_configuration() -> None:
    plain = tiny_config("linear_probe")
    off = tiny_config("linear_probe", mixing__mixup=0.0, feature_augmentation__transfer=0.0)
    assert canonical_key(off) == canonical_key(plain)
    assert canonical_key(tiny_config("linear_probe", feature_augmentation__transfer=0.5)) != canonical_key(plain)


def test_a_file_of_it_is_read_back_equal(tmp_path: Path) -> None:
    config = tiny_config("adapter", mixing__mixup=0.2, mixing__cutmix=1.0)
    config.to_yaml(tmp_path / "trial.yaml")
    assert TrialConfig.from_yaml(tmp_path / "trial.yaml") == config


SPACE = """
method: {choice: [linear_probe, adapter]}
loss.name: {choice: [balanced_softmax, ldam]}
mixing.mixup: {uniform: [0.1, 0.4], when: {method: adapter, loss.name: balanced_softmax}}
mixing.cutmix: {choice: [0.0, 1.0], when: {method: adapter, loss.name: balanced_softmax}}
feature_augmentation.transfer: {uniform: [0.0, 1.0], when: {method: linear_probe}}
"""


def sweep(space: str) -> ResolvedSweep:
    base = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}, "method": "linear_probe"}
    spec = SweepSpec.from_tree({"name": "s", "base": base, "space": {"parameters": parse_yaml(space).data}})
    return check_spec(spec)


def test_a_space_draws_them_where_they_have_a_place_and_is_refused_elsewhere() -> None:
    drawn = [config for config in sweep(SPACE).corner_trials() if config.mixing is not None]
    assert {config.method for config in drawn} == {"adapter"}
    assert {config.mixing.cutmix for config in drawn} == {0.0, 1.0}
    with pytest.raises(ConfigError, match="mixing mixes images, and this trial reads stored features"):
        sweep(SPACE.replace("when: {method: adapter, loss.name: balanced_softmax}", ""))
    with pytest.raises(ConfigError, match="loss ldam takes one class"):
        sweep(SPACE.replace(", loss.name: balanced_softmax}", "}"))
