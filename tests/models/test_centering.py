"""Vectors of classes centered by parent: what they are in flat and deep trees, and where a tree is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import tiny_config, tiny_features
from torch.nn.functional import normalize

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.classifier_init import centered_by_parent
from imbvlm.models.model_builder import build_model

KEY = "class_means.center_by_parent"


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


def test_class_means_are_centered_where_asked_for_and_digests_stay(tmp_path: Path) -> None:
    features = tiny_features(tmp_path)
    config, asked = (tiny_config("class_means", **more) for more in ({}, {"class_means__center_by_parent": True}))
    assert "center_by_parent" not in config.key()
    assert "center_by_parent" in asked.key()
    data = TrialData.open(config, features)
    with pytest.raises(ImbvlmError, match="needs a tree over the classes"):
        build_model(asked, data.model_inputs, torch.device("cpu"))
    manifest = Manifest.read(features.manifest)
    number = len(manifest.class_names)
    taxonomy = Taxonomy(("group", "class"), tuple((f"g{label % 2}",) for label in range(number)))
    inputs = TrialData.open(config, features, table=replace(manifest.label_rows(), taxonomy=taxonomy)).model_inputs
    plain, centered = (build_model(each, inputs, torch.device("cpu")).classifier.weight for each in (config, asked))
    torch.testing.assert_close(centered, centered_by_parent(plain, taxonomy, KEY))
    assert TrialConfig.from_tree(asked.to_tree()) == asked
