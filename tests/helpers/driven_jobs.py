"""Runs a sweep's jobs in this process, without Tune, and a sweep whose search has ended."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher
from tiny_data import tiny_config

from imbvlm.base.console import Console
from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.feature_set import FeatureSet
from imbvlm.sweep.plan.feasibility import confirm_folds
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.run import sweep_run
from imbvlm.sweep.run.sweep_run import SweepRun
from imbvlm.sweep.spec.baselines import feature_key
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune import in_process_trial
from imbvlm.sweep.tune.in_process_trial import InProcessTrial
from imbvlm.sweep.tune.jobs import Job, JobSource, RunContext
from imbvlm.sweep.tune.pack_members import Members
from imbvlm.sweep.tune.progress_callback import ProgressCallback
from imbvlm.sweep.tune.tune_adapters import TuneSearcher
from imbvlm.training.trial_session import TrialSettings

BEST = "val/best_balanced_accuracy"
TRIALS = {f"t{number:05d}": tiny_config("linear_probe", optim__lr=rate) for number, rate in enumerate((0.01, 0.1, 0.5))}
BASELINES = {"b00001": tiny_config("zero_shot"), "b00002": tiny_config("class_means")}


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


def begun(folder: Path, features: FeatureSet, printed: io.StringIO | None = None, **fields: Any) -> SweepRun:
    """A sweep whose search has ended, or that goes on with what lies in its folder."""
    base = {key: value for key, value in tiny_config("linear_probe").to_tree().items() if key != "optim"}
    space = {"parameters": {"optim.lr": {"loguniform": [0.001, 1.0]}}}
    spec = SweepSpec.from_tree({"name": "s", "base": base, "space": space, "num_trials": 3, **fields})
    folder.mkdir(exist_ok=True)
    spec.to_yaml(folder / "sweep.yaml")
    sweep, manifest, log = spec.resolve(), Manifest.read(features.manifest), TrialLog.read(str(folder))
    for number, (trial_id, config) in enumerate({**BASELINES, **TRIALS}.items()):
        kind: TrialKind = "baseline" if trial_id in BASELINES else "search"
        epoch = {"epoch": 1.0, "val/balanced_accuracy": number / 10, BEST: number / 10}
        if trial_id not in log.records:
            record = TrialRecord(trial_id=trial_id, kind=kind, state="finished", config=config.to_tree())
            record.started_at, record.ended_at, record.epochs = 0.0, 2.0, [epoch]
            log.save(record)
    budget, console = Budget.open(spec, str(folder), 0.0), Console(io.StringIO() if printed is None else printed)
    folds = confirm_folds(sweep, manifest)
    context = RunContext(sweep, str(folder), log, console, 1, budget, len(manifest.class_names), folds)
    run = SweepRun(sweep, manifest, str(folder), log, console, budget, context, (), frozenset(), {}, 1)
    run.features = {feature_key(config): features for config in (*TRIALS.values(), *BASELINES.values())}
    return run
