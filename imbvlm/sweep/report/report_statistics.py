"""Statistics of a report: rank correlation of rungs, importance of parameters, the bias of the search."""

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
from imbvlm.sweep.spec.sampler_registry import SAMPLERS
from imbvlm.sweep.spec.sweep_spec import AshaConfig

# Fewer trials do not show which parameters mattered.
MIN_TRIALS = 10
BEST_FRACTION = 0.25


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs or constant values."""
    if len(left) < 3 or len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


@dataclass(frozen=True)
class Rung:
    """The values of finished trials after a share of their epochs, which ASHA judged them by, and at the end."""

    share: float
    # Each trial with its value at the rung and at the end.
    pairs: tuple[tuple[TrialRecord, float, float], ...]

    @property
    def num_trials(self) -> int:
        return len(self.pairs)

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation; None if too few trials finished."""
        return rank_correlation([early for _, early, _ in self.pairs], [value for *_, value in self.pairs])


def rungs(source: ReportData) -> list[Rung]:
    """ASHA's rungs before the end, over the finished trials; [] without ASHA."""
    scheduler = source.spec.trial_scheduler
    if not isinstance(scheduler, AshaConfig):
        return []
    finished = [(record, value) for record, value in source.valued() if record.state == "finished"]
    result, share = [], scheduler.grace_fraction
    while share < 1 - 1e-9:
        pairs = []
        for record, value in finished:
            at = math.ceil(share * len(record.epochs) - 1e-9)
            early = record.epochs[at - 1].get(source.spec.best_objective) if at < len(record.epochs) else None
            if early is not None:
                pairs.append((record, early, value))
        result.append(Rung(share, tuple(pairs)))
        share *= scheduler.reduction_factor
    return result


@dataclass(frozen=True)
class Importance:
    """A parameter's share in the difference between the best quarter of its trials and all of them."""

    key: str
    share: float
    num_trials: int


def importances(source: ReportData) -> list[Importance]:
    """PED-ANOVA [Watanabe et al. 2023] of each parameter over the trials that sampled it: shares, largest first."""
    space, base, study = source.space, source.spec.base, _new_study()
    for record, value in source.valued():
        fixed = optuna.trial.FixedTrial(space.to_optuna_params(record.draw, base))
        space.sample(fixed, base)
        study.add_trial(
            optuna.trial.create_trial(value=value, params=fixed.params, distributions=dict(fixed.distributions))
        )
    raw: dict[str, tuple[float, int]] = {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST_FRACTION)
    for parameter in space.parameters:
        sampled = [trial.params[parameter.name] for trial in study.trials if parameter.name in trial.params]
        if len(sampled) < MIN_TRIALS or len(set(sampled)) < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importance = evaluator.evaluate(study, params=[parameter.name])[parameter.name]
        value, count = raw.get(parameter.key, (0.0, 0))
        raw[parameter.key] = (max(value, importance), count + len(sampled))
    total = sum(value for value, _ in raw.values()) or 1.0
    shares = [Importance(key, value / total, count) for key, (value, count) in raw.items()]
    return sorted(shares, key=lambda importance: -importance.share)


def _new_study() -> optuna.Study:
    """An Optuna study, made without Optuna's log line on it."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(before)


def search_bias_note(source: ReportData) -> tuple[bool, str]:
    """Whether values can be compared fairly (docs/protocol.md, Splits, counts, selection), and a sentence on it."""
    spec = source.spec
    stopped = any(record.state == "stopped" for record in source.log.of("search"))
    caveat = " Stopped trials count with their best until then." if stopped else ""
    sampler = SAMPLERS[spec.searcher.name]
    if sampler.independent:
        return True, f"All trials were sampled by {sampler.title}, so each value had the same chance.{caveat}"
    if spec.stratify:
        keys = ", ".join(spec.stratify)
        return True, (
            f"Each choice of {keys} got the same number of trials, so these compare fairly. Everything else was "
            f"sampled by {sampler.title}, which prefers values with good results: a hint, not a finding.{caveat}"
        )
    return False, (
        f"A hint, not a finding: {sampler.title} sampled these trials and prefers values with good results, so values "
        "that it tried often look better than others. A sweep with stratify or searcher.name: random shows what "
        f"mattered.{caveat}"
    )
