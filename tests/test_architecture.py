"""The arrows between files go one way, Ray stays at the edge, and a trial's process starts without what it needn't."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from imbvlm.sweep.provenance import has_part

ROOT = Path(__file__).parent.parent
# A file imports only from its own line and those above. Folders stand as one, but for the files named on lines of their
# own: what a trial reads of stored features knows towers by their description alone, so that it stands above models/.
LAYERS = [
    *("interrupts", "errors", "csv_cells", "yaml_file", "s3", "outages", "storage", "schema"),
    *("config_losses", "config_methods", "config_mixing", "config_prompts", "config_stages", "config_tower", "config"),
    *("class_stats", "losses", "sampling", "metrics", "posthoc"),
    *("assets", "data", "assets.build_tower", "assets.build"),
    *("models.encoder_info", "features.local_copy", "features.store", "features.examples", "models", "features"),
    *("training", "inference", "onnx_graph", "prediction_table", "sweep", "cluster_file", "doctor", "cli", "__main__"),
]
# Which files may import a library, by its longest dotted name here.
EDGES = {
    "ray": ("data.pipeline", "data.attempts", "data.cluster", "training.ray_worker", "sweep.engine", "cluster_file"),
    "ray.data": ("data.pipeline",),
    "ray.train": ("training.ray_worker", "sweep.engine"),
    "ray.tune": ("sweep.engine",),
    "open_clip": ("models", "assets.build_tower"),
    "timm": ("models", "assets.build_tower"),
    "torchvision": ("models",),
    "sweeps": (),
    "tests": (),
}


def modules() -> dict[str, Path]:
    """Names below imbvlm; a package by its folder's."""
    found = {}
    for path in sorted((ROOT / "imbvlm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "imbvlm").with_suffix("").parts)
        found[name.removesuffix(".__init__").removesuffix("__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, inside functions too; relative imports as they are written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """The file of ours that an import means."""
    if name.split(".")[0] != "imbvlm":
        return None
    inside = name.removeprefix("imbvlm").removeprefix(".")
    return inside if inside in MODULES else inside.rpartition(".")[0]


def longest(name: str, prefixes: Iterable[str]) -> str | None:
    return max((one for one in prefixes if name == one or name.startswith(f"{one}.")), key=len, default=None)


def layer(module: str) -> int:
    found = longest(module, LAYERS)
    assert found is not None, f"imbvlm/{module.replace('.', '/')}.py stands in no layer: put it into LAYERS"
    return LAYERS.index(found)


GRAPH = {
    name: {other for imported in imports(path) if (other := own(imported))} - {name, ""}
    for name, path in MODULES.items()
    if name
}


def test_every_import_is_of_a_file_that_is_there() -> None:
    missing = {(name, other) for name, others in GRAPH.items() for other in others if other not in MODULES}
    assert not missing


@pytest.mark.parametrize("module", GRAPH)
def test_a_file_imports_only_what_stands_above_it(module: str) -> None:
    upwards = {other for other in GRAPH[module] if layer(other) > layer(module)}
    assert not upwards, f"{module} imports {', '.join(sorted(upwards))}, which stands below it"


def test_no_files_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize("module", GRAPH)
def test_libraries_stay_in_their_places(module: str) -> None:
    for imported in imports(MODULES[module]):
        library = longest(imported, EDGES)
        if library is not None:
            assert longest(module, EDGES[library]), f"{module} imports {imported}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("imbvlm.training.session", ("ray", "open_clip", "torchvision", "timm", "transformers", "optuna", "pandas")),
        ("imbvlm.inference", ("ray", "optuna", "pandas")),
        ("imbvlm.prediction_table", ("ray", "optuna", "pandas")),
        ("imbvlm", ("ray", "torch", "pyarrow", "numpy", "pydantic")),
        ("imbvlm.config", ("torch", "ray", "open_clip", "optuna", "pyarrow")),
        ("imbvlm.cli", ("torch", "ray", "open_clip", "optuna")),
    ],
)
def test_what_starts_often_starts_without_what_it_does_not_need(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(name for name in {unwanted!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_resume_asks_for_the_code_that_extracts_and_trains_and_for_no_other() -> None:
    """What a sweep's workers import, by whichever way; what is imported of `imbvlm` itself is for users of models."""
    having, waiting = set(), ["training.session", "training.ray_worker", "features.extract"]
    while waiting:
        module = waiting.pop()
        if module not in having:
            having.add(module)
            waiting += GRAPH[module]
    paths = {name: path.relative_to(ROOT / "imbvlm").as_posix() for name, path in MODULES.items()}
    assert {path for path in paths.values() if has_part(path)} == {paths[name] for name in having - {"assets"}}
