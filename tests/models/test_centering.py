"""Vectors of classes centered by parent: what they are in flat and deep trees, and where a tree is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_data import tiny_config, tiny_features, tiny_tower
from torch.nn.functional import normalize

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.class_embeddings import ensure_class_embeddings
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.classifier_init import centered_by_parent
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_builder import build_model
from imbvlm.models.training_free import centered_prototypes

KEY = "class_means.center_by_parent"


def two_groups(num_classes: int) -> Taxonomy:
    return Taxonomy(("group", "class"), tuple((f"g{label % 2}",) for label in range(num_classes)))


def vectors(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("parents", [["all"] * 5, list("abcde")])
def test_in_a_flat_tree_it_is_centering_by_the_mean_of_all_classes(parents: list[str]) -> None:
    """All classes have one parent, or each has its own."""
    taxonomy = Taxonomy(("group", "class"), tuple((parent,) for parent in parents))
    expected = normalize(vectors(5) - vectors(5).mean(dim=0), dim=1)
    torch.testing.assert_close(centered_by_parent(vectors(5), taxonomy, KEY), expected)


def test_a_deep_tree_adds_unit_steps_from_parents_to_children() -> None:
    taxonomy = Taxonomy(
        ("order", "family", "class"), (("A", "a"), ("A", "a"), ("A", "b"), ("B", "c"), ("B", "c"), ("B", "c"))
    )
    v = vectors(6).double()
    a, b, c = v[:2].mean(0), v[2], v[3:].mean(0)
    first, second = (a + b) / 2, c
    root = (first + second) / 2
    unit = [normalize(step, dim=0) for step in (first - root, a - first, v[1] - a)]
    expected = normalize(sum(unit), dim=0)
    centered = centered_by_parent(v.float(), taxonomy, KEY)
    torch.testing.assert_close(centered[1].double(), expected, atol=1e-6, rtol=1e-5)
    # An only child takes no step of its own.
    alone = normalize(normalize(first - root, dim=0) + normalize(b - first, dim=0), dim=0)
    torch.testing.assert_close(centered[2].double(), alone, atol=1e-6, rtol=1e-5)
    with pytest.raises(ImbvlmError, match=f"{KEY} needs a tree over the classes, and the manifest has none"):
        centered_by_parent(v, None, KEY)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=9), st.integers(0, 99))
def test_classes_without_images_stay_zero_and_change_no_other(codes: list[tuple[int, int]], seed: int) -> None:
    lineages = tuple((f"o{order}", f"f{order}.{family}") for order, family in codes)
    taxonomy = Taxonomy(("order", "family", "class"), lineages)
    values = vectors(len(codes), seed)
    values[0] = 0
    centered = centered_by_parent(values, taxonomy, KEY)
    assert not centered[0].any()
    rest = centered_by_parent(values[1:], Taxonomy(taxonomy.ranks, lineages[1:]), KEY)
    torch.testing.assert_close(centered[1:], rest, atol=1e-5, rtol=1e-4)
    lengths = centered[1:].norm(dim=1)
    assert torch.where(lengths > 0.5, lengths, 1.0).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["class_means", "prototype_cache"])
def test_methods_without_training_center_where_asked_for_and_digests_stay(method: str, tmp_path: Path) -> None:
    """A cache of one prototype a class has that class's mean, and is centered as class means are."""
    features = tiny_features(tmp_path)
    options = {"prototype_cache__num_prototypes": 1} if method == "prototype_cache" else {}
    config = tiny_config(method, **options)
    asked = tiny_config(method, **options, **{f"{method}__center_by_parent": True})
    assert "center_by_parent" not in config.key()
    assert "center_by_parent" in asked.key()
    data = TrialData.open(config, features)
    with pytest.raises(ImbvlmError, match=f"{method}.center_by_parent needs a tree over the classes"):
        build_model(asked, data.model_inputs, torch.device("cpu"))
    inputs = replace(data.model_inputs, taxonomy=two_groups(len(data.class_names)))
    plain, centered = (
        next(iter(build_model(each, inputs, torch.device("cpu")).state_dict().values())).view(len(data.class_names), -1)
        for each in (config, asked)
    )
    torch.testing.assert_close(centered, centered_by_parent(plain, inputs.taxonomy, KEY))
    assert TrialConfig.from_tree(asked.to_tree()) == asked


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=6), st.integers(0, 99))
def test_prototypes_of_a_class_move_together_to_its_centered_mean(counts: list[int], seed: int) -> None:
    taxonomy = two_groups(len(counts))
    number = torch.tensor(counts)
    is_filled = torch.arange(4)[:, None] < number
    values = normalize(vectors(4 * len(counts), seed), dim=1).view(4, len(counts), 7).double() * is_filled[:, :, None]
    moved = centered_prototypes(values, is_filled / number.clamp(min=1), taxonomy)
    means = values.sum(dim=0) / number.clamp(min=1)[:, None]
    targets = centered_by_parent(normalize(means, dim=1), taxonomy, KEY) * means.norm(dim=1, keepdim=True)
    expected = normalize(values - means + targets, dim=2) * is_filled[:, :, None]
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-5)


def test_a_text_start_has_the_centered_text_features(tmp_path: Path) -> None:
    """Features are centered where they are stored, so zero-shot and the classifier's start read the same ones."""
    features = tiny_features(tmp_path)
    data = TrialData.open(tiny_config("linear_probe"), features)
    encoder = create_encoder(EncoderConfig(name=tiny_tower()[0]), EvalConfig())
    taxonomy = two_groups(len(data.class_names))
    names = ["cat", "dog", "tulip", "rose", "oak", "elm"]

    def classes(center: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Text features, zero-shot's and the text start's weights."""
        asked = {"prompts.center_by_parent": center}
        zero_shot = tiny_config("zero_shot").with_overrides(asked)
        start = tiny_config("linear_probe").with_overrides({**asked, "classifier.init": "text"})
        path = ensure_class_embeddings(start, names, str(tmp_path), encoder, print, taxonomy)
        inputs = replace(data.model_inputs, class_embeddings=load_file(path)["class_embeddings"])
        weights = [build_model(each, inputs, torch.device("cpu")).state_dict() for each in (zero_shot, start)]
        return inputs.class_embeddings, weights[0]["class_embeddings"], weights[1]["classifier.weight"]

    plain, centered = classes(False), classes(True)
    expected = centered_by_parent(plain[0], taxonomy, KEY)
    torch.testing.assert_close(centered[0], expected)
    torch.testing.assert_close(centered[1], expected)
    projection = data.encoder_tensors["projection"]
    torch.testing.assert_close(centered[2], normalize(expected @ projection.T, dim=1))
    assert not torch.allclose(plain[2], centered[2], atol=0.1)
