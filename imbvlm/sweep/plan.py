"""What a sweep would do, shown without starting or writing anything."""

from __future__ import annotations

from collections.abc import Mapping

from imbvlm import storage
from imbvlm.config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.errors import ImbvlmError
from imbvlm.features.extract import plan_bytes
from imbvlm.models.encoder_info import EncoderInfo
from imbvlm.sweep.baselines import baselines, tower_draws, zero_shot_config
from imbvlm.sweep.feasibility import check_models, uses_ray_train
from imbvlm.sweep.run import needed_outputs
from imbvlm.sweep.space import SearchSpace
from imbvlm.sweep.spec import AshaConfig, SweepSpec, check_spec


def describe_sweep(spec: SweepSpec) -> str:
    """Trials, every choice, towers with the bytes of their features, and what would be read; raises ConfigError."""
    space = check_spec(spec)
    towers = check_models(spec, space)
    return "\n".join(
        [
            *_budget(spec, space),
            *_choices(spec, space),
            *_reading(spec, space, towers),
            "dry run: nothing was started or written",
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
    return [
        f"sweep {spec.name}",
        f"  trials      {spec.num_trials} of {'a continuous space' if size is None else f'{size:,} configurations'}, "
        f"after {len(baselines(spec, space))} baselines; {len(spec.first_trials)} pinned first",
        f"  objective   {spec.best_objective}, the running maximum over epochs",
        f"  searcher    {spec.searcher.name}, seed {spec.searcher.seed}"
        + (f", stratified by {', '.join(spec.stratify)}" if spec.stratify else ""),
        *_arms(spec, space),
        f"  stopping    {stopping}",
        f"  driver      {driver}; a trial has {spec.num_workers} worker(s) of {spec.cpus_per_worker:g} CPUs "
        f"and {spec.gpus_per_worker:g} GPUs",
        f"  refit       seeds {', '.join(map(str, spec.refit_seeds))}, then the test split once",
    ]


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
        f"{text}: num_trials {spec.num_trials} isn't a multiple, so {more} have {least + 1} trials and "
        f"{num_arms - more} have {least}; {even} gives each the same"
    ]


def _choices(spec: SweepSpec, space: SearchSpace) -> list[str]:
    width = max((len(parameter.key) for parameter in space.parameters), default=0)
    return ["searched:", *(f"  {parameter.key:<{width}}  {parameter.describe()}" for parameter in space.parameters)]


def _reading(spec: SweepSpec, space: SearchSpace, towers: Mapping[str, EncoderInfo]) -> list[str]:
    source = spec.base["data"]["manifest"]
    lines = ["would read:"]
    manifest: Manifest | None = None
    try:
        manifest = Manifest.read(source)
    except storage.StorageError:
        lines.append(f"  manifest    {source} (NOT THERE: make it with `imbvlm manifest build`, or give --manifest)")
    except ImbvlmError as error:
        lines.append(f"  manifest    {error}")
    if manifest is not None:
        rows = ", ".join(f"{len(manifest.rows_of(split)):,} {split}" for split in manifest.splits)
        lines.append(f"  manifest    {source}: {len(manifest.class_names):,} classes, {rows} images")
    for draw in tower_draws(spec, space):
        lines.append(f"  tower       {_tower(spec, space, zero_shot_config(spec, draw), towers, manifest)}")
    lines.append(
        f"would write:  {storage.join(spec.storage, spec.name)}-... and {storage.join(spec.storage, 'features')}"
    )
    return lines


def _tower(
    spec: SweepSpec,
    space: SearchSpace,
    config: TrialConfig,
    towers: Mapping[str, EncoderInfo],
    manifest: Manifest | None,
) -> str:
    info = towers[config.encoder.model_dump_json()]
    outputs = needed_outputs(spec, space)
    text = (
        f"{config.encoder.name} at {info.image_size} px: {info.num_tokens} tokens of {info.token_width}, "
        f"pooled {info.pooled_width}"
    )
    if manifest is None:
        per_image = sum(_numbers(info.shape(output)) for output in outputs) * (
            2 if config.features.precision == "float16" else 4
        )
        return f"{text}; {per_image / 1e3:,.0f} kB an image and view ({', '.join(sorted(outputs))})"
    total = sum(plan_bytes(config, manifest, outputs, manifest.splits).values())
    return f"{text}; features {total / 1e9:,.2f} GB ({', '.join(sorted(outputs))}, {config.features.num_views} views)"


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
