"""Zero-shot, a plain softmax probe and the heads for every tower that a trial of the space can read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imbvlm.base.errors import ConfigError
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.config.trial_config import require_section, selected_options
from imbvlm.sweep.spec.baselines import HEADS, Baseline, baselines, encoder_configs, feature_key
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

BASE: dict[str, Any] = {
    "data": {"manifest": "m", "class_sampling": "square_root"},
    "encoder": {"name": "tinylit_lite0", "image_size": 96},
    "decoder": {"width": 64},
    "optim": {"name": "sgd", "momentum": 0.5},
    "train": {"num_steps": 50, "batch_size": 32},
    "eval": {"resize": 1.0},
}
# Two encoders with text.
A, B = "openai_vit_b32", "openai_vit_b16"
TWO = f"encoder.name: {{choice: [{A}, {B}]}}"
METHODS = "method: {choice: [linear_probe, decoder]}"


def made(parameters: str, base: dict[str, Any] | None = None) -> ResolvedSweep:
    space = {"parameters": parse_yaml(f"{METHODS}\n{parameters}").data}
    return check_spec(SweepSpec.from_tree({"name": "s", "base": base or BASE, "space": space}))


HEAD_NAMES = ["class means", "discriminant", "prototype cache"]


def listed(sweep: ResolvedSweep) -> list[Baseline]:
    return list(baselines(sweep).values())


def names_of(sweep: ResolvedSweep) -> list[str]:
    return [baseline.name for baseline in listed(sweep)]


def test_one_tower_has_all_baselines() -> None:
    made_baselines = listed(made("loss.name: {choice: [focal, ldam]}"))
    assert [(baseline.name, baseline.patience, baseline.config.method) for baseline in made_baselines] == [
        ("zero-shot", None, "zero_shot"),
        ("linear probe", 10, "linear_probe"),
        *((name, None, method) for name, method in zip(HEAD_NAMES, HEADS, strict=True)),
    ]
    for baseline in made_baselines:
        assert baseline.config.encoder.image_size == 96
        assert baseline.config.eval.resize == 1.0
        assert baseline.config.data.class_sampling == "instance_balanced"


def test_the_probe_is_plain_softmax_whatever_the_base_says() -> None:
    probe = listed(made("loss.name: {choice: [focal, ldam]}"))[1].config.to_tree()
    assert probe["classifier"] == {"kind": "linear", "init": "random"}
    assert probe["loss"] == {"name": "cross_entropy", "label_smoothing": 0.0}
    assert (probe["train"]["num_epochs"], probe["train"]["num_steps"]) == (100, None)
    assert probe["train"]["batch_size"] == 32
    assert probe["optim"]["lr_schedule"] == "constant"


def test_trials_on_fresh_crops_share_the_baselines_and_features_of_their_tower() -> None:
    sweep = made("features.store: {choice: [true, false]}")
    assert names_of(sweep) == ["zero-shot", "linear probe", *HEAD_NAMES]
    keys = {feature_key(sweep.spec.trial(draw)) for draw in sweep.space.enumerate_params(sweep.spec.base) or []}
    assert keys == {feature_key(config) for config in encoder_configs(sweep)}
    assert len(keys) == 1


def test_a_listed_configuration_that_names_the_bases_tower_reads_the_same_one() -> None:
    configurations = {
        "probe": {"method": "linear_probe", "loss.name": "focal"},
        "decoder": {"method": "decoder", "encoder.name": "tinylit_lite0"},
    }
    spec = SweepSpec.from_tree({"name": "s", "base": BASE, "space": {"configurations": configurations}})
    assert names_of(check_spec(spec)) == ["zero-shot", "linear probe", *HEAD_NAMES]


def test_every_tower_has_its_own_and_the_ids_of_version_0_1_stay() -> None:
    by_id = baselines(made(TWO))
    first = {trial_id: by_id[trial_id].name for trial_id in ("b00001", "b00002", "b00003", "b00004")}
    assert list(first.values()) == [f"{name} {x}" for x in (A, B) for name in ("zero-shot", "linear probe")]
    assert [baseline.name for baseline in by_id.values()][4:] == [f"{name} {x}" for x in (A, B) for name in HEAD_NAMES]
    assert all(baseline.name.endswith(f" {baseline.config.encoder.name}") for baseline in by_id.values())


@pytest.mark.parametrize(
    ("parameters", "suffixes"),
    [
        ("encoder.image_size: {choice: [64, 128]}", [" at 64 px", " at 128 px"]),
        ("encoder.image_size: {choice: [64, null]}", [" at 64 px", " at its own size"]),
        (
            f"{TWO}\nencoder.image_size: {{choice: [64, 96]}}",
            [f" {A} at 64 px", f" {A} at 96 px", f" {B} at 64 px", f" {B} at 96 px"],
        ),
        (
            f"{TWO}\nencoder.image_size: {{choice: [64], when: {{encoder.name: {A}}}}}",
            [f" {A} at 64 px", f" {B} at 96 px"],
        ),
        ("encoder.token_pooling: {choice: [1, 2]}", [" with token pooling 1", " with token pooling 2"]),
        ("features.num_views: {choice: [2, 4]}", [" with num views 2", " with num views 4"]),
        (
            f"{TWO}\neval.resize: {{choice: [1.0, 1.2]}}",
            [f" {A} with resize 1.0", f" {A} with resize 1.2", f" {B} with resize 1.0", f" {B} with resize 1.2"],
        ),
    ],
)
def test_names_say_in_what_the_towers_differ(parameters: str, suffixes: list[str]) -> None:
    names = names_of(made(parameters))
    assert sorted(names) == sorted(f"{name}{suffix}" for name in ["zero-shot", "linear probe", *HEAD_NAMES]
                                   for suffix in suffixes)  # fmt: skip
    assert len(set(names)) == len(names)


def test_a_head_that_the_space_searches_is_a_trial_and_no_baseline() -> None:
    space = {"parameters": parse_yaml("method: {choice: [linear_probe, discriminant]}").data}
    base = {key: value for key, value in BASE.items() if key != "decoder"}
    sweep = check_spec(SweepSpec.from_tree({"name": "s", "base": base, "space": space}))
    assert names_of(sweep) == ["zero-shot", "linear probe", "class means", "prototype cache"]


def test_heads_need_stored_features() -> None:
    assert names_of(made("loss.name: {choice: [focal, ldam]}", {**BASE, "features": {"store": False}})) == [
        "zero-shot",
        "linear probe",
    ]


def test_a_plug_ins_head_is_no_baseline_of_other_sweeps(tmp_path: Path) -> None:
    """Wherever the plug-in is active when the module is imported."""
    plugin = tmp_path / "my_heads.py"
    plugin.write_text(
        "from imbvlm.config.method_registry import Method\n"
        "METHODS = {'my_head': Method('my_head', 'A head.', 'mine', 'pooled', shared_sections=frozenset(), "
        "needs_stored=True)}\n"
    )
    code = (
        "from imbvlm.base.plugin_files import use_plugins\n"
        f"with use_plugins({str(plugin)!r}):\n"
        "    from imbvlm.config.method_registry import METHODS\n"
        "    from imbvlm.sweep.spec.baselines import HEADS\n"
        "    print('my_head' in METHODS, *HEADS)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["True", *HEADS]


def test_a_head_leaves_to_validation_what_a_trial_leaves_to_it() -> None:
    discriminant = next(item for item in listed(made("optim.lr: {uniform: [0.1, 1]}")) if item.name == "discriminant")
    assert selected_options(discriminant.config.to_tree()) == {
        "discriminant.shrinkage": None,
        "discriminant.temperature": None,
    }


def test_an_encoder_without_text_has_all_but_zero_shot() -> None:
    encoders = "encoder.name: {choice: [openai_vit_b16, timm:test_vit.r160_in1k, dinov2_vit_s14]}"
    names = ["openai_vit_b16", "timm:test_vit.r160_in1k", "dinov2_vit_s14"]
    expected = [f"zero-shot {names[0]}", *(f"linear probe {name}" for name in names)]
    assert [name for name in names_of(made(encoders)) if name.startswith(("zero", "linear"))] == expected
    assert set(names_of(made(encoders))) == {*expected, *(f"{head} {name}" for head in HEAD_NAMES for name in names)}


@pytest.mark.parametrize(
    "parameters",
    [
        "encoder.name: {choice: [a, b]}\nencoder.image_size: {choice: [64, 128], when: {encoder.name: a}}",
        "features.num_views: {choice: [2, 4], when: {method: decoder}}",
        "encoder.image_size: [{choice: [64], when: {method: decoder}}, {choice: [8], when: {method: linear_probe}}]",
        "eval.interpolation: {choice: [bicubic, null]}\nencoder.name: {choice: [a, b]}",
    ],
)
def test_the_features_of_every_trial_are_among_the_towers(parameters: str) -> None:
    sweep = made(parameters)
    extracted = {feature_key(config) for config in encoder_configs(sweep)}
    assert extracted == {
        feature_key(sweep.spec.trial(draw)) for draw in sweep.space.enumerate_params(sweep.spec.base) or []
    }


def test_a_conditional_size_leaves_the_bases_where_it_does_not_hold() -> None:
    sweep = made("encoder.name: {choice: [a, b]}\nencoder.image_size: {choice: [64], when: {encoder.name: a}}")
    towers = [config.encoder for config in encoder_configs(sweep)]
    assert [(tower.name, tower.image_size) for tower in towers] == [("a", 64), ("b", 96)]


def test_a_continuous_way_of_reading_images_is_refused() -> None:
    sweep = made("eval.resize: {uniform: [1.0, 1.5]}")
    with pytest.raises(
        ConfigError, match=r"eval.resize must be a choice or a short int here, and is uniform 1.0 .. 1.5"
    ):
        encoder_configs(sweep)


def test_what_trains_is_no_matter_of_the_tower() -> None:
    sweep = made("optim.lr: {uniform: [0.1, 1]}")
    one, other = (
        sweep.spec.trial({"method": method, "optim.lr": lr}) for method, lr in (("decoder", 0.1), ("linear_probe", 0.5))
    )
    assert feature_key(one) == feature_key(other)
    assert feature_key(one) != feature_key(one.with_overrides({"features.num_views": 2}))
    assert require_section(one.train).num_steps == 50
