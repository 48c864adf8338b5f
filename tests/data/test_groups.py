"""Groups: no split divides them, every class stays trained on, and what they cost is said."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.folds import deal_folds
from imbvlm.data.groups import deal_groups, summarize_groups
from imbvlm.data.manifest import Manifest, ManifestError, label_rows
from imbvlm.data.manifest_check import check_manifest
from imbvlm.data.manifest_summary import summary, summary_dict
from imbvlm.data.split_power import resolve_folds
from imbvlm.data.splits import hold_out_test_groups, hold_out_test_split, train_val_rows
from imbvlm.sweep.records.provenance import provenance

# A class, a group or none, and which image it is: few of each, so that all of them coincide.
ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.none() | st.integers(0, 6), st.integers(0, 30)), min_size=1, max_size=50
)


def made(rows: Sequence[tuple[int, object, int]], splits: Sequence[str] | None = None) -> Manifest:
    """A manifest of embedded images: rows with the same last number are copies."""
    table = pa.table(
        {
            "uri": [f"{row}.png" for row in range(len(rows))],
            "bytes": [bytes([image]) for _, _, image in rows],
            "label": [label for label, _, _ in rows],
            "split": splits or ["train"] * len(rows),
            "group": pa.array([None if group is None else f"cam{group}" for _, group, _ in rows], pa.string()),
        }
    )
    return Manifest.build(table, ["ant", "bee", "cat", "dog"], "made")


def sides_share(rows: Sequence[tuple[int, object, int]], first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two sides have a group, or copies of an image, in common."""
    return any(
        {rows[row][column] for row in first} & {rows[row][column] for row in second} - {None} for column in (1, 2)
    )


@settings(deadline=None)
@given(ROWS, st.integers(2, 6), st.integers(0, 3))
def test_folds_keep_groups_and_copies_whole_and_every_class_trained(
    rows: list[tuple[int, object, int]], num_folds: int, seed: int
) -> None:
    manifest = made(rows)
    if not manifest.has_groups:
        return
    labels, folds = manifest.labels, deal_folds(manifest.label_rows(), num_folds, seed)
    for fold in folds.folds:
        assert len(fold.val) > 0
        assert not sides_share(rows, fold.train, fold.val)
        assert set(labels[fold.train]) == set(labels)
    assert len(np.unique(folds.val_rows)) == len(folds.val_rows)
    train, val = train_val_rows(manifest, seed)
    assert not sides_share(rows, train, val)
    assert set(labels[train]) == set(labels)
    # Wherever folds can score, held-out rows can.
    assert len(val) > 0 or not folds.folds


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=2, max_size=50), st.integers(2, 6))
def test_folds_at_random_have_as_many_images_of_each_class_as_those_of_groups(
    pairs: list[tuple[int, int]], num_folds: int
) -> None:
    rows = made([(label, group, image) for image, (label, group) in enumerate(pairs)]).label_rows()
    sides = [deal_folds(rows, num_folds, 1, at_random=at_random) for at_random in (False, True)]
    counts = [[np.bincount(rows.labels[fold.val], minlength=4).tolist() for fold in folds.folds] for folds in sides]
    assert counts[0] == counts[1]
    for fold in sides[1].folds:
        assert sorted([*fold.train, *fold.val]) == list(range(len(pairs)))
        assert set(rows.labels[fold.train]) == set(rows.labels)


@settings(deadline=None)
@given(ROWS, st.floats(0.05, 0.95), st.integers(0, 3))
def test_the_test_share_keeps_groups_whole_or_is_refused(
    rows: list[tuple[int, object, int]], share: float, seed: int
) -> None:
    manifest = made(rows, ["val" if index % 5 == 4 else "train" for index in range(len(rows))])
    if not manifest.has_groups:
        return
    try:
        divided = hold_out_test_split(manifest, share, seed=seed)
    except ManifestError:
        return
    test = divided.rows_of("test")
    rest = np.setdiff1d(np.arange(len(rows)), test)
    assert not sides_share(rows, test, rest)
    assert set(divided.labels[divided.rows_of("train")]) == set(manifest.labels[manifest.rows_of("train")])


def test_parts_of_many_groups_have_their_shares_of_every_class() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 200, 6000)
    labels = np.where(rng.random(6000) < 0.05, rng.integers(0, 10, 6000), groups % 10)
    for shares in ([0.2] * 5, [0.2], [0.5, 0.3]):
        parts = deal_groups(labels, groups, shares, 1)
        for part, share in enumerate(shares):
            in_part = np.bincount(labels[parts == part], minlength=10) / np.bincount(labels)
            assert np.abs(in_part - share).max() < 0.08
            assert abs((parts == part).mean() - share) < 0.02
        assert not np.array_equal(parts, deal_groups(labels, groups, shares, 2))


def test_two_groups_give_two_folds_each_scored_by_a_model_of_the_other() -> None:
    manifest = made([(label, vendor, 10 * label + 2 * number + vendor) for label in range(4) for number in range(3)
                     for vendor in range(2)])  # fmt: skip
    first, second = deal_folds(manifest.label_rows(), 5, 0).folds
    assert (first.train.tolist(), first.val.tolist()) == (second.val.tolist(), second.train.tolist())
    assert resolve_folds(None, manifest, 0) == 2
    assert resolve_folds(1, manifest, 0) == 1
    with pytest.raises(ManifestError, match=r"no group can be held out as 20 % .* choose the groups by --test-groups"):
        hold_out_test_split(manifest, 0.2)
    both = [hold_out_test_groups(manifest, [name]) for name in ("cam0", "cam1")]
    assert both[0].rows_of("test").tolist() == both[1].rows_of("train").tolist()
    # With a single group left, validation has to divide it.
    assert "all training images are of the group 'cam1', so that validation divides it" in both[0].notes
    assert not both[0].has_groups
    assert sorted(deal_folds(both[0].label_rows(), 3, 0).val_rows.tolist()) == both[0].rows_of("train").tolist()


def test_named_groups_replace_the_test_split() -> None:
    rows = [(0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 1, 3), (1, 2, 4), (1, 3, 5)]
    manifest = made(rows, ["train", "test", "train", "train", "train", "val"])
    divided = hold_out_test_groups(manifest, ["cam3"])
    assert divided.table.column("split").to_pylist() == ["train", "train", "test", "train", "train", "test"]
    with pytest.raises(ImbvlmError, match=r"takes names of groups.*'cam33': did you mean 'cam3'"):
        hold_out_test_groups(manifest, ["cam33"])
    with pytest.raises(ManifestError, match="leaves no training image"):
        hold_out_test_groups(manifest, ["cam1", "cam2", "cam3"])


def test_the_check_names_groups_on_both_sides_and_classes_in_one_group() -> None:
    rows = [(0, 1, 0), (0, 1, 1), (1, 2, 2), (1, 3, 3), (2, 4, 4), (0, 4, 5), (1, 5, 5), (1, None, 6), (0, 2, 7)]
    manifest = made(rows, ["train"] * 5 + ["test"] + ["train"] * 3)
    text = str(check_manifest(manifest))
    assert (
        "warning  1 group on both sides of a split, which then doesn't score unseen groups: cam4 (train/test)" in text
    )
    assert "note     1 set of groups that share an image, each dealt as one group: cam4 + cam5" in text
    assert "note     1 image without a group, each a group of its own" in text
    assert "1 class in a single group, which stays in training whole and scores nothing: cat" in text
    assert "groups            5 of 1 to 2 images\n" in summary(manifest)
    assert "1 on both sides of a split: cam4 (train/test)" in summary(manifest)
    assert summary_dict(manifest)["groups"] == {
        "images": {"cam1": 2, "cam2": 2, "cam3": 1, "cam4": 2, "cam5": 1},
        "in_several_splits": ["cam4 (train/test)"],
        "single_group_classes": ["cat"],
    }


def test_nothing_to_hold_out_is_said() -> None:
    text = str(check_manifest(made([(0, 1, 0), (0, 1, 1), (1, 2, 2), (1, 2, 3)])))
    assert "no class has a validation image, so that nothing can be selected: only classes of 2 or more groups" in text
    alone = str(check_manifest(made([(0, 1, 0), (0, 2, 1), (1, 3, 2), (1, 4, 3)])))
    assert "every group has a single image, so that groups keep nothing together" in alone


def test_groups_are_kept_and_a_manifest_without_them_is_as_before(tmp_path: Path) -> None:
    rows = [(0, 1, 0), (0, 2, 1), (1, 1, 2), (1, 2, 3)]
    path = str(tmp_path / "made.parquet")
    manifest, without = made(rows), made([(label, None, image) for label, _, image in rows])
    manifest.write(path)
    assert Manifest.read(path).table.column("group").to_pylist() == ["cam1", "cam2", "cam1", "cam2"]
    read = label_rows(path).groups
    assert read is not None
    assert read.tolist() == manifest.label_rows().groups.tolist()  # type: ignore[union-attr]
    assert provenance(manifest)["data"] != provenance(without)["data"]
    without.write(path)
    assert pa.parquet.read_schema(path).names == ["uri", "bytes", "label", "split", "content"]
    assert label_rows(path).groups is None
    assert summarize_groups(without) is None
    assert "groups" not in summary_dict(without)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(b'["ant", "bee", "cat", "dog"]' + without.labels.tobytes() + b"train ")
    digest.update(np.arange(4).tobytes() + b"".join(without.table.column("content").to_pylist()))
    assert provenance(without)["data"] == digest.hexdigest()


@pytest.mark.parametrize("values", [pa.array([[1], [2]]), pa.array([b"\xff", b"a"]), pa.array([0.5, 1.5])])
def test_groups_of_another_type_are_refused(values: pa.Array) -> None:
    table = pa.table({"uri": ["a", "b"], "label": [0, 0], "split": ["train"] * 2, "group": values})
    with pytest.raises(ManifestError, match="groups must be text or whole numbers, and are"):
        Manifest.build(table, ["ant"], "made")
