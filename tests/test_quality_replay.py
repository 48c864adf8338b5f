"""The yardstick of searches: what a table holds, what a search sees of it, and what a replay counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

# The benchmarks name each other's files as their command does.
sys.path.append(str(Path(__file__).parent / "benchmarks"))
import curves
import replay
from curves import NUM_SEEN, Table, balanced_accuracy, make_spec, read_tables, recorded_space
from tree_sampler import TreeSampler

from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.tune.study_search import silence_optuna


def table(num_classes: int = 10, num_rows: int = 1500) -> Table:
    """A few recorded configurations of the quickstart's space, from 20 to 90 % right."""
    recorded = read_tables()["made10-0"].params
    params: tuple[Params, ...] = (*recorded[:40], *recorded[-20:])
    rng = np.random.default_rng(0)
    right = rng.random((len(params), 5, num_rows)) < np.linspace(0.2, 0.9, len(params))[:, None, None]
    epochs = np.tile(np.array([1, 2, 4, 8, 12]), (len(params), 1))
    truth = np.tile(np.linspace(0.2, 0.9, len(params))[:, None], (1, 5))
    return Table(
        "made",
        "quickstart",
        params,
        epochs,
        np.arange(num_rows) % num_classes,
        right,
        truth,
        np.full(len(params), 0.01),
    )


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    wrote = table()
    wrote.write(tmp_path / "t.npz.xz")
    (read,) = read_tables(tmp_path).values()
    assert (read.family, read.space, read.params) == (wrote.family, wrote.space, wrote.params)
    for name in ("epochs", "labels", "right", "truth", "seconds"):
        np.testing.assert_allclose(getattr(read, name), getattr(wrote, name), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("num_classes", [10, 100, 1000])
def test_each_seed_draws_other_rows_even_over_classes(num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []

    def spy(right: np.ndarray, labels: np.ndarray) -> np.ndarray:
        drawn.append(labels)
        return balanced_accuracy(right, labels)

    monkeypatch.setattr(curves, "balanced_accuracy", spy)
    made = table(num_classes)
    first, second, again = (made.draw_seen(seed) for seed in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0
    counts = np.bincount(drawn[0], minlength=num_classes)
    assert len(drawn[0]) == NUM_SEEN
    assert counts.max() - counts.min() <= 1


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    right, labels = np.array([[True, True, False, True]]), np.array([0, 0, 0, 1])
    assert balanced_accuracy(right, labels)[0] == pytest.approx((2 / 3 + 1) / 2)


def test_a_sample_stands_for_the_nearest_recorded_configuration_of_its_branch() -> None:
    shown = replay.Replay(table())
    nearest, params = shown.space.nearest, shown.table.params
    assert [nearest.index(each) for each in params] == list(range(len(params)))
    moved = {**params[0], "optim.lr": params[0]["optim.lr"] * 1.0001}
    assert nearest.index(moved) == 0
    other = params[nearest.index({**params[0], "method": "decoder", "decoder.depth": 1, "optim.lr": 0.05})]
    assert other["method"] == "decoder"


def test_a_search_that_tries_everything_chooses_as_the_grid_does() -> None:
    silence_optuna()
    shown = replay.Replay(table())
    method = replay.Method("all", {"name": "random"}, asha=None)
    rows = [row for _, row in shown.search(method, 0, 1e9)]
    assert sorted(rows) == list(range(len(shown.table.params)))
    ends = [end for end, _ in shown.search(method, 0, 1.0)]
    assert ends == sorted(ends)
    # A started trial runs to its end: 12 epochs of a hundredth of a second.
    assert max(ends) <= 1.0 + replay.TRIAL_SECONDS + 0.12 + 1e-9


def test_whole_configurations_are_sampled_within_the_space_and_keep_what_is_given() -> None:
    silence_optuna()
    shown = replay.Replay(table())
    method = replay.Method("", sampler=TreeSampler, stratify=("method",))
    rows = [row for _, row in shown.search(method, 0, 2.0)]
    methods = [shown.table.params[row]["method"] for row in rows]
    # Beyond the ten random trials, half of each stratum.
    assert len(rows) > 12
    assert abs(methods.count("decoder") - methods.count("linear_probe")) <= len(rows) / 2


def test_asha_ends_trials_early() -> None:
    silence_optuna()
    shown = replay.Replay(table())
    random = replay.Method("", {"name": "random"})
    stopped, whole = (shown.search(replace(random, asha=asha), 0, 2.0) for asha in (random.asha, None))
    assert 0 < len(stopped) < len(whole)


def test_what_is_recorded_is_what_the_yardstick_promises() -> None:
    tables = read_tables()
    assert {each.family for each in tables.values()} >= {"fashion", "made10", "made100", "made1000"}
    for name, each in tables.items():
        assert len(each.params) >= 500, name
        spec = make_spec(each.space, {"name": "random"})
        assert spec.read_space().contains(each.params[0], spec.base), f"{name}: record it anew, the space has changed"
        # Many members of a family are told apart by more than the noise of what is seen.
        assert np.corrcoef(each.draw_seen(0)[:, -1], each.truth[:, -1])[0, 1] > 0.7, name
    assert sum(path.stat().st_size for path in curves.FOLDER.iterdir()) < 5_000_000


def test_the_tables_space_is_the_shipped_one_without_what_the_features_fix() -> None:
    parameters = recorded_space("imagenet_lt")
    assert parameters["method"] == {"choice": ["linear_probe", "decoder"]}
    assert [branch["when"] for branch in parameters["optim.lr"]] == [{"method": "decoder"}, {"method": "linear_probe"}]
    assert not [key for key in parameters if key.startswith(("adapter", "encoder"))]
