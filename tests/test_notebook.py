"""The notebook runs from top to bottom as a reader runs it, and shows no path of the machine that wrote it."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from documented_plugins import documented
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def test_the_notebook_has_its_pictures_and_no_path_of_a_machine() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert [output for output in outputs if output.output_type == "error"] == []
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work)/[^\s\"]*", NOTEBOOK.read_text(encoding="utf-8")) == []
    assert documented("losses.py").strip() in "\n".join(cell.source for cell in cells)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_spec("ipykernel") is not None, "the notebook's kernel"
    (tmp_path / "sweeps").symlink_to(ROOT / "sweeps")
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    assert (tmp_path / "my-model" / "model" / "config.json").exists()
