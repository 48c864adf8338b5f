"""Sweeps by their folders: listed with their state, shown, side by side, for people and as JSON."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pty_screen import PtyScreen
from sweep_folder import OBJECTIVE, write_sweep
from trial_epochs import set_metrics

from imbvlm.cli import app, sweep_script
from imbvlm.data.manifest import Manifest
from imbvlm.sweep.records.provenance import data_size, provenance, write_provenance
from imbvlm.sweep.records.sweep_folder import SweepState
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.records.winner_selection import Selection, write_selection
from imbvlm.sweep.report.report_writer import write_report

COUNTS = [500, 120, 60, 20, 8]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder with a finished sweep, an unfinished one, and features."""
    home = tmp_path_factory.mktemp("runs")
    write_sweep(home / "made-1", COUNTS, gain=0.3)
    (home / "made-1" / "best.yaml").write_text("method: decoder\n")
    write_sweep(home / "made-2", COUNTS, num_trials=10, refits=False, objective="val/few_shot_accuracy")
    (home / "features").mkdir()
    return home


def imbvlm(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as left:
        app.main(list(arguments))
    assert left.value.code == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_list_has_every_sweep_with_its_state_and_best(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = imbvlm(capsys, "sweep", "list", str(home)).splitlines()
    assert len(lines) == 4
    assert lines[2].split()[:3] == [str(home / "made-1"), "finished", "24/24"]
    assert lines[3].split()[:3] == [str(home / "made-2"), "unfinished", "10/24"]
    sweeps = json.loads(imbvlm(capsys, "sweep", "list", str(home), "--json"))
    assert [(sweep["state"], sweep["num_ended"]) for sweep in sweeps] == [("finished", 24), ("unfinished", 10)]
    assert 0.7 < sweeps[0]["best"]["value"] < 0.76
    assert set(sweeps[0]["test"]) == {"winner", "linear probe", "zero-shot"}
    assert len(sweeps[0]["test"]["winner"]["few_shot_accuracy"]) == 2


@pytest.mark.parametrize("columns", [80, 200])
def test_tables_use_the_columns_of_the_terminal(home: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns each folder and number stays whole."""
    monkeypatch.chdir(home)
    with PtyScreen(columns, 60) as terminal:
        for words in (("list", "."), ("show", "made-1")):
            subprocess.run([sys.executable, "-m", "imbvlm", "sweep", *words], stdout=terminal.descriptor, check=True)
        terminal.read()
        lines = terminal.written.decode().split("\r\n")
    starts = [index for index, line in enumerate(lines) if line.startswith("----")]
    assert len(starts) == 3
    assert all(len(line) <= columns for start in starts for line in lines[start - 1 : start + 4])
    assert [line.split()[:3] for line in lines if "/24" in line[:40]] == [
        ["made-1", "finished", "24/24"], ["made-2", "unfinished", "10/24"],
    ]  # fmt: skip
    best = starts[1] + 1
    end = next(index for index, line in enumerate(lines[best:], best) if line.startswith("t0") and index > best)
    assert (end - best > 1) == (columns == 80)


def test_one_sweep_that_cannot_be_read_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("damaged-spec", "odd-key", "no-text", "damaged-trial", "damaged-time", "sound"):
        write_sweep(tmp_path / name, COUNTS, num_trials=1, refits=False)
    (tmp_path / "damaged-spec" / "sweep.yaml").write_text("name: [")
    with open(tmp_path / "odd-key" / "sweep.yaml", "a") as stream:
        stream.write("num_trails: 3\n")
    (tmp_path / "no-text" / "sweep.yaml").write_bytes(b"name: caf\xe9")
    (tmp_path / "damaged-trial" / "trials" / "t00001.json").write_text("{")
    (tmp_path / "damaged-time" / "spent.json").write_text("{")
    said = imbvlm(capsys, "sweep", "list", str(tmp_path)).splitlines()
    assert len(said) == 3 + 5
    assert said[2].startswith(f"{tmp_path / 'sound'} ")
    by_name = {line.split("  unreadable: ")[0].rpartition("/")[2]: line for line in said[3:]}
    assert "did you mean 'num_trials'" in by_name["odd-key"]
    assert "no UTF-8" in by_name["no-text"]
    assert "t00001.json is not a trial's record" in by_name["damaged-trial"]
    sweeps = json.loads(imbvlm(capsys, "sweep", "list", str(tmp_path), "--json"))
    assert [sweep["state"] for sweep in sweeps] == ["unfinished", *["unreadable"] * 5]
    assert "sweep.yaml" in imbvlm(capsys, "sweep", "show", str(tmp_path / "no-text"), code=1)


def test_show_has_the_seeds_that_the_winner_was_chosen_by_and_judges_by_their_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, refits=False)
    assert "over several seeds" not in imbvlm(capsys, "sweep", "show", str(folder))
    log = TrialLog.read(str(folder))
    first = log.best("val/balanced_accuracy")[0]
    value = first.best_value("val/best_balanced_accuracy")
    update = {"trial_id": f"{first.trial_id}-seed1", "kind": "confirm", "name": first.trial_id}
    again = first.model_copy(deep=True, update=update)
    again.epochs = [{**epoch, "val/best_balanced_accuracy": value - 0.1} for epoch in again.epochs]
    log.save(again)
    shown = imbvlm(capsys, "sweep", "show", str(folder))
    assert f"{100 * value - 5:.1f} ± 7.1" in shown
    assert f" {100 * value - 5:.1f} " in imbvlm(capsys, "sweep", "list", str(tmp_path))
    (sweep,) = json.loads(imbvlm(capsys, "sweep", "list", str(tmp_path), "--json"))
    assert sweep["best"]["value"] == pytest.approx(value - 0.05)
    # The linear probe has 50.0 on validation.
    assert (
        f"the winner's mean of 2 seeds is {100 * value - 55:.1f} points above the baseline linear probe on "
        f"validation (95 % interval {100 * value - 55 - 5.54:+.1f} to {100 * value - 55 + 5.54:+.1f})" in shown
    )


def test_list_of_a_folder_without_sweeps_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert imbvlm(capsys, "sweep", "list", str(tmp_path)) == f"no sweep under {tmp_path}\n"
    assert json.loads(imbvlm(capsys, "sweep", "list", str(tmp_path), "--json")) == []


def test_show_has_the_tables_that_there_are(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = imbvlm(capsys, "sweep", "show", str(home / "made-1"))
    assert "24 of 24 trials, finished" in finished
    assert "test split, read once" in finished
    assert finished.index("\nwinner ") < finished.index("\nlinear probe ")
    unfinished = imbvlm(capsys, "sweep", "show", str(home / "made-2"))
    assert f"imbvlm sweep resume {home / 'made-2'}" in unfinished
    assert "test split" not in unfinished


def test_show_has_the_selection_by_likelihood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, refits=False)
    write_selection(str(folder), Selection("t00003", {"t00003": -0.5}, {}, 300))
    shown = imbvlm(capsys, "sweep", "show", str(folder))
    assert (
        "selected by class-balanced log-likelihood on 300 validation images: t00003 (-0.500); the best trial by"
        in shown
    )
    assert json.loads(imbvlm(capsys, "sweep", "show", str(folder), "--json"))["best"]["trial_id"] == "t00003"


def test_a_finished_sweep_that_is_gone_on_with_is_unfinished_until_that_ends(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = home / "made-1" / "unfinished"
    marker.touch()
    try:
        assert imbvlm(capsys, "sweep", "list", str(home)).splitlines()[2].split()[1] == "unfinished"
        assert "sweep resume" in imbvlm(capsys, "sweep", "show", str(home / "made-1"))
    finally:
        marker.unlink()


def test_show_has_the_trials_that_none_beats_where_several_objectives_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_sweep(tmp_path / "made", COUNTS, other_objectives=["val/top1_accuracy"]))
    assert "no trial is better in all objectives than these" in imbvlm(capsys, "sweep", "show", folder)
    shown = json.loads(imbvlm(capsys, "sweep", "show", folder, "--json"))
    # Overall accuracy goes with balanced accuracy in this sweep, so that one trial is the best in both.
    assert shown["pareto"] == [shown["best"]["trial_id"]]


def test_list_says_on_which_data_a_sweep_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sweeps of one name on two folders of photos look alike otherwise."""
    for name, size in (("new", {"num_classes": 5, "num_images": 1708}), ("of-an-earlier-version", {})):
        write_sweep(tmp_path / name, COUNTS, num_trials=1, refits=False)
        (tmp_path / name / "provenance.json").write_text(json.dumps({"code": {}, "torch": "", "data": "", **size}))
    said = imbvlm(capsys, "sweep", "list", str(tmp_path))
    assert "  gone: 5 classes, 1,708 images  " in said
    sweeps = json.loads(imbvlm(capsys, "sweep", "list", str(tmp_path), "--json"))
    assert [(sweep["manifest"], sweep["num_classes"], sweep["num_images"]) for sweep in sweeps] == [
        ("gone.parquet", 5, 1708), ("gone.parquet", None, None),
    ]  # fmt: skip


def test_a_sweep_keeps_the_size_of_its_data(tmp_path: Path) -> None:
    table = pa.table({"bytes": [b"a", b"b", b"c"], "label": [0, 1, 1], "split": ["train"] * 3})
    write_provenance(str(tmp_path), provenance(Manifest.build(table, ["x", "y"], "few")))
    assert data_size(str(tmp_path)) == (2, 3)
    assert data_size(str(tmp_path / "nowhere")) is None


def test_compare_has_winners_and_baselines_as_exported_and_says_what_is_not_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model is exported with what was adjusted after training, so that is what there is to compare."""
    for name, adjusted in (("a", 0.9), ("b", None)):
        folder = write_sweep(tmp_path / name, COUNTS, objective="val/few_shot_accuracy" if name == "b" else OBJECTIVE)
        log = TrialLog.read(str(folder))
        for record in log.of("refit"):
            changed = adjusted if record.name == "winner" else record.epochs[-1]["test/balanced_accuracy"]
            if adjusted is not None and record.name != "zero-shot":
                set_metrics(record, {"test_post_hoc/balanced_accuracy": changed})
                log.save(record)
    folders = [str(tmp_path / name) for name in "ab"]
    text = imbvlm(capsys, "compare", *folders)
    rows = [line.split("  ") for line in text.splitlines()[3:]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    # The linear probe has a row of its own as adjusted, too, since overall accuracy wasn't adjusted here.
    assert [row[:2] for row in rows[:3]] == [["a", "winner"], ["b", "winner"], ["a", "winner, post hoc"]]
    assert [row[:2] for row in rows[-3:-1]] == [["a", "zero-shot"], ["b", "zero-shot"]]
    assert "90.0 ± 0.0" in rows[2]
    assert "50.0" in next(row for row in rows if row[:2] == ["a", "linear probe"])
    assert "differ in objectives" in text
    assert "unlike data" not in text
    sweeps = json.loads(imbvlm(capsys, "compare", *folders, "--json"))
    assert [sweep["name"] for sweep in sweeps] == ["made", "made"]
    assert sweeps[0]["test_post_hoc"]["winner"] == {"balanced_accuracy": [0.9, 0.9]}
    assert sweeps[1]["test_post_hoc"] == {}


@pytest.mark.parametrize("words", [("show",), ("resume",)])
def test_what_is_no_sweep_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert "has no sweep.yaml" in imbvlm(capsys, "sweep", *words, str(tmp_path), code=1)


def test_a_file_behind_sweep_is_run_and_resume_takes_the_spec_from_the_folder(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    monkeypatch.setattr(sweep_script, "run_command", lambda spec, options: heard.append((spec, options)) or 0)
    imbvlm(capsys, "sweep", str(home / "made-1" / "sweep.yaml"), "--smoke")
    imbvlm(capsys, "sweep", "run", str(home / "made-1" / "sweep.yaml"), "--smoke")
    imbvlm(capsys, "sweep", "resume", str(home / "made-1"))
    (spec, options), (same, also), (saved, resumed) = heard
    assert spec == same == saved
    assert options.smoke
    assert also.smoke
    assert resumed.resume == str(home / "made-1")
    # Features lie beside the sweep, wherever it was started from.
    assert resumed.storage == str(home)


def test_a_sweeps_time_is_that_of_its_runs_without_what_lay_between(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    # The made trials span 24 seconds.
    assert SweepState.read(str(folder)).seconds == 24
    spent = {"seconds": 100.0, "gpu_seconds": 0.0, "machine_seconds": 100.0, "phases": {}}
    (folder / "spent.json").write_text(json.dumps(spent))
    assert SweepState.read(str(folder)).seconds == 100


NOTES = ("note: bioclip was pretrained on TreeOfLife-10M", "note: metaclip_vit_b16 is licensed for non-commercial use")


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """A sweep of version 0.1 on iNaturalist, whose provenance doesn't name its data."""
    folder = write_sweep(tmp_path / "runs" / "made", COUNTS, num_trials=6)
    for number, path in enumerate(sorted((folder / "trials").iterdir())):
        record = json.loads(path.read_text())
        record["config"]["encoder"]["name"] = ("bioclip", "metaclip_vit_b16")[number % 2]
        path.write_text(json.dumps(record))
    spec = folder / "sweep.yaml"
    spec.write_text(spec.read_text().replace("gone.parquet", "data/inat2018.parquet"))
    return folder


def test_scores_of_an_encoder_that_has_seen_the_data_carry_a_note(
    seen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (("sweep", "show", str(seen)), ("sweep", "list", str(seen.parent)), ("compare", str(seen))):
        text = " ".join(imbvlm(capsys, *arguments).split())
        assert all(note in text for note in NOTES), arguments
    for arguments in (("sweep", "show", str(seen)), ("sweep", "list", str(seen.parent)), ("compare", str(seen))):
        shown = json.loads(imbvlm(capsys, *arguments, "--json"))
        (sweep,) = shown if isinstance(shown, list) else [shown]
        assert len(sweep["notes"]) == len(NOTES)
        assert all(f"note: {text}".startswith(note) for text, note in zip(sweep["notes"], NOTES, strict=True))
    write_report(str(seen), str(tmp_path / "report"))
    # In the headline, and beside the results.
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("note: bioclip was pretrained on TreeOfLife-10M") >= 2
    with open(tmp_path / "report" / "tables" / "notes.csv", newline="") as stream:
        assert [row["note"] for row in csv.DictReader(stream)] == sweep["notes"]


def test_other_data_has_no_such_note(seen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"code": {}, "torch": "2", "data": "x", "data_name": "photos"}
    (seen / "provenance.json").write_text(json.dumps(content))
    text = imbvlm(capsys, "sweep", "show", str(seen))
    assert "TreeOfLife" not in text
    assert "non-commercial" in text
