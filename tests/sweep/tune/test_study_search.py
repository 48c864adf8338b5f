"""The searcher, driven by hand: nothing twice, ends when exhausted, failures reported, equal strata, and going on."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from driven_search import BASE, BEST, TWELVE, drive, searcher, spec
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from imbvlm.base.errors import ConfigError
from imbvlm.base.registry import Registry
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialRecord
from imbvlm.sweep.spec.equivalence import canonical_key
from imbvlm.sweep.spec.sampler_registry import SAMPLERS
from imbvlm.sweep.spec.space_file import read_space
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune import study_search
from imbvlm.sweep.tune.jobs import FixedJobs, Job
from imbvlm.sweep.tune.study_search import StudySearch

optuna.logging.set_verbosity(optuna.logging.WARNING)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

COMPLETE, FAIL = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL
RUNNING = optuna.trial.TrialState.RUNNING
WIDE = "{decoder.depth: {int: [1, 4]}, optim.lr: {loguniform: [1e-3, 1]}}"


def record(job: Job, state: str, value: float | None) -> TrialRecord:
    epochs = [] if value is None else [{"epoch": 1.0, BEST: value}]
    return TrialRecord(
        trial_id=job.trial_id, kind="search", config=job.config.to_tree(), draw=job.draw, state=state, epochs=epochs
    )


def storage_of(journal: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(journal)))


def told(search: StudySearch) -> list[tuple[Any, float | None]]:
    return [(trial.state, trial.value) for trial in search.study.trials]


# --------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_finite_space_is_tried_once_all_over_and_ends_early(name: str) -> None:
    search = searcher(spec(TWELVE, num_trials=50, searcher={"name": name}))
    jobs = drive(search, lambda job: job.draw["optim.lr"] + job.draw["decoder.depth"])
    assert len(jobs) == 12
    assert len({job.config.key() for job in jobs}) == 12
    assert [job.trial_id for job in jobs] == [f"t{number:05d}" for number in range(1, 13)]
    assert search.exhausted
    assert search.next_job() is None


def test_untried_ones_are_found_though_the_sampler_proposes_nothing_but_the_best() -> None:
    of = spec(
        """
method: {choice: [zero_shot, linear_probe]}
optim.lr: {uniform: [0.1, 1], when: {method: linear_probe}}
""",
        num_trials=20,
    )
    search = searcher(of)
    jobs = drive(search, lambda job: 0.9 if job.config.method == "zero_shot" else 0.1)
    assert Counter(job.config.method for job in jobs) == {"zero_shot": 1, "linear_probe": 19}
    assert not search.exhausted


def test_aliases_are_one_configuration() -> None:
    search = searcher(
        spec(
            """
loss.name: {choice: [cross_entropy, focal, balanced_softmax, logit_adjustment, generalized_reweight, inverse_frequency]}
loss.gamma: {choice: [0, 2], when: {loss.name: focal}}
loss.tau: {choice: [0, 1, 2], when: {loss.name: logit_adjustment}}
loss.exponent: {choice: [0, 1, 2], when: {loss.name: generalized_reweight}}
""",
            num_trials=50,
        )
    )
    jobs = drive(search)
    # Of 11 draws gamma 0, tau 0, tau 1, exponent 0 and exponent 1 are others by another name.
    assert len(jobs) == 6
    assert len({canonical_key(job.config) for job in jobs}) == 6
    assert search.exhausted


def config(**sections: Any) -> TrialConfig:
    return TrialConfig.from_tree({**BASE, **sections})


def loss(name: str, **options: float | str) -> TrialConfig:
    return config(loss={"name": name, **options}, data={"manifest": "m", "class_sampling": "square_root"})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (loss("logit_adjustment", tau=1), loss("balanced_softmax")),
        (loss("logit_adjustment", tau=1, prior="train"), loss("balanced_softmax", prior="train")),
        (loss("lade", weight=0), loss("balanced_softmax")),
        (loss("generalized_reweight", exponent=0), loss("cross_entropy")),
        (loss("generalized_reweight", exponent=1), loss("inverse_frequency")),
        (loss("focal", gamma=0), loss("cross_entropy")),
        (loss("effective_number", beta=0), loss("cross_entropy")),
        (loss("logit_adjustment", tau=0), loss("cross_entropy")),
        (
            loss("generalized_reweight", exponent=1, label_smoothing=0.1),
            loss("inverse_frequency", label_smoothing=0.1),
        ),
        (loss("logit_adjustment", tau=0, label_smoothing=0.1), loss("cross_entropy", label_smoothing=0.1)),
        (loss("ldam"), loss("ldam", margin_scale=25.0)),
        (config(loss={"name": "balanced_softmax", "prior": "train"}), config(loss={"name": "balanced_softmax"})),
        (config(optim={"lr": 1}), config(optim={"lr": 1.0})),
    ],
)
def test_what_trains_the_same_is_the_same(one: TrialConfig, other: TrialConfig) -> None:
    assert canonical_key(one) == canonical_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (loss("logit_adjustment", tau=1.01), loss("balanced_softmax")),
        (loss("balanced_softmax", prior="train"), loss("balanced_softmax")),
        (loss("focal", gamma=0), loss("cross_entropy", label_smoothing=0.1)),
        (loss("logit_adjustment", tau=1, label_smoothing=0.1), loss("balanced_softmax")),
        (loss("ldam"), loss("ldam", margin_scale=1.0)),
        (config(train={"num_epochs": 9}), config()),
    ],
)
def test_what_trains_another_thing_is_not(one: TrialConfig, other: TrialConfig) -> None:
    assert canonical_key(one) != canonical_key(other)


def test_a_repeat_takes_the_known_value_and_does_not_count() -> None:
    of = spec("{decoder.depth: {choice: [1, 2]}}", num_trials=2, searcher={"name": "random", "seed": 3})
    search = searcher(of)
    jobs = drive(search, lambda job: job.draw["decoder.depth"] / 10)
    assert len(jobs) == 2
    assert search.num_repeats == len(search.study.trials) - 2
    assert not search.exhausted
    for trial in search.study.trials:
        assert trial.value == trial.params["decoder.depth"] / 10


@pytest.mark.parametrize(("epochs", "state", "value"), [([{"epoch": 1.0, BEST: 0.7}], COMPLETE, 0.7), ([], FAIL, None)])
def test_a_repeat_of_a_running_trial_waits_for_its_value(
    epochs: list[dict[str, float]], state: Any, value: float | None
) -> None:
    search = searcher(spec("{decoder.depth: {choice: [1, 2]}}", num_trials=3))
    first, second = search.next_job(), search.next_job()
    assert first is not None
    assert second is not None
    assert search.next_job() is None
    assert search.exhausted
    running = [trial for trial in search.study.trials if trial.state == optuna.trial.TrialState.RUNNING]
    assert len(running) == len(search.study.trials) > 2
    search.finished(first, epochs)
    same = [trial for trial in search.study.trials if trial.params == first.draw]
    assert {(trial.state, trial.value) for trial in same} == {(state, value)}
    search.finished(second, [{"epoch": 1.0, BEST: 0.1}])
    assert all(trial.state.is_finished() for trial in search.study.trials)


# ------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    "epochs", [[], [{"epoch": 1.0}], [{"epoch": 1.0, BEST: math.nan}], [{"epoch": 1.0, BEST: math.inf}]]
)
def test_what_has_no_value_is_told_as_failed_and_never_best(epochs: list[dict[str, float]]) -> None:
    search = searcher(spec(WIDE, num_trials=3))
    for of_trial in (epochs, [{"epoch": 1.0, BEST: 0.2}]):
        job = search.next_job()
        assert job is not None
        search.finished(job, of_trial)
    assert told(search) == [(FAIL, None), (COMPLETE, 0.2)]
    assert search.study.best_value == 0.2


def test_trials_that_nobody_knows_are_ignored() -> None:
    search = searcher(spec(WIDE))
    never_started = Job("t00009", "search", "", config())
    search.finished(never_started, [{"epoch": 1.0, BEST: 0.9}])
    assert search.study.trials == []


# ------------------------------------------------------------------------------------------------- first trials


def test_first_trials_come_first_in_their_order_and_count() -> None:
    first = [{"decoder.depth": 4, "optim.lr": 0.5}, {"decoder.depth": 1, "optim.lr": 0.25}]
    jobs = drive(searcher(spec(WIDE, num_trials=5, first_trials=first)))
    assert [job.draw for job in jobs[:2]] == first
    assert len(jobs) == 5


def test_first_trials_outside_the_space_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        spec(WIDE, first_trials=[{"decoder.depth": 4, "optim.lr": 0.5}, {"decoder.depth": 9, "optim.lr": 0.5}])
    assert "first_trials[1]: decoder.depth = 9 is outside int 1 .. 4" in str(error.value)


def test_baselines_go_out_first_and_optuna_does_not_know_them() -> None:
    first = {"decoder.depth": 4, "optim.lr": 0.5}
    baseline = Job("b00001", "baseline", "zero-shot", TrialConfig.from_tree({**BASE, "method": "zero_shot"}))
    search = searcher(spec(WIDE, num_trials=2, first_trials=[first]), [baseline])
    jobs = drive(search)
    assert [job.trial_id for job in jobs] == ["b00001", "t00001", "t00002"]
    assert jobs[1].draw == first
    assert len(search.study.trials) == 2


def test_a_fixed_searcher_hands_out_its_jobs_and_ends() -> None:
    jobs = [Job(f"refit-{number}", "refit", "winner", config()) for number in range(2)]
    search = FixedJobs(jobs, Budget.open(spec(TWELVE), "nowhere", 0.0))
    assert [search.next_job() for _ in range(3)] == [*jobs, None]


# ---------------------------------------------------------------------------------------------------- resuming


def test_going_on_ends_with_the_same_number_and_repeats_none() -> None:
    of = spec(TWELVE, num_trials=10)
    before = searcher(of)
    jobs = [before.next_job() for _ in range(6)]
    known = [record(job, "finished", 0.1 * number) for number, job in enumerate(jobs[:3])]
    known.append(record(jobs[3], "failed", None))
    unfinished = [Job(job.trial_id, "search", "", job.config, job.draw) for job in jobs[4:6]]

    after = searcher(of, list(unfinished), known)
    more = drive(after)
    assert [job.trial_id for job in more] == ["t00005", "t00006", "t00007", "t00008", "t00009", "t00010"]
    assert [job.draw for job in more[:2]] == [job.draw for job in jobs[4:6]]
    assert len({job.config.key() for job in [*jobs[:4], *more]}) == 10
    assert told(after)[:4] == [(COMPLETE, 0.0), (COMPLETE, 0.1), (COMPLETE, 0.2), (FAIL, None)]
    assert after.study.trials[4].params == jobs[4].draw
    assert after.study.trials[4].value == 0.5


def test_an_unfinished_trial_keeps_its_own_values_beside_pinned_ones() -> None:
    first = [{"decoder.depth": depth, "optim.lr": 0.5} for depth in (1, 2, 3)]
    of = spec(WIDE, num_trials=4, first_trials=first)
    before = searcher(of)
    jobs = [before.next_job() for _ in range(2)]
    unfinished = [Job(job.trial_id, "search", "", job.config, job.draw) for job in jobs if job is not None]
    after = searcher(of, unfinished)
    more = drive(after, lambda job: job.draw["decoder.depth"] / 10)
    assert [job.draw for job in more[:3]] == first  # the third wasn't started before, and is not forgotten
    assert len(more) == 4
    for trial in after.study.trials[:2]:
        assert trial.value == trial.params["decoder.depth"] / 10


def test_new_ids_do_not_take_those_of_kept_records() -> None:
    of = spec(WIDE, num_trials=4)
    jobs = [searcher(of).next_job()]
    kept = record(jobs[0], "finished", 0.5)
    kept.trial_id = "t00003"  # records 1 and 2 were removed to be run again
    assert [job.trial_id for job in drive(searcher(of, [], [kept]))] == ["t00004", "t00005", "t00006"]


def test_a_finished_sweep_has_nothing_more_to_do() -> None:
    of = spec(WIDE, num_trials=3)
    known = [record(job, "finished", 0.5) for job in drive(searcher(of))]
    search = searcher(of, [], known)
    assert search.next_job() is None
    assert not search.exhausted


# ---------------------------------------------------------------------------------------------------- stratified


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_every_arm_gets_the_same_number(name: str) -> None:
    of = spec(
        """
method: {choice: [linear_probe, decoder]}
decoder.depth: {choice: [1, 2, 3], when: {method: decoder}}
loss.name: {choice: [focal, ldam, lade]}
loss.gamma: {uniform: [0.5, 3], when: {loss.name: focal}}
optim.lr: {loguniform: [1e-3, 1]}
""",
        num_trials=30,
        stratify=["method", "loss.name"],
        searcher={"name": name},
    )
    jobs = drive(searcher(of), lambda job: 0.9 if job.draw["loss.name"] == "focal" else 0.1)
    counts = Counter((job.draw["method"], job.draw["loss.name"]) for job in jobs)
    assert set(counts.values()) == {5}
    assert len(counts) == 6


def test_arms_of_branches_get_the_same_number() -> None:
    """In the large spaces ldam needs a cosine classifier and focal a linear one."""
    of = SweepSpec.from_tree({"name": "s", "base": BASE, "space": "inat", "num_trials": 45, "stratify": ["loss.name"]})
    check_spec(of)
    jobs = drive(searcher(of))
    counts = Counter(job.draw["loss.name"] for job in jobs)
    assert set(counts.values()) == {5}
    assert len(counts) == 9
    kinds = {(job.draw["loss.name"], job.draw["classifier.kind"]) for job in jobs}
    assert ("ldam", "linear") not in kinds
    assert {("cross_entropy", "linear"), ("lade", "cosine")} & kinds  # elsewhere the sampler chooses


def test_a_conditional_key_has_an_arm_for_where_it_is_absent() -> None:
    of = spec(
        """
method: {choice: [zero_shot, linear_probe]}
loss.name: {choice: [focal, ldam], when: {method: linear_probe}}
optim.lr: {loguniform: [1e-3, 1], when: {method: linear_probe}}
""",
        num_trials=9,
        stratify=["loss.name"],
    )
    search = searcher(of)
    jobs = drive(search)
    # Zero-shot has one configuration in all; the others share what is left.
    assert Counter(job.draw.get("loss.name") for job in jobs) == {None: 1, "focal": 4, "ldam": 4}
    assert not search.exhausted


def test_arms_are_kept_equal_over_a_restart() -> None:
    of = spec(
        "{loss.name: {choice: [focal, ldam]}, optim.lr: {loguniform: [1e-3, 1]}}", stratify=["loss.name"], num_trials=8
    )
    jobs = drive(searcher(of))
    known = [record(job, "finished", 0.5) for job in jobs if job.draw["loss.name"] == "focal"]
    assert len(known) == 4
    assert [job.draw["loss.name"] for job in drive(searcher(of, [], known))] == ["ldam"] * 4


def test_stratifying_by_what_is_not_chosen_from_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stratify names 'optim.lr', which the space doesn't choose from a list"):
        spec(WIDE, stratify=["optim.lr"])
    with pytest.raises(ConfigError, match=r"stratify names 'los.name'.*did you mean 'loss.name'\?"):
        spec(TWELVE, stratify=["los.name"])


# ------------------------------------------------------------------------------------------------------- the rest


def test_the_same_seed_proposes_the_same_and_another_does_not() -> None:
    def draws(seed: int) -> list[dict[str, Any]]:
        return [job.draw for job in drive(searcher(spec(WIDE, num_trials=6, searcher={"seed": seed})))]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_the_search_learns() -> None:
    jobs = drive(searcher(spec(WIDE, num_trials=60)), lambda job: -abs(math.log10(job.draw["optim.lr"] / 0.03)))
    early, late = ([abs(math.log10(job.draw["optim.lr"] / 0.03)) for job in part] for part in (jobs[:20], jobs[-20:]))
    assert sum(late) < 0.75 * sum(early)


def test_proposing_costs_little_beside_a_trial() -> None:
    of = SweepSpec.from_tree({"name": "s", "base": BASE, "space": "inat", "num_trials": 40})
    started = time.process_time()
    assert len(drive(searcher(of))) == 40
    assert (time.process_time() - started) / 40 < 0.1


def test_all_shipped_spaces_can_be_stratified_by_method_and_loss() -> None:
    for name in ("quickstart", "inat", "imagenet_lt", "places_lt"):
        strata = read_space(name).choices_over(["method", "loss.name"], BASE)
        assert all(set(stratum) == {"method", "loss.name"} for stratum in strata)


def test_optunas_storage_can_be_read_by_others_while_the_search_runs(tmp_path: Path) -> None:
    of, journal = spec(TWELVE, num_trials=5), tmp_path / "new" / "optuna.log"
    search = searcher(of, journal=journal)
    first = search.next_job()
    assert first is not None
    search.finished(first, [{"epoch": 1.0, BEST: 0.5}])
    running = search.next_job()
    seen = optuna.load_study(study_name="s", storage=storage_of(journal))
    assert [one.state.name for one in seen.trials] == ["COMPLETE", "RUNNING"]
    assert seen.trials[0].value == 0.5
    assert running is not None
    again = searcher(of, known=[record(running, "finished", 0.7)], journal=journal)
    seen = optuna.load_study(study_name="s", storage=storage_of(journal))
    assert [one.value for one in seen.trials] == [one.value for one in again.study.trials] == [0.7]


# ------------------------------------------------------------------------------------------------- many trials


def keep_at_most(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TPE goes on with half of so many ended trials."""
    samplers = {**SAMPLERS, "tpe": replace(SAMPLERS["tpe"], max_history=number)}
    monkeypatch.setattr(study_search, "SAMPLERS", Registry("sampler", samplers))


def test_of_many_trials_the_best_are_kept_and_what_runs_is_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_at_most(40, monkeypatch)
    of, journal = spec(WIDE, num_trials=150), tmp_path / "optuna.log"
    search = searcher(of, journal=journal)
    values: dict[str, float | None] = {}
    running: list[Job] = []
    for _ in range(150):
        job = search.next_job()
        assert job is not None
        running.append(job)
        if len(running) > 3:
            job = running.pop(0)
            # Far off it fails, so that failed ones are among what is forgotten.
            off = abs(math.log10(job.draw["optim.lr"] / 0.1)) + abs(job.draw["decoder.depth"] - 3)
            values[job.trial_id] = None if off > 3 else 1.0 - off / 10
            search.finished(job, [] if off > 3 else [{"epoch": 1.0, BEST: 1.0 - off / 10}])
        assert len(search.study.get_trials(deepcopy=False)) < 40 + 4
        assert sum(trial.state is RUNNING for trial in search.study.get_trials(deepcopy=False)) == len(running)
    assert len(values) == 147
    finished = sorted((value for value in values.values() if value is not None), reverse=True)
    known = sorted((trial.value for trial in search.study.trials if trial.state is COMPLETE), reverse=True)
    assert known[:10] == finished[:10]
    assert known != finished[: len(known)], "some of the worse ones are kept as well, so that TPE knows where not to go"
    open_draws = [job.draw for job in running]
    assert [trial.params for trial in search.study.trials if trial.state is RUNNING] == open_draws
    assert finished[0] > 0.97, "it has gone on learning"

    (name,) = optuna.get_all_study_names(storage_of(journal))
    shown = optuna.load_study(study_name=name, storage=storage_of(journal)).trials
    told_there = [trial.value for trial in shown if trial.state is not RUNNING]
    assert Counter(told_there) == Counter(values.values())
    assert [trial.params for trial in shown if trial.state is RUNNING] == open_draws


def test_a_resumed_search_knows_the_best_of_many_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_at_most(40, monkeypatch)
    jobs = drive(searcher(spec(WIDE, num_trials=100)), lambda job: job.draw["optim.lr"])
    known = [record(job, "finished", job.draw["optim.lr"]) for job in jobs]
    after = searcher(spec(WIDE, num_trials=110), known=known)
    left = [trial.value for trial in after.study.trials]
    assert len(left) < 40
    assert max(left) == max(job.draw["optim.lr"] for job in jobs)
    more = drive(after, lambda job: job.draw["optim.lr"])
    assert len(more) == 10
    assert not {job.config.key() for job in more} & {job.config.key() for job in jobs}


@pytest.mark.parametrize("fields", [
    {"searcher": {"name": "random"}},
    {"searcher": {"name": "tpe", "num_startup_trials": 30}},
])  # fmt: skip
def test_nothing_is_forgotten_where_nothing_learns_from_it_yet(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_at_most(40, monkeypatch)
    search = searcher(spec(WIDE, num_trials=100, **fields))
    drive(search)
    assert len(search.study.trials) == 100
