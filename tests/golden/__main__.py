"""Compare this code's numbers, bit by bit, with those of another commit or with recorded ones.

    python -m tests.golden compare BASE        run BASE's code from a git worktree and this code, on one machine
    python -m tests.golden compare --recorded  run this code; compare where machine and versions are the recorded ones
    python -m tests.golden record              write recorded.json anew

Exits with 1 where a number differs, and names each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("recorded.json")
_PACKAGES = ("torch", "numpy", "ray", "optuna", "open_clip_torch", "pyarrow", "pillow", "timm")
_MAX_SHOWN = 40


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    compare = actions.add_parser("compare")
    which = compare.add_mutually_exclusive_group(required=True)
    which.add_argument("base", nargs="?", help="a commit, such as HEAD~1")
    which.add_argument("--recorded", action="store_true")
    actions.add_parser("record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        work = Path(folder)
        _write_inputs(work / "inputs")
        now = _run(ROOT, work / "inputs", work / "now")
        failed = [name for name, result in now.items() if "failed" in result]
        if options.action == "record":
            if failed:
                print("not recorded, these cases failed: " + ", ".join(failed))
                return 1
            RECORDED.write_text(json.dumps({"machine": _machine(), "results": now}, indent=1, sort_keys=True) + "\n")
            print(f"{len(now)} cases recorded")
            return 0
        if options.recorded:
            recorded = json.loads(RECORDED.read_text())
            if recorded["machine"] != _machine():
                print(f"not compared: recorded on {recorded['machine']}, and this is {_machine()}")
                return 0
            before, name = recorded["results"], "the recorded numbers"
        else:
            before, name = _run_commit(options.base, work), options.base
    differences = list(_differences(before, now, ""))
    for line in differences[:_MAX_SHOWN]:
        print(line)
    more = f", {len(differences) - _MAX_SHOWN} not shown" if len(differences) > _MAX_SHOWN else ""
    print(f"{len(now)} cases, {_count(now)} numbers and digests, {len(differences)} differences from {name}{more}")
    print(f"cases that failed: {', '.join(failed)}" if failed else "every case ran")
    return 1 if differences or failed else 0


def _write_inputs(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from tests.golden.cases import write_inputs

    write_inputs(folder)


def _run_commit(base: str, work: Path) -> dict[str, Any]:
    tree = work / "base"
    subprocess.run(
        ["git", "worktree", "add", "--detach", "--force", str(tree), base], cwd=ROOT, check=True, capture_output=True
    )
    try:
        return _run(tree, work / "inputs", work / "before")
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def _run(code: Path, inputs: Path, folder: Path) -> dict[str, Any]:
    """Every case's numbers by the package in a folder of code; each side works under the same path."""
    place = folder.parent / "side"
    shutil.copytree(inputs, place)
    environment = {**os.environ, "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("commands.py")), str(folder.parent / "result.json")]
    print(f"running {code}", flush=True)
    subprocess.run(command, cwd=place, env=environment, check=True)
    place.rename(folder)
    return dict(json.loads((folder.parent / "result.json").read_text()))


def _machine() -> dict[str, str]:
    """What floating-point results depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    features = " ".join(flag for flag in flags if flag.startswith(("avx", "amx")))
    versions = {name: version(name) for name in _PACKAGES}
    return {
        "cpu": model,
        "features": features,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **versions,
    }


def _differences(before: Any, now: Any, place: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            where = f"{place}/{key}"
            if key not in before or key not in now:
                yield f"{where}: {'only before' if key in before else 'only now'}"
            else:
                yield from _differences(before[key], now[key], where)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{place}[{index}]")
    elif before != now:
        yield f"{place}: {_short(before)} before, {_short(now)} now"


def _short(value: Any) -> str:
    text = str(float.fromhex(value)) if isinstance(value, str) and "0x" in value else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _count(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(map(_count, tree.values()))
    return sum(map(_count, tree)) if isinstance(tree, list) else 1


if __name__ == "__main__":
    sys.exit(main())
