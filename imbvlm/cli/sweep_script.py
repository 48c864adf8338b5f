"""The command line of a sweep: `sweeps/x.py` is `run_script(SweepSpec(...))`."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from imbvlm.base import interrupts, storage
from imbvlm.base.console import Console
from imbvlm.base.errors import ConfigError, ImbvlmError, Problem
from imbvlm.base.plugin_files import use_plugins
from imbvlm.base.schema import flatten
from imbvlm.base.yaml_file import parse_scalar, parse_yaml
from imbvlm.cli.options import LATEST, OptionsT, SpecOptions, SweepOptions, add_command, make_app, run_program, takes
from imbvlm.cli.sweep_listing import show_text
from imbvlm.sweep.records.earlier_sweeps import update_spec
from imbvlm.sweep.records.resource_usage import PLAN_FILE
from imbvlm.sweep.records.sweep_folder import SweepState, read_spec
from imbvlm.sweep.records.trial_log import SPEC_FILE
from imbvlm.sweep.spec.manifest_path import with_absolute_paths, with_located_manifest
from imbvlm.sweep.spec.spec_overrides import smoke_settings, with_settings
from imbvlm.sweep.spec.sweep_spec import SweepSpec

if TYPE_CHECKING:
    from imbvlm.sweep.plan.sweep_plan import Plan


def run_script(spec: SweepSpec, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a sweep with the options of the command line; exits with 0, or with 1 if it failed or has no result."""
    run_function(SweepOptions, lambda options: run_command(spec, options), f"Run the sweep {spec.name}.", arguments)


def run_function(
    options: type[OptionsT], run: Callable[[OptionsT], int], summary: str, arguments: Sequence[str] | None = None
) -> NoReturn:
    """Run a script's function with the options of a dataclass, such as a subclass of SweepOptions; exits."""
    app = make_app()
    add_command(app, "", takes(options)(run), summary=summary)
    run_program(app, Path(sys.argv[0]).name, sys.argv[1:] if arguments is None else arguments)


def run_command(spec: SweepSpec, options: SweepOptions) -> int:
    """Apply the options, run, and return the exit code; raises ImbvlmError."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with interrupts.handled() as signals, use_plugins(*spec.plugins, *(options.plugins or ())):
        code = signals.outlast(lambda: _run(spec, options, signals))
        if code is None:
            signals.end()
            print(
                f"\n{signals.sentence}; finished trials are kept\n{_interrupted_text(signals.folder)}", file=sys.stderr
            )
            return signals.exit_code
        return code


def _run(spec: SweepSpec, options: SweepOptions, signals: interrupts.Interrupts) -> int:
    spec = with_options(spec, options)
    if options.add_trials:
        spec = _with_more_trials(spec, options.resume, options.add_trials)
    if options.dry_run:
        return print_plan(spec, options.measure, as_json=False, num_gpus=options.gpus)
    if options.gpus is not None:
        raise ConfigError([Problem("only a plan can be for another machine. Add --dry-run.", "--gpus")])
    if options.plan and options.resume:
        raise ConfigError([Problem("a plan is for a whole sweep. Leave it out with --resume.", "--plan")])
    if options.fork and not options.resume:
        raise ConfigError([Problem("--fork needs --resume, which names the sweep to fork.", "--fork")])
    from imbvlm.sweep.run.run_phases import fork, removed_if_rejected, run_sweep

    interrupts.check()
    # Not before: a plan shows paths as they were typed.
    spec = with_absolute_paths(spec)
    folder = new_folder(spec)
    if options.resume and not options.fork:
        folder = resumed_folder(spec, options.resume, options.manifest, more_trials=bool(options.add_trials))
    signals.folder = folder
    with _without_hangup(), removed_if_rejected(folder):
        if options.fork and options.resume:
            fork(spec, existing_folder(spec, options.resume), folder, Console())
        if options.plan:
            _write_plan(spec, options.measure, folder)
        run_sweep(spec, folder, Console())
    return 0


@contextmanager
def _without_hangup() -> Iterator[None]:
    """Within, this process and its children survive the end of their terminal or connection."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def print_plan(spec: SweepSpec, measure: str, *, as_json: bool, num_gpus: int | None = None) -> int:
    """Print a sweep's plan and its obstacles; return 1 if there are any. Raises ImbvlmError."""
    from imbvlm.sweep.plan.plan_text import DRY_RUN, describe_plan, obstacles, plan_to_dict

    plan = _plan(spec, measure, num_gpus)
    problems = obstacles(plan, is_here=num_gpus is None)
    as_text = f"{describe_plan(plan, Console().width)}\n{DRY_RUN}"
    print(json.dumps({**plan_to_dict(plan), "obstacles": problems}, indent=1) if as_json else as_text, flush=True)
    if not problems:
        return 0
    machine = "here" if num_gpus is None else f"on {plan.machine}"
    print("\n  ".join([f"imbvlm: the sweep can't run {machine}:", *problems]), file=sys.stderr)
    return 1


def _plan(spec: SweepSpec, measure: str, num_gpus: int | None = None) -> Plan:
    from imbvlm.sweep.plan.sweep_plan import make_plan, measure_here, measure_on_cluster

    return make_plan(spec, {"here": measure_here, "cluster": measure_on_cluster, "no": None}[measure], num_gpus)


def _write_plan(spec: SweepSpec, measure: str, folder: str) -> None:
    """Print a sweep's plan, and write it into the sweep's folder; raises ImbvlmError."""
    from imbvlm.sweep.plan.plan_text import describe_plan, plan_to_dict

    plan = _plan(spec, measure)
    print(describe_plan(plan, Console().width), flush=True)
    storage.write_json(storage.join(folder, PLAN_FILE), plan_to_dict(plan))


def _interrupted_text(folder: str | None) -> str:
    """Return an interrupted sweep's tables, with the command that resumes it."""
    try:
        if folder is None or not storage.exists(storage.join(folder, SPEC_FILE)):
            return "nothing has run yet"
        return show_text(SweepState.read(folder))
    except (ImbvlmError, KeyboardInterrupt):
        # Its storage is unreachable, and this process has no time to wait for it.
        return f"go on with: imbvlm sweep resume {folder}"


def resume_command(
    folder: str, settings: Sequence[str] = (), add_trials: int | None = None, manifest: str | None = None
) -> int:
    """Resume a folder's sweep by its sweep.yaml, with the features next to it; raises ImbvlmError.

    `manifest` is the manifest's present location if it was moved.
    """
    spec = with_located_manifest(read_spec(folder, check_plugins=False), folder, manifest)
    parent = storage.absolute(folder).rpartition("/")[0]
    options = SweepOptions(
        resume=folder, storage=parent, settings=[*settings], add_trials=add_trials, manifest=manifest
    )
    return run_command(spec, options)


def update_command(folder: str, manifest: str, num_search: int, settings: Sequence[str], *, dry_run: bool) -> int:
    """Train a sweep's delivered model again on another manifest, as a new sweep next to it; raises ImbvlmError."""
    parent = storage.absolute(folder).rpartition("/")[0]
    options = SweepOptions(storage=parent, settings=[*settings], dry_run=dry_run)
    spec = update_spec(folder, manifest, num_search)
    print(f"update: the model that {folder} delivered is trained again on {manifest}", flush=True)
    return run_command(spec, options)


def _with_more_trials(spec: SweepSpec, resume: str | None, number: int) -> SweepSpec:
    """Add trials to those of the resumed sweep; raises ConfigError."""
    if resume is None:
        raise ConfigError([Problem("--add-trials needs --resume. Add it.", "--add-trials")])
    before = read_spec(resume if resume != LATEST else _latest(spec), check_plugins=False)
    return with_settings(spec, {"num_trials": before.resolve().num_trials + number}, "--add-trials")


def with_options(spec: SweepSpec, options: SpecOptions) -> SweepSpec:
    """Apply --smoke, --manifest, --storage, --set and the prices to a spec; raises ConfigError."""
    if options.smoke:
        spec = with_settings(spec, smoke_settings(spec), "--smoke")
    given = {
        "data.manifest": options.manifest or None,
        "storage": options.storage,
        "plugins": [*spec.plugins, *options.plugins] if options.plugins else None,
        "warm_start": [storage.absolute(folder) for folder in options.warm_start or ()] or None,
        "price_per_gpu_hour": options.price,
        "price_per_machine_hour": options.machine_price,
    }
    settings = parse_settings(options.settings) | {key: value for key, value in given.items() if value is not None}
    return with_settings(spec, settings) if settings else spec


def parse_settings(items: Sequence[str] | None) -> dict[str, Any]:
    """Parse KEY=VALUE items into keys and YAML values; raises ConfigError."""
    pairs = [item.partition("=") for item in items or ()]
    if problems := [
        Problem(f"--set takes KEY=VALUE, got {key!r}. An example is optim.lr=0.05.")
        for key, equals, _ in pairs
        if not equals
    ]:
        raise ConfigError(problems)
    return {key.strip(): parse_scalar(text) for key, _, text in pairs}


def new_folder(spec: SweepSpec) -> str:
    """Return a new folder name, different also for two sweeps that start in the same second."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return storage.join(storage.absolute(spec.storage), f"{spec.name}-{stamp}")


def existing_folder(spec: SweepSpec, resume: str) -> str:
    """Return the folder that --resume names; raises ConfigError if it isn't a sweep's."""
    folder = resume if resume != LATEST else _latest(spec)
    if not storage.exists(storage.join(folder, SPEC_FILE)):
        raise ConfigError(
            [Problem(f"{folder} is not a sweep's folder: it has no {SPEC_FILE}. `imbvlm sweep list` shows them.")]
        )
    return storage.absolute(folder)


def resumed_folder(spec: SweepSpec, resume: str, manifest: str | None = None, *, more_trials: bool = False) -> str:
    """Return the folder to resume; raises ConfigError if it isn't a sweep's or has another specification.

    The specification does not tell whether a `manifest` at another location has the sweep's data; its digests do.
    """
    folder = existing_folder(spec, resume)
    before = with_located_manifest(read_spec(folder, check_plugins=False), folder, manifest)
    differences = [
        difference
        for difference in spec_differences(before, spec)
        if not (more_trials and difference[0] == "num_trials")
    ]
    if differences:
        raise ConfigError(
            Problem(
                f"{key} was {old!r} when the sweep began and is {new!r} now. Set it back, or add --fork.",
                folder,
            )
            for key, old, new in differences
        )
    return folder


def _latest(spec: SweepSpec) -> str:
    stamped = re.compile(rf"{re.escape(spec.name)}-\d{{8}}-\d{{6}}(-[0-9a-f]{{4}})?")
    names = [name for name in storage.list_files(spec.storage) if stamped.fullmatch(name)]
    if not names:
        raise ConfigError(
            [
                Problem(
                    f"there is no sweep {spec.name} under {spec.storage} to resume. Name its folder, or give --storage."
                )
            ]
        )
    return storage.join(spec.storage, names[-1])


def spec_differences(before: SweepSpec, now: SweepSpec) -> list[tuple[str, Any, Any]]:
    """Return the dotted keys that differ between two specs, with both values; locations and limits don't count."""
    old, new = (flatten(parse_yaml(with_absolute_paths(spec).to_yaml_text()).data) for spec in (before, now))
    ignored = (
        # Their code is compared with the provenance.
        "plugins",
        *("storage", "feature_folder", "feature_copies", "max_concurrent_trials", "max_failures", "max_trial_minutes"),
        *("smoke", "max_trials", "max_hours", "max_cost", "price_per_gpu_hour", "price_per_machine_hour", "warm_start"),
    )
    keys = [key for key in dict.fromkeys([*old, *new]) if key.split(".")[0] not in ignored]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
