"""Labels that are flipped on purpose, through a whole sweep over folds: found, and tails not suspected more."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from quickstart_sweep import ROOT, newest, run

from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import with_column

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1_200)]
FEW, SHARE = 20, 0.08


def test_flipped_labels_of_a_sweep_are_listed_and_few_shot_classes_not_more_than_others(
    ray_cluster: str, tmp_path: Path
) -> None:
    manifest, rng = Manifest.read("embedded:emoji_lt"), np.random.default_rng(0)
    train = manifest.rows_of("train")
    shares = np.bincount(manifest.labels[train]) / len(train)
    labels = manifest.labels.copy()
    for row in train[rng.random(len(train)) < SHARE]:
        others = shares * (np.arange(len(shares)) != labels[row])
        labels[row] = rng.choice(len(shares), p=others / others.sum())
    column = pa.array(labels, manifest.table.schema.field("label").type)
    flipped = replace(manifest, table=with_column(manifest.table, "label", column), split_counts=None)
    flipped.write(str(tmp_path / "flipped.parquet"))
    options = ("--set", "train.num_epochs=20", "--set", "num_folds=5")
    run(
        str(ROOT / "sweeps" / "emoji.py"),
        "--smoke",
        "--manifest",
        "flipped.parquet",
        *options,
        cwd=tmp_path,
        seconds=1_100,
    )
    with (newest(tmp_path) / "suspect_labels.csv").open(encoding="utf-8", newline="") as file:
        listed = np.array([int(own["row"]) for own in csv.DictReader(file)])
    assert np.isin(listed, train).all()
    is_wrong, is_listed = (labels != manifest.labels)[train], np.isin(train, listed)
    recall, flipped_share = is_listed[is_wrong].mean(), is_wrong[is_listed].mean()
    is_few = np.bincount(labels[train])[labels[train]] < FEW
    few, others = (is_listed[~is_wrong & rows] for rows in (is_few, ~is_few))
    error = np.sqrt(few.var() / len(few) + others.var() / len(others))
    print(f"found {recall:.3f}, flipped {flipped_share:.3f}, right listed {few.mean():.4f} and {others.mean():.4f}")
    assert recall > 0.4
    assert flipped_share > 3 * SHARE
    assert few.mean() < others.mean() + 2 * error
