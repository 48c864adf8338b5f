"""The best trials and the baselines over folds: what runs, what a stop in the middle leaves, and what a limit does."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
import torch
from driven_jobs import BASELINES, TRIALS, Driver, begun, driven
from tiny_data import tiny_config, tiny_features

from imbvlm.features.feature_set import FeatureSet
from imbvlm.sweep.records.adjustment_selection import logits_file
from imbvlm.sweep.records.refit_selection import confirmed, folds_id
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.records.winner_selection import select_winner
from imbvlm.sweep.run.confirm_phase import confirm_over_folds
from imbvlm.training.validation_logits import read_logits


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return driven(monkeypatch)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    return tiny_features(tmp_path_factory.mktemp("features"))


def logits_of(folder: Path, trial_id: str) -> torch.Tensor:
    saved = read_logits(logits_file(str(folder), folds_id(trial_id)))
    assert saved is not None
    last = saved.last()
    assert last is not None
    return last


def test_a_stop_in_the_middle_leaves_what_has_ended_and_the_next_run_the_same_numbers(
    tmp_path: Path, features: FeatureSet, driver: Driver
) -> None:
    """Baselines that train nothing share a process, and trials of one shape train together."""
    whole = begun(tmp_path / "whole", features, max_pack_size=2)
    assert whole.context.confirm_folds == 5
    confirm_over_folds(whole)
    assert sorted(map(len, driver.groups)) == [1, 2, 2]
    assert set(confirmed(whole.log, whole.spec)) == {*TRIALS, *BASELINES}
    num_rows = len(whole.manifest.rows_of("train")) + len(whole.manifest.rows_of("val"))
    assert len(logits_of(tmp_path / "whole", "b00001")) == num_rows
    selection = select_winner(whole.folder, whole.log, whole.spec)
    assert selection is not None
    assert (selection.num_rows, selection.num_official) == (num_rows, len(whole.manifest.rows_of("val")))
    stopped, num_steps = begun(tmp_path / "stopped", features, max_pack_size=2), itertools.count()

    def stop(trial_ids: list[str]) -> None:
        if len(trial_ids) == 2 and trial_ids[0].startswith("t") and next(num_steps) == 1:
            raise KeyboardInterrupt

    driver.before_step = stop
    with pytest.raises(KeyboardInterrupt):
        confirm_over_folds(stopped)
    ended = {record.trial_id for record in TrialLog.read(stopped.folder).of("folds") if record.state == "finished"}
    assert not confirmed(TrialLog.read(stopped.folder), stopped.spec)
    driver.groups = []
    again = begun(tmp_path / "stopped", features, max_pack_size=2)
    confirm_over_folds(again)
    assert not ended & set(itertools.chain(*driver.groups)), "what has ended isn't run again"
    for trial_id in (*TRIALS, *BASELINES):
        expected = logits_of(tmp_path / "whole", trial_id)
        torch.testing.assert_close(logits_of(tmp_path / "stopped", trial_id), expected, atol=0.02, rtol=2e-3)
    assert confirmed(again.log, again.spec).keys() == confirmed(whole.log, whole.spec).keys()
    driver.groups = []
    confirm_over_folds(begun(tmp_path / "stopped", features))
    assert driver.groups == []


def test_a_run_that_fails_drops_its_trial_with_a_sentence(
    tmp_path: Path, features: FeatureSet, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = tiny_config("linear_probe", optim__lr=1e30, train__clip_grad_norm=None)
    monkeypatch.setitem(TRIALS, "t00002", diverging)
    printed = io.StringIO()
    run = begun(tmp_path, features, printed)
    confirm_over_folds(run)
    assert set(confirmed(run.log, run.spec)) == {"t00000", "t00001", *BASELINES}
    assert "1 run failed:" in printed.getvalue()
    assert "their trials are no candidates" in printed.getvalue()


def test_without_time_for_it_the_validation_images_alone_select(
    tmp_path: Path, features: FeatureSet, driver: Driver
) -> None:
    printed = io.StringIO()
    run = begun(tmp_path, features, printed, max_hours=0.01)
    run.context.count_spent(is_search=True)
    # Five folds of five trials of two seconds, one after the other.
    assert run.budget.confirm_seconds == 50
    run.budget.refit_seconds = 36.0
    confirm_over_folds(run)
    assert driver.groups == []
    assert not confirmed(run.log, run.spec)
    text = printed.getvalue()
    assert "5 of 5 runs over folds are left, so that the validation images alone select; go on with: imbvlm" in text
    assert "--set max_hours=MORE" in text


def test_nothing_is_scored_again_where_it_is_turned_off_or_the_objective_selects(
    tmp_path: Path, features: FeatureSet, driver: Driver
) -> None:
    for number, fields in enumerate(({"confirm_folds": None}, {"select_by": "objective"})):
        confirm_over_folds(begun(tmp_path / str(number), features, **fields))
    assert driver.groups == []
