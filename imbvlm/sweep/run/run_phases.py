"""Run a sweep from its specification to its best configuration, or fork an earlier one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from imbvlm.base import interrupts, storage
from imbvlm.base.console import Console
from imbvlm.base.errors import ConfigError, LostProcessesError, Problem, StorageError
from imbvlm.data.manifest import Manifest
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.ray_runtime.connection import ray_session
from imbvlm.sweep.plan.feasibility import check_manifest, check_models
from imbvlm.sweep.records.earlier_sweeps import select_fork_trials, warm_starts, write_fork
from imbvlm.sweep.records.folder_lease import Lease, folder_lease
from imbvlm.sweep.records.provenance import encoder_fingerprints, provenance, provenance_changes, write_provenance
from imbvlm.sweep.records.summary_tables import run_header
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.run.sweep_run import SweepRun
from imbvlm.sweep.spec.baselines import encoder_configs
from imbvlm.sweep.spec.equivalence import untrained_configurations
from imbvlm.sweep.spec.spec_checks import check_spec, sampler_notes
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.jobs import local_folder
from imbvlm.sweep.tune.study_search import silence_optuna

LOG_FILE = "ray.log"
PROGRESS_FILE = "progress.log"


def run(spec: SweepSpec, folder: str, console: Console) -> TrialLog:
    """Run or go on with the sweep in a folder; raises ConfigError before anything starts, ImbvlmError if all fail."""
    started = time.monotonic()
    sweep = check_spec(spec)
    spec = sweep.spec
    manifest = Manifest.read(spec.base["data"]["manifest"])
    check_manifest(spec, manifest)
    models = check_models(sweep)
    # Before hours of features, perhaps: a folder that isn't a sweep's shows now.
    starts = warm_starts(sweep)
    for config in encoder_configs(sweep):
        # Fetched before there is a folder: without weights there is no sweep.
        resolve_encoder(config.encoder).weights_file()
    with storage.OUTAGES.said_by(console.print), folder_lease(folder, console.print) as lease:
        log = TrialLog.read(folder)
        log.constraints = spec.constraints
        _check_provenance(folder, manifest, log)
        beside = local_folder(folder)
        console.copy_to(beside / PROGRESS_FILE)
        notes = [*untrained_configurations(sweep), *sampler_notes(sweep)]
        console.print("\n".join([run_header(spec, manifest, folder, log), *notes]))
        with _machine_errors_say_how_to_go_on(folder):
            with console.redirect_output(beside / LOG_FILE):
                silence_optuna()
                with ray_session(console.last_word(_way_on(folder))) as cluster:
                    run = SweepRun(sweep, manifest, folder, log, console, cluster, started, models)
                    run.search(starts)
                    _check_still_wanted(lease)
                    run.confirm()
                    _check_still_wanted(lease)
                    run.refit_and_score()
                    seconds = time.monotonic() - started
            run.conclude(seconds)
    return log


def _check_still_wanted(lease: Lease) -> None:
    """Raises KeyboardInterrupt where a signal has come, and ImbvlmError where the folder is another run's now."""
    interrupts.check()
    lease.check()


@contextmanager
def _machine_errors_say_how_to_go_on(folder: str) -> Iterator[None]:
    try:
        yield
    except (StorageError, LostProcessesError) as error:
        raise type(error)(f"{error}; then {_way_on(folder)}") from None


def _way_on(folder: str) -> str:
    return f"go on with: imbvlm sweep resume {folder}"


def fork(spec: SweepSpec, source: str, folder: str, console: Console) -> None:
    """Begin a sweep's folder with the trials of another that are still valid; raises ConfigError."""
    sweep = check_spec(spec)
    found = provenance(Manifest.read(spec.base["data"]["manifest"]))
    chosen = select_fork_trials(source, sweep, provenance_changes(source, found))
    # Trials that are kept are of these towers.
    write_provenance(folder, {**found, "towers": encoder_fingerprints(source)} if chosen.retained else found)
    write_fork(chosen, source, folder)
    console.print(chosen.describe(source))


def _check_provenance(folder: str, manifest: Manifest, log: TrialLog) -> None:
    """Refuse to go on with other code or data than the sweep began with; raises ConfigError."""
    found = provenance(manifest)
    if not log.records:
        write_provenance(folder, found)
        return
    changes = provenance_changes(folder, found)
    if changes:
        mend = "since the sweep began; set it back, or add --fork for a new sweep"
        raise ConfigError(Problem(f"{change} {mend}", folder) for change in changes)
