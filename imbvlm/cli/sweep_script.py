"""The command line of a sweep: `sweeps/x.py` is `run_script(SweepSpec(...))`."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from imbvlm.base import interrupts, storage
from imbvlm.base.console import Console
from imbvlm.base.errors import LINE_BREAKS, ConfigError, ImbvlmError, Problem, printable
from imbvlm.base.schema import flatten
from imbvlm.base.yaml_file import parse_scalar, parse_yaml
from imbvlm.cli.sweep_listing import show_text
from imbvlm.sweep.records.resource_usage import PLAN_FILE
from imbvlm.sweep.records.sweep_folder import SweepState, read_spec
from imbvlm.sweep.records.trial_log import SPEC_FILE
from imbvlm.sweep.spec.manifest_path import with_absolute_paths, with_located_manifest
from imbvlm.sweep.spec.spec_overrides import smoke_settings, with_settings
from imbvlm.sweep.spec.sweep_spec import SweepSpec

if TYPE_CHECKING:
    from imbvlm.sweep.plan.sweep_plan import Plan

LATEST = "latest"


def run_script(spec: SweepSpec, arguments: Sequence[str] | None = None) -> None:
    """Run a sweep with the options of the command line; exits with 0, or with 1 if it failed or has no result."""
    parser = argparse.ArgumentParser(
        description=f"Run the sweep {spec.name}.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_arguments(parser)
    sys.exit(run_command(spec, parser.parse_args(arguments)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every sweep has."""
    add_setting_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="FOLDER",
        help="go on with the newest sweep of this name, or with that folder",
    )
    parser.add_argument(
        "--add-trials", type=positive, default=0, metavar="N", help="with --resume: so many trials more than before"
    )
    parser.add_argument(
        "--fork",
        action="store_true",
        help="with --resume: a new sweep where spec, code or data have changed, with the trials that are still valid",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be done, and what it would take; start and write nothing",
    )
    parser.add_argument(
        "--plan", action="store_true", help="show the plan first, and in the end what it had said beside what it took"
    )
    add_measure_argument(parser)


def add_measure_argument(parser: argparse.ArgumentParser) -> None:
    """Where a plan's times come from."""
    parser.add_argument(
        "--measure",
        choices=("here", "cluster", "no"),
        default="here",
        help="where a plan measures a few steps of each kind of trial (default: here; cluster joins the one that runs)",
    )
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="plan for another machine, with N GPUs; without it a plan of what can't run here ends with exit code 1",
    )


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that change what a sweep is."""
    parser.add_argument("--manifest", help="another data set: a manifest's path, s3:// URI or embedded:NAME")
    parser.add_argument("--storage", help="folder or s3:// URI for sweeps and features")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="the same way in small, to see that it works: as the sweep's `smoke` says, or else four trials of two "
        "epochs, one seed",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the sweep or a dotted key of its trials",
    )
    parser.add_argument(
        "--warm-start", action="append", default=[], metavar="FOLDER", help="an earlier sweep that guides this one"
    )
    parser.add_argument("--price", type=float, metavar="PER_GPU_HOUR", help="what an hour of one GPU costs")
    parser.add_argument(
        "--machine-price",
        type=float,
        metavar="PER_HOUR",
        help="what an hour of one machine costs, with or without GPUs, in place of --price",
    )


def run_command(spec: SweepSpec, options: argparse.Namespace) -> int:
    """Apply the options and run; prints errors as sentences."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with interrupts.handled() as signals:
        try:
            code = signals.outlast(lambda: _run(spec, options, signals))
        except ImbvlmError as error:
            print(f"imbvlm: {printable(str(error), keep=LINE_BREAKS)}", file=sys.stderr)
            return 1
        if code is None:
            signals.end()
            print(f"\n{signals.sentence}; finished trials are kept\n{_so_far(signals.folder)}", file=sys.stderr)
            return signals.exit_code
        return code


def _run(spec: SweepSpec, options: argparse.Namespace, signals: interrupts.Interrupts) -> int:
    spec = with_options(spec, options)
    if options.add_trials:
        spec = _with_more_trials(spec, options.resume, options.add_trials)
    if options.dry_run:
        return print_plan(spec, options.measure, as_json=False, num_gpus=options.gpus)
    if options.gpus is not None:
        raise ConfigError([Problem("a plan alone can be for another machine: add --dry-run", "--gpus")])
    if options.plan and options.resume:
        raise ConfigError([Problem("a plan is of a whole sweep; leave it out with --resume", "--plan")])
    if options.fork and not options.resume:
        raise ConfigError([Problem("--fork needs --resume, which says what to fork", "--fork")])
    from imbvlm.sweep.run.run_phases import fork, removed_if_rejected, run_sweep

    interrupts.check()
    # From here on; a plan shows paths as they were typed.
    spec = with_absolute_paths(spec)
    folder = new_folder(spec)
    if options.resume and not options.fork:
        folder = resumed_folder(spec, options.resume, more_trials=options.add_trials > 0)
    signals.folder = folder
    with _without_hangup(), removed_if_rejected(folder):
        if options.fork:
            fork(spec, _wanted_folder(spec, options.resume), folder, Console())
        if options.plan:
            _keep_plan(spec, options.measure, folder)
        run_sweep(spec, folder, Console())
    return 0


@contextmanager
def _without_hangup() -> Iterator[None]:
    """Within, this process and those that it starts go on when their terminal or connection ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def print_plan(spec: SweepSpec, measure: str, *, as_json: bool, num_gpus: int | None = None) -> int:
    """Show what a sweep would do and take, then all that it lacks; 1 where it lacks something, raises ImbvlmError."""
    from imbvlm.sweep.plan.plan_text import DRY_RUN, describe_plan, obstacles, plan_to_dict

    plan = _plan(spec, measure, num_gpus)
    lacking = obstacles(plan, is_here=num_gpus is None)
    as_text = f"{describe_plan(plan)}\n{DRY_RUN}"
    print(json.dumps({**plan_to_dict(plan), "obstacles": lacking}, indent=1) if as_json else as_text, flush=True)
    if not lacking:
        return 0
    where = "here" if num_gpus is None else f"on {plan.machine}"
    print("\n  ".join([f"imbvlm: the sweep can't run {where}:", *lacking]), file=sys.stderr)
    return 1


def _plan(spec: SweepSpec, measure: str, num_gpus: int | None = None) -> Plan:
    from imbvlm.sweep.plan.sweep_plan import make_plan, measure_here, measure_on_cluster

    return make_plan(spec, {"here": measure_here, "cluster": measure_on_cluster, "no": None}[measure], num_gpus)


def _keep_plan(spec: SweepSpec, measure: str, folder: str) -> None:
    """Show what a sweep will do and take, and keep it in its folder; raises ImbvlmError."""
    from imbvlm.sweep.plan.plan_text import describe_plan, plan_to_dict

    plan = _plan(spec, measure)
    print(describe_plan(plan), flush=True)
    storage.write_bytes(storage.join(folder, PLAN_FILE), json.dumps(plan_to_dict(plan), indent=1).encode())


def _so_far(folder: str | None) -> str:
    """What an interrupted sweep has found, with the command that goes on."""
    try:
        if folder is None or not storage.exists(storage.join(folder, SPEC_FILE)):
            return "nothing has run yet"
        return show_text(SweepState.read(folder))
    except (ImbvlmError, KeyboardInterrupt):
        # Its store is away, and this process has no time to wait for it.
        return f"go on with: imbvlm sweep resume {folder}"


def resume_command(folder: str, settings: Sequence[str] = (), add_trials: int = 0) -> int:
    """Go on with the sweep in a folder as its sweep.yaml says, its features beside it; prints errors as sentences."""
    try:
        spec = with_located_manifest(read_spec(folder), folder)
        parent = storage.absolute(folder).rpartition("/")[0]
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        # What isn't said here is as it is without an option.
        options = parser.parse_args(
            [f"--resume={folder}", f"--storage={parent}", *(f"--set={one}" for one in settings)]
        )
        options.add_trials = add_trials
    except ImbvlmError as error:
        print(f"imbvlm: {printable(str(error), keep=LINE_BREAKS)}", file=sys.stderr)
        return 1
    return run_command(spec, options)


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, and is {value}")
    return value


def _with_more_trials(spec: SweepSpec, resume: str | None, number: int) -> SweepSpec:
    """So many trials more than the sweep that is resumed had; raises ConfigError."""
    if resume is None:
        raise ConfigError([Problem("it goes on with a sweep: give --resume too", "--add-trials")])
    before = read_spec(resume if resume != LATEST else _latest(spec))
    return with_settings(spec, {"num_trials": before.resolve().num_trials + number}, "--add-trials")


def with_options(spec: SweepSpec, options: argparse.Namespace) -> SweepSpec:
    """The spec with --smoke, --manifest, --storage and --set in it; raises ConfigError."""
    if options.smoke:
        spec = with_settings(spec, smoke_settings(spec), "--smoke")
    settings = parse_settings(options.set)
    if options.manifest:
        settings["data.manifest"] = options.manifest
    if options.storage is not None:
        settings["storage"] = options.storage
    if options.warm_start:
        settings["warm_start"] = [storage.absolute(folder) for folder in options.warm_start]
    if options.price is not None:
        settings["price_per_gpu_hour"] = options.price
    if options.machine_price is not None:
        settings["price_per_machine_hour"] = options.machine_price
    return with_settings(spec, settings) if settings else spec


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words as keys and YAML values; raises ConfigError."""
    wrong = [Problem(f"--set takes KEY=VALUE, and got {item!r}") for item in items if "=" not in item]
    if wrong:
        raise ConfigError(wrong)
    return {key.strip(): parse_scalar(text) for key, _, text in (item.partition("=") for item in items)}


def new_folder(spec: SweepSpec) -> str:
    # Two that are started in one second have folders of their own.
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return storage.join(storage.absolute(spec.storage), f"{spec.name}-{stamp}")


def _wanted_folder(spec: SweepSpec, wanted: str) -> str:
    """The folder that --resume names; raises ConfigError where it isn't a sweep's."""
    folder = wanted if wanted != LATEST else _latest(spec)
    if not storage.exists(storage.join(folder, SPEC_FILE)):
        raise ConfigError([Problem(f"{folder} is not a sweep's folder: it has no {SPEC_FILE}")])
    return storage.absolute(folder)


def resumed_folder(spec: SweepSpec, wanted: str, *, more_trials: bool = False) -> str:
    """The folder to go on in; raises ConfigError where it isn't a sweep or its spec is another."""
    folder = _wanted_folder(spec, wanted)
    before = with_located_manifest(read_spec(folder), folder)
    differences = [one for one in spec_differences(before, spec) if not (more_trials and one[0] == "num_trials")]
    if differences:
        raise ConfigError(
            Problem(
                f"{key} was {old!r} when the sweep began and is {new!r} now; set it back, or add --fork",
                folder,
            )
            for key, old, new in differences
        )
    return folder


def _latest(spec: SweepSpec) -> str:
    stamped = re.compile(rf"{re.escape(spec.name)}-\d{{8}}-\d{{6}}(-[0-9a-f]{{4}})?")
    names = [name for name in storage.list_files(spec.storage) if stamped.fullmatch(name)]
    if not names:
        raise ConfigError([Problem(f"there is no sweep {spec.name} under {spec.storage} to go on with")])
    return storage.join(spec.storage, names[-1])


def spec_differences(before: SweepSpec, now: SweepSpec) -> list[tuple[str, Any, Any]]:
    """Dotted keys that differ between two specs, with both values; where things are kept doesn't count."""

    old, new = (flatten(parse_yaml(with_absolute_paths(spec).to_yaml_text()).data) for spec in (before, now))
    ignored = (
        *("storage", "feature_folder", "feature_copies", "max_concurrent_trials", "max_failures", "max_trial_minutes"),
        *("smoke", "max_trials", "max_hours", "max_cost", "price_per_gpu_hour", "price_per_machine_hour", "warm_start"),
    )
    keys = [key for key in dict.fromkeys([*old, *new]) if key.split(".")[0] not in ignored]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
