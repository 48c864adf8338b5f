"""Search quality on the embedded data: an exhaustive grid against searches with an eighth of its trials.

The grid is trained whole, in packs, for each seed. The searches are the sweep's own searcher and scheduler, and what
they train is looked up in the grid: the same numbers, and no waiting.
"""

from collections.abc import Callable, Iterator
from functools import partial

import embedded
import numpy as np
import optuna
from table import Line, Options, limited, shown

from imbvlm.base.schema import Tree
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.spec.equivalence import canonical_key
from imbvlm.sweep.spec.search_space import SearchSpace
from imbvlm.sweep.spec.sweep_spec import AshaConfig, SweepSpec
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.jobs import Job
from imbvlm.sweep.tune.study_search import StudySearch
from imbvlm.training.trial_pack import TrialPack, pack_key
from imbvlm.training.trial_run import build_trial
from imbvlm.training.trial_session import TrialReport

BEST = "val/best_balanced_accuracy"
SEEDS = range(5)
# One search more or less lucky says little: so many over each seed's grid, each with a seed of its own.
NUM_SEARCHES = 20
SPACE = {
    "loss.name": {"choice": ["cross_entropy", "focal", "balanced_softmax", "generalized_reweight"]},
    "classifier.kind": {"choice": ["linear", "cosine"]},
    "classifier.temperature": {"choice": [0.02, 0.04, 0.08], "when": {"classifier.kind": "cosine"}},
    "data.class_sampling": {"choice": ["instance_balanced", "square_root"]},
    "optim.lr": {"choice": [0.01, 0.025, 0.06, 0.15, 0.4]},
}
# Trials that run at once, as on a machine of two.
AT_ONCE = 2
Curves = dict[str, list[float]]


def lines(options: Options) -> Iterator[Line]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = embedded.features(options.folder)
    tables = {seed: train_grid(found, make_spec(seed), options.device) for seed in SEEDS}
    size = len(tables[0])
    finals = [[curve[-1] for curve in curves.values()] for curves in tables.values()]
    yield shown(f"exhaustive grid: {size} configurations of {embedded.NUM_EPOCHS} epochs, {len(SEEDS)} seeds", "")
    yield shown("  best, median and worst balanced accuracy on validation", " ".join(
        f"{100 * np.mean([part(final) for final in finals]):.1f}" for part in (np.max, np.median, np.min)))  # fmt: skip
    for rung in (4, 8):
        found_ranks = [_rank_correlation([c[rung - 1] for c in curves.values()], final)
                       for curves, final in zip(tables.values(), finals, strict=True)]  # fmt: skip
        yield shown(f"  rank correlation of epoch {rung} with the last", f"{np.mean(found_ranks):.3f}")
    num_trials = size // 8
    for words, searcher, stops in (
        ("TPE and ASHA", "tpe", True),
        ("TPE", "tpe", False),
        ("random search", "random", False),
    ):
        make = partial(make_spec, num_trials=num_trials, searcher=searcher)
        regrets, shares = searches(tables, NUM_SEARCHES, make, stops)
        low, points, high = (float(np.quantile(regrets, part)) for part in (0.25, 0.5, 0.75))
        what = f"{words}, {num_trials} trials: median regret in points, {len(regrets)} searches"
        yield limited(what, points, "", 0.5) if stops else shown(what, points)
        yield shown("  lower and upper quartile", f"{low:.2f} {high:.2f}")
        yield shown("  share of the grid's epochs", f"{100 * np.mean(shares):.1f} %")
    for loss in SPACE["loss.name"]["choice"]:
        make = partial(make_spec, num_trials=num_trials, stratify=("loss.name",))
        regrets, _ = searches(tables, NUM_SEARCHES // 4, make, True, lambda config, loss=loss: config.loss.name == loss)
        yield shown(f"  stratified by loss: median regret within {loss}", float(np.median(regrets)))


def searches(
    tables: dict[int, Curves],
    number: int,
    make: Callable[[int, int], SweepSpec],
    stops: bool,
    counts: Callable[[TrialConfig], bool] = lambda config: True,
) -> tuple[list[float], list[float]]:
    """Regrets in points and shares of the grid's epochs of so many searches over each seed's grid."""
    found = [
        search(curves, make(seed, number * seed + place), stops, counts)
        for seed, curves in tables.items()
        for place in range(number)
    ]
    # Rounded, so that no limit is missed by a last bit.
    return [round(100 * regret, 6) for regret, _ in found], [share for _, share in found]


def make_spec(
    seed: int,
    searcher_seed: int = 0,
    num_trials: int = 1,
    searcher: str = "tpe",
    stratify: tuple[str, ...] = (),
    space: Tree = SPACE,
) -> SweepSpec:
    """The sweep over the grid's space; ten random trials first, or half of a small budget."""
    base = embedded.config(train__seed=seed).to_tree()
    base = {key: value for key, value in base.items() if key not in ("loss", "classifier")}
    started = {"num_startup_trials": min(10, max(1, num_trials // 2))} if searcher == "tpe" else {}
    return SweepSpec.from_tree({
        "name": "grid", "base": base, "space": {"parameters": space}, "num_trials": num_trials,
        "searcher": {"name": searcher, "seed": searcher_seed, **started}, "stratify": list(stratify)})  # fmt: skip


def grid(spec: SweepSpec, space: SearchSpace) -> list[TrialConfig]:
    """Every configuration of the space."""
    draws = space.enumerate_params(spec.base, {})
    assert draws is not None, "the space is finite"
    return [spec.trial(draw) for draw in draws]


def train_grid(found: FeatureSet, spec: SweepSpec, device: str) -> Curves:
    """The running maximum of balanced accuracy over epochs of every configuration, by its canonical key."""
    packs: dict[str, list[TrialConfig]] = {}
    for config in grid(spec, spec.read_space()):
        packs.setdefault(str(pack_key(config)), []).append(config)
    curves: Curves = {}
    for configs in packs.values():
        data, pack = TrialData.open(configs[0], found), TrialPack()
        runs = [build_trial(config, data, device) for config in configs]
        for run in runs:
            run.join(pack)
        generators = [run.epochs() for run in runs]
        for results in zip(*generators, strict=True):
            for config, result in zip(configs, results, strict=True):
                curves.setdefault(canonical_key(config), []).append(result.metrics[BEST])
    return curves


def search(curves: Curves, spec: SweepSpec, stops: bool, counts: Callable[[TrialConfig], bool]) -> tuple[float, float]:
    """Regret of what the search finds among what counts, in balanced accuracy of the last epoch, and its share of the
    grid's epochs.
    """
    study = StudySearch.open(spec.resolve(), [], [], Budget.open(spec, "nowhere", 0.0))
    brackets = AshaBrackets(AshaConfig(), BEST)
    scores: dict[str, float] = {}
    num_epochs = 0
    # Each running trial, and its epochs so far.
    running: list[tuple[Job, int]] = []
    for _ in range(10 * spec.resolve().num_trials * embedded.NUM_EPOCHS):
        while len(running) < AT_ONCE and (job := study.next_job()) is not None:
            running.append((job, 0))
            brackets.add(job)
        if not running:
            break
        still_running = []
        for job, epochs_before in running:
            key, epoch = canonical_key(job.config), epochs_before + 1
            num_epochs += 1
            value = curves[key][epoch - 1]
            report = TrialReport(job.trial_id, epoch, epoch, epoch / embedded.NUM_EPOCHS, {BEST: value})
            ended = epoch == embedded.NUM_EPOCHS
            if ended:
                brackets.complete(job, report)
            elif stops:
                ended = brackets.should_stop(job, report)
            if not ended:
                still_running.append((job, epoch))
                continue
            study.finished(job, [report.values])
            if counts(job.config):
                scores[key] = value
        running = still_running
    keys = [canonical_key(config) for config in grid(spec, spec.read_space()) if counts(config)]
    chosen = max(scores, key=scores.__getitem__)
    regret = max(curves[key][-1] for key in keys) - curves[chosen][-1]
    return regret, num_epochs / (len(curves) * embedded.NUM_EPOCHS)


def _rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, ties with their mean rank."""
    ranks = []
    for values in (first, second):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts + 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])
