"""Replays searches over recorded tables: the sweep's own searcher and ASHA, its trials looked up in place of trained.

A sampled configuration stands for the nearest recorded configuration of its branch: the same values of all keys that
conditions depend on, then the least distance. A range has length 1, on its logarithm where the space has a logarithmic
range, and two choices are 1 apart. Times are those of the recording: CPU seconds of each epoch, and TRIAL_SECONDS for
each trial.
"""

import heapq
import random
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
from curves import FIXED_KEYS, METHODS, Array, Table, make_spec
from optuna.samplers import BaseSampler

from imbvlm.base.schema import Tree
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.spec.search_space import MISSING, NOTHING, Parameter, Params, SearchSpace, Suggester, is_active
from imbvlm.sweep.spec.sweep_spec import AshaConfig, ResolvedSweep, SweepSpec
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.jobs import Job
from imbvlm.sweep.tune.study_search import StudySearch
from imbvlm.training.trial_session import TrialReport

BEST = "val/best_balanced_accuracy"
# Trials that run at once, and the seconds between two of them (the section `overhead`).
AT_ONCE, TRIAL_SECONDS = 2, 0.03
NUM_LISTED = 16
# A search is judged when it has had the time of so many random trials.
BUDGETS = (3, 10, 20)


@dataclass(frozen=True)
class RecordedSpace(SearchSpace):
    """A space of which only recorded configurations are trained; `started` are the rows of those that a search has."""

    nearest: "Nearest"
    started: set[int]

    def sample(self, trial: Suggester, base: Tree) -> Params:
        return self.nearest.params[self.nearest.index(super().sample(trial, base))]

    def enumerate_params(self, base: Tree, fixed: Mapping[str, object] = NOTHING) -> list[Params]:
        """Some configurations without a trial: the search takes one at random, and checks each, which takes time."""
        untried = [
            params
            for row, params in enumerate(self.nearest.params)
            if row not in self.started and fixed.items() <= params.items()
        ]
        return random.Random(len(self.started)).sample(untried, min(NUM_LISTED, len(untried)))


class Nearest:
    """The nearest recorded configuration, within branches."""

    def __init__(self, space: SearchSpace, base: Tree, params: Sequence[Params]) -> None:
        self.params = params
        self._branch_keys = sorted(set().union(*(parameter.when for parameter in space.parameters)))
        self._branches: dict[tuple[Any, ...], tuple[list[int], list[Parameter], Array]] = {}
        members: dict[tuple[Any, ...], list[int]] = {}
        for index, each in enumerate(params):
            members.setdefault(self._branch(each), []).append(index)
        for branch, indices in members.items():
            first = params[indices[0]]
            active = [parameter for parameter in space.parameters if is_active(parameter, first, base)]
            points = np.array([_point(active, params[index]) for index in indices])
            self._branches[branch] = indices, active, points

    def _branch(self, params: Params) -> tuple[Any, ...]:
        return tuple(params.get(key) for key in self._branch_keys)

    def index(self, params: Params) -> int:
        """The row of the table that stands for a configuration."""
        branch = self._branch(params)
        if branch not in self._branches:
            # Few decoders are recorded. The method counts most, then the keys that agree.
            method = self._branch_keys.index("method")
            agreement = {
                other: (other[method] == branch[method], sum(map(eq, other, branch))) for other in self._branches
            }
            branch = max(agreement, key=agreement.__getitem__)
        indices, active, points = self._branches[branch]
        return indices[int(np.argmin(((points - _point(active, params)) ** 2).sum(axis=1)))]


def _point(active: Sequence[Parameter], params: Params) -> list[float]:
    """Coordinates of a configuration: two of different choices are 1 apart."""
    result: list[float] = []
    for parameter in active:
        value = params.get(parameter.key, MISSING)
        if parameter.kind == "choice":
            result += [float(value == each) / 2**0.5 for each in parameter.values]
        elif value is MISSING:
            result.append(0.5)
        else:
            low, high = parameter.values
            scale = np.log if parameter.kind == "loguniform" else np.asarray
            result.append(float((scale(value) - scale(low)) / (scale(high) - scale(low))))
    return result


@dataclass(frozen=True)
class Method:
    """A way to search: a searcher's options, and ASHA's (None: no trial is stopped).

    `sampler` is one that isn't among the package's, of the space, the base and a seed. First come the recipes of the
    shipped sweep where it `is_pinned`, and `portfolio` recipes, learned from other families' tables of the space.
    Before them `halving` random probes train as one pack, of which a third continues from each point to the next.
    """

    name: str
    searcher: Mapping[str, object] = field(default_factory=lambda: {"name": "tpe"})
    asha: AshaConfig | None = field(default_factory=AshaConfig)
    is_pinned: bool = False
    portfolio: int = 0
    halving: int = 0
    sampler: Callable[[SearchSpace, Tree, int], BaseSampler] | None = None
    stratify: tuple[str, ...] = ()


class Replay:
    """A table as searches see it, and what portfolios for it are learned from."""

    def __init__(self, table: Table, portfolio: "Portfolio | None" = None) -> None:
        self.table, self._portfolio = table, portfolio
        self.base = make_spec(table.space, {"name": "random"})
        space = self.base.read_space()
        self.space = RecordedSpace(space.parameters, space.tree, Nearest(space, self.base.base, table.params), set())
        lengths = table.epochs[:, -1]
        is_decoder = np.array([each["method"] == "decoder" for each in table.params])
        # Half of the random trials are decoders, of which fewer are recorded.
        costs = lengths * table.seconds + TRIAL_SECONDS
        self.mean_cost = (costs[is_decoder].mean() + costs[~is_decoder].mean()) / 2
        self._is_probe = ~is_decoder
        self._seen: dict[int, Array] = {}

    def seen(self, seed: int) -> Array:
        """Running maxima (M, P) on the rows that a seed draws."""
        if seed not in self._seen:
            self._seen[seed] = np.maximum.accumulate(self.table.draw_seen(seed), axis=1)
        return self._seen[seed]

    def excess(self, method: Method, seed: int) -> list[float]:
        """Points of true accuracy that the search's choice lies below a complete grid's, at each of BUDGETS."""
        seen, truth = self.seen(seed), 100 * self.table.truth[:, -1]
        by_grid = truth[np.argmax(seen[:, -1])]
        deadlines = [budget * self.mean_cost / AT_ONCE for budget in BUDGETS]
        finished = self.search(method, seed, deadlines[-1])
        result = []
        for deadline in deadlines:
            rows = [row for end, row in finished if end <= deadline]
            chosen = truth[max(rows, key=lambda row: seen[row, -1])] if rows else np.median(truth)
            result.append(float(by_grid - chosen))
        return result

    def search(self, method: Method, seed: int, deadline: float) -> list[tuple[float, int]]:
        """When each trial that wasn't stopped ended, and its row."""
        seen, table = self.seen(seed), self.table
        spec = make_spec(
            table.space, {**method.searcher, "seed": seed}, self.first_trials(method), num_trials=10_000,
            stratify=list(method.stratify),
        )  # fmt: skip
        space = replace(self.space, started=set())
        study = open_search(spec, space)
        if method.sampler is not None:
            study.study.sampler = method.sampler(space, spec.base, seed)
        brackets = AshaBrackets(method.asha or AshaConfig(), BEST)
        # Events: when, a number against ties, the trial, its row and its point.
        events: list[tuple[float, int, Job, int, int]] = []
        begin, finished = self.halve(method.halving, seed)
        num_started = 0

        def start(now: float) -> None:
            nonlocal num_started
            job = study.next_job() if now < deadline else None
            if job is not None:
                brackets.add(job)
                row, num_started = space.nearest.index(job.draw), num_started + 1
                space.started.add(row)
                end = now + TRIAL_SECONDS + table.epochs[row, 0] * table.seconds[row]
                heapq.heappush(events, (end, num_started, job, row, 0))

        for _ in range(AT_ONCE):
            start(begin)
        while events:
            now, number, job, row, point = heapq.heappop(events)
            epoch, last = int(table.epochs[row, point]), table.epochs.shape[1] - 1
            progress = epoch / int(table.epochs[row, last])
            report = TrialReport(job.trial_id, epoch, epoch, progress, {BEST: float(seen[row, point])})
            if point == last:
                brackets.complete(job, report)
                finished.append((now, row))
            elif method.asha is None or not brackets.should_stop(job, report):
                later = now + (table.epochs[row, point + 1] - epoch) * table.seconds[row]
                heapq.heappush(events, (later, number, job, row, point + 1))
                continue
            study.finished(job, [report.values])
            start(now)
        return finished

    def first_trials(self, method: Method) -> list[Params]:
        """The recipes that come first."""
        recipes = [*shipped_recipes(self.table.space)] if method.is_pinned else []
        if self._portfolio is not None:
            recipes += self._portfolio.recipes(method.portfolio, without=self.table.family)
        return recipes

    def halve(self, number: int, seed: int) -> tuple[float, list[tuple[float, int]]]:
        """When so many random probes are through, and those that were trained to their end."""
        seen, table, now = self.seen(seed), self.table, 0.0
        probes = np.flatnonzero(self._is_probe)
        rows = np.random.default_rng(seed).permutation(probes)[:number]
        steps = np.diff(table.epochs, axis=1, prepend=0)
        for point in range(steps.shape[1] if number else 0):
            now += float((steps[rows, point] * table.seconds[rows]).sum()) / AT_ONCE
            if point + 1 < steps.shape[1]:
                rows = rows[np.argsort(-seen[rows, point], kind="stable")][: max(1, len(rows) // 3)]
        return now, [(now, int(row)) for row in rows]


def open_search(spec: SweepSpec, space: SearchSpace) -> StudySearch:
    """The sweep's own search, over another space than its specification's."""
    sweep = ResolvedSweep(spec, space, spec.num_trials or 1)
    return StudySearch.open(sweep, [], [], Budget.open(spec, "nowhere", 0.0))


class Portfolio:
    """What each configuration of a space's tables gives on each of them, for recipes that are learned from it."""

    def __init__(self, tables: Sequence[Table]) -> None:
        spec = make_spec(tables[0].space, {"name": "random"})
        nearest = [Nearest(spec.read_space(), spec.base, table.params) for table in tables]
        self._candidates = [params for table in tables for params in table.params]
        self._families = np.array([table.family for table in tables])
        self._origins = np.repeat(self._families, [len(table.params) for table in tables])
        self._truth = np.array([
            table.truth[[rows.index(params) for params in self._candidates], -1]
            for table, rows in zip(tables, nearest, strict=True)
        ])  # fmt: skip

    def recipes(self, size: int, without: str = "") -> list[Params]:
        """Recipes that together come nearest to the best on each table, chosen in turn until none gains.

        Tables of the family `without` neither give recipes nor judge them. Of candidates that stand for the same
        recorded configurations on every table the first is taken.
        """
        # A point of a hard table counts as one of an easy one.
        truth = self._truth[self._families != without]
        truth[:, self._origins == without] = -np.inf
        best, chosen = np.full(len(truth), -np.inf), list[int]()
        for _ in range(size):
            sums = np.maximum(truth, best[:, None]).sum(axis=0)
            index = int(np.argmax(sums))
            if not sums[index] > best.sum():
                break
            chosen.append(index)
            best = truth[:, chosen].max(axis=1)
        return [self._candidates[index] for index in chosen]


@cache
def shipped_recipes(space: str) -> Sequence[Params]:
    """The first trials of the shipped sweep of a space, without the keys that the tables' features fix."""
    module = runpy.run_path(str(Path(__file__).parents[2] / "sweeps" / f"{space}.py"))
    recipes = list[Params]()
    for trial in module["spec"].first_trials:
        recipe = {key: value for key, value in trial.items() if key not in FIXED_KEYS[space]}
        if recipe["method"] in METHODS and recipe not in recipes:
            recipes.append(recipe)
    return recipes
