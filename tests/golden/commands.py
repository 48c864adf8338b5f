"""Run every golden case with whichever imbvlm is imported, and write its numbers as JSON.

`python commands.py RESULT.json`, in a copy of the inputs. It uses nothing of the package but its commands and the
files that they write, so that it runs on any commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

# Metrics of time and place; everything else must be equal.
_TIMES = ("time/", "seconds", "per_second", "memory", "read_at")
_RECORD = ("trial_id", "kind", "name", "state", "stop_reason", "config", "draw")


def imbvlm(*arguments: str) -> str:
    """Run a command of the package in this process; its output. Raises RuntimeError where it fails."""
    printed, code = io.StringIO(), 0
    before, sys.argv = sys.argv, ["imbvlm", *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module("imbvlm", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    if code:
        raise RuntimeError(f"imbvlm {' '.join(arguments)} ended with {code}: {printed.getvalue()[-2000:]}")
    return printed.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def numbers(tree: Any) -> Any:
    """The tree without times, its floats written so that every bit is kept, and paths relative to this folder."""
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in sorted(tree.items()) if not any(word in key for word in _TIMES)}
    if isinstance(tree, list):
        return [numbers(value) for value in tree]
    if isinstance(tree, str):
        return tree.replace(f"{os.getcwd()}/", "")
    return tree.hex() if isinstance(tree, float) else tree


def tensors(path: Path) -> dict[str, str]:
    """A digest for each tensor of a safetensors file."""
    from safetensors.numpy import load_file

    return {name: digest(value.tobytes() + str(value.shape).encode()) for name, value in load_file(path).items()}


def trial(name: str) -> dict[str, Any]:
    """Metrics of the last epoch, and the trained weights."""
    out = Path("trained") / name
    metrics = json.loads(imbvlm("train", f"trials/{name}.yaml", "--json", "--storage", "runs", "-o", str(out)))
    weights = {file.name: tensors(file) for file in sorted(out.glob("*.safetensors"))}
    return {"metrics": numbers(metrics), "weights": weights}


def manifest() -> dict[str, Any]:
    imbvlm("manifest", "build", "--table", "images.parquet", "--class-names", "classes.txt", "-o", "manifest.parquet")
    table = pq.read_table("manifest.parquet")
    columns = {name: digest(repr(table.column(name).to_pylist()).encode()) for name in table.column_names}
    return {"columns": columns, "imbvlm": json.loads((table.schema.metadata or {}).get(b"imbvlm", b"{}"))}


def stores() -> dict[str, Any]:
    """Digests of every file of every feature store, by the store's key."""
    found = {}
    for description in sorted(Path("runs/features").rglob("store.json")):
        files = {
            str(path.relative_to(description.parent)): digest(path.read_bytes())
            for path in sorted(description.parent.rglob("*"))
            if path.is_file() and path.suffix in (".arrow", ".safetensors")
        }
        # Its encoder may be a folder of this run.
        layout = {key: value for key, value in json.loads(description.read_bytes()).items() if key != "encoder"}
        found[description.parent.name] = {"files": files, "store.json": numbers(layout)}
    return found


def sweep() -> dict[str, Any]:
    """Records of a search of 12 trials, its refits' files, and what was selected on validation."""
    imbvlm("sweep", "run", "golden-sweep.yaml", "--storage", "swept")
    folder = next(path for path in Path("swept").iterdir() if path.name.startswith("golden-"))
    os.rename(folder, "swept/golden")
    folder = Path("swept/golden")
    records = {}
    for path in sorted((folder / "trials").glob("*.json")):
        record = json.loads(path.read_bytes())
        records[path.stem] = numbers({**{key: record[key] for key in _RECORD}, "epochs": record["epochs"]})
    refits = {
        str(path.relative_to(folder)): tensors(path)
        if path.suffix == ".safetensors"
        else numbers(json.loads(path.read_bytes()))
        for path in sorted((folder / "refits").rglob("*"))
        if path.name in ("model.safetensors", "per_class.json")
    }
    selected = {name: numbers(json.loads((folder / name).read_bytes())) for name in ("post_hoc.json", "test.json")}
    return {"records": records, "refits": refits, "selected": selected}


def export() -> dict[str, Any]:
    """The exported model's tensors, and its predictions for every image."""
    imbvlm("export", "swept/golden", "-o", "exported")
    imbvlm("predict", "exported", "manifest.parquet", "--top", "6", "--no-ray", "-o", "predictions.parquet")
    table = pq.read_table("predictions.parquet")
    columns = {name: digest(repr(table.column(name).to_pylist()).encode()) for name in table.column_names}
    model = Path("exported/model")
    return {
        "weights": {path.name: tensors(path) for path in sorted(model.glob("*.safetensors"))},
        "predictions": columns,
    }


def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every case in its order: later ones read what earlier ones wrote."""
    yield "manifest", manifest
    for path in sorted(Path("trials").glob("*.yaml")):
        yield path.stem, lambda name=path.stem: trial(name)
    yield "stores", stores
    yield "sweep", sweep
    yield "export", export


def main() -> None:
    results: dict[str, Any] = {}
    for name, run in cases():
        try:
            results[name] = run()
        except Exception as error:  # noqa: BLE001 - a case that fails is a difference, and the others go on
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
