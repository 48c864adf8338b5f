"""Search spaces: ranges and conditions, what is never drawn, every mistake at once, and the shipped ones."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from imbvlm.base.errors import ConfigError
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.config.method_registry import METHODS, optional_sections
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.spec.search_space import Params, SearchSpace
from imbvlm.sweep.spec.space_file import NOT_SEARCHED, find_space, parse_space, read_space
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.spec_overrides import with_settings
from imbvlm.sweep.spec.sweep_spec import SweepSpec

optuna.logging.set_verbosity(optuna.logging.WARNING)
ROOT = Path(__file__).parents[3]
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.py") if path.stem != "__init__")
BASE = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}, "method": "decoder"}


def space(text: str) -> SearchSpace:
    return parse_space(parse_yaml(text, "s.yaml"))


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        space(text)
    return [str(problem) for problem in error.value.problems]


def spec_mistakes(text: str, **fields: Any) -> list[str]:
    """What check_spec says about a space that is right in itself."""
    spec = SweepSpec.from_tree({"name": "s", "base": BASE, "space": space(text).tree, **fields})
    with pytest.raises(ConfigError) as error:
        check_spec(spec)
    return [str(problem) for problem in error.value.problems]


def draws(searched: SearchSpace, number: int = 200, base: dict[str, Any] = BASE) -> list[tuple[Params, dict[str, Any]]]:
    """Draws with what Optuna has kept of each."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(number):
        trial = study.ask()
        found.append((searched.sample(trial, base), dict(trial.params)))
        study.tell(trial, 0.0)
    return found


# ---------------------------------------------------------------------------------------------------- drawing


def test_each_kind_of_range_gives_what_it_says() -> None:
    searched = space("""
parameters:
  decoder.width: {choice: [null, 64]}
  optim.momentum: {uniform: [0, 0.9]}
  optim.lr: {loguniform: [1e-4, 1]}
  decoder.depth: {int: [0, 4]}
""")
    found = [draw for draw, _ in draws(searched)]
    assert {draw["decoder.width"] for draw in found} == {None, 64}
    assert {draw["decoder.depth"] for draw in found} == {0, 1, 2, 3, 4}
    assert all(0 <= draw["optim.momentum"] <= 0.9 for draw in found)
    below = sum(draw["optim.lr"] < 1e-2 for draw in found)
    assert 60 < below < 140  # half of the decades, 1 % of the width


def test_an_option_whose_conditions_do_not_hold_is_neither_sampled_nor_kept() -> None:
    searched = space("""
parameters:
  method: {choice: [zero_shot, linear_probe, decoder]}
  decoder.depth: {choice: [1, 2], when: {method: decoder}}
  loss.name: {choice: [focal, ldam, cross_entropy], when: {method: [linear_probe, decoder]}}
  loss.gamma: {uniform: [0.5, 3], when: {loss.name: focal}}
  loss.max_margin: {uniform: [0.1, 0.8], when: {loss.name: ldam, method: decoder}}
""")
    found = draws(searched, 300)
    assert len({frozenset(draw) for draw, _ in found}) == 6
    for draw, kept in found:
        assert draw == kept
        assert ("decoder.depth" in draw) == (draw["method"] == "decoder")
        assert ("loss.name" in draw) == (draw["method"] != "zero_shot")
        assert ("loss.gamma" in draw) == (draw.get("loss.name") == "focal")
        assert ("loss.max_margin" in draw) == (draw.get("loss.name") == "ldam" and draw["method"] == "decoder")


def test_branches_are_parameters_of_their_own() -> None:
    searched = space("""
parameters:
  method: {choice: [linear_probe, decoder]}
  optim.lr:
    - {loguniform: [1e-3, 1e-2], when: {method: decoder}}
    - {uniform: [1, 2], when: {method: linear_probe}}
""")
    for draw, kept in draws(searched):
        low, high = (1e-3, 1e-2) if draw["method"] == "decoder" else (1, 2)
        assert low <= draw["optim.lr"] <= high
        assert set(kept) == {"method", "optim.lr[0]" if draw["method"] == "decoder" else "optim.lr[1]"}


def test_keys_are_drawn_after_those_that_they_depend_on_however_they_are_written() -> None:
    searched = space("""
parameters:
  loss.tau: {uniform: [0.5, 1.5], when: {loss.name: logit_adjustment}}
  loss.name:
    - {choice: [focal, logit_adjustment], when: {classifier.kind: linear}}
    - {choice: [ldam, logit_adjustment], when: {classifier.kind: cosine}}
  classifier.kind: {choice: [linear, cosine]}
""")
    assert [one.name for one in searched.parameters] == ["classifier.kind", "loss.name[0]", "loss.name[1]", "loss.tau"]
    assert all(("loss.tau" in draw) == (draw["loss.name"] == "logit_adjustment") for draw, _ in draws(searched))


def test_conditions_look_at_what_the_base_sets() -> None:
    searched = space("""
parameters:
  loss.gamma: {uniform: [0, 1], when: {loss.name: focal}}
  loss.tau: {uniform: [0, 1], when: {loss.name: logit_adjustment}}
""")
    assert {frozenset(draw) for draw, _ in draws(searched, 5, BASE | {"loss": {"name": "focal"}})} == {
        frozenset({"loss.gamma"})
    }


def test_a_condition_on_what_the_drawn_method_or_variant_has_not_got_does_not_hold() -> None:
    searched = space("""
parameters:
  optim.lr: {uniform: [1, 2], when: {decoder.depth: 2}}
  optim.momentum: {uniform: [0, 0.5], when: {loss.prior: train}}
  method: {choice: [linear_probe, decoder]}
  loss.name: {choice: [focal, balanced_softmax]}
""")
    base = BASE | {"decoder": {"depth": 2}, "loss": {"name": "balanced_softmax", "prior": "train"}}
    for draw, _ in draws(searched, 50, base):
        assert ("optim.lr" in draw) == (draw["method"] == "decoder")
        assert ("optim.momentum" in draw) == (draw["loss.name"] == "balanced_softmax")


def test_a_second_stage_is_searched_beside_having_none() -> None:
    """Null takes away what the base has; a name builds the section, without another name's options."""
    searched = space("""
parameters:
  classifier.kind: {choice: [linear, cosine]}
  second_stage.name:
    - {choice: [null, disalign, tau_normalization], when: {classifier.kind: linear}}
    - {choice: [null, disalign], when: {classifier.kind: cosine}}
  second_stage.exponent: {uniform: [0.5, 1.5], when: {second_stage.name: disalign}}
""")
    base = {**BASE, "second_stage": {"name": "marc", "num_epochs": 3}}
    for start in (BASE, base):
        spec = SweepSpec(name="stages", base=start, space=searched.tree)
        seen = set()
        for draw, _ in draws(check_spec(spec).space, base=start):
            stage = spec.trial(draw).to_tree().get("second_stage")
            assert (stage is None) == (draw["second_stage.name"] is None)
            assert (stage or {}).get("exponent") == draw.get("second_stage.exponent")
            assert (stage or {}).get("num_epochs") in (None, 10 if start is BASE else 3)
            seen.add(draw["second_stage.name"])
        assert seen == {None, "disalign", "tau_normalization"}
    refused = space("parameters: {second_stage.name: {choice: [null, marc]}}")
    with pytest.raises(ConfigError, match="second_stage marc reads the lengths"):
        check_spec(SweepSpec(name="stages", base=BASE, space=refused.tree))


def test_truth_values_and_numbers_are_different_choices() -> None:
    searched = space("parameters: {optim.nesterov: {choice: [true, false]}, decoder.depth: {choice: [1, 0]}}")
    with pytest.raises(ConfigError, match=r"optim.nesterov = 1 is outside"):
        searched.to_optuna_params({"optim.nesterov": 1, "decoder.depth": 1}, BASE)


# ------------------------------------------------------------------------------------- pinned and counted draws


def test_a_draw_outside_the_space_is_refused_key_by_key() -> None:
    searched = space("""
parameters:
  loss.name: {choice: [focal, ldam]}
  loss.gamma: {uniform: [0.5, 3], when: {loss.name: focal}}
  optim.lr: {loguniform: [1e-3, 1e-1]}
""")
    assert searched.to_optuna_params({"loss.name": "focal", "loss.gamma": 3, "optim.lr": 0.1}, BASE) == {
        "loss.name": "focal",
        "loss.gamma": 3,
        "optim.lr": 0.1,
    }
    with pytest.raises(ConfigError) as error:
        searched.to_optuna_params({"loss.name": "ldam", "loss.gamma": 1, "optim.lr": 0.2, "optim.lrr": 1}, BASE)
    assert [str(problem) for problem in error.value.problems] == [
        "s.yaml:5: optim.lr = 0.2 is outside loguniform 0.001 .. 0.1.",
        "s.yaml:4: 'loss.gamma' isn't searched under these values; its range: uniform 0.5 .. 3.0 when loss.name = "
        "focal.",
        "'optim.lrr' isn't searched by the space; did you mean 'optim.lr'?",
    ]
    with pytest.raises(ConfigError, match=r"'loss.gamma' isn't given, and the space searches it: uniform 0.5 .. 3.0"):
        searched.to_optuna_params({"loss.name": "focal", "optim.lr": 0.1}, BASE)


def test_a_finite_space_is_counted_over_its_conditions() -> None:
    searched = space("""
parameters:
  method: {choice: [linear_probe, decoder]}
  decoder.depth: {int: [1, 3], when: {method: decoder}}
  loss.gamma: {uniform: [0, 1], when: {loss.name: focal}}
""")
    base = BASE | {"loss": {"name": "ldam"}}
    assert searched.size(base) == 4  # the continuous option is never active
    assert searched.enumerate_params(base, {"method": "decoder"}) == [
        {"method": "decoder", "decoder.depth": depth} for depth in (1, 2, 3)
    ]
    assert searched.size(BASE | {"loss": {"name": "focal"}}) is None
    assert space("parameters: {decoder.depth: {int: [1, 100]}}").size(BASE) is None


def test_a_keys_values_are_those_of_the_base_too_where_a_trial_does_not_sample_it() -> None:
    branches = space("""
parameters:
  features.num_views: {choice: [1, 2]}
  method:
    - {choice: [linear_probe], when: {features.num_views: 1}}
    - {choice: [zero_shot], when: {features.num_views: 2}}
""")
    assert branches.values_of("method", BASE) == ["linear_probe", "zero_shot"]
    sometimes = space("""
parameters:
  features.num_views: {choice: [1, 2]}
  method: {choice: [linear_probe, zero_shot], when: {features.num_views: 1}}
""")
    assert sometimes.values_of("method", BASE) == ["linear_probe", "zero_shot", "decoder"]
    assert sometimes.values_of("method", BASE | {"method": "zero_shot"}) == ["linear_probe", "zero_shot"]
    listed = space("configurations: {a: {method: linear_probe}, b: {optim.lr: 0.1}}")
    assert listed.values_of("method", BASE) == ["linear_probe", "decoder"]
    assert listed.values_of("features.store", BASE, default=True) == [True]


def test_choices_over_some_keys_are_those_that_trials_can_have() -> None:
    searched = space("""
parameters:
  method: {choice: [zero_shot, linear_probe, decoder]}
  classifier.kind: {choice: [linear, cosine], when: {method: [linear_probe, decoder]}}
  loss.name:
    - {choice: [cross_entropy, ldam], when: {classifier.kind: cosine}}
    - {choice: [cross_entropy, focal], when: {classifier.kind: linear}}
  optim.lr: {uniform: [1, 2], when: {method: decoder}}
""")
    assert searched.choices_over(["loss.name"], BASE) == [
        {},
        {"loss.name": "cross_entropy"},
        {"loss.name": "focal"},
        {"loss.name": "ldam"},
    ]
    assert searched.choices_over([], BASE) == [{}]
    with pytest.raises(ConfigError, match=r"optim.lr must be a choice or a short int here"):
        searched.choices_over(["optim.lr"], BASE)


# --------------------------------------------------------------------------------------------------- mistakes


def test_every_mistake_of_a_file_at_once() -> None:
    found = mistakes("""\
parameters:
  los.name: {choice: [focal]}
  loss.name: {chioce: [focal]}
  loss.gamma: {uniform: [3, 3]}
  loss.tau: {loguniform: [0, 1]}
  decoder.depth: {int: [1, 2.5]}
  decoder.width: {choice: []}
  optim.momentum: {uniform: [0, .inf]}
  optim.lr:
    - {uniform: [1, 2], when: {methd: decoder}}
    - {uniform: [1], when: {method: decoder}}
    - {uniform: [1, 2], int: [1, 2], when: decoder}
  optim.nesterov: {choice: [true, 1, 1.0]}
  optim.weight_decay: []
  optim.warmup_fraction: 0.5
  train.num_epochs: {choice: [[1]]}
  train.batch_size: {int: [true, 4]}
""")
    assert found == [
        "s.yaml:2: 'los.name' is no key of a trial; did you mean 'loss.name'?",
        "s.yaml:3: unknown word 'chioce' in the range of loss.name; did you mean 'choice'?",
        "s.yaml:4: uniform of loss.gamma is empty: low 3 is not below high 3.",
        "s.yaml:5: loguniform of loss.tau must start above 0, and starts at 0.",
        "s.yaml:6: int of decoder.depth must be [low, high] of whole numbers, and is [1, 2.5].",
        "s.yaml:7: choice of decoder.width must have a value.",
        "s.yaml:8: uniform of optim.momentum must be finite, and is [0, inf].",
        "s.yaml:11: uniform of optim.lr must be [low, high] of numbers, and is [1].",
        "s.yaml:12: optim.lr needs exactly one of choice, uniform, loguniform, int, and has uniform and int.",
        "s.yaml:12: 'when' of optim.lr must name keys and their values, such as {method: decoder}, and is 'decoder'.",
        "s.yaml:13: choice of optim.nesterov has 1.0 twice; remove one.",
        "s.yaml:14: optim.weight_decay has an empty list of branches; give one, or remove the key.",
        "s.yaml:15: optim.warmup_fraction must be a range such as {uniform: [0, 1]}, and is 0.5.",
        "s.yaml:16: choice of train.num_epochs must list plain values, and has [1].",
        "s.yaml:17: int of train.batch_size must be [low, high] of whole numbers, and is [True, 4].",
        "s.yaml:10: the condition of optim.lr names 'methd', no key of a trial; did you mean 'method'?",
    ]


@pytest.mark.parametrize("text", ["[]", "parameters: 3", "parameter: {}", "{parameters: {}, more: 1}"])
def test_another_layout_is_refused(text: str) -> None:
    assert mistakes(text) == [
        "s.yaml:1: a search space is a section 'parameters' of dotted keys and ranges, or a section 'configurations' "
        "of names with dotted keys and values, and nothing else."
    ]


@pytest.mark.parametrize("key", NOT_SEARCHED)
def test_what_would_make_trials_incomparable_is_not_searched(key: str) -> None:
    assert f"s.yaml:1: '{key}' can't be searched: " in mistakes(f"parameters: {{{key}: {{choice: [1, 2]}}}}")[0]


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("{method: decodr}", "has method = 'decodr', and method must be 'zero_shot', "),
        ("{loss.name: focl}", "has loss.name = 'focl', and loss.name must be"),
        ("{loss.name: lade}", "has loss.name = 'lade', which the space never chooses; "),
        ("{loss.tau: 1}", "names loss.tau, whose range is continuous; use choice"),
    ],
)
def test_conditions_that_can_never_hold(condition: str, says: str) -> None:
    found = mistakes(f"""\
parameters:
  optim.lr: {{uniform: [1, 2], when: {condition}}}
  loss.name: {{choice: [focal, logit_adjustment]}}
  loss.tau: {{uniform: [0.5, 1], when: {{loss.name: logit_adjustment}}}}
""")
    assert len(found) == 1
    assert found[0].startswith(f"s.yaml:2: the condition of optim.lr {says}")


def test_circles_are_named_without_what_only_hangs_on_them() -> None:
    assert mistakes("""\
parameters:
  optim.lr: {uniform: [1, 2], when: {loss.name: focal}}
  loss.name: {choice: [focal, ldam], when: {classifier.kind: linear}}
  classifier.kind: {choice: [linear, cosine], when: {loss.name: focal}}
""") == ["s.yaml:3: the conditions go in a circle through classifier.kind, loss.name; remove one."]
    assert (
        "in a circle through loss.name"
        in mistakes("parameters: {loss.name: {choice: [focal], when: {loss.name: focal}}}")[0]
    )


def test_conditions_on_what_nobody_sets() -> None:
    assert spec_mistakes("parameters:\n  optim.lr: {uniform: [1, 2], when: {loss.name: focal}}") == [
        "space of sweep s: the condition of optim.lr names loss.name, which neither base nor space sets; "
        "set it in base."
    ]


def test_branches_that_hold_at_once() -> None:
    found = spec_mistakes("""
parameters:
  method: {choice: [linear_probe, decoder]}
  optim.lr:
    - {uniform: [1, 2], when: {method: [linear_probe, decoder]}}
    - {uniform: [3, 4], when: {method: decoder}}
  train.num_epochs:
    - {choice: [1]}
    - {choice: [2], when: {method: decoder}}
""")
    assert [one.split(" (")[0] for one in found] == [
        "space of sweep s: two branches of optim.lr hold at once",
        "space of sweep s: two branches of train.num_epochs hold at once",
    ]


def test_keys_that_the_drawn_method_does_not_read() -> None:
    assert spec_mistakes("""
parameters:
  method: {choice: [zero_shot, linear_probe, decoder]}
  decoder.depth: {choice: [1, 2]}
  loss.name: {choice: [focal, ldam], when: {method: [linear_probe, decoder]}}
""") == [
        "space of sweep s: decoder.depth is searched when method = zero_shot, which doesn't read 'decoder'; "
        "add when: {method: decoder}.",
        "space of sweep s: decoder.depth is searched when method = linear_probe, which doesn't read 'decoder'; "
        "add when: {method: decoder}.",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{loss.gamma: {uniform: [0, 1]}}", "unknown key 'loss.gamma' for loss balanced_softmax; only focal has it"),
        ("{loss.name: {choice: [focal, ldm]}}", "loss.name is 'ldm', which is not one of its values"),
        ("{decoder.depth: {uniform: [1, 4]}}", "uniform of decoder.depth has fractions, and decoder.depth must be"),
        ("{decoder.depth: {int: [1, 40]}}", "decoder.depth must be less than or equal to 32, and is 40"),
        ("{optim.momentum: {uniform: [0, 1]}}", "optim.momentum must be less than 1, and is 1.0"),
        ("{optim.nesterov: {choice: [true, maybe]}}", "optim.nesterov must be a valid boolean, and is 'maybe'"),
        ("{decoder.width: {choice: [64, 66]}}", "decoder.width must be a multiple of decoder.num_heads (4), got 66."),
        (
            "{train.num_epochs: {choice: [1, 2]}, train.num_steps: {choice: [5]}}",
            "either num_epochs or num_steps",
        ),
    ],
)
def test_ranges_that_a_trial_can_not_have_are_the_spaces_mistake(text: str, says: str) -> None:
    located = parse_yaml(
        f"name: s\nbase: {{data: {{manifest: m}}, encoder: {{name: t}}, method: decoder}}\n"
        f"space:\n  parameters: {text}\n",
        "sweep.yaml",
    )
    with pytest.raises(ConfigError) as error:
        check_spec(SweepSpec.from_tree(located))
    assert len(error.value.problems) == 1
    assert str(error.value.problems[0]).startswith("sweep.yaml:4: ")
    assert says in str(error.value.problems[0])


# ----------------------------------------------------------------------------------------------------- shipped


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_shipped_spaces_read(path: Path) -> None:
    assert read_space(str(path)) == read_space(path.stem)


@pytest.mark.parametrize("name", SWEEPS)
def test_shipped_sweeps_are_right_and_all_their_draws_are_trials(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    spec: SweepSpec = importlib.import_module(f"sweeps.{name}").spec
    searched = check_spec(spec).space
    for draw, kept in draws(searched, 100, spec.base):
        assert searched.to_optuna_params(draw, spec.base) == kept
        trial = spec.trial(draw)
        assert {key.split(".")[0] for key in draw} & optional_sections() <= METHODS[trial.method].sections
        assert TrialConfig.from_tree(trial.to_tree()) == trial
    check_spec(with_settings(spec, spec.smoke, "--smoke"))


def test_a_name_that_is_no_space_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no search space is called 'quikstart'; .*did you mean 'quickstart'\?"):
        find_space("quikstart")
    with pytest.raises(ConfigError, match=r"there is no file 'inat.yaml'; .*did you mean 'inat'\?"):
        find_space("inat.yaml")


def test_spaces_are_found_where_the_wheel_puts_them(tmp_path: Path) -> None:
    """As package data, from another folder, with the repository out of reach."""
    shutil.copytree(
        ROOT / "imbvlm", tmp_path / "site" / "imbvlm", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    shutil.copytree(ROOT / "search_spaces", tmp_path / "site" / "imbvlm" / "search_spaces")
    code = (
        "from imbvlm.sweep.spec.space_file import find_space, read_space; read_space('inat'); print(find_space('inat'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "site" / "imbvlm" / "search_spaces" / "inat.yaml")
