"""The plan of a sweep: how its trials fall on the strata, what they would read, take and cost."""

from __future__ import annotations

import io
import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_images import TinyImages, extraction_in_this_process

from imbvlm.base.console import Console
from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.base.formatting import size_text
from imbvlm.cli import sweep_script
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.store_sizes import DISK_MARGIN
from imbvlm.ray_runtime.cluster_resources import Cluster
from imbvlm.sweep.plan.cost_estimate import cost_key, expected_asha_fraction, most_common_shapes, sample_trials
from imbvlm.sweep.plan.plan_text import DRY_RUN, describe_plan, plan_to_dict
from imbvlm.sweep.plan.speed_benchmark import EncoderSpeed, Machine, SpeedBenchmark, TrialSpeed, measure_speeds
from imbvlm.sweep.plan.sweep_plan import MAX_SHAPES, make_plan, measure_here
from imbvlm.sweep.records.adjustment_selection import max_logit_files
from imbvlm.sweep.run.run_phases import run_sweep
from imbvlm.sweep.spec.baselines import HEADS
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.spec_overrides import with_settings
from imbvlm.sweep.spec.sweep_spec import SweepSpec

BASE: dict[str, Any] = {
    "data": {"manifest": "embedded:fashion_mnist_lt"},
    "encoder": {"name": "tinylit_lite0", "image_size": 64},
    "method": "linear_probe",
}
SPACE = {
    "parameters": {
        "loss.name": {"choice": ["cross_entropy", "focal", "balanced_softmax"]},
        "data.class_sampling": {"choice": ["instance_balanced", "square_root"]},
        "optim.lr": {"loguniform": [0.01, 1.0]},
    }
}


pytestmark = pytest.mark.usefixtures("own_machine")


def spec(**fields: Any) -> SweepSpec:
    return SweepSpec.from_tree({"name": "small", "base": BASE, "space": SPACE, **fields})


@pytest.mark.parametrize(
    ("num_trials", "says"),
    [
        (12, "6 of loss.name x data.class_sampling, 2 trials each"),
        (
            14,
            "14 isn't a multiple, so 2 have 3 trials and 4 have 2; num_trials 12 or 18 gives each the same",
        ),
        (4, "num_trials 4 isn't a multiple, so 4 have 1 trial and 2 have 0; num_trials 6 gives each the same"),
    ],
)
def test_trials_that_do_not_fall_evenly_on_the_strata_are_said(num_trials: int, says: str) -> None:
    text = describe_plan(make_plan(spec(num_trials=num_trials, stratify=["loss.name", "data.class_sampling"]), None))
    assert says in text


def test_what_a_sampler_leaves_to_chance_is_said() -> None:
    text = describe_plan(make_plan(spec(searcher={"name": "cmaes"}), None))
    assert "searcher    cmaes, seed 0, the first 1 of the trials at random" in text
    assert "searcher cmaes samples choices and keys under `when` at random: loss.name, data.class_sampling" in text
    assert "nsga2, seed 0, all trials at random" in describe_plan(make_plan(spec(searcher={"name": "nsga2"}), None))


def known_speeds(spec: SweepSpec, trials: Sequence[TrialConfig], encoders: Sequence[TrialConfig]) -> SpeedBenchmark:
    """A millisecond an image in training, a tenth of it in evaluation; one to read an image and three to encode it."""
    speeds = tuple(TrialSpeed(0.0 if config.train is None else 1e-3, 1e-4, 700_000_000, 0) for config in trials)
    return SpeedBenchmark(Machine("desk", "cpu", 1), speeds, (EncoderSpeed(1e-3, 3e-3),) * len(encoders), 1.0)


def test_times_and_money_are_the_measured_speeds_times_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By hand, for 2,480 training, 500 validation and 2,000 test images."""
    settings = {
        "base": {**BASE, "train": {"num_epochs": 5}}, "num_trials": 12, "storage": str(tmp_path),
        "gpus_per_worker": 1.0, "price_per_gpu_hour": 2.0, "max_concurrent_trials": 2, "refit_seeds": [0, 1],
        "trial_scheduler": {"name": "none"}, "max_hours": 0.01, "confirm_folds": None,
    }  # fmt: skip
    monkeypatch.setattr("imbvlm.sweep.plan.sweep_plan.SECONDS_HERE", 0.0)
    monkeypatch.setattr("imbvlm.sweep.plan.sweep_plan._cpus", lambda: 2)
    plan = make_plan(spec(**settings), known_speeds)
    content = plan_to_dict(plan)
    # 2.48 s of training and 0.05 s of evaluation; zero-shot and the heads evaluate alone.
    assert [measured["epoch_seconds"] for measured in content["measured"]] == pytest.approx([2.53, *[0.05] * 4])
    assert content["mean_epochs"] == 5
    seconds = content["seconds"]
    # 12 trials, two at a time, of 0.4 + 5 x 2.53 = 13.05 s.
    assert seconds["trials"] == pytest.approx([78.3, 78.3])
    # Zero-shot and three heads in 0.45 s each, and the probe in 0.4 s and 10 epochs (its patience) to 100 epochs.
    assert seconds["baselines"] == pytest.approx([13.75, 127.6])
    # The winner, or eight members of a blend, twice in 12.8 s; the probe twice, in 2.88 s (one epoch) to 248.4 s; the
    # others in 0.4 s each.
    assert seconds["refits"] == pytest.approx([16.48, 351.6])
    # Two passes that start in 8 s, and 4,980 images of 4 ms on two CPUs.
    assert seconds["features"] == pytest.approx(25.96)
    assert seconds["total"] == pytest.approx([134.49, 583.46])
    # Two GPUs at 2 an hour.
    assert content["gpu_hours"] == pytest.approx([0.074717, 0.324145], rel=1e-4)
    assert content["cost"] == pytest.approx([0.149433, 0.648289], rel=1e-4)
    text = describe_plan(plan)
    assert re.search("^linear probe +tinylit_lite0 64 px ", text, re.MULTILINE), "rows of two sizes look alike"
    # 13 refits at most, eight of them of a blend and five of baselines, over two seeds.
    assert f"logits      of the test split by refits, up to {2 * 2000 * 10 * 13 * 2 / 1e6:.1f} MB" in text
    assert "NOT HERE    a trial needs 1 GPU (num_workers 1 x gpus_per_worker 1)" in text
    assert "max_hours   0.01: will end the search early" in text
    assert "at 2 per GPU-hour, all 2 GPUs paid for" in text
    monkeypatch.setattr("imbvlm.sweep.plan.sweep_plan.SECONDS_HERE", 10.0)
    monkeypatch.setattr("imbvlm.sweep.plan.sweep_plan.find_cluster", lambda: None)
    # The sweep's own process encodes so few images without starting a worker.
    assert plan_to_dict(make_plan(spec(**settings), known_speeds))["seconds"]["features"] == pytest.approx(9.96)


def test_a_small_validation_split_is_confirmed_over_folds_and_the_plan_says_what_it_costs(tmp_path: Path) -> None:
    """By hand: five models of 1,984 images that score 2,480 training images, and 500 validation images with them."""
    settings = {
        "base": {**BASE, "train": {"num_epochs": 5}}, "num_trials": 12, "storage": str(tmp_path),
        "max_concurrent_trials": 2, "trial_scheduler": {"name": "none"}, "max_pack_size": 1, "cpus_per_worker": 0.1,
    }  # fmt: skip
    plan, without = (make_plan(spec(**settings, confirm_folds=folds), known_speeds) for folds in (5, None))
    assert plan.estimate is not None
    before = plan_to_dict(without)
    assert plan_to_dict(plan)["seconds"]["baselines"] == before["seconds"]["baselines"]
    # An epoch is 5 x 1.984 + 0.248 s, and a trial 0.4 s and 5 epochs: eight of them. Zero-shot and three heads have
    # 0.4 s and one evaluation, the probe 0.4 s and 10 to 100 epochs.
    baselines = [4 * 0.648 + 0.4 + number * 10.168 for number in (10, 100)]
    expected = [78.3 + (8 * 51.24 + seconds) / 2 for seconds in baselines]
    assert plan_to_dict(plan)["seconds"]["trials"] == pytest.approx(expected)
    assert plan.estimate.over_folds is not None
    from_start = [plan.estimate.over_folds.low, plan.estimate.over_folds.high]
    assert from_start == pytest.approx([(12 * 51.24 + seconds) / 2 for seconds in baselines])
    # Files of five baselines and eight trials: two epochs' logits of 2,980 rows, targets, folds, and counts.
    extra = 13 * (4 * 2980 * 10 + 8 * 2980 + 8 * 6 * 10)
    assert plan.logit_bytes == without.logit_bytes + extra
    text = " ".join(describe_plan(plan).split())
    assert (
        "validation 500 images tell balanced accuracy over 10 of 10 classes to ± 4.4 points, few-shot to ± 9.8 (95 %, "
        "at worst), too little to select by: the best 8 trials and the baselines are scored again over 5 folds of the "
        "training images, on 2,480 of these and on validation; folds from the start would make baselines and trials "
        "take "
    ) in text
    assert "again over" not in describe_plan(without)
    unmeasured = " ".join(describe_plan(make_plan(spec(**settings), None)).split())
    assert "would make baselines and trials take 5 times as long; confirm_folds: null turns them off" in unmeasured
    for fields in ({"select_by": "objective"}, {"objective": "val/few_shot_accuracy"}):
        assert "again over" not in describe_plan(make_plan(spec(**settings, **fields), None))


def test_trials_that_train_together_are_counted_as_packs(tmp_path: Path) -> None:
    """Half of the trials share a class sampling: a pack of up to 5 has 1 + 4 / 2 = 3 of them on average."""
    settings = {
        "base": {**BASE, "train": {"num_epochs": 5}}, "num_trials": 400, "storage": str(tmp_path),
        "stratify": ["data.class_sampling"], "max_concurrent_trials": 1, "trial_scheduler": {"name": "none"},
        "refit_seeds": [0], "confirm_folds": None,
    }  # fmt: skip

    def speeds(spec: SweepSpec, trials: Sequence[TrialConfig], encoders: Sequence[TrialConfig]) -> SpeedBenchmark:
        benchmark = known_speeds(spec, trials, encoders)
        return replace(benchmark, trials=tuple(replace(speed, extra_member_seconds=1e-4) for speed in benchmark.trials))

    packed, alone = (make_plan(spec(**settings, max_pack_size=size), speeds) for size in (5, 1))
    together, apart = plan_to_dict(packed), plan_to_dict(alone)
    # 400 trials of 13.05 s.
    assert apart["seconds"]["trials"] == pytest.approx([5220, 5220])
    # A third of the start, and of 1.2 ms an image: 0.1333 + 5 x (0.992 + 0.05) = 5.3433 s.
    assert together["seconds"]["trials"] == pytest.approx([2137, 2137], rel=0.02)
    assert together["seconds"]["refits"] == apart["seconds"]["refits"]
    assert (together["pack_size"], apart["pack_size"]) == (5, 1)
    assert "up to 5 train together" in describe_plan(packed)
    # The live view counts the same way.
    assert "1 process at a time, of up to 5 trials that train together" in describe_plan(packed)
    assert "1 trial at a time" in describe_plan(alone)
    assert "train together" not in describe_plan(alone)
    # A sweep that judges trials by their time trains each alone.
    timed = make_plan(spec(**settings, max_pack_size=5, constraints={"time/train_seconds": 9.0}), None)
    assert plan_to_dict(timed)["pack_size"] == 1


def test_no_more_trials_are_counted_than_a_limit_lets_start_and_cpus_cost_nothing(tmp_path: Path) -> None:
    settings = {
        "storage": str(tmp_path), "num_trials": 40, "trial_scheduler": {"name": "none"}, "confirm_folds": None,
    }  # fmt: skip
    whole, limited = (make_plan(spec(**settings, max_trials=most), known_speeds) for most in (None, 10))
    assert whole.estimate is not None
    assert limited.estimate is not None
    assert whole.estimate.trials.high == pytest.approx(4 * limited.estimate.trials.high)
    priced = make_plan(spec(**settings, price_per_gpu_hour=2.0), known_speeds)
    assert "cost        nothing: price_per_gpu_hour is set, and no GPU is used" in describe_plan(priced)
    rented = make_plan(spec(**settings, price_per_machine_hour=0.5, max_cost=100.0), known_speeds)
    assert rented.estimate is not None
    total = rented.estimate.total
    assert total is not None
    assert plan_to_dict(rented)["cost"] == pytest.approx([total.low * 0.5 / 3600, total.high * 0.5 / 3600])
    assert "at 0.5 an hour, 1 machine paid for" in describe_plan(rented)
    assert "max_cost    100: enough" in describe_plan(rented)


def test_a_plan_counts_in_singular_and_small_sizes_in_kilobytes() -> None:
    """`1 worker(s) of 1 CPUs`, `0.00 GB` and `1 views` stood there."""
    text = describe_plan(make_plan(spec(gpus_per_worker=0.5), None, 1))
    assert "a trial has 1 worker of 1 CPU and 0.5 GPUs" in text
    assert " and 1 GPU," in text
    assert re.search(r"; features \d+\.\d MB \([a-z_, ]+, 1 view\)", text)
    assert [size_text(size) for size in (0, 2_048, 1_000_000)] == ["0.0 MB", "2.0 kB", "1.0 MB"]


def test_a_plan_on_a_terminal_of_80_columns_is_wrapped_below_its_labels() -> None:
    plan = make_plan(spec(num_trials=14, stratify=["loss.name", "data.class_sampling"]), known_speeds)
    # Whether or not a test before this one has left a cluster running.
    plan = replace(plan, machine="a running Ray cluster of 12 machines, 96 CPUs and 24 GPUs of two kinds")
    lines = describe_plan(plan, 80).splitlines()
    assert max(map(len, lines)) <= 80
    start = next(index for index, line in enumerate(lines) if line.startswith("  strata      6 of loss.name"))
    assert lines[start + 1].startswith(" " * 14 + "multiple, so 2 have 3 trials")
    assert "".join("".join(lines).split()) == "".join(describe_plan(plan).split())


def test_a_cluster_of_one_machine_is_counted_in_singular(monkeypatch: pytest.MonkeyPatch) -> None:
    for nodes, says in ((((4.0, 0.0),), "1 machine"), (((4.0, 0.0), (2.0, 0.0)), "2 machines")):
        cluster = Cluster("127.0.0.1:8265", sum(cpus for cpus, _ in nodes), 0.0, False, nodes, nodes)
        monkeypatch.setattr("imbvlm.sweep.plan.sweep_plan.existing_cluster", nullcontext)
        monkeypatch.setattr("imbvlm.sweep.plan.sweep_plan.find_cluster", lambda cluster=cluster: cluster)
        assert f"would run on the cluster that runs ({says}), " in describe_plan(make_plan(spec(), None))


def test_a_store_that_the_disk_cannot_hold_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("imbvlm.base.storage.free_bytes", lambda uri: 1_000_000)
    found = make_plan(spec(storage=str(tmp_path)), None)
    assert plan_to_dict(found)["fits_disk"] is False
    assert "ONLY 1.0 MB free: reduce features.num_views or features.precision" in describe_plan(found)


@pytest.mark.parametrize(
    ("counts", "fields", "says"),
    [
        ([1, 1, 1], {}, "no class has a validation image"),
        ([4, 4, 4], {"num_folds": 1}, "no class has a validation image"),
        ([40, 1], {"objective": "val/few_shot_accuracy"}, "no few_shot class has a validation image here"),
        ([40], {}, "training images are of 1 class"),
    ],
)
def test_a_plan_refuses_the_data_that_the_sweep_would_refuse(
    tmp_path: Path, counts: list[int], fields: dict[str, str], says: str
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    table = pa.table({"bytes": [str(n).encode() for n in range(len(labels))], "label": labels,
                      "split": ["train"] * len(labels)})  # fmt: skip
    path = str(tmp_path / "few.parquet")
    Manifest.build(table, [f"class {n}" for n in range(len(counts))], "few").write(path)
    with pytest.raises(ConfigError, match=says):
        make_plan(with_settings(spec(**fields), {"data.manifest": path}), None)


def test_the_disk_must_hold_what_lies_beside_the_numbers_as_the_pass_asks_for(tmp_path: Path) -> None:
    plan = make_plan(spec(storage=str(tmp_path)), None)
    for share, fits in ((1.01, False), (1.03, True)):
        assert replace(plan, free_bytes=int(share * plan.missing_bytes)).fits_disk is fits


def test_a_sweep_refuses_before_its_first_pass_what_the_plan_calls_too_much(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Training and validation rows would fit, and the whole search run before the test split's fill the disk."""
    cluster, passes = Cluster("", 1.0, 0.0, True, ((1.0, 0.0),), ((1.0, 0.0),)), []
    monkeypatch.setattr("imbvlm.sweep.run.run_phases.ray_session", lambda *given, **settings: nullcontext(cluster))
    monkeypatch.setattr("imbvlm.sweep.run.extract_phase.ensure_features", lambda *args, **more: passes.append(args))
    made = spec(storage=str(tmp_path))
    needed = make_plan(made, None).missing_bytes
    monkeypatch.setattr("imbvlm.base.storage.free_bytes", lambda uri: int(0.9 * needed))
    with pytest.raises(ImbvlmError, match=r"the stored features need .* more .*Reduce features\.num_views"):
        run_sweep(made, str(tmp_path / "sweep"), Console(io.StringIO()))
    assert not passes
    assert not (tmp_path / "features").exists()


def test_validation_logits_are_planned_and_a_disk_that_cannot_hold_them_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Features would fit, and what trials leave would fill the disk in the middle of the search."""
    settings = {
        "storage": str(tmp_path), "num_trials": 100, "max_concurrent_trials": 2, "cpus_per_worker": 0.1,
        "confirm_folds": None,
    }  # fmt: skip
    made = spec(**settings, max_pack_size=5)
    plan = make_plan(made, None)
    # Five baselines, the best 8, 30 candidates, and two running packs of 5. Each file has two epochs' logits (500 x 10)
    # in half precision, 500 targets and 10 pairs of counts.
    assert plan_to_dict(plan)["logit_bytes"] == 53 * (20_000 + 2_000 + 160)
    assert plan_to_dict(make_plan(spec(**settings, max_pack_size=5, select_by="objective"), None))["logit_bytes"] == (
        23 * (20_000 + 2_000 + 160)
    )
    few = spec(**{**settings, "num_trials": 4})
    assert max_logit_files(few.resolve(), 10, 1) == 9
    assert "logits      of validation, up to 1.2 MB" in describe_plan(plan)
    features = plan.missing_bytes * DISK_MARGIN
    assert plan.fits_disk
    monkeypatch.setattr("imbvlm.base.storage.free_bytes", lambda uri: int(features + 0.9 * plan.logit_bytes))
    full = make_plan(made, None)
    assert not full.fits_disk
    assert "left for them: lower max_concurrent_trials or max_pack_size" in describe_plan(full)
    cluster, passes = Cluster("", 1.0, 0.0, True, ((1.0, 0.0),), ((1.0, 0.0),)), []
    monkeypatch.setattr("imbvlm.sweep.run.run_phases.ray_session", lambda *given, **settings: nullcontext(cluster))
    monkeypatch.setattr("imbvlm.sweep.run.extract_phase.ensure_features", lambda *args, **more: passes.append(args))
    for room, says in ((features + 0.9 * plan.logit_bytes, "trials' validation logits up to 1.2 MB"),
                       (0.9 * plan.logit_bytes, "the validation logits of trials need up to 1.2 MB")):  # fmt: skip
        monkeypatch.setattr("imbvlm.base.storage.free_bytes", lambda uri, room=room: int(room))
        with pytest.raises(ImbvlmError, match=says):
            run_sweep(made, str(tmp_path / "sweep"), Console(io.StringIO()))
    assert not passes


def test_copies_that_hold_one_trial_and_not_those_of_all_towers_are_said(tmp_path: Path) -> None:
    """What one trial reads is one output of all splits, and image embeddings of the test split for a refit."""
    space = {"parameters": {**SPACE["parameters"], "encoder.image_size": {"choice": [64, 96]}}}
    plan = make_plan(spec(storage=str(tmp_path), space=space), None)

    def words(gigabytes: float, concurrent: int = 2) -> str:
        copies = FeatureCacheConfig(folder=str(tmp_path), max_gigabytes=gigabytes, of_shared_folders=True)
        limited = plan.spec.model_copy(update={"feature_copies": copies}).resolve()
        return describe_plan(replace(plan, sweep=limited, concurrent=concurrent))

    first, second = plan.encoders
    # In half precision: 1,280 numbers of 4,980 images, and 384 of the 2,000 test images.
    assert first.trial_bytes == second.trial_bytes == 2 * (4_980 * 1_280 + 2_000 * 384)
    both = 2 * first.trial_bytes / 1e9
    assert "TOO LITTLE for trials of several encoders at once, which read them in place" in words(both / 1.1)
    assert "TOO LITTLE" not in words(both / 1.1, concurrent=1) + words(both * 1.1)
    assert "so that trials read the features in place" in words(both / 3)


@pytest.mark.parametrize(("grace", "factor", "share"), [(1 / 3, 3, 1 / 3 + 1 / 3 * 2 / 3), (0.25, 2, 0.5), (1.0, 3, 1)])
def test_what_asha_runs_at_least(grace: float, factor: int, share: float) -> None:
    scheduler = {"name": "asha", "grace_fraction": grace, "reduction_factor": factor}
    assert expected_asha_fraction(spec(trial_scheduler=scheduler)) == pytest.approx(share)


def test_every_method_is_measured_before_any_has_two_kinds() -> None:
    space = {"parameters": {"method": {"choice": ["linear_probe", "decoder"]},
             "decoder.depth": {"int": [1, 4], "when": {"method": "decoder"}}}}  # fmt: skip
    made = SweepSpec.from_tree({"name": "s", "base": {k: v for k, v in BASE.items() if k != "method"}, "space": space})
    sample = sample_trials(check_spec(made))
    assert {one.method for one in most_common_shapes(sample, 2)} == {"linear_probe", "decoder"}
    assert len({cost_key(one) for one in most_common_shapes(sample, 9)}) == 5


def test_times_of_many_encoders_are_estimated_from_one_of_each_method() -> None:
    """Five baselines of each of seven sizes: the phase was unknown where all of them were too many to measure."""
    sizes = {"encoder.image_size": {"choice": list(range(64, 120, 8))}}
    plan = make_plan(spec(space={"parameters": {**SPACE["parameters"], **sizes}}), known_speeds)
    assert "after 35 baselines" in describe_plan(plan)
    assert {config.method for config in plan.measured} == {"linear_probe", "zero_shot", *HEADS}
    assert len(plan.measured) <= 2 * MAX_SHAPES
    assert plan.estimate is not None
    assert plan.estimate.total is not None


def test_a_head_takes_time_for_each_image_that_it_is_built_from(tmp_path: Path) -> None:
    """Also where no class has enough images to hold some out: folds score it there."""
    labels = np.repeat(np.arange(5, dtype=np.int32), 4)
    table = pa.table({"bytes": [b""] * 20, "label": labels, "split": ["train"] * 20})
    Manifest.build(table, [f"class {n}" for n in range(5)], "made").write(str(tmp_path / "few.parquet"))
    for manifest in (BASE["data"]["manifest"], str(tmp_path / "few.parquet")):
        base = {**BASE, "data": {"manifest": manifest}}
        for speed in measure_speeds([TrialConfig.from_tree({**base, "method": name}) for name in HEADS], [], 1).trials:
            assert isinstance(speed, TrialSpeed)
            assert speed.seconds_per_train_image > 0
            assert speed.eval_seconds > 0


def measure_first(
    apart: ProcessPoolExecutor, spec: SweepSpec, trials: Sequence[TrialConfig], encoders: Sequence[TrialConfig]
) -> SpeedBenchmark:
    """Measure the first trial, and make up the others' speeds."""
    (speed,) = apart.submit(measure_here, spec, trials[:1], []).result().trials
    benchmark = known_speeds(spec, trials, encoders)
    return replace(benchmark, trials=(speed, *benchmark.trials[1:]))


@pytest.mark.slow
def test_memory_grows_with_the_classes_and_a_calibration_leaves_nothing_behind(tmp_path: Path) -> None:
    """Logits and weights of 8,142 classes are what an out-of-memory error would be about."""
    sizes = []
    for num_classes in (10, 8142):
        # In a process of its own: what others have left of this one's heap would be taken before any new memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            labels = np.resize(np.arange(num_classes, dtype=np.int32), 10_000)
            table = pa.table({"bytes": [str(n).encode() for n in range(12_000)],
                              "label": np.concatenate([labels, labels[:2000]]),
                              "split": ["train"] * 10_000 + ["val"] * 2000})  # fmt: skip
            path = str(tmp_path / f"{num_classes}.parquet")
            Manifest.build(table, [f"class {n}" for n in range(num_classes)], "made").write(path)
            made = with_settings(spec(storage=str(tmp_path / "runs")), {"data.manifest": path, "train.batch_size": 256})
            plan = make_plan(made, partial(measure_first, apart))
            probe = plan_to_dict(plan)["measured"][0]
            assert probe["method"] == "linear_probe"
            assert probe["epoch_seconds"] > 0
            sizes.append(probe["host_bytes"])
    width, batch, rows = 1280, 256, 2000
    # Weights, gradients and momentum; at the least log-probabilities and the gradient of logits; validation logits.
    grown = 4 * 3 * 8132 * width + 4 * 2 * batch * 8132 + 2 * rows * 8132
    assert grown < sizes[1] - sizes[0] < 2 * grown
    assert not (tmp_path / "runs").exists()


def test_memory_inside_the_tower_is_that_of_the_batch_asked_for_and_not_of_the_step_measured(tmp_path: Path) -> None:
    """On a CPU a calibration takes steps of 8 images, and activations of 64 are eight times as much."""
    problem = TinyImages(tmp_path)
    trials = [problem.config("adapter", train__batch_size=size) for size in (8, 64)]
    small, large = measure_speeds(trials, [], 1).trials
    assert isinstance(small, TrialSpeed)
    assert isinstance(large, TrialSpeed)
    tokens, width, layers = 17, 32, 2
    # At least what each block keeps of attention and MLP: a dozen activations.
    assert large.host_bytes - small.host_bytes > 4 * 56 * tokens * width * layers * 12


def test_a_limit_on_money_needs_a_price() -> None:
    with pytest.raises(ConfigError, match="max_cost is 5, and without a price nothing has a cost"):
        check_spec(spec(max_cost=5.0))
    check_spec(spec(max_cost=5.0, price_per_gpu_hour=2.0))
    check_spec(spec(max_cost=5.0, price_per_machine_hour=2.0))
    with pytest.raises(ConfigError, match="a machine's price has its GPUs in it; set one of them"):
        check_spec(spec(price_per_gpu_hour=2.0, price_per_machine_hour=2.0))


def leave(capsys: pytest.CaptureFixture[str], made: SweepSpec, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        sweep_script.run_script(made, ["--dry-run", "--measure=no", *words])
    captured = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, captured.out, captured.err


def test_a_plan_of_what_cannot_run_here_is_printed_whole_and_leaves_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scripts ran `--dry-run && ...`, and it left with 0 without manifest, weights or GPU."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    fits = spec(storage=str(tmp_path))
    code, out, err = leave(capsys, fits)
    assert (code, err) == (0, "")
    assert "would run on " in out
    needs_gpu = with_settings(fits, {"gpus_per_worker": 8.0})
    everything = ["--manifest=none.parquet", "--set=encoder.name=openai_vit_b32"]
    code, out, err = leave(capsys, needs_gpu, *everything)
    assert code == 1
    assert out.rstrip().endswith(DRY_RUN)
    first, *lacking = err.splitlines()
    assert first == "imbvlm: the sweep can't run here:"
    for says, line in zip(
        (
            "manifest none.parquet (NOT THERE",
            "encoder openai_vit_b32 needs open_clip_model.safetensors or ",
            "a trial needs 8 GPUs",
        ),
        lacking,
        strict=True,
    ):
        assert line.startswith(f"  {says}")
    assert "NOT HERE    a trial needs 8 GPUs" in out
    # Another machine has its own files, and as many GPUs as are asked for.
    code, out, err = leave(capsys, needs_gpu, *everything, "--gpus=16")
    assert (code, err) == (0, "")
    assert "would run on another machine" in out
    assert "16 GPUs, 2 trials at a time" in out
    code, out, err = leave(capsys, needs_gpu, "--gpus=4")
    assert code == 1
    assert "can't run on another machine" in err
    with pytest.raises(SystemExit) as left:
        sweep_script.run_script(fits, ["--gpus=4"])
    assert left.value.code == 1
    assert "--gpus: only a plan can be for another machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_times_counts_what_is_stored_already(tmp_path: Path) -> None:
    """With `--measure no` all of it was to be written, whatever was there."""
    problem = TinyImages(tmp_path)
    config = problem.config("linear_probe", features__computed_in="float32")
    made = SweepSpec.from_tree({
        "name": "stored", "base": {key: config.to_tree()[key] for key in ("data", "encoder", "features", "method")},
        "space": SPACE, "storage": str(tmp_path / "runs"), "feature_folder": str(tmp_path / "features"),
    })  # fmt: skip
    assert plan_to_dict(make_plan(made, None))["towers"][0]["missing_bytes"] > 0
    with extraction_in_this_process():
        ensure_features(
            config, Manifest.read(problem.manifest), str(tmp_path / "features"),
            frozenset({"pooled", "image_embedding"}), ("train", "val", "test"), report=lambda text: None,
        )  # fmt: skip
    plan = make_plan(made, None)
    assert plan_to_dict(plan)["towers"][0]["missing_bytes"] == 0
    assert "features    all there already" in describe_plan(plan)
