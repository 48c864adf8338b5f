"""The yardstick of searches: what a table holds, what a search sees of it, what a replay counts, and its recipes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

# The benchmarks name each other's files as their command does.
sys.path.append(str(Path(__file__).parent / "benchmarks"))
import curves
import record_curves
import replay
from curves import NUM_SEEN, Table, balanced_accuracy, make_spec, read_tables, recorded_space
from tree_sampler import TreeSampler

from imbvlm.sweep.spec.learned_recipes import PROBES
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


def test_a_portfolio_holds_what_is_best_on_other_families_alone() -> None:
    """Each family is best where another one isn't; one configuration is second on all of them."""
    of_space = [replace(table(), family=family) for family in ("a", "b", "c")]
    for place, each in enumerate(of_space):
        each.truth[:] = 0.1
        each.truth[place], each.truth[7] = 0.9, 0.8
    portfolio = replay.Portfolio(of_space)
    params = of_space[0].params
    assert portfolio.recipes(1) == [params[7]]
    first, second, *more = portfolio.recipes(8, without="c")
    assert first == params[7]
    assert more == [params[1]]
    assert second == params[0]
    assert portfolio.recipes(8, without="a") == [params[7], params[1], params[2]]


def test_recipes_come_first_and_the_shipped_ones_are_within_the_tables_space() -> None:
    silence_optuna()
    shown = replay.Replay(table(), replay.Portfolio([replace(table(), family="other")]))
    method = replay.Method("", is_pinned=True, portfolio=1)
    recipes = shown.first_trials(method)
    assert len(recipes) == len(replay.shipped_recipes("quickstart")) + 1
    rows = [row for _, row in sorted(shown.search(replace(method, asha=None), 0, 1.0))]
    assert {shown.space.nearest.index(recipe) for recipe in recipes} <= set(rows[: len(recipes) + 2])


def test_a_table_is_recorded_from_made_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_curves, "NUM_POOL", 60)
    monkeypatch.setattr(record_curves, "NUM_TRUE", 90)
    plan = record_curves.Plan("made", "quickstart", 3, 20, 4, 1.0, modes=2, offset=1.0)
    params = record_curves.design("any", plan.space, {"linear_probe": 2, "decoder": 1})
    recorded = record_curves.record(plan, record_curves.made_features(plan, 0, tmp_path), params)
    assert recorded.right.shape == (3, 5, 60)
    # Three classes can't be told worse than by chance for long.
    assert (recorded.truth[:, -1] > 1 / 3).all()
    assert record_curves.design("other", plan.space, {"linear_probe": 2, "decoder": 1}) != params


def test_asha_ends_trials_early() -> None:
    silence_optuna()
    shown = replay.Replay(table())
    random = replay.Method("", {"name": "random"})
    stopped, whole = (shown.search(replace(random, asha=asha), 0, 2.0) for asha in (random.asha, None))
    assert 0 < len(stopped) < len(whole)


def test_what_is_recorded_is_what_the_yardstick_promises() -> None:
    tables = read_tables()
    assert {each.family for each in tables.values()} == {plan.family for plan in record_curves.PLANS.values()}
    for name, each in tables.items():
        assert len(each.params) >= 500, name
        spec = make_spec(each.space, {"name": "random"})
        assert spec.read_space().contains(each.params[0], spec.base), f"{name}: record it anew, the space has changed"
        # Many members of a family are told apart by more than the noise of what is seen.
        assert np.corrcoef(each.draw_seen(0)[:, -1], each.truth[:, -1])[0, 1] > 0.7, name
    assert sum(path.stat().st_size for path in curves.FOLDER.iterdir()) < 5_000_000


def test_a_shipped_recipe_is_near_the_best_on_data_of_many_classes() -> None:
    """On each table of the large spaces one of the probes that a sweep tries first is among the best."""
    recipes = replay.shipped_recipes("imagenet_lt")
    assert len(recipes) == len(PROBES)
    for name, each in read_tables().items():
        if each.space == "imagenet_lt":
            nearest = replay.Replay(each).space.nearest
            last = each.truth[:, -1]
            best = max(last[nearest.index(recipe)] for recipe in recipes)
            assert (last > best).mean() < 0.03, name


def test_the_tables_space_is_the_shipped_one_without_what_the_features_fix() -> None:
    parameters = recorded_space("imagenet_lt")
    assert parameters["method"] == {"choice": ["linear_probe", "decoder"]}
    assert [branch["when"] for branch in parameters["optim.lr"]] == [{"method": "decoder"}, {"method": "linear_probe"}]
    assert not [key for key in parameters if key.startswith(("adapter", "encoder"))]
