"""A search without Ray: its jobs are taken and answered by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from imbvlm.base.yaml_file import parse_yaml
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialRecord
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.jobs import Job
from imbvlm.sweep.tune.study_search import StudySearch

BASE = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}, "method": "decoder"}
BEST = "val/best_balanced_accuracy"
TWELVE = "{decoder.depth: {choice: [1, 2, 3]}, loss.name: {choice: [focal, ldam]}, optim.lr: {choice: [0.1, 0.2]}}"


def spec(space: str, **fields: Any) -> SweepSpec:
    parameters = parse_yaml(space).data
    made = SweepSpec.from_tree({"name": "s", "base": BASE, "space": {"parameters": parameters}, **fields})
    check_spec(made)
    return made


def searcher(
    of: SweepSpec,
    jobs: list[Job] | None = None,
    known: list[TrialRecord] | None = None,
    journal: Path | None = None,
) -> StudySearch:
    budget = Budget.open(of, "nowhere", 0.0)
    return StudySearch.open(of.resolve(), jobs or [], known or [], budget, journal=journal)


def drive(search: StudySearch, value: Callable[[Job], float] = lambda job: 0.5) -> list[Job]:
    """One trial at a time to the end."""
    jobs: list[Job] = []
    while (job := search.next_job()) is not None:
        search.finished(job, [{"epoch": 1.0, BEST: value(job)}])
        jobs.append(job)
    return jobs
