"""`imbvlm sweep`, `plan`, `compare` and `report`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imbvlm.base.errors import LINE_BREAKS, ImbvlmError, printable
from imbvlm.cli.options import add_command, positive, print_to_stderr

if TYPE_CHECKING:
    from imbvlm.sweep.spec.sweep_spec import SweepSpec

SWEEP_ACTIONS = ("run", "resume", "list", "show")


def add_sweep_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from imbvlm.cli.sweep_script import add_arguments

    parser = add_command(
        commands, "sweep", "Run sweeps, go on with them, list and show them; `sweep FILE` is `sweep run FILE`.",
        "imbvlm sweep run my-sweep.yaml --dry-run",
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    run = add_command(actions, "run", "Run a sweep from its YAML.", "imbvlm sweep run my-sweep.yaml --smoke")
    run.add_argument("spec", help="a SweepSpec as YAML, such as the sweep.yaml of an earlier sweep")
    add_arguments(run)
    run.set_defaults(command=_sweep_run)
    resume = add_command(
        actions, "resume", "Go on with a sweep; no trial is run twice.", "imbvlm sweep resume runs/inat-20261124-120000"
    )
    resume.add_argument("sweep", help="a sweep's folder")
    resume.add_argument("--add-trials", type=positive, default=0, metavar="N", help="so many trials more than before")
    resume.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a limit to raise, such as max_hours=8"
    )
    resume.add_argument("--manifest", help="the manifest's present location, if it was moved")
    resume.set_defaults(command=_sweep_resume)
    listing = add_command(actions, "list", "The sweeps in a storage folder.", "imbvlm sweep list runs --json")
    listing.add_argument("storage", nargs="?", default="runs", help="folder or s3:// URI (default: runs)")
    listing.set_defaults(command=_sweep_list)
    show = add_command(actions, "show", "A sweep's tables by now.", "imbvlm sweep show runs/inat-20261124-120000")
    show.add_argument("sweep", help="a sweep's folder")
    show.set_defaults(command=_sweep_show)
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON, accuracies as fractions")


def with_sweep_action(arguments: Sequence[str]) -> list[str]:
    """`sweep FILE` as `sweep run FILE`."""
    given = list(arguments)
    if given[:1] == ["sweep"] and len(given) > 1 and given[1] not in (*SWEEP_ACTIONS, "-h", "--help"):
        return ["sweep", "run", *given[1:]]
    return given


def _sweep_run(options: argparse.Namespace) -> int:
    from imbvlm.cli.sweep_script import run_command

    return run_command(_spec(options.spec, "" if not options.dry_run else " --dry-run"), options)


def _spec(path: str, more: str) -> SweepSpec:
    """A sweep's YAML; raises ImbvlmError for a script, which runs itself."""
    from imbvlm.sweep.spec.sweep_spec import SweepSpec

    if path.endswith(".py"):
        raise ImbvlmError(f"{path} is a script and no sweep's YAML; run: python {path}{more}")
    return SweepSpec.from_yaml(path)


def _sweep_resume(options: argparse.Namespace) -> int:
    from imbvlm.cli.sweep_script import resume_command

    return resume_command(options.sweep, options.set, options.add_trials, options.manifest)


def _sweep_list(options: argparse.Namespace) -> int:
    from imbvlm.cli.sweep_listing import list_text
    from imbvlm.sweep.records.sweep_folder import sweeps_under

    states, unreadable = sweeps_under(options.storage)
    if options.json:
        print(
            json.dumps([*(state.to_dict() for state in states), *(sweep.to_dict() for sweep in unreadable)], indent=1)
        )
    elif states or unreadable:
        print(printable(list_text(states, unreadable), keep=LINE_BREAKS))
    else:
        print(f"no sweep under {options.storage}")
    return 0


def _sweep_show(options: argparse.Namespace) -> int:
    from imbvlm.cli.sweep_listing import show_text
    from imbvlm.sweep.records.sweep_folder import SweepState

    state = SweepState.read(options.sweep)
    print(json.dumps(state.to_dict(), indent=1) if options.json else printable(show_text(state), keep=LINE_BREAKS))
    return 0


def add_plan_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from imbvlm.cli.sweep_script import add_measure_argument, add_setting_arguments

    parser = add_command(
        commands, "plan", "What a sweep would do, read, take and cost; starts and writes nothing of it.",
        "imbvlm plan my-sweep.yaml --price 2.5 --json",
    )  # fmt: skip
    parser.add_argument("spec", help="a SweepSpec as YAML, such as the sweep.yaml of an earlier sweep")
    add_setting_arguments(parser)
    add_measure_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> int:
    from imbvlm.cli.sweep_script import print_plan, with_options

    spec = with_options(_spec(options.spec, " --dry-run"), options)
    return print_plan(spec, options.measure, as_json=options.json, num_gpus=options.gpus)


def add_compare_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "compare", "Several sweeps side by side.", "imbvlm compare runs/inat-20261124-* --json"
    )
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help="sweeps' folders")
    parser.add_argument("--json", action="store_true", help="print JSON, accuracies as fractions")
    parser.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    from imbvlm.cli.sweep_listing import compare_text
    from imbvlm.sweep.records.sweep_folder import SweepState

    states = [SweepState.read(folder) for folder in options.sweeps]
    print(json.dumps([state.to_dict() for state in states], indent=1) if options.json else compare_text(states))
    return 0


def add_report_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "report",
        "Write a sweep's report, one page that needs no network.",
        "imbvlm report runs/quickstart-20261124-120000 -o report-files",
    )
    parser.add_argument("sweep", help="a sweep's folder or s3:// URI, also while it runs")
    parser.add_argument(
        "-o",
        "--out",
        help="a page (.html; default: report.html in the sweep's folder), or a folder for the page, "
        "figures as SVG and PNG, their numbers as CSV, tables as CSV and LaTeX",
    )
    parser.add_argument("--manifest", help="where the sweep's manifest is, if it was moved; for images on the page")
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from imbvlm.sweep.report.report_writer import write_report

    print(write_report(options.sweep, options.out, options.manifest, print_to_stderr))
    return 0
