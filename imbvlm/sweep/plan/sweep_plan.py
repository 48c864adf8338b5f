"""The plan of a sweep: its steps, reads and cost. Planning starts nothing and writes nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.split_power import validation_rows
from imbvlm.data.splits import train_val_rows
from imbvlm.features.extraction import SECONDS_HERE
from imbvlm.features.feature_cache import FeatureCache
from imbvlm.features.store_sizes import (
    DISK_MARGIN,
    bytes_per_image,
    num_crops,
    pending_images,
    store_bytes,
    trial_bytes,
)
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.ray_runtime.cluster_resources import Cluster
from imbvlm.ray_runtime.connection import existing_cluster, find_cluster, ray_session, run_on_worker
from imbvlm.sweep.plan.cost_estimate import (
    PASS_START_SECONDS,
    START_SECONDS,
    Estimate,
    Estimator,
    Interval,
    PackStatistics,
    SpeedTable,
    SplitSizes,
    cost_key,
    gpu_hours,
    most_common_shapes,
    num_epochs,
    sample_trials,
)
from imbvlm.sweep.plan.feasibility import (
    DRIVER_CPUS,
    Packing,
    check_manifest,
    check_models,
    concurrent_trials,
    confirm_folds,
    data_counts,
    driver_of,
    gap_folds,
    max_logit_bytes,
    needed_outputs,
    num_folds,
    packing,
    trials_at_once,
)
from imbvlm.sweep.plan.speed_benchmark import EncoderSpeed, SpeedBenchmark, TrialSpeed, measure_speeds
from imbvlm.sweep.records.budget import cost_of_an_hour
from imbvlm.sweep.records.earlier_sweeps import warm_starts
from imbvlm.sweep.spec.baselines import baselines, encoder_configs
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

# The number of measured kinds of trials, about two seconds each.
MAX_SHAPES = 6

# (spec, trials, encoders) -> their speeds.
Measure = Callable[[SweepSpec, Sequence[TrialConfig], Sequence[TrialConfig]], SpeedBenchmark]


@dataclass(frozen=True)
class PlannedEncoder:
    """One encoder of the space: the bytes of its stored outputs, and those that are still to be computed.

    Without a manifest `num_bytes` is for one image and view. `missing_images` is None where it is unknown. One trial
    reads at most `trial_bytes`. `known_images` are stored; images count once for each view.
    """

    config: TrialConfig
    info: EncoderInfo
    num_bytes: int
    missing_bytes: int
    missing_images: int | None
    trial_bytes: int = 0
    known_images: int = 0


@dataclass(frozen=True)
class Plan:
    """All that is known of a sweep before it runs.

    `manifest` is None if it can't be read, and `manifest_problem` says why. Times are for `machine`, and
    `infeasible_reason` says why the sweep can't run there. `free_bytes` and `logit_room` are unknown for another
    machine.
    """

    sweep: ResolvedSweep
    manifest: Manifest | None
    manifest_problem: str
    encoders: tuple[PlannedEncoder, ...]
    free_bytes: int | None
    num_gpus: float
    num_machines: int
    machine: str
    infeasible_reason: str
    concurrent: int
    mean_epochs: float
    # The most bytes of validation logits at one time, and the room that stored features leave for them.
    logit_bytes: int
    logit_room: int | None
    # None without a manifest, or without measured speeds.
    rows: SplitSizes | None = None
    packing: Packing | None = None
    pack_statistics: PackStatistics | None = None
    measured: tuple[TrialConfig, ...] = ()
    benchmark: SpeedBenchmark | None = None
    estimate: Estimate | None = None

    @property
    def spec(self) -> SweepSpec:
        return self.sweep.spec

    @property
    def pack_size(self) -> int:
        """The largest number of trials that train together."""
        return 1 if self.pack_statistics is None else self.pack_statistics.max_size

    @property
    def missing_bytes(self) -> int:
        return sum(encoder.missing_bytes for encoder in self.encoders)

    @property
    def fits_disk(self) -> bool | None:
        """Whether features and logits fit; None if unknown."""
        fits = self.fits_features
        return None if fits is None else fits and self.fits_logits

    @property
    def fits_features(self) -> bool | None:
        """Whether features fit; None if unknown."""
        if self.free_bytes is None or self.manifest is None:
            return None
        return self.missing_bytes * DISK_MARGIN <= self.free_bytes

    @property
    def fits_logits(self) -> bool:
        return self.logit_room is None or self.logit_bytes <= self.logit_room

    @property
    def copy_bytes(self) -> int:
        """Bytes of all that trials read, of which each machine caches what it can; 0 if they read the folder itself."""
        is_cached = self.manifest is not None and self.cache.is_needed_for(
            self.spec.feature_root, has_many_machines=self.num_machines > 1
        )
        return sum(encoder.num_bytes for encoder in self.encoders) if is_cached else 0

    @property
    def cache(self) -> FeatureCache:
        """This machine's cache of features."""
        return FeatureCache(self.spec.feature_copies)

    @property
    def fits_copies(self) -> bool:
        """Whether this machine's cache holds what one trial reads."""
        largest = max((encoder.trial_bytes for encoder in self.encoders), default=0)
        return not self.copy_bytes or largest <= self.cache.limit_bytes()

    @property
    def fits_all_copies(self) -> bool:
        """Whether this machine's cache holds what trials of as many encoders read as can run at once."""
        largest = sorted((encoder.trial_bytes for encoder in self.encoders), reverse=True)[: self.concurrent]
        return not self.copy_bytes or sum(largest) <= self.cache.limit_bytes()

    @property
    def gpu_hours(self) -> Interval | None:
        """Hours of all GPUs of the machine or cluster while the sweep runs."""
        total = None if self.estimate is None else self.estimate.total
        return None if total is None else gpu_hours(total, self.num_gpus)

    @property
    def cost(self) -> Interval | None:
        total = None if self.estimate is None else self.estimate.total
        hourly = cost_of_an_hour(self.spec, self.num_gpus, self.num_machines)
        return None if total is None or hourly is None else total.times(hourly / 3600)


def measure_here(spec: SweepSpec, trials: Sequence[TrialConfig], encoders: Sequence[TrialConfig]) -> SpeedBenchmark:
    """Measure in this process."""
    return measure_speeds(trials, encoders, max(1, int(spec.cpus_per_worker)))


def measure_on_cluster(
    spec: SweepSpec, trials: Sequence[TrialConfig], encoders: Sequence[TrialConfig]
) -> SpeedBenchmark:
    """Measure on a machine of the cluster that holds a trial's worker."""
    with ray_session():
        return run_on_worker(
            measure_speeds, list(trials), list(encoders), max(1, int(spec.cpus_per_worker)),
            num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker,
        )  # fmt: skip


def make_plan(spec: SweepSpec, measure: Measure | None, num_gpus: int | None = None) -> Plan:
    """Check the sweep, and measure its trials if `measure` is given; raises ConfigError, ImbvlmError.

    With `num_gpus` the plan is for another machine with so many GPUs, and files that are missing here don't matter.
    """
    sweep = check_spec(spec)
    spec, infos = sweep.spec, check_models(sweep)
    warm_starts(sweep)
    manifest, problem = _read_manifest(spec)
    if manifest is not None:
        check_manifest(sweep, manifest)
    is_here = num_gpus is None
    # The cluster is joined once for all questions about it.
    with existing_cluster() if is_here else nullcontext():
        cluster = find_cluster() if num_gpus is None else _other_machine(spec, num_gpus)
        concurrent, infeasible_reason = _concurrent(sweep, cluster)
        encoders = tuple(
            _plan_encoder(sweep, config, infos, manifest, is_here=is_here) for config in encoder_configs(sweep)
        )
    sample = sample_trials(sweep)
    rows = None if manifest is None else split_sizes(sweep, manifest)
    plan = Plan(
        sweep=sweep,
        manifest=manifest,
        manifest_problem=problem,
        encoders=encoders,
        free_bytes=storage.free_bytes(spec.feature_root) if is_here else None,
        num_gpus=_num_gpus(spec, cluster, concurrent),
        num_machines=1 if cluster is None else len(cluster.max_nodes),
        machine=_describe_machine(cluster, is_here=is_here),
        infeasible_reason=infeasible_reason,
        concurrent=concurrent,
        mean_epochs=sum(num_epochs(config, rows.train if rows else 1) for config in sample) / len(sample),
        logit_bytes=0,
        logit_room=_logit_room(spec, encoders) if is_here else None,
        rows=rows,
    )
    if manifest is None:
        return plan
    packs = packing(sweep, infos.values(), manifest, concurrent)
    plan = replace(
        plan,
        packing=packs,
        pack_statistics=PackStatistics.of(sample, packs.size),
        logit_bytes=max_logit_bytes(sweep, manifest, packs, concurrent),
    )
    return plan if measure is None else _with_times(plan, measure, sample, cluster)


def _with_times(plan: Plan, measure: Measure, sample: Sequence[TrialConfig], cluster: Cluster | None) -> Plan:
    """Measure the most common kinds of trials and the baselines, and estimate all phases from them."""
    assert plan.rows is not None, "times are estimated with a manifest alone"
    assert plan.pack_statistics is not None, "packs are planned with the manifest"
    measured, fixed = most_common_shapes(sample, MAX_SHAPES), list(baselines(plan.sweep).values())
    keys = set(map(cost_key, measured))
    baseline_shapes = most_common_shapes([baseline.config for baseline in fixed], MAX_SHAPES)
    measured += [config for config in baseline_shapes if cost_key(config) not in keys]
    benchmark = measure(plan.spec, measured, [encoder.config for encoder in plan.encoders])
    speeds = SpeedTable(
        {
            cost_key(config): (config.method, speed)
            for config, speed in zip(measured, benchmark.trials, strict=True)
            if isinstance(speed, TrialSpeed)
        }
    )
    start = START_SECONDS[driver_of(plan.sweep)]
    features = _feature_seconds(plan.encoders, benchmark, cluster, 2 if plan.rows.test else 1)
    estimator = Estimator(plan.sweep, sample, fixed, speeds, plan.rows, plan.concurrent, start)
    estimated = estimator.estimate(features, plan.pack_statistics)
    return replace(plan, measured=tuple(measured), benchmark=benchmark, estimate=estimated)


def _logit_room(spec: SweepSpec, encoders: Sequence[PlannedEncoder]) -> int | None:
    """Return the free bytes of the sweep's folder, less those of features that are still to be written to its disk."""
    room = storage.free_bytes(spec.storage)
    if room is not None and storage.is_same_disk(spec.storage, spec.feature_root):
        room -= int(DISK_MARGIN * sum(encoder.missing_bytes for encoder in encoders))
    return room


def _other_machine(spec: SweepSpec, num_gpus: int) -> Cluster:
    """Return a machine with so many GPUs and the CPUs that their trials need, at least as many as this one has."""
    workers = num_gpus / spec.gpus_per_worker if spec.gpus_per_worker else 0
    num_cpus = float(max(_cpus(), math.ceil(workers * (spec.cpus_per_worker + DRIVER_CPUS))))
    nodes = ((num_cpus, float(num_gpus)),)
    return Cluster("not started", num_cpus, float(num_gpus), False, nodes, nodes)


def _read_manifest(spec: SweepSpec) -> tuple[Manifest | None, str]:
    source = spec.base["data"]["manifest"]
    try:
        return Manifest.read(source), ""
    except storage.StorageError as error:
        if "is not there" not in str(error):
            return None, str(error)
        return None, f"{source} (NOT THERE: make it with `imbvlm manifest build`, or give --manifest)"
    except ImbvlmError as error:
        return None, str(error)


def split_sizes(sweep: ResolvedSweep, manifest: Manifest) -> SplitSizes:
    """The numbers of images that a sweep's trials, refits and further runs read."""
    spec = sweep.spec
    train, val = train_val_rows(manifest, spec.split_seed)
    folds, folds_again = num_folds(spec, manifest), confirm_folds(sweep, manifest)
    of_gap = gap_folds(spec, manifest)
    return SplitSizes(
        train=len(train),
        val=len(val),
        refit=len(manifest.rows_of("train")),
        test=len(manifest.rows_of("test")),
        num_folds=folds,
        folds_val=sum(data_counts(manifest, spec.split_seed, folds)[1]),
        confirm_folds=folds_again,
        confirm_val=0 if folds_again == 1 else len(validation_rows(manifest, spec.split_seed, folds_again)),
        gap_folds=1 if isinstance(of_gap, str) else len(of_gap.folds),
        gap_val=0 if isinstance(of_gap, str) else len(of_gap.val_rows),
    )


def resources() -> tuple[float, float]:
    """Return CPUs and GPUs of the cluster that a sweep would join, or else of this machine; starts nothing."""
    cluster = find_cluster()
    return (_cpus(), torch.cuda.device_count()) if cluster is None else (cluster.max_cpus, cluster.max_gpus)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _concurrent(sweep: ResolvedSweep, cluster: Cluster | None) -> tuple[int, str]:
    """Return how many trials run at once, and the reason if none can."""
    try:
        if cluster is None:
            return concurrent_trials(sweep, _cpus(), torch.cuda.device_count()), ""
        return trials_at_once(sweep, cluster), ""
    except ConfigError as error:
        return sweep.spec.max_concurrent_trials or 1, "; ".join(problem.message for problem in error.problems)


def _num_gpus(spec: SweepSpec, cluster: Cluster | None, concurrent: int) -> float:
    """Return the GPUs of the cluster or machine, at least those that the trials need."""
    available = float(torch.cuda.device_count()) if cluster is None else cluster.max_gpus
    return max(available, concurrent * spec.gpus_per_trial)


def _describe_machine(cluster: Cluster | None, *, is_here: bool) -> str:
    if cluster is not None and not is_here:
        return f"another machine, {pluralize(cluster.num_cpus, 'CPU')} and {pluralize(cluster.num_gpus, 'GPU')}"
    cpus, gpus = (_cpus(), torch.cuda.device_count()) if cluster is None else (cluster.num_cpus, cluster.num_gpus)
    where = "this machine" if cluster is None else f"the cluster that runs ({pluralize(len(cluster.nodes), 'machine')})"
    return f"{where}, {pluralize(cpus, 'CPU')} and {pluralize(gpus, 'GPU')}"


def _plan_encoder(
    sweep: ResolvedSweep,
    config: TrialConfig,
    infos: Mapping[str, EncoderInfo],
    manifest: Manifest | None,
    *,
    is_here: bool,
) -> PlannedEncoder:
    """Count the bytes of an encoder's outputs; on this machine the store is read, which needs the encoder's weights."""
    info = infos[config.encoder.model_dump_json()]
    outputs, root = needed_outputs(sweep), sweep.spec.feature_root
    if manifest is None:
        return PlannedEncoder(config, info, bytes_per_image(config, info, outputs), 0, None)
    if not config.features.store:
        return PlannedEncoder(config, info, 0, 0, 0)
    num_bytes = sum(store_bytes(config, info, manifest, outputs, manifest.splits).values())
    per_trial = trial_bytes(config, info, manifest, outputs)
    if not is_here or not storage.exists(root) or not resolve_encoder(config.encoder).has_weights:
        num_images = num_crops(config, manifest, manifest.splits)
        return PlannedEncoder(config, info, num_bytes, num_bytes, num_images, per_trial)
    pending = pending_images(config, manifest, storage.absolute(root), outputs, manifest.splits)
    return PlannedEncoder(config, info, num_bytes, pending.num_bytes, pending.num_images, per_trial, pending.num_known)


def _feature_seconds(
    encoders: Sequence[PlannedEncoder], benchmark: SpeedBenchmark, cluster: Cluster | None, num_passes: int
) -> float | None:
    """Estimate the passes over all images, one encoder after another; None if an encoder was not measured.

    On GPUs, CPUs read images meanwhile. Without a GPU the CPUs do both.
    """
    cpus = _cpus() if cluster is None else cluster.num_cpus
    gpus = torch.cuda.device_count() if cluster is None else cluster.max_gpus
    total = 0.0
    for encoder, speed in zip(encoders, benchmark.encoders, strict=True):
        if not encoder.missing_images:
            continue
        if not isinstance(speed, EncoderSpeed):
            return None
        if benchmark.machine.device == "cpu":
            per_image = (speed.load_seconds + speed.encoder_seconds * benchmark.machine.num_threads) / cpus
        else:
            per_image = max(speed.load_seconds / cpus, speed.encoder_seconds / max(1, gpus))
        start = PASS_START_SECONDS
        if not gpus and cluster is None and encoder.missing_images * speed.encoder_seconds <= num_passes * SECONDS_HERE:
            # The sweep's own process does it without workers.
            start = 0.0
        total += num_passes * start + encoder.missing_images * per_image
    return total
