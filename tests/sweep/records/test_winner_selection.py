"""The winner by class-balanced log-likelihood: of trials and baselines alike, and what may be claimed of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sweep_folder import sweep_spec
from trial_epochs import set_metrics

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.trial_config import TrialConfig
from imbvlm.longtail.metrics import balanced_standard_error
from imbvlm.sweep.records import winner_selection
from imbvlm.sweep.records.adjustment_selection import logits_file, prune_logits, select_adjustments
from imbvlm.sweep.records.difference import verdict_on_test
from imbvlm.sweep.records.refit_selection import folds_id, refits
from imbvlm.sweep.records.summary_tables import verdict
from imbvlm.sweep.records.trial_log import SELECTION_FILE, WINNER, TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.records.winner_selection import (
    describe_selection,
    read_selection,
    select_winner,
    write_selection,
)
from imbvlm.sweep.spec.sweep_spec import SweepSpec

COUNTS = (300, 80, 30, 12, 5)
BEST = "val/best_balanced_accuracy"


def logits(seed: int, noise: float, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(targets()), len(COUNTS))
    return scale * (
        2 * torch.nn.functional.one_hot(targets(), len(COUNTS)) + noise * torch.randn(shape, generator=generator)
    )


def targets() -> torch.Tensor:
    return torch.arange(len(COUNTS)).repeat(40)


def add(
    log: TrialLog,
    trial_id: str,
    value: float,
    last: torch.Tensor,
    kind: TrialKind = "search",
    name: str = "",
    state: str = "finished",
    **fields: Any,
) -> TrialRecord:
    config = TrialConfig.from_tree({"data": {"manifest": "m"}, "encoder": {"name": "tiny"}, "method": "linear_probe"})
    record = TrialRecord(trial_id=trial_id, kind=kind, state=state, name=name, config=config.to_tree(), **fields)
    epoch = {"epoch": 1.0, "val/balanced_accuracy": value, BEST: value}
    record.epochs = [epoch]
    log.save(record)
    path = Path(logits_file(log.folder, trial_id))
    path.parent.mkdir(exist_ok=True)
    counts = {"class_counts": torch.tensor(COUNTS), "split_counts": torch.tensor(COUNTS)}
    which = "best" if kind == "baseline" else "last"
    epochs = torch.tensor([1, 0] if kind == "baseline" else [0, 1])
    save_file({which: last.half(), "targets": targets().int()[: len(last)], "epochs": epochs, **counts}, path)
    return record


@pytest.fixture
def log(tmp_path: Path) -> TrialLog:
    return TrialLog(str(tmp_path))


@pytest.fixture
def spec() -> SweepSpec:
    return sweep_spec()


FOLDS = 5


def train_targets() -> torch.Tensor:
    """Those of the training images, fold after fold."""
    labels = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    return torch.cat([labels[fold::FOLDS] for fold in range(FOLDS)])


def fold_numbers() -> torch.Tensor:
    sizes = torch.tensor([len(range(fold, sum(COUNTS), FOLDS)) for fold in range(FOLDS)])
    return torch.arange(FOLDS).repeat_interleave(sizes)


def train_logits(seed: int, noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    right = 2.0 * torch.nn.functional.one_hot(train_targets(), len(COUNTS))
    return right + noise * torch.randn(right.shape, generator=generator)


def add_folds(
    log: TrialLog, trial_id: str, of_train: torch.Tensor, of_official: torch.Tensor, state: str = "finished"
) -> None:
    """A trial's run over folds."""
    update = {"trial_id": folds_id(trial_id), "kind": "folds", "name": trial_id, "state": state}
    log.save(log.records[trial_id].model_copy(deep=True, update=update))
    labels, folds = torch.cat([train_targets(), targets()]), fold_numbers()
    scored = torch.stack([train_targets()[folds == fold].bincount(minlength=len(COUNTS)) for fold in range(FOLDS)])
    save_file(
        {
            "last": torch.cat([of_train, of_official]).half(),
            "targets": labels.int(),
            "folds": torch.cat([folds, torch.full((len(targets()),), FOLDS)]).int(),
            "epochs": torch.tensor([0, 1]),
            "class_counts": torch.tensor(COUNTS) - scored,
            "split_counts": torch.tensor(COUNTS),
        },
        logits_file(log.folder, folds_id(trial_id)),
    )


def selected(log: TrialLog, spec: SweepSpec) -> Any:
    return select_winner(log.folder, log, spec)


def test_the_log_likelihood_selects_and_the_objective_does_not(log: TrialLog, spec: SweepSpec) -> None:
    """A lucky trial has the highest accuracy of its best epoch, and the other one the better probabilities."""
    add(log, "t00001", 0.9, logits(0, 2.0))
    add(log, "t00002", 0.8, logits(1, 1.0))
    selection = selected(log, spec)
    assert selection.winner == "t00002"
    assert selection.log_likelihoods["t00002"] > selection.log_likelihoods["t00001"]
    write_selection(log.folder, selection)
    assert read_selection(log.folder) == selection
    again = TrialLog.read(log.folder)
    assert again.winner(spec.objective).trial_id == "t00002"
    assert [record.trial_id for record in again.winner_first(spec.objective)] == ["t00002", "t00001"]
    assert [record.trial_id for record in again.best(spec.objective)] == ["t00001", "t00002"], "tables stay sorted"
    assert refits(again, spec)[0].record.trial_id == "t00002"
    text = describe_selection(selection, again, spec, has_test=True)
    assert "selected by class-balanced log-likelihood on 200 validation images: t00002" in text
    assert "the best trial by balanced_accuracy is t00001" in text


def test_the_scale_of_logits_and_the_prior_of_training_decide_nothing(log: TrialLog, spec: SweepSpec) -> None:
    plain = logits(0, 1.0)
    add(log, "t00001", 0.8, plain)
    add(log, "t00002", 0.8, 7 * plain)
    add(log, "t00003", 0.5, plain + torch.tensor(COUNTS).log())
    likelihoods = selected(log, spec).log_likelihoods
    assert likelihoods["t00002"] == pytest.approx(likelihoods["t00001"], abs=0.02)
    assert likelihoods["t00003"] == pytest.approx(likelihoods["t00001"], abs=0.02)


def test_a_baseline_may_win_and_then_no_win_is_shown(log: TrialLog, spec: SweepSpec) -> None:
    add(log, "b00001", 0.8, logits(0, 1.0), "baseline", "linear probe")
    add(log, "t00001", 0.9, logits(1, 3.0))
    selection = selected(log, spec)
    assert selection.winner == "b00001"
    assert "the baseline b00001" in describe_selection(selection, log, spec, has_test=True)
    log.selected = selection.selected
    sentence = verdict(log, spec, selection)
    assert sentence.startswith("validation selects the baseline linear probe by log-likelihood; try more")
    log.selected = replace(selection.selected, members=("b00001", "t00001"))
    assert verdict(log, spec, None).endswith("is the baseline linear probe, and the blend beats it")
    log.selected = selection.selected
    assert log.best_trial(spec.objective).trial_id == "t00001"
    chosen = refits(log, spec)
    assert [(refit.name, refit.record.trial_id) for refit in chosen] == [(WINNER, "b00001"), ("linear probe", "b00001")]
    refit = add(log, "refit-winner-seed0", 0.9, logits(0, 1.0), "refit", WINNER)
    on_test = verdict_on_test(log, [refit], "the winner", spec.objective)
    assert not on_test.is_win
    assert on_test.statement == "No win is shown: validation selected the baseline linear probe itself."


def test_trials_that_err_apart_are_delivered_as_a_blend(log: TrialLog, spec: SweepSpec) -> None:
    for number in range(3):
        add(log, f"t{number:05d}", 0.8, logits(number, 1.0))
    selection = selected(log, spec)
    assert {member.name for member in selection.members} == {"t00000", "t00001", "t00002"}
    assert selection.decisions[0].gain > 0
    write_selection(log.folder, selection)
    assert read_selection(log.folder) == selection
    again = TrialLog.read(log.folder)
    assert again.selected == selection.selected
    assert {refit.record.trial_id for refit in refits(again, spec)} == {"t00000", "t00001", "t00002"}
    text = describe_selection(selection, again, spec, has_test=True)
    assert re.search(
        r"delivered is a blend of t0000\d 0\.\d\d, .*; gain in log-likelihood on images that selected neither .*: \+",
        text,
    )
    alone = selected(log, sweep_spec(blend=None))
    assert (alone.members, alone.decisions) == ((), ())
    assert selection.claims["balanced_accuracy"].value > alone.claims["balanced_accuracy"].value


def test_where_nothing_is_gained_the_winner_is_delivered_alone(log: TrialLog, spec: SweepSpec) -> None:
    """Readers of the folder took the best single trial for a blend of one."""
    add(log, "b00001", 0.8, logits(0, 1.0), "baseline", "linear probe")
    add(log, "t00001", 0.8, 7 * logits(0, 1.0))
    selection = selected(log, spec)
    assert selection.members == ()
    assert "no blend, since none is better: gain in log-likelihood" in describe_selection(
        selection, log, spec, has_test=True
    )
    write_selection(log.folder, selection)
    assert read_selection(log.folder) == selection
    again = TrialLog.read(log.folder)
    assert again.selected == selection.selected
    assert "the blend" not in verdict(again, spec, selection)


def set_groups(log: TrialLog, num_groups: int) -> None:
    """Give the saved rows of all trials groups, as a manifest with groups does; each trial's last epoch is its best."""
    for path in Path(logits_file(log.folder, "x")).parent.iterdir():
        tensors = load_file(path)
        tensors["best"], tensors["epochs"] = tensors.pop("last", tensors.get("best")), torch.tensor([1, 1])
        save_file({**tensors, "groups": torch.arange(len(tensors["targets"])) % num_groups}, path)


@pytest.mark.parametrize(
    ("num_groups", "words"),
    [
        (40, "balanced \\d\\d.\\d ± \\d.\\d over 5 classes, 40 groups resampled"),
        (6, "balanced not known .no interval over 5 classes, 6 groups are too few for one, it takes 10."),
    ],
)
def test_claims_and_verdict_on_images_in_groups_are_of_groups(
    log: TrialLog, spec: SweepSpec, num_groups: int, words: str
) -> None:
    add(log, "b00001", 0.6, logits(5, 4.0), "baseline", "linear probe")
    add(log, "t00001", 0.8, logits(0, 0.7))
    plain = selected(log, spec)
    set_groups(log, num_groups)
    selection = selected(log, spec)
    assert plain.claims["balanced_accuracy"].num_groups is None
    assert re.search(words, describe_selection(selection, log, spec, has_test=False)), selection.claims
    write_selection(log.folder, selection)
    assert read_selection(log.folder) == selection
    note = "40 groups resampled" if num_groups == 40 else "its 95 % interval isn't known: 6 groups are too few for one"
    log.selected = selection.selected
    assert note in verdict(log, spec, selection)
    assert note in verdict(log, spec, None)


def test_claims_need_two_groups(log: TrialLog, spec: SweepSpec) -> None:
    add(log, "t00001", 0.8, logits(0, 1.0))
    set_groups(log, 1)
    assert selected(log, spec).claims == {}


def test_a_blend_whose_test_logits_take_too_much_memory_is_not_sought(log: TrialLog, spec: SweepSpec) -> None:
    add(log, "t00001", 0.8, logits(0, 1.0))
    add(log, "t00002", 0.8, logits(1, 1.0))
    selection = select_winner(log.folder, log, spec, num_test=10**9)
    assert selection.members == ()
    text = describe_selection(selection, log, spec, has_test=True)
    assert "no blend was sought: the logits of 1,000,000,000 test images in 5 classes take too much memory" in text


def test_trials_that_did_not_end_or_violate_a_constraint_are_no_candidates(log: TrialLog) -> None:
    spec = sweep_spec(constraints={"val/few_shot_accuracy": 0.5})
    log.constraints = spec.constraints
    set_metrics(add(log, "t00001", 0.9, logits(0, 0.5), state="stopped"), {"val/few_shot_accuracy": 0.9}, 0)
    set_metrics(add(log, "t00002", 0.9, logits(1, 0.5)), {"val/few_shot_accuracy": 0.2}, 0)
    set_metrics(add(log, "t00003", 0.7, logits(2, 2.0)), {"val/few_shot_accuracy": 0.6}, 0)
    assert list(selected(log, spec).log_likelihoods) == ["t00003"]


def test_further_seeds_count_by_their_mean(log: TrialLog, spec: SweepSpec) -> None:
    add(log, "t00001", 0.9, logits(0, 1.0))
    add(log, "t00002", 0.8, logits(1, 1.1))
    assert selected(log, spec).winner == "t00001"
    add(log, "t00001-seed1", 0.5, logits(2, 3.0), "confirm", "t00001")
    add(log, "t00002-seed1", 0.8, logits(3, 1.1), "confirm", "t00002")
    selection = selected(log, spec)
    assert selection.winner == "t00002"
    assert set(selection.log_likelihoods) == {"t00001", "t00002"}


@pytest.mark.parametrize("fields", [{"select_by": "objective"}, {"objective": "val/few_shot_accuracy"}])
def test_a_user_may_select_by_the_objective(log: TrialLog, fields: dict[str, str]) -> None:
    record = add(log, "t00001", 0.9, logits(0, 1.0))
    set_metrics(record, {"val/best_few_shot_accuracy": 0.5}, 0)
    assert selected(log, sweep_spec(**fields)) is None
    assert selected(log, sweep_spec(objective="val/few_shot_accuracy", select_by="log_likelihood")) is not None


def test_without_logits_the_objective_selects(log: TrialLog, spec: SweepSpec) -> None:
    record = add(log, "t00001", 0.9, logits(0, 1.0))
    Path(logits_file(log.folder, "t00001")).unlink()
    assert selected(log, spec) is None
    assert log.winner(spec.objective) is record


def test_claims_are_of_the_selection_and_below_the_best_of_many(log: TrialLog, spec: SweepSpec) -> None:
    """Twenty equally good trials: the best one's own accuracy is luck, and the claim isn't."""
    accuracies = []
    for number in range(20):
        values = logits(number, 2.0)
        add(log, f"t{number:05d}", 0.5, values)
        accuracies.append(float((values.argmax(dim=1) == targets()).double().mean()))
    claim = selected(log, sweep_spec(blend=None)).claims["balanced_accuracy"]
    truth = sum(accuracies) / len(accuracies)
    assert claim.value == pytest.approx(truth, abs=0.03)
    assert claim.value < max(accuracies)
    right = torch.full((len(COUNTS),), int(40 * truth)).numpy()
    assert claim.standard_error == pytest.approx(balanced_standard_error(right, 0 * right + 40), rel=0.1)
    assert claim.num_rows == len(targets())


def test_a_win_is_over_the_best_baseline_as_adjusted(log: TrialLog, spec: SweepSpec) -> None:
    """The prior alone cost a probe 30 points, and the winner was said to be so far above it."""
    plain = logits(0, 1.0)
    add(log, "b00001", 0.5, plain + torch.tensor(COUNTS).log(), "baseline", "linear probe")
    add(log, "b00002", 0.6, logits(1, 4.0), "baseline", "class means")
    add(log, "t00001", 0.9, logits(0, 0.98))
    selection = selected(log, sweep_spec(blend=None))
    log.selected = selection.selected
    assert (selection.winner, selection.baseline) == ("t00001", "b00001")
    assert selection.gain.low <= 0 <= selection.gain.high
    assert re.fullmatch(
        r"the winner is [+-]\d\.\d points from the baseline linear probe in balanced accuracy on validation, both as "
        r"adjusted, corrected for the selection \(95 % interval [+-]\d\.\d to [+-]\d\.\d\): no win is shown"
        r"(; try more trials or another space)?",
        verdict(log, spec, selection),
    )
    add(log, "t00002", 0.7, logits(0, 0.5))
    selection = selected(log, sweep_spec(blend=None))
    log.selected = selection.selected
    assert selection.gain.low > 0
    assert "points above the baseline linear probe in balanced accuracy" in verdict(log, spec, selection)
    write_selection(log.folder, selection)
    assert read_selection(log.folder) == selection


def test_of_equally_good_trials_the_best_has_no_gain_over_a_baseline(
    log: TrialLog, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own rows the best of twenty seems to be better."""
    values = {f"t{number:05d}": logits(number, 2.0) for number in range(20)}
    add(log, "b00001", 0.5, logits(100, 2.0), "baseline", "linear probe")
    for trial_id, own in values.items():
        add(log, trial_id, 0.5, own)
    selection = selected(log, sweep_spec(blend=None))
    naive, base = (
        float((own.argmax(dim=1) == targets()).double().mean()) for own in (values[selection.winner], logits(100, 2.0))
    )
    assert selection.gain.difference < naive - base - 0.02
    assert selection.gain.low <= 0
    with_test = select_winner(log.folder, log, spec, num_test=10)
    assert with_test.claims == {}
    assert with_test.gain is not None
    monkeypatch.setattr(winner_selection, "MAX_GAIN_ELEMENTS", 20_000)
    assert select_winner(log.folder, log, spec, num_test=10).gain is None
    assert selected(log, spec).gain is not None


def test_a_claim_wider_than_ten_points_is_no_number(log: TrialLog, spec: SweepSpec) -> None:
    add(log, "t00001", 0.9, logits(0, 1.0)[:15])
    selection = selected(log, spec)
    text = describe_selection(selection, log, spec, has_test=False)
    assert "to expect of images like these (95 %, corrected for the selection): balanced not known (± " in text
    assert "over 5 classes)" in text
    assert "to expect" not in describe_selection(selection, log, spec, has_test=True)


def test_a_damaged_file_says_how_to_go_on(log: TrialLog) -> None:
    assert read_selection(log.folder) is None
    Path(log.folder, SELECTION_FILE).write_text(json.dumps({"winner": "t1"}))
    with pytest.raises(ImbvlmError, match=r"is damaged .* imbvlm sweep resume "):
        read_selection(log.folder)


# ---------------------------------------------------------------------------------------------------- confirming folds


def test_rows_of_folds_and_official_rows_select_together(log: TrialLog, spec: SweepSpec) -> None:
    """The official rows alone prefer the other trial; the value is checked in float64, temperature by search."""
    add(log, "b00001", 0.5, logits(5, 3.0), "baseline", "linear probe")
    add(log, "t00001", 0.9, logits(0, 1.0))
    add(log, "t00002", 0.8, logits(1, 1.1))
    alone = selected(log, spec)
    assert (alone.winner, alone.num_official) == ("t00001", 0)
    prior = 0.9 * torch.tensor(COUNTS).log()
    of_folds = {
        "b00001": (train_logits(5, 3.0), logits(5, 3.0)),
        "t00001": (train_logits(0, 2.5), logits(0, 1.0)),
        "t00002": (train_logits(1, 1.0) + prior, logits(1, 1.1) + prior),
    }
    for trial_id, parts in of_folds.items():
        add_folds(log, trial_id, *parts)
    selection = selected(log, spec)
    assert selection.winner == "t00002"
    assert (selection.num_rows, selection.num_official, selection.num_folds) == (427 + 200, 200, FOLDS)
    write_selection(log.folder, selection)
    assert read_selection(log.folder) == selection
    text = describe_selection(selection, log, spec, has_test=True)
    assert "on 427 training images over 5 folds and 200 validation images: t00002" in text
    assert "the best trial by balanced_accuracy is t00001 (-" in text
    assert "by models of 80 % of the training images" in describe_selection(selection, log, spec, has_test=False)
    log.selected = selection.selected
    (winner, *_) = refits(log, spec)
    tau = select_adjustments(log.folder, [winner], log, spec)[WINNER].adjustment.tau
    assert tau == pytest.approx(0.9, abs=0.2)
    counts = torch.tensor(COUNTS) - torch.stack(
        [train_targets()[fold_numbers() == fold].bincount(minlength=len(COUNTS)) for fold in range(FOLDS)]
    )
    log_counts = counts.double().clamp(min=0.5).log()
    of_rows = torch.cat([log_counts[fold_numbers()], log_counts.mean(dim=0).expand(200, -1)])
    adjusted = torch.cat(of_folds["t00002"]).half().double() - tau * of_rows
    labels = torch.cat([train_targets(), targets()])
    weights = 1 / (labels.bincount().double()[labels] * len(COUNTS))
    values = [
        float((weights * (adjusted / temperature).log_softmax(dim=1)[torch.arange(627), labels]).sum())
        for temperature in np.geomspace(0.2, 5, 2000)
    ]
    assert selection.log_likelihoods["t00002"] == pytest.approx(max(values), abs=2e-4)


def test_before_all_runs_over_folds_have_ended_the_official_rows_select(log: TrialLog, spec: SweepSpec) -> None:
    """A sweep whose time was up had selected among the few that were scored."""
    add(log, "t00001", 0.9, logits(0, 1.0))
    add(log, "t00002", 0.8, logits(1, 1.1))
    before = selected(log, spec)
    add_folds(log, "t00002", train_logits(1, 1.0), logits(1, 1.1))
    assert selected(log, spec) == before
    add_folds(log, "t00001", train_logits(0, 2.5), logits(0, 1.0), state="running")
    assert selected(log, spec) == before
    log.records[folds_id("t00001")].state = "finished"
    assert selected(log, spec).winner == "t00002"


def test_a_trial_whose_run_over_folds_failed_is_no_candidate(log: TrialLog, spec: SweepSpec) -> None:
    add(log, "t00001", 0.9, logits(0, 1.0))
    add(log, "t00002", 0.8, logits(1, 1.5))
    before = selected(log, spec)
    add_folds(log, "t00001", train_logits(0, 1.0), logits(0, 1.0), state="failed")
    add_folds(log, "t00002", train_logits(1, 1.5), logits(1, 1.5))
    selection = selected(log, spec)
    assert list(selection.log_likelihoods) == ["t00002"]
    text = describe_selection(selection, log, spec, has_test=True)
    assert "the best trial by balanced_accuracy is t00001 (which wasn't scored over folds)" in text
    log.records[folds_id("t00002")].state = "failed"
    assert selected(log, spec) == before, "where all failed the official rows select"


@pytest.mark.parametrize(("noise", "winner"), [(0.8, "t00002"), (1.6, "t00001")])
def test_a_trial_that_trains_the_encoder_is_compared_on_the_official_rows(
    log: TrialLog, spec: SweepSpec, noise: float, winner: str
) -> None:
    """Its official rows are easier than the training rows of folds, on which nothing scored it."""
    add(log, "t00001", 0.9, logits(0, 1.2))
    record = add(log, "t00002", 0.8, logits(1, noise))
    record.config["method"] = "fine_tuning"
    log.records["t00002"].config = TrialConfig.from_tree(
        {"data": {"manifest": "m"}, "encoder": {"name": "tiny"}, "method": "fine_tuning"}
    ).to_tree()
    add_folds(log, "t00001", train_logits(0, 3.0), logits(0, 1.2))
    selection = selected(log, spec)
    assert selection.log_likelihoods["t00001"] < selection.log_likelihoods["t00002"]
    assert selection.winner == winner
    assert (selection.num_official > 0) == (winner == "t00001")


def test_more_seeds_over_folds_count_by_their_mean(log: TrialLog, spec: SweepSpec) -> None:
    add(log, "t00001", 0.9, logits(0, 1.0))
    add(log, "t00002", 0.8, logits(1, 1.1))
    for number, (trial_id, noise) in enumerate((("t00001", 3.0), ("t00002", 1.1))):
        add(log, f"{trial_id}-seed1", 0.5, logits(2 + number, 1.0), "confirm", trial_id)
        add_folds(log, trial_id, train_logits(number, 1.0 + number / 10), logits(number, 1.0))
        add_folds(log, f"{trial_id}-seed1", train_logits(2 + number, noise), logits(2 + number, noise))
    selection = selected(log, spec)
    assert selection.winner == "t00002"
    assert set(selection.log_likelihoods) == {"t00001", "t00002"}


def test_a_blend_is_decided_on_over_folds_that_official_rows_have_joined(log: TrialLog, spec: SweepSpec) -> None:
    for number in range(3):
        add(log, f"t{number:05d}", 0.8, logits(number, 1.0))
        add_folds(log, f"t{number:05d}", train_logits(number, 1.0), logits(number, 1.0))
    selection = selected(log, spec)
    assert {member.name for member in selection.members} == {"t00000", "t00001", "t00002"}
    assert selection.decisions[0].gain > 0


def test_logits_of_runs_over_folds_stay_for_exports(log: TrialLog, spec: SweepSpec) -> None:
    add(log, "t00001", 0.9, logits(0, 1.0))
    add_folds(log, "t00001", train_logits(0, 1.0), logits(0, 1.0))
    prune_logits(log.folder, log, spec, is_over=True)
    assert Path(logits_file(log.folder, folds_id("t00001"))).exists()
