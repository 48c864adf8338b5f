"""The tables at the end of a sweep: best trials beside the baselines on validation, then one look at the test split."""

from __future__ import annotations

import statistics

from imbvlm.sweep.console import percent, table
from imbvlm.sweep.results import TrialLog, TrialRecord
from imbvlm.sweep.spec import SweepSpec

METRICS = ("top1_accuracy", "balanced_accuracy", "many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy")
HEADINGS = ("overall", "balanced", "many", "medium", "few")
NUM_BEST = 8


def search_table(log: TrialLog, spec: SweepSpec) -> str:
    """The best trials and both baselines on validation, each at the epoch with its best objective; percent."""
    rows = [_row(record, spec) for record in log.best(spec.objective)[:NUM_BEST]]
    rows += [_row(record, spec) for record in log.of("baseline")]
    header = ["trial", "what", "epochs", "views", *HEADINGS]
    return f"validation, at each trial's best epoch (%):\n{table(header, rows)}"


def verdict(log: TrialLog, spec: SweepSpec) -> str:
    """Whether the best trial beats the best baseline on validation by more than the standard error."""
    best, baselines = log.best(spec.objective)[0], log.best(spec.objective, "baseline")
    if not baselines:
        return "no baseline gave a result"
    name = baselines[0].name
    gain = (best.best_value(spec.best_objective) or 0.0) - (baselines[0].best_value(spec.best_objective) or 0.0)
    error = (best.best_epoch(spec.objective) or {}).get("val/balanced_standard_error")
    if gain <= 0:
        return f"no trial beats the baseline {name} on validation ({100 * gain:+.1f} points); try more trials or another space"
    if spec.objective == "val/balanced_accuracy" and error is not None and gain <= error:
        return (
            f"the best trial is {100 * gain:+.1f} points from the baseline {name} on validation, within its standard "
            f"error of {100 * error:.1f}: no difference is shown"
        )
    return f"the best trial is {100 * gain:+.1f} points above the baseline {name} on validation" + (
        f" (standard error {100 * error:.1f})"
        if error is not None and spec.objective == "val/balanced_accuracy"
        else ""
    )


def _row(record: TrialRecord, spec: SweepSpec) -> list[str]:
    best = record.best_epoch(spec.objective) or {}
    what = record.name or describe(record)
    return [
        record.trial_id,
        what,
        str(len(record.epochs)),
        record.views,
        *(percent(best.get(f"val/{metric}")) for metric in METRICS),
    ]


def describe(record: TrialRecord) -> str:
    """A trial in a few words: method, loss, classifier, sampling, rate."""
    config = record.config
    loss, classifier, optim = config.get("loss") or {}, config.get("classifier") or {}, config.get("optim") or {}
    knobs = [
        f"{key} {value:.3g}"
        for key, value in loss.items()
        if isinstance(value, (int, float)) and key in ("gamma", "tau", "exponent", "beta", "max_margin")
    ]
    parts = [
        config["method"].replace("_", " ") + (f" depth {config['decoder']['depth']}" if config.get("decoder") else ""),
        " ".join([loss.get("name", "").replace("_", " "), *knobs]),
        classifier.get("kind", "") + (f" {classifier['temperature']:.3g}" if "temperature" in classifier else ""),
        config["data"]["class_sampling"].replace("_", " "),
        f"lr {optim['lr']:.2g}" if optim else "",
    ]
    return ", ".join(part for part in parts if part)


def test_table(scored: list[TrialRecord], spec: SweepSpec) -> str:
    """Refits on the test split: mean over seeds, and their standard deviation behind ±; percent."""
    rows = []
    for name in dict.fromkeys(record.name for record in scored):
        last = [record.epochs[-1] for record in scored if record.name == name and record.epochs]
        cells = [
            _mean_and_spread([epoch[f"test/{metric}"] for epoch in last if f"test/{metric}" in epoch])
            for metric in METRICS
        ]
        rows.append([name, str(len(last)), *cells])
    title = "test split, read once, after refitting on all training images (%; ± is the standard deviation over seeds):"
    return f"{title}\n{table(['what', 'seeds', *HEADINGS], rows)}"


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = percent(statistics.fmean(values))
    return f"{mean} ± {percent(statistics.stdev(values))}" if len(values) > 1 else mean
