"""Second stages: formulas, starts, what trains and what stays frozen, and that they serve the tail."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.schema import tag_of
from imbvlm.config.input_sections import ClassSampling
from imbvlm.config.model_sections import CosineClassifierConfig, LinearClassifierConfig
from imbvlm.config.second_stage_registry import SECOND_STAGES, SecondStageConfig, TrainedStage, loss_options
from imbvlm.longtail.class_sampling import epoch_plan
from imbvlm.longtail.losses import build_loss
from imbvlm.longtail.metrics import ClassCounters
from imbvlm.models.classifier import build_classifier
from imbvlm.models.second_stage_modules import (
    NORM_TAUS,
    DisAlign,
    LearnableWeightScaling,
    Marc,
    best_tau,
    fresh_classifier,
    stage_module,
    tau_normalized,
)

WIDTH, CLASSES = 10, 6
KINDS = {"linear": LinearClassifierConfig(), "cosine": CosineClassifierConfig()}
TRAINED = [name for name, stage in SECOND_STAGES.items() if stage.build is not None]
ON_LOGITS = {"learnable_weight_scaling": LearnableWeightScaling, "disalign": DisAlign, "marc": Marc}


def classifier(kind: str = "linear", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_classifier(KINDS[kind], WIDTH, CLASSES).double()


def features(num: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scrambled(stage: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return stage.double()


def allowed() -> list[tuple[str, str]]:
    return [
        (name, kind)
        for name in TRAINED
        for kind in KINDS
        if kind == "linear" or not SECOND_STAGES[name].reads_weight_norms
    ]


# --------------------------------------------------------------- the same formulas, written again in numpy


def first_logits(x: np.ndarray, first: Any) -> np.ndarray:
    return x @ first.weight.detach().numpy().T + first.bias.detach().numpy()


def numpy_scaling(x: np.ndarray, first: Any, stage: Any) -> np.ndarray:
    return stage.scale.detach().numpy() * first_logits(x, first)


def numpy_disalign(x: np.ndarray, first: Any, stage: Any) -> np.ndarray:
    v, c = stage.confidence.weight.detach().numpy()[0], stage.confidence.bias.item()
    sigma = 1 / (1 + np.exp(-(x @ v + c)))[:, None]
    s, b = stage.scale.detach().numpy(), stage.bias.detach().numpy()
    # The paper's form: a mix of the old logits and the aligned ones, s counted from 1 there.
    z = first_logits(x, first)
    return sigma * ((1 + s) * z + b) + (1 - sigma) * z


def numpy_marc(x: np.ndarray, first: Any, stage: Any) -> np.ndarray:
    norms = np.sqrt((first.weight.detach().numpy() ** 2).sum(axis=1))
    return stage.scale.detach().numpy() * first_logits(x, first) + stage.bias.detach().numpy() * norms


FORMULAS = {"learnable_weight_scaling": numpy_scaling, "disalign": numpy_disalign, "marc": numpy_marc}


@pytest.mark.parametrize("name", ON_LOGITS)
def test_a_stage_is_its_formula(name: str) -> None:
    first = classifier()
    stage = scrambled(ON_LOGITS[name](first))
    x = features()
    np.testing.assert_allclose(stage(x).detach().numpy(), FORMULAS[name](x.numpy(), first, stage), rtol=1e-10)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_stored_logits_give_what_features_give(name: str) -> None:
    first = classifier()
    stage = scrambled(ON_LOGITS[name](first))
    x = features()
    assert torch.equal(stage.adjust(first(x), x), stage(x))


@pytest.mark.parametrize("name", ON_LOGITS)
def test_gradients_are_the_derivatives(name: str) -> None:
    stage = scrambled(ON_LOGITS[name](classifier()))
    x = features(num=3)
    names = [key for key, value in stage.named_parameters() if value.requires_grad]
    values = [value.detach().clone().requires_grad_() for value in stage.parameters() if value.requires_grad]

    def of_parameters(*given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(stage, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(of_parameters, values)


@pytest.mark.parametrize("name", ["learnable_weight_scaling", "marc"])
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_and_marc_start_from_the_first_stage(name: str, kind: str) -> None:
    first = classifier(kind)
    x = features()
    torch.testing.assert_close(ON_LOGITS[name](first).double()(x), first(x))


@pytest.mark.parametrize("kind", KINDS)
def test_disalign_starts_with_the_first_stages_order(kind: str) -> None:
    """1 + sigma is the same for every class of an image, and sigma is near 1/2 for features as a decoder gives them."""
    first = classifier(kind)
    stage = DisAlign(first).double()
    x = features(num=200)
    torch.testing.assert_close(stage(x).argmax(dim=1), first(x).argmax(dim=1))
    torch.testing.assert_close(stage(x), 1.5 * first(x), rtol=0.15, atol=0)


def test_disaligns_confidence_weight_starts_at_a_tenth_of_torchs() -> None:
    torch.manual_seed(4)
    stage = DisAlign(classifier(seed=4))
    torch.manual_seed(4)
    classifier(seed=4)
    torch.testing.assert_close(stage.confidence.weight, 0.1 * torch.nn.Linear(WIDTH, 1).weight)


@pytest.mark.parametrize("kind", KINDS)
def test_retraining_starts_afresh_with_the_same_kind(kind: str) -> None:
    first = classifier(kind)
    fresh = fresh_classifier(first)
    assert type(fresh) is type(first)
    assert fresh.weight.shape == first.weight.shape
    assert not torch.isclose(fresh.weight.double(), first.weight).any()
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    if kind == "cosine":
        assert fresh.temperature == first.temperature


# ----------------------------------------------------------------------------------------- tau-normalization


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
def test_tau_normalized_is_its_formula(tau: float) -> None:
    first = classifier()
    x, weight = features(), first.weight.detach().numpy()
    expected = x.numpy() @ (weight / np.linalg.norm(weight, axis=1, keepdims=True) ** tau).T
    np.testing.assert_allclose(tau_normalized(first, tau)(x).numpy(), expected, rtol=1e-12)
    assert first.bias.abs().sum() > 0  # the first stage keeps its own


def test_tau_normalization_at_0_leaves_the_weights_and_at_1_makes_them_units() -> None:
    first = classifier()
    torch.testing.assert_close(tau_normalized(first, 0.0).weight.data, first.weight.data)
    torch.testing.assert_close(tau_normalized(first, 1.0).weight.norm(dim=1), torch.ones(CLASSES).double())


def test_a_weight_of_zero_stays_finite() -> None:
    first = classifier()
    with torch.no_grad():
        first.weight[2].zero_()
    assert torch.isfinite(tau_normalized(first, 1.0)(features())).all()
    assert torch.isfinite(Marc(first).double()(features())).all()


def test_the_chosen_tau_makes_up_for_long_head_weights() -> None:
    directions = torch.eye(CLASSES, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([8.0, 4, 2, 1, 0.5, 0.25], dtype=torch.float64)
    first = build_classifier(KINDS["linear"], WIDTH, CLASSES, init_weight=lengths[:, None] * directions).double()
    targets = torch.arange(CLASSES).repeat(50)
    x = directions[targets] + 0.3 * features(num=300)
    choice = best_tau(first, x, targets)
    assert choice.value >= 0.6
    assert choice.score > dict(choice.candidates)[0.0] + 0.2
    assert [tau for tau, _ in choice.candidates] == list(NORM_TAUS)
    for tau, score in choice.candidates:
        counters = ClassCounters(CLASSES)
        counters.update(tau_normalized(first, tau)(x), targets)
        assert score == pytest.approx(counters.per_class_accuracy().mean())


def test_tau_normalization_without_validation_rows_is_refused() -> None:
    with pytest.raises(ImbvlmError, match="validation rows"):
        best_tau(classifier(), features(0), torch.zeros(0, dtype=torch.long))


# -------------------------------------------------------------------------------- contract, every stage alike


@pytest.mark.parametrize("name", SECOND_STAGES)
def test_an_entry_trains_or_selects(name: str) -> None:
    entry = SECOND_STAGES[name]
    assert tag_of(entry.config) == ("name", name)
    assert TypeAdapter(SecondStageConfig).validate_python(entry.config().model_dump()) == entry.config()
    options = entry.config.model_fields.keys() - {"name"}
    if entry.loss is None:
        assert (entry.build, entry.class_sampling) == (None, None)
        assert callable(entry.select.load())
        assert options == set(entry.selected)
    else:
        assert issubclass(entry.config, TrainedStage)
        assert (entry.select, entry.selected) == (None, ())
        assert entry.class_sampling is not None
        # Every option is of the stage's length, its rate or its loss.
        assert options - TrainedStage.model_fields.keys() == loss_options(entry.config(), entry.loss).keys()
        build_loss(entry.loss, [3, 2, 1], **loss_options(entry.config(), entry.loss))


@pytest.mark.parametrize("name", SECOND_STAGES)
def test_a_stage_says_its_formula_and_paper(name: str) -> None:
    entry = SECOND_STAGES[name]
    assert entry.summary[0].isupper()
    assert entry.summary.endswith(".")
    assert re.search(r", \w+ \d{4}", entry.paper)
    assert re.search(r"\[.+\d{4}.*\]", (entry.build or entry.select).load().__doc__)


def long_tailed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head classes outnumber tail classes, and each tail class lies beside a head class."""
    counts = torch.tensor([400, 300, 200, 8, 6, 4])
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    centers[3:] = centers[:3] + 0.5 * centers[3:]

    def draw(labels: torch.Tensor) -> torch.Tensor:
        return centers[labels] + 0.5 * torch.randn(len(labels), WIDTH, generator=generator, dtype=torch.float64)

    labels = torch.repeat_interleave(torch.arange(CLASSES), counts)
    val_labels = torch.arange(CLASSES).repeat(60)
    return counts, draw(labels), labels, draw(val_labels), val_labels


def train(
    model: torch.nn.Module,
    loss: Callable[..., Any],
    x: torch.Tensor,
    labels: torch.Tensor,
    class_sampling: ClassSampling,
    num_epochs: int = 30,
    lr: float = 0.1,
) -> None:
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9)
    for epoch in range(num_epochs):
        order = torch.from_numpy(epoch_plan(labels.numpy(), CLASSES, class_sampling, 0, epoch, num_epochs).rows)
        for part in order.split(64):
            optimizer.zero_grad()
            loss(model(x[part]), labels[part]).backward()
            optimizer.step()


def balanced(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    counters = ClassCounters(CLASSES)
    counters.update(model(x).detach(), labels)
    return counters.per_class_accuracy().mean()


@pytest.fixture(scope="module")
def first_stages() -> dict[str, Any]:
    counts, x, labels, _, _ = long_tailed()
    found = {}
    for kind in KINDS:
        found[kind] = classifier(kind)
        train(found[kind], build_loss("cross_entropy", counts), x, labels, "instance_balanced")
    return found


@pytest.mark.parametrize(("name", "kind"), allowed())
def test_training_serves_the_tail_and_leaves_the_first_stage_alone(
    first_stages: dict[str, Any], name: str, kind: str
) -> None:
    counts, x, labels, val_x, val_labels = long_tailed()
    first, stage = first_stages[kind], SECOND_STAGES[name]
    before = {key: value.clone() for key, value in first.state_dict().items()}
    torch.manual_seed(1)
    model = stage.build(first).double()
    loss = build_loss(stage.loss, counts)
    # On what the sampling shows, a batch of everything: a single batch says little under weights this uneven.
    shown = torch.from_numpy(epoch_plan(labels.numpy(), CLASSES, stage.class_sampling, 1, 0, 1).rows)
    at_first = loss(model(x[shown]), labels[shown]).item()
    train(model, loss, x, labels, stage.class_sampling)
    at_last = loss(model(x[shown]), labels[shown]).item()
    assert at_last < 0.95 * at_first
    assert balanced(model, val_x, val_labels) > balanced(first, val_x, val_labels) + 0.02
    for key, value in before.items():
        assert torch.equal(first.state_dict()[key], value)
        if name in ON_LOGITS:
            assert torch.equal(model.first_stage.state_dict()[key], value)


def test_tau_normalization_never_loses_on_validation_and_gains_here(first_stages: dict[str, Any]) -> None:
    _, _, _, val_x, val_labels = long_tailed()
    first = first_stages["linear"]
    choice = best_tau(first, val_x, val_labels)
    assert choice.score >= dict(choice.candidates)[0.0]
    assert balanced(tau_normalized(first, choice.value), val_x, val_labels) == pytest.approx(choice.score)


@pytest.mark.parametrize(("name", "kind"), allowed())
def test_a_saved_stage_gives_the_same_logits_when_loaded(name: str, kind: str) -> None:
    x = features()
    model = scrambled(SECOND_STAGES[name].build(classifier(kind)))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    again = stage_module(SECOND_STAGES[name].config(), classifier(kind, seed=9)).double()
    again.load_state_dict(state)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(("name", "kind"), allowed())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_half_precision_features_and_zero_train_classes_stay_finite(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    model = SECOND_STAGES[name].build(classifier(kind).float())
    x = (1e4 * features()).to(dtype)
    x[0].zero_()
    counts = [500, 20, 3, 1, 0, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss = build_loss(SECOND_STAGES[name].loss, counts)(logits, torch.arange(9) % CLASSES)
    loss.backward()
    assert logits.dtype == torch.float32
    assert torch.isfinite(loss)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tau_normalization_of_large_half_precision_features_stays_finite(tau: float, dtype: torch.dtype) -> None:
    """Also for a class that has learned nothing, whose weights are 0."""
    first = classifier().float()
    with torch.no_grad():
        first.weight[4:].zero_()
    x = (1e4 * features()).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tau_normalized(first, tau)(x)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert logits[:, :4].abs().max() > 1e3
    targets = torch.arange(9) % 4
    assert np.isfinite(best_tau(first, x, targets).score)


@pytest.mark.parametrize(("name", "kind"), allowed())
def test_a_batch_without_rows_passes(name: str, kind: str) -> None:
    model = SECOND_STAGES[name].build(classifier(kind).float())
    out = model(torch.zeros(0, WIDTH))
    assert out.shape == (0, CLASSES)
    out.sum().backward()


def test_what_trains_is_the_stage_alone() -> None:
    for name, build in ON_LOGITS.items():
        stage = build(classifier())
        assert not any(parameter.requires_grad for parameter in stage.first_stage.parameters())
        trained = sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad)
        assert trained == {"learnable_weight_scaling": 6, "disalign": 12 + 11, "marc": 12}[name]


def test_focal_and_other_losses_reach_every_parameter() -> None:
    stage = DisAlign(classifier())
    F.cross_entropy(stage.double()(features()), torch.arange(9) % CLASSES).backward()
    for key, parameter in stage.named_parameters():
        assert (parameter.grad is None) == key.startswith("first_stage"), key
