"""What a sweep would do, read, take and cost, shown without starting or writing anything of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from imbvlm import storage
from imbvlm.config import TrialConfig, needed
from imbvlm.data.cluster import Cluster, call_on_worker, connected, joined, running_cluster
from imbvlm.data.manifest import Manifest, carve_validation
from imbvlm.data.table import count_of
from imbvlm.errors import ConfigError, ImbvlmError
from imbvlm.features.extract import (
    DISK_MARGIN,
    SECONDS_HERE,
    image_bytes,
    num_crops,
    plan_bytes,
    stored_images,
    token_knobs,
    trial_bytes,
)
from imbvlm.models.encoder_info import EncoderInfo
from imbvlm.models.towers import find_tower
from imbvlm.storage import size_text
from imbvlm.sweep.baselines import baselines, tower_configs
from imbvlm.sweep.budget import cost_of_an_hour
from imbvlm.sweep.calibration import Calibration, TowerSpeed, TrialSpeed, calibrate
from imbvlm.sweep.compute import between
from imbvlm.sweep.console import duration, table
from imbvlm.sweep.duplicates import not_trained
from imbvlm.sweep.estimate import (
    PASS_START_SECONDS,
    START_SECONDS,
    Estimate,
    Range,
    Rows,
    Speeds,
    Together,
    commonest_shapes,
    estimate,
    gpu_hours,
    num_epochs,
    sample_trials,
    shape_of,
)
from imbvlm.sweep.feasibility import (
    DRIVER_CPUS,
    Packing,
    at_a_time,
    check_models,
    concurrent_trials,
    packing,
    trials_at_once,
    uses_ray_train,
)
from imbvlm.sweep.listed_space import ListedSpace
from imbvlm.sweep.objectives import SECONDS
from imbvlm.sweep.run import check_manifest, max_logit_bytes, needed_outputs
from imbvlm.sweep.space import Draw, SearchSpace
from imbvlm.sweep.spec import AshaConfig, SweepSpec, check_spec
from imbvlm.sweep.warm_start import warm_starts

# So many kinds of trials are measured, about two seconds each.
MAX_SHAPES = 6
DRY_RUN = "dry run: nothing was started or written"

Calibrate = Callable[[SweepSpec, Sequence[TrialConfig], Sequence[TrialConfig]], Calibration]


@dataclass(frozen=True)
class Tower:
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

    `machine` says what the times are for, and `misfit` why the sweep can't run there.
    """

    spec: SweepSpec
    space: SearchSpace
    manifest: Manifest | None
    manifest_problem: str
    towers: tuple[Tower, ...]
    free_bytes: int | None
    num_gpus: float
    num_machines: int
    machine: str
    misfit: str
    concurrent: int
    calibration: Calibration | None
    shapes: tuple[TrialConfig, ...]
    rows: Rows | None
    mean_epochs: float
    estimate: Estimate | None
    # How trials train together, and what each further one adds; None without a manifest.
    together: Together | None = None
    packing: Packing | None = None
    # What validation logits take at one time, at most, and the room that stored features leave for them.
    logit_bytes: int = 0
    logit_room: int | None = None

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
        copies = self.spec.feature_copies
        known = self.manifest is not None and copies.needed_for(
            self.spec.feature_root, many_machines=self.num_machines > 1
        )
        return sum(tower.num_bytes for tower in self.towers) if known else 0

    @property
    def fits_copies(self) -> bool:
        """Whether this machine could hold what one trial reads."""
        largest = max((tower.trial_bytes for tower in self.towers), default=0)
        return not self.copy_bytes or largest <= self.spec.feature_copies.limit_bytes()

    @property
    def fits_all_copies(self) -> bool:
        """Whether it could hold what trials of as many towers read as can run at once."""
        largest = sorted((tower.trial_bytes for tower in self.towers), reverse=True)[: self.concurrent]
        return not self.copy_bytes or sum(largest) <= self.spec.feature_copies.limit_bytes()

    @property
    def gpu_hours(self) -> Range | None:
        """Of all GPUs of the machine or cluster while the sweep runs."""
        total = None if self.estimate is None else self.estimate.total
        return None if total is None else gpu_hours(total, self.num_gpus)

    @property
    def cost(self) -> Range | None:
        total = None if self.estimate is None else self.estimate.total
        an_hour = cost_of_an_hour(self.spec, self.num_gpus, self.num_machines)
        return None if total is None or an_hour is None else total.times(an_hour / 3600)


def calibrate_here(spec: SweepSpec, trials: Sequence[TrialConfig], towers: Sequence[TrialConfig]) -> Calibration:
    """On this machine, in this process."""
    return calibrate(trials, towers, max(1, int(spec.cpus_per_worker)))


def calibrate_on_cluster(spec: SweepSpec, trials: Sequence[TrialConfig], towers: Sequence[TrialConfig]) -> Calibration:
    """On a machine of the cluster that a trial's worker would be given."""
    with connected():
        return call_on_worker(
            calibrate, list(trials), list(towers), max(1, int(spec.cpus_per_worker)),
            num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker,
        )  # fmt: skip


def make_plan(spec: SweepSpec, measure: Calibrate | None, num_gpus: int | None = None) -> Plan:
    """Check the sweep, and measure its trials where `measure` is given; raises ConfigError, ImbvlmError.

    With `num_gpus` the plan is for another machine that has so many, and files missing here are no obstacles.
    """
    space = check_spec(spec)
    towers = check_models(spec, space)
    warm_starts(spec, space)
    manifest, problem = _read_manifest(spec)
    if manifest is not None:
        check_manifest(spec, manifest)
    look = num_gpus is None
    # Joined once for all that is asked of it.
    with joined() if look else nullcontext():
        cluster = running_cluster() if num_gpus is None else _elsewhere(spec, num_gpus)
        concurrent, misfit = _concurrent(spec, cluster)
        found = tuple(_tower(spec, space, config, towers, manifest, look=look) for config in tower_configs(spec, space))
    sample, rows = sample_trials(spec, space), None
    fixed = baselines(spec, space)
    shapes: list[TrialConfig] = []
    calibration = estimated = together = packs = None
    logits, logit_room = 0, storage.free_bytes(spec.storage) if look else None
    if logit_room is not None and storage.is_same_disk(spec.storage, spec.feature_root):
        logit_room -= int(DISK_MARGIN * sum(tower.missing_bytes for tower in found))
    if manifest is not None:
        rows = _rows(spec, manifest)
        packs = packing(spec, towers.values(), manifest, concurrent)
        together = Together.of(sample, packs.size)
        logits = max_logit_bytes(spec, space, manifest, packs, concurrent)
        if measure is not None:
            shapes = commonest_shapes(sample, MAX_SHAPES)
            known = set(map(shape_of, shapes))
            for one in fixed:
                shapes += [] if shape_of(one.config) in known or len(fixed) > MAX_SHAPES else [one.config]
            calibration = measure(spec, shapes, [tower.config for tower in found])
            speeds = Speeds(
                {
                    shape_of(config): (config.method, speed)
                    for config, speed in zip(shapes, calibration.trials, strict=True)
                    if isinstance(speed, TrialSpeed)
                }
            )
            start = START_SECONDS["ray_train" if uses_ray_train(spec) else "in_process"]
            passes = _features_seconds(found, calibration, cluster, 2 if rows.test else 1)
            estimated = estimate(spec, sample, fixed, speeds, rows, concurrent, start, passes, together)
    return Plan(
        spec, space, manifest, problem, found, storage.free_bytes(spec.feature_root) if look else None,
        _num_gpus(spec, cluster, concurrent), 1 if cluster is None else len(cluster.grown),
        _machine(cluster, is_here=look), misfit, concurrent, calibration, tuple(shapes), rows,
        sum(num_epochs(config, rows.train if rows else 1) for config in sample) / len(sample), estimated,
        together, packs, logits, logit_room,
    )  # fmt: skip


def obstacles(plan: Plan, *, is_here: bool) -> list[str]:
    """All reasons why the sweep would be rejected if it were started now; of another machine only its size is known.

    Where weights are missing, it asks whether their server answers.
    """
    return [*(_missing_files(plan) if is_here else ()), *([plan.misfit] if plan.misfit else [])]


def _missing_files(plan: Plan) -> list[str]:
    """Files and disk space that the sweep needs and this machine lacks."""
    problems = [] if plan.manifest is not None else [f"manifest {plan.manifest_problem}"]
    for tower in plan.towers:
        try:
            problem = find_tower(tower.config.encoder).weights_state().problem
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


def _rows(spec: SweepSpec, manifest: Manifest) -> Rows:
    carved = len(carve_validation(manifest, int(spec.base["data"].get("split_seed", 0))))
    counts = {split: len(manifest.rows_of(split)) for split in manifest.splits}
    return Rows(counts["train"] - carved, counts.get("val", carved), counts["train"], counts.get("test", 0))


def resources() -> tuple[float, float]:
    """CPUs and GPUs of the cluster that a sweep would join, or else of this machine; starts nothing."""
    cluster = running_cluster()
    return (_cpus(), torch.cuda.device_count()) if cluster is None else (cluster.most_cpus, cluster.most_gpus)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _concurrent(spec: SweepSpec, cluster: Cluster | None) -> tuple[int, str]:
    """How many trials run at once; one, and the reason, where none can here."""
    try:
        if cluster is None:
            return concurrent_trials(spec, _cpus(), torch.cuda.device_count()), ""
        return trials_at_once(spec, cluster), ""
    except ConfigError as error:
        return spec.max_concurrent_trials or 1, "; ".join(problem.message for problem in error.problems)


def _num_gpus(spec: SweepSpec, cluster: Cluster | None, concurrent: int) -> float:
    """The GPUs that stand by: those of the cluster or machine, at least those that the trials take."""
    there = float(torch.cuda.device_count()) if cluster is None else cluster.most_gpus
    return max(there, concurrent * spec.num_workers * spec.gpus_per_worker)


def _machine(cluster: Cluster | None, *, is_here: bool) -> str:
    if cluster is not None and not is_here:
        return f"another machine, {count_of(cluster.num_cpus, 'CPU')} and {count_of(cluster.num_gpus, 'GPU')}"
    cpus, gpus = (_cpus(), torch.cuda.device_count()) if cluster is None else (cluster.num_cpus, cluster.num_gpus)
    where = "this machine" if cluster is None else f"the cluster that runs ({len(cluster.nodes)} machines)"
    return f"{where}, {count_of(cpus, 'CPU')} and {count_of(gpus, 'GPU')}"


def _tower(
    spec: SweepSpec,
    space: SearchSpace,
    config: TrialConfig,
    towers: Mapping[str, EncoderInfo],
    manifest: Manifest | None,
    *,
    look: bool,
) -> Tower:
    """With `look`, what the store has already is looked up, for which the tower's weights are read."""
    info = towers[config.encoder.model_dump_json()]
    outputs = needed_outputs(spec, space)
    if manifest is None:
        return Tower(config, info, image_bytes(config, info, outputs), 0, None)
    each = plan_bytes(config, manifest, outputs, manifest.splits)
    total, most = sum(each.values()), trial_bytes(config, manifest, outputs)
    crops = num_crops(config, manifest, manifest.splits)
    root = spec.feature_root
    if not config.features.store:
        return Tower(config, info, 0, 0, 0)
    if not look or not storage.exists(root) or not find_tower(config.encoder).has_weights:
        return Tower(config, info, total, total, crops, most)
    images, missing = stored_images(config, manifest, storage.absolute(root), outputs, manifest.splits)
    return Tower(config, info, total, missing, images, most)


def _features_seconds(
    towers: Sequence[Tower], calibration: Calibration, cluster: Cluster | None, num_passes: int
) -> float | None:
    """The passes over all images, one tower after another: on GPUs beside the CPUs that read images, else on CPUs."""
    cpus = _cpus() if cluster is None else cluster.num_cpus
    gpus = torch.cuda.device_count() if cluster is None else cluster.most_gpus
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


# -------------------------------------------------------------------------------------------------- what is shown


def describe_plan(plan: Plan) -> str:
    """Trials, every choice, what is read and written, times and memory as measured, GPU-hours and money."""
    spec, space = plan.spec, plan.space
    return "\n".join(
        [
            *_budget(spec, space),
            *_choices(spec, space),
            *_reading(plan),
            *_measured(plan),
            *_takes(plan),
        ]
    )


def _budget(spec: SweepSpec, space: SearchSpace) -> list[str]:
    size = space.size(spec.base)
    scheduler = spec.trial_scheduler
    stopping = (
        f"ASHA for each method (grace {scheduler.grace_fraction:.0%} of a trial, "
        f"one in {scheduler.reduction_factor} goes on)"
        if isinstance(scheduler, AshaConfig)
        else "none, every trial runs to its end"
    )
    driver = "ray_train" if uses_ray_train(spec) else "in_process"
    num_baselines = len(baselines(spec, space))
    if isinstance(space, ListedSpace):
        trials = [f"  trials      {len(space.configurations)} listed configurations, after {num_baselines} baselines"]
        trials += [f"  not run     {sentence}" for sentence in not_trained(spec, space)]
        searcher = []
    else:
        of = "a continuous space" if size is None else f"{size:,} configurations"
        pinned = f"after {num_baselines} baselines; {len(spec.first_trials)} pinned first"
        trials = [f"  trials      {spec.num_trials} of {of}, {pinned}"]
        arms = f", stratified by {', '.join(spec.stratify)}" if spec.stratify else ""
        searcher = [f"  searcher    {spec.searcher.name}, seed {spec.searcher.seed}{arms}"]
    what = "every configuration" if spec.study else "winner and baselines"
    fresh = "; winner and each method's best on fresh crops, too" if spec.fresh_crops else ""
    return [
        f"sweep {spec.name}",
        *trials,
        f"  objective   {spec.best_objective}, the running maximum over epochs",
        *_other_objectives(spec),
        *searcher,
        *_arms(spec, space),
        f"  stopping    {stopping}",
        f"  driver      {driver}; a trial has {count_of(spec.num_workers, 'worker')} of "
        f"{count_of(spec.cpus_per_worker, 'CPU')} and {count_of(spec.gpus_per_worker, 'GPU')}",
        *_confirm(spec),
        f"  refit       {what}, seeds {', '.join(map(str, spec.refit_seeds))}, then the test split once{fresh}",
    ]


def _confirm(spec: SweepSpec) -> list[str]:
    if not spec.confirm_trials:
        return []
    seeds = ", ".join(map(str, spec.more_seeds))
    return [f"  seeds       the best {spec.confirm_trials} again with {seeds}; the best mean is the winner"]


def _other_objectives(spec: SweepSpec) -> list[str]:
    lines = []
    if spec.other_objectives:
        asha = "; ASHA sees the first objective alone" if isinstance(spec.trial_scheduler, AshaConfig) else ""
        others = ", ".join(spec.other_objectives)
        lines.append(f"  others      {others}: the search looks for what none beats in all{asha}")
    for metric, limit in spec.constraints.items():
        lines.append(f"  constraint  {metric} {'at most' if metric == SECONDS else 'at least'} {limit:g}")
    lines += [f"  warm start  {folder}" for folder in spec.warm_start]
    return lines


def _arms(spec: SweepSpec, space: SearchSpace) -> list[str]:
    """How evenly the trials fall on the arms of `stratify`."""
    if not spec.stratify:
        return []
    num_arms = len(space.choices_over(spec.stratify, spec.base))
    least, more = divmod(spec.num_trials, num_arms)
    text = f"  arms        {num_arms} of {' x '.join(spec.stratify)}"
    if not more:
        return [f"{text}, {least} trials each"]
    below, above = least * num_arms, (least + 1) * num_arms
    even = f"num_trials {above}" if not below else f"num_trials {below} or {above}"
    return [
        f"{text}: num_trials {spec.num_trials} isn't a multiple, so {more} have {count_of(least + 1, 'trial')} and "
        f"{num_arms - more} have {least}; {even} gives each the same"
    ]


def _choices(spec: SweepSpec, space: SearchSpace) -> list[str]:
    if isinstance(space, ListedSpace):
        return [
            "trained:",
            *(f"  {name}: {_words(draw)}" for name, draw in space.configurations.items()),
            *_tables(spec),
        ]
    width = max((len(parameter.key) for parameter in space.parameters), default=0)
    return ["searched:", *(f"  {parameter.key:<{width}}  {parameter.describe()}" for parameter in space.parameters)]


def _words(draw: Draw) -> str:
    return ", ".join(f"{key} {value}" for key, value in draw.items())


def _tables(spec: SweepSpec) -> list[str]:
    return ["tables:", *(f"  {one.title}: {'; '.join(row.label for row in one.rows)}" for one in spec.study)]


def _reading(plan: Plan) -> list[str]:
    spec, manifest = plan.spec, plan.manifest
    lines = ["would read:"]
    if manifest is None:
        lines.append(f"  manifest    {plan.manifest_problem}")
    else:
        rows = ", ".join(f"{len(manifest.rows_of(split)):,} {split}" for split in manifest.splits)
        source = spec.base["data"]["manifest"]
        lines.append(f"  manifest    {source}: {len(manifest.class_names):,} classes, {rows} images")
    lines += [f"  tower       {_tower_line(plan, tower)}" for tower in plan.towers]
    lines.append(f"would write:  {storage.join(spec.storage, spec.name)}-... and {spec.feature_root}")
    if manifest is not None:
        lines.append(f"  features    {_disk(plan)}")
        lines.append(f"  logits      {_logits(plan)}")
    if plan.copy_bytes:
        lines.append(f"  copies      {_copies(plan)}")
    return lines


def _tower_line(plan: Plan, tower: Tower) -> str:
    info, outputs = tower.info, ", ".join(sorted(needed_outputs(plan.spec, plan.space)))
    text = (
        f"{tower.config.encoder.name} at {info.image_size} px: {info.num_tokens} tokens of {info.token_width}, "
        f"pooled {info.pooled_width}"
    )
    if plan.manifest is None:
        return f"{text}; {tower.num_bytes / 1e3:,.0f} kB an image and view ({outputs})"
    features = tower.config.features
    more = "" if features.tail_views is None else f", {features.tail_views} of few-shot classes"
    views = count_of(features.num_views, "view")
    return f"{text}; features {size_text(tower.num_bytes)} ({outputs}, {views}{more})"


def _disk(plan: Plan) -> str:
    if not plan.missing_bytes:
        return "all there already"
    text = f"{size_text(plan.missing_bytes)} to write"
    if plan.free_bytes is None:
        return text
    if plan.fits_features:
        return f"{text}, {size_text(plan.free_bytes)} free"
    reads_tokens = "tokens" in needed_outputs(plan.spec, plan.space)
    knobs = "".join(f", {knob}" for knob in token_knobs(plan.towers[0].config)) if reads_tokens else ""
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


def _copies(plan: Plan) -> str:
    copies = plan.spec.feature_copies
    limit = f"at most {size_text(copies.limit_bytes())} on this one"
    in_place = storage.is_local(plan.spec.feature_root)
    if not plan.fits_copies:
        what = "so that trials read the features in place" if in_place else "too little for a trial"
        limit = f"and ONLY {size_text(copies.limit_bytes())} on this one, {what}"
    elif not plan.fits_all_copies:
        what = "read them in place" if in_place else "wait for each other's end"
        limit += (
            f", TOO LITTLE for trials of several towers at once, which {what}; set feature_copies.max_gigabytes "
            "higher, feature_copies.folder to a larger disk, or search one tower at a time"
        )
    return f"each machine keeps what its trials read, of {size_text(plan.copy_bytes)}, in {copies.root}: {limit}"


def _measured(plan: Plan) -> list[str]:
    if plan.calibration is None:
        why = "" if plan.manifest is not None else " without a manifest"
        return [f"times were not measured{why}"]
    calibration, rows = plan.calibration, plan.rows
    assert rows is not None, "a calibration has read the manifest"
    lines = []
    for config, speed in zip(plan.shapes, calibration.trials, strict=True):
        words = [*_shape_words(config), "" if config.train is None else str(config.train.batch_size)]
        if isinstance(speed, str):
            lines.append([*words, "-", "-", speed])
            continue
        epoch = speed.epoch_seconds(rows.train, rows.val, plan.spec.num_workers)
        memory = size_text(speed.host_bytes)
        memory += f" and {size_text(speed.device_bytes)} of its GPU" if speed.device_bytes else ""
        rate = f"{1 / speed.train_seconds:,.0f}" if speed.train_seconds else "-"
        lines.append([*words, _short(epoch), rate, memory])
    num_classes = len(plan.manifest.class_names) if plan.manifest else 0
    header = ["method", "tower", "batch", "an epoch", "images/s", f"memory of a worker with {num_classes:,} classes"]
    title = f"measured on {calibration.machine.describe()}, each alone, in {duration(calibration.seconds)}:"
    return [title, *(f"  {line}" for line in table(header, lines).splitlines()), *_packs(plan)]


def _packs(plan: Plan) -> list[str]:
    """What trials that train together take, a line for each kind."""
    calibration, rows, together, packs = plan.calibration, plan.rows, plan.together, plan.packing
    if calibration is None or rows is None or together is None or packs is None:
        return []
    found = []
    for config, speed in zip(plan.shapes, calibration.trials, strict=True):
        number = together.number(config)
        if isinstance(speed, TrialSpeed) and number > 1:
            epoch = speed.epoch_seconds(rows.train, rows.val, plan.spec.num_workers, number)
            size = packs.size(config)
            of_others = (size - 1) * packs.bytes_of(config)
            if speed.device_bytes:
                memory = f"{size_text(speed.host_bytes)} and {size_text(speed.device_bytes + of_others)} of its GPU"
            else:
                memory = size_text(speed.host_bytes + of_others)
            found.append(
                f"  {' '.join(_shape_words(config))}: up to {size} train together, {number:.3g} on average; "
                f"an epoch is then {_short(epoch)} each, and a worker takes up to {memory}"
            )
    return found


def _shape_words(config: TrialConfig) -> list[str]:
    what = config.method.replace("_", " ")
    if config.decoder is not None:
        what += f" depth {config.decoder.depth}"
    return [what, config.encoder.name]


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _takes(plan: Plan) -> list[str]:
    spec, found = plan.spec, plan.estimate
    what = "would run" if found is None else "would take,"
    lines = [f"{what} on {plan.machine}, {at_a_time(plan.concurrent, plan.pack_size)}:"]
    if plan.misfit:
        lines.append(f"  NOT HERE: {plan.misfit}")
    if found is None:
        return lines if plan.misfit else [lines[0].removesuffix(":")]
    unknown = "not known: not every method or tower could be measured"
    passes = "nothing to compute" if found.features == 0 else None
    passes = passes or (unknown if found.features is None else duration(found.features))
    lines.append(f"  features    {passes}")
    asha = " (the less the more ASHA stops)" if isinstance(spec.trial_scheduler, AshaConfig) else ""
    for name, value, note in (
        ("baselines", found.baselines, ""),
        ("trials", found.trials, asha),
        ("refits", found.refits, ""),
    ):
        lines.append(f"  {name:<10}  {unknown if value is None else between(value.low, value.high) + note}")
    total, hours = found.total, plan.gpu_hours
    if total is not None and hours is not None:
        gpus = f"; {hours.low:,.2f} to {hours.high:,.2f} GPU-hours" if plan.num_gpus else "; no GPU"
        lines.append(f"  in all      {between(total.low, total.high)}{gpus}")
    if plan.cost is not None and not plan.cost.high:
        mend = "set price_per_machine_hour in its place"
        lines.append(f"  cost        nothing: price_per_gpu_hour is set, and no GPU is used; {mend}")
    elif plan.cost is not None:
        lines.append(f"  cost        {plan.cost.low:,.2f} to {plan.cost.high:,.2f} {_price_words(plan)}")
    return lines + [f"  {line}" for line in _limits(plan)]


def _price_words(plan: Plan) -> str:
    per_machine, machines = plan.spec.price_per_machine_hour, plan.num_machines
    if per_machine is not None:
        return f"at {per_machine:g} an hour, {machines} machine{'s' if machines > 1 else ''} paid for"
    return f"at {plan.spec.price_per_gpu_hour:g} per GPU-hour, all {plan.num_gpus:g} GPUs paid for"


def _limits(plan: Plan) -> list[str]:
    """Which of the limits would end the sweep before its trials are through."""
    spec, total = plan.spec, None if plan.estimate is None else plan.estimate.total
    found = []
    if spec.max_trials is not None and spec.max_trials < spec.num_trials:
        found.append(f"max_trials  {spec.max_trials} of {spec.num_trials} trials")
    if total is not None and spec.max_hours is not None:
        found.append(f"max_hours   {spec.max_hours:g}: {_against(total.times(1 / 3600), spec.max_hours)}")
    if plan.cost is not None and spec.max_cost is not None:
        found.append(f"max_cost    {spec.max_cost:g}: {_against(plan.cost, spec.max_cost)}")
    return found


def _against(needed: Range, limit: float) -> str:
    if needed.high <= limit:
        return "enough"
    return "may end the search early" if needed.low <= limit else "will end the search early"


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Plain data for JSON; seconds, bytes, [at least, at most]."""
    found, spec = plan.estimate, plan.spec
    calibration = plan.calibration

    def pair(value: Range | None) -> list[float] | None:
        return None if value is None else [value.low, value.high]

    return {
        "name": spec.name,
        "num_trials": spec.num_trials,
        "num_configurations": plan.space.size(spec.base),
        "mean_epochs": plan.mean_epochs,
        "pack_size": None if plan.together is None else plan.together.most,
        "concurrent_trials": plan.concurrent,
        "misfit": plan.misfit or None,
        "manifest": spec.base["data"]["manifest"],
        "manifest_problem": plan.manifest_problem or None,
        "num_classes": None if plan.manifest is None else len(plan.manifest.class_names),
        "num_images": None if plan.rows is None else {"train": plan.rows.train, "val": plan.rows.val},
        "towers": [
            {"name": one.config.encoder.name, "feature_bytes": one.num_bytes, "missing_bytes": one.missing_bytes}
            for one in plan.towers
        ],
        "free_bytes": plan.free_bytes,
        "logit_bytes": plan.logit_bytes,
        "fits_disk": plan.fits_disk,
        "feature_root": spec.feature_root,
        "copies": {
            "folder": str(spec.feature_copies.root),
            "bytes": plan.copy_bytes,
            "limit_bytes": spec.feature_copies.limit_bytes(),
            "fits": plan.fits_copies,
            "fits_all_towers": plan.fits_all_copies,
        }
        if plan.copy_bytes
        else None,
        "measured_on": None if calibration is None else calibration.machine.describe(),
        "measured": [
            {"method": config.method, "encoder": config.encoder.name, **_speed_dict(plan, config, speed)}
            for config, speed in zip(plan.shapes, calibration.trials if calibration else (), strict=True)
        ],
        "seconds": None
        if found is None
        else {
            "features": found.features,
            "baselines": pair(found.baselines),
            "trials": pair(found.trials),
            "refits": pair(found.refits),
            "total": pair(found.total),
        },
        "gpu_hours": pair(plan.gpu_hours),
        "cost": pair(plan.cost),
    }


def _speed_dict(plan: Plan, config: TrialConfig, speed: TrialSpeed | str) -> dict[str, Any]:
    if isinstance(speed, str):
        return {"problem": speed}
    rows = plan.rows
    assert rows is not None, "a calibration has read the manifest"
    return {
        "depth": None if config.decoder is None else config.decoder.depth,
        "batch_size": None if config.train is None else needed(config.train).batch_size,
        "epoch_seconds": speed.epoch_seconds(rows.train, rows.val, plan.spec.num_workers),
        "epoch_seconds_in_pack": None
        if speed.more_seconds is None or plan.together is None
        else speed.epoch_seconds(rows.train, rows.val, plan.spec.num_workers, plan.together.size(config)),
        "host_bytes": speed.host_bytes,
        "device_bytes": speed.device_bytes,
    }
