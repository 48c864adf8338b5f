"""The `imbvlm` command: every command and action explains itself, examples are real, and exit codes mean one thing."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from sweep_folder import write_sweep
from tiny_images import image_manifest
from typer.main import get_command

from imbvlm.base.errors import ImbvlmError
from imbvlm.cli import app, manifest_command
from imbvlm.cli.options import spell_out
from imbvlm.cli.sweep_command import SWEEP_ACTIONS, with_sweep_action
from imbvlm.cli.sweep_script import parse_settings
from imbvlm.config.encoder_info import OUTPUT_NAMES
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.imbalance import SHAPES
from imbvlm.data.sources.inaturalist import NAMES, RANKS
from imbvlm.sweep.spec.baselines import encoder_configs
from imbvlm.sweep.spec.spec_checks import check_spec

COMMANDS = {
    "doctor", "manifest", "features", "train", "sweep", "plan", "compare", "report", "export", "predict",
    "check-cluster", "encoder",
}  # fmt: skip


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command and action by its words."""
    yield " ".join(words), command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


ALL = dict(commands(get_command(app.APP)))


def taken(*words: str) -> dict[str, Any]:
    """The values that a command is called with, without running it; mistakes are raised."""
    values: list[dict[str, Any]] = []
    root = get_command(app.APP)
    for _, command in commands(root):
        if not hasattr(command, "commands"):
            command.callback = lambda **given: values.append(given)
    root.main(spell_out(with_sweep_action(words)), prog_name="imbvlm", standalone_mode=False)
    return values[0]


def leave(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as left:
        app.main(words)
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def test_the_commands_are_those_that_are_told_of() -> None:
    assert {name for name in ALL if name and " " not in name} == COMMANDS
    assert {name for name in ALL if name.startswith("sweep ")} == {f"sweep {one}" for one in SWEEP_ACTIONS}


@pytest.mark.parametrize("option", ["--license", "--licence"])
def test_a_license_is_also_taken_in_the_spelling_of_version_0_1(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    licenses = []

    def export_sweep(*_: Any, license_id: str, **__: Any) -> None:
        licenses.append(license_id)
        raise ImbvlmError("stopped.")

    monkeypatch.setattr("imbvlm.sweep.export.exporter.export_sweep", export_sweep)
    arguments = ["export", "runs/made", "-o", "out"]
    leave(capsys, *arguments, option, "mit")
    leave(capsys, *arguments)
    assert licenses == ["mit", "other"]
    assert "--licence" not in leave(capsys, "export", "--help")[1]


@pytest.mark.parametrize("name", ALL)
def test_help_says_what_it_does_with_an_example_that_its_own_options_take(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = leave(capsys, *name.split(), "--help")
    assert code == 0
    assert (code, printed) == leave(capsys, *name.split(), "-h")[:2]
    assert f"Usage: imbvlm {name}".rstrip() in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "\x1b" not in printed
    examples = [line.strip() for line in printed.splitlines() if line.startswith("    imbvlm ")]
    assert examples
    for example in examples:
        for part in example.split("&&"):
            words = shlex.split(part)
            if words[0] == "imbvlm":
                assert taken(*words[1:])


@pytest.mark.parametrize("name", [name for name in ALL if name])
def test_every_option_is_explained(name: str) -> None:
    assert ALL[name].help
    for parameter in ALL[name].params:
        assert parameter.hidden or parameter.help, parameter.name


def test_help_of_a_sweep_has_its_options_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    printed = leave(capsys, "sweep", "run", "--help")[1]
    titles = [line.rstrip(":") for line in printed.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Arguments", "Specification", "Plan and prices", "Resume", "Options"]


@pytest.mark.parametrize("setting", [{"TERM": "xterm-256color"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_help_is_plain_on_a_terminal_too(setting: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | setting
    command = [sys.executable, "-m", "imbvlm", "compare", "--help"]
    subprocess.run(command, stdout=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    printed = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert printed.startswith("Usage: imbvlm compare")
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    "words", [["--help"], ["sweep", "--help"], ["sweep", "run", "--help"], ["--version"], ["plna"]]
)
def test_help_loads_no_library_that_takes_long(words: list[str]) -> None:
    heavy = ("torch", "ray", "pyarrow", "numpy", "yaml", "rich")
    code = f"""
import sys
from imbvlm.cli.app import main
try:
    main({words})
except SystemExit:
    print("loaded:", *(name for name in {heavy} if name in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("imbvlm pr", ["predict"]),
        ("imbvlm sweep r", ["run", "resume"]),
        ("imbvlm sweep run --mea", ["--measure"]),
        ("imbvlm plan x.yaml --measure ", ["here", "cluster", "no"]),
        ("imbvlm manifest build --dataset i", ["inat2018", "imagenet_lt"]),
        ("imbvlm export --lic", ["--license"]),
    ],
)
def test_a_shell_completes_commands_options_and_values(line: str, expected: list[str]) -> None:
    setting = {"_IMBVLM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "imbvlm"], env={**os.environ, **setting}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, expected, "")


def test_values_that_the_command_line_offers_are_those_that_there_are() -> None:
    """They are written out there, since importing the registries would slow every help."""
    assert get_args(manifest_command.Rank) == RANKS
    assert get_args(manifest_command.Names) == NAMES
    assert get_args(manifest_command.TailShape) == SHAPES
    assert tuple(app.Output) == OUTPUT_NAMES


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trian", "No such command 'trian'. Did you mean 'train'? See imbvlm --help."),
        ("sweep lsit", "No such command 'lsit'. Did you mean 'list'? See imbvlm sweep --help."),
        ("plan x.yaml --prize 2", "No such option: --prize; did you mean --price? See imbvlm plan --help."),
        ("sweep x.yaml --dryrun", "No such option: --dryrun; did you mean --dry-run? See imbvlm sweep run --help."),
        ("sweep show", "Missing argument 'SWEEP'. See imbvlm sweep show --help."),
        ("export x", "Missing option '--out' / '-o'. See imbvlm export --help."),
        ("plan x.yaml --price", "Option '--price' requires an argument."),
        ("predict m p --split tset",
         "Invalid value for '--split': 'tset' is not one of 'train', 'val', 'test'. See imbvlm predict --help."),
        ("sweep resume x --add-trials 0",
         "Invalid value for '--add-trials': it should be greater than or equal to 1. See imbvlm sweep resume --help."),
        ("export x -o y --top 2 --pareto", "--top and --pareto exclude each other. See imbvlm export --help."),
        ("manifest build -o m.parquet",
         "Exactly one of --dataset, --folders, --list, --table, --inaturalist and --webdataset is needed. "
         "See imbvlm manifest build --help."),
        ("manifest build --folders a --table b.csv -o m.parquet",
         "Exactly one of --dataset, --folders, --list, --table, --inaturalist and --webdataset is needed. "
         "See imbvlm manifest build --help."),
    ],
)  # fmt: skip
def test_wrong_usage_is_a_sentence_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str], words: str, sentence: str
) -> None:
    assert leave(capsys, *words.split()) == (2, "", f"imbvlm: {sentence}\n")


def test_a_list_of_files_follows_its_option_as_in_version_0_1() -> None:
    lists = ["train=a.txt", "val=b.txt", "test=c.txt"]
    assert taken("manifest", "build", "--list", *lists, "-o", "m.parquet")["lists"] == lists
    assert taken("manifest", "build", "-o", "m.parquet", "--table", "a.csv", "b.csv")["table"] == ["a.csv", "b.csv"]
    assert taken("manifest", "build", "-o=m.parquet", "--folders=photos")["output"] == "m.parquet"
    assert taken("doctor", "--encoder", "a", "runs") == {
        "storage": ["runs"], "encoder": ["a"], "as_json": False, "plugin": (),
    }  # fmt: skip


def test_all_exit_codes_are_told_of_and_0_1_and_2_mean_what_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, printed, _ = leave(capsys, "--help")
    told = [line.split()[0] for line in printed.split("exit codes:")[1].splitlines() if line.strip()]
    assert told == ["0", "1", "2", "130", "143"]
    assert leave(capsys, "sweep", "list", str(tmp_path))[0] == 0
    for words in (("train", "nowhere.yaml"), ("sweep", "show", str(tmp_path)), ("plan", str(tmp_path / "no.yaml")),
                  ("manifest", "show", "nowhere.parquet"), ("predict", "no-model", "no-photo.jpg"),
                  ("compare", "nowhere"), ("report", "nowhere"), ("export", "nowhere", "-o", str(tmp_path / "o")),
                  ("features", "extract", "nowhere.parquet", "--encoder", "tinylit_lite0", "--storage", str(tmp_path)),
                  ("check-cluster", "nowhere.yaml"), ("sweep", "resume", "nowhere")):  # fmt: skip
        code, out, err = leave(capsys, *words)
        assert (code, out) == (1, ""), words
        assert err.startswith("imbvlm: "), words
        assert "Traceback" not in err
    assert "Run `python sweeps/inat.py --dry-run`." in leave(capsys, "plan", "sweeps/inat.py")[2]
    for words in (
        ("trian",),
        ("sweep", "show"),
        ("plan", "x.yaml", "--prize", "2"),
        ("sweep", "resume", "x", "--add-trials", "0"),
    ):
        code, out, err = leave(capsys, *words)
        assert (code, out) == (2, ""), words
        assert err.startswith("imbvlm: ")


def test_ctrl_c_leaves_with_130_and_no_traceback(tmp_path: Path) -> None:
    """The command waits for its configuration in a pipe, so that the signal finds it at work."""
    pipe = tmp_path / "trial.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "imbvlm", "train", str(pipe)], stderr=subprocess.PIPE, text=True,
        # Tests that run in the background ignore it, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with open(pipe, "w"):  # returns when the command has opened its end
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_what_a_script_reads_is_json_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(write_sweep(tmp_path / "runs" / "made-1", [120, 60, 30, 12, 8]))
    for words in (("sweep", "list", str(tmp_path / "runs")), ("sweep", "show", folder), ("compare", folder),
                  ("doctor", str(tmp_path)),
                  ("features", "extract", "embedded:fashion_mnist_lt", "--encoder", "tinylit_lite0",
                   "--image-size", "64", "--storage", str(tmp_path / "runs"), "--dry-run")):  # fmt: skip
        _, out, _ = leave(capsys, *words, "--json")
        json.loads(out)
    # 4,980 images of a view each; pooled and image embedding in half precision.
    found = json.loads(out)
    assert found["num_images"] == 4980
    assert found["num_bytes"] == found["total_bytes"] > 4980 * 1280 * 2
    assert not Path(tmp_path / "runs" / "features").exists()


def test_a_manifests_summary_and_findings_are_json_where_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    photos = image_manifest(tmp_path, bad=(3,))
    found = json.loads(leave(capsys, "manifest", "show", photos, "--json")[1])
    assert sum(found["training_images"]) == found["images"]["train"] > 0
    assert len(found["class_names"]) == found["num_classes"] == sum(found["classes_by_shot_group"].values())
    assert found["num_bytes"] > 0
    words = ("manifest", "check", photos, "--decode", "--json", "-o", str(tmp_path / "findings.csv"))
    report = json.loads(leave(capsys, *words)[1])
    assert report["ok"]
    assert report["verdict"].startswith("usable")
    (one,) = [finding for finding in report["findings"] if "can't be decoded" in finding["message"]]
    assert (one["severity"], len(one["examples"])) == ("warning", 1)


ELSEWHERE = {
    "s3://": "names no bucket; it should look like s3://BUCKET/KEY",
    "gs://bucket/a": "only local paths and s3://BUCKET/... are supported",
    "http://host/a.parquet": "only local paths and s3://BUCKET/... are supported",
}


@pytest.mark.parametrize("uri", ELSEWHERE)
def test_a_location_that_is_not_taken_is_refused_by_every_command_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """`s3://` became a folder `s3:`, `gs://` never ended, and a list's http:// images ended a check in another way."""
    trial = {"data": {"manifest": "embedded:fashion_mnist_lt"}, "encoder": {"name": "tinylit_lite0"},
             "method": "linear_probe"}  # fmt: skip
    sweep = {"name": "s", "base": trial, "space": {"parameters": {"optim.lr": {"loguniform": [0.01, 1.0]}}}}
    here = {"trial.yaml": trial, "sweep.yaml": sweep, "stored.yaml": {**sweep, "storage": uri},
            "listed.yaml": {**sweep, "base": {**trial, "data": {"manifest": uri}}}}  # fmt: skip
    for name, tree in here.items():
        (tmp_path / name).write_text(json.dumps(tree))
    (tmp_path / "train.txt").write_text(f"{uri} 0\n")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    extract = ("features", "extract", "embedded:fashion_mnist_lt", "--encoder", "tinylit_lite0")
    for words in (
        ("train", "trial.yaml", "--storage", uri), ("train", "trial.yaml", "-o", uri),
        ("train", "trial.yaml", "--set", f"data.manifest={uri}"), (*extract, "--storage", uri),
        (*extract, "--storage", uri, "--dry-run"), ("features", "extract", uri, "--encoder", "tinylit_lite0"),
        ("features", "check", uri), ("sweep", "run", "sweep.yaml", "--storage", uri), ("sweep", "run", "stored.yaml"),
        ("sweep", "run", "sweep.yaml", "--manifest", uri), ("sweep", "run", "listed.yaml", "--dry-run"),
        ("sweep", "run", "sweep.yaml", "--set", f"feature_folder={uri}"),
        ("sweep", "run", "sweep.yaml", "--warm-start", uri), ("sweep", "run", "sweep.yaml", "--resume", uri),
        ("sweep", "resume", uri), ("sweep", "list", uri), ("sweep", "show", uri), ("compare", uri), ("report", uri),
        ("plan", "sweep.yaml", "--manifest", uri), ("plan", "stored.yaml"), ("export", uri, "-o", "out"),
        ("manifest", "build", "--list", "train=train.txt", "-o", "m.parquet"), ("manifest", "show", uri),
        ("manifest", "build", "--folders", "photos", "-o", uri), ("manifest", "build", "--folders", uri, "-o", "m"),
        ("manifest", "build", "--table", uri, "-o", "m"), ("manifest", "check", uri), ("predict", "model", uri),
            ("manifest", "show", "embedded:emoji_lt", "--plot", uri),
            ("manifest", "check", "embedded:emoji_lt", "-o", uri),
        ("predict", uri, "photos"), ("predict", "model", "photos", "-o", f"{uri}/a.csv"),
    ):  # fmt: skip
        code, out, err = leave(capsys, *words)
        assert (code, out) == (1, ""), words
        assert ELSEWHERE[uri] in err, words
        assert uri.rpartition("/")[0] in err
        assert "Traceback" not in err
    assert f"broken   storage {uri}" in leave(capsys, "doctor", uri)[1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("below", ["", "/below", "/" + "n" * 300])
def test_a_storage_folder_that_cannot_be_written_is_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "trial.yaml").write_text(
        '{"data": {"manifest": "embedded:fashion_mnist_lt"}, "encoder": {"name": "tinylit_lite0"}, '
        '"method": "linear_probe"}'
    )
    for words in (
        ("train", str(tmp_path / "trial.yaml")),
        ("features", "extract", "embedded:fashion_mnist_lt", "--encoder", "tinylit_lite0"),
    ):
        for place in (f"{tmp_path / 'file'}{below}", f"~nobody-at-all{below}"):
            code, out, err = leave(capsys, *words, "--storage", place)
            assert (code, out) == (1, "")
            assert err.startswith("imbvlm: ")
            assert place in err
            assert "Traceback" not in err


def test_extracted_features_are_those_that_the_named_sweeps_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default they were of another image size and crop than the quickstart's, for which they were computed anew."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    options, _, named = app.READ_BY[app.READ_BY.index("--encoder") :].partition(" sweeps/quickstart.py ")
    sizes = [re.findall(r"\b\d+\b", part) for part in named.split("sweeps/paper.py")]
    for name, own in zip(("quickstart", "paper"), sizes, strict=True):
        spec = importlib.import_module(f"sweeps.{name}").spec
        extracted = []
        for size in own:
            given = taken(
                "features", "extract", "embedded:fashion_mnist_lt", "--image-size", size, *shlex.split(options)
            )
            tree = {"data": {"manifest": given["manifest"]},
                    "encoder": {"name": given["encoder"], "image_size": int(given["image_size"])},
                    "method": "zero_shot"}  # fmt: skip
            config = TrialConfig.from_tree(tree).with_overrides(parse_settings(given["settings"]))
            extracted.append((config.encoder, config.eval, config.features))
        read = [(config.encoder, config.eval, config.features) for config in encoder_configs(check_spec(spec))]
        assert read == extracted
    words = ("features", "extract", "embedded:fashion_mnist_lt", "--encoder", "tinylit_lite0", "--dry-run")
    assert app.READ_BY in " ".join(leave(capsys, *words[:2], "--help")[1].split())
    code, out, _ = leave(capsys, *words, "--storage", str(tmp_path))
    assert code == 0
    assert "tinylit_lite0 at 128 px, eval.resize 1.143: " in out
    assert app.READ_BY in out


def test_sweeps_of_one_encoder_prepare_its_images_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sweeps on one storage share what is computed, where their image sizes are the same."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    ways: dict[str, set[float]] = {}
    for path in sorted((Path(__file__).parents[2] / "sweeps").glob("*.py")):
        spec = importlib.import_module(f"sweeps.{path.stem}").spec
        for config in encoder_configs(check_spec(spec)):
            ways.setdefault(config.encoder.name, set()).add(config.eval.resize)
    assert {name: way for name, way in ways.items() if len(way) > 1} == {}
