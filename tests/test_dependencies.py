"""pyproject.toml declares what the code imports: a missing line breaks an installation, a needless one slows it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Tests and benchmarks import each other's files and folders by their names alone.
OWN = {"imbvlm", "sweeps", "tests", *(path.stem for path in (ROOT / "tests").rglob("*"))}
# Distributions that install each importable module.
DISTRIBUTIONS = metadata.packages_distributions()


def expand(requirements: list[str]) -> set[str]:
    """The distributions of requirements, those of the project's own extras in place of these."""
    names = set()
    for requirement in map(Requirement, requirements):
        if requirement.name == "imbvlm":
            names |= {name for extra in requirement.extras for name in EXTRAS[extra]}
        else:
            names.add(canonicalize_name(requirement.name))
    return names


RUNTIME = expand(PYPROJECT["project"]["dependencies"])
EXTRAS: dict[str, set[str]] = {}
for extra, requirements in PYPROJECT["project"]["optional-dependencies"].items():
    EXTRAS[extra] = expand(requirements)
OPTIONAL = {name for extra, names in EXTRAS.items() if extra not in ("test", "docs") for name in names}


class Uses:
    """The modules that the files below a folder import always or within functions, and what they name in strings."""

    def __init__(self, folder: str) -> None:
        self.always: dict[str, str] = {}
        self.within_functions: dict[str, str] = {}
        self.strings: set[str] = set()
        for path in sorted((ROOT / folder).rglob("*.py")):
            self._read(ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT)), is_inside=False)

    def _read(self, node: ast.AST, path: str, *, is_inside: bool) -> None:
        names = self.within_functions if is_inside else self.always
        for name in imported(node):
            names.setdefault(name.partition(".")[0], path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            self.strings.add(node.value)
        is_inside = is_inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            self._read(child, path, is_inside=is_inside)

    @property
    def imports(self) -> dict[str, str]:
        return {**self.within_functions, **self.always}


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield str(node.module)


@cache
def uses(folder: str) -> Uses:
    return Uses(folder)


def undeclared(imports: dict[str, str], declared: set[str]) -> dict[str, str]:
    """Imports that no declared distribution installs, each with a file that has it."""
    return {
        module: path
        for module, path in imports.items()
        if module not in OWN | set(sys.stdlib_module_names)
        if not {canonicalize_name(name) for name in DISTRIBUTIONS.get(module, [module])} & declared
    }


def provided(name: str) -> set[str]:
    """The modules, programs and pytest plugins that a distribution installs; types stand for their module."""
    modules = {module for module, names in DISTRIBUTIONS.items() if name in map(canonicalize_name, names)}
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return {name, name.replace("-", "_")}
    programs = {file.name for file in distribution.files or () if file.parent.name == "bin"}
    typed = {file.parts[0].removesuffix("-stubs") for file in distribution.files or () if "-stubs" in file.parts[0]}
    return modules | programs | typed | {entry.name for entry in distribution.entry_points if entry.group == "pytest11"}


def test_every_import_is_declared() -> None:
    # Users' sweep files need what the package needs.
    assert undeclared({**uses("imbvlm").always, **uses("sweeps").imports}, RUNTIME) == {}
    # What only some use is imported where they use it.
    assert undeclared(uses("imbvlm").within_functions, RUNTIME | OPTIONAL) == {}
    assert undeclared(uses("tests").imports, RUNTIME | EXTRAS["test"]) == {}


@pytest.mark.parametrize("name", sorted(RUNTIME))
def test_every_dependency_is_imported_by_the_package(name: str) -> None:
    assert provided(name) & uses("imbvlm").imports.keys()


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_every_package_of_an_extra_is_imported_or_looked_for(name: str) -> None:
    """Libraries import some of them for us: the code then looks whether they are there."""
    assert provided(name) & (uses("imbvlm").imports.keys() | uses("imbvlm").strings)


@pytest.mark.parametrize("name", sorted(EXTRAS["test"] - OPTIONAL))
def test_every_package_of_the_tests_is_used_by_them(name: str) -> None:
    """Imported, run, an option of pytest, or the types of a module that the checked package imports."""
    options = PYPROJECT["tool"]["pytest"]["ini_options"].keys()
    used = uses("tests").imports.keys() | uses("tests").strings | options | uses("imbvlm").imports.keys()
    assert provided(name) & used


def test_what_is_not_there_is_noticed() -> None:
    assert undeclared({"yaml": "a.py", "os": "b.py"}, {"pyyaml"}) == {}
    assert undeclared({"yaml": "a.py", "none_such": "b.py"}, {"numpy"}) == {"yaml": "a.py", "none_such": "b.py"}
    assert provided("none-such") == {"none-such", "none_such"}


def test_each_is_declared_once_and_with_a_lower_bound() -> None:
    groups = [PYPROJECT["project"]["dependencies"], *PYPROJECT["project"]["optional-dependencies"].values()]
    for requirements in (list(map(Requirement, group)) for group in groups):
        names = [canonicalize_name(requirement.name) for requirement in requirements]
        assert len(names) == len(set(names))
        assert [r.name for r in requirements if r.name != "imbvlm" and not re.search(r">=\d", str(r.specifier))] == []
    assert not RUNTIME & set().union(*EXTRAS.values())
