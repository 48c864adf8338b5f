"""Time to quality: searches over recorded tables, judged by accuracies that they don't see; --large tries all ways.

Excess regret is the true accuracy of the configuration that a complete grid chooses by what the search sees, minus that
of the search's choice, the mean over BUDGETS and seeds. Intervals are of 2,000 resamples of the tables.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from curves import Array, read_tables
from replay import BUDGETS, Method, Portfolio, Replay
from table import Line, Options, shown
from tree_sampler import TreeSampler

from imbvlm.sweep.spec.sweep_spec import AshaConfig
from imbvlm.sweep.tune.study_search import silence_optuna

NUM_SEEDS, NUM_RESAMPLES, NUM_RECIPES = 6, 2000, 4
SHIPPED = Method("TPE and ASHA, as shipped", is_pinned=True)
FEW = (
    SHIPPED,
    Method("TPE and ASHA, no recipes"),
    Method("random search and ASHA, no recipes", {"name": "random"}),
    Method("TPE, no recipes", asha=None),
)
TRIES = (
    *FEW,
    Method("quasi-Monte Carlo and ASHA", {"name": "qmc"}),
    Method("Gaussian process and ASHA", {"name": "gp"}),
    Method("TPE, keys independent", {"name": "tpe", "multivariate": False}),
    Method("TPE, 5 random trials", {"name": "tpe", "num_startup_trials": 5}),
    Method("TPE, 20 random trials", {"name": "tpe", "num_startup_trials": 20}),
    Method("TPE, 96 candidates", {"name": "tpe", "num_candidates": 96}),
    Method("TPE, stratified by method", stratify=("method",)),
    Method("TPE and ASHA from a twelfth on", asha=AshaConfig(grace_fraction=1 / 12)),
    Method("TPE of whole configurations", sampler=TreeSampler),
    Method("the same, half as wide", sampler=partial(TreeSampler, width=0.1)),
    Method("portfolio of 4, then TPE and ASHA", portfolio=4),
    Method("portfolio of 8, then TPE and ASHA", portfolio=8),
    Method("64 probes halved, then TPE and ASHA", halving=64),
    Method("256 probes halved, then TPE and ASHA", halving=256),
    Method("portfolio of 4, whole configurations", portfolio=4, sampler=TreeSampler),
    Method("64 probes halved, portfolio of 4", portfolio=4, halving=64),
)


def lines(options: Options) -> Iterator[Line]:
    silence_optuna()
    tables = read_tables()
    families = {table.family for table in tables.values()}
    yield shown(f"{len(tables)} tables of {len(families)} families", " ".join(sorted(families)))
    portfolios = {
        space: Portfolio([table for table in tables.values() if table.space == space])
        for space in sorted({table.space for table in tables.values()})
    }
    replays = [Replay(table, portfolios[table.space]) for table in tables.values()]
    of_table = [table.family for table in tables.values()]
    scores: dict[str, Array] = {}
    yield shown("excess regret in points, 95 % interval", f"after {', '.join(map(str, BUDGETS))}")
    for method in TRIES if options.large else FEW:
        scores[method.name] = np.array([excess(replay, method, place) for place, replay in enumerate(replays)])
        yield shown(f"  {method.name}: {interval(scores[method.name].mean(axis=1))}", " ".join(
            f"{value:.2f}" for value in scores[method.name].mean(axis=0)))  # fmt: skip
        if method is not SHIPPED:
            yield shown(
                "    as shipped minus that", interval((scores[SHIPPED.name] - scores[method.name]).mean(axis=1))
            )
    if options.large:
        for space, portfolio in portfolios.items():
            for number, recipe in enumerate(portfolio.recipes(NUM_RECIPES), start=1):
                yield shown(f"  {space}: recipe {number} of all families", json.dumps(recipe))
        yield from _left_out({name: each.mean(axis=1) for name, each in scores.items()}, of_table)


def excess(replay: Replay, method: Method, place: int) -> Array:
    """Excess regret (budgets,), the mean over seeds; no two tables share one, since random trials would be the same."""
    return np.mean([replay.excess(method, 1000 * place + seed) for seed in range(NUM_SEEDS)], axis=0)


def interval(values: Array) -> str:
    """Mean and 95 % interval over tables (N,)."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (NUM_RESAMPLES, len(values))).mean(axis=1)
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(values.mean(), *np.quantile(means, (0.025, 0.975)))


def _left_out(scores: dict[str, Array], of_table: Sequence[str]) -> Iterator[Line]:
    """The gain on each family of the way that is best on the other families."""
    gains, families = np.zeros(len(of_table)), np.array(of_table)
    for family in sorted(set(of_table)):
        inside = families == family
        best = min(scores, key=lambda name: float(scores[name][~inside].mean()))
        gains[inside] = (scores[SHIPPED.name] - scores[best])[inside]
        yield shown(f"  best without {family}: {best}", f"{gains[inside].mean():+.2f} points")
    yield shown("  gain on families left out", interval(gains))
    yield shown("    of the excess regret as shipped", f"{100 * gains.mean() / scores[SHIPPED.name].mean():.0f} %")
