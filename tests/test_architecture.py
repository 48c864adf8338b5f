"""The order of folders, the place of each library, what starts without what, and names that no code compares."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from imbvlm.config.encoder_entries import ENCODERS
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import SECOND_STAGES
from imbvlm.data.sources.benchmark_registry import BENCHMARKS
from imbvlm.sweep.records.provenance import has_part
from imbvlm.sweep.spec.sampler_registry import SAMPLERS

ROOT = Path(__file__).parent.parent
# A file imports only from its own folder and from folders that stand before it.
FOLDERS = [
    "base",
    "config",
    "longtail",
    "longtail.decisions",
    "assets",
    "data.files",
    "data.images",
    "data",
    "data.sources",
    "ray_runtime",
    "models.encoders",
    "models",
    "features",
    "training.step",
    "training",
    "inference",
    "sweep.spec",
    "sweep.records",
    "sweep.plan",
    "sweep.tune",
    "sweep.report",
    "sweep.export",
    "sweep.run",
    "cli",
]
# Users' sweep files import `main` from it.
SHIMS = {"sweep.command"}
MAX_MODULES, MAX_FOLDERS = 16, 14
# Which files and folders may import a library, by its longest dotted name here.
PLACES = {
    "rich": ("base.console", "base.text_tables", "cli"),
    "ray": ("ray_runtime", "training.train_worker", "sweep.tune"),
    "ray.data": ("ray_runtime.image_pipeline",),
    "ray.train": ("training.train_worker", "sweep.tune"),
    "ray.tune": ("sweep.tune",),
    "open_clip": ("models",),
    "timm": ("models",),
    "torchvision": ("models",),
    "huggingface_hub": ("models.encoders", "sweep.export"),
    "optuna": ("sweep.tune", "sweep.report.report_statistics"),
    "jinja2": ("sweep.report.rendering",),
    "matplotlib": ("sweep.report",),
    "typer": ("cli",),
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
    """Full names of all that a file imports, inside functions and for type checking too."""
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


def folder(module: str) -> str:
    """The folder of a module, the package's own folder for its `__init__`."""
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def position(module: str) -> int:
    assert folder(module) in FOLDERS, f"{module} stands in no folder of FOLDERS"
    return FOLDERS.index(folder(module))


@cache
def imports_of(module: str) -> set[str]:
    """The package's files that a file imports."""
    return {other for imported in imports(MODULES[module]) if (other := own(imported))} - {module, ""}


OWN_MODULES = [name for name in MODULES if name]
# What stands below the package itself, or in sweep/ for users' files, imports what it likes.
ORDERED = [name for name in OWN_MODULES if folder(name) not in ("", "sweep")]


def test_every_import_is_of_a_file_that_is_there() -> None:
    missing = {(name, other) for name in OWN_MODULES for other in imports_of(name) if other not in MODULES}
    assert not missing


@pytest.mark.parametrize("module", ORDERED)
def test_a_file_imports_only_from_its_folder_and_those_before_it(module: str) -> None:
    upwards = {other for other in imports_of(module) if position(other) > position(module)}
    assert not upwards, f"{module} imports {', '.join(sorted(upwards))}, which stands after it"


def test_outside_of_the_folders_stand_the_package_and_the_shims_alone() -> None:
    others = {name for name in MODULES if name not in ORDERED}
    assert others == {"", "__main__", "sweep", *SHIMS}


def test_no_files_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter({name: imports_of(name) for name in OWN_MODULES}).prepare()


def test_no_two_modules_have_the_same_name() -> None:
    names = Counter(path.stem for name, path in MODULES.items() if name not in SHIMS and path.stem[:2] != "__")
    assert [name for name, number in names.items() if number > 1] == []


def test_folders_stay_small_enough_to_read() -> None:
    sizes = Counter(folder(name) for name, path in MODULES.items() if path.name != "__init__.py")
    assert {name: number for name, number in sizes.items() if number > MAX_MODULES} == {}
    assert len({name.split(".")[0] for name in FOLDERS}) <= MAX_FOLDERS


@pytest.mark.parametrize("module", OWN_MODULES)
def test_libraries_stay_in_their_places(module: str) -> None:
    for imported in imports(MODULES[module]):
        library = longest(imported, PLACES)
        if library is not None:
            assert longest(module, PLACES[library]), f"{module} imports {imported}"


# Names of calls that read, write, connect, start or wait. All of `storage` does so, except what only parses a location.
IO_NAMES = re.compile(
    r"(open|mkdir|unlink|touch|stat|exists|is_dir|is_file|iterdir|glob|rglob|start|acquire|urlopen|create_connection"
    r"|get_credentials|Popen|check_output|sleep|mmap|memmap|create_study|print|echo|report|_tell|fromfile|utime"
    r"|barrier|all_reduce|broadcast|(read|write|load|save|fetch|download|broadcast|ensure|resolve|delete|list)_\w+)"
)
LOCATIONS = {"join", "is_local", "local_path", "absolute", "location_problem", "is_same_disk"}
# Ray Data makes its workers by a constructor in their process.
CONSTRUCTORS_WITH_IO = {("ray_runtime.image_pipeline", "_Worker")}


def constructors(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Constructors and pydantic's validators, with the class of each."""
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for function in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
            decorators = " ".join(map(ast.unparse, function.decorator_list))
            if function.name in ("__init__", "__post_init__", "__new__") or "validator(" in decorators:
                yield cls.name, function


def calls_of(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    """What a function calls itself and by way of functions and methods of its file, which are found by their name."""
    waiting, seen = [function], {function.name}
    while waiting:
        for node in ast.walk(waiting.pop()):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            yield called
            name = called.removeprefix("self.").removeprefix("cls.")
            if name in functions and name not in seen:
                seen.add(name)
                waiting.append(functions[name])


@pytest.mark.parametrize("module", OWN_MODULES)
def test_constructors_and_validators_neither_read_nor_write_nor_wait(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for cls, function in constructors(tree):
        if (module, cls) in CONSTRUCTORS_WITH_IO:
            continue
        for called in calls_of(function, functions):
            owner, _, name = called.rpartition(".")
            is_io = name not in LOCATIONS if owner == "storage" else IO_NAMES.fullmatch(name)
            assert not is_io, f"{cls}.{function.name} of {module} calls {called}"


def names_of(*folders: str) -> list[str]:
    return [f"imbvlm.{name}" for name in ORDERED if folder(name) in folders]


@pytest.mark.parametrize(
    ("wanted", "unwanted"),
    [
        (["imbvlm"], ("ray", "torch", "pyarrow", "numpy", "pydantic", "yaml", "imbvlm.cli")),
        (["imbvlm.cli.app"], ("torch", "ray", "open_clip", "optuna", "pyarrow", "numpy", "pydantic")),
        (names_of("base", "data", "data.files", "data.images", "data.sources"), ("torch", "ray", "open_clip")),
        (names_of("config"), ("torch", "ray", "open_clip", "optuna", "pyarrow")),
        (names_of("sweep.spec"), ("torch", "ray", "optuna")),
        (
            ["imbvlm.training.trial_session"],
            ("ray", "open_clip", "torchvision", "timm", "transformers", "optuna", "pandas"),
        ),
        (names_of("inference"), ("optuna", "pandas")),
        (names_of("sweep.report"), ("matplotlib",)),
        (["imbvlm.inference.predictor"], ("ray", "optuna", "pandas")),
        (["imbvlm.inference.batch_prediction"], ("ray", "optuna", "pandas")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_starts_often_starts_without_what_it_does_not_need(wanted: list[str], unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {', '.join(wanted)}; print(*(name for name in {unwanted!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_plan_loads_neither_tune_nor_optuna(tmp_path: Path) -> None:
    """With measured trials and the JSON of the plan, so that no import of them waits inside a function."""
    arguments = ["plan", str(tmp_path / "sweep.yaml"), "--set", f"storage={tmp_path}/runs", "--json"]
    code = f"""
import sys
from imbvlm.cli.app import main
from imbvlm.sweep.spec import SweepSpec

base = {{"data": {{"manifest": "embedded:emoji_lt"}}, "encoder": {{"name": "tinylit_lite0", "image_size": 64}}}}
base |= {{"method": "linear_probe", "train": {{"num_epochs": 1}}}}
space = {{"parameters": {{"optim.lr": {{"loguniform": [0.01, 0.1]}}}}}}
SweepSpec(name="planned", base=base, space=space).to_yaml({arguments[1]!r})
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0
assert "imbvlm.sweep.plan.sweep_plan" in sys.modules
print("loaded:", [name for name in ("ray.data", "ray.tune", "optuna") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Without a network Ray warns there, too.
    assert "loaded: []" in done.stderr.splitlines()


def test_a_resume_asks_for_the_code_that_extracts_and_trains_and_for_no_other() -> None:
    """The folders of all that a sweep's workers import; what is imported of `imbvlm` itself is for users of models."""
    having, waiting = set(), ["training.trial_session", "training.train_worker", "features.extraction"]
    while waiting:
        module = waiting.pop()
        if module not in having:
            having.add(module)
            waiting += imports_of(module)
    parts = {folder(name) for name in having} - {"assets"}
    paths = {name: path.relative_to(ROOT / "imbvlm").as_posix() for name, path in MODULES.items()}
    assert {folder(name) for name in MODULES if has_part(paths[name])} == parts
    assert not has_part(paths[""])


# ------------------------------------------------------------------------------------- no comparison with a name


REGISTERED = {name for table in (LOSSES, METHODS, SECOND_STAGES, SAMPLERS, ENCODERS, BENCHMARKS) for name in table}
# Keys and attributes that hold the name of an entry.
TAGS = {"method", "name"}


def is_tag(node: ast.AST) -> bool:
    """Whether it is `x.method`, `x["method"]`, `x.get("method")` or `getattr(x, "method")`, or the same of a name."""
    match node:
        case ast.Attribute(attr=key) | ast.Subscript(slice=ast.Constant(value=key)):
            return key in TAGS
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=key), *_]):
            return key in TAGS
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=key), *_]):
            return key in TAGS
    return False


def values_of_names(tree: ast.Module) -> dict[str, list[ast.AST]]:
    """What a file assigns to each name, or loops over by it."""
    values: dict[str, list[ast.AST]] = {}

    def note(target: ast.AST, value: ast.AST | None) -> None:
        if isinstance(target, ast.Name) and value is not None:
            values.setdefault(target.id, []).append(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, own_value in zip(target.elts, value.elts, strict=False):
                note(part, own_value)

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            note(node.targets[0], node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            note(node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            note(node.target, node.iter)
    return values


def comparisons_with_names(source: str) -> list[int]:
    """Lines where the name of an entry is compared or matched with a registry's key (`kind` may be compared)."""
    tree = ast.parse(source)
    values = values_of_names(tree)

    def parts(node: ast.AST) -> Iterator[ast.AST]:
        for part in ast.walk(node):
            yield part
            if isinstance(part, ast.Name):
                yield from (inner for value in values.get(part.id, ()) for inner in ast.walk(value))

    def has_tag(node: ast.AST) -> bool:
        return any(is_tag(part) for part in parts(node))

    def has_key(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Constant) and part.value in REGISTERED for part in parts(node))

    def maps_keys(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Dict) and any(map(has_key, filter(None, part.keys))) for part in parts(node))

    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(has_tag(one) and has_key(other) for one in sides for other in sides if one is not other):
                lines.add(node.lineno)
        elif isinstance(node, ast.Subscript):
            if has_tag(node.slice) and maps_keys(node.value):
                lines.add(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_lookup = node.func.attr in ("get", "pop", "setdefault") and maps_keys(node.func.value)
            is_part = node.func.attr in ("startswith", "endswith", "__eq__") and has_tag(node.func.value)
            if (is_lookup and any(map(has_tag, node.args))) or (is_part and any(map(has_key, node.args))):
                lines.add(node.lineno)
        elif isinstance(node, ast.Match):
            for case in node.cases:
                tagged: list[ast.AST] = []
                for part in ast.walk(case.pattern):
                    if isinstance(part, ast.MatchMapping):
                        pairs = zip(part.keys, part.patterns, strict=True)
                        tagged += [own for key, own in pairs if isinstance(key, ast.Constant) and key.value in TAGS]
                    elif isinstance(part, ast.MatchClass):
                        named = zip(part.kwd_attrs, part.kwd_patterns, strict=True)
                        tagged += [own for key, own in named if key in TAGS]
                if any(map(has_key, [*tagged, *([case.pattern] if has_tag(node.subject) else [])])):
                    lines.add(case.pattern.lineno)
    return sorted(lines)


@pytest.mark.parametrize(
    "source",
    [
        'config.method == "decoder"',
        'str(record["method"]) != "zero_shot"',
        'stage.get("name") in ("disalign", "marc")',
        'METHODS = ("adapter", "lora")\nconfig.method in METHODS',
        'name = getattr(loss, "name", None)\nname == "focal"',
        'for method in ("adapter", "lora"):\n    record.config["method"] == method',
        'match config.loss.name:\n    case "focal" | "ldam":\n        pass',
        'match loss:\n    case {"name": "focal", "gamma": 0}:\n        pass',
        'match config:\n    case TrialConfig(method="lora" | "adapter"):\n        pass',
        '"focal" == config.loss.name',
        '{"focal": 2.0, "ldam": 0.5}.get(config.loss.name, 1.0)',
        'SIZES = {"lora": 4}\nSIZES[config.method]',
        'config.method.startswith("lora")',
    ],
)
def test_a_comparison_with_a_registrys_key_is_noticed(source: str) -> None:
    assert comparisons_with_names(source)


@pytest.mark.parametrize(
    "source", ['record.kind == "search"', "METHODS[config.method].reads == 'tokens'", 'path.name == "config.json"']
)
def test_other_comparisons_are_left_alone(source: str) -> None:
    assert not comparisons_with_names(source)


def test_no_code_compares_the_name_of_an_entry() -> None:
    """What is special to an entry stands in it, so that adding one changes no other place."""
    lines = {name: comparisons_with_names(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert {name: numbers for name, numbers in lines.items() if numbers} == {}


# ----------------------------------------------------------------------------------------- private names of Ray


# Parts of Ray that aren't for its users, beside all names with an underscore.
INTERNAL = re.compile(
    r"ray\.(.+\.)?(_[a-zA-Z]\w*|internal_kv)(\.|$)"
    r"|ray\.(core|experimental|air|autoscaler|dashboard|tune\.execution|train\.v2|cluster_utils|scripts)(\.|$)"
)
IN_TEXT = re.compile(r"\bray\.[\w.]*(\b_[a-z]|internal_kv|tune\.execution|train\.v2|autoscaler\.)")


def names_of_ray(tree: ast.Module) -> dict[str, str]:
    """Names by which a file imports Ray and its parts, with their paths in Ray."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: path for name, path in names.items() if path.split(".")[0] == "ray"}


def private_names_of_ray(source: str) -> list[str]:
    """Private names of Ray that a file uses, and globals of Ray that it overwrites."""
    tree = ast.parse(source)
    names, private = names_of_ray(tree), []
    if not names and "ray." not in source:
        return []
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }

    def path_of(node: ast.AST) -> str:
        match node:
            case ast.Name(id=name):
                return names.get(name, name)
            case ast.Attribute(value=value, attr=attribute):
                return f"{path_of(value)}.{attribute}"
        return "()"

    ours = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    ours |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and path_of(node.value) == "self"}

    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                private += [alias.name for alias in aliases if INTERNAL.match(alias.name)]
            case ast.ImportFrom(module=module, names=aliases):
                private += [path for alias in aliases if INTERNAL.match(path := f"{module}.{alias.name}")]
            case ast.Attribute(attr=attribute):
                path = path_of(node)
                of_an_object = names and attribute[0] == "_" and attribute[:2] != "__" and attribute not in ours
                if INTERNAL.match(path) or of_an_object:
                    private.append(path)
                if isinstance(node.ctx, ast.Store | ast.Del) and path.startswith("ray."):
                    private.append(f"{path} =")
            case ast.Constant(value=str(text)) if id(node) not in docstrings and IN_TEXT.search(text):
                private.append(text)
            case ast.Call(func=function, args=arguments, keywords=keywords):
                private += [f"{key.arg}=" for key in keywords if (key.arg or "").startswith("_")]
                if path_of(function).split(".")[-1] in ("getattr", "setattr", "delattr", "attrgetter", "methodcaller"):
                    texts = [part.value for part in arguments if isinstance(part, ast.Constant)]
                    private += [text for text in texts if isinstance(text, str) and re.search(r"(^|\.)_[a-z]", text)]
                    if path_of(function) in ("setattr", "delattr") and path_of(arguments[0]).startswith("ray."):
                        private.append(f"{path_of(arguments[0])} =")
    return private


@pytest.mark.parametrize(
    "source",
    [
        "from ray._private import services",
        "from ray.experimental import internal_kv",
        "def f():\n    import ray.core.generated.gcs_pb2",
        "from ray.autoscaler import _private",
        "from ray.tune.execution import class_cache",
        "import ray\nray._private.worker.global_worker",
        "import ray as r\nr._private.worker.global_worker",
        "from ray import tune\ntune.execution.class_cache.DEFAULT_ENV_VARS",
        "from ray import tune\ndef f(controller):\n    controller._actor_manager.clear()",
        "from ray import tune\nclass A(tune.Callback):\n    def f(self):\n        super()._save()",
        "import ray\ngetattr(ray, '_private')",
        "from operator import attrgetter\nimport ray\nattrgetter('tune._x')(ray)",
        "import importlib\nimportlib.import_module('ray._private.services')",
        "import importlib\nimportlib.import_module(f'ray.tune.execution.{name}')",
        "import ray\nray.init(_temp_dir='/tmp')",
        "from ray import tune\ntune.Callback = None",
        "from ray import tune\nsetattr(tune, 'Callback', None)",
    ],
)
def test_a_private_name_of_ray_is_noticed(source: str) -> None:
    assert private_names_of_ray(source)


@pytest.mark.parametrize(
    "source",
    [
        "import ray\nclass A:\n    def f(self):\n        self._x = ray.nodes()",
        "import ray\nray.init(address='auto').dashboard_url",
        "from ray.util.state import get_worker\nget_worker.__name__",
        "import torch\ntorch._dynamo.reset()",
    ],
)
def test_public_names_and_other_libraries_are_left_alone(source: str) -> None:
    assert not private_names_of_ray(source)


def test_private_names_of_ray_stand_in_one_module() -> None:
    """Each has a fallback there and a test, so that another version of Ray is one file's affair."""
    names = {name: private_names_of_ray(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert names.pop("ray_runtime.ray_private")
    assert {name: private for name, private in names.items() if private} == {}
