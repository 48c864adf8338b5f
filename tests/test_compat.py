"""Files of version 0.1 (compat/v0.1.tar.xz, made by compat/make.py) are read, exported and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from golden.commands import imbvlm

from imbvlm.base.errors import ConfigError
from imbvlm.sweep.records.earlier_sweeps import update_spec
from imbvlm.sweep.spec.spec_checks import check_spec

SAMPLE = Path(__file__).parent / "compat" / "v0.1.tar.xz"


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sample, in which a command runs as its user's did."""
    with tarfile.open(SAMPLE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sweeps_are_listed_and_shown(sample: Path) -> None:
    assert len(json.loads(imbvlm("sweep", "list", "runs", "--json"))) == 2
    for name in ("limited", "tail-views"):
        shown = imbvlm("sweep", "show", f"runs/{name}")
        assert "linear probe" in shown
        assert "t00001" in shown


@pytest.mark.parametrize("name", ["limited", "tail-views"])
def test_a_sweep_is_reported_with_its_thumbnails(sample: Path, name: str) -> None:
    imbvlm("report", f"runs/{name}", "-o", "page.html")
    page = (sample / "page.html").read_text()
    assert "linear probe" in page
    assert "data:image/" in page


@pytest.mark.parametrize("name", ["limited", "tail-views"])
def test_a_sweep_is_exported_and_predicts(sample: Path, name: str) -> None:
    imbvlm("export", f"runs/{name}", "-o", "again")
    imbvlm("predict", "again", "manifest.parquet", "--top", "5", "--no-ray", "-o", "again.parquet")
    assert pq.read_table("again.parquet").num_rows == pq.read_table("manifest.parquet").num_rows


def test_an_exported_model_predicts_as_its_sweep_is_exported_now(sample: Path) -> None:
    imbvlm("export", "runs/limited", "-o", "again")
    for model in ("exported", "again"):
        imbvlm("predict", model, "manifest.parquet", "--top", "5", "--no-ray", "-o", f"{model}.parquet")
    assert pq.read_table("exported.parquet").equals(pq.read_table("again.parquet"))


def test_an_export_over_an_exported_model_replaces_it(sample: Path) -> None:
    files = {path for path in (sample / "exported").rglob("*") if path.is_file()}
    imbvlm("export", "runs/limited", "-o", "exported")
    assert {path for path in (sample / "exported").rglob("*") if path.is_file()} == {
        *files,
        sample / "exported" / "export.json",
        # Trials of 0.1 kept their validation logits, by which predictions are accepted.
        sample / "exported" / "model" / "calibration.json",
        sample / "exported" / "model" / "calibration.safetensors",
    }


def test_stored_features_and_the_manifest_are_sound(sample: Path) -> None:
    assert "runs/features" in imbvlm("features", "check", "runs/features")
    imbvlm("manifest", "check", "manifest.parquet", "--decode")


OLD_SCRIPT = """
from imbvlm.sweep.command import main
from imbvlm.sweep.spec import SweepSpec

spec = SweepSpec.from_yaml("runs/limited/sweep.yaml")
if __name__ == "__main__":
    main(spec)
"""


@pytest.mark.parametrize("main", ["imbvlm.sweep.command import main", "imbvlm import run_script as main"])
def test_a_sweeps_file_runs(sample: Path, main: str) -> None:
    Path("limited.py").write_text(OLD_SCRIPT.replace("imbvlm.sweep.command import main", main))
    command = [sys.executable, "limited.py", "--dry-run", "--measure", "no", "--manifest", "manifest.parquet"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "dry run: nothing was started or written" in ended.stdout


def test_a_sweep_with_views_of_few_shot_classes_is_shown_and_not_resumed(sample: Path) -> None:
    assert "1, few 2" in imbvlm("sweep", "show", "runs/tail-views")
    command = [sys.executable, "-m", "imbvlm", "sweep", "resume", "runs/tail-views"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 1
    assert "features.tail_views is no longer an option" in ended.stderr


def test_a_sweeps_model_can_be_trained_again_on_other_data(sample: Path) -> None:
    sweep = check_spec(update_spec("runs/limited", "manifest.parquet"))
    assert sweep.num_trials == 1, "0.1 delivered its best trial"
    assert (sweep.spec.select_by, sweep.spec.num_folds) == ("objective", 1), "by the rules of 0.1"
    with pytest.raises(ConfigError, match=r"features\.tail_views is no longer an option"):
        check_spec(update_spec("runs/tail-views", "manifest.parquet"))


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_sweep_goes_on_with_its_features_and_trials(sample: Path, ray_cluster: str) -> None:
    recorded = json.loads(Path("runs/limited/provenance.json").read_bytes())["torch"]
    if recorded != torch.__version__:
        pytest.skip(f"the sample was made with torch {recorded}, and this is {torch.__version__}")
    before = {path.name: path.read_bytes() for path in Path("runs/limited/trials").glob("t*.json")}
    stores = {path: path.read_bytes() for path in Path("runs/features").rglob("*.arrow")}
    command = [sys.executable, "-m", "imbvlm", "sweep", "resume", "runs/limited", "--set", "max_trials=5"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    after = {path.name: path.read_bytes() for path in Path("runs/limited/trials").glob("t*.json")}
    assert len(before) == 3
    assert len(after) == 5
    assert {name: after[name] for name in before} == before
    assert {path: path.read_bytes() for path in stores} == stores
