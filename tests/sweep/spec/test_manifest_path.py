"""A sweep's manifest is found from any working directory, and its path may be written in more than one way."""

from pathlib import Path
from typing import Any

import pytest
from sweep_folder import sweep_spec, write_sweep
from tiny_images import PER_CLASS, image_manifest

from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.cli import sweep_script
from imbvlm.cli.app import main
from imbvlm.cli.options import SweepOptions
from imbvlm.sweep.records.earlier_sweeps import select_fork_trials, warm_starts
from imbvlm.sweep.records.sweep_folder import read_spec
from imbvlm.sweep.report.report_writer import write_report
from imbvlm.sweep.spec.equivalence import canonical_key
from imbvlm.sweep.spec.manifest_path import locate_manifest, with_absolute_paths
from imbvlm.sweep.spec.spec_overrides import with_settings
from imbvlm.sweep.spec.sweep_spec import SweepSpec

COUNTS = [30, 12, 6, 3, 0]
DRAW = {"method": "linear_probe", "loss.name": "cross_entropy", "optim.lr": 0.1}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a manifest and a sweep as version 0.1 wrote it, and a working directory elsewhere."""
    image_manifest(tmp_path / "home" / "images")
    monkeypatch.setattr("sweep_folder.TEST_PER_CLASS", PER_CLASS)
    write_sweep(tmp_path / "home" / "runs" / "made-1", COUNTS, base=base("images/manifest.parquet"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def base(manifest: str) -> dict[str, Any]:
    return {"data": {"manifest": manifest}, "encoder": {"name": "tinylit_lite0"}, "train": {"num_epochs": 12}}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[SweepSpec]:
    """The specs of the sweeps that were run."""
    specs: list[SweepSpec] = []
    monkeypatch.setattr("imbvlm.sweep.run.run_phases.run_sweep", lambda spec, folder, console: specs.append(spec))
    return specs


def test_a_sweeps_paths_are_absolute_from_its_start_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, ran: list[SweepSpec]
) -> None:
    monkeypatch.chdir(home)
    spec = sweep_spec(base=base("images/manifest.parquet"), feature_folder="features")
    assert sweep_script.run_command(spec, SweepOptions()) == 0
    (local,) = ran
    remote = with_absolute_paths(sweep_spec(base=base("embedded:fashion_mnist_lt"), storage="s3://b/k"))
    assert local.base["data"]["manifest"] == str(home / "images" / "manifest.parquet")
    assert (local.storage, local.feature_folder) == (str(home / "runs"), str(home / "features"))
    assert remote.base["data"]["manifest"] == "embedded:fashion_mnist_lt"
    assert remote.storage == "s3://b/k"


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        (
            {"name": "local-dir:my-encoder", "quick_gelu": True},
            {"name": "local-dir:{home}/my-encoder", "quick_gelu": True},
        ),
        (
            {"name": "ViT-B-32/openai", "weights": "b32.pt", "quick_gelu": True},
            {"name": "ViT-B-32/openai", "weights": "{home}/b32.pt", "quick_gelu": True},
        ),
        ({"name": "tinylit_lite0"}, {"name": "tinylit_lite0"}),
    ],
)
def test_a_sweeps_encoder_is_found_from_any_working_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch, encoder: dict[str, Any], expected: dict[str, Any]
) -> None:
    monkeypatch.chdir(home)
    spec = with_absolute_paths(sweep_spec(base={**base("images/manifest.parquet"), "encoder": encoder}))
    texts = {key: str(value).format(home=home) for key, value in expected.items()}
    assert {key: str(value) for key, value in spec.base["encoder"].items() if value is not None} == texts


def test_encoders_of_a_space_are_found_from_any_working_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    space = {
        "parameters": {
            "encoder.name": {"choice": ["tinylit_lite0", "local-dir:mine"]},
            "loss.tau": {"uniform": [0.5, 1.5], "when": {"encoder.name": ["local-dir:mine"]}},
        }
    }
    tree = {**base("images/manifest.parquet"), "loss": {"name": "logit_adjustment"}}
    spec = with_absolute_paths(sweep_spec(base=tree, space=space, first_trials=[{"encoder.name": "local-dir:mine"}]))
    absolute = f"local-dir:{home}/mine"
    (first,) = spec.first_trials
    assert first["encoder.name"] == absolute
    parameters = spec.read_space().tree["parameters"]
    assert parameters["encoder.name"] == {"choice": ["tinylit_lite0", absolute]}
    assert parameters["loss.tau"] == {"uniform": [0.5, 1.5], "when": {"encoder.name": [absolute]}}


def test_class_texts_are_found_from_any_working_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    space = {"parameters": {"prompts.texts": {"choice": [None, "texts.json", "s3://b/texts.json"]}}}
    spec = with_absolute_paths(sweep_spec(base={**base("m.parquet"), "prompts": {"texts": "own.json"}}, space=space))
    assert spec.base["prompts"]["texts"] == f"{home}/own.json"
    choice = spec.read_space().tree["parameters"]["prompts.texts"]["choice"]
    assert choice == [None, f"{home}/texts.json", "s3://b/texts.json"]


def test_a_space_without_local_encoders_stays_the_file_that_it_is(home: Path) -> None:
    assert with_absolute_paths(sweep_spec(space="quickstart")).space == "quickstart"


def test_a_sweep_of_a_relative_path_is_gone_on_with_from_any_working_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch, ran: list[SweepSpec]
) -> None:
    folder, manifest = str(home / "runs" / "made-1"), str(home / "images" / "manifest.parquet")
    assert sweep_script.resume_command(folder) == 0
    monkeypatch.chdir(home)
    for typed in ("images/manifest.parquet", manifest):
        assert sweep_script.run_command(sweep_spec(base=base(typed)), SweepOptions(resume=folder)) == 0
    with pytest.raises(ConfigError, match=r"images/other\.parquet"):
        sweep_script.run_command(sweep_spec(base=base("images/other.parquet")), SweepOptions(resume=folder))
    assert [spec.base["data"]["manifest"] for spec in ran] == [manifest] * 3


def test_a_sweep_is_resumed_with_a_manifest_that_was_moved(home: Path, ran: list[SweepSpec]) -> None:
    folder = str(home / "runs" / "made-1")
    moved = (home / "images" / "manifest.parquet").rename(home / "moved.parquet")
    for action in (["resume", folder], ["run", f"{folder}/sweep.yaml", f"--resume={folder}"]):
        with pytest.raises(SystemExit, match="0"):
            main(["sweep", *action, "--manifest", str(moved)])
        with pytest.raises(SystemExit, match="1"):
            main(["sweep", *action, "--manifest", str(home / "gone.parquet")])
    assert [spec.base["data"]["manifest"] for spec in ran] == [str(moved)] * 2


def test_a_trial_is_the_same_however_its_manifests_path_is_written(home: Path) -> None:
    folder = str(home / "runs" / "made-1")
    relative, absolute = read_spec(folder), sweep_spec(base=base(str(home / "images" / "manifest.parquet")))
    assert canonical_key(relative.trial(DRAW)) == canonical_key(absolute.trial(DRAW))
    assert sweep_script.spec_differences(relative, with_absolute_paths(relative)) == []
    fork = select_fork_trials(folder, absolute.resolve(), [])
    # The helper's second baseline is not of this space.
    assert [record.kind for record, _ in fork.retained].count("search") == 24
    (start,) = warm_starts(with_settings(absolute, {"warm_start": [folder]}).resolve())
    assert start.other_manifest is None


def test_a_report_has_its_images_from_anywhere_or_says_why_not(home: Path, tmp_path: Path) -> None:
    folder, notes = str(home / "runs" / "made-1"), list[str]()
    page = Path(write_report(folder, str(tmp_path / "page.html"), say=notes.append)).read_text()
    assert "data:image/webp" in page
    assert notes == []
    manifest = (home / "images" / "manifest.parquet").rename(tmp_path / "images.parquet")
    page = Path(write_report(folder, str(tmp_path / "page.html"), say=notes.append)).read_text()
    assert "data:image/webp" not in page
    (note,) = notes
    assert note.startswith("Not all images of confused pairs are shown: the manifest images/manifest.parquet of the")
    assert f"is not at {home}/images/manifest.parquet or {tmp_path}/elsewhere/images/manifest.parquet. Put it" in note
    assert "Not all images of confused pairs are shown" in page
    page = Path(write_report(folder, str(tmp_path / "page.html"), str(manifest), notes.append)).read_text()
    assert "data:image/webp" in page


def test_the_place_that_the_sweeps_own_implies_comes_before_the_working_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec, folder = read_spec(str(home / "runs" / "made-1")), str(home / "runs" / "made-1")
    other = image_manifest(tmp_path / "elsewhere" / "images")
    assert locate_manifest(spec, folder) == str(home / "images" / "manifest.parquet")
    (home / "images" / "manifest.parquet").unlink()
    assert locate_manifest(spec, folder) == other
    # Nothing is implied where the storage was absolute and the manifest wasn't.
    Path(other).unlink()
    with pytest.raises(ImbvlmError, match=rf"is not at {other}\. Put it back"):
        locate_manifest(with_settings(spec, {"storage": str(home / "runs")}), folder)


@pytest.mark.parametrize(
    ("given", "match"),
    [("gone.parquet", "the manifest gone.parquet is missing"), ("gs://b/k", "gs://b/k: only local paths and s3://")],
)
def test_a_given_manifest_that_isnt_there_is_an_error_of_the_report(home: Path, given: str, match: str) -> None:
    with pytest.raises(ImbvlmError, match=match):
        write_report(str(home / "runs" / "made-1"), "report.html", given)
    assert not Path("report.html").exists()
