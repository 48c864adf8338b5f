"""Refuses in seconds what could never run: resources the cluster doesn't have, metrics the data can't give."""

from __future__ import annotations

import math

from imbvlm.class_stats import ClassStats
from imbvlm.config import TrialConfig, needed
from imbvlm.errors import ConfigError, Problem
from imbvlm.models.encoder_info import EncoderInfo
from imbvlm.sweep.spec import SweepSpec

# The process that starts a Ray Train trial's workers waits for most of its life.
DRIVER_CPUS = 0.01


def uses_ray_train(spec: SweepSpec) -> bool:
    """What `driver: auto` means: one worker on stored features runs in process, anything else under Ray Train."""
    stored = spec.base.get("features", {}).get("store", True)
    return spec.driver == "ray_train" or (spec.driver == "auto" and (spec.num_workers > 1 or not stored))


def concurrent_trials(spec: SweepSpec, num_cpus: float, num_gpus: float) -> int:
    """How many trials run at once on a cluster; raises ConfigError where not even one can."""
    problems = []
    need_cpus = spec.num_workers * spec.cpus_per_worker + (DRIVER_CPUS if uses_ray_train(spec) else 0)
    need_gpus = spec.num_workers * spec.gpus_per_worker
    if spec.driver == "in_process" and spec.num_workers > 1:
        problems.append(
            Problem(
                f"driver in_process runs one worker a trial and num_workers is {spec.num_workers}; set driver: ray_train"
            )
        )
    if need_gpus > num_gpus:
        problems.append(
            Problem(
                f"a trial needs {need_gpus:g} GPUs (num_workers {spec.num_workers} x gpus_per_worker {spec.gpus_per_worker:g}) "
                f"and the cluster has {num_gpus:g}; lower num_workers or gpus_per_worker (0 trains on CPUs)"
            )
        )
    if need_cpus > num_cpus:
        problems.append(
            Problem(
                f"a trial needs {need_cpus:g} CPUs (num_workers {spec.num_workers} x cpus_per_worker {spec.cpus_per_worker:g}"
                f"{f' + {DRIVER_CPUS:g} for its driver' if uses_ray_train(spec) else ''}) and the cluster has {num_cpus:g}; "
                "lower num_workers or cpus_per_worker"
            )
        )
    if problems:
        raise ConfigError(problems)
    fitting = math.floor(num_cpus / need_cpus + 1e-9)
    if need_gpus:
        fitting = min(fitting, math.floor(num_gpus / need_gpus + 1e-9))
    if spec.max_concurrent_trials is not None and spec.max_concurrent_trials > fitting:
        raise ConfigError(
            [
                Problem(
                    f"max_concurrent_trials is {spec.max_concurrent_trials} and the cluster holds {fitting} trials of "
                    f"{need_cpus:g} CPUs and {need_gpus:g} GPUs at once; the others would starve. Set it to {fitting} or null"
                )
            ]
        )
    return min(fitting, spec.max_concurrent_trials or fitting)


def check_data(spec: SweepSpec, stats: ClassStats, val_labels_per_class: list[int]) -> None:
    """Refuse an objective over classes that validation doesn't have; raises ConfigError."""
    if not sum(val_labels_per_class):
        raise ConfigError(
            [
                Problem(
                    "no class has a validation image (carving needs classes of 5 or more training images), so nothing can be selected"
                )
            ]
        )
    group = spec.objective.removeprefix("val/").removesuffix("_accuracy")
    if group in ("many_shot", "medium_shot", "few_shot"):
        members = getattr(stats, group)
        if not any(val_labels_per_class[label] for label in members):
            raise ConfigError(
                [
                    Problem(
                        f"objective {spec.objective}: no {group} class has a validation image here; choose val/balanced_accuracy"
                    )
                ]
            )


def check_model(config: TrialConfig, info: EncoderInfo) -> list[Problem]:
    """What a configuration asks of a tower that doesn't have it."""
    problems = []
    if config.method == "decoder":
        decoder = needed(config.decoder)
        width = decoder.width or info.token_width
        if width % decoder.num_heads:
            problems.append(
                Problem(
                    f"decoder.num_heads {decoder.num_heads} doesn't divide the token width {width} of {info.name}; "
                    "choose a divisor, or a decoder.width that it divides"
                )
            )
        if decoder.init == "identity" and not info.has_class_token:
            problems.append(
                Problem(f"decoder.init: identity needs a tower with a class token, and {info.name} has none")
            )
    return problems
