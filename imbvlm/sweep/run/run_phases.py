"""Run a sweep from its specification to its best configuration, or fork an earlier one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from imbvlm.base import interrupts, storage
from imbvlm.base.console import Console
from imbvlm.base.errors import LostProcessesError, StorageError
from imbvlm.base.plugin_files import plugin_options
from imbvlm.data.manifest import Manifest
from imbvlm.ray_runtime.connection import ray_session
from imbvlm.sweep.plan.feasibility import num_folds, text_notes
from imbvlm.sweep.records.earlier_sweeps import select_fork_trials, write_fork
from imbvlm.sweep.records.folder_lease import Lease, folder_lease
from imbvlm.sweep.records.provenance import begin_provenance, inputs_used, provenance, provenance_changes
from imbvlm.sweep.records.summary_tables import run_header
from imbvlm.sweep.records.sweep_folder import read_spec
from imbvlm.sweep.records.trial_log import SPEC_FILE, TrialLog
from imbvlm.sweep.run.check_phase import check, check_provenance, open_run
from imbvlm.sweep.run.claim_phase import correct_for_size
from imbvlm.sweep.run.conclude_phase import conclude
from imbvlm.sweep.run.confirm_phase import confirm, confirm_over_folds
from imbvlm.sweep.run.extract_phase import extract
from imbvlm.sweep.run.gap_phase import measure_gap
from imbvlm.sweep.run.labels_phase import check_labels
from imbvlm.sweep.run.refit_phase import refit
from imbvlm.sweep.run.search_phase import search
from imbvlm.sweep.run.update_phase import compare_with_earlier
from imbvlm.sweep.spec.equivalence import untrained_configurations
from imbvlm.sweep.spec.spec_checks import check_spec, sampler_notes
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.jobs import local_folder
from imbvlm.sweep.tune.study_search import silence_optuna

LOG_FILE = "ray.log"
PROGRESS_FILE = "progress.log"


def run_sweep(spec: SweepSpec, folder: str, console: Console) -> TrialLog:
    """Run or resume a folder's sweep; raises ConfigError before anything starts, ImbvlmError if all trials fail."""
    started = time.monotonic()
    checked = check(spec)
    sweep = checked.sweep
    with storage.OUTAGES.said_by(console.print), folder_lease(folder, console.print) as lease:
        log = TrialLog.read(folder)
        log.constraints = spec.constraints
        check_provenance(folder, checked.manifest, log)
        local_dir = local_folder(folder)
        console.copy_to(local_dir / PROGRESS_FILE)
        header = run_header(sweep.spec, checked.manifest, folder, log)
        notes = [*text_notes(sweep, checked.manifest), *untrained_configurations(sweep), *sampler_notes(sweep)]
        console.print("\n".join([header, *notes]))
        with _resume_hint_in_errors(folder), console.redirect_output(local_dir / LOG_FILE):
            silence_optuna()
            with ray_session(console.last_word(_resume_hint(folder)), notify_waiting=console.print) as cluster:
                run = open_run(checked, folder, log, console, cluster, started)
                extract(run)
                search(run, checked.warm_starts)
                _check_interrupted(lease)
                confirm(run)
                _check_interrupted(lease)
                confirm_over_folds(run)
                _check_interrupted(lease)
                refit(run)
                correct_for_size(run)
                _check_interrupted(lease)
                measure_gap(run)
                check_labels(run)
                compare_with_earlier(run)
                # Within the session, which may then wait for other commands on its cluster.
                conclude(run, time.monotonic() - started)
    return log


def fork(spec: SweepSpec, source: str, folder: str, console: Console) -> None:
    """Create a sweep's folder with the trials of another sweep that are still valid; raises ConfigError."""
    sweep = check_spec(spec)
    manifest = Manifest.read(spec.base["data"]["manifest"])
    current = provenance(manifest)
    changes = provenance_changes(source, current)
    before, now = num_folds(read_spec(source, check_plugins=False), manifest), num_folds(spec, manifest)
    if before != now:
        changes.append(f"trials were scored over {before} folds and are over {now} now")
    selected = select_fork_trials(source, sweep, changes)
    # The retained trials read features of these encoders and texts.
    inputs = inputs_used(source) if selected.retained else {}
    begin_provenance(folder, {**current, **inputs})
    write_fork(selected, source, folder)
    console.print(selected.describe(source))


@contextmanager
def removed_if_rejected(folder: str) -> Iterator[None]:
    """Within, a new folder is removed if the sweep ends before its sweep.yaml is written."""
    local_dir = local_folder(folder)
    is_new = not storage.exists(folder)
    new_parents = [parent for parent in local_dir.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        # The error that ended the sweep is raised even if the storage is unreachable by now.
        with suppress(StorageError, OSError):
            if is_new and storage.exists(folder) and not storage.exists(storage.join(folder, SPEC_FILE)):
                storage.delete(folder)
                storage.delete(str(local_dir))
                for parent in new_parents:
                    parent.rmdir()
        raise


def _check_interrupted(lease: Lease) -> None:
    """Raise KeyboardInterrupt after a signal, and ImbvlmError if another run has taken the folder."""
    interrupts.check()
    lease.check()


@contextmanager
def _resume_hint_in_errors(folder: str) -> Iterator[None]:
    try:
        yield
    except (StorageError, LostProcessesError) as error:
        raise type(error)(f"{error}; then {_resume_hint(folder)}") from None


def _resume_hint(folder: str) -> str:
    return f"go on with: imbvlm sweep resume {folder}{plugin_options()}"
