"""What a sweep would do, read, take and cost, shown without starting or writing anything of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.base.formatting import pluralize, size_text
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.splits import carve_validation
from imbvlm.features.extraction import SECONDS_HERE
from imbvlm.features.feature_cache import FeatureCache
from imbvlm.features.store_sizes import (
    DISK_MARGIN,
    bytes_per_image,
    num_crops,
    pending_images,
    store_bytes,
    token_size_options,
    trial_bytes,
)
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.ray_runtime.cluster_resources import Cluster
from imbvlm.ray_runtime.connection import existing_cluster, find_cluster, ray_session, run_on_worker
from imbvlm.sweep.plan.cost_estimate import (
    PASS_START_SECONDS,
    START_SECONDS,
    Estimate,
    Interval,
    PackStatistics,
    SpeedTable,
    SplitSizes,
    cost_key,
    estimate,
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
    max_logit_bytes,
    needed_outputs,
    packing,
    trials_at_once,
    uses_ray_train,
)
from imbvlm.sweep.plan.speed_benchmark import SpeedBenchmark, TowerSpeed, TrialSpeed, calibrate
from imbvlm.sweep.records.budget import cost_of_an_hour
from imbvlm.sweep.records.earlier_sweeps import warm_starts
from imbvlm.sweep.spec.baselines import baselines, encoder_configs
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

# So many kinds of trials are measured, about two seconds each.
MAX_SHAPES = 6

Calibrate = Callable[[SweepSpec, Sequence[TrialConfig], Sequence[TrialConfig]], SpeedBenchmark]


@dataclass(frozen=True)
class PlannedEncoder:
    """One tower of the space: what its stored outputs take on disk, and what is still to be computed of them.

    Without a manifest `num_bytes` is of one image and view; `missing_images` is None where it isn't known. One trial
    reads `trial_bytes` at the most.
    """

    config: TrialConfig
    info: EncoderInfo
    num_bytes: int
    missing_bytes: int
    missing_images: int | None
    trial_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """All that is known of a sweep before it runs; `manifest` is None where it can't be read, for `manifest_problem`.

    `machine` says what the times are for, and `infeasible_reason` why the sweep can't run there.
    """

    sweep: ResolvedSweep
    manifest: Manifest | None
    manifest_problem: str
    towers: tuple[PlannedEncoder, ...]
    free_bytes: int | None
    num_gpus: float
    num_machines: int
    machine: str
    infeasible_reason: str
    concurrent: int
    calibration: SpeedBenchmark | None
    shapes: tuple[TrialConfig, ...]
    rows: SplitSizes | None
    mean_epochs: float
    estimate: Estimate | None
    # How trials train together, and what each further one adds; None without a manifest.
    together: PackStatistics | None = None
    packing: Packing | None = None
    # What validation logits take at one time, at most, and the room that stored features leave for them.
    logit_bytes: int = 0
    logit_room: int | None = None

    @property
    def spec(self) -> SweepSpec:
        return self.sweep.spec

    @property
    def pack_size(self) -> int:
        """How many trials train together, at most."""
        return 1 if self.together is None else self.together.most

    @property
    def missing_bytes(self) -> int:
        return sum(tower.missing_bytes for tower in self.towers)

    @property
    def fits_disk(self) -> bool | None:
        """None where it can't be known."""
        fits = self.fits_features
        return None if fits is None else fits and self.fits_logits

    @property
    def fits_features(self) -> bool | None:
        """None where it can't be known."""
        if self.free_bytes is None or self.manifest is None:
            return None
        return self.missing_bytes * DISK_MARGIN <= self.free_bytes

    @property
    def fits_logits(self) -> bool:
        return self.logit_room is None or self.logit_bytes <= self.logit_room

    @property
    def copy_bytes(self) -> int:
        """What trials read in all, of which each machine keeps what it can; 0 where they read the folder itself."""
        is_cached = self.manifest is not None and self.cache.is_needed_for(
            self.spec.feature_root, has_many_machines=self.num_machines > 1
        )
        return sum(tower.num_bytes for tower in self.towers) if is_cached else 0

    @property
    def cache(self) -> FeatureCache:
        """This machine's cache of features."""
        return FeatureCache(self.spec.feature_copies)

    @property
    def fits_copies(self) -> bool:
        """Whether this machine could hold what one trial reads."""
        largest = max((tower.trial_bytes for tower in self.towers), default=0)
        return not self.copy_bytes or largest <= self.cache.limit_bytes()

    @property
    def fits_all_copies(self) -> bool:
        """Whether it could hold what trials of as many towers read as can run at once."""
        largest = sorted((tower.trial_bytes for tower in self.towers), reverse=True)[: self.concurrent]
        return not self.copy_bytes or sum(largest) <= self.cache.limit_bytes()

    @property
    def gpu_hours(self) -> Interval | None:
        """Of all GPUs of the machine or cluster while the sweep runs."""
        total = None if self.estimate is None else self.estimate.total
        return None if total is None else gpu_hours(total, self.num_gpus)

    @property
    def cost(self) -> Interval | None:
        total = None if self.estimate is None else self.estimate.total
        an_hour = cost_of_an_hour(self.spec, self.num_gpus, self.num_machines)
        return None if total is None or an_hour is None else total.times(an_hour / 3600)


def calibrate_here(spec: SweepSpec, trials: Sequence[TrialConfig], towers: Sequence[TrialConfig]) -> SpeedBenchmark:
    """On this machine, in this process."""
    return calibrate(trials, towers, max(1, int(spec.cpus_per_worker)))


def calibrate_on_cluster(
    spec: SweepSpec, trials: Sequence[TrialConfig], towers: Sequence[TrialConfig]
) -> SpeedBenchmark:
    """On a machine of the cluster that a trial's worker would be given."""
    with ray_session():
        return run_on_worker(
            calibrate, list(trials), list(towers), max(1, int(spec.cpus_per_worker)),
            num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker,
        )  # fmt: skip


def make_plan(spec: SweepSpec, measure: Calibrate | None, num_gpus: int | None = None) -> Plan:
    """Check the sweep, and measure its trials where `measure` is given; raises ConfigError, ImbvlmError.

    With `num_gpus` the plan is for another machine that has so many, and files missing here are no obstacles.
    """
    sweep = check_spec(spec)
    spec, towers = sweep.spec, check_models(sweep)
    warm_starts(sweep)
    manifest, problem = _read_manifest(spec)
    if manifest is not None:
        check_manifest(spec, manifest)
    look = num_gpus is None
    # Joined once for all that is asked of it.
    with existing_cluster() if look else nullcontext():
        cluster = find_cluster() if num_gpus is None else _elsewhere(spec, num_gpus)
        concurrent, misfit = _concurrent(sweep, cluster)
        found = tuple(_tower(sweep, config, towers, manifest, look=look) for config in encoder_configs(sweep))
    sample, rows = sample_trials(sweep), None
    fixed = baselines(sweep)
    shapes: list[TrialConfig] = []
    calibration = estimated = together = packs = None
    logits, logit_room = 0, storage.free_bytes(spec.storage) if look else None
    if logit_room is not None and storage.is_same_disk(spec.storage, spec.feature_root):
        logit_room -= int(DISK_MARGIN * sum(tower.missing_bytes for tower in found))
    if manifest is not None:
        rows = _rows(spec, manifest)
        packs = packing(sweep, towers.values(), manifest, concurrent)
        together = PackStatistics.of(sample, packs.size)
        logits = max_logit_bytes(sweep, manifest, packs, concurrent)
        if measure is not None:
            shapes = most_common_shapes(sample, MAX_SHAPES)
            known = set(map(cost_key, shapes))
            for one in fixed:
                shapes += [] if cost_key(one.config) in known or len(fixed) > MAX_SHAPES else [one.config]
            calibration = measure(spec, shapes, [tower.config for tower in found])
            speeds = SpeedTable(
                {
                    cost_key(config): (config.method, speed)
                    for config, speed in zip(shapes, calibration.trials, strict=True)
                    if isinstance(speed, TrialSpeed)
                }
            )
            start = START_SECONDS["ray_train" if uses_ray_train(sweep) else "in_process"]
            passes = _features_seconds(found, calibration, cluster, 2 if rows.test else 1)
            estimated = estimate(sweep, sample, fixed, speeds, rows, concurrent, start, passes, together)
    return Plan(
        sweep, manifest, problem, found, storage.free_bytes(spec.feature_root) if look else None,
        _num_gpus(spec, cluster, concurrent), 1 if cluster is None else len(cluster.max_nodes),
        _machine(cluster, is_here=look), misfit, concurrent, calibration, tuple(shapes), rows,
        sum(num_epochs(config, rows.train if rows else 1) for config in sample) / len(sample), estimated,
        together, packs, logits, logit_room,
    )  # fmt: skip


def obstacles(plan: Plan, *, is_here: bool) -> list[str]:
    """All reasons why the sweep would be rejected if it were started now; of another machine only its size is known.

    Where weights are missing, it asks whether their server answers.
    """
    return [*(_missing_files(plan) if is_here else ()), *([plan.infeasible_reason] if plan.infeasible_reason else [])]


def _missing_files(plan: Plan) -> list[str]:
    """Files and disk space that the sweep needs and this machine lacks."""
    problems = [] if plan.manifest is not None else [f"manifest {plan.manifest_problem}"]
    for tower in plan.towers:
        try:
            problem = resolve_encoder(tower.config.encoder).weights_state().problem
        except ImbvlmError as error:
            problem = str(error)
        problems += [] if problem is None else [f"encoder {tower.config.encoder.name}: {problem}"]
    problems += [] if plan.fits_features is not False else [f"features: {_disk(plan)}"]
    return problems + ([] if plan.fits_logits else [f"logits: {_logits(plan)}"])


def _elsewhere(spec: SweepSpec, num_gpus: int) -> Cluster:
    """A machine with so many GPUs and the CPUs that their trials take, or as many as this one has."""
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


def _rows(spec: SweepSpec, manifest: Manifest) -> SplitSizes:
    carved = len(carve_validation(manifest.label_rows(), int(spec.base["data"].get("split_seed", 0))))
    counts = {split: len(manifest.rows_of(split)) for split in manifest.splits}
    return SplitSizes(counts["train"] - carved, counts.get("val", carved), counts["train"], counts.get("test", 0))


def resources() -> tuple[float, float]:
    """CPUs and GPUs of the cluster that a sweep would join, or else of this machine; starts nothing."""
    cluster = find_cluster()
    return (_cpus(), torch.cuda.device_count()) if cluster is None else (cluster.max_cpus, cluster.max_gpus)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _concurrent(sweep: ResolvedSweep, cluster: Cluster | None) -> tuple[int, str]:
    """How many trials run at once; one, and the reason, where none can here."""
    try:
        if cluster is None:
            return concurrent_trials(sweep, _cpus(), torch.cuda.device_count()), ""
        return trials_at_once(sweep, cluster), ""
    except ConfigError as error:
        return sweep.spec.max_concurrent_trials or 1, "; ".join(problem.message for problem in error.problems)


def _num_gpus(spec: SweepSpec, cluster: Cluster | None, concurrent: int) -> float:
    """The GPUs that stand by: those of the cluster or machine, at least those that the trials take."""
    there = float(torch.cuda.device_count()) if cluster is None else cluster.max_gpus
    return max(there, concurrent * spec.gpus_per_trial)


def _machine(cluster: Cluster | None, *, is_here: bool) -> str:
    if cluster is not None and not is_here:
        return f"another machine, {pluralize(cluster.num_cpus, 'CPU')} and {pluralize(cluster.num_gpus, 'GPU')}"
    cpus, gpus = (_cpus(), torch.cuda.device_count()) if cluster is None else (cluster.num_cpus, cluster.num_gpus)
    where = "this machine" if cluster is None else f"the cluster that runs ({len(cluster.nodes)} machines)"
    return f"{where}, {pluralize(cpus, 'CPU')} and {pluralize(gpus, 'GPU')}"


def _tower(
    sweep: ResolvedSweep,
    config: TrialConfig,
    towers: Mapping[str, EncoderInfo],
    manifest: Manifest | None,
    *,
    look: bool,
) -> PlannedEncoder:
    """With `look`, what the store has already is looked up, for which the tower's weights are read."""
    info = towers[config.encoder.model_dump_json()]
    outputs = needed_outputs(sweep)
    if manifest is None:
        return PlannedEncoder(config, info, bytes_per_image(config, info, outputs), 0, None)
    each = store_bytes(config, manifest, outputs, manifest.splits)
    total, most = sum(each.values()), trial_bytes(config, manifest, outputs)
    crops = num_crops(config, manifest, manifest.splits)
    root = sweep.spec.feature_root
    if not config.features.store:
        return PlannedEncoder(config, info, 0, 0, 0)
    if not look or not storage.exists(root) or not resolve_encoder(config.encoder).has_weights:
        return PlannedEncoder(config, info, total, total, crops, most)
    images, missing = pending_images(config, manifest, storage.absolute(root), outputs, manifest.splits)
    return PlannedEncoder(config, info, total, missing, images, most)


def _features_seconds(
    towers: Sequence[PlannedEncoder], calibration: SpeedBenchmark, cluster: Cluster | None, num_passes: int
) -> float | None:
    """The passes over all images, one tower after another: on GPUs beside the CPUs that read images, else on CPUs."""
    cpus = _cpus() if cluster is None else cluster.num_cpus
    gpus = torch.cuda.device_count() if cluster is None else cluster.max_gpus
    total = 0.0
    for tower, speed in zip(towers, calibration.towers, strict=True):
        if not tower.missing_images:
            continue
        if not isinstance(speed, TowerSpeed):
            return None
        if calibration.machine.device == "cpu":
            each = (speed.load_seconds + speed.tower_seconds * calibration.machine.num_threads) / cpus
        else:
            each = max(speed.load_seconds / cpus, speed.tower_seconds / max(1, gpus))
        start = PASS_START_SECONDS
        if not gpus and cluster is None and tower.missing_images * speed.tower_seconds <= num_passes * SECONDS_HERE:
            # The sweep's own process does it.
            start = 0.0
        total += num_passes * start + tower.missing_images * each
    return total


def _disk(plan: Plan) -> str:
    if not plan.missing_bytes:
        return "all there already"
    text = f"{size_text(plan.missing_bytes)} to write"
    if plan.free_bytes is None:
        return text
    if plan.fits_features:
        return f"{text}, {size_text(plan.free_bytes)} free"
    reads_tokens = "tokens" in needed_outputs(plan.sweep)
    knobs = "".join(f", {knob}" for knob in token_size_options(plan.towers[0].config)) if reads_tokens else ""
    return (
        f"{text}, and ONLY {size_text(plan.free_bytes)} free: reduce features.num_views or features.precision"
        f"{knobs}, or choose another --storage"
    )


def _logits(plan: Plan) -> str:
    if not plan.logit_bytes:
        return "none: validation has too many rows and classes to keep them"
    text = f"of validation, up to {size_text(plan.logit_bytes)} at one time"
    if plan.fits_logits or plan.logit_room is None:
        return text
    return (
        f"{text}, and ONLY {size_text(max(0, plan.logit_room))} left for them: lower max_concurrent_trials or "
        "max_pack_size, or choose another --storage"
    )
