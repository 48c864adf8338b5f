"""Records that survive a restart, a value that is never NaN, and a typed table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trial_records import BASE, BEST, OBJECTIVE, log_of, record

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.records.trial_parquet import ROWS_AT_ONCE, table_parts, write_results_table

# ------------------------------------------------------------------------------------------------------- values


def test_the_value_is_the_best_epochs_and_not_the_last() -> None:
    trial = record("t1", [0.2, 0.5, 0.4])
    assert trial.best_value(BEST) == 0.5
    best = trial.best_epoch(OBJECTIVE)
    assert best is not None
    assert best["epoch"] == 2


def test_the_first_of_equal_epochs_is_the_best() -> None:
    best = record("t1", [0.5, 0.5]).best_epoch(OBJECTIVE)
    assert best is not None
    assert best["epoch"] == 1


@pytest.mark.parametrize("state", ["running", "failed", "error"])
def test_what_has_not_ended_well_has_no_value(state: str) -> None:
    assert record("t1", [0.9], state=state).best_value(BEST) is None


def test_nan_and_inf_are_never_best(tmp_path: Path) -> None:
    strange = record("t1", [0.3])
    strange.epochs += [{"epoch": 2.0, OBJECTIVE: math.nan, BEST: math.nan}, {"epoch": 3.0, BEST: math.inf}]
    nothing = record("t2", [])
    nothing.epochs = [{"epoch": 1.0, OBJECTIVE: math.nan, BEST: math.nan}]
    log = log_of(tmp_path, strange, nothing, record("t3", [0.4]), record("t4", [0.9], state="failed"))
    assert strange.best_value(BEST) == 0.3
    assert nothing.best_value(BEST) is None
    assert nothing.best_epoch(OBJECTIVE) is None
    assert [trial.trial_id for trial in log.best(OBJECTIVE)] == ["t3", "t1"]


def test_the_best_come_first_ties_by_age_and_each_kind_apart(tmp_path: Path) -> None:
    log = log_of(
        tmp_path,
        record("t00002", [0.5]),
        record("t00003", [0.7], state="stopped"),
        record("t00001", [0.5]),
        record("b00001", [0.9], kind="baseline"),
    )
    assert [trial.trial_id for trial in log.best(OBJECTIVE)] == ["t00003", "t00001", "t00002"]
    assert [trial.trial_id for trial in log.best(OBJECTIVE, "baseline")] == ["b00001"]
    assert [trial.trial_id for trial in log.of("search")] == ["t00001", "t00002", "t00003"]


# ------------------------------------------------------------------------------------------------------ records


def test_with_more_seeds_the_best_mean_wins_and_one_lucky_seed_does_not(tmp_path: Path) -> None:
    lucky, steady, third = record("t1", [0.9]), record("t2", [0.85]), record("t3", [0.8])
    again = [("t1", 1, 0.5), ("t1", 2, 0.6), ("t2", 1, 0.84), ("t2", 2, 0.86)]
    confirmed = [record(f"{name}-seed{seed}", [value], kind="confirm", name=name) for name, seed, value in again]
    log = log_of(tmp_path, lucky, steady, third, *confirmed)
    assert [trial.trial_id for trial in log.best(OBJECTIVE)] == ["t2", "t1", "t3"]
    assert [trial.trial_id for trial in log.ranked(OBJECTIVE)] == ["t1", "t2", "t3"]
    assert log.seed_values(lucky, OBJECTIVE) == [0.9, 0.5, 0.6]
    # A seed that fails is no reason to look at the others alone; one that still runs is not there yet.
    failing = log_of(
        tmp_path / "b",
        record("t1", [0.9]),
        record("t1-seed1", [0.9], kind="confirm", name="t1", state="failed"),
        record("t2", [0.6]),
        record("t2-seed1", [0.6], kind="confirm", name="t2"),
        record("t2-seed2", [0.1], kind="confirm", name="t2", state="running"),
    )
    assert [trial.trial_id for trial in failing.best(OBJECTIVE)] == ["t2", "t1"]


def test_a_run_with_the_trials_own_seed_is_no_further_seed(tmp_path: Path) -> None:
    """An older sweep may have one: it gives the trial's number once more."""
    again = [("t1-seed0", 0.9), ("t1-seed1", 0.5)]
    confirmed = [record(trial_id, [value], kind="confirm", name="t1") for trial_id, value in again]
    log = log_of(tmp_path, record("t1", [0.9]), *confirmed)
    assert log.seed_values(log.records["t1"], OBJECTIVE) == [0.9, 0.5]


def test_records_are_read_back_as_they_were(tmp_path: Path) -> None:
    trial = record("t00001", [0.25, 0.5], draw={"optim.lr": 0.1, "decoder.width": None}, started_at=1.5, ended_at=3.0)
    log_of(tmp_path, trial, record("t00002", [], state="running"))
    again = TrialLog.read(str(tmp_path))
    assert again.records["t00001"] == trial
    assert again.records["t00001"].trial_config() == trial.trial_config()
    assert again.records["t00002"].state == "running"
    assert trial.seconds() == 1.5


def test_a_diverged_trial_is_read_back_too(tmp_path: Path) -> None:
    """JSON has no NaN: as null the whole sweep could not be resumed any more."""
    trial = record("t00001", [0.5], state="failed")
    trial.epochs.append({"epoch": 2.0, "train/loss": math.nan, "train/grad_norm": math.inf})
    log_of(tmp_path, trial)
    json.loads((tmp_path / "trials" / "t00001.json").read_text(), parse_constant=pytest.fail)
    read = TrialLog.read(str(tmp_path)).records["t00001"].epochs[1]
    assert math.isnan(read["train/loss"])
    assert read["train/grad_norm"] == math.inf


def test_thousands_of_records_share_what_is_equal(tmp_path: Path) -> None:
    """At 17 kB a record the driver of 10,000 trials grew by 170 MB."""
    trials = [record(f"t{number:05d}", [0.1, 0.2], draw={"optim.lr": 1e-3 * number}) for number in range(1, 3)]
    log = log_of(tmp_path, *trials)
    log.add_epoch("t00001", {"epoch": 3.0, OBJECTIVE: 0.25})
    (first, second), tree = log.of("search"), trials[0].trial_config().to_tree()
    assert first.config["data"] is second.config["data"]
    assert not any(isinstance(epoch, dict) for epoch in first.epochs)
    assert first.config == tree
    assert dict(first.epochs[2]) == {"epoch": 3.0, OBJECTIVE: 0.25}


def test_an_epoch_that_is_run_again_replaces_its_first_run(tmp_path: Path) -> None:
    log = log_of(tmp_path, record("t00001", [0.1, 0.2, 0.3], state="running"))
    log.add_epoch("t00001", {"epoch": 2.0, OBJECTIVE: 0.25})
    assert [(epoch["epoch"], epoch[OBJECTIVE]) for epoch in log.records["t00001"].epochs] == [(1.0, 0.1), (2.0, 0.25)]


def test_left_over_temporary_files_are_no_records(tmp_path: Path) -> None:
    log_of(tmp_path, record("t00001", [0.1]))
    (tmp_path / "trials" / ".t00002.json.k3j2").write_bytes(b"{half")
    assert list(TrialLog.read(str(tmp_path)).records) == ["t00001"]


@pytest.mark.parametrize("text", ["{half", "[]", '{"trial_id": "t00001", "kind": "search", "config": {}, "more": 1}'])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "t00001.json").write_text(text)
    with pytest.raises(
        ImbvlmError, match=r"t00001.json is not a trial's record \(1 mistake\). Remove it to run that trial again."
    ):
        TrialLog.read(str(tmp_path))


def test_a_record_of_more_threads_than_a_system_has_is_refused(tmp_path: Path) -> None:
    """A retraining would take them, and torch would end the process by a signal."""
    log_of(tmp_path, record("t00001", [0.1]))
    path = tmp_path / "trials" / "t00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_threads": 100_000}))
    with pytest.raises(ImbvlmError, match=r"t00001.json is not a trial's record"):
        TrialLog.read(str(tmp_path))


def test_a_folder_without_trials_has_none(tmp_path: Path) -> None:
    assert TrialLog.read(str(tmp_path / "new")).records == {}


# -------------------------------------------------------------------------------------------------------- table


def test_the_table_has_a_typed_column_for_every_key_and_metric(tmp_path: Path) -> None:
    probe = TrialConfig.from_tree({**BASE, "method": "linear_probe", "loss": {"name": "focal", "gamma": 1}})
    zero_shot = TrialConfig.from_tree({**BASE, "method": "zero_shot"})
    log = log_of(
        tmp_path,
        record("t00001", [0.2, 0.4], started_at=1.0, ended_at=4.0, driver="in_process", num_threads=2),
        record("t00002", [], config=probe.to_tree(), state="failed", stop_reason="NaN"),
        record("b00001", [0.3], config=zero_shot.to_tree(), kind="baseline", name="zero-shot"),
        record("refit-winner-seed0", [0.1], kind="refit"),
    )
    table = pq.read_table(write_results_table(log))
    assert table.column("trial_id").to_pylist() == ["b00001", "t00001", "t00002", "refit-winner-seed0"]
    assert table.schema.field("config.train.num_epochs").type == pa.int64()
    assert table.schema.field("config.optim.lr").type == pa.float64()
    assert table.schema.field("config.optim.nesterov").type == pa.bool_()
    assert table.schema.field("config.loss.name").type == pa.string()
    assert table.column("config.loss.gamma").to_pylist() == [None, None, 1.0, None]
    assert table.column("config.decoder.depth").to_pylist() == [None, 3, None, 3]
    assert table.column(BEST).to_pylist() == [0.3, 0.4, None, 0.1]
    assert table.column("seconds").to_pylist()[1] == 3.0
    assert dict(table.column("epochs").to_pylist()[1][0]) == {"epoch": 1.0, OBJECTIVE: 0.2, BEST: 0.2}
    assert TrialConfig.from_tree(json.loads(table.column("config").to_pylist()[1])).method == "decoder"
    frame = pd.read_parquet(write_results_table(log))
    assert frame.loc[frame.state == "failed", "stop_reason"].tolist() == ["NaN"]


def test_lists_and_mixed_values_are_json() -> None:
    plain = TrialConfig.from_tree({**BASE, "method": "decoder"})
    listed = plain.with_overrides({"prompts.templates": ["a {}"], "optim.name": "adamw"})
    (table,) = table_parts([record("t1", []), record("t2", [], config=listed.to_tree())])
    assert [json.loads(text) for text in table.column("config.prompts.templates").to_pylist()] == ["plain", ["a {}"]]
    assert table.column("config.optim.betas").to_pylist() == [None, "[0.9, 0.999]"]


def test_a_column_has_one_type_where_only_a_late_trial_has_a_value(tmp_path: Path) -> None:
    """The table is written in parts."""
    listed = TrialConfig.from_tree({**BASE, "method": "decoder", "prompts": {"templates": ["a {}"]}}).to_tree()
    early = [record(f"t{number:05d}", [0.5]) for number in range(ROWS_AT_ONCE + 5)]
    late = record("t99999", [0.5, 0.7], config=listed)
    late.epochs[-1] = {**late.epochs[-1], "val/late": 0.25}
    table = pq.read_table(write_results_table(log_of(tmp_path, late, *early)))
    assert table.column("trial_id").to_pylist() == [each.trial_id for each in (*early, late)]
    templates = [json.loads(text) for text in table.column("config.prompts.templates").to_pylist()]
    assert templates == ["plain"] * len(early) + [["a {}"]]
    assert table.column("val/late").to_pylist() == [None] * len(early) + [0.25]
    assert table.column("num_epochs").to_pylist() == [1] * len(early) + [2]


def test_a_table_without_trials_can_be_written(tmp_path: Path) -> None:
    assert pq.read_table(write_results_table(TrialLog(str(tmp_path)))).num_rows == 0


@pytest.mark.parametrize(
    ("fields", "views"),
    [
        ({"method": "decoder", "features": {"num_views": 4}}, "4"),
        ({"method": "decoder", "features": {"tail_views": 4}}, "1, few 4"),
        ({"method": "decoder", "features": {"store": False}}, "fresh"),
        ({"method": "adapter", "features": {"num_views": 4}}, "fresh"),
    ],
)
def test_views_are_a_number_of_stored_crops_or_fresh(fields: dict[str, Any], views: str) -> None:
    tree = TrialConfig.from_record({**BASE, **fields}).to_tree()
    tree["features"] |= fields["features"]
    trial = record("t1", [0.5], config=tree)
    assert trial.views == views
    (table,) = table_parts([trial])
    assert table.column("views").to_pylist() == [views]
