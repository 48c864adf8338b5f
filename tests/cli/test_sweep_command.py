"""The command line of a sweep: options become settings, --resume finds the right folder, mistakes are sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imbvlm.base.errors import ConfigError
from imbvlm.cli import sweep_script
from imbvlm.cli.options import SweepOptions
from imbvlm.sweep.run.run_phases import removed_if_rejected
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.spec_overrides import with_settings
from imbvlm.sweep.spec.sweep_spec import SweepSpec

SPEC = SweepSpec.from_tree(
    {
        "name": "inat",
        "base": {"data": {"manifest": "m"}, "encoder": {"name": "tower"}, "method": "decoder"},
        "space": {"parameters": {"decoder.depth": {"choice": [1, 2]}}},
        "smoke": {"num_trials": 2, "refit_seeds": [0]},
    }
)


def options(*words: str) -> SweepOptions:
    """The options that a sweep's script reads from its arguments."""
    given: list[SweepOptions] = []

    def run(options: SweepOptions) -> int:
        given.append(options)
        return 0

    with pytest.raises(SystemExit, match="0"):
        sweep_script.run_function(SweepOptions, run, "A sweep.", words)
    return given[0]


def sweep_folder(storage: Path, name: str, spec: SweepSpec = SPEC) -> Path:
    (storage / name).mkdir(parents=True)
    spec.to_yaml(storage / name / "sweep.yaml")
    return storage / name


def test_options_become_settings_and_set_has_the_last_word() -> None:
    spec = sweep_script.with_options(
        SPEC,
        options(
            "--smoke", "--manifest", "n", "--storage", "s3://b/x", "--set", "num_trials=5", "--set", "decoder.depth=1"
        ),
    )
    assert (spec.num_trials, spec.refit_seeds, spec.storage) == (5, [0], "s3://b/x")
    assert spec.base["data"]["manifest"] == "n"
    assert spec.read_space().parameters == ()
    assert sweep_script.with_options(SPEC, options()) == SPEC


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        ((), None),
        (("--resume",), sweep_script.LATEST),
        (("--resume", "--smoke"), sweep_script.LATEST),
        (("--resume", "runs/x", "--smoke"), "runs/x"),
        (("--resume=runs/x",), "runs/x"),
    ],
)
def test_resume_without_a_folder_is_the_newest_sweep(words: tuple[str, ...], resume: str | None) -> None:
    given = options(*words)
    assert (given.resume, given.smoke) == (resume, "--smoke" in words)


def test_an_empty_storage_folder_is_rejected() -> None:
    """It meant the working directory."""
    with pytest.raises(ConfigError, match=r"storage: an empty name is no folder"):
        sweep_script.with_options(SPEC, options("--storage", ""))


@pytest.mark.parametrize(
    ("fields", "train"),
    [
        ({}, {"num_epochs": 2}),
        ({"base": {**SPEC.base, "train": {"num_epochs": 1, "batch_size": 8}}}, {"num_epochs": 1, "batch_size": 8}),
        ({"base": {**SPEC.base, "train": {"num_steps": 9000}}}, {"num_steps": 20}),
        ({"space": {"parameters": {"train.num_epochs": {"choice": [20, 50]}}}}, {"num_epochs": 2}),
        (
            {
                "base": {**SPEC.base, "method": "zero_shot"},
                "space": {"parameters": {"prompts.templates": {"choice": ["plain", "imagenet"]}}},
            },
            None,
        ),
    ],
)
def test_smoke_without_settings_of_its_own_is_few_short_trials(fields: dict[str, Any], train: Any) -> None:
    """A sweep's YAML that somebody has written has no `smoke`, and its first try is no night's work either."""
    own = SPEC.model_copy(update={"smoke": {}, "num_trials": 96, "confirm_trials": 3, **fields})
    spec = sweep_script.with_options(own, options("--smoke"))
    assert (spec.num_trials, spec.confirm_trials, spec.refit_seeds) == (4, 0, [0])
    assert spec.base.get("train") == train
    check_spec(spec)
    assert sweep_script.with_options(own, options("--smoke", "--set", "num_trials=9")).num_trials == 9


def test_smoke_runs_a_list_of_configurations_as_a_whole() -> None:
    space = {"configurations": {f"depth-{depth}": {"decoder.depth": depth} for depth in range(1, 7)}}
    spec = sweep_script.with_options(
        SPEC.model_copy(update={"smoke": {}, "space": space, "num_trials": 6}), options("--smoke")
    )
    assert (spec.num_trials, spec.base["train"]) == (6, {"num_epochs": 2})


def test_resume_takes_the_newest_of_this_name_and_no_other(tmp_path: Path) -> None:
    spec = with_settings(SPEC, {"storage": str(tmp_path)})
    for name in ("inat-20260101-000000", "inat-20260102-000000", "inat-small-20260103-000000", "inat-notes"):
        sweep_folder(tmp_path, name, spec)
    assert sweep_script.resumed_folder(spec, sweep_script.LATEST) == str(tmp_path / "inat-20260102-000000")
    chosen = str(tmp_path / "inat-20260101-000000")
    assert sweep_script.resumed_folder(spec, chosen) == chosen


def test_two_that_start_in_one_second_share_no_folder_and_are_found_again(tmp_path: Path) -> None:
    spec = with_settings(SPEC, {"storage": str(tmp_path)})
    folders = {sweep_script.new_folder(spec) for _ in range(3)}
    assert len(folders) == 3
    for folder in folders:
        sweep_folder(tmp_path, Path(folder).name, spec)
    assert sweep_script.resumed_folder(spec, sweep_script.LATEST) in folders


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (sweep_script.LATEST, "there is no sweep inat under"),
        ("nowhere", "nowhere is not a sweep's folder: it has no sweep.yaml."),
    ],
)
def test_nothing_to_go_on_with(tmp_path: Path, wanted: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sweep_script.resumed_folder(with_settings(SPEC, {"storage": str(tmp_path)}), wanted)


def test_going_on_as_another_sweep_is_refused_with_both_values(tmp_path: Path) -> None:
    folder = str(sweep_folder(tmp_path, "inat-20260101-000000"))
    assert sweep_script.resumed_folder(with_settings(SPEC, {"max_failures": 7}), folder) == folder
    with pytest.raises(ConfigError) as error:
        sweep_script.resumed_folder(with_settings(SPEC, {"num_trials": 7, "decoder.depth": 1}), folder)
    assert sorted(problem.message for problem in error.value.problems) == [
        "base.decoder.depth was None when the sweep began and is 1 now. Set it back, or add --fork.",
        "num_trials was 24 when the sweep began and is 7 now. Set it back, or add --fork.",
        "space.parameters.decoder.depth.choice was [1, 2] when the sweep began and is None now. "
        "Set it back, or add --fork.",
    ]


def test_mistakes_are_sentences_on_stderr_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sweep_script.run_script(SPEC, ["--dry-run", "--set", "optim.lrr=1", "--set", "num_trials=none"])
    assert stop.value.code == 1
    said: Any = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "imbvlm: 2 mistakes in the configuration:",
        "  --set: 'optim.lrr' is no key of a trial; did you mean 'optim.lr'?",
        "  --set: num_trials must be a valid integer, and is 'none'.",
    ]


def test_a_sweep_that_never_began_is_nothing_to_go_on_with(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        sweep_script.run_script(SPEC, [f"--manifest={tmp_path / 'none.parquet'}", f"--storage={tmp_path / 'runs'}"])
    assert f"imbvlm: the manifest {tmp_path / 'none.parquet'} is not there; make one" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_weights_that_cannot_be_had_are_said_before_there_is_a_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They were missed after Ray had started, in a folder that looked like a sweep; a plan was kept there before."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    base = {"data": {"manifest": "embedded:fashion_mnist_lt"}, "encoder": {"name": "openai_vit_b32"}}
    made = SPEC.model_copy(update={"base": {**base, "method": "linear_probe"}, "space": {"parameters": {}}})
    for words in ([], ["--plan", "--measure=no"]):
        with pytest.raises(SystemExit) as stop:
            sweep_script.run_script(made, words)
        assert stop.value.code == 1
        assert "openai_vit_b32" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_where_it_is_new_and_its_sweep_never_began(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def begin(folder: Path, names: tuple[str, ...]) -> None:
        with removed_if_rejected(str(folder)):
            for name in names:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("x")
            raise ConfigError([])

    def rejected(folder: Path, *names: str) -> None:
        with pytest.raises(ConfigError):
            begin(folder, names)

    rejected(tmp_path / "runs" / "deep" / "inat-1", "ray.log", "provenance.json")
    assert list(tmp_path.iterdir()) == []
    # Another one's files stay, and so does what a sweep has begun.
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes").write_text("mine")
    rejected(tmp_path / "runs" / "inat-1", "ray.log")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["notes"]
    rejected(tmp_path / "runs" / "inat-2", "ray.log", "sweep.yaml")
    (tmp_path / "runs" / "inat-3").mkdir()
    rejected(tmp_path / "runs" / "inat-3", "ray.log")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["inat-2", "inat-3", "notes"]


def test_wrong_usage_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sweep_script.run_script(SPEC, ["--dryrun"])
    assert stop.value.code == 2
