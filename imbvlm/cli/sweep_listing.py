"""Sweeps as text: a list of a storage folder's sweeps, a sweep in full, several side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence

from imbvlm.base.console import Console
from imbvlm.base.errors import printable
from imbvlm.base.formatting import duration, join_limited, mean_std, percent
from imbvlm.base.plugin_files import plugin_options
from imbvlm.base.text_tables import table
from imbvlm.sweep.records.difference import delivered_verdict, title_in
from imbvlm.sweep.records.resource_usage import ResourceUsage, compute_text
from imbvlm.sweep.records.summary_tables import (
    HEADINGS,
    METRICS,
    failure_causes,
    note_lines,
    objective_text,
    pareto_records,
    pareto_table,
    ranks_lines,
    scores_table,
    search_table,
    seeds_rows,
    seeds_table,
    verdict,
)
from imbvlm.sweep.records.sweep_folder import SweepState, Unreadable
from imbvlm.sweep.records.trial_log import DELIVERED, WINNER, TrialLog, TrialRecord, describe_trial, name_rank
from imbvlm.sweep.records.winner_selection import describe_selection, read_selection
from imbvlm.sweep.report.update_comparison import UpdateComparison
from imbvlm.training.test_predictions import TEST


def list_text(states: Sequence[SweepState], unreadable: Sequence[Unreadable]) -> str:
    """The sweeps as a table, followed by those that can't be read, with the reasons."""
    header = ["sweep", "state", "trials", "best (%)", "data", "started"]
    rows = [
        [
            state.folder,
            "finished" if state.is_finished else "unfinished",
            f"{state.num_ended}/{state.spec.num_trials}",
            f"{percent(state.best_value)} {objective_text(state.spec)}, {state.best.trial_id}" if state.best else "-",
            state.data,
            "-" if state.started_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(state.started_at)),
        ]
        for state in states
    ]
    lines = list(dict.fromkeys(note for state in states for note in note_lines(state.log, state.spec)))
    lines += [f"{printable(sweep.folder)}  unreadable: {sweep.reason}" for sweep in unreadable]
    return "\n".join([*([table(header, rows, Console().width)] if rows else []), *lines])


def show_text(state: SweepState) -> str:
    """The tables of a sweep, as far as it has come."""
    spec, log, width = state.spec, state.log, Console().width
    resume = f"imbvlm sweep resume {printable(state.folder + plugin_options())}"
    progress = "finished" if state.is_finished else f"unfinished; go on with: {resume}"
    parts = [f"sweep {spec.name}: {state.num_ended} of {spec.num_trials} trials, {progress}"]
    failed = [record for record in log.of("search") if record.state in ("failed", "error")]
    parts += [failure_causes(failed)] if failed else []
    if state.best is not None:
        parts += ["", search_table(log, spec, width)]
        parts += [seeds_table(log, spec, width)] if seeds_rows(log, spec) else []
        selection = read_selection(state.folder)
        parts += [] if selection is None else [describe_selection(selection, log, spec, bool(state.scored))]
        parts += [verdict(log, spec, selection)]
        parts += ["", pareto_table(pareto_records(log, spec), spec, width)] if spec.other_objectives else []
    if state.scored:
        on_test = delivered_verdict(log, spec.objective)
        parts += ["", scores_table(state.scored, width), *([] if on_test is None else [str(on_test)])]
        parts += ranks_lines(state.scored, width)
    update = UpdateComparison.read(state.folder)
    parts += [] if update is None else ["", update.describe(width)]
    parts += note_lines(log, spec)
    time_and_savings = compute_text(ResourceUsage.read(state.folder, spec, log))
    return "\n".join([*parts, *(["", time_and_savings] if time_and_savings else [])])


def compare_text(states: Sequence[SweepState]) -> str:
    """Sweeps side by side: winners and baselines on the test split, as trained and as adjusted after training."""
    keys = {row for state in states for row in state.compared}
    rows = [
        _compared_row(state, name, split)
        for name, split in sorted(keys, key=lambda row: (name_rank(row[0]), row[0] == "zero-shot", row))
        for state in states
        if (name, split) in state.compared
    ]
    header = ["sweep", "what", "trials", "time", "validation", *HEADINGS, "views", "configuration"]
    title = "the delivered model as exported; refits on the test split, mean ± deviation of seeds (%):"
    return "\n".join([title, table(header, rows, Console().width), *_notes(states)])


def _compared_row(state: SweepState, name: str, split: str) -> list[str]:
    is_winner = name == WINNER
    log, objective = state.log, state.spec.objective
    ranked = log.winner_first(objective) if is_winner else log.best(objective, "baseline")
    record = next((record for record in ranked if is_winner or record.name == name), None)
    return [
        state.folder.rstrip("/").rpartition("/")[2],
        title_in(name, split),
        f"{state.num_ended}/{state.spec.num_trials}" if is_winner else "-",
        "-" if state.seconds is None or not is_winner else duration(state.seconds),
        # Validation scored the model as trained.
        percent(None if record is None or split != TEST else log.mean_value(record, objective)),
        *(mean_std(state.test_values(name, metric, split)) for metric in METRICS),
        "-" if record is None else record.views,
        _configuration(log, name, record),
    ]


def _configuration(log: TrialLog, name: str, record: TrialRecord | None) -> str:
    """The winner in a few words, and the members of a delivered blend."""
    if name == DELIVERED and log.selected is not None and log.selected.members:
        return f"blend of {', '.join(log.selected.members)}"
    return "-" if record is None or name != WINNER else describe_trial(record)


def _notes(states: Sequence[SweepState]) -> list[str]:
    """Notes on encoders, and on differences between the sweeps, that make their numbers hard to compare."""
    notes = dict.fromkeys(note for state in states for note in note_lines(state.log, state.spec))
    data, objectives = [state.manifest for state in states], [state.spec.objective for state in states]
    return [
        *notes,
        *(
            f"these sweeps differ in {noun} ({join_limited(list(dict.fromkeys(values)))}): compare with care"
            for noun, values in (("data", data), ("objectives", objectives))
            if len(set(values)) > 1
        ),
    ]
