"""Every entry of SAMPLERS searches, keeps its seed, goes on and learns; what it can't do is refused or said."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler
from test_study_search import BASE, TWELVE, WIDE, drive, record, searcher, spec, storage_of

from imbvlm.base.errors import ConfigError
from imbvlm.base.registry import Registry
from imbvlm.cli import doctor
from imbvlm.sweep.spec import spec_checks
from imbvlm.sweep.spec.objectives import SECONDS
from imbvlm.sweep.spec.sampler_registry import SAMPLERS, RandomConfig, SamplerSection, TpeConfig
from imbvlm.sweep.spec.spec_checks import sampler_notes
from imbvlm.sweep.tune.jobs import Job
from imbvlm.sweep.tune.samplers import CROSSOVERS, make_sampler

ROOT = Path(__file__).parent.parent.parent.parent
FEW = "val/few_shot_accuracy"
CONDITIONAL = """
loss.name: {choice: [cross_entropy, focal]}
loss.gamma: {choice: [0.5, 1, 2, 3], when: {loss.name: focal}}
decoder.depth: {int: [1, 4]}
train.batch_size: {choice: [32, 64, 128]}
"""
FIVE_KEYS = """
decoder.depth: {int: [1, 4]}
loss.name: {choice: [balanced_softmax, cross_entropy]}
loss.label_smoothing: {uniform: [0, 0.3]}
optim.lr: {loguniform: [1e-3, 1]}
optim.weight_decay: {loguniform: [1e-6, 0.1]}
"""
# A short search is then more than its first, random trials.
SHORT = {name: {"num_startup_trials": 4} for name in ("tpe", "gp")}
SHORT |= {name: {"population_size": 8} for name in ("nsga2", "nsga3")}
LEARNING = [name for name, sampler in SAMPLERS.items() if not sampler.independent]
SEVERAL_OBJECTIVES = [name for name, sampler in SAMPLERS.items() if sampler.multi_objective and sampler.continuous]

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def options(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, **SHORT.get(name, {}), **fields}


def distance(job: Job) -> float:
    """How far a trial of FIVE_KEYS is from the best one."""
    rate, decay = math.log10(job.draw["optim.lr"] / 0.03), math.log10(job.draw["optim.weight_decay"] / 1e-5)
    return abs(rate) + abs(decay) / 3 + 3 * job.draw["loss.label_smoothing"]


# ------------------------------------------------------------------------------------------------------- entries


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_entry_has_documented_options_and_an_implementation(name: str) -> None:
    config = SAMPLERS[name].config(name=name)
    assert spec(TWELVE, searcher=config.model_dump()).searcher == config
    assert isinstance(make_sampler(spec(TWELVE, searcher={"name": name}), 0), BaseSampler)
    own = {key: info for key, info in type(config).model_fields.items() if key not in SamplerSection.model_fields}
    assert [key for key, info in own.items() if not info.description] == []


def test_every_sampler_of_optuna_that_runs_in_process_has_an_entry() -> None:
    samplers = [make_sampler(spec(TWELVE, searcher={"name": name}), 0) for name in SAMPLERS]
    classes = {name: getattr(optuna.samplers, name) for name in dir(optuna.samplers) if name.endswith("Sampler")}
    without = {name for name, cls in classes.items() if not any(isinstance(one, cls) for one in samplers)}
    # Optuna's grid takes neither conditions nor fixed values, and brute_force covers it. The other wraps a sampler.
    assert without == {"GridSampler", "PartialFixedSampler"}


@pytest.mark.parametrize("fields", [
    *({"name": "nsga2", "population_size": 3, "crossover": crossover} for crossover in CROSSOVERS),
    {"name": "cmaes", "variant": "separable"},
    {"name": "cmaes", "variant": "adaptive_rate", "population_size": 4},
    {"name": "qmc", "sequence": "halton", "scramble": False},
    {"name": "gp", "deterministic": True, "num_startup_trials": 4},
    {"name": "tpe", "multivariate": False, "num_startup_trials": 4},
])  # fmt: skip
def test_options_reach_the_sampler_and_work(fields: dict[str, Any]) -> None:
    assert len(drive(searcher(spec(FIVE_KEYS, num_trials=12, searcher=fields)), lambda job: -distance(job))) == 12


def test_a_sweep_of_version_0_1_is_read_whatever_its_sampler() -> None:
    assert spec(TWELVE).searcher == TpeConfig()
    assert spec(TWELVE, searcher={"seed": 3, "num_startup_trials": 5}).searcher == TpeConfig(
        seed=3, num_startup_trials=5
    )
    written = {"name": "random", "seed": 3, "num_startup_trials": 10}
    assert spec(TWELVE, searcher=written).searcher == RandomConfig(seed=3)


# ------------------------------------------------------------------------------------------------------ searches


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_search_of_a_space_with_conditions(name: str) -> None:
    made = spec(CONDITIONAL, num_trials=14, searcher=options(name))
    jobs = drive(searcher(made), lambda job: job.draw["decoder.depth"] / 10)
    assert len({job.config.key() for job in jobs}) == 14
    for job in jobs:
        assert made.read_space().contains(job.draw, BASE)
        assert ("loss.gamma" in job.draw) == (job.draw["loss.name"] == "focal")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_finite_space_ends_and_strata_stay_equal(name: str) -> None:
    search = searcher(spec(TWELVE, num_trials=50, stratify=["loss.name"], searcher=options(name)))
    jobs = drive(search, lambda job: job.draw["optim.lr"])
    assert len({job.config.key() for job in jobs}) == 12
    assert [job.draw["loss.name"] for job in jobs].count("focal") == 6
    assert search.exhausted


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_seed_decides(name: str) -> None:
    def draws(seed: int) -> list[dict[str, Any]]:
        made = spec(CONDITIONAL, num_trials=12, searcher=options(name, seed=seed))
        return [job.draw for job in drive(searcher(made), lambda job: job.draw["decoder.depth"] / 10)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_resumed_search_goes_on(name: str, tmp_path: Path) -> None:
    made, journal = spec(CONDITIONAL, num_trials=20, searcher=options(name)), tmp_path / "optuna.log"
    before = searcher(made, journal=journal)
    jobs = [before.next_job() for _ in range(12)]
    known = [record(job, "finished", 0.1) for job in jobs[:10] if job is not None]
    known.append(record(jobs[10], "failed", None))
    unfinished = [Job(job.trial_id, "search", "", job.config, job.draw) for job in jobs[11:] if job is not None]
    after = searcher(made, unfinished, known, journal)
    more = drive(after)
    assert [job.trial_id for job in more] == [f"t{number:05d}" for number in range(12, 21)]
    assert len({str(job.draw) for job in [*jobs[:11], *more]}) == 20
    assert [trial.state.name for trial in after.study.trials[:12]] == [*["COMPLETE"] * 10, "FAIL", "COMPLETE"]
    shown = optuna.load_study(study_name="s", storage=storage_of(journal)).trials
    assert [trial.params for trial in shown] == [trial.params for trial in after.study.trials]


@pytest.mark.parametrize("name", LEARNING)
def test_a_search_learns_and_a_resumed_one_goes_on_with_what_was_learned(name: str) -> None:
    # A Gaussian process takes 0.1 s for each proposal, and needs fewer.
    num_trials = 20 if name == "gp" else 80
    made = spec(FIVE_KEYS, num_trials=num_trials, searcher=options(name))
    jobs = drive(searcher(made), lambda job: -distance(job))
    half = num_trials // 2
    known = [record(job, "finished", -distance(job)) for job in jobs[:half]]
    resumed = drive(searcher(made, known=known), lambda job: -distance(job))
    start = fmean(map(distance, jobs[:4]))
    assert fmean(map(distance, jobs[half:])) < 0.7 * start
    assert fmean(map(distance, resumed)) < 0.7 * start


def test_a_sequence_goes_on_where_it_was() -> None:
    # Choices were outside the sequence until Optuna 5.
    made = spec(WIDE, num_trials=16, searcher={"name": "qmc"})
    jobs = drive(searcher(made))
    resumed = drive(searcher(made, known=[record(job, "finished", 0.5) for job in jobs[:7]]))
    assert [job.draw for job in resumed] == [job.draw for job in jobs[7:]]


# ----------------------------------------------------------------------------------------- what a sampler can't do


@pytest.mark.parametrize("name", SEVERAL_OBJECTIVES)
def test_several_objectives_and_a_constraint(name: str) -> None:
    made = spec(WIDE, num_trials=14, other_objectives=[FEW], constraints={SECONDS: 2.0}, searcher=options(name))
    search = searcher(made)
    for _ in range(14):
        job = search.next_job()
        assert job is not None
        rate = job.draw["optim.lr"]
        result = {"epoch": 1.0, made.objective: rate, made.best_objective: rate, FEW: 1 - rate, SECONDS: 4 * rate}
        search.finished(job, [result])
    assert all(len(trial.values) == 2 for trial in search.study.trials)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("fields", [{"other_objectives": [FEW]}, {"constraints": {FEW: 0.1}}, {"warm_start": ["x"]}])
def test_what_a_sampler_can_not_do_is_refused(name: str, fields: dict[str, Any]) -> None:
    sampler, (key,) = SAMPLERS[name], fields
    able = {
        "other_objectives": sampler.multi_objective, "constraints": sampler.constraints,
        "warm_start": not sampler.independent,
    }[key]  # fmt: skip
    if able:
        spec(TWELVE, searcher={"name": name}, **fields)
        return
    with pytest.raises(ConfigError, match=rf"searcher {name} .*, and {key} is set\. Set searcher\.name to tpe, or"):
        spec(TWELVE, searcher={"name": name}, **fields)


def test_a_continuous_range_is_refused_where_every_configuration_is_tried() -> None:
    with pytest.raises(ConfigError, match=r"searcher brute_force needs a finite space, and optim\.lr is loguniform"):
        spec(WIDE, searcher={"name": "brute_force"})


@pytest.mark.parametrize(("name", "notes"), [
    ("tpe", []),
    ("random", []),
    ("gp", ["searcher gp samples keys under `when` at random: loss.gamma"]),
    ("cmaes", ["searcher cmaes samples choices and keys under `when` at random: "
               "loss.name, loss.gamma, train.batch_size"]),
])  # fmt: skip
def test_keys_that_are_left_to_chance_are_said(name: str, notes: list[str]) -> None:
    made = spec(CONDITIONAL, searcher={"name": name})
    assert sampler_notes(made.resolve()) == notes


def test_a_condition_that_always_holds_is_none() -> None:
    made = spec("{loss.gamma: {uniform: [1, 2], when: {loss.name: focal}}}", base={**BASE, "loss": {"name": "focal"}},
                searcher={"name": "gp"})  # fmt: skip
    assert sampler_notes(made.resolve()) == []


def test_a_missing_package_is_refused_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    samplers = {**SAMPLERS, "cmaes": replace(SAMPLERS["cmaes"], requires=("torch", "no_such_package"))}
    for module in (spec_checks, doctor):
        monkeypatch.setattr(module, "SAMPLERS", Registry("sampler", samplers))
    with pytest.raises(
        ConfigError, match=r"searcher cmaes needs no_such_package\. Run `pip install no_such_package`\."
    ):
        spec(TWELVE, searcher={"name": "cmaes"})
    check = doctor._samplers()
    assert (check.state, check.fix) == ("ok", "pip install 'imbvlm[samplers]'")
    assert "cmaes needs no_such_package" in check.result


# ------------------------------------------------------------------------------------------------- another sampler


ENTRY = '''
class SpiralConfig(SamplerSection):
    """Someone's own sampler."""

    name: Literal["spiral"] = "spiral"
    turns: int = Field(3, ge=1, description="turns of the spiral")


SAMPLERS = Registry(
    "sampler",
    {
        "spiral": Sampler(SpiralConfig, "a spiral", Lazy("imbvlm.sweep.tune.spiral:build_spiral")),
'''
IMPLEMENTATION = """
from optuna.samplers import RandomSampler

def build_spiral(config, seed, constraints):
    return RandomSampler(seed=seed * config.turns)
"""
USE = """
from imbvlm.sweep.spec import SweepSpec
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.tune.samplers import make_sampler

base = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}, "method": "decoder"}
space = {"parameters": {"decoder.depth": {"choice": [1, 2]}}}
spec = SweepSpec(name="s", base=base, space=space, searcher={"name": "spiral", "turns": 2})
check_spec(spec)
print(spec.searcher.turns, type(make_sampler(spec, 0)).__name__)
"""


def test_another_sampler_is_an_entry_and_a_file(tmp_path: Path) -> None:
    package = tmp_path / "imbvlm"
    shutil.copytree(ROOT / "imbvlm", package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "assets").symlink_to(ROOT / "imbvlm" / "assets")
    registry = package / "sweep" / "spec" / "sampler_registry.py"
    before = '\nSAMPLERS = Registry(\n    "sampler",\n    {\n'
    assert registry.read_text().count(before) == 1
    registry.write_text(registry.read_text().replace(before, ENTRY))
    (package / "sweep" / "tune" / "spiral.py").write_text(IMPLEMENTATION)
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "RandomSampler"], done.stderr
