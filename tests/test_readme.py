"""The README says what is there: its tree, its tables of methods and losses, and commands that run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from imbvlm.config_methods import METHOD_SECTIONS
from imbvlm.config_stages import SecondStageConfig
from imbvlm.losses import LOSSES, loss_knobs
from imbvlm.schema import tag_of, variants

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code_blocks(text: str, language: str = "bash") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    lines = "\n".join(code_blocks(text)).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_tree_names_every_file_of_the_package_and_no_other():
    tree = code_blocks(section("The tree"), "")[0]
    named = set(re.findall(r"\b[a-z0-9_]+\.py\b", tree))
    there = {path.name for path in (ROOT / "imbvlm").rglob("*.py") if not path.name.startswith("__")}
    assert named - there == set()
    assert there - named == {"build.py", "build_tower.py"}


def test_the_tables_have_every_method_loss_and_second_stage_with_its_knobs():
    rows = {
        cells[0].strip(): cells
        for cells in (
            line.strip("|").split("|") for line in section("What it does").splitlines() if re.match(r"\| `\w+`", line)
        )
    }
    names = {name.strip("`") for name in rows}
    stages = {tag_of(one)[1]: set(one.model_fields) - {"name"} for one in variants(SecondStageConfig)}
    assert names == set(METHOD_SECTIONS) | set(LOSSES) | set(stages)
    for name, knobs in stages.items():
        assert set(re.findall(r"`(\w+)`", rows[f"`{name}`"][1])) == knobs
    for name in LOSSES:
        knobs = set(re.findall(r"`(\w+)`", rows[f"`{name}`"][1]))
        assert knobs - {"prior", "reweight_from"} == set(loss_knobs(name)) - {"reweight"}


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_first_two_commands_are_what_continuous_integration_uses():
    quickstart, tests = code_blocks(README)[:2]
    assert quickstart.strip().endswith("python sweeps/quickstart.py")
    assert tests.strip().endswith("-m pytest -n 2 --dist loadgroup")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "readme_command tests" in ci
    assert "readme_command quickstart" in ci


@pytest.fixture(scope="module")
def clone(ray_cluster, tmp_path_factory) -> Path:
    """A folder like a clone, with a few photos in a folder per class."""
    from imbvlm.data.manifest import Manifest

    folder = tmp_path_factory.mktemp("clone")
    (folder / "sweeps").symlink_to(ROOT / "sweeps")
    manifest = Manifest.read("embedded:fashion_mnist_lt")
    for name, rows in (("photos", 40), ("photos", 20)):
        for label in (1, 7, 8):
            for row in [r for r in manifest.rows_of("train") if manifest.labels[r] == label][: rows // label + 5]:
                place = folder / name / manifest.class_names[label] / f"{row}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(manifest.table.column("bytes")[int(row)].as_py())
    return folder


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("title", ["Your own images", "Sweeps"])
def test_commands_run(clone, title):
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    for command in commands(section(title)):
        if "runs/quickstart-..." in command:
            newest = max((clone / "runs").glob("quickstart-*"), key=lambda path: path.stat().st_mtime)
            command = command.replace("runs/quickstart-...", f"runs/{newest.name}")
        done = subprocess.run(
            shlex.split(command), cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.ray
def test_the_python_example_runs_on_an_exported_model(clone):
    (example,) = code_blocks(section("From Python"), "python")
    photo = next((clone / "photos").rglob("*.png"))
    (clone / "photo.jpg").write_bytes(photo.read_bytes())
    done = subprocess.run([sys.executable, "-c", example], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert photo.parent.name in done.stdout
