"""The spec in a sweep's folder: an earlier version's sweep keeps its rules, and lists run no plug-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run_command
from documented_plugins import documented
from sweep_folder import SPACE, sweep_spec, write_sweep

from imbvlm.base.errors import ConfigError
from imbvlm.base.plugin_files import use_plugins
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.trial_config import apply_overrides
from imbvlm.sweep.records.provenance import begin_provenance
from imbvlm.sweep.records.sweep_folder import read_listed_spec, read_spec


@pytest.mark.parametrize(
    ("missing", "rules"),
    [
        ((), (None, None, 5)),
        (("confirm_folds",), (None, None, None)),
        (("confirm_folds", "num_folds", "select_by"), (1, "objective", None)),
    ],
)
def test_a_sweep_that_began_without_a_rule_goes_on_without_it(
    tmp_path: Path, missing: tuple[str, ...], rules: tuple[int | str | None, ...]
) -> None:
    tree = {key: value for key, value in sweep_spec().to_tree().items() if key not in missing}
    (tmp_path / "sweep.yaml").write_text(dump_yaml(tree))
    spec = read_spec(str(tmp_path))
    assert (spec.num_folds, spec.select_by, spec.confirm_folds) == rules


@pytest.mark.parametrize(
    ("name", "fields", "choices"),
    [
        ("losses.py", {}, {"loss.name": ["poly1", "focal"]}),
        ("methods.py", {}, {"method": ["hidden_probe", "linear_probe", "decoder"]}),
        ("stages.py", {}, {"second_stage.name": ["offset"]}),
        ("samplers.py", {"searcher": {"name": "wide_tpe", "candidates": 7}}, {}),
        ("encoders.py", {}, {"encoder.name": ["datacomp_vit_b32"]}),
    ],
)
def test_a_list_has_a_sweep_whose_plug_in_is_not_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    fields: dict[str, object],
    choices: dict[str, list[str]],
) -> None:
    code, folder = tmp_path / name, tmp_path / "runs" / "own"
    code.write_text(documented(name))
    space = {"parameters": {**SPACE["parameters"], **{key: {"choice": values} for key, values in choices.items()}}}
    first = {key: values[0] for key, values in choices.items()}
    with use_plugins(str(code)) as plugins:
        write_sweep(folder, [20, 5, 1], num_trials=2, space=space, plugins=[str(code)], **fields)
        begin_provenance(str(folder), {"code": {}, "torch": "", "data": "", "plugins": plugins.digests})
        for path in (folder / "trials").glob("t*.json"):
            record = json.loads(path.read_text())
            record["config"] = apply_overrides(record["config"], first)
            path.write_text(json.dumps(record))
    code.unlink()
    capsys.readouterr()
    assert run_command("sweep", "list", tmp_path / "runs") == 0
    listed = capsys.readouterr().out
    assert "2/2" in listed
    assert "unreadable" not in listed
    assert run_command("sweep", "list", tmp_path / "runs", "--json") == 0
    (state,) = json.loads(capsys.readouterr().out)
    assert (state["state"], state["num_ended"]) == ("unfinished", 2)
    assert state["best"]["trial_id"] in ("t00001", "t00002")


def test_a_list_says_of_a_sampler_that_no_plug_in_brings_that_it_is_none(tmp_path: Path) -> None:
    tree = {**sweep_spec().to_tree(), "searcher": {"name": "no_sampler"}}
    (tmp_path / "sweep.yaml").write_text(dump_yaml(tree))
    with pytest.raises(ConfigError, match="no_sampler"):
        read_listed_spec(str(tmp_path))
