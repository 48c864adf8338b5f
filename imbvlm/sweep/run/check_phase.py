"""The checks before a sweep: of the specification, of what an earlier run has left, and of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.errors import ConfigError, Problem
from imbvlm.base.formatting import pluralize
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.store_sizes import check_disk_space
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.models.encoders.open_clip_text import require_tokenizer
from imbvlm.ray_runtime.cluster_resources import Cluster
from imbvlm.sweep.plan.feasibility import (
    Packing,
    at_a_time,
    check_manifest,
    check_models,
    check_shared,
    confirm_folds,
    confirm_logit_bytes,
    logit_file_bytes,
    max_logit_bytes,
    needed_outputs,
    num_folds,
    packing,
    pair_logit_bytes,
    trials_at_once,
)
from imbvlm.sweep.records.adjustment_selection import check_logits_fit, logit_bytes
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.earlier_sweeps import WarmStart, warm_starts
from imbvlm.sweep.records.provenance import begin_provenance, provenance, provenance_changes
from imbvlm.sweep.records.sweep_folder import UNFINISHED_FILE
from imbvlm.sweep.records.trial_log import ENDED, SPEC_FILE, TrialKind, TrialLog
from imbvlm.sweep.run.sweep_run import SweepRun
from imbvlm.sweep.spec.baselines import baselines, encoder_configs
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.sweep.tune.jobs import RunContext

# Kinds of trials that leave validation logits.
LOGIT_KINDS: tuple[TrialKind, ...] = ("baseline", "search")


@dataclass(frozen=True)
class CheckedSweep:
    """A specification without mistakes, with everything that its check has read."""

    sweep: ResolvedSweep
    manifest: Manifest
    encoder_infos: Mapping[str, EncoderInfo]
    encoders: tuple[TrialConfig, ...]
    warm_starts: list[WarmStart]


def check(spec: SweepSpec) -> CheckedSweep:
    """Check a sweep and download missing weights; writes nothing else. Raises ConfigError, ImbvlmError."""
    sweep = check_spec(spec)
    manifest = Manifest.read(spec.base["data"]["manifest"])
    check_manifest(sweep, manifest)
    infos = check_models(sweep)
    # A folder that isn't a sweep's is reported here, before features are computed for hours.
    starts = warm_starts(sweep)
    encoders = tuple(encoder_configs(sweep))
    for config in encoders:
        # Everything is fetched before the folder exists: without it there is no sweep.
        source = resolve_encoder(config.encoder)
        source.weights_file()
        require_tokenizer(source)
    return CheckedSweep(sweep, manifest, infos, encoders, starts)


def check_provenance(folder: str, manifest: Manifest, log: TrialLog) -> None:
    """Raise ConfigError if code or data differ from those that the sweep began with."""
    current = provenance(manifest)
    if not log.records:
        begin_provenance(folder, current)
        return
    changes = provenance_changes(folder, current)
    if changes:
        fix = "since the sweep began; set it back, or add --fork for a new sweep"
        raise ConfigError(Problem(f"{change} {fix}", folder) for change in changes)


def open_run(
    checked: CheckedSweep, folder: str, log: TrialLog, console: Console, cluster: Cluster, started: float
) -> SweepRun:
    """Check the cluster and the disks, then write the sweep's files; raises ConfigError, ImbvlmError.

    `started` is when the sweep began, by the monotonic clock.
    """
    sweep, spec, manifest = checked.sweep, checked.sweep.spec, checked.manifest
    concurrent = trials_at_once(sweep, cluster)
    budget = Budget.open(spec, folder, cluster.max_gpus, len(cluster.max_nodes), started)
    folds = confirm_folds(sweep, manifest)
    context = RunContext(sweep, folder, log, console, concurrent, budget, len(manifest.class_names), folds)
    packs = packing(sweep, checked.encoder_infos.values(), manifest, concurrent)
    console.print(_describe_cluster(cluster, context.driver, at_a_time(concurrent, packs.largest(sweep))))
    if not cluster.is_own:
        check_shared([folder, storage.absolute(spec.feature_root)])
    budget.enter("features")
    run = SweepRun(
        sweep,
        manifest,
        folder,
        log,
        console,
        budget,
        context,
        checked.encoders,
        needed_outputs(sweep),
        baselines(sweep),
        num_folds(spec, manifest),
    )
    # An earlier run may have been killed before it could prune.
    context.prune_logits(is_over=True)
    _check_disks(run, packs)
    # No check follows: `removed_if_rejected` keeps a folder that has these files.
    storage.write_bytes(storage.join(folder, UNFINISHED_FILE), b"a run has begun here and not come to its end\n")
    storage.write_bytes(storage.join(folder, SPEC_FILE), spec.to_yaml_text().encode())
    return run


def _describe_cluster(cluster: Cluster, driver: str, trials: str) -> str:
    joined = "" if cluster.is_own else " (a cluster that was running already)"
    if cluster.can_grow:
        joined += f", growing to {pluralize(cluster.max_cpus, 'CPU')} and {pluralize(cluster.max_gpus, 'GPU')}"
    return (
        f"Ray: {pluralize(cluster.num_cpus, 'CPU')}, {pluralize(cluster.num_gpus, 'GPU')}{joined}, dashboard "
        f"{cluster.dashboard or 'off'}; driver {driver}, {trials}"
    )


def _check_disks(run: SweepRun, packs: Packing) -> None:
    spec = run.spec
    logits = _pending_logit_bytes(run, packs)
    check_logits_fit(run.folder, logits)
    others = logits if storage.is_same_disk(run.folder, spec.feature_root) else 0
    check_disk_space(
        run.encoders, run.manifest, spec.feature_root, run.outputs, cache=spec.feature_copies, other_bytes=others
    )  # fmt: skip


def _pending_logit_bytes(run: SweepRun, packs: Packing) -> int:
    """Return the most bytes that validation logits can add to those of an earlier run, 0 if all trials have ended."""
    largest = max_logit_bytes(run.sweep, run.manifest, packs, run.context.max_concurrent)
    num_ended = sum(record.state in ENDED for kind in LOGIT_KINDS for record in run.log.of(kind))
    num_left = max(0, len(run.baselines) + run.sweep.num_trials - num_ended)
    num_confirmed = sum(record.state in ENDED for record in run.log.of("folds"))
    pending = num_left * logit_file_bytes(run.spec, run.manifest)
    pending += confirm_logit_bytes(run.sweep, run.manifest, num_confirmed)
    pending += 0 if run.log.of("pairs") else pair_logit_bytes(run.sweep, run.manifest)
    return max(0, min(largest - logit_bytes(run.folder), pending))
