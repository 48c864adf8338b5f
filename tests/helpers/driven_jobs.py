"""Runs a sweep's jobs in this process, without Tune."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.records.trial_log import TrialKind
from imbvlm.sweep.run import sweep_run
from imbvlm.sweep.tune import in_process_trial
from imbvlm.sweep.tune.in_process_trial import InProcessTrial
from imbvlm.sweep.tune.jobs import Job, JobSource, RunContext
from imbvlm.sweep.tune.pack_members import Members
from imbvlm.sweep.tune.progress_callback import ProgressCallback
from imbvlm.sweep.tune.tune_adapters import TuneSearcher
from imbvlm.training.trial_session import TrialSettings


class DrivenTrial(InProcessTrial):
    """A process's trainable without Tune, which would give it an id."""

    trial_id = "driven"


class Driver:
    """Runs jobs in this process, one Tune trial after the other; `before_step` may raise."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.before_step: Callable[[list[str]], None] = lambda trial_ids: None

    def run_jobs(
        self,
        context: RunContext,
        source: JobSource,
        settings: Callable[[Job], TrialSettings],
        brackets: None,
        kind: TrialKind,
        total: int,
        pack_size: Callable[[TrialConfig], int],
    ) -> int:
        members = Members(f"{context.folder}/ray", settings)
        searcher, progress = (
            TuneSearcher(source, members, pack_size, {}),
            ProgressCallback(context, members, kind, total, {}),
        )
        for number in itertools.count():
            config: Any = searcher.suggest(f"tune{number}")
            if config == Searcher.FINISHED:
                return progress.num_lost
            trial: Any = SimpleNamespace(trial_id=f"tune{number}", config=config)
            self.groups.append(config["trial_ids"])
            run = DrivenTrial.__new__(DrivenTrial)
            run.setup(config)
            progress.on_trial_start(0, [], trial)
            result: Tree = {"done": False}
            while not result["done"]:
                self.before_step(config["trial_ids"])
                result = run.step()
                progress.on_trial_result(0, [], trial, result)
            run.cleanup()
        raise AssertionError


def driven(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver that runs what the phases of a sweep give to Tune."""
    driver = Driver()
    monkeypatch.setattr(sweep_run, "run_jobs", driver.run_jobs)
    monkeypatch.setattr(in_process_trial, "record_process", lambda trial_id: None)
    return driver
