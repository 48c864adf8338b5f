"""The last phase: tables, best.yaml, the report, and the next commands."""

from __future__ import annotations

from imbvlm.base import interrupts, storage
from imbvlm.base.formatting import duration
from imbvlm.base.plugin_files import plugin_options
from imbvlm.base.text_tables import table
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.sweep.export.delivered_export import BLEND_FILE, write_blend_file
from imbvlm.sweep.export.trial_export import best_config, write_best
from imbvlm.sweep.plan.feasibility import untried_methods
from imbvlm.sweep.records.adjustment_selection import describe_post_hoc
from imbvlm.sweep.records.refit_selection import SUPERSEDED
from imbvlm.sweep.records.resource_usage import compute_text
from imbvlm.sweep.records.summary_tables import (
    note_lines,
    pareto_records,
    pareto_table,
    ranks_lines,
    scores_table,
    search_table,
    verdict,
)
from imbvlm.sweep.records.sweep_folder import UNFINISHED_FILE
from imbvlm.sweep.records.trial_log import BLEND, DELIVERED, WINNER
from imbvlm.sweep.records.winner_selection import describe_selection
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.report_writer import write_report_of, write_tables
from imbvlm.sweep.report.study_tables import fresh_gap, study_tables
from imbvlm.sweep.run.sweep_run import SweepRun

PARETO_FOLDER = "pareto"


def conclude(run: SweepRun, seconds: float) -> None:
    """Print the tables, write best.yaml and the report, and print the files and the next commands."""
    echo, best = run.console.print, run.log.winner_first(run.spec.objective)[0]
    echo()
    echo("\n".join([search_table(run.log, run.spec, run.console.width), *note_lines(run.log, run.spec)]))
    if run.selection is not None:
        echo(describe_selection(run.selection, run.log, run.spec, "test" in run.manifest.splits))
    echo(verdict(run.log, run.spec, run.selection))
    if run.spec.other_objectives:
        _write_pareto(run)
    data = ReportData.read(run.folder)
    _print_scores(run, data)
    _print_tables(run, data)
    if data.update is not None:
        echo()
        echo(data.update.describe(run.console.width))
    write_best(run.folder, best, run.spec.base["data"]["manifest"])
    is_blend = run.selection is not None and bool(run.selection.members)
    if run.selection is not None and is_blend:
        write_blend_file(run.folder, run.selection, run.log)
    page = report(run, data)
    # Deleted last: a signal before this point leaves a sweep that can be resumed.
    if not run.num_refits_left:
        storage.delete(storage.join(run.folder, UNFINISHED_FILE))
    echo()
    echo(f"best: {best.trial_id} of {run.folder}, after {duration(seconds)}")
    for name, content in (
        ("best.yaml", "its configuration"),
        *([(BLEND_FILE, "the delivered blend's members")] if is_blend else []),
        *([(page.rpartition("/")[2], "the report, one page for a browser")] if page else []),
        ("results.parquet", "every trial"),
        *([("tables/", "the tables above as CSV and LaTeX")] if run.spec.study else []),
        ("refits/", "the refitted weights"),
    ):
        echo(f"  {storage.join(run.folder, name)}  {content}")
    echo(compute_text(data.compute))
    echo("next:")
    echo(f"  imbvlm export {run.folder} -o my-model{plugin_options()}")
    echo("  imbvlm predict my-model PHOTO.jpg")
    echo(f"  imbvlm train {storage.join(run.folder, 'best.yaml')}{plugin_options()}")
    untried = untried_methods(run.sweep, {key: features.info for key, features in run.features.items()})
    if untried:
        echo(f"not tried: {', '.join(untried)}; docs/guides/choosing.md says when each pays")


def report(run: SweepRun, data: ReportData) -> str | None:
    """Write the report and return its location; None with a sentence if it fails, since a report must not fail a sweep.

    Raises KeyboardInterrupt if a library turned an interrupt into the error.
    """
    try:
        return write_report_of(data)
    except Exception as error:  # noqa: BLE001
        interrupts.check()
        run.console.print(
            f"the report could not be written ({type(error).__name__}: {error}); all else is there. Write it with: "
            f"imbvlm report {run.folder}"
        )
        return None


def _write_pareto(run: SweepRun) -> None:
    """Print the trials that no other trial beats in every objective; write each configuration under pareto/."""
    records = pareto_records(run.log, run.spec)
    run.console.print()
    run.console.print(pareto_table(records, run.spec, run.console.width))
    folder = storage.join(run.folder, PARETO_FOLDER)
    for record in records:
        config = best_config(record, run.spec.base["data"]["manifest"])
        storage.write_bytes(storage.join(folder, f"{record.trial_id}.yaml"), dump_yaml(config.to_tree()).encode())
    run.console.print(f"their configurations: {folder}/TRIAL.yaml")


def _print_scores(run: SweepRun, data: ReportData) -> None:
    """Print the test scores of winner and baselines, and what is adjusted after training."""
    echo = run.console.print
    names = [DELIVERED, BLEND, WINNER, *(scored.name for scored in data.references)]
    if data.has_test:
        shown = [record for record in run.scored if record.name in names or record.name.startswith(SUPERSEDED)]
        echo()
        echo("\n".join([scores_table(shown, run.console.width), *note_lines(run.log, run.spec)]))
        if data.verdict_on_test is not None:
            echo(str(data.verdict_on_test))
        for line in ranks_lines(shown, run.console.width):
            echo(line)
        if data.classes is not None and data.classes.averaged_over:
            echo(data.classes.averaged_over)
    if "test" not in run.manifest.splits:
        echo(
            "no test split, so nothing is scored on images that selection hasn't seen; hold some out by "
            "`imbvlm manifest build --test-share 0.2`, in a folder test/ next to train/, or as rows of that split"
        )
    for name, selection in run.adjustments.items():
        if name in {WINNER, *(scored.name for scored in data.headline)}:
            echo(describe_post_hoc(name, selection, run.scored))


def _print_tables(run: SweepRun, data: ReportData) -> None:
    """Print and write a study's tables, and the table of stored views against fresh crops."""
    tables = [table for table in (*study_tables(data), fresh_gap(data)) if table.rows]
    for shown in tables:
        run.console.print()
        run.console.print(f"{shown.title} ({shown.caption}):")
        run.console.print(table(shown.header, shown.rows, run.console.width))
    write_tables(run.folder, tables)
