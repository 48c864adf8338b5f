"""A sweep of six known configurations that takes seconds, and what fault tests ask of it afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from apart import Apart

from imbvlm.data.manifest import Manifest
from imbvlm.sweep.spec.sweep_spec import SweepSpec

ROOT = Path(__file__).parents[2]
LOSSES = ("cross_entropy", "focal", "balanced_softmax")
NUM_TRIALS = 6
ROWS = {"train": 240, "val": 100, "test": 100}


def write_manifest(path: Path) -> None:
    """A few hundred images of the embedded data, evenly over each split, so that the tail stays."""
    whole = Manifest.read("embedded:fashion_mnist_lt")
    rows = [whole.rows_of(split)[:: len(whole.rows_of(split)) // number] for split, number in ROWS.items()]
    whole.take(np.sort(np.concatenate(rows))).write(str(path))


def sweep_spec(manifest: Path, storage: str, **fields: Any) -> SweepSpec:
    """All of its configurations are tried, so that any undisturbed run ends with the same trials and numbers."""
    return SweepSpec.from_tree(
        {
            "name": "faults",
            "base": {
                "data": {"manifest": str(manifest)},
                "encoder": {"name": "tinylit_lite0", "image_size": 64},
                "method": "linear_probe",
                "train": {"num_epochs": 4, "batch_size": 32},
                "eval": {"resize": 1.0},
            },
            "space": {"parameters": {"loss.name": {"choice": list(LOSSES)}, "optim.lr": {"choice": [0.05, 0.5]}}},
            "num_trials": NUM_TRIALS,
            "searcher": {"name": "random"},
            "trial_scheduler": {"name": "none"},
            "max_concurrent_trials": 1,
            "refit_seeds": [0],
            "confirm_folds": None,
            "storage": storage,
            **fields,
        }
    )


class Sweep:
    """A sweep in a process of its own, its spec in `folder`; all that is asked is read from its files.

    It may run in a place apart, `there`, which sees the same folder with mounts of its own on it.
    """

    def __init__(
        self, folder: Path, manifest: Path, storage: str = "runs", there: Apart | None = None, **fields: Any
    ) -> None:
        self.folder, self.storage, self.manifest, self.fields = folder, storage, manifest, fields
        self.there = there
        folder.mkdir(parents=True, exist_ok=True)
        self.change()
        self.process: subprocess.Popen[str] | None = None

    def spec(self, **fields: Any) -> SweepSpec:
        """What it runs, with other fields."""
        copies = {"folder": str(self.folder.absolute() / "copies")}
        return sweep_spec(self.manifest, self.storage, **{"feature_copies": copies, **self.fields, **fields})

    def started(self) -> bool:
        return bool(self._paths())

    def change(self, **fields: Any) -> None:
        """Write the spec, with other fields."""
        self.fields |= fields
        self.spec().to_yaml(self.folder / "spec.yaml")

    def start(self, *arguments: str, environment: dict[str, str] | None = None) -> Sweep:
        """Start it, or go on with it; returns at once."""
        return self.begin("sweep", "run", "spec.yaml", *arguments, environment=environment)

    def begin(self, *arguments: str, environment: dict[str, str] | None = None) -> Sweep:
        """Start a command of ours. CI is unset, since with it progress is printed only every five minutes."""
        command = [sys.executable, "-m", "imbvlm", *arguments]
        self.process = subprocess.Popen(
            command if self.there is None else self.there.command(*command, folder=self.folder),
            cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "CI": "", **(environment or {})},
        )  # fmt: skip
        return self

    def end(self, code: int = 0, seconds: float = 600) -> str:
        """Wait for its end; what it printed."""
        assert self.process is not None
        try:
            printed, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"it didn't end:\n{self.process.communicate()[0]}\n{self.log()}") from None
        assert self.process.returncode == code, f"{printed}\n{self.log()}"
        return printed

    def stop(self) -> None:
        """End it where a test has left it running."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def run(self, *arguments: str, code: int = 0, **more: Any) -> str:
        return self.start(*arguments, **more).end(code)

    def log(self) -> str:
        """The end of what the libraries said."""
        path = self.path / "ray.log" if self._paths() else None
        return path.read_text()[-6000:] if path is not None and path.exists() else ""

    def _paths(self) -> list[Path]:
        runs = self.folder / self.storage
        return sorted((runs if self.there is None else self.there.path(runs)).glob("faults-*"))

    @property
    def path(self) -> Path:
        """The sweep's own folder, the newest."""
        return self._paths()[-1]

    def records(self, kind: str = "search") -> dict[str, dict]:
        """Records by trial id; each file is whole or not there."""
        if not self._paths():
            return {}
        records = {path.stem: json.loads(path.read_text()) for path in (self.path / "trials").glob("*.json")}
        return {key: records[key] for key in sorted(records) if records[key]["kind"] == kind}

    def wait_for(self, happened: Callable[[], object], seconds: float = 480) -> None:
        """Wait until something is so, while the sweep runs."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"it didn't come to that:\n{self.process.communicate()[0]}\n{self.log()}")
            time.sleep(0.05)

    def num_ended(self) -> int:
        return sum(record["state"] != "running" for record in self.records().values())

    def finished(self) -> dict[str, dict]:
        """Records of the search's finished trials."""
        return {key: record for key, record in self.records().items() if record["state"] == "finished"}

    def outcome(self) -> dict[str, list]:
        """Configurations that finished, each with its validation numbers per epoch: the same whatever happened."""
        epochs: dict[str, list] = {}
        for record in self.finished().values():
            key = json.dumps(record["draw"], sort_keys=True)
            assert key not in epochs, f"{key} was trained twice"
            epochs[key] = [
                (epoch["epoch"], epoch["train/loss"], epoch["val/balanced_accuracy"]) for epoch in record["epochs"]
            ]
        return epochs

    def best(self) -> str:
        """The configuration in best.yaml."""
        return (self.path / "best.yaml").read_text()


def undisturbed(folder: Path, manifest: Path) -> Sweep:
    """A sweep that has run on this machine alone."""
    sweep = Sweep(folder, manifest)
    sweep.run(environment={"RAY_ADDRESS": "local"})
    assert len(sweep.outcome()) == NUM_TRIALS
    return sweep


def assert_same_trials(sweep: Sweep, quiet: Sweep) -> None:
    """As undisturbed: the same trials with the same numbers, none twice."""
    assert sweep.outcome() == quiet.outcome()
    assert len(sweep.records()) == NUM_TRIALS


def assert_same_states(sweep: Sweep, quiet: Sweep, kind: str) -> None:
    """As undisturbed: the same configurations in the same states. A trial's number may be another's."""
    ours, theirs = (
        sorted(
            (json.dumps(record["config"], sort_keys=True), record["state"]) for record in each.records(kind).values()
        )
        for each in (sweep, quiet)
    )
    assert ours == theirs


def runs(pid: int) -> bool:
    """Whether a process is there; one that has ended and that nobody has waited for yet isn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(pid: int, seconds: float = 60) -> None:
    """Until a process has ended."""
    deadline = time.monotonic() + seconds
    while runs(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.1)


def kill(pids: Iterable[int]) -> int:
    """End those that run, without a word; how many there were."""
    running = [pid for pid in pids if runs(pid)]
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    for pid in running:
        wait_gone(pid)
    return len(running)
