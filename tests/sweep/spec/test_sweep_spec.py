"""A sweep's specification: strict, to and from YAML, settings that fix what was searched, and a check of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imbvlm.base.errors import ConfigError
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.cli.sweep_script import parse_settings, spec_differences
from imbvlm.config.trial_config import require_section
from imbvlm.sweep.spec.objectives import ACCURACIES
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.spec_overrides import with_settings
from imbvlm.sweep.spec.sweep_spec import AshaConfig, NoSchedulerConfig, SweepSpec

BASE: dict[str, Any] = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}}
SPACE: dict[str, Any] = {
    "parameters": {
        "method": {"choice": ["linear_probe", "decoder"]},
        "decoder.depth": {"choice": [1, 2], "when": {"method": "decoder"}},
        "loss.name": {"choice": ["focal", "balanced_softmax"]},
        "loss.gamma": {"uniform": [0.5, 3.0], "when": {"loss.name": "focal"}},
        "optim.lr": {"loguniform": [0.01, 1.0]},
    }
}


def spec(**fields: Any) -> SweepSpec:
    return SweepSpec.from_tree({"name": "small", "base": BASE, "space": SPACE, **fields})


def problems(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    return [str(problem) for problem in error.value.problems]


def refused(made: SweepSpec) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_spec(made)
    return problems(error)


# ------------------------------------------------------------------------------------------------------ reading


def test_every_mistake_of_a_file_at_once() -> None:
    text = """\
name: my sweep
base: 3
space: [a]
num_trails: 4
num_workers: 1.0
gpus_per_worker: true
searcher:
  name: grid
  seeds: 1
trial_scheduler: {name: asha, grace: 0.5}
refit_seeds: [0, 1, 1]
confirm_seeds: [2, 2]
"""
    with pytest.raises(ConfigError) as error:
        SweepSpec.from_tree(parse_yaml(text, "sweep.yaml"))
    messages = sorted(problems(error), key=lambda message: int(message.split(":")[1]))
    assert messages == [
        "sweep.yaml:1: name is 'my sweep': String should match pattern '^[A-Za-z0-9][A-Za-z0-9_.-]*$'.",
        "sweep.yaml:2: base must be a section of keys, and is 3.",
        "sweep.yaml:3: space must be a valid string or a section of keys, and is ['a'].",
        "sweep.yaml:4: unknown key 'num_trails'; did you mean 'num_trials'?",
        "sweep.yaml:5: num_workers must be a valid integer, and is 1.0.",
        "sweep.yaml:6: gpus_per_worker must be a valid number, and is True.",
        "sweep.yaml:8: searcher.name is 'grid', which is not one of its values; valid: brute_force, cmaes, gp, nsga2, "
        "nsga3, qmc, random, tpe.",
        "sweep.yaml:9: unknown key 'searcher.seeds'; did you mean 'seed'?",
        "sweep.yaml:10: unknown key 'trial_scheduler.grace' for trial_scheduler asha; did you mean 'grace_fraction'?",
        "sweep.yaml:11: refit_seeds must have each seed once, got 0, 1, 1. Remove the repeated ones.",
        "sweep.yaml:12: confirm_seeds must have each seed once, got 2, 2. Remove the repeated ones.",
    ]


def test_variants_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"'trial_scheduler.name' is required and is not given; valid: asha, none"):
        spec(trial_scheduler={"grace_fraction": 0.5})
    with pytest.raises(ConfigError, match=r"trial_scheduler.name is 'hyperband'.*valid: asha, none"):
        spec(trial_scheduler={"name": "hyperband"})


def test_files_carry_their_space_and_are_read_back_equal(tmp_path: Path) -> None:
    before = spec(space="quickstart", stratify=["method"], trial_scheduler={"name": "none"}, num_trials=7)
    before.to_yaml(tmp_path / "sweep.yaml")
    after = SweepSpec.from_yaml(tmp_path / "sweep.yaml")
    assert after.space == before.read_space().tree
    assert {**after.to_tree(), "space": 0} == {**before.to_tree(), "space": 0}
    assert after.read_space().tree == before.read_space().tree
    again = SweepSpec.from_tree(parse_yaml(after.to_yaml_text()))
    assert again == after
    assert spec_differences(before, after) == []


def test_python_and_yaml_say_the_same() -> None:
    assert SweepSpec(name="small", base=BASE, space=SPACE) == spec()


def test_a_mistake_in_python_is_said_in_the_same_words() -> None:
    with pytest.raises(ConfigError) as error:
        SweepSpec(name="small", base=BASE, space=SPACE, num_trails=4, searcher={"sed": 1}, num_workers=0)
    assert sorted(problems(error)) == [
        "num_workers must be greater than or equal to 1, and is 0.",
        "unknown key 'num_trails'; did you mean 'num_trials'?",
        "unknown key 'searcher.sed'; did you mean 'seed'?",
    ]
    with pytest.raises(ConfigError, match="unknown key 'grace'; did you mean 'grace_fraction'"):
        AshaConfig(grace=0.5)


# ---------------------------------------------------------------------------------------------------- settings


def test_settings_of_the_sweep_and_of_its_trials() -> None:
    made = with_settings(
        spec(),
        {"num_trials": 5, "searcher.seed": 3, "searcher.name": "random", "train.batch_size": 32, "data.manifest": "n"},
    )
    assert (made.num_trials, made.searcher.seed, made.searcher.name) == (5, 3, "random")
    trial = made.trial({"method": "linear_probe", "loss.name": "focal", "loss.gamma": 1.0, "optim.lr": 0.5})
    assert trial.data.manifest == "n"
    assert require_section(trial.train).batch_size == 32
    assert made.space == SPACE
    assert spec().base == BASE  # the old one is as it was


def test_another_scheduler_drops_the_old_ones_options() -> None:
    made = spec(trial_scheduler={"name": "asha", "reduction_factor": 4})
    assert with_settings(made, {"trial_scheduler.name": "none"}).trial_scheduler == NoSchedulerConfig()
    assert with_settings(made, {"trial_scheduler.reduction_factor": 2}).trial_scheduler == AshaConfig(
        reduction_factor=2
    )


def test_a_searched_key_that_is_set_is_searched_no_more() -> None:
    made = with_settings(spec(), {"optim.lr": 0.5, "method": "decoder"})
    space = check_spec(made).space
    assert [parameter.key for parameter in space.parameters] == ["decoder.depth", "loss.name", "loss.gamma"]
    draw = {"decoder.depth": 1, "loss.name": "balanced_softmax"}
    assert space.to_optuna_params(draw, made.base) == draw
    trial = made.trial(draw)
    assert require_section(trial.optim).lr == 0.5
    assert trial.method == "decoder"


def test_an_option_that_is_set_holds_where_its_variant_is_sampled() -> None:
    made = with_settings(spec(), {"loss.gamma": 1.5})
    check_spec(made)
    common = {"method": "linear_probe", "optim.lr": 0.5}
    focal = made.trial({**common, "loss.name": "focal"}).to_tree()["loss"]
    assert focal == {"name": "focal", "gamma": 1.5}
    assert "gamma" not in made.trial({**common, "loss.name": "balanced_softmax"}).to_tree()["loss"]


def test_another_space_and_a_fixed_key_of_it_at_once() -> None:
    other = {"parameters": {"optim.momentum": {"uniform": [0, 0.9]}, "optim.lr": {"uniform": [0.1, 1]}}}
    made = with_settings(spec(base={**BASE, "method": "decoder"}), {"optim.momentum": 0.5, "space": other})
    assert [parameter.key for parameter in check_spec(made).space.parameters] == ["optim.lr"]
    assert made.base["optim"] == {"momentum": 0.5}


def test_smoke_settings_then_settings_of_the_command_line() -> None:
    made = spec(smoke={"num_trials": 2, "decoder.depth": 1, "refit_seeds": [0]})
    smoke = with_settings(with_settings(made, made.smoke, "--smoke"), {"num_trials": 3})
    assert (smoke.num_trials, smoke.refit_seeds, smoke.base["decoder"]) == (3, [0], {"depth": 1})


def test_every_wrong_setting_at_once_with_where_it_was_set() -> None:
    with pytest.raises(ConfigError) as error:
        with_settings(
            spec(),
            {
                "num_trails": 3,
                "optim.lrr": 1,
                "optim.lr": "fast",
                "data.on_bad_image": "strct",
                "base.optim.lr": 1,
                "space.parameters": {},
                "searcher.sed": 1,
            },
        )
    assert problems(error) == [
        "--set: 'num_trails' is no key of a sweep or trial; did you mean 'num_trials'?",
        "--set: 'optim.lrr' is no key of a trial; did you mean 'optim.lr'?",
        "--set: optim.lr must be a valid number, and is 'fast'.",
        "--set: data.on_bad_image must be 'quarantine' or 'strict', and is 'strct'.",
        "--set: 'base.optim.lr' is set as 'optim.lr'.",
        "--set: space is set as a whole, not 'space.parameters'; name all its parts.",
        "--set: 'searcher.sed' is no key of a sweep or trial; did you mean 'searcher.seed'?",
    ]


def test_wrong_types_of_settings() -> None:
    with pytest.raises(ConfigError) as error:
        with_settings(spec(), {"num_trials": "many", "num_workers": 0})
    assert problems(error) == [
        "--set: num_trials must be a valid integer, and is 'many'.",
        "--set: num_workers must be greater than or equal to 1, and is 0.",
    ]


def test_a_setting_that_clashes_with_another_key_is_found_by_the_check() -> None:
    messages = refused(with_settings(spec(), {"decoder.width": 30}))
    assert messages == ["--set: decoder.width must be a multiple of decoder.num_heads (4), got 30."]


def test_words_of_the_command_line_are_yaml() -> None:
    assert parse_settings(["optim.lr=5e-4", "a.b=no", "c=[1, 2]", "d= x=y "]) == {
        "optim.lr": 5e-4,
        "a.b": "no",
        "c": [1, 2],
        "d": "x=y",
    }
    with pytest.raises(ConfigError, match=r"--set takes KEY=VALUE, got 'optim.lr'"):
        parse_settings(["optim.lr"])


def test_differences_are_what_would_change_the_search() -> None:
    now = with_settings(spec(num_trials=9, storage="elsewhere", max_failures=9), {"loss.name": "focal"})
    assert sorted(spec_differences(spec(), now)) == [
        ("base.loss.name", None, "focal"),
        ("num_trials", 24, 9),
        ("space.parameters.loss.name.choice", ["focal", "balanced_softmax"], None),
    ]


# --------------------------------------------------------------------------------------------------- the check


def test_a_right_one_is_right() -> None:
    assert [parameter.key for parameter in check_spec(spec()).space.parameters] == list(SPACE["parameters"])


def test_the_base_is_checked_with_its_lines() -> None:
    text = """\
name: small
objective: val/balanced
stratify: [method, optim.lr, los.name]
base:
  data: {manifest: m}
  encoder: {name: tower}
  method: zero_shot
  decodr: {depth: 1}
  loss: {name: focal}
space:
  parameters: {optim.lr: {uniform: [1, 2], when: {decoder.depth: 1}}}
"""
    messages = refused(SweepSpec.from_tree(parse_yaml(text, "sweep.yaml")))
    assert messages == [
        "sweep.yaml:2: objective 'val/balanced' is not measured; did you mean 'val/balanced_accuracy'?",
        "sweep.yaml:11: the condition of optim.lr names decoder.depth, which neither base nor space sets; "
        "set it in base.",
        "sweep.yaml:3: stratify names 'method', which the space doesn't choose from a list; "
        "nothing can be named here, so leave it out.",
        "sweep.yaml:3: stratify names 'optim.lr', which the space doesn't choose from a list; "
        "nothing can be named here, so leave it out.",
        "sweep.yaml:3: stratify names 'los.name', which the space doesn't choose from a list; "
        "nothing can be named here, so leave it out.",
        "sweep.yaml:8: unknown key 'decodr'; did you mean 'decoder'?",
        "sweep.yaml:9: section 'loss' is read by no method of the space (zero_shot); remove it.",
    ]


def test_values_of_the_base_are_checked_in_every_trial_that_has_them() -> None:
    text = """\
name: small
base:
  encoder: {name: tower}
  decoder:
    depht: 1
  train: {num_epochs: 3, num_steps: 5}
space:
  parameters: {method: {choice: [linear_probe, decoder]}}
"""
    messages = refused(SweepSpec.from_tree(parse_yaml(text, "sweep.yaml")))
    assert sorted(messages) == [
        "sweep.yaml:2: 'data' is required and is not given.",
        "sweep.yaml:5: unknown key 'decoder.depht'; did you mean 'depth'?",
        "sweep.yaml:6: train must have either num_epochs or num_steps, got both. Remove one.",
    ]


def test_sections_that_some_method_of_the_space_reads_may_stand_in_the_base() -> None:
    made = spec(base={**BASE, "decoder": {"width": 64}})
    check_spec(made)
    probe = made.trial({"method": "linear_probe", "loss.name": "balanced_softmax", "optim.lr": 0.1})
    assert probe.decoder is None
    deep = made.trial({"method": "decoder", "decoder.depth": 2, "loss.name": "balanced_softmax", "optim.lr": 0.1})
    assert (require_section(deep.decoder).width, require_section(deep.decoder).depth) == (64, 2)


def test_a_listed_configuration_without_a_method_reads_the_sections_of_the_bases() -> None:
    configurations = {"probe": {"method": "linear_probe"}, "low-rate": {"optim.lr": 0.1}}
    base = {**BASE, "method": "decoder", "decoder": {"width": 64}}
    check_spec(spec(base=base, space={"configurations": configurations}))
    del configurations["low-rate"]
    (problem,) = refused(spec(base=base, space={"configurations": configurations}))
    assert "section 'decoder' is read by no method of the space (linear_probe)" in problem


def test_a_trials_own_seed_is_not_run_again_and_there_must_be_another() -> None:
    made = spec(confirm_trials=2)
    assert made.more_seeds == [1, 2]
    reseeded = with_settings(made, {"train.seed": 1})
    check_spec(reseeded)
    assert reseeded.more_seeds == [2]
    only = spec(confirm_trials=2, confirm_seeds=[0])
    assert refused(only) == [
        "confirm_seeds of sweep small: confirm_seeds has only 0, with which every trial runs already (train.seed); "
        "add another."
    ]
    check_spec(spec(confirm_seeds=[0]))


def test_a_space_that_is_not_there_is_named_where_it_was_asked_for() -> None:
    located = parse_yaml("name: s\nbase: {}\nspace: quikstart\n", "sweep.yaml")
    messages = refused(SweepSpec.from_tree(located))
    assert len(messages) == 1
    assert messages[0].startswith("sweep.yaml:3: no search space is called 'quikstart'; ")


def test_wrong_smoke_settings_show_before_they_are_needed() -> None:
    assert refused(spec(smoke={"num_trails": 2})) == [
        "smoke: 'num_trails' is no key of a sweep or trial; did you mean 'num_trials'?"
    ]
    assert refused(spec(smoke={"decoder.width": 30})) == [
        "smoke: decoder.width must be a multiple of decoder.num_heads (4), got 30."
    ]


def test_a_worker_has_no_more_cpus_than_threads_can_be_started() -> None:
    with pytest.raises(ConfigError, match="cpus_per_worker must be less than or equal to 1024, and is 100000"):
        with_settings(spec(), {"cpus_per_worker": 100_000})


@pytest.mark.parametrize("objective", ACCURACIES)
def test_what_is_compared_is_the_running_maximum(objective: str) -> None:
    assert spec(objective=objective).best_objective == f"val/best_{objective.removeprefix('val/')}"


def test_corner_trials_have_every_combination_that_decides_what_exists() -> None:
    made = spec()
    trials = list(check_spec(made).corner_trials())
    seen = {(trial.method, require_section(trial.loss).name) for trial in trials}
    assert len(seen) == 4
    assert {require_section(trial.decoder).depth for trial in trials if trial.method == "decoder"} == {1, 2}
    assert {require_section(trial.optim).lr for trial in trials} == {0.01, 1.0}


PINNED = """\
name: pinned
base: {data: {manifest: m}, encoder: {name: tower}, method: decoder}
space:
  parameters:
    decoder.depth: {choice: [1, 2]}
    train.num_epochs: {choice: [5, 10]}
    optim.lr: {uniform: [0.01, 0.1], when: {decoder.depth: 2}}
first_trials: [{decoder.depth: 2, train.num_epochs: 10, optim.lr: 0.05}, {decoder.depth: 1, train.num_epochs: 5}]
"""


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"train.num_epochs": 1}, [{"decoder.depth": 2, "optim.lr": 0.05}, {"decoder.depth": 1}]),
        ({"decoder.depth": 2}, [{"train.num_epochs": 10, "optim.lr": 0.05}]),
        ({"decoder.depth": 1}, [{"train.num_epochs": 5}]),
        ({"optim.momentum": 0.5}, None),
    ],
)
def test_a_fixed_key_shortens_the_pinned_trials_and_leaves_out_what_it_excludes(
    settings: dict[str, float], left: list[dict[str, float]] | None
) -> None:
    spec = SweepSpec.from_tree(parse_yaml(PINNED, "sweep.yaml"))
    check_spec(spec)
    changed = with_settings(spec, settings)
    check_spec(changed)
    assert changed.first_trials == (spec.first_trials if left is None else left)


def test_a_pinned_trial_outside_the_space_is_refused_whatever_else_is_set() -> None:
    text = PINNED.replace("optim.lr: 0.05", "optim.lr: 5.0")
    with pytest.raises(ConfigError, match=r"first_trials\[0\]"):
        check_spec(with_settings(SweepSpec.from_tree(parse_yaml(text, "sweep.yaml")), {"train.num_epochs": 1}))


def test_features_lie_with_the_sweeps_unless_a_folder_is_named() -> None:
    assert spec(storage="s3://bucket/sweeps").feature_root == "s3://bucket/sweeps/features"
    assert spec(storage="s3://bucket/sweeps", feature_folder="/mnt/features").feature_root == "/mnt/features"
    check_spec(spec(feature_folder="s3://bucket/features"))
    with pytest.raises(ConfigError, match="folder must be a path on each machine, got 'copies'"):
        spec(feature_copies={"folder": "copies"})


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (f"{{loguniform: [1, {'1' + '0' * 400}]}}", "loguniform of optim.lr must be finite, and is [1, 10000"),
        ("{loguniform: [1, 1e400]}", "loguniform of optim.lr must be finite, and is [1, inf]"),
        ("{uniform: [.nan, 1]}", "uniform of optim.lr must be finite, and is [nan, 1]"),
        ("{uniform: [-1e308, 1e308]}", "uniform of optim.lr must be finite, and is [-1e+308, 1e+308]"),
        ("{choice: [.nan, 0.1]}", "choice of optim.lr must be finite, and has nan"),
    ],
)
def test_numbers_that_are_none_are_said_as_they_were_written(written: str, said: str) -> None:
    """A whole number of 401 digits was a traceback, and behind a `--set` a .nan was a None."""
    tree = parse_yaml(f"{{parameters: {{optim.lr: {written}}}}}").data
    made = SweepSpec.from_tree({"name": "x", "base": BASE, "space": tree})
    for sweep in (made, with_settings(made, {"num_trials": 3})):
        with pytest.raises(ConfigError) as error:
            check_spec(sweep)
        (problem,) = error.value.problems
        assert problem.message.startswith(said)


def test_no_mistake_of_a_sweep_hides_another() -> None:
    """Those of first_trials, smoke and trials came up once all others were fixed."""
    made = SweepSpec.from_tree({
        "name": "x", "base": {**BASE, "method": "linear_probe", "train": {"num_epochs": 2, "num_steps": 3}},
        "space": {"parameters": {"optim.lr": {"loguniform": [0.1, 1]}}}, "stratify": ["loss.nam"],
        "first_trials": [{"optim.lr": 7}], "smoke": {"num_trialz": 2}, "constraints": {"val/x": 1}, "max_cost": 4.0,
    })  # fmt: skip
    with pytest.raises(ConfigError) as error:
        check_spec(made)
    said = [problem.message for problem in error.value.problems]
    for part in (
        "'val/x' is not",
        "stratify names",
        "max_cost is 4",
        "got both",
        "first_trials[0]",
        "num_trialz",
    ):
        assert sum(part in message for message in said) == 1, part
    assert len(said) == 6


def test_all_mistakes_of_a_file_are_shown_at_once_however_deep(tmp_path: Path) -> None:
    """Mistakes of the space, and then of the base, came up once those before them were fixed."""
    path = tmp_path / "sweep.yaml"
    lines = [
        "name: x", "base:", "  data: {manifest: m.parquet}", "  encoder: {name: tinylit_lite0}",
        "  method: linear_probe", "  optim: {lr: -1}", "  loss: {nme: focal}", "objektive: val/x", "num_trials: many",
        "space:", "  parameters:", "    optim.momentum: {uniform: [1, 0]}", "    loss.nam: {choice: [focal]}",
        "    optim.weight_decay: {uniform: [0, 0.1]}",
    ]  # fmt: skip
    said = {
        6: "optim.lr must be greater than 0, and is -1", 7: "unknown key 'loss.nme'; did you mean 'loss.name'?",
        8: "unknown key 'objektive'", 9: "num_trials must be a valid integer", 12: "uniform of optim.momentum is empty",
        13: "'loss.nam' is no key of a trial",
    }  # fmt: skip
    for left_out in ([], [8, 9], [8, 9, 12, 13], [6, 7]):
        path.write_text("\n".join("" if n in left_out else line for n, line in enumerate(lines, 1)))
        with pytest.raises(ConfigError) as error:
            check_spec(SweepSpec.from_yaml(path))
        by_line = {int(problem.where.rpartition(":")[2]): problem.message for problem in error.value.problems}
        assert sorted(by_line) == [n for n in said if n not in left_out]
        assert len(by_line) == len(error.value.problems)
        for number, message in by_line.items():
            assert said[number].split(";")[0].split(",")[0] in message
