"""Losses: identities, independent float64 formulas, gradients, wild inputs, exactness over workers."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.schema import tag_of
from imbvlm.config.loss_registry import LOSSES, LossConfig
from imbvlm.longtail.losses import build_loss, default_options, effective_number_weights

# An option of a function that the training loop sets rather than the configuration.
SET_BY_THE_LOOP = {"reweight"}

every_loss = pytest.mark.parametrize("name", LOSSES)

# A head, a middle, a tail, a class without images.
COUNTS = torch.tensor([500, 120, 30, 4, 1, 0])


def batch(
    rows: int = 16, num_classes: int = 6, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, num_classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, num_classes, (rows,), generator=generator)
    return logits.to(dtype), targets


def value(name: str, logits: Tensor, targets: Tensor, counts: Tensor = COUNTS, **options: Any) -> Tensor:
    return LOSSES[name].function(logits, targets, counts, **options)


def assert_same(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize(
    ("name", "options", "other", "other_options"),
    [
        ("focal", {"gamma": 0.0}, "cross_entropy", {}),
        ("logit_adjustment", {"tau": 1.0}, "balanced_softmax", {}),
        ("logit_adjustment", {"tau": 0.0}, "cross_entropy", {}),
        ("generalized_reweight", {"exponent": 0.0}, "cross_entropy", {}),
        ("generalized_reweight", {"exponent": 1.0}, "inverse_frequency", {}),
        ("effective_number", {"beta": 0.0}, "cross_entropy", {}),
        ("effective_number", {"beta": 1 - 1e-9}, "inverse_frequency", {}),
        ("lade", {"weight": 0.0}, "balanced_softmax", {}),
        ("ldam", {"max_margin": 1e-12}, "cross_entropy", {}),
        ("ldam", {"margin_scale": 1e-12}, "cross_entropy", {}),
        ("cross_entropy", {"label_smoothing": 0.0}, "cross_entropy", {}),
    ],
)
def test_a_loss_becomes_another_at_the_edge_of_its_option(
    name: str, options: dict[str, float], other: str, other_options: dict[Any, Any]
) -> None:
    logits, targets = batch()
    assert_same(value(name, logits, targets, **options), value(other, logits, targets, **other_options), 1e-6)


@pytest.mark.parametrize(
    "name", ["inverse_frequency", "effective_number", "generalized_reweight", "balanced_softmax", "logit_adjustment"]
)
def test_with_equal_counts_nothing_is_left_to_correct(name: str) -> None:
    logits, targets = batch()
    equal = torch.full((6,), 37)
    assert_same(value(name, logits, targets, equal), value("cross_entropy", logits, targets))


def test_cross_entropy_is_torchs_own_with_smoothing_too() -> None:
    logits, targets = batch()
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    assert_same(value("cross_entropy", logits, targets, label_smoothing=0.1), expected)


@pytest.mark.parametrize("name", [name for name, entry in LOSSES.items() if entry.takes_soft_targets])
def test_smoothing_moves_a_share_of_the_target_to_all_classes(name: str) -> None:
    """None: the loss without it. All: no class is more of a target than another. In between, so much of each."""
    logits, targets = batch()
    plain, everything = (value(name, logits, targets, label_smoothing=share) for share in (0.0, 1.0))
    assert_same(plain, value(name, logits, targets))
    assert_same(value(name, logits, targets, label_smoothing=0.3), 0.7 * plain + 0.3 * everything)
    equal = torch.full((6,), 9)
    assert_same(*(value(name, logits, y, equal, label_smoothing=1.0) for y in (targets, (targets + 1) % 6)))


def test_a_weighted_loss_is_torchs_weighted_mean() -> None:
    logits, targets = batch()
    weights = COUNTS.double().clamp(min=0.5).pow(-1)
    expected = torch.nn.functional.cross_entropy(logits, targets, weight=weights)
    assert_same(value("inverse_frequency", logits, targets), expected)


def test_ldam_scales_only_the_margin() -> None:
    logits, targets = batch()
    assert_same(
        value("ldam", logits, targets, max_margin=0.3, margin_scale=25.0),
        value("ldam", logits, targets, max_margin=7.5),
    )


def test_an_empty_class_does_not_change_the_margins_of_the_others() -> None:
    logits, targets = batch(num_classes=5)
    absent = torch.cat([logits, torch.full((len(logits), 1), -1e4, dtype=torch.float64)], dim=1)
    assert_same(value("ldam", logits, targets, COUNTS[:5]), value("ldam", absent, targets, COUNTS))


def test_deferred_reweighting_of_ldam_is_by_effective_number() -> None:
    logits, targets = batch()
    weights = effective_number_weights(COUNTS)
    assert weights.mean().item() == pytest.approx(1)
    assert_same(
        value("ldam", logits, targets, max_margin=1e-12, reweight=weights),
        value("effective_number", logits, targets, beta=0.9999),
        1e-9,
    )


# -------------------------------------------------------------------- the same formula, written again in numpy


def numpy_nll(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=1, keepdims=True)
    return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]


def numpy_prior(n: np.ndarray) -> np.ndarray:
    n = np.maximum(n, 0.5)
    return n / n.sum()


def numpy_smoothed(z: np.ndarray, y: np.ndarray, smoothing: float) -> np.ndarray:
    others = np.mean([numpy_nll(z, np.full(len(y), c)) for c in range(z.shape[1])], axis=0)
    return (1 - smoothing) * numpy_nll(z, y) + smoothing * others


def numpy_weighted(z: np.ndarray, y: np.ndarray, w: np.ndarray, smoothing: float) -> float:
    return (w[y] * numpy_smoothed(z, y, smoothing)).sum() / w[y].sum()


def numpy_focal(z: np.ndarray, y: np.ndarray, n: np.ndarray, gamma: float) -> float:
    p = np.exp(-numpy_nll(z, y))
    return ((1 - p) ** gamma * -np.log(p)).mean()


def numpy_ldam(z: np.ndarray, y: np.ndarray, n: np.ndarray, max_margin: float, margin_scale: float) -> float:
    m = np.maximum(n, n[n > 0].min()) ** -0.25
    z = z.copy()
    z[np.arange(len(y)), y] -= margin_scale * (max_margin * m / m.max())[y]
    return numpy_nll(z, y).mean()


def numpy_lade(z: np.ndarray, y: np.ndarray, n: np.ndarray, remine_lambda: float, weight: float) -> float:
    prior = numpy_prior(n)
    num_classes = len(n)
    estimator = 0.0
    for c in range(num_classes):
        own = z[y == c, c]
        first = own.mean() if len(own) else 0.0
        second = np.log(np.mean(np.exp(z[:, c]) / (num_classes * prior[c])))
        estimator -= prior[c] * (first - second - remine_lambda * second**2)
    return numpy_nll(z + np.log(prior), y).mean() + weight * estimator


FORMULAS: dict[str, tuple[dict[str, float], Callable[..., float]]] = {
    "cross_entropy": (
        {"label_smoothing": 0.2},
        lambda z, y, n, label_smoothing: numpy_smoothed(z, y, label_smoothing).mean(),
    ),
    "focal": ({"gamma": 1.7}, numpy_focal),
    "inverse_frequency": (
        {"label_smoothing": 0.1},
        lambda z, y, n, label_smoothing: numpy_weighted(z, y, n.sum() / (len(n) * np.maximum(n, 0.5)), label_smoothing),
    ),
    "effective_number": (
        {"beta": 0.97, "label_smoothing": 0.3},
        lambda z, y, n, beta, label_smoothing: numpy_weighted(
            z, y, (1 - beta) / (1 - beta ** np.maximum(n, 0.5)), label_smoothing
        ),
    ),
    "generalized_reweight": (
        {"exponent": 0.8, "label_smoothing": 0.1},
        lambda z, y, n, exponent, label_smoothing: numpy_weighted(
            z, y, np.maximum(n, 0.5) ** -exponent, label_smoothing
        ),
    ),
    "balanced_softmax": (
        {"label_smoothing": 0.15},
        lambda z, y, n, label_smoothing: numpy_smoothed(z + np.log(numpy_prior(n)), y, label_smoothing).mean(),
    ),
    "logit_adjustment": (
        {"tau": 1.4, "label_smoothing": 0.1},
        lambda z, y, n, tau, label_smoothing: numpy_smoothed(
            z + tau * np.log(numpy_prior(n)), y, label_smoothing
        ).mean(),
    ),
    "ldam": ({"max_margin": 0.4, "margin_scale": 12.0}, numpy_ldam),
    "lade": ({"remine_lambda": 0.3, "weight": 0.2}, numpy_lade),
}


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_is_its_formula(name: str, seed: int) -> None:
    options, formula = FORMULAS[name]
    logits, targets = batch(rows=23, seed=seed)
    expected = formula(logits.numpy(), targets.numpy(), COUNTS.numpy().astype(float), **options)
    assert value(name, logits, targets, **options).item() == pytest.approx(expected, rel=1e-11)


# ---------------------------------------------------------------------------------- contract, every loss alike


@every_loss
def test_the_options_of_a_loss_are_those_of_its_function(name: str) -> None:
    entry, options = LOSSES[name], default_options(name)
    config = entry.config()
    assert tag_of(entry.config) == ("name", name)
    assert TypeAdapter(LossConfig).validate_python(config.model_dump()) == config
    assert config.options().keys() == options.keys() - SET_BY_THE_LOOP
    assert ("reweight_from" in entry.config.model_fields) == ("reweight" in options)
    assert entry.takes_soft_targets == ("label_smoothing" in options)
    for option, value in config.resolve(1.0).options().items():
        assert value == options[option], option


@every_loss
def test_a_loss_says_what_it_does_and_who_published_it(name: str) -> None:
    entry = LOSSES[name]
    assert entry.summary[0].isupper()
    assert entry.summary.endswith(".")
    assert re.search(r", \w+ \d{4}", entry.paper)
    assert re.search(r"\[.+\d{4}.*\]", entry.function.load().__doc__)


@every_loss
def test_the_case_of_logit_adjustment_is_exact(name: str) -> None:
    tau = LOSSES[name].adjustment_tau
    if tau is not None:
        logits, targets = batch()
        assert_same(value(name, logits, targets), value("logit_adjustment", logits, targets, tau=tau), 1e-15)


@every_loss
def test_gradients_are_the_derivatives(name: str) -> None:
    logits, targets = batch(rows=7)
    assert torch.autograd.gradcheck(lambda z: value(name, z, targets), logits.requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("right", [True, False])
def test_logits_of_ten_thousand_give_a_finite_loss_and_gradient(name: str, dtype: torch.dtype, right: bool) -> None:
    logits = torch.full((6, 6), -1e4)
    places = torch.arange(6)
    logits[places, places if right else (places + 1) % 6] = 1e4
    logits = logits.to(dtype).requires_grad_()
    loss = value(name, logits, places)  # includes the class without training images
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@every_loss
def test_a_confident_right_answer_has_no_nan(name: str) -> None:
    logits = torch.zeros(2, 6)
    logits[:, 0] = 200.0
    logits.requires_grad_()
    value(name, logits, torch.zeros(2, dtype=torch.long)).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_focal_stays_finite_where_gamma_is_below_one(gamma: float) -> None:
    logits = torch.tensor([[60.0, 0, 0], [0, 60, 0]], requires_grad=True)
    value("focal", logits, torch.tensor([0, 0]), COUNTS[:3], gamma=gamma).backward()
    assert torch.isfinite(logits.grad).all()


@every_loss
def test_half_precision_is_computed_in_float32(name: str) -> None:
    logits, targets = batch(dtype=torch.bfloat16)
    assert_same(value(name, logits, targets), value(name, logits.float(), targets), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(value(name, logits, targets), value(name, logits.float(), targets), 0)


@every_loss
def test_classes_that_the_batch_lacks_and_one_class_alone_are_fine(name: str) -> None:
    logits, _ = batch(rows=4)
    for targets in (torch.full((4,), 5), torch.zeros(4, dtype=torch.long)):
        assert torch.isfinite(value(name, logits, targets))
    single = torch.randn(3, 1, requires_grad=True)
    value(name, single, torch.zeros(3, dtype=torch.long), COUNTS[:1]).backward()
    assert torch.isfinite(single.grad).all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"lade"}))  # whose estimator is of the logits themselves
def test_adding_a_constant_to_all_logits_of_a_row_changes_nothing(name: str) -> None:
    logits, targets = batch()
    shifted = logits + torch.arange(len(logits), dtype=torch.float64)[:, None]
    assert_same(value(name, logits, targets), value(name, shifted, targets), 1e-9)


@every_loss
def test_the_order_of_rows_changes_nothing(name: str) -> None:
    logits, targets = batch()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(3))
    assert_same(value(name, logits, targets), value(name, logits[order], targets[order]), 1e-12)


@every_loss
def test_the_order_of_classes_changes_nothing(name: str) -> None:
    logits, targets = batch()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    renamed = torch.argsort(order)[targets]
    assert_same(value(name, logits, targets), value(name, logits[:, order], renamed, COUNTS[order]), 1e-12)


@every_loss
def test_a_pack_of_trials_runs_in_one_call(name: str) -> None:
    """Options as tensors, one value per trial: what a vmap over trials gives is what each trial gives alone."""
    options = {key: torch.tensor([0.3, 0.6, 0.9]) for key in default_options(name) if key not in SET_BY_THE_LOOP}
    logits = torch.stack([batch(seed=seed)[0] for seed in range(3)])
    targets = batch()[1]
    packed = torch.func.vmap(lambda z, k: value(name, z, targets, **k))(logits, options)
    for trial in range(3):
        alone = value(name, logits[trial], targets, **{key: values[trial].item() for key, values in options.items()})
        assert_same(packed[trial], alone, 1e-6)


@every_loss
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_wild_inputs_stay_finite(name: str, data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(2, 8))
    rows = data.draw(st.integers(1, 6))
    counts = data.draw(st.lists(st.integers(0, 10**7), min_size=num_classes, max_size=num_classes))
    numbers = st.floats(-1e4, 1e4, width=32)
    logits = data.draw(st.lists(numbers, min_size=rows * num_classes, max_size=rows * num_classes))
    targets = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=rows, max_size=rows))
    tensor = torch.tensor(logits, dtype=torch.float32).view(rows, num_classes).requires_grad_()
    loss = build_loss(name, counts)(tensor, torch.tensor(targets))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(tensor.grad).all()
    if name != "lade":
        assert loss.item() >= 0


# --------------------------------------------------------------------------------------------------- building


def test_an_unknown_name_or_option_is_refused_with_the_nearest_valid_one() -> None:
    with pytest.raises(ImbvlmError, match="balanced_softmax"):
        build_loss("balanced_softmx", COUNTS)
    with pytest.raises(ImbvlmError, match="gamma"):
        build_loss("focal", COUNTS, gama=2.0)
    with pytest.raises(ImbvlmError, match="no option 'tau'"):
        build_loss("cross_entropy", COUNTS, tau=1.0)


@pytest.mark.parametrize("counts", [[0.7, 0.3], [3, -1], [[1, 2]], [float("nan"), 1]])
def test_counts_that_are_not_images_per_class_are_refused(counts: list[float | list[int]]) -> None:
    with pytest.raises(ImbvlmError, match="class_counts"):
        build_loss("balanced_softmax", counts)


@every_loss
def test_a_built_loss_is_the_pure_one(name: str) -> None:
    logits, targets = batch()
    options = FORMULAS[name][0]
    assert_same(
        build_loss(name, COUNTS.numpy(), **options)(logits, targets), value(name, logits, targets, **options), 0
    )


# ---------------------------------------------------------------------------------------------------- workers


class Threads:
    """Workers as threads that meet at a barrier; what each gave is added in rank order."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.given: list[Tensor | None] = [None] * world_size

    def worker(self, rank: int) -> Any:
        shared = self

        class Worker:
            world_size = len(shared.given)

            def __init__(self) -> None:
                self.rank = rank

            def _meet(self, tensor: Tensor, combine: Callable[..., Any]) -> Tensor:
                assert not tensor.requires_grad
                shared.given[rank] = tensor
                shared.barrier.wait()
                result = combine(torch.stack(shared.given), dim=0)
                shared.barrier.wait()
                return result

            def sum(self, tensor: Tensor) -> Tensor:
                return self._meet(tensor, torch.sum)

            def max(self, tensor: Tensor) -> Tensor:
                return self._meet(tensor, torch.amax)

        return Worker()


def shares(
    name: str, parts: list[Tensor], logits: Tensor, targets: Tensor, counts: Tensor = COUNTS, **options: Any
) -> Any:
    """Each worker's loss and the gradient of its own rows, for the given rows of each."""
    meeting = Threads(len(parts))
    results: list = [None] * len(parts)

    def work(rank: int) -> None:
        local = logits[parts[rank]].clone().requires_grad_()
        loss = build_loss(name, counts, workers=meeting.worker(rank), **options)(local, targets[parts[rank]])
        loss.backward()
        results[rank] = (loss.detach(), local.grad)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@every_loss
@pytest.mark.parametrize(
    "sizes",
    [(8, 8), (15, 1), (16, 0), (0, 16), (4, 4, 4, 4), (1, 0, 14, 1)],
    ids=lambda sizes: "+".join(map(str, sizes)),
)
def test_the_average_over_workers_is_the_global_loss_and_gradient(name: str, sizes: tuple[int, ...]) -> None:
    logits, targets = batch(rows=16)
    starts = np.cumsum((0, *sizes))
    parts = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    results = shares(name, parts, logits, targets)
    whole = logits.clone().requires_grad_()
    expected = value(name, whole, targets)
    expected.backward()
    assert_same(torch.stack([loss for loss, _ in results]).mean(), expected.detach(), 1e-12)
    gradient = torch.cat([grad for _, grad in results]) / len(sizes)
    assert_same(gradient, whole.grad, 1e-12)


@every_loss
def test_no_rows_on_any_worker_is_a_loss_of_zero(name: str) -> None:
    empty = torch.arange(0)
    logits, targets = batch()
    for loss, _ in shares(name, [empty, empty], logits, targets):
        assert loss.item() == 0
    assert value(name, logits[:0], targets[:0]).item() == 0


class Gloo:
    """Workers of torch.distributed, as a training loop has them."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    @staticmethod
    def _reduce(tensor: Tensor, how: Any) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor, op=how)
        return tensor


def train_on_gloo(rank: int, folder: Path, world_size: int, sizes: list[int]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    found = {}
    start = sum(sizes[:rank])
    for name in LOSSES:
        features, targets = batch(rows=sum(sizes), num_classes=5)
        own = slice(start, start + sizes[rank])
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 6).double()
        loss = build_loss(name, COUNTS, workers=Gloo())(model(features[own]), targets[own])
        loss.backward()
        average = [Gloo().sum(tensor) / world_size for tensor in (loss.detach(), model.weight.grad)]
        found[name] = [tensor.tolist() for tensor in average]
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)


@pytest.mark.parametrize("sizes", [(5, 4), (7, 0)], ids=["uneven", "one empty"])
def test_two_real_processes_train_as_one(tmp_path: Path, sizes: tuple[int, int]) -> None:
    mp.spawn(train_on_gloo, args=(str(tmp_path), 2, sizes), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    for name in LOSSES:
        features, targets = batch(rows=sum(sizes), num_classes=5)
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 6).double()
        expected = value(name, model(features), targets)
        expected.backward()
        assert found[name][0] == pytest.approx(expected.item(), rel=1e-12), name
        assert_same(torch.tensor(found[name][1], dtype=torch.float64), model.weight.grad, 1e-12)
