"""Linear and cosine classifiers: their formula, their start, zero vectors, precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.schema import Section
from imbvlm.config.model_sections import CosineClassifierConfig, DecoderConfig, LinearClassifierConfig
from imbvlm.models.classifier import (
    CosineClassifier,
    FeatureClassifier,
    LinearClassifier,
    ZeroShotClassifier,
    affine_map,
    build_classifier,
    l2_normalize,
)
from imbvlm.models.decoder import Decoder
from imbvlm.models.prompt_learner import PromptClassifier
from imbvlm.models.second_stage_modules import DisAlign, LearnableWeightScaling, Marc
from imbvlm.models.training_free import Discriminant, PrototypeCache

LINEAR, COSINE = LinearClassifierConfig(), CosineClassifierConfig(temperature=0.04)
both = pytest.mark.parametrize("config", [LINEAR, COSINE], ids=["linear", "cosine"])


def features(rows: int = 5, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_is_torchs_own() -> None:
    classifier = build_classifier(LINEAR, 12, 7).double()
    x = features()
    assert classifier.bias.shape == (7,)
    torch.testing.assert_close(classifier(x), x @ classifier.weight.T + classifier.bias)


def test_cosine_is_the_cosine_over_the_temperature() -> None:
    classifier = build_classifier(COSINE, 12, 7).double()
    x = features()
    expected = F.cosine_similarity(x[:, None], classifier.weight[None], dim=-1) / 0.04
    torch.testing.assert_close(classifier(x), expected)
    assert set(classifier.state_dict()) == {"weight"}


def test_cosine_knows_no_lengths() -> None:
    classifier = build_classifier(COSINE, 12, 7).double()
    x = features()
    expected = classifier(x)
    torch.testing.assert_close(classifier(100 * x), expected)
    with torch.no_grad():
        classifier.weight.mul_(3.0)
    torch.testing.assert_close(classifier(x), expected)


def test_cosine_starts_on_the_sphere() -> None:
    classifier = build_classifier(COSINE, 512, 50)
    torch.testing.assert_close(classifier.weight.norm(dim=1), torch.ones(50))
    cosines = (classifier.weight @ classifier.weight.T).fill_diagonal_(0)
    assert cosines.abs().max() < 0.3


@both
def test_zero_vectors_give_finite_logits_and_gradients(config: Section) -> None:
    classifier = build_classifier(config, 12, 7)
    with torch.no_grad():
        classifier.weight[2].zero_()
    x = features().float()
    x[1].zero_()
    x.requires_grad_()
    classifier(x).square().sum().backward()
    for gradient in (x.grad, classifier.weight.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 1e5  # one dead feature doesn't take over a clipped step
    if config is COSINE:
        assert torch.equal(classifier(x)[1], torch.zeros(7))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_unit_vectors_have_length_1_and_true_gradients(scale: float) -> None:
    vectors = (scale * features()).requires_grad_()
    torch.testing.assert_close(l2_normalize(vectors).norm(dim=1), torch.ones(5, dtype=torch.float64))
    if scale == 1.0:
        assert torch.autograd.gradcheck(l2_normalize, vectors)


@both
def test_it_starts_from_given_weights(config: Section) -> None:
    given = features(rows=7, seed=1)
    classifier = build_classifier(config, 12, 7, init_weight=given).double()
    torch.testing.assert_close(classifier.weight, given, rtol=1e-6, atol=1e-6)
    if isinstance(classifier, LinearClassifier):
        assert classifier.bias.abs().sum() == 0
    before = given.clone()
    with torch.no_grad():
        classifier.weight.zero_()
    assert torch.equal(given, before)


@both
def test_a_class_without_a_mean_starts_at_random_and_learns(config: Section) -> None:
    given = features(rows=7, seed=1)
    given[3] = 0
    classifier = build_classifier(config, 12, 7, init_weight=given)
    assert classifier.weight[3].norm() > 0.01
    classifier(features().float()).square().sum().backward()
    assert classifier.weight.grad[3].abs().sum() > 0


@both
def test_weights_of_another_shape_are_refused(config: Section) -> None:
    with pytest.raises(ImbvlmError, match=r"shape \(7, 12\), got \(7, 10\)"):
        build_classifier(config, 12, 7, init_weight=torch.zeros(7, 10))


@both
def test_the_same_seed_starts_the_same(config: Section) -> None:
    torch.manual_seed(1)
    first = build_classifier(config, 12, 7).weight
    torch.manual_seed(1)
    assert torch.equal(first, build_classifier(config, 12, 7).weight)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_are_float32_whatever_comes_in(config: Section, dtype: torch.dtype) -> None:
    classifier = build_classifier(config, 12, 7)
    x = features().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, classifier(x.float()), rtol=0, atol=0)


@both
def test_a_batch_without_rows_passes(config: Section) -> None:
    out = build_classifier(config, 12, 7)(torch.zeros(0, 12))
    assert out.shape == (0, 7)
    out.sum().backward()


@pytest.mark.parametrize("build", [lambda: LinearClassifier(8, 3), lambda: CosineClassifier(8, 3, 0.1)])
def test_it_learns(build: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    classifier = build()
    centers = torch.randn(3, 8)
    labels = torch.arange(90) % 3
    x = centers[labels] + 0.3 * torch.randn(90, 8)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), labels)
        loss.backward()
        optimizer.step()
    assert (classifier(x).argmax(dim=1) == labels).float().mean() > 0.97


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """With random numbers in every tensor, so that nothing stays 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    for tensor in module.state_dict().values():
        tensor.add_(torch.rand(tensor.shape, generator=generator))
    return module.eval()


HEADS: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: FeatureClassifier(torch.nn.Identity(), LinearClassifier(12, 7)),
    "cosine": lambda: FeatureClassifier(torch.nn.Identity(), CosineClassifier(12, 7, 0.04)),
    "zero-shot": lambda: ZeroShotClassifier(torch.randn(7, 12), 50.0),
    "prompts": lambda: PromptClassifier(torch.zeros(2, 3), torch.randn(7, 12), 50.0, None),
    "discriminant": lambda: Discriminant(12, 7),
    "scaled linear": lambda: LearnableWeightScaling(LinearClassifier(12, 7)),
    "scaled cosine": lambda: FeatureClassifier(
        torch.nn.Identity(), LearnableWeightScaling(CosineClassifier(12, 7, 0.1))
    ),
    "marc": lambda: Marc(LinearClassifier(12, 7)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_as_a_matrix_has_its_logits(name: str) -> None:
    head, x = shaken(HEADS[name]()), features().float()
    affine = affine_map(head)
    assert affine is not None
    given = F.normalize(x.double(), dim=1) if affine.is_normalized else x.double()
    with torch.no_grad():
        expected = head(x).double()
    torch.testing.assert_close(given @ affine.weight.T + affine.bias, expected, rtol=1e-5, atol=1e-4)
    halved = affine.scaled(0.5)
    torch.testing.assert_close(given @ halved.weight.T + halved.bias, expected / 2, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "head",
    [
        FeatureClassifier(Decoder(12, DecoderConfig(depth=0), has_class_token=True), LinearClassifier(12, 7)),
        FeatureClassifier(torch.nn.Identity(), DisAlign(LinearClassifier(12, 7))),
        PrototypeCache(torch.zeros(2, 7, 12), torch.zeros(2, 7), 5.0, 10.0),
    ],
    ids=["decoder", "disalign", "prototypes"],
)
def test_a_head_that_is_no_matrix_says_so(head: torch.nn.Module) -> None:
    assert affine_map(head) is None
