"""The tables at the end of a sweep: best trials beside the baselines on validation, then one look at the test split."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from imbvlm.base.formatting import duration, mean_std, percent, pluralize, table
from imbvlm.data.manifest import Manifest
from imbvlm.data.splits import carve_validation
from imbvlm.longtail.class_stats import SHOT_GROUPS
from imbvlm.sweep.records.difference import Difference
from imbvlm.sweep.records.trial_log import ENDED, TrialLog, TrialRecord, describe_trial
from imbvlm.sweep.spec.objectives import SECONDS, metric_value, outcome, pareto_indices
from imbvlm.sweep.spec.sweep_spec import SweepSpec

METRICS = ("top1_accuracy", "balanced_accuracy", "many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy")
HEADINGS = ("overall", "balanced", "many", "medium", "few")
NUM_BEST = 8
MAX_CAUSES = 5
# Paths, ids in hexadecimal digits, and numbers.
_VARIES = re.compile(r"(?<![\w.])(?:\w+:/)?/[^\s:;,()'\"]+|\b(?=[a-f]*\d)[0-9a-f]{6,}\b|\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


def run_header(spec: SweepSpec, manifest: Manifest, folder: str, log: TrialLog) -> str:
    """What is about to run, on which data, and what an earlier run has left."""
    stats = manifest.class_stats()
    rows = ", ".join(f"{len(manifest.rows_of(split)):,} {split}" for split in manifest.splits)
    lines = [
        f"sweep {spec.name}: {spec.num_trials} trials, objective {spec.best_objective}, in {folder}",
        f"data {spec.base['data']['manifest']}: {stats.num_classes:,} classes ({len(stats.many_shot)} many-, "
        f"{len(stats.medium_shot)} medium-, {len(stats.few_shot)} few-shot), images: {rows}; "
        f"imbalance factor {stats.imbalance_factor:.3g}",
    ]
    if "val" not in manifest.splits:
        carved = carve_validation(manifest, int(spec.base["data"].get("split_seed", 0)))
        coverage = ", ".join(
            f"{len(np.intersect1d(getattr(stats, group), manifest.labels[carved]))} of {len(getattr(stats, group))} "
            f"{group.replace('_', '-')}"
            for group in SHOT_GROUPS
            if len(getattr(stats, group))
        )
        lines.append(
            f"no validation split: {len(carved):,} training images are carved off for selection and returned for the "
            f"refit; they cover {coverage} classes"
        )
    if log.records:
        ended = sum(record.state in ENDED for record in log.records.values())
        lines.append(f"resuming: {ended} of {len(log.records)} started trials have ended and stay")
    return "\n".join(lines)


def failure_causes(failed: list[TrialRecord], what: str = "trial") -> str:
    """Why trials failed, the commonest cause first; those that differ in numbers, ids or paths alone are one cause."""
    grouped: dict[str, Counter[str]] = {}
    for record in failed:
        grouped.setdefault(_without_numbers(record.stop_reason), Counter())[record.stop_reason] += 1
    ranked = sorted(grouped.values(), key=lambda reasons: -reasons.total())
    lines = [f"{pluralize(len(failed), what)} failed:"]
    for reasons in ranked[:MAX_CAUSES]:
        (reason, _), *others = reasons.most_common()
        unlike = " (with other numbers or names in the others)" if others else ""
        lines.append(f"  {reasons.total()} x {reason}{unlike}")
    rest = ranked[MAX_CAUSES:]
    if rest:
        num_failed = sum(reasons.total() for reasons in rest)
        lines.append(f"  {num_failed} x {pluralize(len(rest), 'other cause')}; each record in trials/ has its own")
    return "\n".join(lines)


def _without_numbers(reason: str) -> str:
    return _VARIES.sub("#", reason)


def search_table(log: TrialLog, spec: SweepSpec) -> str:
    """The best trials and both baselines on validation, each at the epoch with its best objective; percent."""
    best = log.best(spec.objective)[:NUM_BEST]
    rows = [_row(record, spec, log.constraint_violation(record, spec.objective) > 0) for record in best]
    rows += [_row(record, spec) for record in log.of("baseline")]
    header = ["trial", "what", "epochs", "views", *HEADINGS]
    return f"validation, at each trial's best epoch (%):\n{table(header, rows)}"


def seeds_rows(log: TrialLog, spec: SweepSpec) -> list[list[str]]:
    """Trials that were run again with more seeds, the best mean first: trial, what, seeds, mean and spread."""
    rows, repeated = [], {one.name for one in log.of("confirm")}
    for record in log.best(spec.objective):
        values = log.seed_values(record, spec.objective) if record.trial_id in repeated else []
        if len(values) > 1:
            rows.append([record.trial_id, describe_trial(record), str(len(values)), mean_std(values)])
    return rows


def seeds_table(log: TrialLog, spec: SweepSpec) -> str:
    """The best few over several seeds, of which the first is the winner; percent."""
    header = ["trial", "what", "seeds", objective_words(spec)]
    return f"validation, the best few over several seeds (%):\n{table(header, seeds_rows(log, spec))}"


def objective_words(spec: SweepSpec) -> str:
    return spec.objective.removeprefix("val/").replace("_", " ")


def verdict(log: TrialLog, spec: SweepSpec) -> str:
    """Whether the best trial beats the best baseline on validation beyond the 95 % interval of their difference.

    A trial that was run with more seeds stands by their mean, as it was chosen.
    """
    best, baselines = log.best(spec.objective)[0], log.best(spec.objective, "baseline")
    if log.constraint_violation(best, spec.objective):
        wanted = " and ".join(f"{metric} {limit:g}" for metric, limit in spec.constraints.items())
        return f"no trial meets the constraints ({wanted}); {best.trial_id} comes nearest: try more trials"
    if not baselines:
        return "no baseline gave a result"
    name, values = baselines[0].name, log.seed_values(best, spec.objective)
    gain = log.mean_value(best, spec.objective) - log.mean_value(baselines[0], spec.objective)
    which = "the best trial is" if len(values) == 1 else f"the best trial's mean of {len(values)} seeds is"
    # Of no other metric the standard error is known.
    is_known = spec.objective == "val/balanced_accuracy"
    epochs = [one.best_epoch(spec.objective) or {} for one in (best, baselines[0])]
    errors = [epoch.get("val/balanced_standard_error") if is_known else None for epoch in epochs]
    difference = Difference.of(f"the baseline {name}", gain, errors)
    if gain <= 0:
        return (
            f"no trial beats the baseline {name} on validation ({100 * gain:+.1f} points, "
            f"{difference.interval_words}); try more trials or another space"
        )
    words = f"{which} {difference.words} on validation ({difference.interval_words})"
    return words if difference.is_win else f"{words}: no win is shown"


def pareto_records(log: TrialLog, spec: SweepSpec) -> list[TrialRecord]:
    """The trials of the search that meet the constraints and that no other beats in every objective, the best first."""
    able = [one for one in log.best(spec.objective) if not log.constraint_violation(one, spec.objective)]
    valued = [(one, outcome(one.epochs, spec.objective, spec.other_objectives, {})) for one in able]
    known = [(one, found.values) for one, found in valued if found is not None]
    return [known[index][0] for index in pareto_indices([values for _, values in known], spec.objectives)]


def pareto_rows(records: list[TrialRecord], spec: SweepSpec) -> list[list[str]]:
    """Those that none beats in every objective: trial, what, each objective's value."""
    rows = []
    for record in records:
        values = [metric_value(record.epochs, spec.objective, metric) for metric in spec.objectives]
        shown = [
            duration(value or 0.0) if metric == SECONDS else percent(value)
            for metric, value in zip(spec.objectives, values, strict=True)
        ]
        rows.append([record.trial_id, f"{describe_trial(record)}{_mark(record)}", *shown])
    return rows


def pareto_table(records: list[TrialRecord], spec: SweepSpec) -> str:
    """Those that none beats in every objective, with each objective's value."""
    found = table(["trial", "what", *spec.objectives], pareto_rows(records, spec))
    return f"no trial is better in all objectives than these (%):\n{found}"


def _mark(record: TrialRecord) -> str:
    """A trial that was stopped stands by its best until then: trained to its end it might be better, or come last."""
    return " (stopped early)" if record.state == "stopped" else ""


def _row(record: TrialRecord, spec: SweepSpec, breaks: bool = False) -> list[str]:
    best = record.best_epoch(spec.objective) or {}
    what = (record.name or describe_trial(record)) + (" (BREAKS A CONSTRAINT)" if breaks else "") + _mark(record)
    return [
        record.trial_id,
        what,
        str(len(record.epochs)),
        record.views,
        *(percent(best.get(f"val/{metric}")) for metric in METRICS),
    ]


def value_words(key: str, value: object) -> str:
    """A drawn value for reading: `linear_probe` is "linear probe", while an encoder keeps the name that users type."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "none"
    return str(value) if key.startswith("encoder.") or not isinstance(value, str) else value.replace("_", " ")


def scores_table(scored: list[TrialRecord], spec: SweepSpec) -> str:
    """Refits on the test split: mean over seeds, and their standard deviation behind ±; percent."""
    rows = []
    for name in dict.fromkeys(record.name for record in scored):
        records = [record for record in scored if record.name == name and record.epochs]
        last = [record.epochs[-1] for record in records]
        about = [records[0].views if records else "-", str(len(last))]
        values, adjusted, crops = (
            [[epoch[f"{split}/{metric}"] for epoch in last if f"{split}/{metric}" in epoch] for metric in METRICS]
            for split in ("test", "test_post_hoc", "test_tte")
        )
        rows.append([name, *about, *map(mean_std, values)])
        if any(crops):
            rows.append([f"{name}, five crops", *about, *map(mean_std, crops)])
        # A temperature alone changes no prediction.
        if any(adjusted) and adjusted != values:
            rows.append([f"{name}, post hoc", *about, *map(mean_std, adjusted)])
    title = "test split, read once, after refitting on all training images (%; ± is the standard deviation over seeds):"
    return f"{title}\n{table(['what', 'views', 'seeds', *HEADINGS], rows)}"
