"""Limits on trials, hours and money: counted over resumptions, the refits' share kept, and the sweep ends whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from driven_search import TWELVE, drive, searcher
from driven_search import spec as search_spec
from quickstart_sweep import QUICKSTART, imbvlm, newest, run, trials
from sweep_folder import sweep_spec, write_sweep
from trial_epochs import set_metrics

from imbvlm.base.errors import ConfigError
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.refit_selection import mark_superseded, refit_seconds, refits
from imbvlm.sweep.records.trial_log import TrialLog


def spent(folder: Path, seconds: float, gpu_seconds: float = 0.0, machine_seconds: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "spent.json").write_text(
        json.dumps({"seconds": seconds, "gpu_seconds": gpu_seconds, "machine_seconds": machine_seconds, "phases": {}})
    )
    return folder


def test_hours_of_earlier_runs_count_and_are_kept(tmp_path: Path) -> None:
    folder = spent(tmp_path / "a", 3590.0)
    budget = Budget.open(sweep_spec(max_hours=1.0), str(folder), 0.0)
    assert budget.exhausted() is None
    assert budget.exhausted(keep_for_refits=True) is None
    budget.refit_seconds = 60.0
    assert budget.exhausted() is None
    assert budget.exhausted(keep_for_refits=True) == "max_hours 1"
    budget.refit_seconds, budget.test_feature_seconds = 0.0, 60.0
    assert budget.exhausted(keep_for_refits=True) == "max_hours 1"
    time.sleep(0.01)
    budget.keep(now=True)
    assert 3590 < json.loads((folder / "spent.json").read_text())["seconds"] < 3600
    assert Budget.open(sweep_spec(max_hours=0.99), str(folder), 0.0).exhausted() == "max_hours 0.99"


def test_money_is_for_all_gpus_all_the_time(tmp_path: Path) -> None:
    folder = spent(tmp_path / "a", 3600.0, 4 * 3600.0)
    spec = sweep_spec(max_cost=10.0, price_per_gpu_hour=2.0)
    budget = Budget.open(spec, str(folder), 4.0)
    assert budget.cost == pytest.approx(8.0, abs=0.01)
    assert budget.exhausted() is None
    budget.refit_seconds = 900.0  # 4 GPUs for a quarter of an hour at 2: 2 more
    assert budget.exhausted(keep_for_refits=True) == "max_cost 10"
    with pytest.raises(ConfigError, match=r"this cluster has no GPU. Set price_per_machine_hour instead"):
        Budget.open(spec, str(folder), 0.0)


def test_money_is_for_all_machines_where_their_price_is_given(tmp_path: Path) -> None:
    folder = spent(tmp_path / "a", 3600.0, 0.0, 2 * 3600.0)
    budget = Budget.open(sweep_spec(max_cost=1.0, price_per_machine_hour=0.4), str(folder), 0.0, 2)
    assert budget.cost == pytest.approx(0.8, abs=0.001)
    assert budget.exhausted() is None
    budget.refit_seconds = 900.0  # two machines for a quarter of an hour at 0.4: 0.2 more
    assert budget.exhausted(keep_for_refits=True) == "max_cost 1"
    assert budget.describe() == "0.80 of 1"


def test_no_trial_starts_beyond_max_trials() -> None:
    assert len(drive(searcher(search_spec(TWELVE, num_trials=10, max_trials=4)))) == 4
    assert len(drive(searcher(search_spec(TWELVE, num_trials=3, max_trials=4)))) == 3


def test_the_refits_share_is_what_their_trials_took(tmp_path: Path) -> None:
    log = TrialLog.read(str(write_sweep(tmp_path / "a", [120, 60, 30, 12], refits=False)))
    spec = sweep_spec(blend=None)
    winner, probe, zero_shot = refits(log, spec)
    each = [winner.record.seconds()] * 2 + [probe.record.seconds()] * 2 + [zero_shot.record.seconds()]
    assert refit_seconds(log, spec, 2) == max(sum(each) / 2, max(each))
    assert refit_seconds(TrialLog("nowhere"), spec, 2) == 0
    blended = sweep_spec(blend={"max_members": 3})
    each += [record.seconds() for record in log.ranked(spec.objective)[:2] for _ in spec.refit_seeds]
    assert refit_seconds(log, blended, 2) == max(sum(each) / 2, max(each)), "members that may join the winner"


def test_another_winner_has_refits_of_its_own_and_the_earlier_ones_stay(tmp_path: Path) -> None:
    log, spec = TrialLog.read(str(write_sweep(tmp_path / "a", [120, 60, 30, 12], refits=False))), sweep_spec()

    def refit_all() -> list[str]:
        made = {
            refit.trial_id(seed, log): (refit, config) for refit in refits(log, spec) for seed, config in refit.seeded()
        }
        mark_superseded(log, {key: refit.name for key, (refit, _) in made.items()})
        for trial_id, (refit, config) in made.items():
            if trial_id not in log.records:
                fields = {"trial_id": trial_id, "kind": "refit", "name": refit.name, "config": config.to_tree()}
                log.save(refit.record.model_copy(update=fields))
        return list(made)

    first = refit_all()
    assert first[0] == "refit-winner-seed0"
    assert refit_all() == first
    better = log.best(spec.objective)[1]
    for index in range(len(better.epochs)):
        set_metrics(better, {"val/balanced_accuracy": 0.99, "val/best_balanced_accuracy": 0.99}, index)
    second = refit_all()
    assert second[0] == f"refit-winner-{better.trial_id}-seed0"
    assert second[2:] == first[2:]
    names = {record.trial_id: record.name for record in log.of("refit")}
    assert names["refit-winner-seed0"] == "earlier winner"
    assert names[second[0]] == "winner"
    assert {record.name for record in TrialLog.read(log.folder).of("refit")} == set(names.values())


# ------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def home(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limited")


def store_features(home: Path) -> None:
    """Store the features before a sweep: on a busy machine they alone would use up its budget."""
    imbvlm("features", "extract", "embedded:fashion_mnist_lt", "--encoder", "tinylit_lite0", "--image-size", "64",
           "--set", "eval.resize=1.0", cwd=home)  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(420)
def test_a_sweep_ends_at_max_trials_goes_on_and_takes_more(home: Path) -> None:
    printed = run(QUICKSTART, "--smoke", "--set", "method=linear_probe", "--set", "max_trials=3", cwd=home)
    sweep = newest(home)
    assert "max_trials 3 is used up: 3 of 8 trials have ended; go on with: imbvlm sweep resume" in printed
    assert "test split, read once" in printed
    assert (sweep / "best.yaml").exists()
    again = imbvlm("sweep", "resume", str(sweep), "--set", "max_trials=5", cwd=home)
    assert "max_trials 5 is used up: 5 of 8 trials" in again
    last = imbvlm("sweep", "resume", str(sweep), "--set", "max_trials=null", "--add-trials", "1", cwd=home)
    assert "used up" not in last
    records = trials(sweep)
    assert sorted(key for key in records if key.startswith("t")) == [f"t{number:05d}" for number in range(1, 10)]
    drawn = {json.dumps(record["draw"], sort_keys=True) for record in records.values() if record["kind"] == "search"}
    assert len(drawn) == 9
    # Each refit has read the test split once, and the readings are all there.
    reading = json.loads((sweep / "test.json").read_text())
    read = [trial for entry in reading["readings"] for trial in entry["trials"]]
    assert (
        sorted(read) == sorted(set(read)) == sorted(key for key, record in records.items() if record["kind"] == "refit")
    )
    # Of equals the earlier one.
    best = max((record for _, record in sorted(records.items()) if record["kind"] == "search"),
               key=lambda record: max(epoch["val/balanced_accuracy"] for epoch in record["epochs"]))  # fmt: skip
    (winner,) = [record for record in records.values() if record["name"] == "winner"]
    assert {**winner["config"], "train": 0} == {**best["config"], "train": 0}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(420)
def test_a_sweep_ends_at_max_hours_with_its_trials_paused_and_goes_on_with_them(
    home: Path, order: Callable[..., AbstractContextManager[object]]
) -> None:
    """Long trials: what runs when time is up ends at its next epoch, and goes on from there."""
    store_features(home)
    long = ["--set", "method=linear_probe", "--set", "train.num_epochs=20", "--set", "trial_scheduler.name=none"]
    hours = 60 / 3600
    limited = ["--set", f"max_hours={hours}", "--set", "num_trials=2"]
    with order(loss_seconds=4):
        printed = run(QUICKSTART, "--smoke", *long, *limited, cwd=home, code=1)
    sweep = newest(home)
    states = [record["state"] for record in trials(sweep).values() if record["kind"] == "search"]
    # A busy machine may not have begun the second.
    assert set(states) == {"paused"}
    ended = f"max_hours {hours:g} is used up: 0 of 2 trials have ended, {len(states)} paused; go on with: imbvlm"
    assert ended in printed
    assert "no trial has ended yet" in printed
    assert "test.json" not in {path.name for path in sweep.iterdir()}
    used = json.loads((sweep / "spent.json").read_text())["seconds"]
    assert 60 <= used < 150
    imbvlm("sweep", "resume", str(sweep), "--set", "max_hours=1", cwd=home)
    after = trials(sweep)
    for trial_id in ("t00001", "t00002"):
        assert after[trial_id]["state"] == "finished"
        assert [epoch["epoch"] for epoch in after[trial_id]["epochs"]] == list(range(1, 21))
    assert json.loads((sweep / "spent.json").read_text())["seconds"] > used


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(420)
def test_a_sweep_ends_at_max_cost_without_a_gpu_and_scores_what_it_has(home: Path) -> None:
    """At 36 an hour the machine costs 0.01 a second: 1 of money is 100 seconds, the refits' share kept."""
    store_features(home)
    endless = ["--set", "method=linear_probe", "--set", "num_trials=500", "--set", "max_pack_size=1"]
    priced = ["--set", "price_per_machine_hour=36", "--set", "max_cost=1"]
    printed = run(QUICKSTART, "--smoke", *endless, "--set", "train.num_epochs=40", *priced, cwd=home)
    sweep = newest(home)
    assert "max_cost 1 is used up: " in printed
    assert "go on with: imbvlm sweep resume" in printed
    assert "test split, read once" in printed
    assert (sweep / "best.yaml").exists()
    used = json.loads((sweep / "spent.json").read_text())
    assert used["machine_seconds"] == used["seconds"]
    # The search leaves money for the refits, however long a busy machine takes for them.
    searched = used["seconds"] - used["phases"]["refits"]
    assert 36 * searched / 3600 < 1
    assert 36 * used["seconds"] / 3600 > 0.7
    assert all(record["state"] in ("finished", "stopped", "paused") for record in trials(sweep).values())
