"""The end of a sweep: what a signal there leaves."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest
from sweep_folder import write_sweep

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.cli.sweep_listing import show_text
from imbvlm.data.manifest import Manifest
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.sweep_folder import UNFINISHED_FILE, SweepState, read_spec
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.run import conclude_phase
from imbvlm.sweep.run.sweep_run import SweepRun
from imbvlm.sweep.tune.jobs import RunContext


def interrupt(source: ReportData) -> NoReturn:
    raise KeyboardInterrupt


def made_run(folder: str) -> SweepRun:
    spec, log, console = read_spec(folder), TrialLog.read(folder), Console(io.StringIO())
    sweep, budget = spec.resolve(), Budget.open(spec, folder, 0.0)
    context = RunContext(sweep, folder, log, console, 1, budget, 5)
    manifest = Manifest.read("embedded:fashion_mnist_lt")
    return SweepRun(sweep, manifest, folder, log, console, budget, context, (), frozenset(), {}, 1)


def test_a_sweep_that_a_signal_ends_during_its_report_is_unfinished_until_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(write_sweep(tmp_path / "made", [500, 120, 60, 20, 8]))
    (tmp_path / "made" / UNFINISHED_FILE).write_text("")
    run = made_run(folder)
    with monkeypatch.context() as patch:
        patch.setattr(conclude_phase, "write_report_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            conclude_phase.conclude(run, 1.0)
    assert f"unfinished; go on with: imbvlm sweep resume {folder}" in show_text(SweepState.read(folder))
    conclude_phase.conclude(run, 1.0)
    assert (tmp_path / "made" / "report.html").exists()
    assert "unfinished" not in show_text(SweepState.read(folder))


def test_the_end_reads_each_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(write_sweep(tmp_path / "made", [500, 120, 60, 20, 8]))
    run, read, read_bytes = made_run(folder), Counter[str](), storage.read_bytes

    def counted(uri: str, max_bytes: int | None = None) -> bytes:
        read[uri.removeprefix(folder).split("/")[1]] += 1
        return read_bytes(uri, max_bytes)

    monkeypatch.setattr(storage, "read_bytes", counted)
    conclude_phase.conclude(run, 1.0)
    assert read["trials"] == len(run.log.records)
    assert read["refits"] == len(run.log.of("refit"))
