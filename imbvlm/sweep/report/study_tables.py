"""Tables of a study: scores and costs of every listed configuration, and the effect of fresh crops."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from imbvlm.base.formatting import mean_std
from imbvlm.sweep.records.difference import FIVE_CROPS, splits_of
from imbvlm.sweep.records.refit_selection import fresh_name, listed_names
from imbvlm.sweep.records.summary_tables import HEADINGS, METRICS
from imbvlm.sweep.records.trial_log import TrialRecord
from imbvlm.sweep.report.plotting import Table
from imbvlm.sweep.report.report_data import ReportData, ScoredRefit
from imbvlm.sweep.report.score_tables import gain
from imbvlm.sweep.spec.equivalence import canonical_key
from imbvlm.sweep.spec.published_recipes import published_scores
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.sweep_spec import StudyTable
from imbvlm.training.test_predictions import TEST

SCORES = {
    "top1_accuracy": "overall",
    "many_shot_accuracy": "many",
    "medium_shot_accuracy": "medium",
    "few_shot_accuracy": "few",
    "macro_precision": "precision",
    "macro_recall": "recall",
    "macro_f1": "F1",
}
_Configurations = Mapping[str, tuple[TrialRecord | None, ScoredRefit | None]]
NUM_WORDS = 2


def study_tables(source: ReportData) -> list[Table]:
    """The study's tables in the spec's order."""
    if not source.spec.study:
        return []
    configurations = _configurations(source)
    return [
        (_cost if table.columns == "cost" else _scores)(source, table, configurations) for table in source.spec.study
    ]


def fresh_gap(source: ReportData) -> Table:
    """The effect of fresh crops in place of stored views by shot group, in points; without rows without such runs."""
    refits = {refit.name: refit for refit in source.scored}
    rows = []
    for pair in [(refit, refits[fresh]) for name, refit in refits.items() if (fresh := fresh_name(name)) in refits]:
        for refit in pair:
            means = (mean_std(refit.values(f"test/{metric}")) for metric in METRICS)
            rows.append([refit.name, refit.records[0].views, str(len(refit.records)), *means])
        of_stored, of_fresh = ([refit.values(f"test/{metric}") for metric in METRICS] for refit in pair)
        rows.append(["difference", "", "", *map(gain, of_fresh, of_stored)])
    caption = (
        "Percent, test split; the difference in points, fresh crops minus stored views, ± the standard deviation over "
        "the seeds of both."
    )
    return Table("fresh_crops", "Stored views and fresh crops", ["what", "views", "seeds", *HEADINGS], rows, 2, caption)


def _scores(source: ReportData, table: StudyTable, configurations: _Configurations) -> Table:
    rows, published = list[list[str]](), published_scores(source.spec.base["data"]["manifest"])
    for row in table.rows:
        record, scored = configurations[row.configuration]
        views = "-" if record is None else record.views
        if scored is None:
            rows.append([row.label, views, "0", *["-"] * len(SCORES)])
            continue
        for split in splits_of(scored.records, list(SCORES), (TEST, FIVE_CROPS)):
            values = [mean_std(scored.values(f"{split}/{metric}")) for metric in SCORES]
            label = row.label if split == TEST else "  five crops"
            rows.append([label, views, str(len(scored.records)), *values])
        rows += [
            [
                f"  {entry.source}",
                "-",
                "-",
                *(f"{entry.scores[key]:.1f}" if key in entry.scores else "-" for key in SCORES),
            ]
            for entry in published
            if record is not None and entry.matches(record.trial_config())
        ]
    caption = "Percent, test split, read once. ± is the standard deviation over seeds. Precision, recall, F1: macro."
    return Table(table.name, table.title, ["what", "views", "seeds", *SCORES.values()], rows, NUM_WORDS, caption)


def _cost(source: ReportData, table: StudyTable, configurations: _Configurations) -> Table:
    spec, rows = source.spec, list[list[str]]()
    gpus = spec.gpus_per_trial
    units = gpus or spec.cpus_per_trial
    for row in table.rows:
        record, scored = configurations[row.configuration]
        if scored is None:
            rows.append([row.label, *["-"] * 6])
            continue
        hours = statistics.fmean(record.seconds() for record in scored.records) * units / 3600
        peaks = scored.values("memory/peak_bytes")
        rows.append(
            [
                row.label,
                "-" if record is None else record.views,
                f"{hours:.3g}",
                f"{max(peaks) / 1e9:.2f}" if peaks else "-",
                *_parameter_cells(scored),
            ]
        )
    unit = "GPU-hours" if gpus else "CPU-hours"
    header = ["what", "views", unit, "peak memory (GB)", "parameters", "trained", "share (%)"]
    caption = (
        f"{unit} of one training on all training images, including the scores on the test split. The pass that stores "
        "a frozen encoder's output is shared and not included. "
        f"Peak memory: {'of the GPU' if gpus else 'of the process'}."
    )
    return Table(table.name, table.title, header, rows, NUM_WORDS, caption)


def parameters(source: ReportData) -> Table:
    """Parameters of each refit: in total with the encoder's, trained ones, their share."""
    rows = [[refit.name, *_parameter_cells(refit)] for refit in source.scored if refit.classes is not None]
    return Table("parameters", "What trains", ["what", "parameters", "trained", "share (%)"], rows)


def _parameter_cells(scored: ScoredRefit) -> list[str]:
    if scored.classes is None:
        return ["-", "-", "-"]
    total, trained = scored.classes.num_parameters, scored.classes.num_trained_parameters
    return [f"{total:,}", f"{trained:,}", f"{100 * trained / max(1, total):.3g}"]


def _configurations(source: ReportData) -> _Configurations:
    """The search's trial and the refit of each listed configuration; equal configurations share a trial."""
    space = source.space
    assert isinstance(space, ListedSpace), "a study's space is a list"
    records: dict[str, TrialRecord] = {}
    for trial in source.log.of("search"):
        records.setdefault(canonical_key(trial.trial_config()), trial)
    names, scored = listed_names(source.log, source.spec), {refit.name: refit for refit in source.scored}
    configurations: dict[str, tuple[TrialRecord | None, ScoredRefit | None]] = {}
    for name, draw in space.configurations.items():
        record = records.get(canonical_key(source.spec.trial(draw)))
        configurations[name] = (record, None if record is None else scored.get(names[record.trial_id]))
    return configurations
