"""Trees over classes: errors by rank against paths that are climbed, and what is no tree."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.longtail.taxonomy import LCA_HEIGHT, RANK_ERROR, Taxonomy, lineage_findings, rank_errors

CATS = Taxonomy(
    ("family", "genus", "species"),
    (("Felidae", "Felis"), ("Felidae", "Felis"), ("Felidae", "Lynx"), ("Canidae", "Canis")),
)


@st.composite
def trees(draw: st.DrawFn) -> Taxonomy:
    """Classes below one to three ranks, some taxa of a single class; names are wild and may be equal across ranks."""
    num_classes, num_ranks = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    alphabet = st.text(min_size=1, max_size=4)
    lineages: list[list[str]] = [[] for _ in range(num_classes)]
    groups = [list(range(num_classes))]
    for _ in range(num_ranks):
        divided = [(group, draw(sides(len(group)))) for group in groups]
        parts = [
            [label for label, side in zip(group, chosen, strict=True) if side == wanted]
            for group, chosen in divided
            for wanted in (0, 1)
        ]
        groups = [part for part in parts if part]
        names = draw(st.lists(alphabet, min_size=len(groups), max_size=len(groups), unique=True))
        for group, name in zip(groups, names, strict=True):
            for label in group:
                lineages[label].append(name)
    return Taxonomy((*(f"rank {number}" for number in range(num_ranks)), "class"), tuple(map(tuple, lineages)))


def sides(number: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 1), min_size=number, max_size=number)


def climbed_height(taxonomy: Taxonomy, label: int, other: int) -> int:
    """Steps from a class up to the first ancestor that the other class has, too."""
    paths = [[(0, str(each)), *enumerate(reversed(taxonomy.lineages[each]), 1)] for each in (label, other)]
    shared = [height for height, taxon in enumerate(paths[0]) if taxon in paths[1]]
    return min(shared, default=len(taxonomy.ranks))


@settings(max_examples=60, deadline=None)
@given(trees(), st.data())
def test_the_mean_height_is_that_of_climbed_paths_and_the_sum_of_errors(
    taxonomy: Taxonomy, data: st.DataObject
) -> None:
    assert lineage_findings(taxonomy, [""] * len(taxonomy.lineages)) == []
    classes = st.integers(0, len(taxonomy.lineages) - 1)
    rows = data.draw(st.lists(st.tuples(classes, st.one_of(classes, st.just(-1))), max_size=30))
    labels, predicted = (np.array(column, dtype=np.int64) for column in (list(zip(*rows, strict=True)) or [(), ()]))
    scores = rank_errors(taxonomy, labels, predicted)
    heights: dict[int, list[int]] = {}
    for label, other in rows:
        if other >= 0:
            heights.setdefault(label, []).append(climbed_height(taxonomy, label, other))
    if not heights:
        assert scores == {}
        return
    assert list(scores) == [*(f"{RANK_ERROR}{rank}" for rank in reversed(taxonomy.ranks)), LCA_HEIGHT]
    assert scores[LCA_HEIGHT] == pytest.approx(np.mean([np.mean(own) for own in heights.values()]))
    *errors, height = scores.values()
    assert height == pytest.approx(sum(errors))
    assert errors == sorted(errors, reverse=True)


def test_a_right_genus_is_half_a_mistake() -> None:
    labels, predicted = np.array([0, 0, 2, 3, 3]), np.array([1, 0, 3, 3, -1])
    assert rank_errors(CATS, labels, predicted) == {
        "rank_error/species": pytest.approx((1 / 2 + 1 + 0) / 3),
        "rank_error/genus": pytest.approx((0 + 1 + 0) / 3),
        "rank_error/family": pytest.approx((0 + 1 + 0) / 3),
        "lca_height": pytest.approx((1 / 2 + 3 + 0) / 3),
    }


def test_codes_and_taxa_are_in_the_order_of_classes() -> None:
    assert CATS.taxa == (("Felidae", "Canidae"), ("Felis", "Lynx", "Canis"))
    assert CATS.codes.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]]
    assert CATS.describe() == "family 2, genus 3, species 4"


@settings(max_examples=30, deadline=None)
@given(trees())
def test_a_tree_is_read_as_it_was_written(taxonomy: Taxonomy) -> None:
    data = json.loads(json.dumps(taxonomy.to_dict()))
    assert Taxonomy.from_dict(data, len(taxonomy.lineages)) == taxonomy


@pytest.mark.parametrize(
    ("ranks", "lineages", "finding"),
    [
        (("class",), ((), ()), "a tree needs two ranks or more"),
        (("class", "class"), (("a",), ("b",)), "each with a name of its own"),
        (("", "class"), (("a",), ("b",)), "each with a name of its own"),
        (("genus", "class"), (("a",),), "the tree has 1 classes, and there are 2"),
        (
            ("genus", "class"),
            (("a", "b"), ("a",)),
            "'class 0' has 2 ancestors, and the ranks above the classes are genus",
        ),
        (("family", "genus", "class"), (("a", ""), ("a", "b")), "'class 0' has no genus"),
        (("family", "genus", "class"), (("a", "c"), ("b", "c")), "the genus 'c' lies in 'a' and in 'b'"),
    ],
)
def test_what_is_no_tree_is_named(ranks: tuple[str, ...], lineages: tuple[tuple[str, ...], ...], finding: str) -> None:
    findings = lineage_findings(Taxonomy(ranks, lineages), ["class 0", "class 1"])
    assert any(finding in text for text in findings), findings
    with pytest.raises(ValueError, match=re.escape(findings[0])):
        Taxonomy.from_dict({"ranks": ranks, "lineages": lineages}, 2)


@pytest.mark.parametrize("data", [{}, {"ranks": 3, "lineages": []}, {"ranks": ["a", "b"], "lineages": [[1], [2]]}])
def test_what_is_no_record_of_a_tree_is_no_tree(data: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        Taxonomy.from_dict(data, 2)
