"""Rejects within seconds what can't run: too few resources, an encoder without a feature, unmeasurable objectives."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from imbvlm.base.errors import ConfigError, Problem
from imbvlm.base.formatting import pluralize
from imbvlm.config.encoder_info import OUTPUT_NAMES, EncoderInfo, OutputName
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.folds import Folds, deal_folds
from imbvlm.data.manifest import Manifest
from imbvlm.data.split_power import NUM_FOLDS, resolve_confirm_folds, resolve_folds, validation_rows
from imbvlm.data.splits import train_val_rows
from imbvlm.longtail.class_stats import SHOT_GROUPS, ClassStats
from imbvlm.models.encoders.class_texts import describe_class_texts
from imbvlm.models.encoders.encoder_factory import describe_encoder
from imbvlm.models.model_builder import refusals
from imbvlm.ray_runtime.cluster_resources import Cluster
from imbvlm.ray_runtime.shared_folder_check import nodes_without_access
from imbvlm.sweep.records.adjustment_selection import max_logit_files
from imbvlm.sweep.records.refit_selection import max_confirmed
from imbvlm.sweep.spec.baselines import baselines, encoder_configs, feature_key
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.training.trial_pack import member_bytes, pack_key
from imbvlm.training.validation_logits import RowLogits, file_bytes

Driver = Literal["in_process", "ray_train"]
# CPUs of the process that starts a Ray Train trial's workers, which mostly waits.
DRIVER_CPUS = 0.01
# Bytes of a GPU's memory for the members of a pack.
GPU_BYTES = 4 * 2**30


def driver_of(sweep: ResolvedSweep, config: TrialConfig | None = None) -> Driver:
    """Return the driver of a configuration outside of the search, or, without one, of the search's trials.

    `driver: auto` runs one worker on stored features in process: a trial takes some 15 s to start under Ray Train. The
    trials of a search have one driver, so that some in the encoder put all of them under Ray Train.
    """
    spec = sweep.spec
    if spec.driver != "auto":
        return spec.driver
    reads_images = _reads_images(sweep) if config is None else config.reads_images
    return "ray_train" if spec.num_workers > 1 or reads_images else "in_process"


def uses_ray_train(sweep: ResolvedSweep) -> bool:
    """Return whether the search's trials run under Ray Train."""
    return driver_of(sweep) == "ray_train"


def _reads_images(sweep: ResolvedSweep) -> bool:
    """Return whether some trial of the sweep runs the encoder itself."""
    base, space = sweep.spec.base, sweep.space
    trains_encoder = any(METHODS[name].trains_encoder for name in space.values_of("method", base) if name in METHODS)
    return trains_encoder or not all(space.values_of("features.store", base, default=True))


def check_shared(folders: Sequence[str]) -> None:
    """Reject folders that the connected cluster's nodes don't share; raises ConfigError."""
    fix = "trials there couldn't keep what they find; choose a --storage that every node sees at the same place"
    problems = [
        Problem(f"{folder} isn't shared by all nodes: {problem}; {fix}", "storage")
        for folder in folders
        for problem in nodes_without_access(folder)
    ]
    if problems:
        raise ConfigError(problems)


def trials_at_once(sweep: ResolvedSweep, cluster: Cluster) -> int:
    """Return how many trials run at once on a cluster of its maximum size; raises ConfigError if none can."""
    if uses_ray_train(sweep) and not cluster.dashboard:
        message = (
            "the Ray cluster has no dashboard, and without one Ray Train never frees the workers of a trial that has "
            "ended; start it with one (`ray start --head` goes on without where its port is taken: --dashboard-port)"
        )
        raise ConfigError([Problem(message, sweep.spec.where("driver"))])
    return concurrent_trials(
        sweep, cluster.max_cpus, cluster.max_gpus, cluster.max_nodes, "can grow to" if cluster.can_grow else "has"
    )


def shortage(sweep: ResolvedSweep, cluster: Cluster) -> str | None:
    """Return why no trial of a running sweep fits on its cluster by now, and how to resume; None if one fits."""
    _, lacking = next(_lacks(sweep, cluster.max_cpus, cluster.max_gpus, cluster.max_nodes, "has now"), ("", None))
    if lacking is None:
        return None
    return (
        f"no trial fits on what is left of the cluster: {lacking}, and go on by --resume with --fork; or add a machine "
        "that a trial fits on, for which the sweep waits"
    )


def concurrent_trials(
    sweep: ResolvedSweep, num_cpus: float, num_gpus: float, nodes: Sequence[tuple[float, float]] = (), has: str = "has"
) -> int:
    """Return how many trials run at once on a cluster; raises ConfigError if not one can.

    `nodes` has each machine's CPUs and GPUs, since a worker must fit on one; by default the cluster is one machine.
    """
    spec, lacking = sweep.spec, _lacks(sweep, num_cpus, num_gpus, nodes, has)
    problems = [Problem(message, spec.where(key)) for key, message in lacking]
    if problems:
        raise ConfigError(problems)
    fitting = _trials_on(sweep, nodes or [(num_cpus, num_gpus)])
    requested = spec.max_concurrent_trials or fitting
    if requested > fitting:
        message = (
            f"max_concurrent_trials is {requested} and the cluster holds {fitting} trials of {_need(sweep)} at once; "
            f"the others would starve. Set it to {fitting} or null"
        )
        raise ConfigError([Problem(message, spec.where("max_concurrent_trials"))])
    return requested


@dataclass(frozen=True)
class Packing:
    """How many trials may train together: at most `max_size`, and no more than fit into `max_bytes`.

    The widths are the largest of the space's encoders, and `num_train` and `num_val` are upper bounds. `packs_in_turns`
    says whether methods whose members train in turns are packed.
    """

    max_size: int
    max_bytes: int
    token_width: int
    pooled_width: int
    num_classes: int
    num_train: int
    num_val: int
    num_folds: int
    packs_in_turns: bool

    def bytes_of(self, config: TrialConfig) -> int:
        """Return the bytes that one more such trial adds to its process, or to its GPU's memory."""
        num_val = self.num_val // self.num_folds
        return self.num_folds * member_bytes(
            config, self.token_width, self.pooled_width, self.num_classes, self.num_train, num_val
        )

    def largest(self, sweep: ResolvedSweep) -> int:
        """Return the size of the largest pack of a sweep."""
        return max(map(self.size, sweep.corner_trials()))

    def size(self, config: TrialConfig) -> int:
        """Return how many trials of the configuration's `pack_key` may train together."""
        trains_alone = METHODS[config.method].packs == "in_turns" and not self.packs_in_turns
        if self.max_size < 2 or pack_key(config) is None or trains_alone:
            return 1
        return max(1, min(self.max_size, self.max_bytes // max(1, self.bytes_of(config))))


def packing(sweep: ResolvedSweep, encoders: Iterable[EncoderInfo], manifest: Manifest, concurrent: int) -> Packing:
    """Decide how a sweep's trials train together.

    The packs that run at once share a quarter of this machine's memory, or GPU_BYTES of each GPU. A sweep that judges
    trials by their time runs each alone. Decoders train in turns, which saves nothing on CPUs: there they are packed
    only if `max_pack_size` is set. On a GPU they share the reading and copying of tokens, which limits their speed.
    """
    spec, infos, num_train = sweep.spec, list(encoders), len(manifest.rows_of("train"))
    if spec.gpus_per_worker:
        max_bytes = int(GPU_BYTES * spec.gpus_per_worker)
    else:
        max_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (4 * concurrent)
    by_time = any(metric.startswith("time/") for metric in (*spec.other_objectives, *spec.constraints))
    # The sampler proposes from reported results, so leave it at least four rounds of packs.
    max_size = spec.max_pack_size or max(1, sweep.num_trials // (4 * concurrent))
    return Packing(
        max_size=1 if by_time or uses_ray_train(sweep) else max_size,
        max_bytes=max_bytes,
        token_width=max(info.token_width for info in infos),
        pooled_width=max(info.pooled_width for info in infos),
        num_classes=len(manifest.class_names),
        num_train=num_train,
        # Rows held out for validation are among the training rows.
        num_val=len(manifest.rows_of("val")) if "val" in manifest.splits else num_train,
        num_folds=num_folds(spec, manifest),
        packs_in_turns=bool(spec.gpus_per_worker) or spec.max_pack_size is not None,
    )


def at_a_time(concurrent: int, pack_size: int) -> str:
    """Describe how many trials run at once, such as `2 trials at a time`."""
    if pack_size < 2:
        return f"{pluralize(concurrent, 'trial')} at a time"
    return f"{pluralize(concurrent, 'process')} at a time, of up to {pack_size} trials that train together"


def _lacks(
    sweep: ResolvedSweep, num_cpus: float, num_gpus: float, nodes: Sequence[tuple[float, float]], has: str
) -> Iterator[tuple[str, str]]:
    """Iterate over the reasons why no trial can start: the key to lower, and a sentence with both numbers and a fix."""
    spec = sweep.spec
    workers = f"num_workers {spec.num_workers}"
    if spec.driver == "in_process" and spec.num_workers > 1:
        message = f"driver in_process runs one worker a trial and num_workers is {spec.num_workers}"
        yield "driver", f"{message}; set driver: ray_train"
    need_gpus = spec.gpus_per_trial
    if need_gpus > num_gpus:
        # Either one worker needs too much, or there are too many workers.
        key = "gpus_per_worker" if spec.gpus_per_worker > num_gpus or spec.num_workers == 1 else "num_workers"
        message = (
            f"a trial needs {pluralize(need_gpus, 'GPU')} ({workers} x gpus_per_worker {spec.gpus_per_worker:g}) and "
            f"the cluster {has} {num_gpus:g}; lower num_workers or gpus_per_worker (0 trains on CPUs)"
        )
        yield key, message
    if _need_cpus(sweep) > num_cpus:
        driver = f" + {DRIVER_CPUS:g} for its driver" if uses_ray_train(sweep) else ""
        key = "cpus_per_worker" if spec.cpus_per_worker > num_cpus or spec.num_workers == 1 else "num_workers"
        message = (
            f"a trial needs {pluralize(_need_cpus(sweep), 'CPU')} ({workers} x cpus_per_worker "
            f"{spec.cpus_per_worker:g}{driver}) and the cluster {has} {num_cpus:g}; "
            "lower num_workers or cpus_per_worker"
        )
        yield key, message
    elif need_gpus <= num_gpus and nodes and not any(_workers_on(sweep, cpus, gpus) for cpus, gpus in nodes):
        largest = max(nodes, key=lambda node: (node[1], node[0]))
        key = "gpus_per_worker" if spec.gpus_per_worker > largest[1] else "cpus_per_worker"
        message = (
            f"a worker needs {_resources(spec.cpus_per_worker, spec.gpus_per_worker)} on one machine, and the largest "
            f"has {_resources(*largest)}; lower cpus_per_worker or gpus_per_worker"
        )
        yield key, message
    elif need_gpus <= num_gpus and not _trials_on(sweep, nodes or [(num_cpus, num_gpus)]):
        message = (
            f"a trial of {spec.num_workers} workers ({_need(sweep)}) doesn't fit on this cluster's machines; lower "
            "num_workers"
        )
        yield "num_workers", message


def _need(sweep: ResolvedSweep) -> str:
    return _resources(_need_cpus(sweep), sweep.spec.gpus_per_trial)


def _resources(cpus: float, gpus: float) -> str:
    return f"{pluralize(cpus, 'CPU')} and {pluralize(gpus, 'GPU')}"


def _need_cpus(sweep: ResolvedSweep) -> float:
    return sweep.spec.cpus_per_trial + (DRIVER_CPUS if uses_ray_train(sweep) else 0)


def _workers_on(sweep: ResolvedSweep, num_cpus: float, num_gpus: float) -> int:
    """Return how many workers one machine holds, each with room for its trial's driver."""
    spec = sweep.spec
    cpus = spec.cpus_per_worker + (DRIVER_CPUS if uses_ray_train(sweep) else 0)
    by_cpus = math.floor(num_cpus / cpus + 1e-9)
    return min(by_cpus, math.floor(num_gpus / spec.gpus_per_worker + 1e-9)) if spec.gpus_per_worker else by_cpus


def _trials_on(sweep: ResolvedSweep, nodes: Iterable[tuple[float, float]]) -> int:
    """Return how many trials machines hold at once."""
    return sum(_workers_on(sweep, cpus, gpus) for cpus, gpus in nodes) // sweep.spec.num_workers


def gap_folds(spec: SweepSpec, manifest: Manifest) -> Folds | str:
    """The folds of whole groups over which the gap to unseen groups is measured, or why it isn't."""
    if not manifest.has_groups:
        return "the manifest has no groups"
    rows, number = manifest.label_rows(), num_folds(spec, manifest)
    train, folds = rows.rows_of("train"), deal_folds(rows, number if number > 1 else NUM_FOLDS, spec.split_seed)
    if rows.groups is not None and len(np.unique(rows.groups[train])) == len(train):
        return "every training image is a group of its own"
    if len(folds.folds) < 2:
        return "its groups don't give two folds, since no fold may have all images of a class"
    if not RowLogits.fits(len(folds.val_rows) + len(manifest.rows_of("val")), len(manifest.class_names)):
        return "logits of all folds take too much memory"
    return folds


def num_folds(spec: SweepSpec, manifest: Manifest) -> int:
    """Return the folds that score the sweep's trials on stored features; 1 without folds."""
    return resolve_folds(spec.num_folds, manifest, spec.split_seed)


def confirm_folds(sweep: ResolvedSweep, manifest: Manifest) -> int:
    """Return the folds that score the best trials and the baselines again before the selection; 1 without them."""
    spec = sweep.spec
    if spec.confirm_folds is None or not spec.selects_by_likelihood:
        return 1
    if all(config.reads_images for config in sweep.corner_trials()):
        return 1
    num_rows = len(manifest.rows_of("train")) + len(manifest.rows_of("val"))
    if not RowLogits.fits(num_rows, len(manifest.class_names)):
        return 1
    return resolve_confirm_folds(spec.confirm_folds, manifest, spec.split_seed)


def data_counts(manifest: Manifest, split_seed: int, num_folds: int = 1) -> tuple[ClassStats, list[int]]:
    """Return the counts of the images that train, and the number of validation images of each class.

    With folds every image trains, and most classes are scored on all of theirs.
    """
    train = manifest.rows_of("train") if num_folds > 1 else train_val_rows(manifest, split_seed)[0]
    val = validation_rows(manifest, split_seed, num_folds)
    counts = np.bincount(manifest.labels[val], minlength=len(manifest.class_names))
    return manifest.class_stats(train), counts.tolist()


def check_data(spec: SweepSpec, stats: ClassStats, val_labels_per_class: list[int]) -> None:
    """Reject data of a single class, and objectives over classes without validation images; raises ConfigError."""
    metrics = tuple(dict.fromkeys([*spec.objectives, *spec.constraints]))
    if (message := one_class_problem(stats)) is not None:
        raise ConfigError([Problem(message, spec.where("base", "data", "manifest"))])
    if (message := validation_problem(stats, val_labels_per_class, metrics)) is not None:
        raise ConfigError([Problem(message, spec.where("objective"))])


def one_class_problem(stats: ClassStats) -> str | None:
    """Return the problem of training images of fewer than two classes, or None."""
    num_trained = int((stats.split_counts > 0).sum())
    if num_trained >= 2:
        return None
    return (
        f"training images are of {pluralize(num_trained, 'class')}, and two or more are needed to tell apart; "
        "`imbvlm manifest check` says more"
    )


def validation_problem(stats: ClassStats, val_labels_per_class: list[int], metrics: Sequence[str]) -> str | None:
    """Return the problem of validation rows that can't give one of the metrics, or None."""
    groups = [metric.removeprefix("val/").removesuffix("_accuracy") for metric in metrics]
    missing = [
        group
        for group in groups
        if group in SHOT_GROUPS and not any(val_labels_per_class[label] for label in stats.shot_groups[group])
    ]
    if not sum(val_labels_per_class):
        return (
            "no class has a validation image (folds need two training images of a class, and images are held out from "
            "classes of 5 or more), so that nothing can be selected"
        )
    if missing:
        return (
            f"val/{missing[0]}_accuracy: no {missing[0]} class has a validation image here; choose "
            "val/balanced_accuracy"
        )
    return None


def check_models(sweep: ResolvedSweep) -> dict[str, EncoderInfo]:
    """Describe each encoder of the space without its weights; raises ConfigError for trials that it can't serve."""
    infos: dict[str, EncoderInfo] = {}
    problems: dict[Problem, None] = {}
    for config in sweep.corner_trials():
        key = config.encoder.model_dump_json()
        if key not in infos:
            infos[key] = describe_encoder(config.encoder)
        problems.update(dict.fromkeys(check_model(config, infos[key])))
    if problems:
        raise ConfigError(problems)
    return infos


def check_model(config: TrialConfig, info: EncoderInfo) -> list[Problem]:
    """Return what a configuration needs and its encoder lacks."""
    return [Problem(message) for message in refusals(config, info)]


def needed_outputs(sweep: ResolvedSweep) -> frozenset[OutputName]:
    """Return the encoder outputs that the space's methods and the baselines read."""
    reads: set[OutputName] = {METHODS[method].reads for method in _methods_of(sweep)}
    return frozenset(name for name in OUTPUT_NAMES if name in reads | {"pooled", "image_embedding"})


def max_logit_bytes(sweep: ResolvedSweep, manifest: Manifest, packs: Packing, concurrent: int) -> int:
    """Return the most bytes that validation logits take at one time."""
    num_running = concurrent * packs.largest(sweep)
    num_bytes = logit_file_bytes(sweep.spec, manifest)
    again = confirm_logit_bytes(sweep, manifest) + pair_logit_bytes(sweep, manifest)
    return max_logit_files(sweep, num_running, num_bytes) * num_bytes + again


def confirm_logit_bytes(sweep: ResolvedSweep, manifest: Manifest, num_ended: int = 0) -> int:
    """Return the most bytes that logits of `confirm_folds` can add to those of `num_ended` trials that have ended."""
    folds, spec = confirm_folds(sweep, manifest), sweep.spec
    if folds == 1:
        return 0
    num_rows = len(validation_rows(manifest, spec.split_seed, folds)) + len(manifest.rows_of("val"))
    return max(0, max_confirmed(sweep) - num_ended) * file_bytes(
        num_rows, len(manifest.class_names), folds, has_groups=manifest.has_groups
    )


def pair_logit_bytes(sweep: ResolvedSweep, manifest: Manifest) -> int:
    """Return the most bytes of logits of the runs without pairs of folds, which correct claims without a test split."""
    spec, folds = sweep.spec, num_folds(sweep.spec, manifest)
    if folds < 3 or len(manifest.rows_of("test")) or not spec.selects_by_likelihood:
        return 0
    num_rows = (folds - 1) * len(validation_rows(manifest, spec.split_seed, folds))
    # The members of the blend, or the winner, and zero-shot of each encoder.
    num_runs = (1 if spec.blends is None else spec.blends.max_members) + len(encoder_configs(sweep))
    return num_runs * file_bytes(
        num_rows, len(manifest.class_names), folds * (folds - 1) // 2, has_groups=manifest.has_groups
    )


def max_test_logit_bytes(sweep: ResolvedSweep, manifest: Manifest) -> int:
    """Return the most bytes of test logits: those of the winner's refits, or of all refits where there are blends."""
    num_test, num_classes, limits = len(manifest.rows_of("test")), len(manifest.class_names), sweep.spec.blends
    if not RowLogits.fits(num_test, num_classes):
        return 0
    num_baselines = len({baseline.config.method for baseline in baselines(sweep).values()})
    num_refits = 1 if limits is None else limits.max_members + num_baselines
    return 2 * num_test * num_classes * num_refits * len(sweep.spec.refit_seeds)


def logit_file_bytes(spec: SweepSpec, manifest: Manifest) -> int:
    """Return the bytes of one trial's validation logits."""
    folds = num_folds(spec, manifest)
    num_rows = sum(data_counts(manifest, spec.split_seed, folds)[1])
    return file_bytes(num_rows, len(manifest.class_names), folds, has_groups=manifest.has_groups)


def untried_methods(sweep: ResolvedSweep, infos: Mapping[str, EncoderInfo]) -> list[str]:
    """Return the methods that train, that the space leaves out, and that some encoder supports.

    `infos` has the extracted encoders by `feature_key`.
    """
    keyed = {feature_key(config): config for config in encoder_configs(sweep)}
    encoders = [(keyed[key], info) for key, info in infos.items()]
    untried = [name for name, entry in METHODS.items() if entry.trains and name not in _methods_of(sweep)]
    return [
        name
        for name in untried
        if not all(refusals(config.with_overrides({"method": name}), info) for config, info in encoders)
    ]


def _methods_of(sweep: ResolvedSweep) -> set[str]:
    return set(map(str, sweep.space.values_of("method", sweep.spec.base)))


def text_notes(sweep: ResolvedSweep, manifest: Manifest) -> list[str]:
    """Sentences on the classes that `prompts.texts` has sentences for; raises ImbvlmError for a wrong file."""
    paths = sweep.space.values_of("prompts.texts", sweep.spec.base)
    return [describe_class_texts(path, manifest.class_names) for path in paths if path is not None]


def check_manifest(sweep: ResolvedSweep, manifest: Manifest) -> None:
    """Reject a sweep whose data has nothing to train on or to select by, or not the classes of its texts.

    Raises ConfigError, ImbvlmError.
    """
    spec = sweep.spec
    text_notes(sweep, manifest)
    for section in ("prompts", "class_means", "prototype_cache"):
        key = f"{section}.center_by_parent"
        if manifest.taxonomy is None and True in sweep.space.values_of(key, spec.base):
            rule = f"{key} needs a manifest with a tree over its classes"
            raise ConfigError([Problem(f"{rule}; build it with --taxonomy, or leave {key} out", spec.where("base"))])
    folds = num_folds(spec, manifest)
    check_data(spec, *data_counts(manifest, spec.split_seed, folds))
    if folds > 1 and any(config.reads_images for config in sweep.corner_trials()):
        # Folds score trials on stored features alone.
        check_data(spec, *data_counts(manifest, spec.split_seed))
