"""Runs the tests with the lowest and with the newest versions that pyproject.toml admits.

    python -m tests.tools.version_matrix [--folder FOLDER] lowest|newest|both [ARGUMENTS FOR PYTEST]

Each gets an environment in FOLDER, outside of the repository, which a later run brings up to date. The lowest one
takes the lower bound of every requirement of the package and of its tests, so each bound must be a version that exists.
Other packages are the newest that fit. Packages come through pip, by this machine's settings. Types are checked with
the newest versions alone, since older ones of numpy and safetensors declare fewer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGE, EXTRA = "imbvlm", "test"
TYPE_CHECK = "tests/test_style.py::test_nothing_to_complain_about[mypy]"
SHOWN = ("torch", "ray", "optuna", "pyarrow", "numpy", "pydantic")


def requirements(extra: str | None = None) -> Iterator[Requirement]:
    """The requirements of the package, or of an extra and of those that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PACKAGE:
            for inner in sorted(requirement.extras):
                yield from requirements(inner)
        else:
            yield requirement


def lower_bounds() -> list[str]:
    """Constraints for pip by which each requirement has its lower bound."""
    bounds = []
    for requirement in (*requirements(), *requirements(EXTRA)):
        lowest = [part.version for part in requirement.specifier if part.operator == ">="]
        assert len(lowest) == 1, f"{requirement} has no lower bound"
        bounds.append(f"{requirement.name}=={lowest[0]}")
    return bounds


def environment(which: str, folder: Path) -> Path:
    """The interpreter of an environment with the lowest or the newest versions."""
    python = folder / which / "bin" / "python"
    if not python.exists():
        venv.create(folder / which, with_pip=True)
    constraints = folder / f"{which}.txt"
    constraints.write_text("".join(f"{line}\n" for line in (lower_bounds() if which == "lowest" else ())))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([*pip, "--constraint", str(constraints), "--editable", f"{ROOT}[{EXTRA}]"], check=True)
    return python


def versions(python: Path) -> str:
    code = f"from importlib.metadata import version\nprint(*(f'{{n}} {{version(n)}}' for n in {SHOWN}), sep=', ')"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Make the environments, run the tests in each, and return the first exit code that is not zero."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("lowest", "newest", "both"), help="the versions to take")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "imbvlm-versions")
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments for pytest")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    codes = []
    for which in ("lowest", "newest") if options.which == "both" else (options.which,):
        python = environment(which, options.folder)
        print(f"{which}: {versions(python)}", flush=True)
        left_out = ["--deselect", TYPE_CHECK] if which == "lowest" else []
        command = [str(python), "-m", "pytest", *left_out, *options.pytest]
        codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main())
