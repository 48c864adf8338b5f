"""Builds the wheel, installs it in an empty environment, and runs the quickstart from it.

    python -m tests.tools.release_check [--folder FOLDER] [--tag vVERSION]

The folder, outside of the repository, gets `dist/`, the environment and the sweep. Packages come through pip, by this
machine's settings. It needs nothing of the repository installed but hatchling.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHERE = "import imbvlm, sys; print(imbvlm.__version__, imbvlm.__file__)"


def run(*command: str | Path, cwd: Path) -> str:
    """A command's output; it sees no package but those of its own environment. Raises CalledProcessError."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    return subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def build(folder: Path) -> Path:
    """The wheel, next to the source distribution."""
    run(sys.executable, "-m", "hatchling", "build", "--directory", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment with the wheel and what it requires."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    # Compiling every module of every package takes a minute of CPU, and the sweep imports a part of them.
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", wheel, cwd=folder)
    return python


def try_quickstart(python: Path, folder: Path) -> Path:
    """The folder of a small quickstart; nothing of the repository is there but the sweep's own file."""
    folder.mkdir()
    shutil.copy(ROOT / "sweeps" / "quickstart.py", folder)
    version, file = run(python, "-c", WHERE, cwd=folder).split()
    assert Path(file).is_relative_to(python.parents[1]), f"imbvlm {version} is that of {file}"
    print(run(python, "quickstart.py", "--smoke", cwd=folder))
    (sweep,) = (folder / "runs").glob("quickstart-*")
    for name in ("best.yaml", "report.html", "results.parquet"):
        assert (sweep / name).exists(), f"{sweep} has no {name}"
    run(python, "-m", "imbvlm", "export", sweep, "-o", "my-model", cwd=folder)
    return sweep


def main(arguments: list[str] | None = None) -> int:
    """Build, install and run; any failure ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a new folder; by default in /tmp")
    parser.add_argument("--tag", help="the release's tag, which must be that of the version")
    options = parser.parse_args(arguments)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if options.tag not in (None, f"v{version}"):
        parser.error(f"the tag must be v{version}, the version in pyproject.toml, got {options.tag}")
    folder = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    wheel = build(folder / "dist")
    python = install(wheel, folder / "environment")
    print(f"{wheel.name} runs the quickstart: {try_quickstart(python, folder / 'project')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
