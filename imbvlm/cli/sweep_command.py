"""`imbvlm sweep`, `plan`, `compare` and `report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imbvlm.base.errors import LINE_BREAKS, ImbvlmError, printable
from imbvlm.cli.options import MovedManifest, SpecOptions, SweepFolder, SweepOptions, print_to_stderr, takes

if TYPE_CHECKING:
    from imbvlm.sweep.spec.sweep_spec import SweepSpec

SWEEP_ACTIONS = ("run", "resume", "update", "list", "show")
SpecFile = Annotated[
    str, typer.Argument(metavar="FILE", help="a sweep's specification as YAML, such as an earlier sweep's sweep.yaml")
]
JsonFractions = Annotated[bool, typer.Option("--json", help="print JSON, accuracies as fractions")]


def with_sweep_action(arguments: Sequence[str]) -> list[str]:
    """`sweep FILE` as `sweep run FILE`; a mistyped action stays one."""
    given = list(arguments)
    if given[:1] != ["sweep"] or len(given) == 1 or given[1] in (*SWEEP_ACTIONS, "-h", "--help"):
        return given
    is_mistyped = get_close_matches(given[1], SWEEP_ACTIONS, cutoff=0.7) and not Path(given[1]).exists()
    return given if is_mistyped else ["sweep", "run", *given[1:]]


@dataclass(frozen=True, kw_only=True)
class RunOptions(SweepOptions):
    """Options of `sweep run`."""

    spec: SpecFile


@takes(RunOptions)
def sweep_run(options: RunOptions) -> int:
    """Run a sweep from its YAML."""
    from imbvlm.cli.sweep_script import run_command

    return run_command(_spec(options, "" if not options.dry_run else " --dry-run"), options)


def _spec(options: RunOptions | PlanOptions, more: str) -> SweepSpec:
    """A sweep's YAML, with the plug-ins of options and file; raises ImbvlmError for a script, which runs itself."""
    from imbvlm.base.plugin_files import use_plugins
    from imbvlm.base.yaml_file import read_yaml
    from imbvlm.sweep.spec.sweep_spec import SweepSpec

    path = options.spec
    if path.endswith(".py"):
        raise ImbvlmError(f"{path} is a script and no sweep's YAML. Run `python {path}{more}`.")
    tree = read_yaml(path)
    named = tree.data.get("plugins") if isinstance(tree.data, dict) else None
    # The check of the specification rejects anything else.
    own = [location for location in named if isinstance(location, str)] if isinstance(named, list) else []
    plugins = [*own, *(options.plugins or ())]
    with use_plugins(*plugins):
        return SweepSpec.from_tree(tree).model_copy(update={"plugins": plugins})


def sweep_resume(
    sweep: SweepFolder,
    add_trials: Annotated[int | None, typer.Option(metavar="N", min=1, help="number of trials to add")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a limit to raise, such as max_hours=8; repeatable"),
    ] = None,
    manifest: MovedManifest = None,
) -> int:
    """Resume a sweep; no trial is run twice."""
    from imbvlm.cli.sweep_script import resume_command

    return resume_command(sweep, settings or (), add_trials, manifest)


def sweep_update(
    sweep: SweepFolder,
    manifest: Annotated[str, typer.Option(metavar="MANIFEST", help="the grown data: path or s3:// URI")],
    num_search: Annotated[
        int, typer.Option("--search", metavar="N", min=0, help="trials to add, which start from the old sweep's")
    ] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a key of the sweep or its trials to change; repeatable"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan; start and write nothing")] = False,
) -> int:
    """Train a sweep's model again on grown data.

    The old sweep stays as it is, and the new one stands next to it. At its end both models are compared on the same
    test images.
    """
    from imbvlm.cli.sweep_script import update_command

    return update_command(sweep, manifest, num_search, settings or (), dry_run=dry_run)


def sweep_list(
    storage: Annotated[str, typer.Argument(metavar="FOLDER", help="folder or s3:// URI of sweeps")] = "runs",
    as_json: JsonFractions = False,
) -> int:
    """List the sweeps in a storage folder."""
    from imbvlm.cli.sweep_listing import list_text
    from imbvlm.sweep.records.sweep_folder import sweeps_under

    states, unreadable = sweeps_under(storage)
    if as_json:
        print(
            json.dumps([*(state.to_dict() for state in states), *(sweep.to_dict() for sweep in unreadable)], indent=1)
        )
    elif states or unreadable:
        print(printable(list_text(states, unreadable), keep=LINE_BREAKS))
    else:
        print(f"no sweep under {storage}")
    return 0


def sweep_show(sweep: SweepFolder, as_json: JsonFractions = False) -> int:
    """Show a sweep's tables, also while it runs."""
    from imbvlm.cli.sweep_listing import show_text
    from imbvlm.sweep.records.sweep_folder import SweepState

    state = SweepState.read(sweep)
    print(json.dumps(state.to_dict(), indent=1) if as_json else printable(show_text(state), keep=LINE_BREAKS))
    return 0


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SpecOptions):
    """Options of `plan`."""

    spec: SpecFile
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False


@takes(PlanOptions)
def plan(options: PlanOptions) -> int:
    """Show what a sweep would do, read, take and cost.

    Nothing of the sweep is started or written.
    """
    from imbvlm.base.plugin_files import use_plugins
    from imbvlm.cli.sweep_script import print_plan, with_options

    spec = _spec(options, " --dry-run")
    with use_plugins(*spec.plugins):
        return print_plan(with_options(spec, options), options.measure, as_json=options.as_json, num_gpus=options.gpus)


def compare(
    sweeps: Annotated[list[str], typer.Argument(metavar="SWEEP", help="folders or s3:// URIs of sweeps")],
    as_json: JsonFractions = False,
) -> int:
    """Show several sweeps side by side."""
    from imbvlm.cli.sweep_listing import compare_text
    from imbvlm.sweep.records.sweep_folder import SweepState

    states = [SweepState.read(folder) for folder in sweeps]
    print(json.dumps([state.to_dict() for state in states], indent=1) if as_json else compare_text(states))
    return 0


def report(
    sweep: SweepFolder,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="a page (.html; by default report.html in the sweep's folder), or a folder for the page, figures as "
            "SVG and PNG, their numbers as CSV, tables as CSV and LaTeX",
        ),
    ] = None,
    manifest: MovedManifest = None,
) -> int:
    """Write a sweep's report, one page that needs no network.

    The sweep may still run. The page shows images where its manifest is readable.
    """
    from imbvlm.sweep.report.report_writer import write_report

    print(write_report(sweep, out, manifest, print_to_stderr))
    return 0
