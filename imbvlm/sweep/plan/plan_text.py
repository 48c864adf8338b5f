"""A plan as text and as JSON, and the obstacles that it shows."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import between, duration, pluralize, size_text
from imbvlm.base.text_tables import UNLIMITED, labeled, table
from imbvlm.config.encoder_entries import find_entry, score_notes
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.split_power import split_powers
from imbvlm.features.store_sizes import token_size_options
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.sweep.plan.cost_estimate import Interval, SplitSizes
from imbvlm.sweep.plan.feasibility import (
    at_a_time,
    driver_of,
    max_test_logit_bytes,
    needed_outputs,
    text_notes,
)
from imbvlm.sweep.plan.speed_benchmark import TrialSpeed
from imbvlm.sweep.plan.sweep_plan import Plan, PlannedEncoder
from imbvlm.sweep.spec.baselines import baselines
from imbvlm.sweep.spec.equivalence import untrained_configurations
from imbvlm.sweep.spec.objectives import SECONDS
from imbvlm.sweep.spec.search_space import ListedSpace, SearchSpace
from imbvlm.sweep.spec.spec_checks import sampler_notes
from imbvlm.sweep.spec.sweep_spec import AshaConfig, ResolvedSweep, SweepSpec

DRY_RUN = "dry run: nothing was started or written"
# Labels and texts; a row without a text is left out.
Rows = list[tuple[str, str]]


def describe_plan(plan: Plan, width: int = UNLIMITED) -> str:
    """Describe trials, space, files, measured times and memory, GPU-hours and money, in `width` columns."""
    spec, space = plan.spec, plan.sweep.space
    is_list = isinstance(space, ListedSpace)
    sections = [
        (f"sweep {spec.name}", _trials(plan.sweep)),
        ("trained:" if is_list else "searched:", _space(space)),
        *([("tables:", _tables(spec))] if is_list else []),
        ("would read:", _inputs(plan)),
        (f"would write:  {storage.join(spec.storage, spec.name)}-... and {spec.feature_root}", _outputs(plan)),
    ]
    lines = [text for title, rows in sections for text in (_wrapped(title, width), labeled(rows, width))]
    lines += [_measured(plan, width), labeled(_packs(plan), width)]
    lines += [_wrapped(_times_title(plan), width), labeled(_times(plan), width)]
    return "\n".join(filter(None, lines))


def _wrapped(title: str, width: int) -> str:
    return fill(title, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def obstacles(plan: Plan, *, is_here: bool) -> list[str]:
    """Return all reasons why the sweep would be rejected if it started now; for another machine only its size counts.

    If weights are missing, their server is asked whether it has them.
    """
    return [*(_missing_files(plan) if is_here else ()), *([plan.infeasible_reason] if plan.infeasible_reason else [])]


def _missing_files(plan: Plan) -> list[str]:
    """Return the files and the disk space that the sweep needs and this machine lacks."""
    problems = [] if plan.manifest is not None else [f"manifest {plan.manifest_problem}"]
    for encoder in plan.encoders:
        try:
            problem = resolve_encoder(encoder.config.encoder).weights_state().problem
        except ImbvlmError as error:
            problem = str(error)
        problems += [] if problem is None else [f"encoder {problem}"]
    problems += [] if plan.fits_features is not False else [f"features: {_feature_disk(plan)}"]
    return problems + ([] if plan.fits_logits else [f"logits: {_logit_disk(plan)}"])


def _trials(sweep: ResolvedSweep) -> Rows:
    spec, scheduler = sweep.spec, sweep.spec.trial_scheduler
    stopping, asha = "none, every trial runs to its end", ""
    if isinstance(scheduler, AshaConfig):
        stopping = (
            f"ASHA for each method (grace {scheduler.grace_fraction:.0%} of a trial, "
            f"one in {scheduler.reduction_factor} goes on)"
        )
        asha = "; ASHA sees the first objective alone"
    driver = driver_of(sweep)
    is_mixed = any(driver_of(sweep, baseline.config) != driver for baseline in baselines(sweep).values())
    others_driver = "; baselines and refits on stored features in process" if is_mixed else ""
    blend = "" if spec.blends is None else f" and up to {spec.blends.max_members} members of a blend"
    refitted = "every configuration" if spec.study else f"winner, baselines{blend}"
    fresh = "; winner and each method's best on fresh crops, too" if spec.fresh_crops else ""
    others = f"{', '.join(spec.other_objectives)}: the search looks for what none beats in all{asha}"
    seeds = (
        f"the best {spec.confirm_trials} again with {', '.join(map(str, spec.more_seeds))}; the best mean is the winner"
    )
    return [
        ("trials", _number(sweep)),
        *(("not run", sentence) for sentence in untrained_configurations(sweep)),
        ("objective", f"{spec.best_objective}, the running maximum over epochs"),
        ("others", others if spec.other_objectives else ""),
        *(
            ("constraint", f"{metric} {'at most' if metric == SECONDS else 'at least'} {limit:g}")
            for metric, limit in spec.constraints.items()
        ),
        *(("warm start", folder) for folder in spec.warm_start),
        ("searcher", "" if isinstance(sweep.space, ListedSpace) else _searcher(sweep)),
        *(("at random", note) for note in sampler_notes(sweep)),
        ("strata", _strata(sweep) if spec.stratify else ""),
        ("stopping", stopping),
        (
            "driver",
            f"{driver}; a trial has {pluralize(spec.num_workers, 'worker')} of "
            f"{pluralize(spec.cpus_per_worker, 'CPU')} and {pluralize(spec.gpus_per_worker, 'GPU')}{others_driver}",
        ),
        ("seeds", seeds if spec.confirm_trials else ""),
        ("refit", f"{refitted}, seeds {', '.join(map(str, spec.refit_seeds))}, then the test split once{fresh}"),
    ]


def _number(sweep: ResolvedSweep) -> str:
    num_baselines, space = len(baselines(sweep)), sweep.space
    if isinstance(space, ListedSpace):
        return f"{len(space.configurations)} listed configurations, after {num_baselines} baselines"
    size = space.size(sweep.spec.base)
    total = "a continuous space" if size is None else f"{size:,} configurations"
    num_pinned = len(sweep.spec.first_trials)
    return f"{sweep.num_trials} of {total}, after {num_baselines} baselines; {num_pinned} pinned first"


def _searcher(sweep: ResolvedSweep) -> str:
    spec, number = sweep.spec, sweep.spec.searcher.num_random_trials
    which = "all" if number >= sweep.num_trials else f"the first {number} of the"
    at_random = f", {which} trials at random" if number else ""
    strata = f", stratified by {', '.join(spec.stratify)}" if spec.stratify else ""
    return f"{spec.searcher.name}, seed {spec.searcher.seed}{at_random}{strata}"


def _strata(sweep: ResolvedSweep) -> str:
    """Return how evenly the trials fall on the strata of `stratify`."""
    spec = sweep.spec
    num_strata = len(sweep.space.choices_over(spec.stratify, spec.base))
    each, num_larger = divmod(sweep.num_trials, num_strata)
    text = f"{num_strata} of {' x '.join(spec.stratify)}"
    if not num_larger:
        return f"{text}, {each} trials each"
    below, above = each * num_strata, (each + 1) * num_strata
    even = f"num_trials {above}" if not below else f"num_trials {below} or {above}"
    return (
        f"{text}: num_trials {sweep.num_trials} isn't a multiple, so {num_larger} have "
        f"{pluralize(each + 1, 'trial')} and {num_strata - num_larger} have {each}; {even} gives each the same"
    )


def _space(space: SearchSpace) -> Rows:
    if isinstance(space, ListedSpace):
        items = space.configurations.items()
        return [(name, ", ".join(f"{key} {value}" for key, value in params.items())) for name, params in items]
    return [(parameter.key, parameter.describe()) for parameter in space.parameters]


def _tables(spec: SweepSpec) -> Rows:
    return [(shown.title, "; ".join(row.label for row in shown.rows)) for shown in spec.study]


def _inputs(plan: Plan) -> Rows:
    manifest, text = plan.manifest, plan.manifest_problem
    if manifest is not None:
        rows = ", ".join(f"{len(manifest.rows_of(split)):,} {split}" for split in manifest.splits)
        text = f"{plan.spec.base['data']['manifest']}: {len(manifest.class_names):,} classes, {rows} images"
    encoders = [("encoder", _encoder_line(plan, encoder)) for encoder in plan.encoders]
    names = [encoder.config.encoder.name for encoder in plan.encoders]
    notes = [] if manifest is None else [*score_notes(names, manifest.name), *text_notes(plan.sweep, manifest)]
    if plan.rows is not None and plan.rows.gap_folds > 1:
        again = f"twice more over {plan.rows.gap_folds} folds"
        notes.append(f"groups: the delivered heads train {again} at the end, for the gap to unseen groups")
    described = [("manifest", text), ("validation", _validation(plan)), *encoders]
    return [*described, *(("note", note) for note in notes)]


def _validation(plan: Plan) -> str:
    """Describe the folds, and what they cost; empty where official or held-out images score trials."""
    rows = plan.rows
    if plan.manifest is not None and rows is not None and rows.confirm_folds > 1:
        return _confirmation(plan, rows, plan.manifest)
    if rows is None or rows.num_folds == 1:
        return ""
    return (
        f"{rows.num_folds} folds of the training images score trials on stored features, on {rows.folds_val:,} images "
        f"in place of {rows.val:,} held-out ones, and take {rows.num_folds} times as long; num_folds: 1 turns them off"
    )


def _confirmation(plan: Plan, rows: SplitSizes, manifest: Manifest) -> str:
    """Describe what validation can't decide, which folds decide then, and what folds would cost from the start."""
    power, estimate = split_powers(manifest, plan.spec.split_seed)["val"], plan.estimate
    cost = f"{rows.confirm_folds} times as long"
    if estimate is not None and estimate.over_folds is not None:
        cost = between(estimate.over_folds.low, estimate.over_folds.high)
    return (
        f"{rows.val:,} images tell {power.intervals()}, too little to select by: the best {plan.spec.num_confirmed} "
        f"trials and the baselines are scored again over {rows.confirm_folds} folds of the training images, on "
        f"{rows.confirm_val:,} of these and on validation; folds from the start would make baselines and trials take "
        f"{cost}; confirm_folds: null turns them off"
    )


def _outputs(plan: Plan) -> Rows:
    is_known = plan.manifest is not None
    return [
        ("features", _feature_disk(plan) if is_known else ""),
        ("logits", _logit_disk(plan) if is_known else ""),
        ("logits", "" if plan.manifest is None else _test_logit_disk(plan.sweep, plan.manifest)),
        ("copies", _copies(plan) if plan.copy_bytes else ""),
    ]


def _encoder_line(plan: Plan, encoder: PlannedEncoder) -> str:
    info = encoder.info
    outputs = ", ".join(sorted(needed_outputs(plan.sweep) & info.shapes.keys()))
    name, entry = encoder.config.encoder.name, find_entry(encoder.config.encoder.name)
    own_size = None if entry is None else entry.image_size
    own = f" (its own: {own_size} px; `imbvlm doctor --encoder {name}` compares sizes)"
    text = (
        f"{name} at {info.image_size} px{'' if own_size in (None, info.image_size) else own}: "
        f"{info.num_tokens} tokens of {info.token_width}, pooled {info.pooled_width}"
    )
    text += "" if entry is None or not entry.license else f", license {entry.license}"
    if plan.manifest is None:
        return f"{text}; {encoder.num_bytes / 1e3:,.0f} kB an image and view ({outputs})"
    views = pluralize(encoder.config.features.num_views, "view")
    text = f"{text}; features {size_text(encoder.num_bytes)} ({outputs}, {views})"
    if not encoder.known_images or not encoder.missing_images:
        return text
    counted = " (views counted)" if encoder.config.features.num_views > 1 else ""
    return f"{text}, {encoder.known_images:,} images known, {encoder.missing_images:,} new{counted}"


def _feature_disk(plan: Plan) -> str:
    if not plan.missing_bytes:
        return "all there already"
    text = f"{size_text(plan.missing_bytes)} to write"
    if plan.free_bytes is None:
        return text
    if plan.fits_features:
        return f"{text}, {size_text(plan.free_bytes)} free"
    reads_tokens = "tokens" in needed_outputs(plan.sweep)
    options = "".join(f", {name}" for name in token_size_options(plan.encoders[0].config)) if reads_tokens else ""
    return (
        f"{text}, and ONLY {size_text(plan.free_bytes)} free: reduce features.num_views or features.precision"
        f"{options}, or choose another --storage"
    )


def _test_logit_disk(sweep: ResolvedSweep, manifest: Manifest) -> str:
    num_bytes = max_test_logit_bytes(sweep, manifest)
    return f"of the test split by refits, up to {size_text(num_bytes)}" if num_bytes else ""


def _logit_disk(plan: Plan) -> str:
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
    cache = plan.cache
    limit = f"at most {size_text(cache.limit_bytes())} on this one"
    in_place = storage.is_local(plan.spec.feature_root)
    if not plan.fits_copies:
        effect = "so that trials read the features in place" if in_place else "too little for a trial"
        limit = f"and ONLY {size_text(cache.limit_bytes())} on this one, {effect}"
    elif not plan.fits_all_copies:
        effect = "read them in place" if in_place else "wait for each other's end"
        limit += (
            f", TOO LITTLE for trials of several encoders at once, which {effect}; set feature_copies.max_gigabytes "
            "higher, feature_copies.folder to a larger disk, or search one encoder at a time"
        )
    return f"each machine keeps what its trials read, of {size_text(plan.copy_bytes)}, in {cache.root}: {limit}"


def _measured(plan: Plan, width: int) -> str:
    if plan.benchmark is None:
        return f"times were not measured{'' if plan.manifest is not None else ' without a manifest'}"
    benchmark = plan.benchmark
    lines = []
    for config, speed in zip(plan.measured, benchmark.trials, strict=True):
        epoch, rate, memory = "-", "-", str(speed)
        if isinstance(speed, TrialSpeed):
            epoch = _short(_epoch_seconds(plan, config, speed))
            rate = f"{1 / speed.seconds_per_train_image:,.0f}" if speed.seconds_per_train_image else "-"
            memory = _memory(speed, 0)
        lines.append([*_shape(config), str(config.train.batch_size) if config.train else "", epoch, rate, memory])
    num_classes = len(plan.manifest.class_names) if plan.manifest else 0
    header = ["method", "encoder", "batch", "an epoch", "images/s", "memory of a worker"]
    title = (
        f"measured with {num_classes:,} classes on {benchmark.machine.describe()}, each alone, in "
        f"{duration(benchmark.seconds)}:"
    )
    return f"{_wrapped(title, width)}\n{table(header, lines, width)}"


def _packs(plan: Plan) -> Rows:
    """Return the time and memory of trials that train together, a row for each kind."""
    benchmark, statistics, packs = plan.benchmark, plan.pack_statistics, plan.packing
    if benchmark is None or statistics is None or packs is None:
        return []
    lines = []
    for config, speed in zip(plan.measured, benchmark.trials, strict=True):
        number = statistics.mean_size(config)
        if isinstance(speed, TrialSpeed) and number > 1:
            epoch = _epoch_seconds(plan, config, speed, number)
            size = packs.size(config)
            text = (
                f"up to {size} train together, {number:.3g} on average; an epoch is then {_short(epoch)} each, and a "
                f"worker takes up to {_memory(speed, (size - 1) * packs.bytes_of(config))}"
            )
            lines.append((" ".join(_shape(config)), text))
    return lines


def _epoch_seconds(plan: Plan, config: TrialConfig, speed: TrialSpeed, pack_size: float = 1.0) -> float:
    assert plan.rows is not None, "a benchmark has read the manifest"
    sizes = plan.rows.of_trial(config)
    return speed.epoch_seconds(sizes.num_runs * sizes.train, sizes.val, plan.spec.num_workers, pack_size)


def _memory(speed: TrialSpeed, more_bytes: int) -> str:
    """Describe a worker's memory; further trials of a pack take `more_bytes` of the GPU's, where there is one."""
    if speed.device_bytes:
        return f"{size_text(speed.host_bytes)} and {size_text(speed.device_bytes + more_bytes)} of its GPU"
    return size_text(speed.host_bytes + more_bytes)


def _shape(config: TrialConfig) -> tuple[str, str]:
    decoder = config.section(DecoderConfig)
    depth = "" if decoder is None else f" depth {decoder.depth}"
    size = "" if config.encoder.image_size is None else f" {config.encoder.image_size} px"
    return f"{config.method.replace('_', ' ')}{depth}", f"{config.encoder.name}{size}"


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _times_title(plan: Plan) -> str:
    verb = "would run" if plan.estimate is None else "would take,"
    colon = ":" if plan.estimate or plan.infeasible_reason else ""
    return f"{verb} on {plan.machine}, {at_a_time(plan.concurrent, plan.pack_size)}{colon}"


def _times(plan: Plan) -> Rows:
    spec, estimate, hours = plan.spec, plan.estimate, plan.gpu_hours
    rows = [("NOT HERE", plan.infeasible_reason)]
    if estimate is None:
        return rows
    unknown = "not known: not every method or encoder could be measured"
    passes = unknown if estimate.features is None else duration(estimate.features)
    rows.append(("features", "nothing to compute" if estimate.features == 0 else passes))
    asha = " (less, the more ASHA stops)" if isinstance(spec.trial_scheduler, AshaConfig) else ""
    rows += [
        (name, unknown if value is None else between(value.low, value.high) + note)
        for name, value, note in (
            ("baselines", estimate.baselines, ""),
            ("trials", estimate.trials, asha),
            ("refits", estimate.refits, ""),
        )
    ]
    if estimate.total is not None and hours is not None:
        gpus = f"{hours.low:,.2f} to {hours.high:,.2f} GPU-hours" if plan.num_gpus else "no GPU"
        rows.append(("total", f"{between(estimate.total.low, estimate.total.high)}; {gpus}"))
    return [*rows, ("cost", _cost(plan)), *_limits(plan)]


def _cost(plan: Plan) -> str:
    """Return the cost at the prices of the spec; empty without a price."""
    spec, cost = plan.spec, plan.cost
    if cost is None:
        return ""
    if not cost.high:
        fix = "set price_per_machine_hour in its place"
        return f"nothing: price_per_gpu_hour is set, and no GPU is used; {fix}"
    price = (
        f"at {spec.price_per_gpu_hour:g} per GPU-hour, all {plan.num_gpus:g} GPUs paid for"
        if spec.price_per_machine_hour is None
        else f"at {spec.price_per_machine_hour:g} an hour, {pluralize(plan.num_machines, 'machine')} paid for"
    )
    return f"{cost.low:,.2f} to {cost.high:,.2f} {price}"


def _limits(plan: Plan) -> Rows:
    """Return the limits that may end the sweep before its last trial."""
    spec, total = plan.spec, None if plan.estimate is None else plan.estimate.total
    hours, num_trials = None if total is None else total.times(1 / 3600), plan.sweep.num_trials
    trials = f"{spec.max_trials} of {num_trials} trials" if (spec.max_trials or num_trials) < num_trials else ""
    return [
        ("max_trials", trials),
        ("max_hours", _compare(hours, spec.max_hours)),
        ("max_cost", _compare(plan.cost, spec.max_cost)),
    ]


def _compare(needed: Interval | None, limit: float | None) -> str:
    if needed is None or limit is None:
        return ""
    if needed.high <= limit:
        return f"{limit:g}: enough"
    return f"{limit:g}: {'may' if needed.low <= limit else 'will'} end the search early"


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Return plain data for JSON: seconds, bytes, and intervals as [low, high]."""
    spec, estimate, benchmark = plan.spec, plan.estimate, plan.benchmark

    def pair(value: Interval | None) -> list[float] | None:
        return None if value is None else [value.low, value.high]

    return {
        "name": spec.name,
        "num_trials": plan.sweep.num_trials,
        "num_configurations": plan.sweep.space.size(spec.base),
        "mean_epochs": plan.mean_epochs,
        "pack_size": None if plan.pack_statistics is None else plan.pack_statistics.max_size,
        "concurrent_trials": plan.concurrent,
        "misfit": plan.infeasible_reason or None,
        "manifest": spec.base["data"]["manifest"],
        "manifest_problem": plan.manifest_problem or None,
        "num_classes": None if plan.manifest is None else len(plan.manifest.class_names),
        "num_images": None if plan.rows is None else {"train": plan.rows.train, "val": plan.rows.val},
        "towers": [
            {
                "name": encoder.config.encoder.name,
                "feature_bytes": encoder.num_bytes,
                "missing_bytes": encoder.missing_bytes,
            }
            for encoder in plan.encoders
        ],
        "free_bytes": plan.free_bytes,
        "logit_bytes": plan.logit_bytes,
        "fits_disk": plan.fits_disk,
        "feature_root": spec.feature_root,
        "copies": {
            "folder": str(plan.cache.root),
            "bytes": plan.copy_bytes,
            "limit_bytes": plan.cache.limit_bytes(),
            "fits": plan.fits_copies,
            "fits_all_towers": plan.fits_all_copies,
        }
        if plan.copy_bytes
        else None,
        "measured_on": None if benchmark is None else benchmark.machine.describe(),
        "measured": [
            {"method": config.method, "encoder": config.encoder.name, **_speed_dict(plan, config, speed)}
            for config, speed in zip(plan.measured, benchmark.trials if benchmark else (), strict=True)
        ],
        "seconds": None
        if estimate is None
        else {
            "features": estimate.features,
            "baselines": pair(estimate.baselines),
            "trials": pair(estimate.trials),
            "refits": pair(estimate.refits),
            "total": pair(estimate.total),
        },
        "gpu_hours": pair(plan.gpu_hours),
        "cost": pair(plan.cost),
    }


def _speed_dict(plan: Plan, config: TrialConfig, speed: TrialSpeed | str) -> dict[str, Any]:
    if isinstance(speed, str):
        return {"problem": speed}
    decoder = config.section(DecoderConfig)
    return {
        "depth": None if decoder is None else decoder.depth,
        "batch_size": None if config.train is None else config.train.batch_size,
        "epoch_seconds": _epoch_seconds(plan, config, speed),
        "epoch_seconds_in_pack": None
        if speed.extra_member_seconds is None or plan.pack_statistics is None
        else _epoch_seconds(plan, config, speed, plan.pack_statistics.size(config)),
        "host_bytes": speed.host_bytes,
        "device_bytes": speed.device_bytes,
    }
