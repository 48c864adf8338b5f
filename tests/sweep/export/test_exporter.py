"""What is taken away: which trials, in which folders, with a card that the Hugging Face hub reads."""

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from sweep_folder import sweep_spec, write_sweep
from tiny_images import TinyImages, extraction_in_this_process
from trial_epochs import set_metrics

import imbvlm
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.cli.sweep_listing import show_text
from imbvlm.config.encoder_entries import EncoderTerms
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.longtail.claims import Claim
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment, uncalibrated_note
from imbvlm.sweep.export.exporter import export_sweep, pareto_set
from imbvlm.sweep.export.model_card import CardContext, model_card
from imbvlm.sweep.export.trial_export import check_trained_on
from imbvlm.sweep.records.provenance import provenance, write_provenance
from imbvlm.sweep.records.sweep_folder import SweepState, read_spec
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.records.winner_selection import Selection, write_selection
from imbvlm.sweep.report.report_content import build
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.per_class_results import write_per_class_results

ROOT = Path(__file__).parents[3]
COUNTS = [500, 200, 120, 60, 30, 20, 15, 8, 3, 0]


def trial(number: int, overall: float, few: float | None) -> TrialRecord:
    config = sweep_spec().trial({"method": "linear_probe", "loss.name": "cross_entropy", "optim.lr": 0.1}).to_tree()
    metrics = {"epoch": 1.0, "val/balanced_accuracy": overall, "val/best_balanced_accuracy": overall}
    if few is not None:
        metrics["val/few_shot_accuracy"] = few
    return TrialRecord(trial_id=f"t{number}", kind="search", state="finished", config=config, epochs=[metrics])


def test_the_pareto_set_has_what_nothing_beats_both_overall_and_on_few_shot(tmp_path: Path) -> None:
    log, spec = TrialLog(str(tmp_path)), sweep_spec()
    pairs = [(0.8, 0.3), (0.75, 0.2), (0.7, 0.5), (0.7, 0.4), (0.2, 0.6)]
    for number, (overall, few) in enumerate(pairs, 1):
        log.save(trial(number, overall, few))
    records, objectives = pareto_set(log, spec)
    assert [record.trial_id for record in records] == ["t1", "t3", "t5"]
    assert objectives == ("val/balanced_accuracy", "val/few_shot_accuracy")
    without = TrialLog(str(tmp_path / "b"))
    without.save(trial(1, 0.8, None))
    with pytest.raises(ImbvlmError, match=r"no trial .* has val/balanced_accuracy and val/few_shot_accuracy"):
        pareto_set(without, spec)


def test_nothing_is_exported_of_a_sweep_without_a_result(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, refits=False, num_trials=1)
    (folder / "trials" / "t00001.json").unlink()
    with pytest.raises(ImbvlmError, match=r"no trial of .* has a result yet. Run `imbvlm sweep resume "):
        export_sweep(str(folder), str(tmp_path / "out"))


def card(folder: Path, **changes: Any) -> str:
    spec, log, manifest = read_spec(str(folder)), TrialLog.read(str(folder)), Manifest.read("embedded:fashion_mnist_lt")
    best = log.best(spec.objective)[0]
    refits = [record for record in log.of("refit") if record.name == "winner"]
    given = {
        "manifest": manifest,
        "adjustment": PostHocAdjustment(0.3, 0.1, 1.7),
        "refits": refits,
        "license_id": "apache-2.0",
        "has_onnx": True,
        "has_text": True,
        "revision": "",
        "encoder_terms": EncoderTerms("", []),
    }
    best = changes.pop("record", best)
    return model_card(CardContext(spec=spec, log=log, record=best, config=best.trial_config(), **{**given, **changes}))


def test_the_hub_reads_the_card_with_its_metrics_and_license(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    (tmp_path / "README.md").write_text(card(folder), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "imbvlm", "image-classification")
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    log = TrialLog.read(str(folder))
    refits = [record.epochs[-1] for record in log.of("refit") if record.name == "winner"]
    few = sum(epoch["test/few_shot_accuracy"] for epoch in refits) / len(refits)
    assert values["few accuracy, test"] == pytest.approx(few, abs=1e-4)
    assert data.eval_results[0].dataset_name == "fashion_mnist_lt"


def test_the_card_says_why_probabilities_are_not_calibrated(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    assert "Probabilities are calibrated on validation images" in card(folder)
    text = card(folder, uncalibrated=uncalibrated_note(1))
    assert "Probabilities are not calibrated: 1 class with 1 to 3 validation images; an image of none" in text


def test_the_cards_metadata_keep_adjusted_scores_apart_from_plain_ones(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, adjusted={"winner": 0.99})
    (tmp_path / "README.md").write_text(card(folder), encoding="utf-8")
    results = {
        result.metric_name: result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results
    }
    epochs = [record.epochs[-1] for record in TrialLog.read(str(folder)).of("refit") if record.name == "winner"]
    for name, split in (("", "test_post_hoc"), (", before its adjustments", "test")):
        mean = np.mean([epoch[f"{split}/balanced_accuracy"] for epoch in epochs])
        assert results[f"balanced accuracy, test{name}"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("name", ["5e-4", "no", "0x1f", "a: b"])
def test_the_hub_reads_a_data_set_s_name_as_text(tmp_path: Path, name: str) -> None:
    """The hub reads YAML 1.2, in which 5e-4 is a number."""
    manifest = replace(Manifest.read("embedded:fashion_mnist_lt"), name=name)
    text = card(write_sweep(tmp_path / "made", COUNTS), manifest=manifest)
    data = parse_yaml(text.split("---\n")[1], "").data
    assert data["model-index"][0]["results"][0]["dataset"] == {"name": name, "type": name, "split": "test"}


def test_a_name_in_the_card_is_text_and_no_markup(tmp_path: Path) -> None:
    manifest = replace(Manifest.read("embedded:fashion_mnist_lt"), name="<img src=x>")
    body = card(write_sweep(tmp_path / "made", COUNTS), manifest=manifest).split("---\n", 2)[2]
    assert "<img" not in body
    assert "classes of &lt;img src=x&gt; (" in body


@pytest.mark.parametrize(
    ("winner", "num_official", "words"),
    [
        (
            "t00003",
            0,
            "The winner of 24 trials and 2 baselines by class-balanced log-likelihood on 300 validation images",
        ),
        ("t00003", 100, "log-likelihood on 200 training images over 5 folds and 100 validation images, in the sweep"),
        ("b00002", 0, "The baseline linear probe, the winner of 24 trials and 2 baselines by class-balanced log-"),
    ],
)
def test_the_card_of_a_winner_by_likelihood_says_so_and_what_to_expect(
    tmp_path: Path, winner: str, num_official: int, words: str
) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, refits=False)
    claims = {"balanced_accuracy": Claim(0.641, 0.03, 5, 300), "few_shot_accuracy": Claim(0.44, 0.08, 1, 6)}
    write_selection(str(folder), Selection(winner, {winner: -0.5}, claims, 300, 5, num_official=num_official))
    log = TrialLog.read(str(folder))
    text = card(folder, record=log.records[winner], refits=[])
    assert words in text
    assert "of 80 % of the training images): balanced 64.1 ± 5.9 over 5 classes, few-shot not known (± 15.7" in text
    other = card(folder, refits=[])
    assert "Number 1 of 24 trials by val/best_balanced_accuracy" in other
    assert "To expect" not in other


def test_the_card_says_data_selection_adjustments_and_limits(tmp_path: Path) -> None:
    text = card(write_sweep(tmp_path / "made", COUNTS))
    assert "Number 1 of 24 trials by val/best_balanced_accuracy on validation images, in the sweep `made`" in text
    assert "tau 0.3, zero-shot logits mixed in with alpha 0.1, temperature 1.7" in text
    assert "2,480 train, 500 val, 2,000 test images; 10 classes (5 many-shot, 3 medium-shot, 2 few-shot)" in text
    assert "| baseline: linear probe | 2 |" in text
    assert "2 classes have fewer than 20 training images" in text


def test_the_card_of_an_encoder_without_text_names_neither_clip_nor_zero_shot_logits(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    text = card(folder, has_text=False, adjustment=PostHocAdjustment(0.3, 0.0, 1.7))
    assert "logit adjustment tau 0.3, temperature 1.7" in text
    assert "long-tail, onnx" in text
    assert "long-tail, clip, onnx" in card(folder)


def test_the_card_names_the_encoders_revision_license_and_what_it_has_seen(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    terms = EncoderTerms("cc-by-nc-4.0", ["It has seen the data."])
    text = card(folder, revision="a" * 40, encoder_terms=terms)
    metrics, _, rest = text.partition("## How it was selected")
    assert metrics.rstrip().endswith("It has seen the data.")
    assert f"(tinylit_lite0, revision {'a' * 40} of the hub, license cc-by-nc-4.0)" in rest
    assert "revision" not in card(folder)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.encoder_license, data.encoder_notes) == ("cc-by-nc-4.0", ["It has seen the data."])


def test_the_card_has_the_same_verdict_as_the_report_and_the_terminal(tmp_path: Path) -> None:
    for gain, start in ((0.4, "This model"), (0.0, "No win is shown: this model")):
        folder = write_sweep(tmp_path / f"made{gain}", COUNTS, gain=gain, adjusted={"winner": 0.92} if gain else None)
        report, text = build(ReportData.read(str(folder))), card(folder)
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        statement = report.verdict.statement.replace("The winner", "This model").replace("the winner", "this model")
        assert line == f"{statement} {report.verdict.details}"
        assert report.verdict.statement in show_text(SweepState.read(str(folder)))


def test_the_card_has_a_baseline_as_adjusted_too(tmp_path: Path) -> None:
    """A reader would take a model that a plain probe comes up to for better than it is."""
    folder = write_sweep(tmp_path / "made", COUNTS)
    log = TrialLog.read(str(folder))
    for record in log.of("refit"):
        if record.name == "linear probe":
            set_metrics(record, {"test_post_hoc/balanced_accuracy": 0.625})
            log.save(record)
    text = card(folder)
    assert re.search(r"^\| baseline: linear probe, post hoc \| 2 \| - \| 62\.5 ± 0\.0 \|", text, re.MULTILINE)
    assert "Post hoc: logits adjusted after training" in text


def test_the_card_has_no_row_of_an_adjustment_that_changes_no_prediction(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    log = TrialLog.read(str(folder))
    for record in log.of("refit"):
        adjusted = {key.replace("test/", "test_post_hoc/"): value for key, value in record.epochs[-1].items()}
        set_metrics(record, {key: value for key, value in adjusted.items() if key.startswith("test_post_hoc/")})
        log.save(record)
    text = card(folder)
    assert "| baseline: linear probe |" in text
    assert ", post hoc |" not in text
    assert "before its adjustments" not in text
    assert "Post hoc: logits adjusted after training" not in text


def test_a_model_that_has_not_seen_the_test_split_does_not_say_so(tmp_path: Path) -> None:
    text = card(write_sweep(tmp_path / "made", COUNTS), refits=[], license_id="other", adjustment=None)
    assert "The test split was not read for this model." in text
    assert "model-index" not in text
    assert "Probabilities are uncalibrated" in text
    assert "license_name: not-stated" in text
    assert "Not stated at export" in text


@pytest.mark.parametrize(
    ("names", "tower", "words"),
    [
        (("cat", "dog"), "one", None),
        (("dog", "cat"), "one", "other classes than in the training: class 0 is 'dog' in place of 'cat'"),
        (("cat", "dog", "fox"), "one", "other classes than in the training: 3 in place of 2"),
        (("cat", "dog"), "two", "the encoder local-dir:mine has other weights than in the training"),
    ],
)
def test_what_a_model_was_trained_on_is_what_is_exported_with_it(
    tmp_path: Path, names: tuple[str, ...], tower: str, words: str | None
) -> None:
    """A manifest or a tower's folder may have been made anew since."""
    write_per_class_results(str(tmp_path), {"class_names": ["cat", "dog"], "tower": "one"})
    tree = {"data": {"manifest": "m"}, "encoder": {"name": "local-dir:mine"}, "method": "linear_probe"}
    with nullcontext() if words is None else pytest.raises(ImbvlmError, match=words):
        check_trained_on(str(tmp_path), TrialConfig.from_tree(tree), names, tower)


# --------------------------------------------------------------------------------------- into a folder, again


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sweep's folder with two trials and no refit, which an export trains within this process."""
    home = tmp_path_factory.mktemp("searched")
    with extraction_in_this_process():
        yield searched_sweep(home, TinyImages(home))


def searched_sweep(home: Path, problem: TinyImages, manifest: str | None = None, storage: str | None = None) -> Path:
    base = problem.config("linear_probe", train__num_epochs=1).to_tree()
    base["data"]["manifest"] = manifest or problem.manifest
    space = {"parameters": {"optim.lr": {"loguniform": [0.01, 0.5]}}}
    spec = SweepSpec.from_tree({"name": "made", "base": base, "space": space, "refit_seeds": [0],
                                "storage": storage or str(home / "runs")})  # fmt: skip
    folder = home / "runs" / "made-1"
    log = TrialLog(str(folder))
    for number, value in ((1, 0.8), (2, 0.7)):
        draw = {"optim.lr": 0.1 * number}
        metrics = {"epoch": 1.0, "val/balanced_accuracy": value, "val/best_balanced_accuracy": value}
        log.save(TrialRecord(trial_id=f"t{number}", kind="search", state="finished", config=spec.trial(draw).to_tree(),
                             draw=draw, epochs=[metrics], started_at=1.0, ended_at=2.0))  # fmt: skip
    spec.to_yaml(folder / "sweep.yaml")
    write_provenance(str(folder), provenance(Manifest.read(problem.manifest)))
    return folder


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ("data", "can't be retrained: the manifest's rows, labels, splits or groups have changed since the sweep"),
        ("encoder", "the weights of the encoder .* are not those that the sweep began with"),
    ],
)
def test_nothing_is_retrained_on_other_data_or_with_another_encoder(tmp_path: Path, changed: str, problem: str) -> None:
    """A model that is trained now would claim to be the sweep's."""
    images = TinyImages(tmp_path)
    folder = str(searched_sweep(tmp_path, images))
    written = provenance(Manifest.read(images.manifest))
    if changed == "data":
        write_provenance(folder, {**written, "data": "another"})
    else:
        write_provenance(folder, {**written, "towers": {images.config("linear_probe").encoder.name: "another"}})
    with pytest.raises(ImbvlmError, match=problem):
        export_sweep(folder, str(tmp_path / "out"), say=lambda text: None)
    assert not (tmp_path / "out").exists()
    assert not (Path(folder) / "refits").exists()


@pytest.mark.parametrize("paths", ["relative", "absolute"])
def test_a_sweep_is_exported_from_any_working_directory_and_after_its_project_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: str
) -> None:
    """Version 0.1 wrote paths as they were typed; an absolute one is of where the project was."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    problem = TinyImages(home)
    relative = ("images/manifest.parquet", "runs")
    folder = searched_sweep(home, problem, *(relative if paths == "relative" else ()))
    # A tower isn't moved along.
    shutil.copytree(home, tmp_path / "moved")
    if paths == "absolute":
        Path(problem.manifest).unlink()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    moved = tmp_path / "moved" / "runs" / "made-1"
    with extraction_in_this_process():
        export_sweep(str(moved), "out", say=lambda text: None)
    written = parse_yaml((elsewhere / "out" / "best.yaml").read_text(), "").data["data"]["manifest"]
    assert written == str(tmp_path / "moved" / "images" / "manifest.parquet")
    if paths == "relative":
        # Where the export above has put its weights there is nothing to train.
        shutil.copytree(moved / "refits", folder / "refits")
        export_sweep(str(folder), "more", say=lambda text: None)
        Path(problem.manifest).unlink()
    else:
        shutil.rmtree(folder.parent / "features", ignore_errors=True)
    with pytest.raises(
        ImbvlmError, match=rf"is not at {problem.manifest}.*\. Put it back, or give its path with --man"
    ):
        export_sweep(str(folder), "third")
    shutil.copytree(moved / "refits", folder / "refits", dirs_exist_ok=True)
    export_sweep(str(folder), "third", manifest="../moved/images/manifest.parquet", say=lambda text: None)


def exported_files(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


MODEL_FILES = ["README.md", "calibration.json", "config.json", "model.safetensors", "tower/open_clip_config.json",
               "tower/open_clip_model.safetensors"]  # fmt: skip


def test_an_export_takes_the_place_of_the_one_before_and_of_nothing_else(searched: Path, tmp_path: Path) -> None:
    """What an earlier export left would be found by `predict`: a graph, or model/ beside several trials' folders."""
    out, said = tmp_path / "out", []
    export_sweep(str(searched), str(out), say=said.append)
    files = sorted(["best.yaml", "export.json", *(f"model/{name}" for name in MODEL_FILES)])
    assert exported_files(out) == files
    listed = json.loads((out / "export.json").read_text())
    assert sorted(listed["files"]) == sorted({*files} - {"export.json"})
    assert listed["files"]["best.yaml"] == hashlib.sha256((out / "best.yaml").read_bytes()).hexdigest()
    (out / "notes.txt").write_text("mine")
    export_sweep(str(searched), str(out), top=2, say=said.append)
    two = [f"{number}-t{number}/{name}" for number in (1, 2) for name in files if name != "export.json"]
    assert exported_files(out) == sorted([*two, "trials.csv", "export.json", "notes.txt"])
    assert [path.name for path in sorted(out.iterdir())] == ["1-t1", "2-t2", "export.json", "notes.txt", "trials.csv"]
    export_sweep(str(searched), str(out), say=said.append)
    assert exported_files(out) == sorted([*files, "notes.txt"])
    assert imbvlm.load(out, "cpu").predict([np.zeros((9, 9, 3), np.uint8)])[0].error is None


@pytest.mark.parametrize(
    ("path", "top", "words"),
    [
        ("model/onnx/model.onnx", 1, "out has model/onnx/model.onnx. Remove"),
        ("model/config.json", 2, "out has model/config.json. Remove"),
        ("config.json", 1, "out has config.json. Remove"),
        ("7-t9/model/config.json", 1, "out has 7-t9/model/config.json. Remove"),
        ("best.yaml", 1, "out has best.yaml. Remove"),
        ("2-t2/mine.txt", 2, "out has 2-t2/mine.txt. Remove"),
    ],
)
def test_what_no_export_has_listed_is_named_before_anything_is_written(
    searched: Path, tmp_path: Path, path: str, top: int, words: str
) -> None:
    """An export of version 0.1 has no list: nobody knows whose files these are."""
    file = tmp_path / "out" / path
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ImbvlmError, match=f"{words}.* or name another folder with -o"):
        export_sweep(str(searched), str(tmp_path / "out"), top=top)
    assert exported_files(tmp_path / "out") == [path]
    assert file.read_text() == "mine"


def unlisted(out: Path) -> None:
    """Make an export one of version 0.1, which wrote neither a list nor digests nor calibration."""
    (out / "export.json").unlink()
    for file in out.glob("**/calibration.json"):
        file.unlink()
    for file in out.glob("**/model/config.json"):
        content = json.loads(file.read_text())
        del content["digests"]
        file.write_text(json.dumps(content))


@pytest.mark.parametrize("top", [1, 2])
def test_an_export_of_version_0_1_is_replaced(searched: Path, tmp_path: Path, top: int) -> None:
    out = tmp_path / "out"
    export_sweep(str(searched), str(out), top=top, say=lambda text: None)
    unlisted(out)
    (out / "notes.txt").write_text("mine")
    export_sweep(str(searched), str(out), top=3 - top, say=lambda text: None)
    listed = json.loads((out / "export.json").read_text())["files"]
    assert exported_files(out) == sorted([*listed, "export.json", "notes.txt"])


@pytest.mark.parametrize(
    ("path", "content"), [("model/notes.txt", "mine"), ("model/config.json", "{}"), ("model/config.json", "{half")]
)
def test_what_version_0_1_cannot_have_exported_is_named(
    searched: Path, tmp_path: Path, path: str, content: str
) -> None:
    out = tmp_path / "out"
    export_sweep(str(searched), str(out), say=lambda text: None)
    unlisted(out)
    (out / path).write_text(content)
    with pytest.raises(ImbvlmError, match=rf"out has .*{path}.*\. Remove them, or name another folder with -o"):
        export_sweep(str(searched), str(out), say=lambda text: None)
    assert (out / path).read_text() == content


def test_a_listed_file_that_somebody_has_changed_stays_and_is_named(searched: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_sweep(str(searched), str(out), say=lambda text: None)
    card = out / "model" / "README.md"
    card.write_text(card.read_text() + "mine")
    with pytest.raises(ImbvlmError, match=r"out has model/README\.md \(changed since\). Remove"):
        export_sweep(str(searched), str(out), top=2)
    assert card.read_text().endswith("mine")


@pytest.mark.parametrize("step", ["write_model", "put"])
def test_an_export_that_is_cut_off_leaves_the_one_before_or_can_be_repeated(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = tmp_path / "out"
    export_sweep(str(searched), str(out), say=lambda text: None)
    before = {path: (out / path).read_bytes() for path in exported_files(out)}
    with monkeypatch.context() as patch:
        if step == "write_model":
            patch.setattr("imbvlm.sweep.export.trial_export.write_model", interrupt)
        else:
            patch.setattr("imbvlm.sweep.export.export_folder.storage.delete", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export_sweep(str(searched), str(out), top=2, say=lambda text: None)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    if step == "write_model":
        assert {path: (out / path).read_bytes() for path in exported_files(out)} == before
    export_sweep(str(searched), str(out), top=2, say=lambda text: None)
    assert not (out / "model").exists()


def interrupt(*given: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_a_sweep_that_cannot_be_written_to_is_exported_all_the_same(searched: Path, tmp_path: Path) -> None:
    """On a read-only disk; for root, whom no mode binds, with a file in the place of each folder."""
    folder, said = tmp_path / "runs" / "made-1", []
    shutil.copytree(searched, folder, ignore=lambda place, names: {"refits", "export.log"} & {*names})
    shutil.copytree(searched.parent / "features", folder.parent / "features")
    (folder / "refits").write_text("")
    (folder / "export.log").mkdir()
    before = exported_files(folder)
    export_sweep(str(folder), str(tmp_path / "out"), say=said.append)
    assert "t1 (80.0 % on validation) is retrained" in said[0]
    assert f"its weights aren't kept for another export: can't write {folder}/refits/export-t1-seed0/" in said[1]
    assert exported_files(folder) == before
    assert imbvlm.load(tmp_path / "out", "cpu").class_names == tuple(f"class {label}" for label in range(5))


def test_nothing_is_left_where_an_export_could_not_be_written(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imbvlm.sweep.export.trial_export.write_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_sweep(str(searched), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ImbvlmError, match=r"an export needs a folder, and .* is a file"):
        export_sweep(str(searched), str(tmp_path / "file"))


# ------------------------------------------------------------------------------------------- of a real sweep


@pytest.fixture(scope="module")
def sweep(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, str(ROOT / "sweeps" / "quickstart.py"), "--smoke"]
    subprocess.run(command, cwd=home, check=True, capture_output=True)
    return next((home / "runs").glob("quickstart-*"))


def command(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "imbvlm", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_exported_model_scores_on_the_test_split_what_the_report_says(sweep: Path, tmp_path: Path) -> None:
    command("export", sweep, "-o", tmp_path / "best")
    command("predict", tmp_path / "best", "embedded:fashion_mnist_lt", "--split", "test", "-o", tmp_path / "p.parquet")
    manifest = Manifest.read("embedded:fashion_mnist_lt").split("test")
    names = pq.read_table(tmp_path / "p.parquet").column("class_1").to_pylist()
    right = sum(manifest.class_names[label] == name for label, name in zip(manifest.labels, names, strict=True))
    (delivered,) = (sweep / "trials").glob("delivered-*.json")
    expected = json.loads(delivered.read_text())["epochs"][-1]["test/top1_accuracy"]
    # Features were stored in batches of another size: a tie or two may fall to the other side.
    assert right / len(names) == pytest.approx(expected, abs=0.0015)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_best_two_and_the_pareto_set_with_their_graphs(sweep: Path, tmp_path: Path) -> None:
    printed = command("export", sweep, "-o", tmp_path / "two", "--top", 2, "--onnx", "--licence", "mit")
    assert printed.count("is retrained on all training images") <= 1, (
        "the winner has a refit, and so has a blend's member"
    )
    with open(tmp_path / "two" / "trials.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [Path(row["folder"]).name for row in rows] == sorted(
        p.name for p in (tmp_path / "two").iterdir() if p.is_dir()
    )
    for row in rows:
        folder = tmp_path / "two" / row["folder"]
        assert (folder / "best.yaml").exists()
        assert (folder / "model" / "onnx" / "model.onnx").exists()
        assert ModelCard.load(folder / "model" / "README.md").data.license == "mit"
        (prediction,) = imbvlm.load(folder).predict(
            [Manifest.read("embedded:fashion_mnist_lt").table["bytes"][0].as_py()]
        )
        assert prediction.error is None
    front = command("export", sweep, "-o", tmp_path / "front", "--pareto")
    assert "none better in all of val/balanced_accuracy, val/few_shot_accuracy" in front
    # What was trained again for the best two isn't trained another time.
    known = {row["trial"] for row in rows}
    assert not any(f"{trial_id} (" in front for trial_id in known)
