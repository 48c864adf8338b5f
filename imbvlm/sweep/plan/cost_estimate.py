"""What a sweep will take, from measured speeds: seconds of each phase, GPU-hours, money; arithmetic alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from imbvlm.config.method_registry import OWN_SECTIONS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.plan.speed_benchmark import TrialSpeed
from imbvlm.sweep.spec.baselines import Baseline
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.stratification import RandomTrial, Strata
from imbvlm.sweep.spec.sweep_spec import AshaConfig, ResolvedSweep, SweepSpec
from imbvlm.training.trial_pack import pack_key

# What a trial takes beside its epochs: in a process that is there already, and where Ray Train starts workers for it.
START_SECONDS = {"in_process": 0.4, "ray_train": 15.0}
# Until a pass over images by workers has its first image: they start and load a tower. Test images have a pass of their
# own.
PASS_START_SECONDS = 8.0
# Draws over which a sweep's mean trial is taken.
NUM_DRAWS = 200
# What decides how long an image takes and how much memory: rates, losses and seeds don't.
SHAPE_SECTIONS = ("encoder", "eval", "method", *OWN_SECTIONS, "memory")


@dataclass(frozen=True)
class Interval:
    """A number between what is hoped for and what it is at most."""

    low: float
    high: float

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class SplitSizes:
    """Images in training and in validation, and in training with the carved ones returned, as the refit has them."""

    train: int
    val: int
    refit: int
    test: int


def cost_key(config: TrialConfig) -> str:
    """Equal for configurations that take as long by the image and as much memory."""
    tree = config.to_tree()
    shape = {key: tree[key] for key in SHAPE_SECTIONS if tree.get(key) is not None}
    train = config.train
    numbers = None if train is None else (train.batch_size, train.precision, train.compile)
    return json.dumps({**shape, "stored": config.features.store, "train": numbers}, sort_keys=True)


def sample_trials(sweep: ResolvedSweep) -> list[TrialConfig]:
    """Configurations as the sweep would draw them by chance, the same number for every arm under `stratify`.

    All of them where the space is a list.
    """
    spec, space = sweep.spec, sweep.space
    if isinstance(space, ListedSpace):
        return [spec.trial(draw) for draw in space.configurations.values()]
    chance, arms = random.Random(spec.searcher.seed), Strata(sweep)
    found = [spec.trial(draw) for draw in spec.first_trials[: sweep.num_trials]]
    for _ in range(NUM_DRAWS):
        arm = arms.least_sampled()[0]
        draw = space.sample(RandomTrial(chance, arms.fixed_params(arm, chance)), spec.base)
        arms.count(draw)
        found.append(spec.trial(draw))
    return found


def most_common_shapes(configs: Sequence[TrialConfig], most: int) -> list[TrialConfig]:
    """One configuration of each of the commonest shapes; every method has one before any has two."""
    counts = Counter(map(cost_key, configs))
    first = {cost_key(config): config for config in reversed(configs)}
    by_method: dict[str, list[str]] = {}
    for shape, _ in counts.most_common():
        by_method.setdefault(first[shape].method, []).append(shape)
    turns = [shapes[turn] for turn in range(len(counts)) for shapes in by_method.values() if turn < len(shapes)]
    return [first[shape] for shape in turns[:most]]


@dataclass(frozen=True)
class PackStatistics:
    """How trials train together: of `size(config)` that the searcher is asked for, those with that `pack_key`.

    `shares` are those of each key among the sweep's trials, and `most` is the largest size.
    """

    size: Callable[[TrialConfig], int]
    shares: Mapping[str, float]
    most: int = 1

    @staticmethod
    def of(configs: Sequence[TrialConfig], size: Callable[[TrialConfig], int]) -> PackStatistics:
        """By the keys of sampled trials."""
        counts = Counter(key for key in map(pack_key, configs) if key is not None)
        shares = {key: count / len(configs) for key, count in counts.items()}
        return PackStatistics(size, shares, max(map(size, configs), default=1))

    def number(self, config: TrialConfig) -> float:
        """How many there are on average in such a trial's pack, itself counted."""
        key = pack_key(config)
        return 1.0 if key is None else 1 + (self.size(config) - 1) * self.shares.get(key, 0.0)


ALONE = PackStatistics(lambda config: 1, {})


class SpeedTable:
    """Measured speeds by shape; a shape that wasn't measured goes as its method does on average."""

    def __init__(self, measured: Mapping[str, tuple[str, TrialSpeed]]) -> None:
        self._measured = {shape: speed for shape, (_, speed) in measured.items()}
        by_method: dict[str, list[TrialSpeed]] = {}
        for method, speed in measured.values():
            by_method.setdefault(method, []).append(speed)
        self._means = {
            # Of time alone: memory has no use for a mean.
            method: TrialSpeed(
                sum(one.seconds_per_train_image for one in speeds) / len(speeds),
                sum(one.eval_seconds for one in speeds) / len(speeds),
                host_bytes=0,
                device_bytes=0,
                extra_member_seconds=_mean(
                    [one.extra_member_seconds for one in speeds if one.extra_member_seconds is not None]
                ),
            )
            for method, speeds in by_method.items()
        }

    def epoch_seconds(
        self, config: TrialConfig, num_train: int, num_val: int, num_workers: int, together: float = 1.0
    ) -> float | None:
        """Seconds of one epoch with its validation, or a trial's share of a pack's.

        None where nothing of the method was measured.
        """
        speed = self._measured.get(cost_key(config)) or self._means.get(config.method)
        return None if speed is None else speed.epoch_seconds(num_train, num_val, num_workers, together)


def num_epochs(config: TrialConfig, num_train: int) -> float:
    """Passes over the training images, of the first stage; one without any for a method that trains nothing."""
    if config.train is None:
        return 1.0
    if config.train.num_steps is not None:
        return config.train.num_steps * config.train.batch_size / max(1, num_train)
    return float(config.train.num_epochs or 1)


def trial_seconds(
    spec: SweepSpec,
    configs: Sequence[TrialConfig],
    speeds: SpeedTable,
    num_train: int,
    num_val: int,
    start: float,
    together: PackStatistics = ALONE,
) -> float | None:
    """Mean seconds of a trial that comes to its end, its share of a pack's; None where some method has no speed."""
    total = 0.0
    for config in configs:
        number = together.number(config)
        epoch = speeds.epoch_seconds(config, num_train, num_val, spec.num_workers, number)
        if epoch is None:
            return None
        total += start / number + epoch * num_epochs(config, num_train)
    return total / len(configs)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def expected_asha_fraction(spec: SweepSpec) -> float:
    """The share of all epochs that ASHA runs where exactly one in `reduction_factor` goes on at every rung."""
    config = spec.trial_scheduler
    if not isinstance(config, AshaConfig):
        return 1.0
    share, going_on, rung = 0.0, 1.0, 0.0
    reach = config.grace_fraction
    while rung < 1:
        share += going_on * (min(1.0, reach) - rung)
        rung, reach, going_on = min(1.0, reach), reach * config.reduction_factor, going_on / config.reduction_factor
    return share


@dataclass(frozen=True)
class Estimate:
    """Seconds of wall time of each phase."""

    features: float | None
    baselines: Interval | None
    trials: Interval | None
    refits: Interval | None

    @property
    def total(self) -> Interval | None:
        """None where a phase isn't known."""
        if self.baselines is None or self.trials is None or self.refits is None or self.features is None:
            return None
        return self.baselines + self.trials + self.refits + Interval(self.features, self.features)


def estimate(
    sweep: ResolvedSweep,
    configs: Sequence[TrialConfig],
    baselines: Sequence[Baseline],
    speeds: SpeedTable,
    rows: SplitSizes,
    concurrent: int,
    start: float,
    features: float | None,
    together: PackStatistics = ALONE,
) -> Estimate:
    """Wall time with so many trials, or packs of them, at once, each as fast as it was alone.

    At most: every trial to its end, and probes that never lose patience. At least: ASHA stops all that it may, and
    probes give up as soon as they can. The best few's runs with more seeds count to the trials.
    """
    spec = sweep.spec
    mean = trial_seconds(spec, configs, speeds, rows.train, rows.val, start)
    share = trial_seconds(spec, configs, speeds, rows.train, rows.val, start, together)
    number, trials = min(sweep.num_trials, spec.max_trials or sweep.num_trials), None
    if mean is not None and share is not None:
        found = Interval(share * expected_asha_fraction(spec), share).times(number / concurrent)
        num_again = spec.confirm_trials * len(spec.more_seeds)
        again = mean * num_again / min(concurrent, max(1, num_again))
        trials = Interval(max(found.low, mean) + again, max(found.high, mean) + again)
    return Estimate(
        features,
        _baselines(spec, baselines, speeds, rows, concurrent, start),
        trials,
        _refits(sweep, configs, baselines, speeds, rows, concurrent, start),
    )


def _baselines(
    spec: SweepSpec, baselines: Sequence[Baseline], speeds: SpeedTable, rows: SplitSizes, concurrent: int, start: float
) -> Interval | None:
    found = Interval(0.0, 0.0)
    for one in baselines:
        epoch = speeds.epoch_seconds(one.config, rows.train, rows.val, spec.num_workers)
        if epoch is None:
            return None
        most = num_epochs(one.config, rows.train)
        found += Interval(start + epoch * min(most, one.patience or most), start + epoch * most)
    return found.times(1 / concurrent)


def _refits(
    sweep: ResolvedSweep,
    configs: Sequence[TrialConfig],
    baselines: Sequence[Baseline],
    speeds: SpeedTable,
    rows: SplitSizes,
    concurrent: int,
    start: float,
) -> Interval | None:
    """The winner, taken for a mean trial, and the best probe over the seeds, zero-shot once; in a study all trials."""
    spec = sweep.spec
    seeds, num_refits = len(spec.refit_seeds), sweep.num_trials if spec.study else 1
    winner = trial_seconds(spec, configs, speeds, rows.refit, 0, start)
    again = {one.config.method: one for one in baselines}
    if winner is None:
        return None
    found = Interval(winner, winner).times(seeds * num_refits)
    for one in again.values():
        epoch = speeds.epoch_seconds(one.config, rows.refit, 0, spec.num_workers)
        if epoch is None:
            return None
        most, times = num_epochs(one.config, rows.refit), 1 if one.config.train is None else seeds
        found += Interval(start + epoch, start + epoch * most).times(times)
    return found.times(1 / min(concurrent, (1 + num_refits) * seeds + 1))


def gpu_hours(seconds: Interval, num_gpus: float) -> Interval:
    """Hours of all GPUs that stand by while the sweep runs: those are what is paid for."""
    return seconds.times(num_gpus / 3600)
