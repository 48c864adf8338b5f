"""Class means, discriminant and prototypes against independent formulas, and where validation selects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_data import CLASS_COUNTS, WIDTH, tiny_config, tiny_data

from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.features.trial_data import TrialData
from imbvlm.models import training_free
from imbvlm.models.model_builder import build_model
from imbvlm.models.training_free import SHRINKAGES, Discriminant, cluster_centers
from imbvlm.training.trial_run import build_trial

CPU = torch.device("cpu")
NUM_CLASSES = len(CLASS_COUNTS)
# The last class has no images.
SEEN = range(NUM_CLASSES - 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return tiny_data(tmp_path_factory.mktemp("features"))


def directions(data: TrialData) -> npt.NDArray[np.float64]:
    """Normalized pooled output (N, D) of the training rows."""
    features = data.train.batch("pooled", np.arange(len(data.train.labels))).double().numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def logits(data: TrialData, method: str, **overrides: object) -> npt.NDArray[np.float64]:
    """Logits of the first 20 training rows."""
    model = build_model(tiny_config(method, **overrides), data.model_inputs, CPU)
    return model(data.train.batch("pooled", np.arange(20)).float()).double().numpy()


def test_class_means_are_the_cosine_to_each_classs_mean_direction(data: TrialData) -> None:
    x, labels = directions(data), data.train.labels
    means = np.stack([x[labels == label].mean(axis=0) for label in SEEN])
    expected = x[:20] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T / 0.1
    computed = logits(data, "class_means", class_means__temperature=0.1)
    np.testing.assert_allclose(computed[:, SEEN], expected, atol=1e-4)
    assert not computed[:, -1].any()


@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
def test_a_discriminant_is_the_ratio_of_normal_densities_with_one_covariance(data: TrialData, shrinkage: float) -> None:
    x, labels = directions(data), data.train.labels
    means = np.stack([x[labels == label].mean(axis=0) for label in SEEN])
    residuals = x - means[labels]
    covariance = residuals.T @ residuals / (len(x) - len(SEEN))
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / WIDTH * np.eye(WIDTH)

    def log_density(mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        away = x[:20] - mean
        return -0.5 * (away * np.linalg.solve(shrunk, away.T).T).sum(axis=1)

    expected = np.stack([log_density(mean) - log_density(means.mean(axis=0)) for mean in means], axis=1)
    computed = logits(data, "discriminant", discriminant__shrinkage=shrinkage)
    np.testing.assert_allclose(computed[:, SEEN], expected, rtol=2e-3, atol=2e-3)


def test_a_cache_adds_the_affinities_of_a_classs_images_as_its_mean(data: TrialData) -> None:
    """With at most 16 images a class its prototypes are the images' own features, as in Tip-Adapter's cache."""
    few = np.concatenate([np.flatnonzero(data.train.labels == label)[:16] for label in SEEN])
    rows = replace(data.train, rows=data.train.rows[few], labels=data.train.labels[few])
    small = replace(data, train=rows)
    x, labels = directions(small), rows.labels
    affinity = np.exp(-3.0 * (1 - directions(small)[:20] @ x.T))
    expected = np.stack([20.0 * affinity[:, labels == label].mean(axis=1) for label in SEEN], axis=1)
    computed = logits(small, "prototype_cache", prototype_cache__sharpness=3.0)
    np.testing.assert_allclose(computed[:, SEEN], expected, rtol=1e-4)


def test_a_cache_of_one_prototype_ranks_as_class_means_do(data: TrialData) -> None:
    one_each = logits(data, "prototype_cache", prototype_cache__num_prototypes=1)
    assert (one_each.argmax(axis=1) == logits(data, "class_means").argmax(axis=1)).all()


def test_centers_lie_in_clusters_and_large_classes_are_bounded(
    data: TrialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    corners = torch.eye(4).repeat_interleave(25, dim=0) + 0.05 * torch.randn(100, 4)
    centers = cluster_centers(torch.nn.functional.normalize(corners, dim=1), 4)
    assert (centers @ torch.eye(4)).amax(dim=0).min() > 0.99
    monkeypatch.setattr(training_free, "MAX_CLASS_ROWS", 20)
    model = build_model(tiny_config("prototype_cache"), data.model_inputs, CPU)
    assert model.prototypes.shape == (16, NUM_CLASSES, WIDTH)
    torch.testing.assert_close(model.shares.sum(dim=0), torch.tensor([1.0] * len(SEEN) + [0.0]))


@pytest.mark.parametrize("method", ["class_means", "discriminant", "prototype_cache"])
def test_a_class_without_images_has_the_logit_of_no_similarity(data: TrialData, method: str) -> None:
    """For the discriminant that is the average class, to which its logits are ratios."""
    assert not logits(data, method)[:, -1].any()


def test_a_trial_reports_what_validation_selects_and_a_refit_needs_it(data: TrialData) -> None:
    (result,) = build_trial(tiny_config("discriminant"), data).epochs()
    shrinkage, temperature = (result.metrics[f"discriminant/{name}"] for name in ("shrinkage", "temperature"))
    targets = torch.from_numpy(data.val.labels)
    features = data.val.batch("pooled", np.arange(len(targets))).float()
    likelihoods = {}
    for candidate in SHRINKAGES:
        options = {"discriminant__shrinkage": candidate, "discriminant__temperature": 1.0}
        logits = build_model(tiny_config("discriminant", **options), data.model_inputs, CPU)(features).double()
        own = training_free.best_temperature(logits, targets)
        likelihood = torch.log_softmax(logits / own, dim=1)[torch.arange(len(targets)), targets].numpy()
        likelihoods[candidate] = np.mean([likelihood[data.val.labels == c].mean() for c in set(data.val.labels)])
    assert shrinkage == max(likelihoods, key=lambda candidate: likelihoods[candidate])
    chosen = {"discriminant__shrinkage": shrinkage, "discriminant__temperature": temperature}
    (fixed,) = build_trial(tiny_config("discriminant", **chosen), data).epochs()
    assert fixed.metrics["val/loss"] == pytest.approx(result.metrics["val/loss"])
    assert fixed.metrics["val/loss"] < -min(likelihoods.values())
    without = replace(data, val=replace(data.val, rows=data.val.rows[:0], labels=data.val.labels[:0]))
    with pytest.raises(ImbvlmError, match=r"discriminant.shrinkage is selected on validation rows, and there are none"):
        build_trial(tiny_config("discriminant"), without)
    (refitted,) = build_trial(tiny_config("discriminant", **chosen), without).epochs()
    assert refitted.failure is None


def test_more_validation_rows_than_memory_allows_are_thinned(data: TrialData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_free, "MAX_LOGITS", 10 * NUM_CLASSES)
    seen: list[int] = []
    forward = Discriminant.forward

    def counting(self: Discriminant, features: torch.Tensor) -> torch.Tensor:
        seen.append(len(features))
        return forward(self, features)

    monkeypatch.setattr(Discriminant, "forward", counting)
    list(build_trial(tiny_config("discriminant"), data).epochs())
    assert max(seen[: len(SHRINKAGES)]) <= 10


def test_what_is_built_from_stored_features_cannot_read_images() -> None:
    with pytest.raises(ConfigError, match="method class_means is built from the stored features"):
        tiny_config("class_means", features__store=False)


def test_a_model_takes_what_memory_its_classes_take_not_its_images(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    for method in ("class_means", "discriminant", "prototype_cache"):
        state = build_model(tiny_config(method), data.model_inputs, CPU).state_dict()
        assert sum(tensor.numel() for tensor in state.values()) <= 17 * NUM_CLASSES * (WIDTH + 1), method
