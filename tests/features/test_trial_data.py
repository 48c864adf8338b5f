"""What a trial reads: the right rows for training, validation and test, and the two kinds of counts."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_stores import stored_split
from tiny_data import tiny_info

from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.splits import carve_validation
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.store_layout import StoreError, StoreLayout
from imbvlm.features.trial_data import TrialData

NAMES = ("many", "few", "alone")
TRAIN = [0] * 12 + [1] * 6 + [2]


def manifest(splits: dict[str, list[int]]) -> Manifest:
    rows = [(split, label) for split, labels in splits.items() for label in labels]
    table = pa.table(
        {
            "uri": [f"/images/{number}.png" for number in range(len(rows))],
            "label": [label for _, label in rows],
            "split": [split for split, _ in rows],
        }
    )
    return Manifest.build(table, NAMES, "letters")


def config(path: Path, **encoder: Any) -> TrialConfig:
    data = {"manifest": str(path), "split_seed": 3}
    return TrialConfig.from_tree({"data": data, "encoder": {"name": "tiny", **encoder}, "method": "linear_probe"})


def features(folder: Path, splits: dict[str, list[int]], bad: tuple[int, ...] = (), num_views: int = 2) -> FeatureSet:
    """A store for each split whose pooled numbers are row + view / 10."""
    manifest(splits).write(str(folder / "manifest.parquet"))
    splits_of, layout = {}, StoreLayout("store", "float32", {"pooled": (1,)})
    for split, labels in splits.items():
        views = num_views if split == "train" else 1
        values = (np.arange(len(labels))[:, None] + np.arange(views) / 10)[:, :, None]
        splits_of[split] = stored_split(
            folder, layout, {"pooled": values}, name=split, per_shard=4, bad=bad if split == "train" else ()
        )
    (folder / "store" / "tower.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return FeatureSet(str(folder / "manifest.parquet"), str(folder / "store"), splits_of, ("pooled",), tiny_info())


def rows_read(examples: Any) -> list[int]:
    return examples.batch("pooled", np.arange(len(examples))).flatten().round().int().tolist()


def test_official_validation_is_used_and_nothing_is_carved(tmp_path: Path) -> None:
    stored = features(tmp_path, {"train": TRAIN, "val": [0, 1, 2, 2], "test": [1, 0]})
    data = TrialData.open(config(tmp_path / "manifest.parquet"), stored)
    assert rows_read(data.train) == list(range(19))
    assert data.val.labels.tolist() == [0, 1, 2, 2]
    assert data.class_stats.counts.tolist() == data.class_stats.split_counts.tolist() == [12, 6, 1]
    test = TrialData.open_split(config(tmp_path / "manifest.parquet"), stored, "test")
    assert test.labels.tolist() == [1, 0]
    views = data.train.batch("pooled", np.array([2, 2]), np.array([0, 1])).flatten().tolist()
    assert views == pytest.approx([2.0, 2.1])
    assert (data.train.num_views, data.val.num_views) == (2, 1)


def test_carved_rows_leave_training_and_come_back_for_the_refit(tmp_path: Path) -> None:
    stored, path = features(tmp_path, {"train": TRAIN, "test": [0]}), tmp_path / "manifest.parquet"
    data = TrialData.open(config(path), stored)
    carved = carve_validation(Manifest.read(str(path)).label_rows(), 3).tolist()
    assert len(carved) == 3
    assert rows_read(data.val) == sorted(carved)
    assert rows_read(data.train) == [row for row in range(19) if row not in carved]
    assert data.class_stats.counts.tolist() == [10, 5, 1]
    assert data.class_stats.split_counts.tolist() == [12, 6, 1]
    assert data.val.labels.tolist() == [TRAIN[row] for row in sorted(carved)]
    again = TrialData.open(config(path), stored, refit=True)
    assert rows_read(again.train) == list(range(19))
    assert len(again.val) == 0
    assert again.class_stats.counts.tolist() == [12, 6, 1]


def test_quarantined_rows_are_left_out_and_a_lost_class_stays(tmp_path: Path) -> None:
    stored = features(tmp_path, {"train": TRAIN, "val": [0, 1, 2]}, bad=(4, 18))
    data = TrialData.open(config(tmp_path / "manifest.parquet"), stored)
    assert rows_read(data.train) == [row for row in range(18) if row != 4]
    assert data.class_stats.counts.tolist() == [11, 6, 0]
    assert data.class_stats.split_counts.tolist() == [12, 6, 1]
    assert data.class_names == NAMES


def test_feature_set_goes_to_other_processes(tmp_path: Path) -> None:
    stored = features(tmp_path, {"train": TRAIN})
    assert pickle.loads(pickle.dumps(stored)) == stored


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    stored, path = features(tmp_path, {"train": TRAIN}), tmp_path / "manifest.parquet"
    with pytest.raises(StoreError, match="the test split has no stored features; extracted: train"):
        TrialData.open_split(config(path), stored, "test")
    with pytest.raises(StoreError, match=r"asks for encoder tiny at 64 px.*tiny at 32 px"):
        TrialData.open(config(path, image_size=64), stored)
    manifest({"train": TRAIN[:-1]}).write(str(path))
    with pytest.raises(StoreError, match=r"18 rows where .* has 19"):
        TrialData.open(config(path), stored)
