"""The specification of an update: the delivered model's configurations on other data, by the earlier sweep's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweep_folder import sweep_spec, write_sweep

from imbvlm.base.errors import ImbvlmError
from imbvlm.sweep.records.earlier_sweeps import update_spec
from imbvlm.sweep.records.sweep_folder import BEST_FILE
from imbvlm.sweep.records.trial_log import SELECTION_FILE, TrialLog
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.spec_checks import check_spec

NEW = "/data/more.parquet"


def finished(folder: Path, members: tuple[str, ...] = (), **fields: Any) -> str:
    """A finished sweep's folder that delivers a blend of these members, or its best trial."""
    write_sweep(folder, [200, 50, 8], num_trials=8, **fields)
    (folder / BEST_FILE).touch()
    if members:
        content = {"winner": members[0], "members": [{"name": name} for name in members], "log_likelihoods": {}}
        (folder / SELECTION_FILE).write_text(json.dumps(content))
    return str(folder)


def files(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_members_alone_train_again_and_none_is_stopped_early(tmp_path: Path) -> None:
    folder = finished(tmp_path / "old", ("t00001", "t00006"), constraints={"val/top1_accuracy": 0.1})
    before = files(folder)
    sweep = check_spec(update_spec(folder, NEW))
    log, spec = TrialLog.read(folder), sweep.spec
    assert isinstance(sweep.space, ListedSpace)
    assert sweep.num_trials == 2
    for trial_id, params in sweep.space.configurations.items():
        config = spec.trial(params)
        assert config.data.manifest == NEW
        assert config == log.records[trial_id].trial_config().with_overrides({"data.manifest": NEW})
    assert (spec.update_of, spec.trial_scheduler.name, spec.warm_start) == (folder, "none", [])
    assert (spec.refit_seeds, spec.constraints) == ([0, 1], {"val/top1_accuracy": 0.1})
    assert files(folder) == before, "the earlier sweep stays as it is"


def test_without_a_blend_it_is_the_winner(tmp_path: Path) -> None:
    folder = finished(tmp_path / "old")
    winner = TrialLog.read(folder).winner(sweep_spec().objective)
    assert winner is not None
    assert list(update_spec(folder, NEW).resolve().space.tree["configurations"]) == [winner.trial_id]


def test_a_delivered_baseline_brings_the_best_trial_of_its_features(tmp_path: Path) -> None:
    # A sweep runs its baselines itself, and those of the encoders that its space has.
    folder = finished(tmp_path / "old", ("b00002",))
    best = TrialLog.read(folder).best(sweep_spec().objective)[0]
    assert list(update_spec(folder, NEW).resolve().space.tree["configurations"]) == [best.trial_id]


def test_a_search_has_the_members_first_and_starts_from_the_earlier_trials(tmp_path: Path) -> None:
    folder = finished(tmp_path / "old", ("t00001", "t00006"), stratify=["method"])
    sweep = check_spec(update_spec(folder, NEW, 5))
    log = TrialLog.read(folder)
    assert sweep.num_trials == 7
    assert sweep.spec.first_trials == [log.records[trial_id].draw for trial_id in ("t00001", "t00006")]
    assert (sweep.spec.warm_start, sweep.spec.stratify, sweep.spec.update_of) == ([folder], ["method"], folder)
    assert sweep.space.tree == sweep_spec().read_space().tree


def test_a_sampler_that_ignores_results_has_no_warm_start(tmp_path: Path) -> None:
    folder = finished(tmp_path / "old", searcher={"name": "random"})
    assert check_spec(update_spec(folder, NEW, 5)).spec.warm_start == []


CONFIGURATIONS = {
    "configurations": {name: {"method": "linear_probe", "optim.lr": lr} for name, lr in (("a", 0.1), ("b", 0.2))}
}


def test_what_has_no_model_to_update_or_no_space_to_search_is_refused(tmp_path: Path) -> None:
    unfinished = str(write_sweep(tmp_path / "unfinished", [20, 5], num_trials=2))
    with pytest.raises(ImbvlmError, match=rf"only a finished sweep .* imbvlm sweep resume {unfinished}"):
        update_spec(unfinished, NEW)
    listed = finished(tmp_path / "listed")
    sweep_spec(space=CONFIGURATIONS, num_trials=2).to_yaml(tmp_path / "listed" / "sweep.yaml")
    with pytest.raises(ImbvlmError, match=r"lists its configurations and has no space to search\. Omit --search\."):
        update_spec(listed, NEW, 3)
    sweep_spec(space=CONFIGURATIONS, num_trials=2, update_of="/first").to_yaml(tmp_path / "listed" / "sweep.yaml")
    with pytest.raises(ImbvlmError, match="Omit --search, or name the sweep that searched: /first"):
        update_spec(listed, NEW, 3)
    tables = [{"name": "t", "title": "T", "rows": [{"label": "a", "configuration": "a"}]}]
    sweep_spec(space=CONFIGURATIONS, num_trials=2, study=tables).to_yaml(tmp_path / "listed" / "sweep.yaml")
    with pytest.raises(ImbvlmError, match="is a study"):
        update_spec(listed, NEW)
    with pytest.raises(ImbvlmError, match="is not a sweep's folder"):
        update_spec(str(tmp_path / "nothing"), NEW)
