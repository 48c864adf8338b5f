"""On another device than the CPU trials of every kind give the same numbers: nothing is left where it was made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "helpers"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_run_on_another_device(tmp_path: Path) -> None:
    """In a process of their own, all of which knows that device."""
    command = [sys.executable, HERE / "device_cases.py", tmp_path]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(run.stdout.splitlines()[-1])
    failed = {name: there for name, (_, there) in found.items() if isinstance(there, str)}
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
    assert len(found) >= 60
    for name, (here, there) in found.items():
        assert there == pytest.approx(here, rel=1e-4, abs=1e-4), name
