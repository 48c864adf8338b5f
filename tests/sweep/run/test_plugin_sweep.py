"""A sweep with a loss of one's own on a local Ray: killed, gone on with, refused after an edit, reported, exported."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
from documented_plugins import documented
from faulty_sweep import NUM_TRIALS, Sweep, wait_gone, write_manifest
from own_plugin import write_own_plugin
from quickstart_sweep import imbvlm
from towers import write_tower

from imbvlm.base.plugin_files import use_plugins

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SPACE = {"parameters": {"loss.name": {"choice": ["poly1", "focal"]}, "optim.lr": {"choice": [0.05, 0.2, 0.5]}}}
ALONE = {"RAY_ADDRESS": "local"}


def test_a_sweep_with_a_plug_in_is_killed_resumed_refused_and_read(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.parquet")
    code = tmp_path / "own" / "losses.py"
    code.parent.mkdir()
    code.write_text(documented("losses.py"))
    sweep = Sweep(tmp_path, tmp_path / "manifest.parquet", space=SPACE, plugins=[str(code)], max_pack_size=2)
    sweep.start(environment=ALONE)
    sweep.wait_for(lambda: sweep.num_ended() >= 1)
    assert sweep.process is not None
    os.kill(sweep.process.pid, signal.SIGKILL)
    wait_gone(sweep.process.pid)
    assert (sweep.path / "plugins" / "losses.py").read_text() == documented("losses.py")
    # An edit is refused with its line.
    code.write_text(documented("losses.py").replace("(1 - torch.exp", "(2 - torch.exp"))
    refused = sweep.run("--resume", code=1, environment=ALONE)
    assert "the plug-in losses.py has changed (@@" in refused
    assert "(2 - torch.exp(-losses))" in refused
    refused = sweep.begin("sweep", "resume", str(sweep.path), environment=ALONE).end(code=1)
    assert "its code runs only where you name it" in refused
    # The file of the user may be gone: the printed command names the folder's copy.
    code.unlink()
    command = shlex.split(refused.splitlines()[-1].removeprefix("imbvlm: then run: imbvlm "))
    assert "go on with" not in sweep.begin(*command, environment=ALONE).end()
    losses = [record["config"]["loss"]["name"] for record in sweep.finished().values()]
    assert len(losses) == NUM_TRIALS
    assert losses.count("poly1") == 3
    for words in (("sweep", "show"), ("report",), ("compare",), ("export", "-o", str(tmp_path / "model"))):
        asked = [*words, str(sweep.path)]
        assert "--plugin" in imbvlm(*asked, cwd=tmp_path, code=1)
        imbvlm(*asked, "--plugin", str(sweep.path / "plugins" / "losses.py"), cwd=tmp_path)
    # Prediction needs no loss.
    assert "0.png" in imbvlm("predict", str(tmp_path / "model"), str(_photo(tmp_path)), cwd=tmp_path)


def test_a_package_with_a_loss_a_method_an_encoder_and_a_sampler_is_killed_resumed_and_predicts(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.parquet")
    write_tower(tmp_path / "tower", "vit")
    package = write_own_plugin(tmp_path / "code", tmp_path / "tower")
    space = {"parameters": {"loss.name": {"choice": ["gce", "focal"]}, "optim.lr": {"choice": [0.05, 0.2, 0.5]}}}
    sweep = Sweep(tmp_path, tmp_path / "manifest.parquet", space=space, plugins=[str(package)])
    base = {**sweep.spec().base, "encoder": {"name": "my_tower"}, "method": "gated_pool"}
    with use_plugins(str(package)):
        sweep.change(base=base, searcher={"name": "round_robin"})
    sweep.start(environment=ALONE)
    sweep.wait_for(lambda: sweep.num_ended() >= 1)
    assert sweep.process is not None
    os.kill(sweep.process.pid, signal.SIGKILL)
    wait_gone(sweep.process.pid)
    heads = package / "heads.py"
    heads.write_text(heads.read_text().replace(".softmax(dim=1)", ".sigmoid()"))
    assert "the plug-in own/heads.py has changed (@@" in sweep.run("--resume", code=1, environment=ALONE)
    heads.write_text(heads.read_text().replace(".sigmoid()", ".softmax(dim=1)"))
    printed = sweep.run("--resume", environment=ALONE)
    # Every value in its turn gives each configuration once.
    draws = [(record["draw"]["loss.name"], record["draw"]["optim.lr"]) for record in sweep.finished().values()]
    assert len(set(draws)) == len(draws) == NUM_TRIALS
    assert "my_tower is licensed for non-commercial use only" in printed
    assert "my_tower was pretrained on the same shirts" in (sweep.path / "report.html").read_text()
    named = ("--plugin", str(package))
    # More than there are baselines.
    imbvlm("export", str(sweep.path), "--top", "6", "-o", str(tmp_path / "models"), *named, cwd=tmp_path)
    methods = {
        path: json.loads(path.read_text())["config"]["method"]
        for path in (tmp_path / "models").glob("*/model/config.json")
    }
    model = next(path.parents[1] for path, method in methods.items() if method == "gated_pool")
    photo = ("predict", str(model), str(_photo(tmp_path)))
    assert "its code runs only where you name it" in imbvlm(*photo, cwd=tmp_path, code=1)
    assert "0.png" in imbvlm(*photo, *named, cwd=tmp_path)


def test_a_plug_in_that_does_not_run_in_workers_fails_each_trial_once_with_the_cause(tmp_path: Path) -> None:
    """As on machines that lack a library of it."""
    write_manifest(tmp_path / "manifest.parquet")
    code = tmp_path / "losses.py"
    alone = "import sys\nif 'default_worker' in sys.argv[0]:\n    import not_there\n"
    code.write_text(documented("losses.py").replace("from typing", f"{alone}from typing", 1))
    space = {"parameters": {"loss.name": {"choice": ["poly1"]}, "optim.lr": {"choice": [0.05, 0.5]}}}
    sweep = Sweep(tmp_path, tmp_path / "manifest.parquet", space=space, plugins=[str(code)], num_trials=2)
    printed = sweep.run(code=1, environment=ALONE)
    assert "no trial of 2 gave a result" in printed
    assert "losses.py:5: the plug-in can't be imported: ModuleNotFoundError: No module named 'not_there'" in printed
    assert {record["state"] for record in sweep.records().values()} == {"failed"}


def _photo(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (28, 28)).save(folder / "0.png")
    return folder / "0.png"
