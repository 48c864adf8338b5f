"""A trial's configuration: strict, all mistakes at once with line and fix, overrides that leave no remains."""

from __future__ import annotations

import hashlib
import math
import pickle
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from imbvlm.base.errors import ConfigError
from imbvlm.base.schema import ADDED_LATER, Section, digest_tree, flatten, tag_of, violated_rule
from imbvlm.base.yaml_file import dump_yaml, parse_yaml
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS, optional_sections
from imbvlm.config.trial_config import TrialConfig, apply_overrides, dotted_keys, require_section

LOSS_CONFIGS = [entry.config for entry in LOSSES.values()]


def tree(method: str = "decoder", **sections: Any) -> dict[str, Any]:
    return {"data": {"manifest": "m.parquet"}, "encoder": {"name": "tower"}, "method": method, **sections}


def config(method: str = "decoder", **sections: Any) -> TrialConfig:
    return TrialConfig.from_tree(tree(method, **sections))


def mistakes(text: str) -> list[str]:
    """What the error about a file says, a line each."""
    with pytest.raises(ConfigError) as error:
        TrialConfig.from_tree(parse_yaml(text, "f.yaml"))
    return [str(problem) for problem in error.value.problems]


def refused(key: str, value: Any, method: str = "decoder", **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config(method, **sections).with_overrides({key: value})
    assert len(error.value.problems) == 1, str(error.value)
    return str(error.value.problems[0])


# -------------------------------------------------------------------------------------------------- mistakes


def test_every_mistake_of_a_file_at_once_with_line_and_nearest_name() -> None:
    found = mistakes("""\
data: {manifest: x, split_sed: 1, class_sampling: squareroot}
encoder: {name: 3, image_size: 4}
method: decoder
decoder:
  width: 30
  num_heads: 4
prompts: {templates: [a photo, 3]}
classifier: {init: text, temperature: 0, knd: 3}
loss:
  name: cross_entropy
  gamma: 2
optim: {name: adamw, betas: [1, 0.9], momentum: 0.9, lr: "3"}
train:
  num_epochs: 3
  num_steps: 2
  seed: true
evl: 3
features: null
""")
    assert sorted(found, key=lambda one: int(one.split(":")[1])) == [
        "f.yaml:1: data.class_sampling is 'squareroot', which is not one of its values; did you mean 'square_root'?",
        "f.yaml:1: unknown key 'data.split_sed'; did you mean 'split_seed'?",
        "f.yaml:2: encoder.name must be a valid string, and is 3.",
        "f.yaml:2: encoder.image_size must be greater than or equal to 8, and is 4.",
        "f.yaml:5: decoder.width must be a multiple of decoder.num_heads (4), got 30.",
        "f.yaml:7: prompts.templates.1 must be a valid string, and is 3.",
        "f.yaml:8: classifier.temperature must be greater than 0, and is 0.",
        "f.yaml:8: unknown key 'classifier.knd' for classifier cosine; did you mean 'kind'?",
        "f.yaml:11: unknown key 'loss.gamma' for loss cross_entropy; only focal has it.",
        "f.yaml:12: optim.lr must be a valid number, and is '3'.",
        "f.yaml:12: optim.betas.0 must be less than 1, and is 1.",
        "f.yaml:12: unknown key 'optim.momentum' for optim adamw; only sgd has it.",
        "f.yaml:15: train must have either num_epochs or num_steps, got both. Remove one.",
        "f.yaml:16: train.seed must be a valid integer, and is True.",
        "f.yaml:17: unknown key 'evl'; did you mean 'eval'?",
        "f.yaml:18: features must be a section of keys, and is None.",
    ]


def test_the_error_survives_the_way_from_another_process() -> None:
    with pytest.raises(ConfigError) as error:
        TrialConfig.from_tree(parse_yaml("method: x", "f.yaml"))
    copied = pickle.loads(pickle.dumps(error.value))
    assert copied.problems == error.value.problems
    assert str(copied) == str(error.value)
    assert str(copied).startswith("3 mistakes in the configuration:\n  f.yaml:1: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", ["f.yaml:1: the file must be a section of keys, and is []."]),
        ("3", ["f.yaml:1: the file must be a section of keys, and is 3."]),
        ("", [f"f.yaml: {key!r} is required and is not given." for key in ("data", "encoder", "method")]),
        (
            "data: {manifest: x}\nencoder: {}\nmethod: decodr",
            [
                "f.yaml:2: 'encoder.name' is required and is not given.",
                "f.yaml:3: method is 'decodr', which is not one of its values; did you mean 'decoder'?",
            ],
        ),
        (
            "data: {manifest: x}\nencoder: {name: y}\nmethod: zero_shot\nloss: {name: focl}",
            [
                "f.yaml:4: method zero_shot doesn't read the section 'loss'. Remove it, or choose another method.",
                "f.yaml:4: loss.name is 'focl', which is not one of its values; did you mean 'focal'?",
            ],
        ),
        (
            "data: {manifest: x}\nencoder: {name: y}\nmethod: decoder\nprompts: {templates: 3}\noptim: 4",
            [
                "f.yaml:4: prompts.templates must be 'plain' or 'imagenet' or a valid list, and is 3.",
                "f.yaml:5: optim must be a section of keys, and is 4.",
            ],
        ),
    ],
)
def test_files_that_are_wrong_as_a_whole(text: str, expected: list[str]) -> None:
    assert mistakes(text) == expected


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optim.momentum", True, "valid number"),
        ("optim.nesterov", 1, "valid boolean"),
        ("optim.nesterov", "yes", "valid boolean"),
        ("optim.lr", math.nan, "finite"),
        ("optim.lr", math.inf, "finite"),
        ("optim.lr", "0.1", "valid number"),
        ("optim.lr", 10**400, "valid number"),
        ("optim.lr", 0, "greater than 0"),
        ("optim.lr", None, "valid number"),
        ("optim.cosine_cycles", 0.7, "less than or equal to 0.5"),
        ("train.num_epochs", 10.0, "valid integer"),
        ("train.num_epochs", 0, "greater than or equal to 1"),
        # torch would end the process by a signal.
        ("train.num_threads", 100_000, "less than or equal to 1024"),
        ("train.seed", -1, "greater than or equal to 0"),
        ("train.seed", 2**32, "less than 4294967296"),
        ("train.batch_size", "256", "valid integer"),
        ("features.num_views", True, "valid integer"),
        ("data.manifest", None, "valid string"),
        ("classifier.temperature", -0.1, "greater than 0"),
        ("prompts.templates", [], "must have a sentence"),
        ("prompts.templates", ["a photo of a cat"], "exactly one {}"),
        ("prompts.templates", ["a {} in {}"], "exactly one {}"),
        ("decoder.width", 30, "multiple of decoder.num_heads (4)"),
        ("loss.gamma", 2.0, "only focal has it"),
        ("optim.moment", 0.9, "did you mean 'momentum'"),
    ],
)
def test_one_wrong_value_is_one_mistake(key: str, value: Any, says: str) -> None:
    assert says in refused(key, value)


def test_what_the_tower_computes_in_is_of_stored_features() -> None:
    says = "features.computed_in applies to stored features alone, got bfloat16 with features.store false. Set features"
    assert says in refused("features.computed_in", "bfloat16", features={"store": False})
    says = "features.compile applies to stored features alone, got True with features.store false. Set features.store"
    assert says in refused("features.compile", True, features={"store": False})


def test_options_that_would_have_no_effect_are_refused() -> None:
    says = refused("optim.lr_schedule", "half_cosine", optim={"name": "sgd", "cosine_cycles": 0.4375})
    assert says == "override: optim.cosine_cycles has no effect with lr_schedule half_cosine, got 0.4375. Remove it."


def test_text_start_behind_a_random_decoder_is_refused_and_behind_an_identity_is_not() -> None:
    assert "Set decoder.init: identity" in refused("classifier.init", "text")
    identity = config(decoder={"init": "identity"}).with_overrides({"classifier.init": "text"})
    assert require_section(identity.classifier).init == "text"
    assert "Set decoder.width: null" in refused("decoder.init", "identity", decoder={"width": 64})
    assert require_section(config("linear_probe", classifier={"init": "text"}).classifier).init == "text"


def test_whole_numbers_are_numbers_and_equal_to_their_floats() -> None:
    whole, point = config(optim={"lr": 1}), config(optim={"lr": 1.0})
    assert require_section(whole.optim).lr == 1.0
    assert whole == point
    assert whole.key() == point.key()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("section", sorted(optional_sections()))
def test_a_section_is_there_exactly_where_its_method_reads_it(method: str, section: str) -> None:
    read = section in METHODS[method].sections
    # What follows training or changes its examples is there only where it is asked for.
    asked_for = section in ("second_stage", "mixing", "feature_augmentation")
    assert (getattr(config(method), section) is not None) == (read and not asked_for)
    assert getattr(config(method, **{section: None}), section) == getattr(config(method), section)
    if not read:
        with pytest.raises(ConfigError, match=f"method {method} doesn't read the section '{section}'"):
            config(method, **{section: {}})


# -------------------------------------------------------------------------------------- defaults, files, equality


def test_defaults_are_those_of_the_protocol() -> None:
    full = config().to_tree()
    assert full["decoder"] == {
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 0.5,
        "width": None,
        "input_norm": "layer_norm",
        "init": "random",
    }
    assert full["classifier"] == {"kind": "cosine", "temperature": 0.04, "init": "random"}
    assert full["loss"] == {"name": "balanced_softmax", "label_smoothing": 0.0, "prior": "sampled"}
    assert full["train"]["num_epochs"] == 10
    assert full["train"]["num_steps"] is None
    assert config(train={"num_steps": 8192}).to_tree()["train"]["num_epochs"] is None
    assert config(train={"num_epochs": None, "batch_size": 8}).to_tree()["train"]["num_epochs"] == 10
    assert config(loss={"prior": "train"}).to_tree()["loss"] == {
        "name": "balanced_softmax",
        "label_smoothing": 0.0,
        "prior": "train",
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", LOSS_CONFIGS)
def test_files_are_read_back_equal(tmp_path: Path, method: str, loss: Any) -> None:
    sections = {} if "loss" not in METHODS[method].sections else {"loss": {"name": tag_of(loss)[1]}}
    before = config(method, prompts={"templates": ["a {}.", "no {}"]}, **sections)
    before.to_yaml(tmp_path / "trial.yaml")
    after = TrialConfig.from_yaml(tmp_path / "trial.yaml")
    assert after == before
    assert after.key() == before.key()
    assert pickle.loads(pickle.dumps(after)) == before


@settings(deadline=None, max_examples=40)
@given(
    lr=st.floats(1e-12, 1e12),
    decay=st.floats(0, 10),
    epochs=st.integers(1, 10**6),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_numbers_survive_the_file_exactly(lr: float, decay: float, epochs: int, betas: tuple[float, float]) -> None:
    optim = {"name": "adamw", "lr": lr, "weight_decay": decay, "betas": list(betas)}
    before = config(optim=optim, train={"num_epochs": epochs})
    assert TrialConfig.from_tree(parse_yaml(dump_yaml(before.to_tree()))) == before


def test_a_configuration_never_changes() -> None:
    trial = config(optim={"name": "adamw"}, prompts={"templates": ["a {}"]})
    with pytest.raises(ValidationError):
        trial.method = "zero_shot"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        trial.optim.lr = 1.0  # type: ignore[union-attr, misc]
    assert isinstance(trial.optim.betas, tuple)
    assert isinstance(trial.prompts.templates, tuple)
    assert hash(trial) == hash(config(optim={"name": "adamw"}, prompts={"templates": ["a {}"]}))


def test_the_given_data_is_not_touched() -> None:
    given_tree = tree(loss={"name": "focal", "gamma": 1.0})
    TrialConfig.from_tree(given_tree)
    apply_overrides(given_tree, {"loss.name": "ldam", "train.num_steps": 5})
    assert given_tree == tree(loss={"name": "focal", "gamma": 1.0})


# ------------------------------------------------------------------------------------------------- overrides


def test_another_variant_drops_the_options_of_the_old_ones() -> None:
    focal = config(loss={"name": "focal", "gamma": 0.5})
    assert focal.with_overrides({"loss.name": "ldam"}).to_tree()["loss"] == {
        "name": "ldam",
        "max_margin": 0.5,
        "margin_scale": None,
        "reweight_from": None,
    }
    assert focal.with_overrides({"loss.name": "focal"}) == focal
    assert require_section(focal.with_overrides({"loss.gamma": 3.0, "loss.name": "focal"}).loss).gamma == 3.0
    linear = config(classifier={"kind": "cosine", "temperature": 0.1}).with_overrides({"classifier.kind": "linear"})
    assert linear.to_tree()["classifier"] == {"kind": "linear", "init": "random"}
    back = linear.with_overrides({"classifier.kind": "cosine"})
    assert require_section(back.classifier).temperature == 0.04


def test_options_that_mean_the_same_stay_and_a_rate_of_another_optimizer_does_not() -> None:
    sgd = config(optim={"name": "sgd", "lr": 0.3, "weight_decay": 0.01, "momentum": 0.5})
    adamw = require_section(sgd.with_overrides({"optim.name": "adamw"}).optim)
    assert (adamw.weight_decay, adamw.lr) == (0.01, 0.001)
    assert require_section(sgd.with_overrides({"optim.name": "adamw", "optim.lr": 0.2}).optim).lr == 0.2
    sampled = config(loss={"name": "logit_adjustment", "prior": "train"})
    assert require_section(sampled.with_overrides({"loss.name": "balanced_softmax"}).loss).prior == "train"


def test_an_option_set_beside_an_unnamed_variant_waits_for_the_one_that_has_it() -> None:
    base = apply_overrides(tree(), {"loss.gamma": 3.0})
    assert apply_overrides(base, {"loss.name": "focal"})["loss"] == {"gamma": 3.0, "name": "focal"}
    assert apply_overrides(base, {"loss.name": "ldam"})["loss"] == {"name": "ldam"}


def test_another_tower_lets_go_of_the_old_ones_weights() -> None:
    own = TrialConfig.from_tree(tree() | {"encoder": {"name": "a", "weights": "a.pt", "quick_gelu": True}})
    assert own.with_overrides({"encoder.name": "b"}).encoder.weights is None
    assert own.with_overrides({"encoder.name": "b", "encoder.weights": "b.pt"}).encoder.weights == "b.pt"
    assert own.with_overrides({"encoder.name": "a"}).encoder.weights == "a.pt"


def test_a_length_replaces_the_other_unit() -> None:
    steps = config().with_overrides({"train.num_steps": 100})
    assert (require_section(steps.train).num_epochs, require_section(steps.train).num_steps) == (None, 100)
    assert require_section(steps.with_overrides({"train.num_epochs": 4}).train).num_steps is None
    assert require_section(config().with_overrides({"train.batch_size": 4}).train).num_epochs == 10
    with pytest.raises(ConfigError, match="must have either num_epochs or num_steps"):
        config().with_overrides({"train.num_epochs": 4, "train.num_steps": 100})


def test_another_method_brings_its_sections_and_drops_the_others() -> None:
    probe = config(loss={"name": "focal"}).with_overrides({"method": "linear_probe"})
    assert probe.decoder is None
    assert require_section(probe.loss).name == "focal"
    zero_shot = probe.with_overrides({"method": "zero_shot"})
    assert zero_shot.loss is None
    assert require_section(zero_shot.with_overrides({"method": "decoder"}).loss).name == "balanced_softmax"
    with pytest.raises(ConfigError, match="zero_shot doesn't read the section 'loss'"):
        probe.with_overrides({"method": "zero_shot", "loss.name": "focal"})


def test_a_dotted_key_into_a_null_section_builds_it() -> None:
    assert apply_overrides(tree(loss=None), {"loss.name": "focal"})["loss"] == {"name": "focal"}
    assert apply_overrides(tree(), {"decoder.depth": 1})["decoder"] == {"depth": 1}
    with pytest.raises(ConfigError, match="zero_shot doesn't read the section 'decoder'"):
        config("zero_shot").with_overrides({"decoder.depth": 1})


def test_misspelt_overrides_are_named() -> None:
    assert refused("optim.lrr", 1.0) == "override: unknown key 'optim.lrr' for optim sgd; did you mean 'lr'?"
    assert refused("optin.lr", 1.0) == "override: unknown key 'optin'; did you mean 'optim'?"


@pytest.mark.parametrize("method", METHODS)
def test_setting_a_key_to_what_it_is_changes_nothing(method: str) -> None:
    trial = config(method)
    for key, value in flatten(trial.to_tree()).items():
        assert trial.with_overrides({key: value}) == trial, key


# ---------------------------------------------------------------------------------- tables that must stay in step


def test_dotted_keys_are_all_leaves_over_all_variants() -> None:
    keys = dotted_keys()
    assert len(keys) == len(set(keys))
    assert {"method", "loss.name", "loss.gamma", "optim.momentum", "optim.betas", "prompts.templates"} <= set(keys)
    assert not {"loss", "optim", "data"} & set(keys)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("optim.betas", [0.9, 0.99], None),
        ("classifier.temperature", 1, None),
        ("loss.name", "ldam", None),
        ("encoder.image_size", None, None),
        ("data.on_bad_image", "strct", "'quarantine' or 'strict'"),
        ("optim.lr", -1, "greater than 0"),
        ("optim.nothing", 1, "a key of a trial"),
    ],
)
def test_one_value_can_be_checked_alone(key: str, value: Any, rule: str | None) -> None:
    assert violated_rule(TrialConfig, key, value) == rule


def test_a_section_with_a_wrong_name_has_its_other_mistakes_shown_too() -> None:
    tree = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}, "method": "linear_probe",
            "optim": {"name": "adam", "lr": -1, "moment": 0.9, "momentum": 0.9}}  # fmt: skip
    with pytest.raises(ConfigError) as error:
        TrialConfig.from_tree(tree)
    assert [problem.message for problem in error.value.problems] == [
        "optim.name is 'adam', which is not one of its values; did you mean 'adamw'?",
        "optim.lr must be greater than 0, and is -1",
        "unknown key 'optim.moment'; did you mean 'momentum'?",
    ]


@pytest.mark.parametrize(
    ("method", "digest"),
    [
        ("zero_shot", "84ddc7a58fa25fe462002b21bf98a2a9"),
        ("linear_probe", "da720e1cbd7ba6beaa1407341c8bbf65"),
        ("decoder", "75dccc85b30e422329b43e8e1572b8d5"),
        ("lora", "395293fd7a47c3464dc5152acc23aac4"),
    ],
)
def test_a_configurations_digest_is_that_of_version_0_1(method: str, digest: str) -> None:
    """Checkpoints are found by it. A field that fails here must be marked ADDED_LATER."""
    tree = {"data": {"manifest": "m.parquet"}, "encoder": {"name": "openai_vit_b16"}, "method": method}
    for features in ({}, {"features": {"tail_views": None}}):
        key = TrialConfig.from_tree({**tree, **features}).key()
        assert hashlib.sha256(key.encode()).hexdigest()[:32] == digest


class Inner(Section):
    old: int = 1
    new: Annotated[int, ADDED_LATER] = 2


class Outer(Section):
    inner: Inner = Inner()
    listed: Annotated[list[int], ADDED_LATER] = Field(default_factory=list)


def test_a_field_that_was_added_later_is_in_a_digest_only_with_another_value_than_its_default() -> None:
    assert digest_tree(Outer()) == {"inner": {"old": 1}}
    assert digest_tree(Outer(inner=Inner(new=3), listed=[1])) == {"inner": {"old": 1, "new": 3}, "listed": [1]}


def test_a_retired_key_is_dropped_without_a_value_and_rejected_with_one() -> None:
    assert "features.tail_views is no longer an option" in refused("features.tail_views", 4)
    kept = TrialConfig.from_record({**config().to_tree(), "features": {"num_views": 3, "tail_views": 4}})
    assert kept.features.num_views == 3
