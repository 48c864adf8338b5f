"""Several objectives, constraints, warm starts: what Optuna is told, who is chosen, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from driven_search import drive
from hypothesis import given, settings
from hypothesis import strategies as st
from quickstart_sweep import QUICKSTART, newest, trials
from quickstart_sweep import run as run_script
from sweep_folder import sweep_spec, write_sweep

from imbvlm.base.console import Console
from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.plan.sweep_plan import make_plan
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.earlier_sweeps import warm_starts, warm_trials
from imbvlm.sweep.records.refit_selection import refits
from imbvlm.sweep.records.summary_tables import pareto_records, pareto_table, search_table, verdict
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.run.run_phases import run_sweep
from imbvlm.sweep.spec.objectives import SECONDS, ObjectiveValues, metric_value, outcome, pareto_indices
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.jobs import Job
from imbvlm.sweep.tune.study_search import StudySearch

optuna.logging.set_verbosity(optuna.logging.WARNING)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

OVERALL, FEW = "val/balanced_accuracy", "val/few_shot_accuracy"
EPOCHS = [
    {"epoch": 1.0, OVERALL: 0.5, "val/best_balanced_accuracy": 0.5, FEW: 0.4, SECONDS: 2.0},
    {"epoch": 2.0, OVERALL: 0.7, "val/best_balanced_accuracy": 0.7, FEW: 0.2, SECONDS: 1.0},
    {"epoch": 3.0, OVERALL: 0.6, "val/best_balanced_accuracy": 0.7, FEW: 0.9, SECONDS: 1.5},
]


def test_all_values_are_of_one_model_that_of_the_best_epoch() -> None:
    assert metric_value(EPOCHS, OVERALL, FEW) == 0.2
    assert metric_value(EPOCHS, OVERALL, SECONDS) == 4.5
    assert outcome(EPOCHS, OVERALL, [FEW, SECONDS], {FEW: 0.3, SECONDS: 5.0}) == ObjectiveValues(
        (0.7, 0.2, 4.5), (pytest.approx(0.1), -0.5)
    )
    assert outcome(EPOCHS, OVERALL, ["val/many_shot_accuracy"], {}) is None
    assert outcome([], OVERALL, [], {}) is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.1, 0.2, 0.3])] * 3), min_size=1, max_size=12))
def test_the_pareto_set_is_optunas(points: list[tuple[float, float, float]]) -> None:
    metrics = [OVERALL, FEW, SECONDS]
    study = optuna.create_study(directions=["maximize", "maximize", "minimize"])
    for point in points:
        study.add_trial(optuna.trial.create_trial(values=list(point)))
    assert pareto_indices(points, metrics) == sorted(trial.number for trial in study.best_trials)


def searcher(spec: SweepSpec, known: list[TrialRecord] | None = None, warm: Any = ()) -> StudySearch:
    budget = Budget.open(spec, "nowhere", 0.0)
    return StudySearch.open(spec.resolve(), [], known or [], budget, warm=warm)


def report(job: Job, spec: SweepSpec) -> dict[str, float]:
    """High rates are good overall and bad for few-shot classes."""
    rate = job.draw["optim.lr"]
    return {"epoch": 1.0, OVERALL: rate, spec.best_objective: rate, FEW: 0.5 - rate, SECONDS: 1.0}


def run(search: StudySearch, spec: SweepSpec) -> list[TrialRecord]:
    records = []
    while (job := search.next_job()) is not None:
        epoch = report(job, spec)
        search.finished(job, [epoch])
        records.append(
            TrialRecord(
                trial_id=job.trial_id,
                kind="search",
                state="finished",
                config=job.config.to_tree(),
                draw=job.draw,
                epochs=[epoch],
                started_at=1.0,
                ended_at=2.0,
            )
        )
    return records


def test_optuna_is_told_every_objective_and_how_far_constraints_are_broken_also_of_known_trials() -> None:
    spec = sweep_spec(num_trials=15, other_objectives=[FEW], constraints={FEW: 0.3})
    check_spec(spec)
    search = searcher(spec)
    records = run(search, spec)
    assert [direction.name for direction in search.study.directions] == ["MAXIMIZE", "MAXIMIZE"]
    for trial, record in zip(search.study.trials, records, strict=True):
        rate = record.draw["optim.lr"]
        assert trial.values == [rate, 0.5 - rate]
        assert list(trial.constraints.values()) == [pytest.approx(rate - 0.2)]
    again = searcher(spec, records[:12])
    assert [(t.values, t.constraints) for t in again.study.trials] == [
        (t.values, t.constraints) for t in search.study.trials[:12]
    ]
    assert len(run(again, spec)) == 3


def test_the_search_turns_to_where_the_constraint_is_met() -> None:
    """Unconstrained TPE goes to high rates, which break it."""
    shares = []
    for constraints in ({}, {FEW: 0.4}):
        spec = sweep_spec(num_trials=60, constraints=constraints)
        late = run(searcher(spec), spec)[30:]
        shares.append(sum(record.draw["optim.lr"] <= 0.1 for record in late) / len(late))
    assert shares[1] > shares[0] + 0.3


def test_who_breaks_a_constraint_is_not_chosen_and_the_tables_say_so(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "a", [120, 60, 30, 12], refits=False, constraints={FEW: 0.52})
    log, spec = TrialLog.read(str(folder)), sweep_spec(constraints={FEW: 0.52})
    free = TrialLog.read(str(write_sweep(tmp_path / "b", [120, 60, 30, 12], refits=False)))
    few = {record.trial_id: metric_value(record.epochs, OVERALL, FEW) for record in log.of("search")}
    able = [trial_id for trial_id, value in few.items() if value >= 0.52]
    assert 0 < len(able) < 24
    ranked = [record.trial_id for record in log.best(OVERALL)]
    assert set(ranked[: len(able)]) == set(able)
    assert refits(log, spec)[0].record.trial_id == ranked[0]
    assert sorted(ranked) == sorted(record.trial_id for record in free.best(OVERALL))
    log.constraints = {FEW: 0.99}
    assert "no trial meets the constraints (val/few_shot_accuracy 0.99)" in verdict(
        log, sweep_spec(constraints={FEW: 0.99}), None
    )
    assert search_table(log, spec).count("BREAKS A CONSTRAINT") == 8


def test_the_pareto_set_of_a_sweep_has_its_values_in_a_table(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "a", [120, 60, 30, 12], refits=False)
    log, spec, chance = TrialLog.read(str(folder)), sweep_spec(other_objectives=[FEW]), random.Random(1)
    for record in log.of("search"):
        value = chance.random()
        few = 1 - value if value > 0.5 else 0.0
        record.epochs = [{"epoch": 1.0, OVERALL: value, spec.best_objective: value, FEW: few}]
    front = pareto_records(log, spec)
    assert {record.trial_id for record in front} == {
        record.trial_id for record in log.of("search") if record.epochs[0][OVERALL] > 0.5
    }
    assert front[0].trial_id == log.best(OVERALL)[0].trial_id
    assert all(record.trial_id in pareto_table(front, spec) for record in front)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"other_objectives": ["val/few_shot"]}, "not measured; did you mean 'val/few_shot_accuracy'"),
        ({"other_objectives": [OVERALL]}, "val/balanced_accuracy is an objective already"),
        (
            {"other_objectives": [SECONDS]},
            "a trial that ASHA stops would seem inexpensive; set trial_scheduler.name: none",
        ),
        ({"constraints": {FEW: 30.0}}, "val/few_shot_accuracy is a fraction from 0 to 1, and its limit is 30"),
        ({"constraints": {"val/few": 0.3}}, "'val/few' is not measured"),
        (
            {"searcher": {"name": "random"}, "warm_start": ["x"]},
            "searcher random ignores results, and warm_start is set",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, dict[str, str | float] | list[str]], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_spec(sweep_spec(**fields))
    assert says in str(error.value)


def test_a_warm_start_tells_what_the_new_space_contains_and_counts_for_nothing(tmp_path: Path) -> None:
    folder = str(write_sweep(tmp_path / "a", [120, 60, 30, 12], refits=False))
    before = TrialLog.read(folder)
    space = {"parameters": {"loss.name": {"choice": ["cross_entropy", "balanced_softmax", "focal"]},
                            "optim.lr": {"loguniform": [0.01, 0.1]}}}  # fmt: skip
    base = {**sweep_spec().base, "method": "linear_probe"}
    spec = sweep_spec(base=base, space=space, num_trials=5, warm_start=[folder])
    check_spec(spec)
    (start,) = warm_starts(spec.resolve())
    probes = [record for record in before.of("search") if record.config["method"] == "linear_probe"]
    inside = [record for record in probes if record.draw["optim.lr"] <= 0.1]
    assert [trial.record.trial_id for trial in start.trials] == [trial.trial_id for trial in inside]
    assert 0 < len(inside) < start.num_ended == 24
    assert f"{len(inside)} of 24 trials of {folder}" in start.describe()
    search = searcher(spec, warm=warm_trials([start]))
    values = [trial.value for trial in search.study.trials]
    assert values == [record.best_value(spec.best_objective) for record in inside]
    jobs = drive(search)
    assert [job.trial_id for job in jobs] == [f"t{number:05d}" for number in range(1, 6)]


def test_a_warm_start_that_is_no_sweep_is_refused_by_the_plan_and_before_the_run_writes_anything(
    tmp_path: Path,
) -> None:
    data, tower = {"manifest": "embedded:fashion_mnist_lt"}, {"name": "tinylit_lite0", "image_size": 64}
    spec = sweep_spec(base={"data": data, "encoder": tower}, warm_start=[str(tmp_path / "nope")])
    with pytest.raises(ImbvlmError, match="nope is not a sweep's folder"):
        make_plan(spec, None)
    with pytest.raises(ImbvlmError, match="nope is not a sweep's folder"):
        run_sweep(spec, str(tmp_path / "made"), Console())
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_sweep_with_two_objectives_a_constraint_and_a_warm_start(ray_cluster: str, tmp_path: Path) -> None:
    run_script(QUICKSTART, "--smoke", "--set", "num_trials=4", cwd=tmp_path)
    earlier = newest(tmp_path)
    asked = ["--set", f"other_objectives=[{FEW}]", "--set", f"constraints={{{FEW}: 0.3}}", "--warm-start", str(earlier)]
    printed = run_script(QUICKSTART, "--smoke", "--set", "num_trials=4", *asked, cwd=tmp_path)
    sweep = newest(tmp_path)
    assert f"warm start: 4 of 4 trials of {earlier} lie in this space" in printed
    assert "no trial is better in all objectives than these" in printed
    records = {name: record for name, record in trials(sweep).items() if record["kind"] == "search"}
    for path in (sweep / "pareto").iterdir():
        assert path.stem in records
        TrialConfig.from_yaml(path)
    best = TrialConfig.from_yaml(sweep / "best.yaml")
    (chosen,) = [
        record for record in records.values() if {**record["config"], "train": 0} == {**best.to_tree(), "train": 0}
    ]
    assert metric_value(chosen["epochs"], OVERALL, FEW) >= 0.3
