"""Pack the slow tests into parts of at most 20 minutes, by measured seconds, and run one.

python -m tests.slow_tier plan             list the parts
python -m tests.slow_tier run [--part N]   run a part; by default the hour chooses it
python -m tests.slow_tier measure [FILES]  run slow tests file by file and write their seconds
python -m tests.slow_tier record [XML...]  write the seconds that pytest's --junit-xml files contain
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from math import fsum
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SECONDS = Path(__file__).with_name("slow_seconds.json")
# Files too long for one part. Their tests are packed one by one.
SPLIT = ("tests/sweep/run/test_faults.py", "tests/sweep/run/test_nodes.py", "tests/test_readme.py")
MAX_PART_SECONDS = 20 * 60
# Assumed for a unit that is not measured yet, null in the file.
ASSUMED_SECONDS = 5 * 60
# After this time a part starts no further unit: this machine is slower than the one that measured.
MAX_START_SECONDS = 25 * 60


def slow_units() -> list[str]:
    """Names of all units: each file with slow tests, and each test of the files in SPLIT."""
    units = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT).as_posix()
        if not _is_marked_slow(tree):
            continue
        if name not in SPLIT:
            units.append(name)
            continue
        whole = any(_is_marked_slow(node) for node in tree.body if isinstance(node, ast.Assign))
        tests = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
        units += [f"{name}::{test.name}" for test in tests if whole or _is_marked_slow(test)]
    return units


def _is_marked_slow(node: ast.AST) -> bool:
    return any(
        isinstance(child, ast.Attribute) and ast.unparse(child) == "pytest.mark.slow" for child in ast.walk(node)
    )


def unit_of(node_id: str) -> str:
    """The unit of the test with this pytest node id."""
    return node_id.partition("[")[0] if node_id.startswith(SPLIT) else node_id.partition("::")[0]


def read_seconds() -> dict[str, float | None]:
    """Seconds by unit; None for a unit that is not measured yet."""
    return json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.exists() else {}


def packed_seconds() -> dict[str, float]:
    return {unit: ASSUMED_SECONDS if seconds is None else seconds for unit, seconds in read_seconds().items()}


def pack(seconds: dict[str, float]) -> list[list[str]]:
    """First-fit decreasing: the longest unit first, each into the first part that has room."""
    parts: list[list[str]] = []
    for unit in sorted(seconds, key=lambda unit: (-seconds[unit], unit)):
        rooms = (part for part in parts if fsum(seconds[name] for name in [*part, unit]) <= MAX_PART_SECONDS)
        part = next(rooms, None)
        if part is None:
            parts.append(part := [])
        part.append(unit)
    return [sorted(part) for part in parts]


def run_tests(target: str, xml: Path) -> bool:
    """Run the slow tests of a file or unit in a process of their own, and return whether all passed."""
    command = [sys.executable, "-m", "pytest", "-m", "slow and not gpu", f"--junit-xml={xml}", target]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def skips_in(xml: Path) -> list[str]:
    """Each test that was skipped, with its reason, in a --junit-xml file."""
    cases = ElementTree.parse(xml).iter("testcase") if xml.exists() else ()
    return [
        f"{case.attrib['classname']}::{case.attrib['name']}: {reason.attrib['message']}"
        for case in cases
        for reason in case.iter("skipped")
    ]


def run(number: int) -> int:
    """Run the units of a part one after the other, and name what failed, what was left out and what was skipped.

    Each unit has a process of its own: signal handlers, memory limits and a Ray that a fault test has killed would
    reach the next one.
    """
    parts = pack(packed_seconds())
    if not 0 <= number < len(parts):
        print(f"--part must be from 0 to {len(parts) - 1}, got {number}. `python -m tests.slow_tier plan` lists them.")
        return 2
    repeat = f"{os.path.relpath(sys.executable)} -m tests.slow_tier run --part {number}"
    print(f"part {number} of the slow tests, of {len(parts)}; to repeat it: {repeat}", flush=True)
    started_at, failed, left_out, skipped = time.monotonic(), list[str](), list[str](), list[str]()
    for unit in parts[number]:
        if time.monotonic() - started_at > MAX_START_SECONDS:
            left_out.append(unit)
            continue
        print(f"\n{unit}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            xml = Path(folder) / "junit.xml"
            failed += [] if run_tests(unit, xml) else [unit]
            skipped += skips_in(xml)
    late = f"left out after {MAX_START_SECONDS // 60} minutes"
    for title, names in (("skipped", skipped), (late, left_out), ("failed", failed)):
        print("\n  ".join([f"{title}: {len(names)}", *names]))
    return int(bool(failed))


def print_plan() -> None:
    measured, seconds = read_seconds(), packed_seconds()
    for number, part in enumerate(pack(seconds)):
        print(f"part {number}: {sum(seconds[unit] for unit in part) / 60:.1f} minutes")
        for unit in part:
            print(f"  {seconds[unit]:6.0f} s  {unit}{' (not measured)' if measured[unit] is None else ''}")


def seconds_in(xml: Path) -> dict[str, float]:
    """Seconds by unit in a --junit-xml file, which names a test by dotted file and test."""
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        file = case.attrib["classname"].replace(".", "/") + ".py"
        unit = unit_of(f"{file}::{case.attrib['name']}")
        seconds[unit] = seconds.get(unit, 0) + float(case.attrib["time"])
    return seconds


def record(files: Iterable[Path]) -> None:
    """Merge measured seconds into the file, and drop units that no longer exist."""
    seconds = read_seconds()
    for xml in files:
        seconds |= {unit: round(value, 1) for unit, value in seconds_in(xml).items()}
    present = {unit: seconds.get(unit) for unit in slow_units()}
    SECONDS.write_text(json.dumps(present, indent=2) + "\n", encoding="utf-8")


def measure(files: list[str]) -> int:
    """Run the slow tests of files, all by default, and write their seconds; return 1 if a test failed."""
    failed = False
    for file in files or sorted({unit.partition("::")[0] for unit in slow_units()}):
        with tempfile.TemporaryDirectory() as folder:
            xml = Path(folder) / "junit.xml"
            failed |= not run_tests(file, xml)
            record([xml])
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slow_tier", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("plan", help="list the parts")
    running = actions.add_parser("run", help="run one part")
    running.add_argument("--part", type=int, help="its number; by default the hour's")
    actions.add_parser("measure", help="run slow tests and write their seconds").add_argument("files", nargs="*")
    actions.add_parser("record", help="write the seconds of junit files").add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    if options.action == "plan":
        print_plan()
    elif options.action == "record":
        record(options.files)
    elif options.action == "measure":
        return measure(options.files)
    else:
        number = options.part
        return run(int(time.time()) // 3600 % len(pack(packed_seconds())) if number is None else number)
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
