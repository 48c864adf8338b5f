"""The quickstart's sweep as a process: run it, find its folder and read its trials."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "sweeps" / "quickstart.py")


def run(*arguments: str, cwd: Path, code: int = 0, seconds: int = 300) -> str:
    """Run a command to its end; its output, standard error behind it."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def imbvlm(*arguments: str, cwd: Path, code: int = 0) -> str:
    return run("-m", "imbvlm", *arguments, cwd=cwd, code=code)


def newest(folder: Path) -> Path:
    return max(
        (path for path in (folder / "runs").iterdir() if (path / "sweep.yaml").exists()),
        key=lambda path: path.stat().st_mtime,
    )


def trials(sweep: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (sweep / "trials").glob("*.json")}
