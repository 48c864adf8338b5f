"""What could never run is refused with both numbers and the fix."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny_data import tiny_config, tiny_info
from towers import write_tower

from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.base.schema import Tree
from imbvlm.base.yaml_file import YamlTree
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.models.encoders.encoder_factory import describe_encoder
from imbvlm.ray_runtime.cluster_resources import Cluster, _autoscaled_workers
from imbvlm.sweep.plan.feasibility import (
    check_data,
    check_model,
    concurrent_trials,
    driver_of,
    needed_outputs,
    packing,
    trials_at_once,
    untried_methods,
    uses_ray_train,
)
from imbvlm.sweep.spec.baselines import encoder_configs, feature_key
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

BASE = {"data": {"manifest": "m"}, "encoder": {"name": "tiny"}, "method": "decoder"}
# The first one has no method, and takes that of the base.
LISTED = {"configurations": {"low-rate": {"optim.lr": 0.1}, "probe": {"method": "linear_probe"}}}


def sweep(**fields: Any) -> ResolvedSweep:
    return SweepSpec.from_tree({"name": "s", "base": BASE, "space": {"parameters": {}}, **fields}).resolve()


@pytest.mark.parametrize(
    ("fields", "ray_train"),
    [
        ({}, False),
        ({"num_workers": 2}, True),
        ({"driver": "ray_train"}, True),
        ({"base": {**BASE, "features": {"store": False}}}, True),
        ({"driver": "in_process"}, False),
        ({"base": {**BASE, "method": "adapter"}}, True),
        ({"space": {"parameters": {"method": {"choice": ["decoder", "fine_tuning"]}}}}, True),
        ({"space": {"parameters": {"method": {"choice": ["decoder", "linear_probe"]}}}}, False),
        ({"space": {"parameters": {"features.store": {"choice": [True, False]}}}}, True),
        ({"base": {**BASE, "method": "adapter"}, "driver": "in_process"}, False),
        ({"base": {**BASE, "method": "adapter"}, "space": LISTED}, True),
    ],
)
def test_the_driver_that_auto_means(fields: dict[str, Any], ray_train: bool) -> None:
    assert uses_ray_train(sweep(**fields)) == ray_train
    assert driver_of(sweep(**fields)) == ("ray_train" if ray_train else "in_process")


@pytest.mark.parametrize(
    ("fields", "search", "config", "driver"),
    [
        ({}, "ray_train", {}, "in_process"),
        ({}, "ray_train", {"method": "adapter"}, "ray_train"),
        ({}, "ray_train", {"features": {"store": False}}, "ray_train"),
        ({"num_workers": 2}, "ray_train", {}, "ray_train"),
        ({"driver": "ray_train"}, "ray_train", {}, "ray_train"),
        ({"driver": "in_process"}, "in_process", {"method": "adapter"}, "in_process"),
    ],
)
def test_a_baseline_of_a_search_in_the_encoder_runs_in_process(
    fields: dict[str, Any], search: str, config: dict[str, Any], driver: str
) -> None:
    space = {"parameters": {"method": {"choice": ["linear_probe", "adapter"]}}}
    of = sweep(space=space, **fields)
    assert driver_of(of) == search
    assert driver_of(of, TrialConfig.from_tree({**BASE, "method": "linear_probe", **config})) == driver


def test_what_a_configuration_without_a_method_reads_is_needed() -> None:
    made = sweep(space=LISTED)
    assert [config.method for config in made.corner_trials()] == ["decoder", "linear_probe"]
    assert "tokens" in needed_outputs(made)
    assert "tokens" not in needed_outputs(sweep(base={**BASE, "method": "linear_probe"}, space=LISTED))


@pytest.mark.parametrize(
    ("fields", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0, 2),
        ({"cpus_per_worker": 0.5}, 2, 0, 4),
        ({"cpus_per_worker": 0.1}, 1, 0, 10),  # not 9 by a rounding error
        ({"max_concurrent_trials": 1}, 4, 0, 1),
        ({"driver": "ray_train"}, 2, 0, 1),  # two drivers and two workers on two CPUs would wait for each other
        ({"driver": "ray_train", "cpus_per_worker": 0.5}, 2, 0, 3),
        ({"num_workers": 2}, 8, 0, 3),
        ({"gpus_per_worker": 1, "cpus_per_worker": 4}, 64, 8, 8),
        ({"gpus_per_worker": 1, "cpus_per_worker": 8}, 36, 8, 4),
        ({"gpus_per_worker": 0.25}, 64, 2, 8),
    ],
)
def test_how_many_run_at_once(fields: dict[str, Any], cpus: float, gpus: float, expected: int) -> None:
    assert concurrent_trials(sweep(**fields), cpus, gpus) == expected


@pytest.mark.parametrize(
    ("fields", "cpus", "gpus", "says"),
    [
        (
            {"num_workers": 8},
            2,
            0,
            r"needs 8.01 CPUs \(num_workers 8 x cpus_per_worker 1 \+ 0.01 for its driver\) and the cluster has 2; "
            "lower num_workers or cpus_per_worker",
        ),
        (
            {"gpus_per_worker": 1},
            2,
            0,
            r"needs 1 GPU \(num_workers 1 x gpus_per_worker 1\) and the cluster has 0; "
            r"lower num_workers or gpus_per_worker \(0 trains on CPUs\)",
        ),
        ({"driver": "in_process", "num_workers": 2}, 8, 0, "in_process runs one worker a trial and num_workers is 2"),
        (
            {"max_concurrent_trials": 5},
            2,
            0,
            "max_concurrent_trials is 5 and the cluster holds 2 trials .*Set it to 2 or null",
        ),
        ({"driver": "ray_train", "cpus_per_worker": 1}, 1, 0, "needs 1.01 CPUs"),
    ],
)
def test_what_never_fits_is_refused(fields: dict[str, Any], cpus: float, gpus: float, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        concurrent_trials(sweep(**fields), cpus, gpus)


def test_all_that_lacks_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        concurrent_trials(sweep(num_workers=4, gpus_per_worker=2, driver="in_process"), 2, 1)
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"gpus_per_worker": 8}, "gpus_per_worker"),
        ({"gpus_per_worker": 1, "num_workers": 4}, "num_workers"),
        ({"cpus_per_worker": 64}, "cpus_per_worker"),
        ({"num_workers": 64}, "num_workers"),
        ({"driver": "in_process", "num_workers": 2}, "driver"),
    ],
)
def test_the_place_of_what_lacks_is_that_of_the_key_to_lower(fields: dict[str, Any], key: str) -> None:
    """Too many GPUs were said at the line of `num_workers`, or at none where only the GPUs were set."""
    tree = {**sweep().spec.to_tree(), "num_workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1, **fields}
    places = {(name,): f"x.yaml:{line}" for line, name in enumerate(tree, 1)}
    made = SweepSpec.from_tree(YamlTree(tree, "x.yaml", places)).resolve()
    with pytest.raises(ConfigError) as error:
        concurrent_trials(made, 8, 2)
    assert [one.where for one in error.value.problems] == [places[(key,)]]


def test_a_worker_must_fit_on_one_machine() -> None:
    nodes = [(4.0, 0.0), (4.0, 0.0)]
    with pytest.raises(
        ConfigError, match="a worker needs 6 CPUs and 0 GPUs on one machine, and the largest has 4 CPUs"
    ):
        concurrent_trials(sweep(cpus_per_worker=6), 8, 0, nodes)
    assert concurrent_trials(sweep(cpus_per_worker=3), 8, 0, nodes) == 2
    with pytest.raises(ConfigError, match=r"a trial of 3 workers .* doesn't fit on this cluster's machines"):
        concurrent_trials(sweep(cpus_per_worker=2.5, num_workers=3), 8, 0, nodes)


def test_objectives_that_the_data_can_not_give() -> None:
    stats = ClassStats.from_counts([200, 50, 3])
    check_data(sweep().spec, stats, [3, 0, 0])
    check_data(sweep(objective="val/many_shot_accuracy").spec, stats, [3, 0, 0])
    with pytest.raises(
        ConfigError, match="no few_shot class has a validation image here; choose val/balanced_accuracy"
    ):
        check_data(sweep(objective="val/few_shot_accuracy").spec, stats, [3, 3, 0])
    with pytest.raises(ConfigError, match="no class has a validation image"):
        check_data(sweep().spec, stats, [0, 0, 0])


def test_a_single_class_is_nothing_to_tell_apart() -> None:
    with pytest.raises(ConfigError, match="training images are of 1 class, and two or more are needed"):
        check_data(sweep().spec, ClassStats.from_counts([200, 0]), [40, 0])


def test_what_a_tower_has_not_got() -> None:
    def model(**decoder: Any) -> TrialConfig:
        return TrialConfig.from_tree({**BASE, "decoder": decoder})

    info = tiny_info()  # 16 numbers a token
    assert check_model(model(num_heads=4), info) == []
    assert check_model(model(num_heads=3, width=48), info) == []
    found = [problem.message for problem in check_model(model(num_heads=3), info)]
    assert found == [
        "decoder.num_heads must divide the decoder's width of 16, got 3. Set decoder.num_heads: 2, or another "
        "decoder.width."
    ]
    assert check_model(model(init="identity"), info) == []
    found = [problem.message for problem in check_model(model(init="identity"), tiny_info(has_class_token=False))]
    assert found == [
        "decoder.init: identity needs an encoder with a class token, and tiny has none. Set decoder.init: random, or "
        "choose another encoder."
    ]
    assert check_model(TrialConfig.from_tree({**BASE, "method": "linear_probe"}), info) == []


@pytest.mark.parametrize("method", ["adapter", "lora", "bias_tuning", "fine_tuning"])
def test_what_needs_a_transformer_is_refused_for_a_convolution_tower(method: str) -> None:
    config = TrialConfig.from_tree({**BASE, "method": method})
    assert check_model(config, tiny_info()) == []
    found = [one.message for one in check_model(config, dataclasses.replace(tiny_info(), kind="convolution"))]
    needs = method in ("adapter", "lora")
    assert [f"method {method} needs a transformer's blocks" in message for message in found] == [True] * needs


# ----------------------------------------------------------------------------------------- clusters that can grow


def head_of(*workers: tuple[float, float]) -> Cluster:
    """A head of 8 CPUs, and the workers that its autoscaler may start."""
    head = (8.0, 0.0)
    return Cluster("http://127.0.0.1:8265", 8.0, 0.0, False, (head,), (head, *workers))


def test_a_head_without_gpus_takes_what_its_autoscaler_may_start() -> None:
    of = sweep(gpus_per_worker=1, cpus_per_worker=4)
    assert trials_at_once(of, head_of(*[(8.0, 1.0)] * 6)) == 6


def test_more_than_the_autoscaler_may_start_is_refused_with_both_numbers() -> None:
    of = sweep(gpus_per_worker=2, cpus_per_worker=4, num_workers=4, driver="ray_train")
    with pytest.raises(ConfigError, match=r"a trial needs 8 GPUs .* the cluster can grow to 6"):
        trials_at_once(of, head_of(*[(8.0, 1.0)] * 6))
    with pytest.raises(ConfigError, match="on one machine, and the largest has 8 CPUs and 1 GPU;"):
        trials_at_once(sweep(gpus_per_worker=2, cpus_per_worker=4), head_of(*[(8.0, 1.0)] * 6))


def test_ray_train_on_a_cluster_without_a_dashboard_is_refused() -> None:
    """`ray start` goes on without one where the port is taken, as by another cluster of the machine."""
    without = dataclasses.replace(head_of((8.0, 1.0)), dashboard="")
    assert trials_at_once(sweep(cpus_per_worker=4, driver="in_process"), without) == 4
    with pytest.raises(ConfigError, match=r"never frees .* --dashboard-port"):
        trials_at_once(sweep(cpus_per_worker=4, driver="ray_train"), without)


def test_on_kubernetes_a_setting_says_what_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMBVLM_AUTOSCALER", "[[2, 8, 1], [1, 16, 0]]")
    assert _autoscaled_workers() == [(8, 1), (8, 1), (16, 0)]
    monkeypatch.setenv("IMBVLM_AUTOSCALER", "8 GPUs")
    with pytest.raises(ImbvlmError, match=r"it should look like \[\[8, 16, 1\]\]"):
        _autoscaled_workers()


def size(config: TrialConfig, room: int | None = None, at_once: int = 1, **fields: Any) -> int:
    manifest = Manifest.read("embedded:fashion_mnist_lt")
    found = packing(sweep(**fields), [tiny_info()], manifest, at_once)
    return dataclasses.replace(found, max_bytes=found.max_bytes if room is None else room).size(config)


PROBE, DECODER = tiny_config("linear_probe"), tiny_config("decoder")


def test_a_pack_is_a_quarter_of_the_search_and_fits_into_memory() -> None:
    assert size(PROBE, num_trials=24) == 6
    assert size(PROBE, at_once=2, num_trials=24) == 3
    assert size(PROBE, num_trials=3) == 1
    assert size(PROBE, at_once=2, max_pack_size=32) == 32
    assert size(PROBE, room=0, max_pack_size=32) == 1
    assert size(tiny_config("zero_shot"), max_pack_size=32) == 1
    # Of the time of a pack a trial has a share, whatever it would take alone.
    timed = {"other_objectives": ["time/train_seconds"], "trial_scheduler": {"name": "none"}}
    assert size(PROBE, max_pack_size=32, **timed) == 1
    assert size(PROBE, max_pack_size=32, driver="ray_train") == 1


def test_decoders_are_packed_on_gpus_and_where_a_size_is_set() -> None:
    """On CPUs they gain nothing, and the searcher would hear of them late."""
    assert size(DECODER, num_trials=24) == 1
    assert size(DECODER, max_pack_size=4) == 4
    assert size(DECODER, num_trials=24, gpus_per_worker=1.0) == 6


def test_a_pack_is_as_large_as_its_members_leave_room_for() -> None:
    manifest = Manifest.read("embedded:fashion_mnist_lt")
    wide = dataclasses.replace(tiny_info(), token_width=1024, pooled_width=1024)
    found = packing(sweep(max_pack_size=32, gpus_per_worker=0.5), [tiny_info(), wide], manifest, 1)
    shallow, deep = (DECODER.with_overrides({"decoder.depth": depth, "decoder.mlp_ratio": 4.0}) for depth in (1, 6))
    # Weights of the wider tower's decoder, their gradients and two moments: 12 widths squared and little more a block.
    assert found.bytes_of(deep) == pytest.approx(16 * 6 * 12 * 1024**2, rel=0.01)
    assert found.size(deep) == found.max_bytes // found.bytes_of(deep) == 1
    assert found.size(shallow) == 10
    assert found.size(PROBE) == 32
    # What a second stage reads of each decoder: its outputs in float32 for each image there may be.
    staged = DECODER.with_overrides({"second_stage.name": "classifier_retraining"})
    rows = found.num_train * DECODER.features.num_views + found.num_val
    assert found.bytes_of(staged) - found.bytes_of(DECODER) == 4 * 1024 * rows


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"method": "zero_shot"},
            "method zero_shot compares images with the class names' text, and tiny is image-only",
        ),
        ({"method": "prompt_tuning"}, "method prompt_tuning compares images with the class names' text"),
        (
            {"method": "linear_probe", "classifier": {"kind": "linear", "init": "text"}},
            "Set classifier.init: class_mean",
        ),
        (
            {"method": "fine_tuning", "classifier": {"kind": "linear", "init": "text"}},
            "classifier.init is text, and tiny",
        ),
        (
            {"method": "linear_probe", "prompts": {"templates": "imagenet"}},
            "the section prompts is set, and tiny is image-only",
        ),
    ],
)
def test_what_needs_text_is_refused_with_the_reason_for_an_encoder_without(sections: Tree, says: str) -> None:
    config = TrialConfig.from_tree({**BASE, **sections})
    info = dataclasses.replace(tiny_info(), embedding_width=None, logit_scale=None)
    (problem,) = check_model(config, info)
    assert says in problem.message
    assert "image-only: it has no text" in problem.message


@pytest.mark.parametrize("init", ["random", "class_mean"])
@pytest.mark.parametrize("method", ["linear_probe", "decoder", "adapter", "lora", "bias_tuning", "fine_tuning"])
def test_what_needs_no_text_runs_without(method: str, init: str) -> None:
    config = TrialConfig.from_tree({**BASE, "method": method, "classifier": {"kind": "cosine", "init": init}})
    assert check_model(config, dataclasses.replace(tiny_info(), embedding_width=None, logit_scale=None)) == []


def test_methods_to_try_are_those_that_some_encoder_could_take(tmp_path: Path) -> None:
    image_only, with_text = (write_tower(tmp_path / kind, kind) for kind in ("image_only_convnext", "vit"))
    infos = {name: describe_encoder(EncoderConfig(name=name)) for name in (image_only, with_text)}

    def untried(*names: str) -> list[str]:
        space = {"parameters": {"encoder.name": {"choice": list(names)}}}
        made = sweep(base={**BASE, "encoder": {"name": names[0]}}, space=space)
        return untried_methods(
            made, {feature_key(config): infos[config.encoder.name] for config in encoder_configs(made)}
        )

    assert untried(image_only) == ["linear_probe", "bias_tuning", "fine_tuning"]
    everything = ["prompt_tuning", "linear_probe", "adapter", "lora", "bias_tuning", "fine_tuning"]
    assert untried(with_text) == everything
    assert untried(image_only, with_text) == untried(with_text, image_only) == everything
