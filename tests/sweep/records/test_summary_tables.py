"""What stands at the end of a sweep: percent, best first, baselines below, dashes for what isn't there."""

from __future__ import annotations

import pytest
from trial_epochs import set_metrics

from imbvlm.base.formatting import duration, percent
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.records import summary_tables
from imbvlm.sweep.records.adjustment_selection import NUM_BEST
from imbvlm.sweep.records.summary_tables import search_table
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog, TrialRecord, describe_trial
from imbvlm.sweep.spec.sweep_spec import SweepSpec

BASE = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}}
SPEC = SweepSpec.from_tree({"name": "s", "base": BASE, "space": {"parameters": {}}})


def record(
    trial_id: str, value: float, method: str = "linear_probe", kind: TrialKind = "search", name: str = ""
) -> TrialRecord:
    metrics = {"val/balanced_accuracy": value, "val/best_balanced_accuracy": value, "val/many_shot_accuracy": 0.5}
    worse = {**metrics, "val/balanced_accuracy": value / 2, "val/many_shot_accuracy": 0.9}
    return TrialRecord(
        trial_id=trial_id,
        kind=kind,
        name=name,
        state="finished",
        config=TrialConfig.from_tree({**BASE, "method": method}).to_tree(),
        epochs=[{"epoch": 1.0, **metrics}, {"epoch": 2.0, **worse}],
    )


def test_best_trials_then_baselines_at_their_best_epochs() -> None:
    log = TrialLog("unused")
    for number in range(12):
        log.records[f"t{number:05d}"] = record(f"t{number:05d}", 0.5 + number / 100)
    log.records["b00001"] = record("b00001", 0.9, "zero_shot", "baseline", "zero-shot")
    lines = search_table(log, SPEC).splitlines()
    assert lines[1].split() == ["trial", "what", "epochs", "views", "overall", "balanced", "many", "medium", "few"]
    rows = lines[3:]
    assert [row.split()[0] for row in rows] == [f"t{number:05d}" for number in range(11, 11 - NUM_BEST, -1)] + [
        "b00001"
    ]
    # The best epoch's balanced and many-shot accuracy; no class is medium- or few-shot, and that is no 0.
    assert rows[0].split()[-6:] == ["1", "-", "61.0", "50.0", "-", "-"]
    assert "zero-shot" in rows[-1]


def test_a_stopped_trial_among_the_best_is_marked() -> None:
    log = TrialLog("unused")
    log.records = {"t1": record("t1", 0.6), "t2": record("t2", 0.5)}
    log.records["t1"].state = "stopped"
    first, second = search_table(log, SPEC).splitlines()[3:]
    assert "(stopped early)" in first
    assert "stopped" not in second


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (
            0.04,
            "the winner is +4.0 points from the baseline probe on validation (95 % interval -1.5 to +9.5): no win",
        ),
        (0.06, "the winner is 6.0 points above the baseline probe on validation (95 % interval +0.5 to +11.5)"),
        (-0.01, "the winner does not beat the baseline probe on validation (-1.0 points, 95 % interval -6.5 to +4.5)"),
    ],
)
def test_a_win_on_validation_is_beyond_the_95_percent_interval(gain: float, words: str) -> None:
    """4 points were called above at 1.4 standard errors of the difference; each has one of 2 points."""
    log = TrialLog("unused")
    log.records = {"t1": record("t1", 0.5 + gain), "b1": record("b1", 0.5, "linear_probe", "baseline", "probe")}
    for one in log.records.values():
        set_metrics(one, {"val/balanced_standard_error": 0.02}, 0)
    assert summary_tables.verdict(log, SPEC, None).startswith(words)


def test_a_trial_in_a_few_words() -> None:
    config = TrialConfig.from_tree({**BASE, "method": "decoder", "loss": {"name": "focal", "gamma": 1.234}})
    one = TrialRecord(trial_id="t", kind="search", config=config.to_tree())
    assert describe_trial(one) == "decoder depth 3, focal gamma 1.23, cosine 0.04, instance balanced, lr 0.03"
    one.draw = {"encoder.name": "openai_vit_b16", "encoder.image_size": 336, "optim.lr": 0.03}
    assert describe_trial(one).startswith("decoder depth 3 openai_vit_b16 at 336 px, focal gamma 1.23, ")
    one.draw = {"encoder.image_size": None}
    assert describe_trial(one).startswith("decoder depth 3 at its own size, focal gamma 1.23, ")
    one.draw = {}
    mixed = {"method": "adapter", "mixing": {"cutmix": 0.5}, "loss": {"name": "cross_entropy"}}
    one.config = TrialConfig.from_tree({**BASE, **mixed}).to_tree()
    assert describe_trial(one) == "adapter, cross entropy, cosine 0.04, instance balanced, lr 0.03, cutmix 0.5"
    one.config = TrialConfig.from_tree({**BASE, "method": "zero_shot"}).to_tree()
    assert describe_trial(one) == "zero shot"
    one.config = TrialConfig.from_tree({**BASE, "method": "discriminant"}).to_tree()
    assert describe_trial(one) == "discriminant"
    one.epochs = [{"epoch": 1.0, "discriminant/shrinkage": 0.2}]
    assert describe_trial(one) == "discriminant, shrinkage 0.2"


def failed(*reasons: str) -> list[TrialRecord]:
    config = TrialConfig.from_tree({**BASE, "method": "zero_shot"}).to_tree()
    return [
        TrialRecord(trial_id=f"t{number}", kind="search", state="failed", stop_reason=reason, config=config)
        for number, reason in enumerate(reasons)
    ]


def test_causes_that_differ_in_numbers_ids_or_paths_alone_are_one() -> None:
    """Six trials that diverge at six steps would be five lines of one, and the sixth dropped."""
    diverged = [f"the loss wasn't finite at step {step:,} (lr {step / 7:.3g})" for step in (12, 1700, 3, 40, 5, 6, 12)]
    lost = [
        f"ActorDiedError: {actor} on 10.0.0.{actor[0]} can't read s3://b/{actor}.bin"
        for actor in ("4fa9e1c0", "77bc01de")
    ]
    lines = summary_tables.failure_causes(failed(*lost, *diverged, "its worker was lost")).splitlines()
    assert lines == [
        "10 trials failed:",
        "  7 x the loss wasn't finite at step 12 (lr 1.71) (with other numbers or names in the others)",
        f"  2 x {lost[0]} (with other numbers or names in the others)",
        "  1 x its worker was lost",
    ]


def test_causes_beyond_the_commonest_are_counted_and_unlike_words_stay_apart() -> None:
    letters = "abcdefgh"
    lines = summary_tables.failure_causes(
        failed(*(f"the {letter} failed" for letter in letters), "the a failed"), "refit"
    ).splitlines()
    assert lines[:2] == ["9 refits failed:", "  2 x the a failed"]
    assert lines[-1] == "  3 x 3 other causes; each record in trials/ has its own"
    assert summary_tables.failure_causes(failed("the a failed")) == "1 trial failed:\n  1 x the a failed"


def test_the_test_split_is_a_mean_over_seeds_with_its_deviation() -> None:
    scored = []
    for seed, value in enumerate((0.70, 0.72, 0.74)):
        one = record(f"refit-{seed}", 0.1, kind="refit", name="winner")
        one.epochs = [{"epoch": 1.0}, {"epoch": 2.0, "test/top1_accuracy": value, "test/few_shot_accuracy": 0.5}]
        scored.append(one)
    single = record("refit-zero", 0.1, "zero_shot", "refit", "zero-shot")
    single.epochs = [{"epoch": 1.0, "test/top1_accuracy": 0.6}]
    delivered = record("delivered", 0.1, kind="delivered", name="delivered")
    delivered.epochs = scored[-1].epochs
    lines = summary_tables.scores_table([single, *scored, delivered]).splitlines()
    assert "standard deviation" in lines[0]
    # In this order, whatever was scored first.
    assert [line.split("  ")[0] for line in lines[3:]] == ["delivered", "winner", "zero-shot"]
    assert "72.0 ± 2.0" in lines[4]
    assert "50.0 ± 0.0" in lines[4]
    assert lines[5].split()[-6:] == ["1", "60.0", "-", "-", "-", "-"]


def test_five_crops_have_a_row_of_their_own() -> None:
    one = record("refit-0", 0.1, kind="refit", name="winner")
    one.epochs = [{"epoch": 1.0, "test/top1_accuracy": 0.7, "test_tte/top1_accuracy": 0.73}]
    lines = summary_tables.scores_table([one]).splitlines()
    assert [line.split("  ")[0] for line in lines[3:]] == ["winner", "winner, five crops"]
    assert lines[4].split()[-5] == "73.0"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (-3, "0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percent() -> None:
    assert percent(0.12345) == "12.3"
    assert percent(None) == "-"
