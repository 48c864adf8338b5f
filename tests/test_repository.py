"""What contributors are told is true: commands, formats, versions, and no address of the project in a file."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

from imbvlm.base.version import __version__
from imbvlm.features import store_layout
from imbvlm.inference.model_record import BLEND_FORMAT, SINGLE_FORMAT
from imbvlm.sweep.export import export_folder
from imbvlm.training import checkpoint, per_class_results

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
TEXTS = [
    path
    for pattern in ("*.md", "*.cff", "*.yml", "pyproject.toml", "docs/**/*.md", "docs/**/*.html", ".github/**/*.*ml")
    for path in ROOT.glob(pattern)
]


def commands_of(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_one_version_stands_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == citation["version"] == __version__
    assert project["license"] == citation["license"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_changelog_names_the_formats_that_are_written() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for file, cell in {
        "exported model, `model/config.json`": f"{SINGLE_FORMAT} for one model",
        "exported blend, `model/config.json`": str(BLEND_FORMAT),
        "list of an export, `export.json`": str(export_folder.FORMAT),
        "feature store of images, `store.json`, `*.index`, `known-files/`, `splits/`": str(store_layout.FORMAT_VERSION),
        "checkpoint, `state.json`": str(checkpoint.FORMAT),
        "results of a refit by class, `per_class.json`": str(per_class_results.FORMAT),
    }.items():
        assert f"| {file} | {cell} |" in text


def test_the_set_up_is_that_of_the_readmes_tests() -> None:
    (set_up,) = re.findall(r"```bash\n(python3 .*)\n```", CONTRIBUTING)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for part in set_up.split(" && "):
        assert part in readme


@pytest.mark.parametrize("path", [ROOT / "CONTRIBUTING.md", *WORKFLOWS], ids=lambda path: path.name)
def test_commands_name_modules_and_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(commands_of(path))
    assert [name for name in re.findall(r"python -m ([\w.]+)", text) if find_spec(name) is None] == []
    paths = re.findall(r"(?<![\w/])((?:tests|imbvlm|docs)/[\w./-]+\w|\.ci/run)", text)
    assert [name for name in paths if not (ROOT / name).exists()] == []


def test_the_hooks_before_a_commit_are_the_checks_of_the_tests() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    assert entries == ["python -m ruff check", "python -m ruff format --check", "python -m mypy"]
    style = (ROOT / "tests" / "test_style.py").read_text(encoding="utf-8")
    for entry in entries:
        assert str(tuple(entry.split()[2:])).replace("'", '"') in style


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_write_only_what_its_publishing_job_needs(path: Path) -> None:
    workflow: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "permissions" not in job or name == "publish"
        assert [step["uses"] for step in job["steps"] if "uses" in step and "@" not in step["uses"]] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_names_an_address_of_the_project(path: Path) -> None:
    """One would be wrong in every fork; IMBVLM_REPOSITORY and IMBVLM_SITE have them."""
    assert (
        re.findall(r"(?:github|gitlab)\.\w+/[\w-]+/imbvlm|imbvlm\.\w+\.(?:io|org)", path.read_text(encoding="utf-8"))
        == []
    )


def test_the_packages_addresses_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def urls() -> dict[str, str]:
        return ProjectMetadata(str(ROOT), PluginManager()).core.urls

    monkeypatch.delenv("IMBVLM_REPOSITORY", raising=False)
    monkeypatch.setenv("IMBVLM_SITE", "https://example.org/site")
    assert urls() == {"Documentation": "https://example.org/site"}
    monkeypatch.setenv("IMBVLM_REPOSITORY", "https://example.org/code")
    assert set(urls()) == {"Documentation", "Repository"}
