"""Zero-shot and a plain softmax probe for every tower that a trial of the space can read."""

from __future__ import annotations

from typing import Any

import pytest

from imbvlm.base.errors import ConfigError
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.config.trial_config import require_section
from imbvlm.sweep.spec.baselines import baselines, encoder_configs, feature_key
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec

BASE: dict[str, Any] = {
    "data": {"manifest": "m", "class_sampling": "square_root"},
    "encoder": {"name": "tower", "image_size": 96},
    "decoder": {"width": 64},
    "optim": {"name": "sgd", "momentum": 0.5},
    "train": {"num_steps": 50, "batch_size": 32},
    "eval": {"resize": 1.0},
}
METHODS = "method: {choice: [linear_probe, decoder]}"


def made(parameters: str, base: dict[str, Any] | None = None) -> ResolvedSweep:
    space = {"parameters": parse_yaml(f"{METHODS}\n{parameters}").data}
    return check_spec(SweepSpec.from_tree({"name": "s", "base": base or BASE, "space": space}))


def test_one_tower_has_both_baselines() -> None:
    zero_shot, probe = baselines(made("loss.name: {choice: [focal, ldam]}"))
    assert (zero_shot.name, zero_shot.patience, zero_shot.config.method) == ("zero-shot", None, "zero_shot")
    assert (probe.name, probe.patience, probe.config.method) == ("linear probe", 10, "linear_probe")
    for baseline in (zero_shot, probe):
        assert baseline.config.encoder.image_size == 96
        assert baseline.config.eval.resize == 1.0
        assert baseline.config.data.class_sampling == "instance_balanced"


def test_the_probe_is_plain_softmax_whatever_the_base_says() -> None:
    probe = baselines(made("loss.name: {choice: [focal, ldam]}"))[1].config.to_tree()
    assert probe["classifier"] == {"kind": "linear", "init": "random"}
    assert probe["loss"] == {"name": "cross_entropy", "label_smoothing": 0.0}
    assert (probe["train"]["num_epochs"], probe["train"]["num_steps"]) == (100, None)
    assert probe["train"]["batch_size"] == 32
    assert probe["optim"]["lr_schedule"] == "constant"


def test_trials_on_fresh_crops_share_the_baselines_and_features_of_their_tower() -> None:
    sweep = made("features.store: {choice: [true, false]}")
    assert [one.name for one in baselines(sweep)] == ["zero-shot", "linear probe"]
    keys = {feature_key(sweep.spec.trial(draw)) for draw in sweep.space.enumerate_params(sweep.spec.base) or []}
    assert keys == {feature_key(config) for config in encoder_configs(sweep)}
    assert len(keys) == 1


def test_a_listed_configuration_that_names_the_bases_tower_reads_the_same_one() -> None:
    listed = {
        "probe": {"method": "linear_probe", "loss.name": "focal"},
        "decoder": {"method": "decoder", "encoder.name": "tower"},
    }
    spec = SweepSpec.from_tree({"name": "s", "base": BASE, "space": {"configurations": listed}, "num_trials": 2})
    assert [one.name for one in baselines(check_spec(spec))] == ["zero-shot", "linear probe"]


def test_every_tower_has_its_own_and_their_names_say_whose() -> None:
    found = baselines(made("encoder.name: {choice: [a, b]}"))
    assert [one.name for one in found] == ["zero-shot a", "linear probe a", "zero-shot b", "linear probe b"]
    assert [one.config.encoder.name for one in found] == ["a", "a", "b", "b"]


def test_an_encoder_without_text_has_the_probe_alone() -> None:
    encoders = "encoder.name: {choice: [openai_vit_b16, timm:test_vit.r160_in1k, dinov2_vit_s14]}"
    names = ["openai_vit_b16", "timm:test_vit.r160_in1k", "dinov2_vit_s14"]
    expected = [f"zero-shot {names[0]}", *(f"linear probe {name}" for name in names)]
    assert [baseline.name for baseline in baselines(made(encoders))] == expected


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
