"""Plug-ins: which of them registries have where, what crosses to another process, and what is refused where."""

from __future__ import annotations

import hashlib
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from imbvlm.base.errors import ConfigError, PluginNeededError
from imbvlm.base.plugin_files import plugin_change, require_plugins, use_plugins, write_copies
from imbvlm.base.plugins import Plugins, active_plugins
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import SweepSpec

LOSS = """
from typing import Literal

from imbvlm.config.loss_registry import Loss, LossSection


class Config(LossSection):
    name: Literal["NAME"] = "NAME"
    share: float = 0.5


def function(logits, targets, class_counts, *, share=0.5, workers=None):
    return share * logits.sum()


LOSSES = {"NAME": Loss(Config, function, summary="A test.", paper="nobody")}
"""
TRIAL = {"data": {"manifest": "m"}, "encoder": {"name": "tinylit_lite0"}, "method": "linear_probe"}


def write_loss(path: Path, name: str = "own") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(LOSS.replace("NAME", name), encoding="utf-8")
    return str(path)


def trial(name: str, **options: float) -> TrialConfig:
    return TrialConfig.from_tree({**TRIAL, "loss": {"name": name, **options}})


def test_entries_are_there_within_and_gone_afterwards(tmp_path: Path) -> None:
    before = list(LOSSES)
    with use_plugins(write_loss(tmp_path / "losses.py")):
        assert list(LOSSES) == [*before, "own"]
        assert trial("own", share=0.25).loss == LOSSES["own"].config(share=0.25)
        with pytest.raises(ConfigError, match=r"loss.shre"):
            TrialConfig.from_tree({**TRIAL, "loss": {"name": "own", "shre": 1.0}})
    assert list(LOSSES) == before
    with pytest.raises(ConfigError, match=r"loss.name is 'own'"):
        trial("own")


def test_two_specifications_of_one_process_have_their_own(tmp_path: Path) -> None:
    """They are checked in turn, and each has a loss of the same name that takes other options."""
    first, second = write_loss(tmp_path / "a" / "losses.py"), write_loss(tmp_path / "b" / "losses.py")
    Path(second).write_text(Path(second).read_text().replace("share", "part"))
    specs = {
        key: SweepSpec(
            name=key,
            base={**TRIAL, "loss": {"name": "own", key: 0.1}},
            space={"parameters": {f"loss.{key}": {"uniform": [0.0, 1.0]}}},
            plugins=[plugin],
        )
        for key, plugin in (("share", first), ("part", second))
    }
    for _ in range(2):
        for key, spec in specs.items():
            assert check_spec(spec).space.parameters[0].key == f"loss.{key}"
    with pytest.raises(ConfigError, match=r"own"):
        check_spec(specs["share"].model_copy(update={"plugins": []}))
    with pytest.raises(ConfigError, match=r"share"):
        check_spec(specs["share"].model_copy(update={"plugins": [second]}))


def test_an_edited_file_is_read_again_in_the_same_process(tmp_path: Path) -> None:
    path = tmp_path / "losses.py"
    for name in ("first", "second", "first"):
        with use_plugins(write_loss(path, name)):
            assert name in LOSSES
            assert {"first", "second"} & set(LOSSES) == {name}


def test_another_thread_does_not_see_them(tmp_path: Path) -> None:
    seen: list[bool] = []
    with use_plugins(write_loss(tmp_path / "losses.py")):
        thread = threading.Thread(target=lambda: seen.append("own" in LOSSES))
        thread.start()
        thread.join()
    assert seen == [False]


def test_a_configuration_takes_its_code_along_to_a_process_without_the_file(tmp_path: Path) -> None:
    path = write_loss(tmp_path / "losses.py")
    with use_plugins(path):
        config = trial("own", share=0.25)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    Path(path).unlink()
    code = """
import pickle, sys
config = pickle.load(open(sys.argv[1], "rb"))
from imbvlm.config.loss_registry import LOSSES
assert "own" not in LOSSES
with config.plugins.active():
    print(config.loss.share, LOSSES["own"].summary, pickle.loads(pickle.dumps(config)) == config)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "config.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "0.25 A test. True\n"


def test_modules_that_are_first_imported_while_plug_ins_are_active_keep_none_of_them(tmp_path: Path) -> None:
    code = f"""
from imbvlm.base.plugin_files import use_plugins
with use_plugins({write_loss(tmp_path / "losses.py")!r}):
    from imbvlm.config.trial_config import TrialConfig
    from imbvlm.sweep.spec.sweep_spec import SweepSpec
    TrialConfig.from_tree({ {**TRIAL, "loss": {"name": "own"}} })
try:
    TrialConfig.from_tree({ {**TRIAL, "loss": {"name": "own"}} })
except ValueError:
    print("gone")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "gone\n"


def test_a_package_imports_its_files_relatively_and_later_too(tmp_path: Path) -> None:
    package = tmp_path / "own_losses"
    write_loss(package / "deep" / "parts.py")
    (package / "deep" / "__init__.py").write_text("")
    (package / "notes.txt").write_text("not code")
    (package / "__init__.py").write_text("from .deep.parts import LOSSES\n\ndef later():\n    from . import extra\n")
    (package / "extra.py").write_text("value = 1\n")
    with use_plugins(str(package)) as plugins:
        assert "own" in LOSSES
        paths = [path for path, _ in plugins.sources[0].files]
        assert paths == [
            f"own_losses/{name}" for name in ("__init__.py", "deep/__init__.py", "deep/parts.py", "extra.py")
        ]
        module = sys.modules[LOSSES["own"].config.__module__.removesuffix(".deep.parts")]
    # An edit after reading has no effect on what runs.
    (package / "extra.py").write_text("raise SystemError\n")
    module.later()


def test_the_digest_of_a_file_is_that_of_sha256sum(tmp_path: Path) -> None:
    path = write_loss(tmp_path / "losses.py")
    with use_plugins(path) as plugins:
        assert plugins.digests == {"losses.py": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


CLASHES = {
    "no_entries": ("value = 1", r"py: the plug-in has no entries. Define one of LOSSES, METHODS"),
    "only_ours": ("from imbvlm.config.loss_registry import LOSSES", r"py: the plug-in has no entries"),
    "no_table": ("\nLOSSES = 3", r"py:2: LOSSES must map names to entries, and is 3"),
    "of_ours": (LOSS.replace("NAME", "focal"), r"py:16: loss 'focal' exists in imbvlm. Rename it"),
    "no_name": (LOSS.replace("NAME", "Own Loss"), r"py:16: loss 'Own Loss' is no name"),
    "no_entry": ("LOSSES = {'own': print}", r"py:1: loss 'own' must be a imbvlm.config.loss_registry.Loss, and is"),
    "other_name": (
        LOSS.replace('"NAME": Loss', '"other": Loss').replace("NAME", "own"),
        r"py:16: loss 'other' must have its own name in its options, and has 'own'",
    ),
    "syntax": ("\n\nLOSSES = {", r"py:3: the plug-in can't be imported: SyntaxError: '{' was never closed"),
    "no_module": (
        "x = 1\nimport not_there",
        r"py:2: the plug-in can't be imported: ModuleNotFoundError: No module named",
    ),
    "its_own": ("def f():\n    return 1 / 0\n\nf()", r"py:2: the plug-in can't be imported: ZeroDivisionError"),
    "leaves": ("import sys\nsys.exit(0)", r"py:2: the plug-in can't be imported: SystemExit"),
}


@pytest.mark.parametrize("name", CLASHES)
def test_what_cannot_be_taken_is_refused_with_place_and_cause(tmp_path: Path, name: str) -> None:
    code, expected = CLASHES[name]
    path = tmp_path / f"{name}.py"
    path.write_text(code)
    modules = set(sys.modules)
    for _ in range(2):
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path)) + f"/{name}.{expected}"), use_plugins(str(path)):
            pass
    assert active_plugins() == Plugins()
    if "can't be imported" in expected:
        assert not {module for module in set(sys.modules) - modules if module.startswith("imbvlm_plugin")}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["gone.py"], r"gone.py: a plug-in must be a Python file"),
        (["folder"], r"folder: a plug-in must be a Python file \(.py\) or a folder with __init__.py"),
        (["my-losses.py"], r"a plug-in needs a name that Python can import, got 'my-losses.py'"),
        (["a/losses.py", "b/losses.py"], r"b/losses.py: .*a/losses.py is called losses.py, too. Rename one of them"),
        (["a/losses.py", "more.py"], r"more.py: loss 'own' is also in .*a/losses.py. Rename one of them"),
        (["large.py"], r"a plug-in may have 1,000,000 bytes of code, and this has 2,000,00\d"),
    ],
)
def test_a_plug_in_that_is_missing_or_twice_there_is_refused(tmp_path: Path, names: list[str], expected: str) -> None:
    write_loss(tmp_path / "a" / "losses.py")
    write_loss(tmp_path / "b" / "losses.py", "other")
    write_loss(tmp_path / "more.py")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large.py").write_text("#" * 2_000_000)
    with pytest.raises(ConfigError, match=expected), use_plugins(*(str(tmp_path / name) for name in names)):
        pass


def test_a_method_cannot_have_the_name_of_a_section(tmp_path: Path) -> None:
    path = tmp_path / "methods.py"
    path.write_text(
        "from imbvlm.config.method_registry import Method\n"
        "METHODS = {'loss': Method(name='loss', summary='A test.', paper='nobody', reads='pooled')}\n"
    )
    with use_plugins(str(path)), pytest.raises(ConfigError, match=r"method 'loss' has the name of a trial's section"):
        TrialConfig.from_tree(TRIAL)


def test_a_copy_is_compared_with_what_the_caller_named_and_never_run(tmp_path: Path) -> None:
    path, folder = write_loss(tmp_path / "losses.py"), str(tmp_path / "sweep")
    with use_plugins(path) as plugins:
        write_copies(folder, plugins.sources)
        require_plugins(folder, plugins.digests)
        assert (tmp_path / "sweep" / "plugins" / "losses.py").read_bytes() == Path(path).read_bytes()
    with pytest.raises(PluginNeededError, match=r"needs the plug-in losses.py.* add --plugin .*losses.py") as refused:
        require_plugins(folder, plugins.digests)
    assert refused.value.copies == (str(tmp_path / "sweep" / "plugins" / "losses.py"),)
    Path(path).write_text(Path(path).read_text().replace("0.5", "0.6"))
    with use_plugins(path):
        assert plugin_change(folder, "losses.py").startswith(
            "losses.py has changed (@@ -9 +9 @@ | -    share: float = 0.5 | +    share: float = 0.6 | "
        )
        with pytest.raises(PluginNeededError, match=r"isn't the plug-in that .* was made with: losses.py has changed"):
            require_plugins(folder, plugins.digests)
        require_plugins(folder, plugins.digests, check=False)
    with use_plugins(*refused.value.copies):
        require_plugins(folder, plugins.digests)
        # The named file is the copy itself.
        write_copies(folder, active_plugins().sources)
    assert len(refused.value.copies) == 1
    assert Path(refused.value.copies[0]).exists()
