"""The tables at the end of a sweep: best trials and baselines on validation, refits on the test split."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from imbvlm.base.formatting import duration, mean_std, percent, pluralize
from imbvlm.base.text_tables import UNLIMITED, table
from imbvlm.config.encoder_entries import score_notes
from imbvlm.data.manifest import Manifest
from imbvlm.data.split_power import resolve_folds, validation_rows
from imbvlm.longtail.claims import PairedDifference, paired_difference
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.taxonomy import LCA_HEIGHT, RANK_ERROR
from imbvlm.sweep.records.adjustment_selection import NUM_BEST, logits_file
from imbvlm.sweep.records.difference import ALL_SPLITS, Difference, splits_of, title_in, values_in
from imbvlm.sweep.records.provenance import data_name
from imbvlm.sweep.records.trial_log import ENDED, TrialLog, TrialRecord, describe_trial, last_values, name_rank
from imbvlm.sweep.records.winner_selection import Selection
from imbvlm.sweep.spec.objectives import SECONDS, metric_value, outcome, pareto_indices
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.test_predictions import TEST
from imbvlm.training.validation_logits import read_logits

METRICS = ("top1_accuracy", "balanced_accuracy", "many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy")
HEADINGS = ("overall", "balanced", "many", "medium", "few")
MAX_CAUSES = 5
# Paths, ids in hexadecimal digits, and numbers.
_VARIABLE = re.compile(
    r"(?<![\w.])(?:\w+:/)?/[^\s:;,()'\"]+|\b(?=[a-f]*\d)[0-9a-f]{6,}\b|\d+(?:[.,]\d+)*(?:e[+-]?\d+)?"
)


def run_header(spec: SweepSpec, manifest: Manifest, folder: str, log: TrialLog) -> str:
    """Lines on the sweep, its data and the records of an earlier run."""
    stats = manifest.class_stats()
    rows = ", ".join(f"{len(manifest.rows_of(split)):,} {split}" for split in manifest.splits)
    lines = [
        f"sweep {spec.name}: {spec.num_trials} trials, objective {spec.best_objective}, in {folder}",
        f"data {spec.base['data']['manifest']}: {stats.num_classes:,} classes ({len(stats.many_shot)} many-, "
        f"{len(stats.medium_shot)} medium-, {len(stats.few_shot)} few-shot), images: {rows}; "
        f"imbalance factor {stats.imbalance_factor:.3g}",
    ]
    if "val" not in manifest.splits:
        lines.append(f"no validation split: {_describe_validation(spec, manifest, stats)}")
    if log.records:
        ended = sum(record.state in ENDED for record in log.records.values())
        lines.append(f"resuming: {ended} of {len(log.records)} started trials have ended and stay")
    return "\n".join(lines)


def _describe_validation(spec: SweepSpec, manifest: Manifest, stats: ClassStats) -> str:
    """A clause on the training images that score trials, and on the classes that they cover."""
    num_folds = resolve_folds(spec.num_folds, manifest, spec.split_seed)
    held_out, scored = (validation_rows(manifest, spec.split_seed, number) for number in (1, num_folds))
    coverage = ", ".join(
        f"{len(np.intersect1d(labels, manifest.labels[scored]))} of {len(labels)} {group.replace('_', '-')}"
        for group, labels in stats.shot_groups.items()
        if len(labels)
    )
    if num_folds == 1:
        return (
            f"{len(held_out):,} training images are held out for selection and returned for the refit; they cover "
            f"{coverage} classes"
        )
    folds = f"{num_folds} folds of the training images{', whole groups each' if manifest.has_groups else ''}"
    return (
        f"trials on stored features are scored over {folds}, on {len(scored):,} of "
        f"them in {coverage} classes; trials that train the encoder are scored on {len(held_out):,} held-out ones"
    )


def encoder_notes(log: TrialLog, spec: SweepSpec) -> list[str]:
    """Sentences that belong beside a sweep's scores: encoders that have seen its data, non-commercial licenses."""
    location = str(spec.base["data"]["manifest"]).rstrip("/").rpartition("/")[2]
    data = data_name(log.folder) or location.rpartition(":")[2].removesuffix(".parquet")
    names = (str(record.config["encoder"]["name"]) for record in log.records.values() if record.epochs)
    return score_notes(names, data)


def note_lines(log: TrialLog, spec: SweepSpec) -> list[str]:
    """The lines of `encoder_notes` below a table."""
    return [f"note: {note}" for note in encoder_notes(log, spec)]


def failure_causes(failed: list[TrialRecord], noun: str = "trial") -> str:
    """Causes of failures, the most common first; causes that differ only in numbers, ids or paths are one."""
    grouped: dict[str, Counter[str]] = {}
    for record in failed:
        cause = _VARIABLE.sub("#", record.stop_reason)
        grouped.setdefault(cause, Counter())[record.stop_reason] += 1
    ranked = sorted(grouped.values(), key=lambda reasons: -reasons.total())
    lines = [f"{pluralize(len(failed), noun)} failed:"]
    for reasons in ranked[:MAX_CAUSES]:
        (reason, _), *others = reasons.most_common()
        suffix = " (with other numbers or names in the others)" if others else ""
        lines.append(f"  {reasons.total()} x {reason}{suffix}")
    rest = ranked[MAX_CAUSES:]
    if rest:
        num_failed = sum(reasons.total() for reasons in rest)
        lines.append(f"  {num_failed} x {pluralize(len(rest), 'other cause')}; each record in trials/ has its own")
    return "\n".join(lines)


def search_table(log: TrialLog, spec: SweepSpec, width: int = UNLIMITED) -> str:
    """The best trials and the baselines on validation, each at its best epoch; percent."""
    best = log.best(spec.objective)[:NUM_BEST]
    rows = [_row(record, spec, log.constraint_violation(record, spec.objective) > 0) for record in best]
    rows += [_row(record, spec) for record in log.of("baseline")]
    header = ["trial", "what", "epochs", "views", *HEADINGS]
    return f"validation, at each trial's best epoch (%):\n{table(header, rows, width)}"


def seeds_rows(log: TrialLog, spec: SweepSpec) -> list[list[str]]:
    """Trials that ran with several seeds, the best mean first: trial, description, seeds, mean and deviation."""
    rows, repeated = [], {record.name for record in log.of("confirm")}
    for record in log.best(spec.objective):
        values = log.seed_values(record, spec.objective) if record.trial_id in repeated else []
        if len(values) > 1:
            rows.append([record.trial_id, describe_trial(record), str(len(values)), mean_std(values)])
    return rows


def seeds_table(log: TrialLog, spec: SweepSpec, width: int = UNLIMITED) -> str:
    """The best few trials over several seeds, the winner first; percent."""
    header = ["trial", "what", "seeds", objective_text(spec)]
    return f"validation, the best few over several seeds (%):\n{table(header, seeds_rows(log, spec), width)}"


def objective_text(spec: SweepSpec) -> str:
    """The objective's name for tables, such as `balanced accuracy`."""
    return spec.objective.removeprefix("val/").replace("_", " ")


def verdict(log: TrialLog, spec: SweepSpec, selection: Selection | None) -> str:
    """A sentence: whether the delivered model beats the best baseline on validation, by the interval of its gain.

    Where the selection has no such gain, it is of the winner and of baselines without adjustment. A trial with several
    seeds then counts by their mean, as in the selection.
    """
    best, baselines = log.winner_first(spec.objective)[0], log.best(spec.objective, "baseline")
    is_blend = log.selected is not None and bool(log.selected.members)
    if best.kind == "baseline" and not is_blend:
        return f"validation selects the baseline {best.name} by log-likelihood; try more trials or another space"
    if best.kind != "baseline" and log.constraint_violation(best, spec.objective):
        limits = " and ".join(f"{metric} {limit:g}" for metric, limit in spec.constraints.items())
        return f"no trial meets the constraints ({limits}); {best.trial_id} comes nearest: try more trials"
    if selection is not None and selection.gain is not None:
        return _corrected_verdict(selection.gain, log.records[selection.baseline].name, is_blend=is_blend)
    if best.kind == "baseline":
        return f"the best single model by log-likelihood is the baseline {best.name}, and the blend beats it"
    if not baselines:
        return "no baseline gave a result"
    name, values = baselines[0].name, log.seed_values(best, spec.objective)
    gain = log.mean_value(best, spec.objective) - log.mean_value(baselines[0], spec.objective)
    which = "the winner is" if len(values) == 1 else f"the winner's mean of {len(values)} seeds is"
    # Trials report the standard error of balanced accuracy only, and where images have no groups.
    has_error = spec.objective == "val/balanced_accuracy"
    epochs = [record.best_epoch(spec.objective) or {} for record in (best, baselines[0])]
    errors = [epoch.get("val/balanced_standard_error") if has_error else None for epoch in epochs]
    difference = Difference.of(f"the baseline {name}", gain, errors)
    if None in errors and has_error:
        difference = _over_groups(difference, log.folder, best, baselines[0])
    if gain <= 0:
        return (
            f"the winner does not beat the baseline {name} on validation ({100 * gain:+.1f} points, "
            f"{difference.interval_text}); try more trials or another space"
        )
    sentence = f"{which} {difference.text} on validation ({difference.interval_text})"
    return sentence if difference.is_win else f"{sentence}: no win is shown"


def _corrected_verdict(gain: PairedDifference, baseline: str, *, is_blend: bool) -> str:
    difference = Difference(f"the baseline {baseline}", gain.difference, gain.low, gain.high, gain.num_groups)
    sentence = (
        f"{'the blend' if is_blend else 'the winner'} is {difference.text} in balanced accuracy on validation, both as "
        f"adjusted, corrected for the selection ({difference.interval_text})"
    )
    if difference.is_win:
        return sentence
    return f"{sentence}: no win is shown{'; try more trials or another space' if gain.difference <= 0 else ''}"


def _over_groups(difference: Difference, folder: str, ours: TrialRecord, theirs: TrialRecord) -> Difference:
    """The difference with the interval of a paired bootstrap over groups of validation images at both best epochs.

    Unchanged where images have no groups or logits are missing.
    """
    pair = [read_logits(logits_file(folder, record.trial_id)) for record in (ours, theirs)]
    saved = [logits for logits in pair if logits is not None]
    if len(saved) < 2 or saved[0].groups is None or not torch.equal(saved[0].targets, saved[1].targets):
        return difference
    logits = [best for own in saved if (best := own.best()) is not None]
    if len(logits) < 2:
        return difference
    own, other = ((of.argmax(dim=1) == saved[0].targets).numpy() for of in logits)
    paired = paired_difference(own, other, saved[0].targets.numpy(), groups=saved[0].groups.numpy())
    # More seeds score the same images.
    shift = difference.gain - paired.difference
    return replace(difference, low=paired.low + shift, high=paired.high + shift, num_groups=paired.num_groups)


def pareto_records(log: TrialLog, spec: SweepSpec) -> list[TrialRecord]:
    """The Pareto set: trials that meet the constraints and that no other beats in all objectives, the best first."""
    feasible = [record for record in log.best(spec.objective) if not log.constraint_violation(record, spec.objective)]
    outcomes = [(record, outcome(record.epochs, spec.objective, spec.other_objectives, {})) for record in feasible]
    pairs = [(record, result.values) for record, result in outcomes if result is not None]
    return [pairs[index][0] for index in pareto_indices([values for _, values in pairs], spec.objectives)]


def pareto_rows(records: list[TrialRecord], spec: SweepSpec) -> list[list[str]]:
    """Rows of the Pareto set: trial, description, the value of each objective."""
    rows = []
    for record in records:
        values = [metric_value(record.epochs, spec.objective, metric) for metric in spec.objectives]
        shown = [
            duration(value or 0.0) if metric == SECONDS else percent(value)
            for metric, value in zip(spec.objectives, values, strict=True)
        ]
        rows.append([record.trial_id, f"{describe_trial(record)}{_mark(record)}", *shown])
    return rows


def pareto_table(records: list[TrialRecord], spec: SweepSpec, width: int = UNLIMITED) -> str:
    """The Pareto set with the value of each objective."""
    text = table(["trial", "what", *spec.objectives], pareto_rows(records, spec), width)
    return f"no trial is better in all objectives than these (%):\n{text}"


def _mark(record: TrialRecord) -> str:
    """A mark of stopped trials, whose values are their best so far and not their final ones."""
    return " (stopped early)" if record.state == "stopped" else ""


def _row(record: TrialRecord, spec: SweepSpec, is_violation: bool = False) -> list[str]:
    best = record.best_epoch(spec.objective) or {}
    violation = " (BREAKS A CONSTRAINT)" if is_violation else ""
    return [
        record.trial_id,
        f"{record.name or describe_trial(record)}{violation}{_mark(record)}",
        str(len(record.epochs)),
        record.views,
        *(percent(best.get(f"val/{metric}")) for metric in METRICS),
    ]


def format_value(key: str, value: object) -> str:
    """A sampled value as text: `linear_probe` is "linear probe"; an encoder keeps the name that users type."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "none"
    return str(value) if key.startswith("encoder.") or not isinstance(value, str) else value.replace("_", " ")


def scores_table(scored: list[TrialRecord], width: int = UNLIMITED) -> str:
    """Refits on the test split: means over seeds and their standard deviations; percent."""
    rows = []
    for name in sorted(dict.fromkeys(record.name for record in scored), key=name_rank):
        records = [record for record in scored if record.name == name and record.epochs]
        for split in splits_of(records, METRICS, ALL_SPLITS):
            values = [mean_std(last_values(records, f"{split}/{metric}")) for metric in METRICS]
            views = records[0].views if records else "-"
            rows.append([title_in(name, split), views, str(len(records)), *values])
    title = "test split, read once, after refitting on all training images (%; ± is the standard deviation over seeds):"
    return f"{title}\n{table(['what', 'views', 'seeds', *HEADINGS], rows, width)}"


def rank_metrics(records: Iterable[TrialRecord]) -> dict[str, str]:
    """The metrics of a taxonomy that records have, with their headings, from the classes up; {} without a taxonomy."""
    keys = dict.fromkeys(key for record in records if record.epochs for key in record.epochs[-1])
    prefix = f"{TEST}/{RANK_ERROR}"
    ranks = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    return {**{f"{RANK_ERROR}{rank}": rank for rank in ranks}, LCA_HEIGHT: "height"} if ranks else {}


def rank_cells(records: Sequence[TrialRecord], split: str, metrics: Mapping[str, str]) -> list[str]:
    """Errors by rank in percent and the mean height, over seeds; dashes where a model was scored without a taxonomy."""
    *errors, heights = [values_in(records, split, metric) for metric in metrics]
    spread = f" ± {statistics.stdev(heights):.2f}" if len(heights) > 1 else ""
    return [*map(mean_std, errors), f"{statistics.fmean(heights):.2f}{spread}" if heights else "-"]


def rank_rows(scored: Sequence[TrialRecord]) -> list[list[str]]:
    """A heading, and each model's errors by rank on the test split as it is exported; empty without a taxonomy."""
    metrics, rows = rank_metrics(scored), []
    for name in sorted(dict.fromkeys(record.name for record in scored), key=name_rank) if metrics else ():
        records = [record for record in scored if record.name == name and record.epochs]
        split = splits_of(records)[-1]
        rows.append([title_in(name, split), *rank_cells(records, split, metrics)])
    return [["what", *metrics.values()], *rows] if rows else []


def ranks_lines(scored: Sequence[TrialRecord], width: int = UNLIMITED) -> list[str]:
    """The rows of `rank_rows` as lines of text after an empty one; none without a taxonomy."""
    header, *rows = rank_rows(scored) or [[]]
    title = "errors by rank on the test split (%, means over classes), and height of the lowest common ancestor:"
    return ["", title, table(header, rows, width)] if rows else []
