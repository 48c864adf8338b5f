"""What is trained again for the test split: with what the search chose on validation, of which a refit has none."""

from __future__ import annotations

from pathlib import Path

from trial_epochs import set_metrics
from trial_records import BASE, log_of, record

from imbvlm.sweep.records.refit_selection import confirm_seconds, refits, to_confirm
from imbvlm.sweep.records.trial_log import Selected
from imbvlm.sweep.spec.sweep_spec import SweepSpec

SPEC = SweepSpec(name="s", base={**BASE, "method": "decoder"}, space={"parameters": {}}, refit_seeds=[3, 4])
NORMALIZED = {"classifier": {"kind": "linear"}, "second_stage": {"name": "tau_normalization"}}


def test_the_winner_is_refitted_at_its_configured_length_with_each_seed(tmp_path: Path) -> None:
    log = log_of(tmp_path, record("t1", [0.2, 0.6, 0.5]), record("t2", [0.4]))
    (winner,) = refits(log, SPEC)
    assert (winner.name, winner.record.trial_id) == ("winner", "t1")
    assert [(seed, config.train.seed, config.train.num_epochs) for seed, config in winner.seeded()] == [
        (3, 3, 10),
        (4, 4, 10),
    ]


def test_a_tau_that_validation_chose_is_set_in_the_refit(tmp_path: Path) -> None:
    trial = record("t1", [0.2, 0.6], NORMALIZED)
    set_metrics(trial, {"second_stage/tau": 0.45})
    (winner,) = refits(log_of(tmp_path, trial), SPEC)
    assert winner.config.second_stage.tau == 0.45
    configured = record("t2", [0.7], {**NORMALIZED, "second_stage": {"name": "tau_normalization", "tau": 0.3}})
    (winner,) = refits(log_of(tmp_path, trial, configured), SPEC)
    assert (winner.record.trial_id, winner.config.second_stage.tau) == ("t2", 0.3)


def test_what_validation_chose_for_a_discriminant_is_set_in_the_refit_which_has_one_seed(tmp_path: Path) -> None:
    trial = record("t1", [0.6], {"method": "discriminant"})
    set_metrics(trial, {"discriminant/shrinkage": 0.2, "discriminant/temperature": 3.0})
    (winner,) = refits(log_of(tmp_path, trial), SPEC)
    section = winner.config.discriminant
    assert (section.shrinkage, section.temperature, winner.seeds) == (0.2, 3.0, (0,))


def test_a_trial_that_was_stopped_before_it_chose_tau_does_not_win(tmp_path: Path) -> None:
    stopped = record("t1", [0.9], NORMALIZED, state="stopped")
    (winner,) = refits(log_of(tmp_path, stopped, record("t2", [0.4])), SPEC)
    assert winner.record.trial_id == "t2"


def test_the_best_baseline_of_each_method_is_refitted_the_heads_between_probe_and_zero_shot(tmp_path: Path) -> None:
    baselines = [
        record("b1", [0.2], {"method": "zero_shot"}, kind="baseline", name="zero-shot"),
        record("b2", [0.3], {"method": "class_means"}, kind="baseline", name="class means at 64 px"),
        record("b3", [0.5], {"method": "class_means"}, kind="baseline", name="class means at 96 px"),
        record("b4", [0.1], {"method": "linear_probe"}, kind="baseline", name="linear probe at 64 px"),
    ]
    selected = refits(log_of(tmp_path, record("t1", [0.6]), *baselines), SPEC)
    assert [(refit.name, refit.seeds) for refit in selected[1:]] == [
        ("linear probe at 64 px", (3, 4)),
        ("class means at 96 px", (0,)),
        ("zero-shot", (0,)),
    ]


def test_a_baseline_that_wins_after_a_resumption_is_not_taken_for_the_earlier_winner(tmp_path: Path) -> None:
    """A sweep that is resumed may have heads that it had not, and the refit of its old winner stays."""
    trial = record("t1", [0.6])
    head = record("b3", [0.5], {"method": "class_means"}, kind="baseline", name="class means")
    log = log_of(tmp_path, trial, head)
    before = refits(log, SPEC)[0]
    config = dict(before.seeded())[3]
    old = record("refit-winner-seed3", [0.6], kind="refit", name="winner").model_copy(
        update={"config": config.to_tree()}
    )
    log.records[old.trial_id] = old
    assert before.trial_id(3, log) == old.trial_id
    log.selected = Selected(head.trial_id, (), {head.trial_id: -1.0})
    winner, baseline = refits(log, SPEC)
    assert (winner.name, winner.seeds, winner.trial_id(0, log)) == ("winner", (0,), "refit-winner-seed0")
    log.records["refit-winner-seed0"] = old.model_copy(update={"trial_id": "refit-winner-seed0"})
    assert winner.trial_id(0, log) == "refit-winner-b3-seed0"
    assert baseline.trial_id(0, log) == "refit-class-means-seed0"


def test_baselines_take_as_long_as_their_best_took_and_zero_shot_one_seed(tmp_path: Path) -> None:
    probe = record("b2", [0.1, 0.5, 0.4], {"method": "linear_probe"}, kind="baseline", name="linear probe")
    other = record("b3", [0.3], {"method": "linear_probe"}, kind="baseline", name="linear probe b")
    zero_shot = record("b1", [0.2], {"method": "zero_shot"}, kind="baseline", name="zero-shot")
    selected = refits(log_of(tmp_path, record("t1", [0.6]), probe, other, zero_shot), SPEC)
    assert [(refit.name, refit.seeds) for refit in selected] == [
        ("winner", (3, 4)),
        ("linear probe", (3, 4)),
        ("zero-shot", (0,)),
    ]
    assert selected[1].config.train.num_epochs == 2
    assert selected[2].seeded() == [(0, selected[2].config)]


def test_baselines_and_the_best_trials_that_read_features_are_scored_over_folds(tmp_path: Path) -> None:
    """Neither trials that were stopped or train the encoder, nor those that violate a constraint."""
    spec = SPEC.model_copy(update={"confirm_trials": 2, "constraints": {"val/few_shot_accuracy": 0.5}})
    trials = [record(f"t{number}", [number / 100]) for number in range(20)]
    for trial in trials:
        set_metrics(trial, {"val/few_shot_accuracy": 0.2 if trial.trial_id == "t19" else 0.6})
    trials[18].state = "stopped"
    trials[17].config = record("t17", [0.0], {"method": "fine_tuning"}).config
    baselines = [
        record("b1", [0.2], {"method": "zero_shot"}, kind="baseline"),
        record("b2", [0.3], {"method": "linear_probe"}, kind="baseline", state="failed"),
    ]
    seeds = [record(f"t{number}-seed1", [0.1], kind="confirm", name=f"t{number}") for number in (3, 16)]
    log = log_of(tmp_path, *trials, *baselines, *seeds)
    log.constraints = spec.constraints
    best = [f"t{number}" for number in (16, 15, 14, 13, 12, 11, 10, 9)]
    assert [scored.trial_id for scored in to_confirm(log, spec)] == ["b1", *best, "t16-seed1"]
    more = spec.model_copy(update={"confirm_trials": 10})
    assert [scored.trial_id for scored in to_confirm(log, more)] == ["b1", *best, "t8", "t7", "t16-seed1"]


def test_time_for_runs_over_folds_is_that_of_their_trials_for_each_fold(tmp_path: Path) -> None:
    trials = [record(f"t{number}", [0.5], started_at=0.0, ended_at=10.0, pack_size=2) for number in range(4)]
    log = log_of(tmp_path, *trials)
    assert confirm_seconds(log, SPEC, 1, 2) == 0
    assert confirm_seconds(log, SPEC, 5, 2) == 4 * 5 * 5 / 2
    log.save(trials[0].model_copy(update={"trial_id": "t0-folds", "kind": "folds", "name": "t0"}))
    assert confirm_seconds(log, SPEC, 5, 2) == 3 * 5 * 5 / 2
    assert confirm_seconds(log_of(tmp_path / "empty"), SPEC, 5, 2) == 0
