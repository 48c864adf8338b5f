"""`imbvlm train`: one configuration on this machine, on data that it could be judged by."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_images import TinyImages, encoded_image

from imbvlm.base.errors import ConfigError
from imbvlm.cli.train_command import train_one
from imbvlm.data.manifest import Manifest


@pytest.mark.parametrize(
    ("counts", "says"),
    [([40, 0], "training images are of 1 class, and two or more"), ([4, 4], "no class has a validation image")],
)
def test_data_that_a_sweep_would_refuse_is_refused_before_anything_is_made(
    tmp_path: Path, counts: list[int], says: str
) -> None:
    problem = TinyImages(tmp_path)
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    images = [encoded_image(int(label), row) for row, label in enumerate(labels)]
    table = pa.table({"bytes": images, "label": labels, "split": ["train"] * len(labels)})
    path = tmp_path / "own.parquet"
    Manifest.build(table, ["cat", "dog"], "own").write(str(path))
    config = problem.config("linear_probe", data__manifest=str(path))
    with pytest.raises(ConfigError, match=says) as error:
        train_one(config, str(tmp_path / "runs"), None)
    assert error.value.problems[0].where == str(path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(60)
def test_a_cluster_that_nobody_named_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own file says where a cluster listens that somebody has started on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{cluster.getsockname()[1]}")
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        config = TinyImages(tmp_path).config("linear_probe", train__num_epochs=1)
        metrics, notes = train_one(config, str(tmp_path / "runs"), None, quiet=True)
        assert "val/balanced_accuracy" in metrics
        assert notes == []
        cluster.settimeout(0)
        with pytest.raises(BlockingIOError):
            cluster.accept()
