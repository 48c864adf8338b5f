"""Numbers that a report states: margins with their errors, fronts, rank correlation, importance, compute saved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import optuna
from optuna.importance import PedAnovaImportanceEvaluator

from imbvlm.sweep.records.trial_log import TrialRecord
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.spec.sweep_spec import AshaConfig

# Fewer trials than this say nothing on what mattered.
MIN_TRIALS = 10
BEST_SHARE = 0.25


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices of the points than which none is both cheaper and better, cheapest first."""
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if gains[index] > best:
            front.append(index)
            best = gains[index]
    return front


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's; None for fewer than three pairs or where one side doesn't vary."""
    if len(left) < 3 or len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


@dataclass(frozen=True)
class Rung:
    """How well the order of trials at a share of their length foretold their order at the end."""

    share: float
    # Each trial, its value at the rung and at its end.
    pairs: tuple[tuple[TrialRecord, float, float], ...]

    @property
    def num_trials(self) -> int:
        return len(self.pairs)

    @property
    def correlation(self) -> float | None:
        """Spearman's; None where too few trials finished."""
        return rank_correlation([early for _, early, _ in self.pairs], [value for *_, value in self.pairs])


def rungs(source: ReportData) -> list[Rung]:
    """ASHA's rungs below the end, over the trials that finished; [] without ASHA."""
    scheduler = source.spec.trial_scheduler
    if not isinstance(scheduler, AshaConfig):
        return []
    finished = [(record, value) for record, value in source.valued() if record.state == "finished"]
    found, share = [], scheduler.grace_fraction
    while share < 1 - 1e-9:
        pairs = []
        for record, value in finished:
            at = math.ceil(share * len(record.epochs) - 1e-9)
            early = record.epochs[at - 1].get(source.spec.best_objective) if at < len(record.epochs) else None
            if early is not None:
                pairs.append((record, early, value))
        found.append(Rung(share, tuple(pairs)))
        share *= scheduler.reduction_factor
    return found


@dataclass(frozen=True)
class Importance:
    """A parameter's share of what tells the best quarter of the trials that have it from all of them."""

    key: str
    share: float
    num_trials: int


def importances(source: ReportData) -> list[Importance]:
    """PED-ANOVA [Watanabe et al. 2023] of each parameter over the trials that drew it, shares of 1, largest first."""
    space, base, study = source.spec.read_space(), source.spec.base, _new_study()
    for record, value in source.valued():
        fixed = optuna.trial.FixedTrial(space.to_optuna_params(record.draw, base))
        space.draw(fixed, base)
        study.add_trial(
            optuna.trial.create_trial(value=value, params=fixed.params, distributions=dict(fixed.distributions))
        )
    raw: dict[str, tuple[float, int]] = {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    for parameter in space.parameters:
        having = [trial for trial in study.trials if parameter.name in trial.params]
        if len(having) < MIN_TRIALS or len({trial.params[parameter.name] for trial in having}) < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = evaluator.evaluate(study, params=[parameter.name])[parameter.name]
        value, count = raw.get(parameter.key, (0.0, 0))
        raw[parameter.key] = (max(value, found), count + len(having))
    total = sum(value for value, _ in raw.values()) or 1.0
    shares = [Importance(key, value / total, count) for key, (value, count) in raw.items()]
    return sorted(shares, key=lambda one: -one.share)


def _new_study() -> optuna.Study:
    """A study whose making Optuna doesn't announce."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(before)


def search_bias_note(source: ReportData) -> tuple[bool, str]:
    """Whether the trials say what mattered (docs/protocol.md, Splits, counts, selection), and the sentence on it."""
    spec = source.spec
    stopped = any(record.state == "stopped" for record in source.log.of("search"))
    caveat = " Stopped trials count with their best until then." if stopped else ""
    if spec.searcher.name == "random":
        return True, f"Every trial was drawn at random, so each value had the same chance.{caveat}"
    if spec.stratify:
        keys = ", ".join(spec.stratify)
        return True, (
            f"Each choice of {keys} got the same number of trials, so these compare fairly. Everything else was drawn "
            f"by TPE, which goes where results were good: a hint, not a finding.{caveat}"
        )
    return False, (
        "A hint, not a finding: TPE drew these trials and went on where results were good, so values that it tried "
        "often look better than others. A sweep with stratify, or with searcher.name: random, can say what mattered."
        f"{caveat}"
    )
