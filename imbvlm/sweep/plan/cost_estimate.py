"""Estimates of a sweep's seconds and GPU-hours from measured speeds; arithmetic alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from imbvlm.config.method_registry import own_sections
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.plan.feasibility import driver_of
from imbvlm.sweep.plan.speed_benchmark import TrialSpeed
from imbvlm.sweep.spec.baselines import Baseline
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.stratification import RandomTrial, Strata
from imbvlm.sweep.spec.sweep_spec import AshaConfig, ResolvedSweep, SweepSpec
from imbvlm.training.trial_pack import pack_key

# Seconds of a trial besides its epochs: in a process that runs already, and where Ray Train starts workers for it.
START_SECONDS = {"in_process": 0.4, "ray_train": 15.0}
# Seconds until the workers of a pass over images have started and loaded an encoder. Test images have their own pass.
PASS_START_SECONDS = 8.0
# The number of sampled trials that make up a sweep's mean trial.
NUM_SAMPLES = 200


@dataclass(frozen=True)
class Interval:
    """A lower and an upper bound."""

    low: float
    high: float

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Interval:
        """Scale both bounds."""
        return Interval(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class SplitSizes:
    """Numbers of images; a refit also trains on those held out from training for validation.

    With folds a trial on stored features has `num_folds` runs, which together evaluate `folds_val` images. The best
    trials may be scored again over `confirm_folds`, on so many training images and on those of validation. The gap to
    unseen groups is measured over `gap_folds` on `gap_val` images, twice; 1 where it isn't.
    """

    train: int
    val: int
    refit: int
    test: int
    num_folds: int = 1
    folds_val: int = 0
    confirm_folds: int = 1
    confirm_val: int = 0
    gap_folds: int = 1
    gap_val: int = 0

    def over_folds(self) -> SplitSizes:
        """Return the sizes with which `confirm_folds` would score all trials."""
        return replace(self, num_folds=self.confirm_folds, folds_val=self.confirm_val)

    def of_trial(self, config: TrialConfig) -> EpochSizes:
        """Return what a trial of the search reads in an epoch."""
        if self.num_folds == 1 or config.reads_images:
            return EpochSizes(self.train, self.val)
        return EpochSizes(self.refit - self.folds_val // self.num_folds, self.folds_val, self.num_folds)

    def of_pairs(self, config: TrialConfig) -> EpochSizes:
        """Return what models without each two folds read in an epoch."""
        num_pairs = self.num_folds * (self.num_folds - 1) // 2
        lacking = 2 * self.folds_val // self.num_folds
        return EpochSizes(self.refit - lacking, num_pairs * lacking, num_pairs)

    def of_gap(self, config: TrialConfig) -> EpochSizes:
        """Return what one of the two kinds of folds that measure the gap reads in an epoch."""
        return EpochSizes(self.refit - self.gap_val // self.gap_folds, self.gap_val, self.gap_folds)

    def of_refit(self, config: TrialConfig) -> EpochSizes:
        """Return what a refit reads in an epoch."""
        return EpochSizes(self.refit, 0)


@dataclass(frozen=True)
class EpochSizes:
    """Numbers of images in a trial's epoch: what each of its runs trains on, and what all of them evaluate."""

    train: int
    val: int
    num_runs: int = 1


def cost_key(config: TrialConfig) -> str:
    """Return a key that configurations of equal time and memory per image share."""
    tree = config.to_tree()
    # They decide the time and the memory of an image. Learning rates, losses and seeds do not.
    sections = ("encoder", "eval", "method", *own_sections(), "memory")
    shape = {key: tree[key] for key in sections if tree.get(key) is not None}
    train = config.train
    numbers = None if train is None else (train.batch_size, train.precision, train.compile)
    return json.dumps({**shape, "stored": config.features.store, "train": numbers}, sort_keys=True)


def sample_trials(sweep: ResolvedSweep) -> list[TrialConfig]:
    """Sample configurations at random, equally many from each stratum of `stratify`; all of a list."""
    spec, space = sweep.spec, sweep.space
    if isinstance(space, ListedSpace):
        return [spec.trial(params) for params in space.configurations.values()]
    rng, strata = random.Random(spec.searcher.seed), Strata(sweep)
    configs = [spec.trial(params) for params in spec.first_trials[: sweep.num_trials]]
    for _ in range(NUM_SAMPLES):
        stratum = strata.least_sampled()[0]
        params = space.sample(RandomTrial(rng, strata.fixed_params(stratum, rng)), spec.base)
        strata.count(params)
        configs.append(spec.trial(params))
    return configs


def most_common_shapes(configs: Sequence[TrialConfig], max_shapes: int) -> list[TrialConfig]:
    """Return one configuration of each of the most common shapes; no method has two before every method has one."""
    counts = Counter(map(cost_key, configs))
    first = {cost_key(config): config for config in reversed(configs)}
    by_method: dict[str, list[str]] = {}
    for shape, _ in counts.most_common():
        by_method.setdefault(first[shape].method, []).append(shape)
    turns = [shapes[turn] for turn in range(len(counts)) for shapes in by_method.values() if turn < len(shapes)]
    return [first[shape] for shape in turns[:max_shapes]]


@dataclass(frozen=True)
class PackStatistics:
    """The sizes of packs: a pack's trials are those with its `pack_key` among `size(config)` sampled trials.

    `shares` has the share of each key among the sweep's trials, and `max_size` the size of the largest pack.
    """

    size: Callable[[TrialConfig], int]
    shares: Mapping[str, float]
    max_size: int = 1

    @staticmethod
    def of(configs: Sequence[TrialConfig], size: Callable[[TrialConfig], int]) -> PackStatistics:
        """Count the keys of sampled trials."""
        counts = Counter(key for key in map(pack_key, configs) if key is not None)
        shares = {key: count / len(configs) for key, count in counts.items()}
        return PackStatistics(size, shares, max(map(size, configs), default=1))

    def mean_size(self, config: TrialConfig) -> float:
        """Return the mean number of trials in such a trial's pack, itself included."""
        key = pack_key(config)
        return 1.0 if key is None else 1 + (self.size(config) - 1) * self.shares.get(key, 0.0)


ALONE = PackStatistics(lambda config: 1, {})


class SpeedTable:
    """Measured speeds by shape; a shape that wasn't measured gets the mean of its method."""

    def __init__(self, measured: Mapping[str, tuple[str, TrialSpeed]]) -> None:
        self._measured = {shape: speed for shape, (_, speed) in measured.items()}
        by_method: dict[str, list[TrialSpeed]] = {}
        for method, speed in measured.values():
            by_method.setdefault(method, []).append(speed)
        self._means = {
            # Times alone: nothing reads a mean of memory.
            method: TrialSpeed(
                sum(speed.seconds_per_train_image for speed in speeds) / len(speeds),
                sum(speed.eval_seconds for speed in speeds) / len(speeds),
                host_bytes=0,
                device_bytes=0,
                extra_member_seconds=_mean(
                    [speed.extra_member_seconds for speed in speeds if speed.extra_member_seconds is not None]
                ),
            )
            for method, speeds in by_method.items()
        }

    def epoch_seconds(
        self, config: TrialConfig, sizes: EpochSizes, num_workers: int, pack_size: float = 1.0
    ) -> float | None:
        """Return a trial's seconds of one epoch with its validation; None if its method was not measured."""
        speed = self._measured.get(cost_key(config)) or self._means.get(config.method)
        num_train = sizes.num_runs * sizes.train
        return None if speed is None else speed.epoch_seconds(num_train, sizes.val, num_workers, pack_size)


def num_epochs(config: TrialConfig, num_train: int) -> float:
    """Return the first stage's passes over the training images; 1 for a method that trains nothing."""
    if config.train is None:
        return 1.0
    if config.train.num_steps is not None:
        return config.train.num_steps * config.train.batch_size / max(1, num_train)
    return float(config.train.num_epochs or 1)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def expected_asha_fraction(spec: SweepSpec) -> float:
    """Return the fraction of all epochs that run if exactly one in `reduction_factor` trials passes each rung."""
    config = spec.trial_scheduler
    if not isinstance(config, AshaConfig):
        return 1.0
    fraction, passing, rung = 0.0, 1.0, 0.0
    next_rung = config.grace_fraction
    while rung < 1:
        fraction += passing * (min(1.0, next_rung) - rung)
        rung, next_rung = min(1.0, next_rung), next_rung * config.reduction_factor
        passing /= config.reduction_factor
    return fraction


@dataclass(frozen=True)
class Estimate:
    """Seconds of wall time of each phase; `over_folds` those of baselines and trials if `confirm_folds` scored all."""

    features: float | None
    baselines: Interval | None
    trials: Interval | None
    refits: Interval | None
    over_folds: Interval | None = None

    @property
    def total(self) -> Interval | None:
        """The sum of all phases; None if one is unknown."""
        if self.baselines is None or self.trials is None or self.refits is None or self.features is None:
            return None
        return self.baselines + self.trials + self.refits + Interval(self.features, self.features)


@dataclass(frozen=True)
class Estimator:
    """Estimates a sweep with `concurrent` trials, or packs of them, at once, each as fast as it was alone.

    `configs` are sampled trials, and every trial of the search takes `start` seconds besides its epochs.
    """

    sweep: ResolvedSweep
    configs: Sequence[TrialConfig]
    baselines: Sequence[Baseline]
    speeds: SpeedTable
    rows: SplitSizes
    concurrent: int
    start: float

    def estimate(self, features: float | None, packs: PackStatistics) -> Estimate:
        """Estimate the wall time, of which `features` is that of the passes over all images.

        The upper bound is without ASHA, and with baselines that use up their epochs. The lower bound is for ASHA that
        stops as many trials as it can, and baselines that stop as early as they can.
        """
        of_trial = self.rows.of_trial
        baselines, trials = self._baseline_seconds(of_trial), self._search_seconds(of_trial, packs)
        estimate = Estimate(features, baselines, trials, self._refit_seconds())
        return estimate if self.rows.confirm_folds == 1 else self._with_folds(estimate, packs)

    def _with_folds(self, estimate: Estimate, packs: PackStatistics) -> Estimate:
        """Add the scores over folds to the trials, and estimate folds from the start."""
        spec, of_folds = self.sweep.spec, self.rows.over_folds().of_trial
        baselines, trials = self._baseline_seconds(of_folds), self._search_seconds(of_folds, packs)
        alone, packed = self._trial_seconds(of_folds), self._trial_seconds(of_folds, packs)
        if estimate.trials is None or baselines is None or trials is None or alone is None or packed is None:
            return estimate
        num_trials = min(spec.num_confirmed, self.sweep.num_trials, spec.max_trials or self.sweep.num_trials)
        num_again = num_trials + spec.confirm_trials * len(spec.more_seeds)
        again = Interval(packed, alone).times(num_again / self.concurrent)
        return replace(estimate, trials=estimate.trials + again + baselines, over_folds=baselines + trials)

    def _start_of(self, config: TrialConfig) -> float:
        """Return the seconds that a baseline takes besides its epochs."""
        return min(self.start, START_SECONDS[driver_of(self.sweep, config)])

    def _epoch_seconds(self, config: TrialConfig, sizes: EpochSizes, pack_size: float = 1.0) -> float | None:
        return self.speeds.epoch_seconds(config, sizes, self.sweep.spec.num_workers, pack_size)

    def _trial_seconds(
        self, sizes_of: Callable[[TrialConfig], EpochSizes], packs: PackStatistics = ALONE
    ) -> float | None:
        """Return the mean seconds of a trial that is not stopped; None if some method has no speed.

        The trials of a pack share its seconds.
        """
        total = 0.0
        for config in self.configs:
            pack_size, sizes = packs.mean_size(config), sizes_of(config)
            epoch = self._epoch_seconds(config, sizes, pack_size)
            if epoch is None:
                return None
            total += self.start / pack_size + epoch * num_epochs(config, sizes.train)
        return total / len(self.configs)

    def _search_seconds(self, of_trial: Callable[[TrialConfig], EpochSizes], packs: PackStatistics) -> Interval | None:
        """Estimate the trials of the search and those with confirmation seeds."""
        spec, num_trials = self.sweep.spec, self.sweep.num_trials
        alone, packed = self._trial_seconds(of_trial), self._trial_seconds(of_trial, packs)
        if alone is None or packed is None:
            return None
        num_trials = min(num_trials, spec.max_trials or num_trials)
        search = Interval(packed * expected_asha_fraction(spec), packed).times(num_trials / self.concurrent)
        num_confirmed = spec.confirm_trials * len(spec.more_seeds)
        confirm = alone * num_confirmed / min(self.concurrent, max(1, num_confirmed))
        return Interval(max(search.low, alone) + confirm, max(search.high, alone) + confirm)

    def _baseline_seconds(self, of_trial: Callable[[TrialConfig], EpochSizes]) -> Interval | None:
        total = Interval(0.0, 0.0)
        for baseline in self.baselines:
            sizes = of_trial(baseline.config)
            epoch = self._epoch_seconds(baseline.config, sizes)
            if epoch is None:
                return None
            max_epochs = num_epochs(baseline.config, sizes.train)
            min_epochs = min(max_epochs, baseline.patience or max_epochs)
            start = self._start_of(baseline.config)
            total += Interval(start + epoch * min_epochs, start + epoch * max_epochs)
        return total.times(1 / self.concurrent)

    @property
    def _corrects_claims(self) -> bool:
        """Whether models without each two folds say what is gained by training on all images."""
        return self.sweep.spec.selects_by_likelihood and self.rows.num_folds > 2 and self.rows.test == 0

    def _refit_seconds(self) -> Interval | None:
        """Estimate the refits of winner and probe over the seeds and of zero-shot once; in a study those of all trials.

        The winner and the members of a blend count as mean trials. There may be as many members as `blend` allows.
        Where claims are corrected, runs without pairs of folds count as refits, and so do those that measure the gap.
        """
        spec, of_refit = self.sweep.spec, self.rows.of_refit
        num_seeds, num_refits = len(spec.refit_seeds), self.sweep.num_trials if spec.study else 1
        winner = self._trial_seconds(of_refit)
        if winner is None:
            return None
        members = 0 if spec.blends is None else min(spec.blends.max_members, self.sweep.num_trials)
        most = max(num_refits, members)
        total = Interval(num_refits * winner, most * winner).times(num_seeds)
        if self._corrects_claims and (of_pairs := self._trial_seconds(self.rows.of_pairs)) is not None:
            total += Interval(of_pairs, max(1, members) * of_pairs)
        total += self._gap_seconds(max(1, members))
        for config in {baseline.config.method: baseline.config for baseline in self.baselines}.values():
            epoch = self._epoch_seconds(config, of_refit(config))
            if epoch is None:
                return None
            max_epochs, num_runs = num_epochs(config, self.rows.refit), 1 if config.train is None else num_seeds
            start = self._start_of(config)
            total += Interval(start + epoch, start + epoch * max_epochs).times(num_runs)
        return total.times(1 / min(self.concurrent, (1 + num_refits) * num_seeds + 1))

    def _gap_seconds(self, members: int) -> Interval:
        """Estimate both kinds of folds for up to so many members; a model that trains in the encoder has no gap."""
        stored = [config for config in self.configs if not config.reads_images]
        seconds = replace(self, configs=stored)._trial_seconds(self.rows.of_gap) if stored else None
        if self.rows.gap_folds == 1 or seconds is None:
            return Interval(0.0, 0.0)
        return Interval(2.0 if len(stored) == len(self.configs) else 0.0, 2.0 * members).times(seconds)


def gpu_hours(seconds: Interval, num_gpus: float) -> Interval:
    """Return the hours of all GPUs while the sweep runs, idle or not: all of them are paid for."""
    return seconds.times(num_gpus / 3600)
