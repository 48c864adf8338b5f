"""A plan as text and as JSON."""

from __future__ import annotations

from typing import Any

from imbvlm.base import storage
from imbvlm.base.formatting import between, duration, pluralize, size_text, table
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.sweep.plan.cost_estimate import Interval
from imbvlm.sweep.plan.feasibility import at_a_time, needed_outputs, uses_ray_train
from imbvlm.sweep.plan.speed_benchmark import TrialSpeed
from imbvlm.sweep.plan.sweep_plan import Plan, PlannedEncoder, _disk, _logits
from imbvlm.sweep.spec.baselines import baselines
from imbvlm.sweep.spec.equivalence import untrained_configurations
from imbvlm.sweep.spec.objectives import SECONDS
from imbvlm.sweep.spec.search_space import ListedSpace, Params
from imbvlm.sweep.spec.spec_checks import sampler_notes
from imbvlm.sweep.spec.sweep_spec import AshaConfig, ResolvedSweep, SweepSpec

DRY_RUN = "dry run: nothing was started or written"


def describe_plan(plan: Plan) -> str:
    """Trials, every choice, what is read and written, times and memory as measured, GPU-hours and money."""
    return "\n".join(
        [
            *_budget(plan.sweep),
            *_choices(plan.sweep),
            *_reading(plan),
            *_measured(plan),
            *_takes(plan),
        ]
    )


def _budget(sweep: ResolvedSweep) -> list[str]:
    spec, space = sweep.spec, sweep.space
    size = space.size(spec.base)
    scheduler = spec.trial_scheduler
    stopping = (
        f"ASHA for each method (grace {scheduler.grace_fraction:.0%} of a trial, "
        f"one in {scheduler.reduction_factor} goes on)"
        if isinstance(scheduler, AshaConfig)
        else "none, every trial runs to its end"
    )
    driver = "ray_train" if uses_ray_train(sweep) else "in_process"
    num_baselines = len(baselines(sweep))
    if isinstance(space, ListedSpace):
        trials = [f"  trials      {len(space.configurations)} listed configurations, after {num_baselines} baselines"]
        trials += [f"  not run     {sentence}" for sentence in untrained_configurations(sweep)]
        searcher = []
    else:
        of = "a continuous space" if size is None else f"{size:,} configurations"
        pinned = f"after {num_baselines} baselines; {len(spec.first_trials)} pinned first"
        trials = [f"  trials      {spec.num_trials} of {of}, {pinned}"]
        arms = f", stratified by {', '.join(spec.stratify)}" if spec.stratify else ""
        searcher = [f"  searcher    {spec.searcher.name}, seed {spec.searcher.seed}{_random_trials(sweep)}{arms}"]
        searcher += [f"  at random   {note}" for note in sampler_notes(sweep)]
    what = "every configuration" if spec.study else "winner and baselines"
    fresh = "; winner and each method's best on fresh crops, too" if spec.fresh_crops else ""
    return [
        f"sweep {spec.name}",
        *trials,
        f"  objective   {spec.best_objective}, the running maximum over epochs",
        *_other_objectives(spec),
        *searcher,
        *_arms(sweep),
        f"  stopping    {stopping}",
        f"  driver      {driver}; a trial has {pluralize(spec.num_workers, 'worker')} of "
        f"{pluralize(spec.cpus_per_worker, 'CPU')} and {pluralize(spec.gpus_per_worker, 'GPU')}",
        *_confirm(spec),
        f"  refit       {what}, seeds {', '.join(map(str, spec.refit_seeds))}, then the test split once{fresh}",
    ]


def _random_trials(sweep: ResolvedSweep) -> str:
    number = sweep.spec.searcher.num_random_trials
    if not number:
        return ""
    return f", {'all' if number >= sweep.num_trials else f'the first {number} of the'} trials at random"


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


def _arms(sweep: ResolvedSweep) -> list[str]:
    """How evenly the trials fall on the arms of `stratify`."""
    spec, space = sweep.spec, sweep.space
    if not spec.stratify:
        return []
    num_arms = len(space.choices_over(spec.stratify, spec.base))
    least, more = divmod(sweep.num_trials, num_arms)
    text = f"  arms        {num_arms} of {' x '.join(spec.stratify)}"
    if not more:
        return [f"{text}, {least} trials each"]
    below, above = least * num_arms, (least + 1) * num_arms
    even = f"num_trials {above}" if not below else f"num_trials {below} or {above}"
    return [
        f"{text}: num_trials {spec.num_trials} isn't a multiple, so {more} have {pluralize(least + 1, 'trial')} and "
        f"{num_arms - more} have {least}; {even} gives each the same"
    ]


def _choices(sweep: ResolvedSweep) -> list[str]:
    spec, space = sweep.spec, sweep.space
    if isinstance(space, ListedSpace):
        return [
            "trained:",
            *(f"  {name}: {_words(draw)}" for name, draw in space.configurations.items()),
            *_tables(spec),
        ]
    width = max((len(parameter.key) for parameter in space.parameters), default=0)
    return ["searched:", *(f"  {parameter.key:<{width}}  {parameter.describe()}" for parameter in space.parameters)]


def _words(draw: Params) -> str:
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


def _tower_line(plan: Plan, tower: PlannedEncoder) -> str:
    info = tower.info
    outputs = ", ".join(sorted(needed_outputs(plan.sweep) & info.shapes.keys()))
    text = (
        f"{tower.config.encoder.name} at {info.image_size} px: {info.num_tokens} tokens of {info.token_width}, "
        f"pooled {info.pooled_width}"
    )
    if plan.manifest is None:
        return f"{text}; {tower.num_bytes / 1e3:,.0f} kB an image and view ({outputs})"
    features = tower.config.features
    views = pluralize(features.num_views, "view")
    return f"{text}; features {size_text(tower.num_bytes)} ({outputs}, {views})"


def _copies(plan: Plan) -> str:
    cache = plan.cache
    limit = f"at most {size_text(cache.limit_bytes())} on this one"
    in_place = storage.is_local(plan.spec.feature_root)
    if not plan.fits_copies:
        what = "so that trials read the features in place" if in_place else "too little for a trial"
        limit = f"and ONLY {size_text(cache.limit_bytes())} on this one, {what}"
    elif not plan.fits_all_copies:
        what = "read them in place" if in_place else "wait for each other's end"
        limit += (
            f", TOO LITTLE for trials of several towers at once, which {what}; set feature_copies.max_gigabytes "
            "higher, feature_copies.folder to a larger disk, or search one tower at a time"
        )
    return f"each machine keeps what its trials read, of {size_text(plan.copy_bytes)}, in {cache.root}: {limit}"


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
        rate = f"{1 / speed.seconds_per_train_image:,.0f}" if speed.seconds_per_train_image else "-"
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
    decoder = config.section(DecoderConfig)
    if decoder is not None:
        what += f" depth {decoder.depth}"
    return [what, config.encoder.name]


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _takes(plan: Plan) -> list[str]:
    spec, found = plan.spec, plan.estimate
    what = "would run" if found is None else "would take,"
    lines = [f"{what} on {plan.machine}, {at_a_time(plan.concurrent, plan.pack_size)}:"]
    if plan.infeasible_reason:
        lines.append(f"  NOT HERE: {plan.infeasible_reason}")
    if found is None:
        return lines if plan.infeasible_reason else [lines[0].removesuffix(":")]
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
    if spec.max_trials is not None and spec.max_trials < plan.sweep.num_trials:
        found.append(f"max_trials  {spec.max_trials} of {spec.num_trials} trials")
    if total is not None and spec.max_hours is not None:
        found.append(f"max_hours   {spec.max_hours:g}: {_against(total.times(1 / 3600), spec.max_hours)}")
    if plan.cost is not None and spec.max_cost is not None:
        found.append(f"max_cost    {spec.max_cost:g}: {_against(plan.cost, spec.max_cost)}")
    return found


def _against(needed: Interval, limit: float) -> str:
    if needed.high <= limit:
        return "enough"
    return "may end the search early" if needed.low <= limit else "will end the search early"


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Plain data for JSON; seconds, bytes, [at least, at most]."""
    found, spec = plan.estimate, plan.spec
    calibration = plan.calibration

    def pair(value: Interval | None) -> list[float] | None:
        return None if value is None else [value.low, value.high]

    return {
        "name": spec.name,
        "num_trials": spec.num_trials,
        "num_configurations": plan.sweep.space.size(spec.base),
        "mean_epochs": plan.mean_epochs,
        "pack_size": None if plan.together is None else plan.together.most,
        "concurrent_trials": plan.concurrent,
        "misfit": plan.infeasible_reason or None,
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
            "folder": str(plan.cache.root),
            "bytes": plan.copy_bytes,
            "limit_bytes": plan.cache.limit_bytes(),
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
    rows, decoder = plan.rows, config.section(DecoderConfig)
    assert rows is not None, "a calibration has read the manifest"
    return {
        "depth": None if decoder is None else decoder.depth,
        "batch_size": None if config.train is None else require_section(config.train).batch_size,
        "epoch_seconds": speed.epoch_seconds(rows.train, rows.val, plan.spec.num_workers),
        "epoch_seconds_in_pack": None
        if speed.extra_member_seconds is None or plan.together is None
        else speed.epoch_seconds(rows.train, rows.val, plan.spec.num_workers, plan.together.size(config)),
        "host_bytes": speed.host_bytes,
        "device_bytes": speed.device_bytes,
    }
